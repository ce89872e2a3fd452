// SPDX-License-Identifier: Apache-2.0
#include "ring_parts.hpp"

#include <algorithm>
#include <cstddef>
#include <deque>
#include <optional>
#include <random>
#include <utility>

#include "support/catch.hpp"

using sida::cuda::RingParts;

TEST_CASE("parts in use never overlap, whatever their sizes", "[cuda]") {
  std::mt19937 random(3);
  RingParts ring(4096);
  std::deque<std::pair<std::size_t, std::size_t>> used;
  int taken = 0, refused = 0;
  for (int i = 0; i < 20000; ++i) {
    if (!used.empty() && random() % 5 == 0) {
      ring.give_back_last();
      used.pop_back();
    } else if (!used.empty() && random() % 2) {
      ring.give_back_first();
      used.pop_front();
    }
    const std::size_t bytes = random() % 8 == 0 ? random() % 4097 : random() % 600;
    const std::optional<std::size_t> begin = ring.take(bytes);
    if (!begin) {
      ++refused;
      REQUIRE(!used.empty());
      continue;
    }
    ++taken;
    REQUIRE(*begin % RingParts::alignment == 0);
    REQUIRE(*begin + bytes <= ring.bytes());
    for (const auto& [other, its] : used)
      REQUIRE((*begin + std::max<std::size_t>(bytes, 1) <= other ||
               other + std::max<std::size_t>(its, 1) <= *begin));
    used.emplace_back(*begin, bytes);
  }
  CHECK(taken > 5000);
  CHECK(refused > 500);
}

TEST_CASE("a ring of parts goes round, and gives all of itself when none is in use", "[cuda]") {
  RingParts ring(256);
  CHECK(ring.take(128) == std::optional<std::size_t>(0));
  CHECK(ring.take(64) == std::optional<std::size_t>(128));
  CHECK_FALSE(ring.take(128));  // 64 at the end, none at the begin
  ring.give_back_first();
  CHECK(ring.take(128) == std::optional<std::size_t>(0));
  CHECK_FALSE(ring.take(1));
  ring.give_back_first();
  ring.give_back_first();
  CHECK(ring.take(256) == std::optional<std::size_t>(0));
  CHECK_FALSE(RingParts().take(0));
}
