// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sida/backend/backend.hpp"
#include "sida/core/error.hpp"

struct CUstream_st;
struct CUevent_st;

namespace sida {

/// Fast memory is a GPU's; copies run on streams of the device's primary context, which other
/// libraries share. Declared without CUDA's headers: link sida::cuda.
///
/// Thread-safe; the calling thread's current device is left as it was. No member waits for the
/// whole device, but `deallocate`, by CUDA's own cudaFree, may.
class CudaBackend {
 public:
  /// A stream, owned or borrowed; move-only. What make_stream() returns does not wait for the
  /// legacy default stream.
  class Stream {
   public:
    /// A stream of somebody else's, who keeps it alive; null is the legacy default stream.
    static Stream borrow(CUstream_st* native) noexcept {
      Stream stream;
      stream.handle_ = {native, Destroy{false}};
      return stream;
    }

    CUstream_st* native() const noexcept { return handle_.get(); }

   private:
    friend CudaBackend;
    struct Destroy {
      bool is_owned;
      void operator()(CUstream_st* handle) const noexcept;
    };
    std::unique_ptr<CUstream_st, Destroy> handle_{nullptr, Destroy{true}};
    std::optional<unsigned long long> id_;  // asked for once
  };

  /// An event, of a fence with its time; owned, move-only.
  class Event {
   public:
    CUevent_st* native() const noexcept { return handle_.get(); }

   private:
    friend CudaBackend;
    struct Destroy {
      void operator()(CUevent_st* handle) const noexcept;
    };
    std::unique_ptr<CUevent_st, Destroy> handle_;
  };

  /// Behind work of one stream or several; copied at the cost of a counter.
  class Fence {
   public:
    /// Puts this fence behind what the other stands behind, too. Of two places in one stream the
    /// later is kept.
    void add(const Fence& other);

   private:
    friend CudaBackend;
    struct Mark;  // an event of the backend's, which goes back to it
    std::shared_ptr<const Mark> mark_;
    std::vector<std::shared_ptr<const Mark>> others_;  // in other streams; mostly none
    void add(const std::shared_ptr<const Mark>& mark);
  };

  static constexpr std::string_view name() noexcept { return "cuda"; }

  /// The number of GPUs; 0 without a driver.
  static int devices() noexcept;
  /// The device that "cuda" or "cuda:1" names. @throws InvalidArgument for any other text.
  static int device_index(std::string_view device);

  /// @throws CudaError without a GPU, a driver that is new enough, or a device of this number.
  explicit CudaBackend(int device = 0);

  int device() const noexcept { return device_; }
  /// What the driver calls the GPU: "NVIDIA H100 80GB HBM3". @throws CudaError.
  std::string device_name() const;

  /// Memory of the GPU, aligned to 256 bytes. @throws OutOfMemory with what was asked for and what
  /// is free, CudaError.
  void* allocate(std::size_t bytes);
  void deallocate(void* data, std::size_t bytes) noexcept;

  /// Pinned memory of the host, zeros, which copies at the full rate of the link. Its pages are
  /// touched by `threads` threads and registered then: several times faster than cudaMallocHost.
  /// @throws OutOfMemory, also where the system lets no more be pinned; ThreadError.
  void* allocate_host(std::size_t bytes, int threads = 4);
  void deallocate_host(void* data, std::size_t bytes) noexcept;

  // What follows throws CudaError, also for what went wrong in earlier work on the stream.

  Stream make_stream();
  /// Work on it goes before what other streams have waiting.
  Stream make_urgent_stream();
  Event make_event();
  /// Between any two of host and device. From or to memory that is not pinned it may wait.
  void copy_async(void* to, const void* from, std::size_t bytes, Stream& stream);
  void record(Event& event, Stream& stream);
  void wait(Stream& stream, Event& event);
  void synchronize(Event& event);
  /// Whether what was recorded is complete; does not wait.
  bool is_complete(Event& event);
  Fence fence(Stream& stream);
  void wait(Stream& stream, const Fence& fence);
  void synchronize(const Fence& fence);
  /// Whether all that the fence stands behind is done; does not wait.
  bool is_complete(const Fence& fence);
  /// From when the first fence, of one stream, was passed until the second was; both are.
  double seconds_between(const Fence& from, const Fence& to) const;
  /// Waits for all work on the stream, where no fence could be had; of errors nothing is said.
  void finish(Stream& stream) noexcept;

  /// Bytes of the GPU's memory that are free now, whoever uses the rest; 0 if they cannot be told.
  std::size_t available_bytes() const noexcept;

 private:
  class Events;
  Event make_event(unsigned flags);

  int device_;
  std::shared_ptr<Events> events_;  // of fences; shared by copies of the backend
};

static_assert(Backend<CudaBackend>);

/// Pinned memory of the host, owned; move-only. The backend must outlive it.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  /// @throws as CudaBackend::allocate_host.
  PinnedBuffer(CudaBackend& backend, std::size_t bytes, int threads = 4)
      : backend_(&backend),
        data_(bytes ? backend.allocate_host(bytes, threads) : nullptr),
        bytes_(bytes) {}
  PinnedBuffer(PinnedBuffer&& other) noexcept
      : backend_(other.backend_),
        data_(std::exchange(other.data_, nullptr)),
        bytes_(std::exchange(other.bytes_, 0)) {}
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedBuffer() {
    if (data_) backend_->deallocate_host(data_, bytes_);
  }

  std::byte* data() const noexcept { return static_cast<std::byte*>(data_); }
  std::size_t size() const noexcept { return bytes_; }

 private:
  CudaBackend* backend_ = nullptr;
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace sida
