// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "simulated_gpu/clock.hpp"

namespace sida::simulated {

/// One operation of a stream, and what is known to be done before it begins.
struct Operation {
  StreamId stream = 0;
  std::uint64_t number = 0;
  Clock before;
};

/// Who read and wrote which memory. Two operations that touch the same bytes, one of which writes,
/// while nothing orders one behind the other end the program, whichever ran first this time.
class Accesses {
 public:
  void note(const Operation& by, const void* data, std::size_t bytes, bool writes) {
    const auto* const begin = static_cast<const std::byte*>(data);
    if (bytes == 0) return;
    const Access access{begin, begin + bytes, by.stream, by.number, writes};
    for (const Access& earlier : all_)
      if (overlap(earlier, access) && (earlier.writes || writes) && earlier.stream != by.stream &&
          !by.before.covers(earlier.stream, earlier.number))
        fail(earlier, access);
    all_.push_back(access);
  }
  std::size_t size() const { return all_.size(); }
  /// Forgets the accesses for which `is_past(stream, number)`.
  template <class IsPast>
  void forget(IsPast&& is_past) {
    std::erase_if(all_, [&](const Access& it) { return is_past(it.stream, it.number); });
  }

 private:
  struct Access {
    const std::byte *begin, *end;
    StreamId stream;
    std::uint64_t number;
    bool writes;
  };
  static bool overlap(const Access& a, const Access& b) {
    return std::less<>()(a.begin, b.end) && std::less<>()(b.begin, a.end);
  }
  [[noreturn]] static void fail(const Access& earlier, const Access& later) {
    const auto word = [](const Access& it) { return it.writes ? "writes" : "reads"; };
    std::fprintf(stderr,
                 "simulated GPU: operation %llu of stream %llu %s %td bytes at %p, which operation "
                 "%llu of stream %llu %s, and nothing orders them\n",
                 static_cast<unsigned long long>(later.number), later.stream, word(later),
                 later.end - later.begin, static_cast<const void*>(later.begin),
                 static_cast<unsigned long long>(earlier.number), earlier.stream, word(earlier));
    std::abort();
  }

  std::vector<Access> all_;
};

/// Memory as an operation sees it, which says what it touches before it does.
class Memory {
 public:
  Memory(Accesses& accesses, const Operation& operation)
      : accesses_(accesses), operation_(operation) {}

  template <class T>
  const T* read(const T* data, std::size_t count) const {
    accesses_.note(operation_, data, count * sizeof(T), false);
    return data;
  }
  template <class T>
  T* write(T* data, std::size_t count) const {
    accesses_.note(operation_, data, count * sizeof(T), true);
    return data;
  }

 private:
  Accesses& accesses_;
  const Operation& operation_;
};

/// What a kernel or a copy does.
using Work = std::function<void(const Memory&)>;

}  // namespace sida::simulated
