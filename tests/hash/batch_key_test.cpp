// SPDX-License-Identifier: Apache-2.0
#include "sida/hash/batch_key.hpp"

#include <set>
#include <vector>

#include "support/catch.hpp"

using sida::batch_key;
using Ids = std::vector<std::int64_t>;
using Mask = std::vector<std::uint8_t>;

TEST_CASE("A batch's key is the same in every build, on every machine") {
  // Files hold keys: these numbers never change. Worked out by another program.
  REQUIRE(batch_key(Ids{}) == 0xf52a15e9a9b5e89bu);
  REQUIRE(batch_key(Ids{1, 2, 3}) == 0x36ebbd2071e93ff9u);
  REQUIRE(batch_key(Ids{1, 2, 3}, Mask{1, 1, 0}) == 0x71e6d8f59b7c134cu);
  REQUIRE(batch_key(Ids{-1, std::int64_t{1} << 40}) == 0x3ab0ca57b44afdbeu);
}

TEST_CASE("A mask of ones is no mask, and any nonzero value is a one") {
  REQUIRE(batch_key(Ids{4, 5}, Mask{1, 1}) == batch_key(Ids{4, 5}));
  REQUIRE(batch_key(Ids{4, 5}, Mask{255, 0}) == batch_key(Ids{4, 5}, Mask{1, 0}));
}

TEST_CASE("Batches that differ have keys that differ") {
  std::set<std::uint64_t> keys;
  std::size_t batches = 0;
  const auto add = [&](const Ids& ids, const Mask& mask = {}) {
    keys.insert(batch_key(ids, mask));
    ++batches;
  };
  for (std::size_t length = 0; length < 100; ++length) add(Ids(length, 0));
  for (std::int64_t a = 0; a < 100; ++a)
    for (std::int64_t b = 0; b < 100; ++b) add({a, b, 7});
  for (std::size_t i = 0; i < 64; ++i) {
    Mask mask(64, 1);
    mask[i] = 0;
    add(Ids(64, 3), mask);
  }
  for (int bit = 0; bit < 63; ++bit) add({std::int64_t{1} << bit, 8, 8, 8});
  REQUIRE(keys.size() == batches);
}

TEST_CASE("A mask of another size is refused") {
  REQUIRE_THROWS_AS(batch_key(Ids{1, 2}, Mask{1}), sida::InvalidArgument);
}
