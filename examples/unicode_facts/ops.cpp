// Training kernels of the demo: product-key read with a sparse backward, attention over shared prefixes, lazy Adam.
//
// Built at run time by ops.py (g++ -O3 -march=native) and called through ctypes. All arrays are dense and row-major;
// the caller owns every buffer and checks shapes. Single-threaded on purpose: a training run owns one core.
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

// exp for x <= 0 (softmax after its maximum is subtracted), relative error 2e-7, written so that loops vectorise:
// 2 ** n by the exponent bits, e ** r by the Cephes polynomial, |r| <= ln 2 / 2. Below -87 it is e ** -87, about 1e-38.
inline float exp_negative(float x) {
    x = x < -87.f ? -87.f : x;
    const float n = __builtin_rintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return p * __builtin_bit_cast(float, ((int32_t)n + 127) << 23);
}

constexpr int kMaxBest = 32;
constexpr int kMaxPairs = 128;  // k = 32 has 119
constexpr int kMaxKeys = 1024;
constexpr int kMaxLength = 128;

inline bool all_zero(const float* x, int d) {
    float largest = 0;
    for (int j = 0; j < d; j++) largest = fabsf(x[j]) > largest ? fabsf(x[j]) : largest;
    return largest == 0;
}

inline float sigmoid(float x) {
    const float e = exp_negative(x < 0 ? x : -x);
    return (x < 0 ? e : 1.f) / (1.f + e);
}

#ifdef __AVX512F__

constexpr int kLanes = 16;

// Sorts the best k of `count` scores (padded with -inf to whole vectors) into best/best_id, by counting for each how
// many beat it: no branch depends on the data. Equal scores keep their order.
inline void keep_best(const float* score, const int* label, int count, int k, float* best, int* best_id) {
    const int vectors = (count + kLanes - 1) / kLanes;
    for (int i = 0; i < count; i++) {
        const __m512 x = _mm512_set1_ps(score[i]);
        int rank = 0;
        for (int v = 0; v < vectors; v++) {
            const __m512 y = _mm512_loadu_ps(score + v * kLanes);
            const int before = i - v * kLanes;  // lanes below this come earlier
            const __mmask16 earlier = before <= 0 ? 0 : before >= kLanes ? 0xFFFF : (1 << before) - 1;
            const __mmask16 beats =
                _mm512_cmp_ps_mask(y, x, _CMP_GT_OQ) | (_mm512_cmp_ps_mask(y, x, _CMP_EQ_OQ) & earlier);
            rank += __builtin_popcount(beats);
        }
        if (rank < k) {
            best[rank] = score[i];
            best_id[rank] = label[i];
        }
    }
}

inline void pad(float* score, int count) {
    _mm512_storeu_ps(score + count, _mm512_set1_ps(-INFINITY));
}

// Top k of n. The k-th best of 32 column maxima bounds the k-th best score from below; the few scores that reach it
// are compressed out and sorted. k <= 32, n a multiple of 32.
inline void top_k(const float* score, int n, int k, float* best, int* best_id) {
    float column[2 * kLanes + kLanes], found[kMaxKeys + kLanes], sorted[kMaxBest];
    int label[kMaxKeys + kLanes], unused[kMaxBest], any[2 * kLanes] = {};
    __m512 low = _mm512_loadu_ps(score), high = _mm512_loadu_ps(score + kLanes);
    for (int r = 2 * kLanes; r < n; r += 2 * kLanes) {
        low = _mm512_max_ps(low, _mm512_loadu_ps(score + r));
        high = _mm512_max_ps(high, _mm512_loadu_ps(score + r + kLanes));
    }
    _mm512_storeu_ps(column, low);
    _mm512_storeu_ps(column + kLanes, high);
    keep_best(column, any, 2 * kLanes, k, sorted, unused);
    const __m512 threshold = _mm512_set1_ps(sorted[k - 1]);
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int count = 0;
    for (int r = 0; r < n; r += kLanes) {
        const __m512 x = _mm512_loadu_ps(score + r);
        const __mmask16 in = _mm512_cmp_ps_mask(x, threshold, _CMP_GE_OQ);
        _mm512_storeu_ps(found + count, _mm512_maskz_compress_ps(in, x));
        _mm512_storeu_si512(label + count, _mm512_maskz_compress_epi32(in, lane));
        count += __builtin_popcount(in);
        lane = _mm512_add_epi32(lane, _mm512_set1_epi32(kLanes));
    }
    pad(found, count);
    keep_best(found, label, count, k, best, best_id);
}

#else

// The best k of `count` scores into best/best_id by insertion. Equal scores keep their order.
inline void keep_best(const float* score, const int* label, int count, int k, float* best, int* best_id) {
    int kept = 0;
    for (int t = 0; t < count; t++) {
        const float x = score[t];
        if (kept == k && x <= best[k - 1]) continue;
        int p = kept < k ? kept++ : k - 1;
        while (p > 0 && best[p - 1] < x) {
            best[p] = best[p - 1];
            best_id[p] = best_id[p - 1];
            p--;
        }
        best[p] = x;
        best_id[p] = label[t];
    }
}

inline void pad(float*, int) {}

inline void top_k(const float* score, int n, int k, float* best, int* best_id) {
    int label[kMaxKeys];
    for (int j = 0; j < n; j++) label[j] = j;
    keep_best(score, label, n, k, best, best_id);
}

#endif

}  // namespace

extern "C" {

// scores [2H, M, n] (half-keys of head h at 2h and 2h+1) -> ids [M, H*k] = i1*n + i2, weights [M, H*k] softmax per head.
void product_key_top_k(const float* scores, int64_t M, int H, int n, int k, int32_t* ids, float* weights) {
    float s1[kMaxBest], s2[kMaxBest], sum[kMaxPairs + 16], best[kMaxBest];
    int a[kMaxBest], b[kMaxBest], row[kMaxPairs], id[kMaxBest];
    for (int64_t m = 0; m < M; m++)
        for (int h = 0; h < H; h++) {
            top_k(scores + ((2 * h) * M + m) * n, n, k, s1, a);
            top_k(scores + ((2 * h + 1) * M + m) * n, n, k, s2, b);
            int pairs = 0;
            for (int i = 0; i < k; i++)
                for (int j = 0; (i + 1) * (j + 1) <= k; j++) {  // (i + 1)(j + 1) - 1 other pairs are no worse
                    sum[pairs] = s1[i] + s2[j];
                    row[pairs++] = a[i] * n + b[j];
                }
            pad(sum, pairs);
            keep_best(sum, row, pairs, k, best, id);
            float* w = weights + (m * H + h) * k;
            float z = 0;
            for (int i = 0; i < k; i++) {
                ids[(m * H + h) * k + i] = id[i];
                w[i] = exp_negative(best[i] - best[0]);
                z += w[i];
            }
            for (int i = 0; i < k; i++) w[i] /= z;
        }
}

// Cross-entropy of A rows of V logits, in place: logits become their gradient of the mean loss; returns the mean (nats).
// Rows with a negative target do not count.
double cross_entropy(float* logits, const int64_t* targets, int64_t A, int V) {
    int64_t asked = 0;
    for (int64_t a = 0; a < A; a++) asked += targets[a] >= 0;
    const float each = 1.f / asked;
    double total = 0;
    for (int64_t a = 0; a < A; a++) {
        float* x = logits + a * V;
        if (targets[a] < 0) {
            memset(x, 0, sizeof(float) * V);
            continue;
        }
        const float target = x[targets[a]];
        float top = x[0], z = 0;
        for (int j = 0; j < V; j++) top = x[j] > top ? x[j] : top;
        for (int j = 0; j < V; j++) {
            x[j] = exp_negative(x[j] - top);
            z += x[j];
        }
        total += logf(z) + top - target;
        const float scale = each / z;
        for (int j = 0; j < V; j++) x[j] *= scale;
        x[targets[a]] -= each;
    }
    return total / asked;
}

// out[m] = sum_l weights[m,l] * table[ids[m,l]]
void weighted_sum(const float* table, const int32_t* ids, const float* weights, int64_t M, int L, int d, float* out) {
    for (int64_t m = 0; m < M; m++) {
        float* o = out + m * d;
        memset(o, 0, sizeof(float) * d);
        for (int l = 0; l < L; l++) {
            if (l + 6 < L)
                for (int q = 0; q < d; q += 16) __builtin_prefetch(table + (int64_t)ids[m * L + l + 6] * d + q);
            const float* row = table + (int64_t)ids[m * L + l] * d;
            const float x = weights[m * L + l];
            for (int j = 0; j < d; j++) o[j] += x * row[j];
        }
    }
}

// Gradients of weighted_sum: adds into grad_table, marks touched rows, writes grad_weights [M, L].
void weighted_sum_backward(const float* table, const int32_t* ids, const float* weights, const float* grad_out,
                           int64_t M, int L, int d, float* grad_table, uint8_t* touched, float* grad_weights) {
    for (int64_t m = 0; m < M; m++) {
        const float* g = grad_out + m * d;
        if (all_zero(g, d)) {  // padding: its rows must not count as touched
            memset(grad_weights + m * L, 0, sizeof(float) * L);
            continue;
        }
        for (int l = 0; l < L; l++) {
            if (l + 5 < L) {
                const int64_t next = (int64_t)ids[m * L + l + 5] * d;
                for (int q = 0; q < d; q += 16) {
                    __builtin_prefetch(table + next + q);
                    __builtin_prefetch(grad_table + next + q, 1);
                }
            }
            const int32_t id = ids[m * L + l];
            const float* row = table + (int64_t)id * d;
            float* t = grad_table + (int64_t)id * d;
            touched[id] = 1;
            const float x = weights[m * L + l];
            float dot = 0;
            for (int j = 0; j < d; j++) {
                dot += g[j] * row[j];
                t[j] += x * g[j];
            }
            grad_weights[m * L + l] = dot;
        }
    }
}

// Softmax and score gradients, sparse: at most 2k of a token's 2n half-key scores have a gradient.
// query [M, H, 2, c], keys [H, 2, n, c]; writes grad_query, adds into grad_keys.
void product_key_backward(const float* query, const float* keys, const int32_t* ids, const float* weights,
                          const float* grad_weights, int64_t M, int H, int n, int k, int c, float* grad_query,
                          float* grad_keys) {
    for (int64_t m = 0; m < M; m++)
        for (int h = 0; h < H; h++) {
            const int64_t base = (m * H + h) * k;
            const float *q1 = query + (m * H + h) * 2 * c, *q2 = q1 + c;
            float *g1 = grad_query + (m * H + h) * 2 * c, *g2 = g1 + c;
            memset(g1, 0, sizeof(float) * 2 * c);
            float mean = 0;
            for (int i = 0; i < k; i++) mean += grad_weights[base + i] * weights[base + i];
            for (int i = 0; i < k; i++) {
                const float x = weights[base + i] * (grad_weights[base + i] - mean);
                const int64_t o1 = ((int64_t)(2 * h) * n + ids[base + i] / n) * c;
                const int64_t o2 = ((int64_t)(2 * h + 1) * n + ids[base + i] % n) * c;
                for (int j = 0; j < c; j++) {
                    g1[j] += x * keys[o1 + j];
                    grad_keys[o1 + j] += x * q1[j];
                }
                for (int j = 0; j < c; j++) {
                    g2[j] += x * keys[o2 + j];
                    grad_keys[o2 + j] += x * q2[j];
                }
            }
        }
}

// Rotates the pairs (j, j + e/2) of x [N, H, e] by angles cos, sin [N, e/2]; sign -1 turns back (the gradient).
void rotate_halves(const float* x, const float* cosine, const float* sine, int64_t N, int H, int e, float sign,
                   float* out) {
    const int half = e / 2;
    for (int64_t i = 0; i < N; i++) {
        const float *c = cosine + i * half, *s = sine + i * half;
        for (int h = 0; h < H; h++) {
            const float* a = x + (i * H + h) * e;
            float* o = out + (i * H + h) * e;
            for (int j = 0; j < half; j++) {
                const float turn = sign * s[j];
                o[j] = a[j] * c[j] - a[half + j] * turn;
                o[half + j] = a[j] * turn + a[half + j] * c[j];
            }
        }
    }
}

// SwiGLU of gate_up [N, 2f] (gate first) -> out [N, f] = silu(gate) * up
void swiglu(const float* gate_up, int64_t N, int f, float* out) {
    for (int64_t i = 0; i < N; i++) {
        const float *g = gate_up + i * 2 * f, *u = g + f;
        float* o = out + i * f;
        for (int j = 0; j < f; j++) o[j] = g[j] * sigmoid(g[j]) * u[j];
    }
}

void swiglu_backward(const float* gate_up, const float* grad_out, int64_t N, int f, float* grad) {
    for (int64_t i = 0; i < N; i++) {
        const float *g = gate_up + i * 2 * f, *u = g + f, *o = grad_out + i * f;
        float *dg = grad + i * 2 * f, *du = dg + f;
        for (int j = 0; j < f; j++) {
            const float s = sigmoid(g[j]), silu = g[j] * s;
            dg[j] = o[j] * u[j] * (s + silu * (1.f - s));
            du[j] = o[j] * silu;
        }
    }
}

// Causal attention over a batch whose equal prefixes are stored once (see packing.py).
//   path [B, T]: node of sequence b at position t; node i belongs to sequence owner[i] at position position[i].
// q, k, v, out [N, H, e]; probabilities [N, H, T] are kept for the backward.
void prefix_attention(const float* q, const float* k, const float* v, const int32_t* path, const int32_t* owner,
                      const int32_t* position, int64_t N, int T, int H, int e, float scale, float* out,
                      float* probabilities) {
    for (int64_t i = 0; i < N; i++) {
        const int32_t* nodes = path + (int64_t)owner[i] * T;
        const int length = position[i] + 1;
        for (int h = 0; h < H; h++) {
            const float* qi = q + (i * H + h) * e;
            float* p = probabilities + (i * H + h) * T;
            float* o = out + (i * H + h) * e;
            float top = -INFINITY, z = 0;
            for (int t = 0; t < length; t++) {
                const float* kt = k + ((int64_t)nodes[t] * H + h) * e;
                float dot = 0;
                for (int j = 0; j < e; j++) dot += qi[j] * kt[j];
                p[t] = dot * scale;
                top = p[t] > top ? p[t] : top;
            }
            for (int t = 0; t < length; t++) p[t] = exp_negative(p[t] - top);
            for (int t = 0; t < length; t++) z += p[t];
            const float inverse = 1.f / z;
            memset(o, 0, sizeof(float) * e);
            for (int t = 0; t < length; t++) {
                p[t] *= inverse;
                const float* vt = v + ((int64_t)nodes[t] * H + h) * e;
                for (int j = 0; j < e; j++) o[j] += p[t] * vt[j];
            }
        }
    }
}

// grad_q is written; grad_k and grad_v must arrive zeroed.
void prefix_attention_backward(const float* q, const float* k, const float* v, const float* probabilities,
                               const float* grad_out, const int32_t* path, const int32_t* owner,
                               const int32_t* position, int64_t N, int T, int H, int e, float scale, float* grad_q,
                               float* grad_k, float* grad_v) {
    float ds[kMaxLength];
    for (int64_t i = 0; i < N; i++) {
        const int32_t* nodes = path + (int64_t)owner[i] * T;
        const int length = position[i] + 1;
        for (int h = 0; h < H; h++) {
            const int64_t at = (i * H + h) * e;
            const float *qi = q + at, *g = grad_out + at, *p = probabilities + (i * H + h) * T;
            float* gq = grad_q + at;
            float mean = 0;
            for (int t = 0; t < length; t++) {
                const int64_t node = ((int64_t)nodes[t] * H + h) * e;
                float dot = 0;
                for (int j = 0; j < e; j++) {
                    dot += g[j] * v[node + j];
                    grad_v[node + j] += p[t] * g[j];
                }
                ds[t] = dot;
                mean += dot * p[t];
            }
            memset(gq, 0, sizeof(float) * e);
            for (int t = 0; t < length; t++) {
                const int64_t node = ((int64_t)nodes[t] * H + h) * e;
                const float x = p[t] * (ds[t] - mean) * scale;
                for (int j = 0; j < e; j++) {
                    gq[j] += x * k[node + j];
                    grad_k[node + j] += x * qi[j];
                }
            }
        }
    }
}

// Adam on the touched rows only, each with its own step count for the bias correction; clears gradient and mark.
void lazy_adam(float* table, float* grad, float* first, float* second, uint8_t* touched, int32_t* steps, int64_t rows,
               int d, float lr, float beta1, float beta2, float epsilon) {
    for (int64_t r = 0; r < rows; r++) {
        if (!touched[r]) continue;
        touched[r] = 0;
        const int t = ++steps[r];
        const float c1 = 1.f / (1.f - powf(beta1, t)), c2 = 1.f / (1.f - powf(beta2, t));
        float *p = table + r * d, *g = grad + r * d, *m = first + r * d, *v = second + r * d;
        for (int j = 0; j < d; j++) {
            const float x = g[j];
            g[j] = 0;
            m[j] = beta1 * m[j] + (1 - beta1) * x;
            v[j] = beta2 * v[j] + (1 - beta2) * x * x;
            p[j] -= lr * (m[j] * c1) / (sqrtf(v[j] * c2) + epsilon);
        }
    }
}

}  // extern "C"
