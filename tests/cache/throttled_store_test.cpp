// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/throttled_store.hpp"

#include <atomic>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "sida/cache/array_store.hpp"
#include "support/catch.hpp"

using sida::ThrottledStore;

namespace {

constexpr std::size_t slab_bytes = 1000;

std::shared_ptr<sida::ExpertStore> make_store() {
  auto memory = std::make_shared<std::vector<std::byte>>(slab_bytes, std::byte{7});
  std::vector<std::vector<sida::ArrayPart>> parts{{{0, memory->data(), slab_bytes}}};
  return std::make_shared<sida::ArrayStore>(1, 1, slab_bytes, parts, memory);
}

/// Seconds that `reads` threads need that each read `bytes` at once, and whether all was read.
double seconds_of(sida::ExpertStore& store, int reads, std::size_t bytes) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::vector<std::byte>> got(static_cast<std::size_t>(reads),
                                          std::vector<std::byte>(bytes));
  std::vector<std::thread> threads;
  for (auto& destination : got) threads.emplace_back([&] { store.read({0, 0}, 0, destination); });
  for (std::thread& thread : threads) thread.join();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  for (const auto& destination : got)
    CHECK(destination == std::vector<std::byte>(bytes, std::byte{7}));
  return elapsed.count();
}

}  // namespace

// A slow machine can only make these times longer, so they bound from below alone.

TEST_CASE("A read takes at least its bytes' time on the link and the latency") {
  ThrottledStore store(make_store(), 20000, 0.03);
  CHECK(seconds_of(store, 1, 1000) >= 0.08);
  CHECK(seconds_of(store, 1, 0) >= 0.03);
}

TEST_CASE("Reads at one time share the link's bandwidth, not its latency") {
  ThrottledStore store(make_store(), 40000);
  CHECK(seconds_of(store, 4, 500) >= 0.05);
  ThrottledStore far(make_store(), std::numeric_limits<double>::infinity(), 0.2);
  CHECK(seconds_of(far, 4, 500) >= 0.2);
}

TEST_CASE("A short read overtakes a long one that came earlier") {
  ThrottledStore store(make_store(), 1000);
  std::atomic<bool> long_done{false};
  std::thread long_read([&] {
    std::vector<std::byte> destination(slab_bytes);  // a second alone
    store.read({0, 0}, 0, destination);
    long_done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  std::vector<std::byte> destination(20);  // 40 ms on half of the link
  store.read({0, 0}, 0, destination);
  CHECK(!long_done);
  long_read.join();
}

TEST_CASE("A throttled store shows the store behind it and passes its errors on") {
  ThrottledStore store(make_store(), 1e9);
  CHECK(store.layers() == 1);
  CHECK(store.experts() == 1);
  CHECK(store.slab_bytes() == slab_bytes);
  CHECK(store.staging_bytes() == 0);
  std::vector<std::byte> destination(8);
  CHECK_THROWS_AS(store.read({0, 1}, 0, destination), sida::OutOfRange);
  CHECK(seconds_of(store, 2, 8) > 0);  // the failed read holds no share of the link
}

TEST_CASE("A link that cannot be is refused") {
  const double nan = std::nan("");
  CHECK_THROWS_AS(ThrottledStore(nullptr, 1e9), sida::InvalidArgument);
  for (const double bandwidth : {0.0, -1.0, 0.5, nan})
    CHECK_THROWS_AS(ThrottledStore(make_store(), bandwidth), sida::InvalidArgument);
  for (const double latency : {-1.0, 61.0, nan})
    CHECK_THROWS_AS(ThrottledStore(make_store(), 1e9, latency), sida::InvalidArgument);
}
