// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/host_memory.hpp"

#include <cstddef>
#include <random>

#include "sida/core/error.hpp"
#include "support/catch.hpp"

namespace sida::test {
namespace {

constexpr std::size_t mib = std::size_t{1} << 20;

void check(const HostMemory& got, std::size_t experts, std::size_t piece_bytes,
           std::size_t pieces) {
  CHECK(got.experts == experts);
  CHECK(got.piece_bytes == piece_bytes);
  CHECK(got.pieces == pieces);
}

TEST_CASE("Where all experts fit, host memory has no ring") {
  check(divide_host_memory(80 * mib, 8 * mib, 10), 10, 0, 0);
  check(divide_host_memory(1000 * mib, 8 * mib, 10), 10, 0, 0);
}

TEST_CASE("Where they do not, a ring comes out of the same memory") {
  check(divide_host_memory(80 * mib - 1, 8 * mib, 10), 7, mib, 16);
  check(divide_host_memory(8 * mib, 8 * mib, 10), 0, mib, 8);       // no expert has room
  check(divide_host_memory(352 * mib, 352 * mib, 10), 0, mib, 16);  // more than a ring needs
  check(divide_host_memory(12 * mib, 8 * mib, 10), 1, mib, 4);      // a third, exactly filled
  check(divide_host_memory(5000 * 12, 5000, 24), 9, 5000, 3);       // pieces of a slab
  check(divide_host_memory(5000, 5000, 24), 0, 5000, 1);
}

TEST_CASE("Experts and ring never take more than there is") {
  std::mt19937_64 random(3);
  for (int turn = 0; turn < 10000; ++turn) {
    const std::size_t slab = 1 + random() % (4 * mib), experts = 1 + random() % 100;
    const std::size_t bytes = std::min(slab, mib) + random() % (experts * slab);
    const HostMemory got = divide_host_memory(bytes, slab, experts);
    REQUIRE(got.experts * slab + got.ring_bytes() <= bytes);
    REQUIRE((got.pieces == 0) == (got.experts == experts));
    REQUIRE(got.pieces <= 16);
  }
}

TEST_CASE("Host memory without room for a piece is refused, with the smallest that would do") {
  using Catch::Matchers::ContainsSubstring;
  CHECK_THROWS_AS(divide_host_memory(0, 5000, 24), InvalidArgument);
  CHECK_THROWS_WITH(divide_host_memory(4999, 5000, 24), ContainsSubstring("5000"));
  CHECK_THROWS_WITH(divide_host_memory(mib - 1, 9 * mib, 24), ContainsSubstring("1048576"));
}

}  // namespace
}  // namespace sida::test
