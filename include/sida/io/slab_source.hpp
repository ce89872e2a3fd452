// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <type_traits>

#include "sida/core/data_type.hpp"
#include "sida/core/half.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/io/expert_tensors.hpp"
#include "sida/io/safetensors.hpp"

namespace sida {

/// Bytes [slab_offset, slab_offset + bytes) of a slab and the tensor that they come from.
struct SlabSource {
  std::size_t slab_offset = 0;
  std::size_t bytes = 0;
  ExpertTensor tensor;
};

/// Where in a slab of `layout`, of elements of `type`, the tensor goes.
inline SlabSource place_in_slab(const SlabLayout& layout, DataType type,
                                const ExpertTensor& tensor) noexcept {
  using Part = ExpertTensor::Part;
  const std::size_t begin = tensor.part == Part::up        ? layout.up_offset
                            : tensor.part == Part::down    ? layout.down_offset
                            : tensor.part == Part::up_bias ? layout.up_bias_offset
                                                           : layout.down_bias_offset;
  return {begin + static_cast<std::size_t>(tensor.first) * size_of(type),
          static_cast<std::size_t>(tensor.rows * tensor.columns) * size_of(type), tensor};
}

/// Whether the tensor lies in its file as the slab wants it, so that it is read without a detour.
inline bool is_plain(const ExpertTensor& tensor, DataType type) noexcept {
  return tensor.type == type && !tensor.transposed;
}

/// @cond
namespace detail {

template <class To, class From>
To convert_element(From value) noexcept {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    float number;
    if constexpr (std::is_arithmetic_v<From>) {
      number = static_cast<float>(value);
    } else {
      number = to_f32(value);
    }
    if constexpr (std::is_same_v<To, Half>) {
      return to_f16(number);
    } else if constexpr (std::is_same_v<To, BFloat16>) {
      return to_bf16(number);
    } else {
      return static_cast<To>(number);
    }
  }
}

/// to[r * to_stride + c] = from[c * from_stride + r * step], converted. Neither needs to be
/// aligned.
template <class To, class From>
void convert_block(const std::byte* from, std::byte* to, std::int64_t rows, std::int64_t columns,
                   std::int64_t to_stride, std::int64_t from_stride, std::int64_t step) noexcept {
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      From value;
      std::memcpy(&value,
                  from + static_cast<std::size_t>(c * from_stride + r * step) * sizeof(From),
                  sizeof(From));
      const To converted = convert_element<To>(value);
      std::memcpy(to + static_cast<std::size_t>(r * to_stride + c) * sizeof(To), &converted,
                  sizeof(To));
    }
  }
}

/// Calls `function` with a value of the type that stands for `type`, a floating-point one.
template <class Function>
void with_element_type(DataType type, Function&& function) {
  switch (type) {
    case DataType::f64:
      return function(double{});
    case DataType::f16:
      return function(Half{});
    case DataType::bf16:
      return function(BFloat16{});
    default:
      return function(float{});
  }
}

}  // namespace detail
/// @endcond

/// Reads tensors that have another dtype than the slab or are stored transposed, through one buffer
/// of bounded size. f64 goes to the 16-bit types by way of f32, as in PyTorch. Thread-safe: calls
/// take turns at the buffer.
class ConvertingReader {
 public:
  static constexpr std::size_t smallest_buffer = 64;  ///< bytes; room for some elements

  /// @throws std::bad_alloc.
  ConvertingReader(DataType type, std::size_t buffer_bytes)
      : type_(type),
        buffer_bytes_(std::max(buffer_bytes, smallest_buffer)),
        buffer_(new std::byte[buffer_bytes_]) {}

  std::size_t buffer_bytes() const noexcept { return buffer_bytes_; }

  /// Fills `destination` with the bytes from `offset` on that `tensor` has in the slab; they need
  /// not begin or end with an element. @throws IoError.
  void read(const ExpertTensor& tensor, std::size_t offset, std::span<std::byte> destination) {
    const std::lock_guard lock(mutex_);
    const std::size_t size = size_of(type_);
    while (!destination.empty()) {
      const auto element = static_cast<std::int64_t>(offset / size);
      const std::size_t inside = offset % size;
      std::size_t done = destination.size() / size * size;
      if (inside == 0 && done != 0) {
        read_elements(tensor, element, static_cast<std::int64_t>(done / size), destination.data());
      } else {
        std::array<std::byte, 8> whole{};
        read_elements(tensor, element, 1, whole.data());
        done = std::min(size - inside, destination.size());
        std::memcpy(destination.data(), whole.data() + inside, done);
      }
      offset += done;
      destination = destination.subspan(done);
    }
  }

 private:
  /// Elements [first, first + count) of the tensor in the slab's order.
  void read_elements(const ExpertTensor& tensor, std::int64_t first, std::int64_t count,
                     std::byte* to) {
    if (!tensor.transposed) return read_columns(tensor, first, count, 0, 1, to);
    while (count > 0) {  // the rest of a row, then rows, then the beginning of one
      const std::int64_t row = first / tensor.columns, column = first % tensor.columns;
      const bool whole = column == 0 && count >= tensor.columns;
      const std::int64_t rows = whole ? count / tensor.columns : 1;
      const std::int64_t columns =
          whole ? tensor.columns : std::min(count, tensor.columns - column);
      read_columns(tensor, row, rows, column, columns, to);
      first += rows * columns;
      count -= rows * columns;
      to += static_cast<std::size_t>(rows * columns) * size_of(type_);
    }
  }

  /// A rectangle of the slab's part that the file holds column by column, each column `stride`
  /// elements behind the one before. In an untransposed tensor the whole part is one column.
  void read_columns(const ExpertTensor& tensor, std::int64_t row, std::int64_t rows,
                    std::int64_t column, std::int64_t columns, std::byte* to) {
    const std::size_t from_size = size_of(tensor.type);
    const auto capacity = static_cast<std::int64_t>(buffer_bytes_ / from_size);
    const std::int64_t block_rows = std::min(rows, capacity / tensor.step);
    const std::int64_t block_columns = std::min(columns, capacity / (block_rows * tensor.step));
    for (std::int64_t r = 0; r < rows; r += block_rows) {
      const std::int64_t height = std::min(block_rows, rows - r);
      for (std::int64_t c = 0; c < columns; c += block_columns) {
        const std::int64_t width = std::min(block_columns, columns - c);
        fill_buffer(tensor, row + r, height, column + c, width);
        std::byte* corner = to + static_cast<std::size_t>(r * columns + c) * size_of(type_);
        // One column is contiguous on both sides: a row, to the loop over columns.
        const bool flat = columns == 1;
        detail::with_element_type(type_, [&](auto target) {
          detail::with_element_type(tensor.type, [&](auto source) {
            detail::convert_block<decltype(target), decltype(source)>(
                buffer_.get(), corner, flat ? 1 : height, flat ? height : width, columns,
                flat ? tensor.step : extent(tensor, height), tensor.step);
          });
        });
      }
    }
  }

  /// Elements from the first to the last of `rows` rows of a column.
  static std::int64_t extent(const ExpertTensor& tensor, std::int64_t rows) noexcept {
    return (rows - 1) * tensor.step + 1;
  }

  void fill_buffer(const ExpertTensor& tensor, std::int64_t row, std::int64_t rows,
                   std::int64_t column, std::int64_t columns) {
    const std::size_t from_size = size_of(tensor.type);
    const auto bytes = [&](std::int64_t elements) {
      return static_cast<std::size_t>(elements) * from_size;
    };
    const std::int64_t stride = tensor.transposed ? tensor.stride : 0;
    const std::uint64_t begin = tensor.begin + bytes(column * stride + row * tensor.step);
    const std::int64_t length = extent(tensor, rows);
    if (length == stride) {  // the columns follow each other without a gap
      tensor.file->read(begin, {buffer_.get(), bytes(length * columns)});
      return;
    }
    for (std::int64_t c = 0; c < columns; ++c)
      tensor.file->read(begin + bytes(c * stride),
                        {buffer_.get() + bytes(c * length), bytes(length)});
  }

  DataType type_;
  std::size_t buffer_bytes_;
  std::unique_ptr<std::byte[]> buffer_;
  std::mutex mutex_;
};

}  // namespace sida
