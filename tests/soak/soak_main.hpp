// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

#include "soak/soak.hpp"

namespace sida::test {

struct SoakOptions {
  std::uint32_t first_seed = 1;
  std::uint32_t rounds = ~0u;  ///< at most
  double seconds = 60;
};

/// @throws std::invalid_argument.
inline SoakOptions parse_soak(int count, char** arguments) {
  SoakOptions options;
  for (int i = 1; i < count; i += 2) {
    const std::string_view name = arguments[i];
    if (i + 1 == count) throw std::invalid_argument("a value is missing");
    const std::string value = arguments[i + 1];
    if (name == "--first-seed")
      options.first_seed = static_cast<std::uint32_t>(std::stoul(value));
    else if (name == "--rounds")
      options.rounds = static_cast<std::uint32_t>(std::stoul(value));
    else if (name == "--seconds")
      options.seconds = std::stod(value);
    else
      throw std::invalid_argument("unknown option " + std::string(name));
  }
  return options;
}

template <class Place>
Held held_now() {
  std::ifstream statm("/proc/self/statm");
  std::ptrdiff_t all = 0, resident = 0;
  statm >> all >> resident;
  return {entries_of("/proc/self/task"), entries_of("/proc/self/fd"),
          resident * ::sysconf(_SC_PAGESIZE), Place::device_bytes()};
}

/// What is held behind a round. A thread that was joined may be listed a moment longer, since the
/// kernel wakes who joins it before it takes it off the list.
template <class Place>
Held held_behind(const Held& before) {
  Held held = held_now<Place>();
  for (int look = 0; held.threads > before.threads && look < 100; ++look) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    held = held_now<Place>();
  }
  return held;
}

/// @throws std::runtime_error where more is held than before.
inline void expect_no_more(const Held& before, const Held& after) {
  // A leak of a round's few KiB comes to more than this within thousands of rounds.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  constexpr std::ptrdiff_t slack = std::ptrdiff_t{512} << 20;  // sanitizers keep memory
#else
  constexpr std::ptrdiff_t slack = std::ptrdiff_t{64} << 20;
#endif
  const auto expect = [](const char* what, std::ptrdiff_t least, std::ptrdiff_t got) {
    if (got > least)
      throw std::runtime_error(std::string(what) + " grew: expected at most " +
                               std::to_string(least) + ", got " + std::to_string(got));
  };
  expect("threads", before.threads, after.threads);
  expect("open files", before.files, after.files);
  expect("memory", before.bytes + slack, after.bytes);
  expect("device memory", before.device_bytes + slack, after.device_bytes);
}

/// Rounds of random work until the time is over or one fails; prints as JSON what was right. What
/// `Place` has to have: `Engine<Policy>`, `make<Policy>(model, store, budget, options, seed)`,
/// `change_stream(engine, random)`, `device_bytes()` in use, `name()`.
template <class Place>
int soak(int count, char** arguments) {
  using Clock = std::chrono::steady_clock;
  SoakOptions options;
  try {
    options = parse_soak(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "soak: %s; usage: [--first-seed N] [--rounds N] [--seconds S]\n",
                 error.what());
    return 2;
  }
  const auto begin = Clock::now();
  std::uint32_t round = 0;
  long long right = 0;
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
  const auto tell = [&] {
    std::printf(
        "{\"backend\": \"%s\", \"first_seed\": %u, \"seeds\": %u, \"right_passes\": %lld, "
        "\"seconds\": %.1f}\n",
        Place::name().c_str(), options.first_seed, round, right, elapsed());
  };
  Watchdog watchdog(std::chrono::seconds(120));
  constexpr std::uint32_t warm_up = 20;  // until allocators and libraries hold what they keep
  Held held = held_now<Place>();
  for (; round < options.rounds && elapsed() < options.seconds; ++round) {
    const std::uint32_t seed = options.first_seed + round;
    watchdog.begin(seed);
    try {
      right += run_round<Place>(seed);
      if (round < warm_up) held = held_now<Place>();
      expect_no_more(held, held_behind<Place>(held));
    } catch (const std::exception& error) {
      std::fprintf(stderr, "soak: seed %u: %s; again: --first-seed %u --rounds 1\n", seed,
                   error.what(), seed);
      tell();  // of the seeds before
      return 1;
    }
  }
  tell();
  return 0;
}

}  // namespace sida::test
