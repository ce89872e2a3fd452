// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <string>
#include <string_view>

#include "sida/backend/backend.hpp"
#include "sida/core/error.hpp"

namespace sida {

/// Fast memory is RAM. Copies are done when `copy_async` returns, so streams, events and fences
/// are empty.
/// Stateless and thread-safe.
class CpuBackend {
 public:
  struct Stream {};
  struct Event {};
  struct Fence {
    void add(const Fence&) noexcept {}
  };

  static constexpr std::string_view name() noexcept { return "cpu"; }

  /// Memory aligned to 4096 bytes, not touched, so that it becomes resident only as it is used.
  /// @throws OutOfMemory.
  void* allocate(std::size_t bytes) {
    void* data = ::operator new(bytes, alignment, std::nothrow);
    if (!data) throw OutOfMemory("cpu: could not allocate " + std::to_string(bytes) + " bytes");
    return data;
  }
  void deallocate(void* data, std::size_t) noexcept { ::operator delete(data, alignment); }

  Stream make_stream() noexcept { return {}; }
  Event make_event() noexcept { return {}; }
  void copy_async(void* to, const void* from, std::size_t bytes, Stream&) noexcept {
    std::memcpy(to, from, bytes);
  }
  void record(Event&, Stream&) noexcept {}
  void wait(Stream&, Event&) noexcept {}
  void synchronize(Event&) noexcept {}
  Fence fence(Stream&) noexcept { return {}; }
  void wait(Stream&, const Fence&) noexcept {}
  void synchronize(const Fence&) noexcept {}

  /// RAM of the machine, in bytes. Not what the system calls available: that leaves out what it
  /// would free, or a host would give a virtual machine, when asked.
  std::size_t available_bytes() const noexcept {
    return static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)) *
           static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  }

 private:
  static constexpr std::align_val_t alignment{4096};
};

static_assert(Backend<CpuBackend>);

}  // namespace sida
