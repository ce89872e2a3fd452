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
#include "sida/ffn/cpu/convert.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/io/block_scales.hpp"
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
  return tensor.type == type && !tensor.transposed && !tensor.scales;
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

/// to[i] = number `first + i` of the packed `codes` times `scale`, converted. `to` need not be
/// aligned.
template <class To>
void unpack_run(Packing packing, const std::byte* codes, std::int64_t first, std::int64_t count,
                float scale, std::byte* to) noexcept {
  const auto unpack = [&](auto number_at) {
    for (std::int64_t i = 0; i < count; ++i) {
      const To converted =
          convert_element<To>(number_at(static_cast<std::size_t>(first + i)) * scale);
      std::memcpy(to + static_cast<std::size_t>(i) * sizeof(To), &converted, sizeof(To));
    }
  };
  if (packing == Packing::fp8)
    return unpack(
        [&](std::size_t i) { return e4m3_numbers[std::to_integer<std::size_t>(codes[i])]; });
  unpack([&](std::size_t i) {
    const auto pair = std::to_integer<std::size_t>(codes[i / 2]);
    return e2m1_numbers[i % 2 == 0 ? pair & 15 : pair >> 4];
  });
}

/// Element `index` of an array of scales in f32.
inline float scale_at(DataType type, const std::byte* scales, std::int64_t index) noexcept {
  const std::byte* from = scales + static_cast<std::size_t>(index) * size_of(type);
  if (type == DataType::u8) return power_of_two(std::to_integer<std::uint8_t>(*from));
  float scale = 0;
  read_row(from, type, &scale, 1);
  return scale;
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

/// Reads tensors that have another dtype than the slab, are packed or are stored transposed,
/// through one buffer of bounded size. f64 goes to the 16-bit types by way of f32, as in PyTorch.
/// Thread-safe: calls take turns at the buffer.
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
    if (tensor.scales) return read_packed(tensor, first, count, to);
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

  void read_packed(const ExpertTensor& tensor, std::int64_t first, std::int64_t count,
                   std::byte* to) {
    const std::int64_t fit = packed_rows_that_fit(tensor);
    while (count > 0) {  // as many whole rows as the buffer takes, or a run of one
      const std::int64_t row = first / tensor.columns, column = first % tensor.columns;
      const bool whole = fit > 0 && column == 0 && count >= tensor.columns;
      const std::int64_t rows = whole ? std::min(fit, count / tensor.columns) : 1;
      const std::int64_t columns =
          whole ? tensor.columns
                : std::min({count, tensor.columns - column, longest_packed_run(*tensor.scales)});
      detail::with_element_type(type_, [&](auto target) {
        unpack<decltype(target)>(tensor, row, rows, column, columns, to);
      });
      first += rows * columns;
      count -= rows * columns;
      to += static_cast<std::size_t>(rows * columns) * size_of(type_);
    }
  }

  /// Rows of which codes and scales fit the buffer together; rows of scales are shared by as many
  /// rows of codes as a block has, and one more is touched where these begin within a block.
  std::int64_t packed_rows_that_fit(const ExpertTensor& tensor) const noexcept {
    const BlockScales& scales = *tensor.scales;
    const std::int64_t codes = tensor.columns / scales.codes_per_byte();
    const std::int64_t of_scales = scales.columns * static_cast<std::int64_t>(size_of(scales.type));
    const std::int64_t left = static_cast<std::int64_t>(buffer_bytes_) - codes - 2 * of_scales;
    const std::int64_t more =
        tensor.step * codes + (tensor.step * of_scales + scales.block_rows - 1) / scales.block_rows;
    return left < 0 ? 0 : 1 + left / more;
  }

  /// Numbers of one row of which codes and scales fit the buffer together.
  std::int64_t longest_packed_run(const BlockScales& scales) const noexcept {
    const auto scale = static_cast<std::int64_t>(size_of(scales.type));
    return (static_cast<std::int64_t>(buffer_bytes_) - 2 * scale) * scales.block_columns /
           (scales.block_columns + scale);
  }

  /// A rectangle of a packed matrix: whole rows, or a run of one.
  template <class To>
  void unpack(const ExpertTensor& tensor, std::int64_t row, std::int64_t rows, std::int64_t column,
              std::int64_t columns, std::byte* to) {
    const BlockScales& scales = *tensor.scales;
    const std::int64_t top = row * tensor.step, bottom = (row + rows - 1) * tensor.step;
    const auto scale_of = [&](std::int64_t r, std::int64_t c) {
      return r / scales.block_rows * scales.columns + c / scales.block_columns;
    };
    const std::int64_t first_scale = scale_of(top, column);
    const std::int64_t scale_count = scale_of(bottom, column + columns - 1) - first_scale + 1;
    const auto scale_size = static_cast<std::int64_t>(size_of(scales.type));
    const std::byte* codes = buffer_.get() + scale_count * scale_size;
    const std::int64_t per_byte = scales.codes_per_byte();
    const std::int64_t first_byte = (top * tensor.columns + column) / per_byte;
    const std::int64_t last_byte = (bottom * tensor.columns + column + columns - 1) / per_byte;
    fill(*scales.file, scales.begin, first_scale * scale_size, scale_count * scale_size, 0);
    fill(*tensor.file, tensor.begin, first_byte, last_byte - first_byte + 1,
         scale_count * scale_size);
    for (std::int64_t r = top; r <= bottom; r += tensor.step) {
      for (std::int64_t c = column; c < column + columns;) {
        const std::int64_t stop =
            std::min(column + columns, (c / scales.block_columns + 1) * scales.block_columns);
        const float scale =
            detail::scale_at(scales.type, buffer_.get(), scale_of(r, c) - first_scale);
        detail::unpack_run<To>(scales.packing, codes,
                               r * tensor.columns + c - first_byte * per_byte, stop - c, scale, to);
        to += static_cast<std::size_t>(stop - c) * sizeof(To);
        c = stop;
      }
    }
  }

  /// Bytes [from, from + count) behind `begin` of a file, to the place `at` of the buffer.
  void fill(const SafetensorsFile& file, std::uint64_t begin, std::int64_t from, std::int64_t count,
            std::int64_t at) {
    file.read(begin + static_cast<std::uint64_t>(from),
              {buffer_.get() + at, static_cast<std::size_t>(count)});
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
