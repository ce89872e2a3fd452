// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>

namespace sida::simulated {

using StreamId = unsigned long long;

/// Up to which of its operations each stream is known to be done: a vector clock.
class Clock {
 public:
  /// Whether operation `number` of a stream, counted from 1, is known to be done.
  bool covers(StreamId stream, std::uint64_t number) const {
    const auto known = done_.find(stream);
    return known != done_.end() && number <= known->second;
  }
  void advance(StreamId stream, std::uint64_t number) {
    std::uint64_t& known = done_[stream];
    known = std::max(known, number);
  }
  void join(const Clock& other) {
    for (const auto& [stream, number] : other.done_) advance(stream, number);
  }

 private:
  std::map<StreamId, std::uint64_t> done_;
};

}  // namespace sida::simulated
