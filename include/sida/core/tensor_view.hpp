// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"

namespace sida {

/// A borrowed, contiguous, row-major array. Owns nothing: whoever makes the view keeps the memory
/// alive while it is used. `Byte` is `std::byte` or `const std::byte`.
template <class Byte>
struct BasicTensorView {
  Byte* data = nullptr;
  DataType type = DataType::f32;
  std::vector<std::int64_t> shape;

  std::int64_t elements() const noexcept {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    return count;
  }
  std::size_t bytes() const noexcept {
    return static_cast<std::size_t>(elements()) * size_of(type);
  }
  /// "[3, 768] f32", for messages.
  std::string describe() const {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i)
      text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "] " + std::string(name_of(type));
  }
};

using TensorView = BasicTensorView<std::byte>;
using ConstTensorView = BasicTensorView<const std::byte>;

}  // namespace sida
