"""Stand-ins for attention libraries: the signatures of the real ones, their demands as assertions, their results in plain torch.

Results do not depend on what lies beyond a sequence's length, as those of the real ones: they read no more than that.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def attend(
    q: Tensor, k: Tensor, v: Tensor, queries: list[int], lengths: list[int], pages: list[list[int]]
) -> Tensor:
    """Causal, one sequence after another in fp32: q [T, H, hd], k and v [blocks, block_size, KV, hd]."""
    outs, begin = [], 0
    for count, length, blocks in zip(queries, lengths, pages, strict=True):
        keys, values = (x[blocks].flatten(0, 1)[:length].float() for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q[begin : begin + count].float(), keys) * q.shape[2] ** -0.5
        hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hts,shd->thd", weights, values))
        begin += count
    assert begin == len(q)
    return torch.cat(outs).to(q.dtype)


def _check_cache(q: Tensor, k: Tensor, v: Tensor, unit: int) -> None:
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in HALF
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.shape == v.shape
    assert k.dim() == 4
    assert k.shape[1] % unit == 0, "Paged KV cache block size must be divisible by 256"
    assert k.shape[3] == q.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.shape[-2] % k.shape[2] == 0


def _check_int32(*tensors: Tensor) -> None:
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors)


def _check_tables(table: Tensor, sequences: int, blocks: int) -> None:
    assert table.dtype == torch.int32
    assert table.stride(-1) == 1
    assert table.dim() == 2
    assert len(table) == sequences
    assert 0 <= int(table.min()) <= int(table.max()) < blocks


# --- torch.nn.attention.varlen (2.13) ---


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert block_table is not None
    assert seqused_k is not None
    assert cu_seq_k is not None
    _check_cache(query, key, value, 256)
    _check_int32(cu_seq_q, cu_seq_k, seqused_k)
    _check_tables(block_table, len(seqused_k), len(key))
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert window_size == (-1, 0)
    queries, lengths = cu_seq_q.diff().tolist(), seqused_k.tolist()
    assert cu_seq_k.diff().tolist() == lengths
    assert int(cu_seq_q[0]) == int(cu_seq_k[0]) == 0
    assert max_q == max(queries)
    assert max_k >= max(lengths)
    assert block_table.shape[1] * key.shape[1] >= max(lengths)
    return attend(query, key, value, queries, lengths, block_table.tolist())


def varlen_module() -> ModuleType:
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn  # type: ignore[attr-defined]
    return module


# --- flash-attn (2.8) ---


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert block_table is not None
    assert causal
    _check_cache(q, k, v, 256)
    _check_int32(cu_seqlens_q, cu_seqlens_k)
    _check_tables(block_table, len(cu_seqlens_q) - 1, len(k))
    queries, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max_seqlen_q == max(queries)
    assert max_seqlen_k >= max(lengths)
    return attend(q, k, v, queries, lengths, block_table.tolist())


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    assert cache_seqlens is not None
    assert block_table is not None
    assert q.dim() == 4
    assert causal
    assert k is None
    _check_cache(q, k_cache, v_cache, 256)
    _check_int32(cache_seqlens)
    _check_tables(block_table, len(q), len(k_cache))
    assert len(cache_seqlens) == len(q)
    n, count = q.shape[:2]
    out = attend(q.flatten(0, 1), k_cache, v_cache, [count] * n, cache_seqlens.tolist(), block_table.tolist())
    return out.view_as(q)


def flash_attn_module() -> ModuleType:
    module = ModuleType("flash_attn")
    vars(module).update(
        __version__="2.8.3",
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )
    return module


# --- FlashInfer (0.6) ---


class _Wrapper:
    """What both kinds share: `plan` states the pages, `run` takes queries and the cache."""

    def _take(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8
        assert workspace.data_ptr() % 16 == 0
        assert kv_layout == "NHD"
        self.shape: tuple[int, int, int, int] | None = None

    def _plan(
        self,
        queries: list[int],
        indptr: Tensor,
        indices: Tensor,
        last: Tensor,
        shape: tuple[int, int, int, int],
        q_dtype: Any,
        kv_dtype: Any,
    ) -> None:
        assert indptr.device.type == last.device.type == "cpu"  # or the host waits for the device
        _check_int32(indptr, indices, last)
        assert len(indptr) == len(last) + 1 == len(queries) + 1
        assert len(indices) == int(indptr[-1])
        assert int(indptr.diff().min()) >= 1
        assert 1 <= int(last.min()) <= int(last.max()) <= shape[3]
        assert q_dtype in HALF
        assert kv_dtype == q_dtype
        self.queries, self.shape, self.dtype = queries, shape, q_dtype
        self.indptr, self.indices, self.last = indptr.clone(), indices.clone(), last.clone()

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert self.shape is not None, "run before plan"
        k, v = paged_kv_cache
        heads, kv_heads, head_dim, page_size = self.shape
        _check_cache(q, k, v, 1)
        assert k.stride() == v.stride(), "k/v strides must be identical"
        assert q.dtype == self.dtype
        assert q.shape[1:] == (heads, head_dim)
        assert k.shape[1:] == (page_size, kv_heads, head_dim)
        ends = self.indptr.tolist()
        pages = [self.indices[a:b].tolist() for a, b in pairwise(ends)]
        lengths = [
            (len(blocks) - 1) * page_size + last
            for blocks, last in zip(pages, self.last.tolist(), strict=True)
        ]
        return attend(q, k, v, self.queries, lengths, pages)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        self._take(float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores
        self.buffers = None
        if use_cuda_graph:
            self.buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
            _check_int32(*self.buffers)
            assert len(self.buffers[0]) == len(self.buffers[2]) + 1

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int,
        *, pos_encoding_mode: str = "NONE", window_left: int = -1, logits_soft_cap: float | None = None,
        q_data_type: Any = "float16", kv_data_type: Any = None, sm_scale: float | None = None, non_blocking: bool = True,
    ) -> None:  # fmt: skip
        assert self.use_tensor_cores or num_qo_heads // num_kv_heads in (1, 2, 4, 8)
        assert head_dim in (64, 128, 256)
        shape = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan([1] * len(last_page_len), indptr, indices, last_page_len, shape, q_data_type, kv_data_type)
        if self.buffers is not None:
            assert len(last_page_len) == len(self.buffers[2]), (
                "the batch size should be fixed in cudagraph mode"
            )
            assert len(indices) <= len(self.buffers[1])
            for buffer, numbers in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
                buffer[: len(numbers)] = numbers
            self.indptr, self.indices, self.last = self.buffers


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False
    ) -> None:
        self._take(float_workspace_buffer, kv_layout)
        assert not use_cuda_graph

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        *, causal: bool = False, sm_scale: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None, non_blocking: bool = True,
    ) -> None:  # fmt: skip
        assert causal
        assert qo_indptr.device.type == "cpu"
        _check_int32(qo_indptr)
        assert int(qo_indptr[0]) == 0
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._plan(
            qo_indptr.diff().tolist(),
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            shape,
            q_data_type,
            kv_data_type,
        )


def flashinfer_module() -> Any:
    return SimpleNamespace(
        __version__="0.6.0",
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    )
