// SPDX-License-Identifier: Apache-2.0
#include "sida/backend/cuda_backend.hpp"

#include <cstring>
#include <thread>
#include <vector>

#include "cuda/device.hpp"
#include "sida/backend/buffer.hpp"
#include "support/catch.hpp"

using namespace sida;
using namespace sida::test;

TEST_CASE("A device is named by 'cuda' or its number", "[cuda]") {
  CHECK(CudaBackend::device_index("cuda") == 0);
  CHECK(CudaBackend::device_index("cuda:0") == 0);
  CHECK(CudaBackend::device_index("cuda:12") == 12);
  for (const char* wrong : {"", "cpu", "cuda:", "cuda:-1", "cuda:1x", "cuda:99999999999", "cuda1"})
    CHECK_THROWS_AS(CudaBackend::device_index(wrong), InvalidArgument);
}

TEST_CASE("A device that is not there is an error that says what there is", "[cuda]") {
  const int devices = CudaBackend::devices();
  CHECK_THROWS_AS(CudaBackend(devices), CudaError);
  CHECK_THROWS_AS(CudaBackend(-1), CudaError);
  if (devices == 0)
    CHECK_THROWS_WITH(CudaBackend(0), Catch::Matchers::ContainsSubstring("use device='cpu'"));
  else
    CHECK_THROWS_WITH(CudaBackend(devices),
                      Catch::Matchers::ContainsSubstring("got " + std::to_string(devices)));
}

TEST_CASE("Bytes go to the GPU and back in the order of the stream", "[cuda]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  const std::size_t bytes = (8u << 20) + 3;
  PinnedBuffer from(backend, bytes), to(backend, bytes);
  for (std::size_t i = 0; i < bytes; ++i) from.data()[i] = static_cast<std::byte>(i * 31 >> 3);
  Buffer<CudaBackend> device(backend, bytes);
  auto there = backend.make_stream(), back = backend.make_stream();
  auto arrived = backend.make_event(), done = backend.make_event();
  backend.copy_async(device.data(), from.data(), bytes, there);
  backend.record(arrived, there);
  backend.wait(back, arrived);  // across streams
  backend.copy_async(to.data(), device.data(), bytes, back);
  backend.record(done, back);
  backend.synchronize(done);
  CHECK(std::memcmp(to.data(), from.data(), bytes) == 0);
}

TEST_CASE("Pinned memory is zeros and known to the driver as pinned", "[cuda]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  const PinnedBuffer pinned(backend, 100'001, 3);
  for (std::size_t i = 0; i < pinned.size(); ++i) REQUIRE(pinned.data()[i] == std::byte{0});
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, pinned.data() + 100'000));
  CHECK(attributes.type == cudaMemoryTypeHost);
}

TEST_CASE("What does not fit on the GPU is an error with both figures, and leaves it usable",
          "[cuda]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  const std::size_t free = backend.available_bytes();
  REQUIRE(free > 0);
  const std::size_t wanted = free + (std::size_t{1} << 40);
  CHECK_THROWS_AS(backend.allocate(wanted), OutOfMemory);
  CHECK_THROWS_WITH(backend.allocate(wanted),
                    Catch::Matchers::ContainsSubstring(std::to_string(wanted)) &&
                        Catch::Matchers::ContainsSubstring("free"));
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK_NOTHROW(Buffer<CudaBackend>(backend, 1 << 20));
}

TEST_CASE("A copy from nowhere is a CudaError that says what was tried", "[cuda]") {
  if (!gpu_found()) return;
  CudaBackend backend;
  Buffer<CudaBackend> device(backend, 64);
  auto stream = backend.make_stream();
  CHECK_THROWS_WITH(backend.copy_async(device.data(), nullptr, 64, stream),
                    Catch::Matchers::ContainsSubstring("could not copy 64 bytes"));
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST_CASE("Threads of any origin use the backend's device", "[cuda]") {
  if (!gpu_found()) return;
  CudaBackend backend(CudaBackend::devices() - 1);
  Buffer<CudaBackend> device(backend, 1 << 16);
  const PinnedBuffer from(backend, 1 << 16);
  std::vector<std::thread> threads;
  std::vector<int> ok(8, 0);
  for (std::size_t i = 0; i < ok.size(); ++i)
    threads.emplace_back([&, i] {
      auto stream = backend.make_stream();
      auto done = backend.make_event();
      for (int turn = 0; turn < 50; ++turn) {
        backend.copy_async(device.data() + i * 8192, from.data() + i * 8192, 8192, stream);
        backend.record(done, stream);
        backend.synchronize(done);
      }
      ok[i] = 1;
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(ok == std::vector<int>(8, 1));
}
