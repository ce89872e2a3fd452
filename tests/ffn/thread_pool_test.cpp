// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/cpu/thread_pool.hpp"

#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "support/catch.hpp"

namespace sida::test {
namespace {

TEST_CASE("Every index is run once, loop after loop", "[thread_pool]") {
  const int threads = GENERATE(1, 2, 4);
  ThreadPool pool(threads);
  CHECK(pool.threads() == threads);
  for (const std::int64_t count : {0, 1, 2, 3, 1000}) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
      pool.run(count, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
      for (const auto& run : runs) REQUIRE(run == 1);
    }
  }
}

TEST_CASE("An exception reaches the caller, and the pool goes on", "[thread_pool]") {
  ThreadPool pool(GENERATE(1, 3));
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto body = [](std::int64_t i) {
      if (i % 7 == 3) throw std::runtime_error("3");
    };
    CHECK_THROWS_AS(pool.run(100, body), std::runtime_error);
    std::atomic<std::int64_t> sum{0};
    pool.run(100, [&](std::int64_t i) { sum += i; });
    CHECK(sum == 4950);
  }
}

TEST_CASE("A loop runs on several threads at once", "[thread_pool]") {
  ThreadPool pool(2);
  std::atomic<int> arrived{0};
  pool.run(2, [&](std::int64_t) {  // ends only when both are running
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  CHECK(arrived == 2);
}

TEST_CASE("An idle pool uses no processor time to speak of", "[thread_pool]") {
  ThreadPool pool(4);
  pool.run(8, [](std::int64_t) {});
  const auto cpu_seconds = [] {
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
  };
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const double before = cpu_seconds();
  std::this_thread::sleep_for(std::chrono::seconds(1));
  CHECK(cpu_seconds() - before <= 0.01);
}

TEST_CASE("Fewer than one thread is refused", "[thread_pool]") {
  CHECK_THROWS_AS(ThreadPool(0), InvalidArgument);
}

TEST_CASE("A pool may end at any moment after it woke its threads", "[thread_pool]") {
  for (int i = 0; i < 5000; ++i) {
    ThreadPool pool(8);
    pool.wake();
    for (int wait = 0; wait < i % 64; ++wait) std::this_thread::yield();
  }
}

}  // namespace
}  // namespace sida::test
