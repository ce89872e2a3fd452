// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/half.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/slab_layout.hpp"

namespace sida::test {

/// Stores `value` as element `index` of an array of `type`, rounded to it.
inline void store(std::byte* data, DataType type, std::int64_t index, double value) {
  const auto put = [&](auto element) {
    std::memcpy(data + static_cast<std::size_t>(index) * sizeof(element), &element,
                sizeof(element));
  };
  switch (type) {
    case DataType::f64:
      return put(value);
    case DataType::f32:
      return put(static_cast<float>(value));
    case DataType::f16:
      return put(to_f16(static_cast<float>(value)));
    case DataType::bf16:
      return put(to_bf16(static_cast<float>(value)));
    case DataType::i32:
      return put(static_cast<std::int32_t>(value));
    case DataType::i64:
      return put(static_cast<std::int64_t>(value));
    case DataType::u8:
      return put(static_cast<std::uint8_t>(value));
  }
}

/// Element `index` of an array of floating-point or index type.
inline double element(const std::byte* data, DataType type, std::int64_t index) {
  const auto get = [&](auto value) {
    std::memcpy(&value, data + static_cast<std::size_t>(index) * sizeof(value), sizeof(value));
    return value;
  };
  switch (type) {
    case DataType::f64:
      return get(double{});
    case DataType::f32:
      return get(float{});
    case DataType::f16:
      return to_f32(get(Half{}));
    case DataType::bf16:
      return to_f32(get(BFloat16{}));
    case DataType::i32:
      return get(std::int32_t{});
    case DataType::i64:
      return static_cast<double>(get(std::int64_t{}));
    case DataType::u8:
      return get(std::uint8_t{});
  }
  return 0;
}

/// An array that owns its memory.
struct Tensor {
  std::vector<std::int64_t> shape;
  DataType type = DataType::f32;
  std::vector<std::byte> bytes;

  Tensor(std::vector<std::int64_t> extents, DataType data_type)
      : shape(std::move(extents)), type(data_type) {
    bytes.resize(ConstTensorView{nullptr, type, shape}.bytes());
  }
  ConstTensorView view() const { return {bytes.data(), type, shape}; }
  TensorView mutable_view() { return {bytes.data(), type, shape}; }
  double at(std::int64_t index) const { return element(bytes.data(), type, index); }
  void set(std::int64_t index, double value) { store(bytes.data(), type, index, value); }
  std::int64_t elements() const { return view().elements(); }
};

/// Fills an array with values spread evenly over ± sqrt(3) * deviation, the same on every machine.
inline void fill_random(std::byte* data, DataType type, std::int64_t count, double deviation,
                        std::mt19937& random) {
  for (std::int64_t i = 0; i < count; ++i) {
    const double unit = static_cast<double>(random()) / 4294967296.0 * 2 - 1;
    store(data, type, i, unit * deviation * std::sqrt(3.0));
  }
}

/// An array of random values of standard deviation `deviation` about 0.
inline Tensor random_tensor(std::vector<std::int64_t> shape, DataType type, std::uint32_t seed,
                            double deviation = 1) {
  Tensor tensor(std::move(shape), type);
  std::mt19937 random(seed);
  fill_random(tensor.bytes.data(), type, tensor.elements(), deviation, random);
  return tensor;
}

/// The slab of one expert with random weights, scaled so that its outputs are of the order of its
/// inputs: leaving out one expert of a token then moves the output far more than any tolerance.
inline std::vector<std::byte> random_slab(const MoeConfig& config, std::uint32_t seed) {
  const SlabLayout layout(config);
  std::vector<std::byte> slab(layout.slab_bytes);
  std::mt19937 random(seed);
  const auto fill = [&](std::size_t offset, std::size_t bytes, double deviation) {
    fill_random(slab.data() + offset, config.dtype,
                static_cast<std::int64_t>(bytes / size_of(config.dtype)), deviation, random);
  };
  fill(layout.up_offset, layout.up_bytes, 1.5 / std::sqrt(config.hidden_size));
  fill(layout.down_offset, layout.down_bytes, 1.5 / std::sqrt(config.intermediate_size));
  fill(layout.up_bias_offset, layout.up_bias_bytes, 0.5);
  fill(layout.down_bias_offset, layout.down_bias_bytes, 0.5);
  return slab;
}

/// One slab for each expert of one layer.
inline std::vector<std::vector<std::byte>> random_slabs(const MoeConfig& config,
                                                        std::uint32_t seed) {
  std::vector<std::vector<std::byte>> slabs;
  for (std::int32_t e = 0; e < config.experts; ++e)
    slabs.push_back(random_slab(config, seed * 1000 + static_cast<std::uint32_t>(e)));
  return slabs;
}

}  // namespace sida::test
