#include "row_index.h"

#include <stdexcept>

#include "policy_lru.h"
#include "policy_s3fifo.h"
#include "policy_sieve.h"
#include "policy_tinylfu.h"
#include "row_index_of.h"

namespace memlane {

namespace {

template <class... Policies>
struct List {
  static std::vector<std::string> names() { return {Policies::kName...}; }

  template <class Map>
  static std::unique_ptr<RowIndex> make(const std::string& name, std::size_t rows, std::size_t slots,
                                        std::size_t scratch) {
    std::unique_ptr<RowIndex> made;
    (void)((name == Policies::kName && (made = std::make_unique<RowIndexOf<Map, Policies>>(rows, slots, scratch))) ||
           ...);
    return made;
  }
};

using AllPolicies = List<LruPolicy, SievePolicy, S3FifoPolicy, TinyLfuPolicy>;

// The hash is a little slower on small tables, and worth it where the array would take more than twice its memory.
bool use_hash(std::size_t rows, std::size_t slots) {
  constexpr std::size_t kSmall = 64 << 10;
  const std::size_t direct = DirectMap::bytes_for(rows, slots);
  return direct > kSmall && HashMap::bytes_for(rows, slots) * 2 < direct;
}

}  // namespace

std::size_t RowIndex::bytes_for(std::size_t rows, std::size_t slots, std::size_t scratch) {
  const std::size_t all = slots + scratch;
  const std::size_t map = use_hash(rows, all) ? HashMap::bytes_for(rows, all) : DirectMap::bytes_for(rows, all);
  return map + all * sizeof(Node);
}

std::vector<std::string> RowIndex::policies() { return AllPolicies::names(); }

std::unique_ptr<RowIndex> RowIndex::make(std::size_t rows, std::size_t slots, std::size_t scratch,
                                         const std::string& policy) {
  if (rows > INT32_MAX || slots > INT32_MAX || scratch > INT32_MAX || slots + scratch >= INT32_MAX - 16)
    throw std::invalid_argument("rows, slots and scratch must each fit 31 bits");
  auto made = use_hash(rows, slots + scratch) ? AllPolicies::make<HashMap>(policy, rows, slots, scratch)
                                              : AllPolicies::make<DirectMap>(policy, rows, slots, scratch);
  if (made == nullptr) throw std::invalid_argument("unknown cache policy " + policy);
  return made;
}

}  // namespace memlane
