// Running a kernel over a batch's rows while some of them are still being read.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "row_reader.h"
#include "slot_states.h"
#include "thread_pool.h"

namespace memlane {

struct Waited {
  double stall_seconds = 0;  // in which nothing could be computed
  bool failed = false;       // some rows are unreadable: what was computed for their tokens is of no use
};

// Calls kernel(from, to) for ranges that cover flat positions [begin, begin + count) of a [tokens, k] batch, each once
// its rows are ready. Within a token positions go by in ascending order, so that its sum does not depend on what was
// missing; tokens do not wait for each other.
//
//     token 0   hit hit MISS hit hit ...      summed up to the miss at once, on from there when the row has come
//     token 1   hit hit hit hit hit ...       summed at once
template <class Kernel>
Waited run_as_ready(const std::int32_t* slots, std::size_t k, std::size_t begin, std::size_t count,
                    const SlotStates& states, RowReader& reader, ReadRequest* request, std::size_t min_tokens,
                    const Kernel& kernel) {
  struct Token {
    std::size_t at;
    std::size_t end;
    bool failed;
  };
  Waited waited;
  std::vector<Token> waiting;
  for (std::size_t at = begin; at < begin + count;) {
    const std::size_t end = std::min((at / k + 1) * k, begin + count);
    waiting.push_back({at, end, false});
    at = end;
  }
  while (true) {
    const std::size_t seen = request == nullptr ? 0 : request->settled.load();
    parallel_ranges(waiting.size(), min_tokens, [&](std::size_t first, std::size_t last) {
      for (std::size_t t = first; t < last; ++t) {
        Token& token = waiting[t];
        std::size_t ready = token.at;
        while (ready < token.end && states[static_cast<std::size_t>(slots[ready - begin])] == SlotStates::ready) ++ready;
        if (ready > token.at) kernel(token.at, ready);
        token.at = ready;
        token.failed =
            ready < token.end && states[static_cast<std::size_t>(slots[ready - begin])] == SlotStates::failed;
      }
    });
    for (const Token& token : waiting) waited.failed |= token.failed;
    std::erase_if(waiting, [](const Token& token) { return token.failed || token.at == token.end; });
    if (waiting.empty()) return waited;
    // Not for every row on its own: going on costs a look at each waiting token.
    const std::size_t left = request == nullptr ? 0 : request->rows.size() - std::min(seen, request->rows.size());
    const auto started = std::chrono::steady_clock::now();
    for (const std::size_t wanted = seen + std::max<std::size_t>(1, left / 4); left > 0;) {
      const std::size_t now = request->settled.load();
      if (now >= wanted || now == request->rows.size()) break;
      reader.wait(*request, now);
    }
    waited.stall_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    if (left == 0) {  // rows of another request, which its own owner has not waited for
      waited.failed = true;
      return waited;
    }
  }
}

}  // namespace memlane
