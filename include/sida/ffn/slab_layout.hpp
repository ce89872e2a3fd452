// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "sida/core/moe_config.hpp"

namespace sida {

/// Where the parts of one expert lie in its slab: `[gate; up | down | up_bias | down_bias]`, each
/// part row-major with the contracted dimension contiguous (as torch.nn.Linear stores it), each
/// part beginning at a multiple of `alignment`.
///
/// up: [I, H], or with `gated` [2I, H] with the gate's rows first. down: [H, I].
struct SlabLayout {
  static constexpr std::size_t alignment = 128;

  std::size_t up_bytes = 0, down_bytes = 0, up_bias_bytes = 0, down_bias_bytes = 0;
  std::size_t up_offset = 0, down_offset = 0, up_bias_offset = 0, down_bias_offset = 0;
  std::size_t slab_bytes = 0;  ///< a multiple of `alignment`

  explicit SlabLayout(const MoeConfig& config) {
    validate(config);
    const std::size_t element = size_of(config.dtype);
    const auto hidden = static_cast<std::size_t>(config.hidden_size);
    const auto intermediate = static_cast<std::size_t>(config.intermediate_size);
    const std::size_t up_rows = config.gated ? 2 * intermediate : intermediate;
    up_bytes = up_rows * hidden * element;
    down_bytes = hidden * intermediate * element;
    up_bias_bytes = config.up_bias ? up_rows * element : 0;
    down_bias_bytes = config.down_bias ? hidden * element : 0;
    down_offset = aligned(up_bytes);
    up_bias_offset = down_offset + aligned(down_bytes);
    down_bias_offset = up_bias_offset + aligned(up_bias_bytes);
    slab_bytes = down_bias_offset + aligned(down_bias_bytes);
  }

 private:
  static constexpr std::size_t aligned(std::size_t bytes) noexcept {
    return (bytes + alignment - 1) / alignment * alignment;
  }
};

/// The parts of one expert, wherever they lie; borrowed. A bias that the model lacks is null.
struct ExpertWeights {
  const std::byte* up = nullptr;
  const std::byte* down = nullptr;
  const std::byte* up_bias = nullptr;
  const std::byte* down_bias = nullptr;
};

/// The parts of the expert whose slab begins at `slab`.
inline ExpertWeights weights_in(const SlabLayout& layout, const std::byte* slab) noexcept {
  return {slab + layout.up_offset, slab + layout.down_offset,
          layout.up_bias_bytes ? slab + layout.up_bias_offset : nullptr,
          layout.down_bias_bytes ? slab + layout.down_bias_offset : nullptr};
}

}  // namespace sida
