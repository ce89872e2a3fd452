// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "sida/ffn/expert_ffn_cpu.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/ffn/token_groups.hpp"
#include "support/machine_isas.hpp"
#include "support/random_weights.hpp"

namespace sida::test {

using CpuFfn = ExpertFfn<CpuBackend>;

/// A layer call's arguments.
struct LayerInput {
  Tensor hidden, ids, weights;
};

/// Random hidden states, routed to experts at random (the same expert twice at times), with weights
/// in [0.25, 1].
inline LayerInput random_input(const MoeConfig& config, std::int64_t tokens, std::uint32_t seed,
                               DataType ids_type = DataType::i64) {
  LayerInput input{random_tensor({tokens, config.hidden_size}, config.dtype, seed),
                   Tensor({tokens, config.top_k}, ids_type),
                   Tensor({tokens, config.top_k}, DataType::f32)};
  std::mt19937 random(seed + 1);
  for (std::int64_t a = 0; a < tokens * config.top_k; ++a) {
    input.ids.set(a, static_cast<double>(random() % static_cast<std::uint32_t>(config.experts)));
    input.weights.set(a, 0.25 + 0.75 * static_cast<double>(random() % 1024) / 1024);
  }
  return input;
}

/// The tasks of a call, one for each active expert.
inline std::vector<ExpertTask> tasks_of(const MoeConfig& config, const TokenGroups& groups,
                                        const std::vector<std::vector<std::byte>>& slabs) {
  const SlabLayout layout(config);
  std::vector<ExpertTask> tasks;
  for (std::size_t i = 0; i < groups.experts.size(); ++i) {
    const auto& slab = slabs[static_cast<std::size_t>(groups.experts[i])];
    tasks.push_back({weights_in(layout, slab.data()), groups.offsets[i], groups.offsets[i + 1]});
  }
  return tasks;
}

/// A whole call with all experts at once.
inline Tensor run_layer(CpuFfn& ffn, const std::vector<std::vector<std::byte>>& slabs,
                        const LayerInput& input) {
  const MoeConfig& config = ffn.config();
  const TokenGroups groups = group_tokens(input.ids.view(), input.weights.view(), config.experts);
  Tensor out(input.hidden.shape, config.dtype);
  ffn.begin(input.hidden.view(), groups);
  ffn.compute(tasks_of(config, groups, slabs));
  ffn.combine(input.weights.view(), out.mutable_view());
  return out;
}

}  // namespace sida::test
