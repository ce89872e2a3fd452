// SPDX-License-Identifier: Apache-2.0
#include "sida/backend/cuda_backend.hpp"

#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "device_scope.hpp"
#include "sida/core/thread.hpp"

namespace sida {
namespace {

using cuda::DeviceScope;

std::string reason(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status);
}

void check(cudaError_t status, const std::string& tried) { cuda::expect(status, tried.c_str()); }

std::string driver_message(cudaError_t status) {
  switch (status) {
    case cudaErrorInsufficientDriver: {
      int driver = 0, runtime = 0;
      cudaDriverGetVersion(&driver);
      cudaRuntimeGetVersion(&runtime);
      if (driver == 0) return "cuda: there is no NVIDIA driver; install one, or use device='cpu'";
      return "cuda: expected a driver for CUDA " + std::to_string(runtime / 1000) +
             " or later, got one for CUDA " + std::to_string(driver / 1000) + "." +
             std::to_string(driver % 1000 / 10) + "; update the driver, or use device='cpu'";
    }
    case cudaErrorNoDevice:
      return "cuda: the driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?); use device='cpu'";
    default:
      return "cuda: could not count the GPUs: " + reason(status);
  }
}

bool is_recorded_complete(cudaEvent_t event) {
  const cudaError_t status = cudaEventQuery(event);
  if (status == cudaErrorNotReady) return false;
  check(status, "finish work on the GPU");
  return true;
}

// Each page is written once, by several threads: faulting pages in is what takes the time.
void touch(std::byte* data, std::size_t bytes, int threads) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t pages = (bytes + page - 1) / page;
  const auto lanes =
      std::clamp<std::size_t>(static_cast<std::size_t>(std::max(threads, 1)), 1, pages / 4096 + 1);
  const auto walk = [&](std::size_t lane) {
    for (std::size_t i = pages * lane / lanes; i < pages * (lane + 1) / lanes; ++i)
      *reinterpret_cast<volatile std::byte*>(data + i * page) = std::byte{0};
  };
  std::vector<std::jthread> others;
  for (std::size_t lane = 1; lane < lanes; ++lane)
    others.push_back(start_thread<std::jthread>("that touches memory to pin", walk, lane));
  walk(0);
}

}  // namespace

void CudaBackend::Stream::Destroy::operator()(CUstream_st* handle) const noexcept {
  if (is_owned) cudaStreamDestroy(handle);
}

void CudaBackend::Event::Destroy::operator()(CUevent_st* handle) const noexcept {
  cudaEventDestroy(handle);
}

/// Events that no fence has at the moment. Thread-safe.
class CudaBackend::Events {
 public:
  Event take(CudaBackend& backend) {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        Event event = std::move(idle_.back());
        idle_.pop_back();
        return event;
      }
    }
    return backend.make_event(cudaEventDefault);
  }
  void give_back(Event event) noexcept {
    const std::lock_guard lock(mutex_);
    try {
      idle_.push_back(std::move(event));
    } catch (const std::bad_alloc&) {  // the event is destroyed instead
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Event> idle_;
};

struct CudaBackend::Fence::Mark {
  Mark(std::shared_ptr<Events> owner, Event taken, unsigned long long stream_id)
      : events(std::move(owner)), event(std::move(taken)), stream(stream_id) {}
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;
  ~Mark() { events->give_back(std::move(event)); }

  std::shared_ptr<Events> events;
  Event event;
  unsigned long long stream;  // its id, which no later stream has
  std::uint64_t number = 0;   // rises in a stream
};

void CudaBackend::Fence::add(const std::shared_ptr<const Mark>& mark) {
  if (!mark) return;
  const auto keep_later = [&](std::shared_ptr<const Mark>& mine) {
    if (mine->stream != mark->stream) return false;
    if (mine->number < mark->number) mine = mark;
    return true;
  };
  if (!mark_)
    mark_ = mark;
  else if (!keep_later(mark_) && std::none_of(others_.begin(), others_.end(), keep_later))
    others_.push_back(mark);
}

void CudaBackend::Fence::add(const Fence& other) {
  add(other.mark_);
  for (const auto& mark : other.others_) add(mark);
}

int CudaBackend::devices() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

int CudaBackend::device_index(std::string_view device) {
  if (device == "cuda") return 0;
  int index = -1;
  const std::string_view digits = device.starts_with("cuda:") ? device.substr(5) : "";
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
  SIDA_EXPECTS(
      error == std::errc() && end == digits.data() + digits.size() && index >= 0,
      "device: expected 'cuda' or 'cuda:' and a number, got '" + std::string(device) + "'");
  return index;
}

CudaBackend::CudaBackend(int device) : device_(device), events_(std::make_shared<Events>()) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    throw CudaError(driver_message(status));
  }
  if (count == 0) throw CudaError(driver_message(cudaErrorNoDevice));
  if (device < 0 || device >= count)
    throw CudaError("cuda: expected a device from 0 to " + std::to_string(count - 1) + ", got " +
                    std::to_string(device));
  const DeviceScope scope(device);
  check(cudaFree(nullptr), "start device " + std::to_string(device));
}

std::string CudaBackend::device_name() const {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device_), "ask for the GPU's name");
  return properties.name;
}

void* CudaBackend::allocate(std::size_t bytes) {
  const DeviceScope scope(device_);
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw OutOfMemory("cuda: could not allocate " + std::to_string(bytes) + " bytes on device " +
                      std::to_string(device_) + ", which has " + std::to_string(available_bytes()) +
                      " free");
  }
  check(status, "allocate " + std::to_string(bytes) + " bytes");
  return data;
}

void CudaBackend::deallocate(void* data, std::size_t) noexcept { cudaFree(data); }

void* CudaBackend::allocate_host(std::size_t bytes, int threads) {
  const DeviceScope scope(device_);
  void* const data =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED)
    throw OutOfMemory("cuda: the system has no " + std::to_string(bytes) + " bytes to pin");
  try {
    touch(static_cast<std::byte*>(data), bytes, threads);
    const cudaError_t status = cudaHostRegister(data, bytes, cudaHostRegisterPortable);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw OutOfMemory("cuda: could not pin " + std::to_string(bytes) +
                        " bytes of host memory; pin less (host_memory=), or raise `ulimit -l`");
    }
    check(status, "pin " + std::to_string(bytes) + " bytes of host memory");
  } catch (...) {
    ::munmap(data, bytes);
    throw;
  }
  return data;
}

void CudaBackend::deallocate_host(void* data, std::size_t bytes) noexcept {
  cudaHostUnregister(data);
  ::munmap(data, bytes);
}

CudaBackend::Stream CudaBackend::make_stream() {
  const DeviceScope scope(device_);
  cudaStream_t handle = nullptr;
  check(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking), "make a stream");
  Stream stream;
  stream.handle_.reset(handle);
  return stream;
}

CudaBackend::Stream CudaBackend::make_urgent_stream() {
  const DeviceScope scope(device_);
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "ask for the priorities of streams");
  cudaStream_t handle = nullptr;
  check(cudaStreamCreateWithPriority(&handle, cudaStreamNonBlocking, greatest), "make a stream");
  Stream stream;
  stream.handle_.reset(handle);
  return stream;
}

CudaBackend::Event CudaBackend::make_event() { return make_event(cudaEventDisableTiming); }

CudaBackend::Event CudaBackend::make_event(unsigned flags) {
  const DeviceScope scope(device_);
  cudaEvent_t handle = nullptr;
  check(cudaEventCreateWithFlags(&handle, flags), "make an event");
  Event event;
  event.handle_.reset(handle);
  return event;
}

void CudaBackend::copy_async(void* to, const void* from, std::size_t bytes, Stream& stream) {
  const DeviceScope scope(device_);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream.native()),
        "copy " + std::to_string(bytes) + " bytes");
}

void CudaBackend::record(Event& event, Stream& stream) {
  const DeviceScope scope(device_);
  check(cudaEventRecord(event.native(), stream.native()), "record an event");
}

void CudaBackend::wait(Stream& stream, Event& event) {
  const DeviceScope scope(device_);
  check(cudaStreamWaitEvent(stream.native(), event.native(), 0), "wait for an event");
}

bool CudaBackend::is_complete(Event& event) { return is_recorded_complete(event.native()); }

void CudaBackend::synchronize(Event& event) {
  check(cudaEventSynchronize(event.native()), "finish work on the GPU");
}

CudaBackend::Fence CudaBackend::fence(Stream& stream) {
  // Numbers rise in the order in which events are recorded, whoever else records on the stream.
  static std::mutex recording;
  static std::uint64_t recorded = 0;
  const DeviceScope scope(device_);
  if (!stream.id_) {
    unsigned long long id = 0;
    check(cudaStreamGetId(stream.native(), &id), "tell streams apart");
    stream.id_ = id;
  }
  const auto mark = std::make_shared<Fence::Mark>(events_, events_->take(*this), *stream.id_);
  {
    const std::lock_guard lock(recording);
    check(cudaEventRecord(mark->event.native(), stream.native()), "record an event");
    mark->number = ++recorded;
  }
  Fence fence;
  fence.mark_ = mark;
  return fence;
}

void CudaBackend::wait(Stream& stream, const Fence& fence) {
  const DeviceScope scope(device_);
  const auto wait_for = [&](const Fence::Mark& mark) {
    check(cudaStreamWaitEvent(stream.native(), mark.event.native(), 0), "wait for an event");
  };
  if (fence.mark_) wait_for(*fence.mark_);
  for (const auto& mark : fence.others_) wait_for(*mark);
}

void CudaBackend::synchronize(const Fence& fence) {
  const auto finish = [](const Fence::Mark& mark) {
    check(cudaEventSynchronize(mark.event.native()), "finish work on the GPU");
  };
  if (fence.mark_) finish(*fence.mark_);
  for (const auto& mark : fence.others_) finish(*mark);
}

bool CudaBackend::is_complete(const Fence& fence) {
  const auto is_passed = [](const std::shared_ptr<const Fence::Mark>& mark) {
    return is_recorded_complete(mark->event.native());
  };
  return (!fence.mark_ || is_passed(fence.mark_)) &&
         std::all_of(fence.others_.begin(), fence.others_.end(), is_passed);
}

double CudaBackend::seconds_between(const Fence& from, const Fence& to) const {
  SIDA_EXPECTS(from.mark_ && to.mark_, "seconds_between: expected two fences that were recorded");
  const auto until = [&](const Fence::Mark& mark) {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, from.mark_->event.native(), mark.event.native()),
          "ask for the time between two events");
    return static_cast<double>(milliseconds) * 1e-3;
  };
  double seconds = until(*to.mark_);
  for (const auto& mark : to.others_) seconds = std::max(seconds, until(*mark));
  return seconds;
}

void CudaBackend::finish(Stream& stream) noexcept {
  cudaStreamSynchronize(stream.native());
  cudaGetLastError();
}

std::size_t CudaBackend::available_bytes() const noexcept {
  int before = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device_) != cudaSuccess) return 0;
  std::size_t free = 0, total = 0;
  const bool known = cudaMemGetInfo(&free, &total) == cudaSuccess;
  cudaSetDevice(before);
  return known ? free : 0;
}

}  // namespace sida
