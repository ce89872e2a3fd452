// SPDX-License-Identifier: Apache-2.0
#include "plan_memory.hpp"

#include <cstddef>
#include <cstdint>

#include "expert_kernels.hpp"

namespace sida::cuda {
namespace {

std::size_t aligned(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

int choices_of(const LayerShape& shape) { return shape.tokens * shape.top_k; }

std::size_t chunk_counts(const LayerShape& shape) {
  const int assignments = choices_of(shape);
  if (assignments <= most_in_one_block) return 0;
  return static_cast<std::size_t>((assignments + plan_chunk - 1) / plan_chunk) *
         static_cast<std::size_t>(shape.experts + 1);
}

}  // namespace

Plan plan_at(const LayerShape& shape, std::byte* memory) {
  const auto assignments = static_cast<std::size_t>(choices_of(shape));
  const auto experts = static_cast<std::size_t>(shape.experts);
  const auto part = [&memory](std::size_t count) {
    auto* begin = reinterpret_cast<std::int32_t*>(memory);
    memory += aligned(count * sizeof(std::int32_t));
    return begin;
  };
  Plan plan{};
  plan.active = reinterpret_cast<ActiveExpert*>(part(4 * experts));
  plan.active_count = part(1);
  plan.invalid = part(1);
  plan.counts = part(experts);
  plan.order = part(assignments);
  plan.row_of = part(assignments);
  plan.group_rows = part(assignments);
  plan.taken_tiles = part(2);
  plan.chunks = part(chunk_counts(shape));
  return plan;
}

std::size_t plan_bytes(const LayerShape& shape) {
  const auto assignments = static_cast<std::size_t>(choices_of(shape));
  const auto experts = static_cast<std::size_t>(shape.experts);
  return aligned(16 * experts) + 2 * aligned(4) + aligned(4 * experts) +
         3 * aligned(4 * assignments) + aligned(8) + aligned(4 * chunk_counts(shape));
}

}  // namespace sida::cuda
