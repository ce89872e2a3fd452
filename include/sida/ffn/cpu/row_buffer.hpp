// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "sida/backend/buffer.hpp"
#include "sida/backend/cpu_backend.hpp"

namespace sida::detail {

/// Memory for rows of equal length, aligned, kept from call to call and grown when needed.
template <class T>
class RowBuffer {
 public:
  RowBuffer() = default;
  RowBuffer(const RowBuffer&) = delete;
  RowBuffer& operator=(const RowBuffer&) = delete;

  /// Makes room for `rows` rows of `length` elements; what was in it is lost. @throws OutOfMemory.
  void resize(std::int64_t rows, std::int64_t length) {
    length_ = length;
    const auto bytes = static_cast<std::size_t>(rows * length) * sizeof(T);
    if (bytes <= buffer_.size()) return;
    buffer_ = {};  // before the new one, so that both never stand side by side
    buffer_ = Buffer<CpuBackend>(backend_, bytes);
  }
  T* row(std::int64_t index) const noexcept {
    return reinterpret_cast<T*>(buffer_.data()) + index * length_;
  }
  std::size_t bytes() const noexcept { return buffer_.size(); }
  void release() noexcept { buffer_ = {}; }

 private:
  CpuBackend backend_;
  Buffer<CpuBackend> buffer_;
  std::int64_t length_ = 0;
};

}  // namespace sida::detail
