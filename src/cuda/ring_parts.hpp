// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <optional>

namespace sida::cuda {

/// Which parts of one block of memory are in use, where they are given back in the order in which
/// they were taken.
class RingParts {
 public:
  /// Parts begin at multiples of it.
  static constexpr std::size_t alignment = 64;

  RingParts() = default;
  explicit RingParts(std::size_t bytes) : bytes_(bytes) {}

  std::size_t bytes() const noexcept { return bytes_; }
  /// Whether no part is in use.
  bool is_free() const noexcept { return used_.empty(); }

  /// Where a part of so many bytes begins; nothing if there is no room before others are given
  /// back. A ring that is not in use has room for all of its bytes.
  std::optional<std::size_t> take(std::size_t bytes) {
    bytes = (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    std::size_t begin = used_.empty() ? 0 : used_.back().end;
    std::size_t end = bytes_;
    if (!used_.empty()) {
      const std::size_t oldest = used_.front().begin;
      if (begin <= oldest)  // the parts in use lie around the end
        end = oldest;
      else if (bytes > bytes_ - begin)
        begin = 0, end = oldest;
    }
    if (begin > end || bytes > end - begin) return std::nullopt;
    used_.push_back({begin, begin + bytes});
    return begin;
  }

  /// Gives back the part that was taken first.
  void give_back_first() { used_.pop_front(); }
  /// Gives back the part that was taken last.
  void give_back_last() { used_.pop_back(); }

 private:
  struct Part {
    std::size_t begin, end;
  };

  std::size_t bytes_ = 0;
  std::deque<Part> used_;
};

}  // namespace sida::cuda
