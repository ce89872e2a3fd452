// SPDX-License-Identifier: Apache-2.0
#include "sida/hash/hash_table.hpp"

#include <limits>
#include <vector>

#include "support/catch.hpp"

using sida::HashTable;

namespace {

/// Two layers, two candidates; each id tells batch, layer, token and candidate.
HashTable numbered(std::uint64_t key, std::int64_t tokens) {
  HashTable table;
  table.layers = 2;
  table.candidates = 2;
  table.keys = {key};
  table.offsets = {0, tokens};
  for (int layer = 0; layer < 2; ++layer) {
    for (int token = 0; token < tokens; ++token) {
      for (int c = 0; c < 2; ++c) {
        table.ids.push_back(static_cast<int>(key) * 1000 + layer * 100 + token * 10 + c);
        table.probs.push_back(0.5f / static_cast<float>(key));
        table.scale.push_back(static_cast<float>(table.ids.back()));
      }
    }
  }
  return table;
}

void check_equal(const HashTable& a, const HashTable& b) {
  REQUIRE(a.layers == b.layers);
  REQUIRE(a.candidates == b.candidates);
  REQUIRE(a.keys == b.keys);
  REQUIRE(a.offsets == b.offsets);
  REQUIRE(a.ids == b.ids);
  REQUIRE(a.probs == b.probs);
  REQUIRE(a.scale == b.scale);
}

}  // namespace

TEST_CASE("Batches put together are found again, each as it was") {
  const std::vector<HashTable> parts{numbered(1, 3), numbered(2, 0), HashTable{}, numbered(3, 1)};
  const HashTable all = sida::concatenate(parts);
  REQUIRE_NOTHROW(all.validate());
  REQUIRE(all.batches() == 3);
  REQUIRE(all.offsets == std::vector<std::int64_t>{0, 3, 3, 4});
  REQUIRE(all.ids[all.index(1, 3, 1)] == 3101);  // batch 3, layer 1, its token 0, candidate 1
  check_equal(all.slice(0), parts[0]);
  check_equal(all.slice(1), parts[1]);
  check_equal(all.slice(2), parts[3]);

  HashTable grown;
  for (const HashTable& part : parts) grown.append(part);
  check_equal(grown, all);
}

TEST_CASE("A batch is found by its key, the first of several") {
  HashTable table = numbered(5, 1);
  table.append(numbered(6, 2));
  table.append(numbered(5, 3));
  REQUIRE(table.find(6) == 1);
  REQUIRE(table.find(5) == 0);
  REQUIRE_FALSE(table.find(7).has_value());
}

TEST_CASE("Batches that are not there and tables that do not fit are refused") {
  using Catch::Matchers::ContainsSubstring;
  HashTable table = numbered(1, 2);
  REQUIRE_THROWS_AS(table.slice(1), sida::OutOfRange);
  REQUIRE_THROWS_AS(table.slice(-1), sida::OutOfRange);
  HashTable other = numbered(2, 1);
  other.candidates = 1;
  REQUIRE_THROWS_WITH(table.append(other), ContainsSubstring("2 candidates, got 2 and 1"));
  check_equal(table, numbered(1, 2));
}

TEST_CASE("A table from elsewhere is checked before use") {
  using Catch::Matchers::ContainsSubstring;
  const auto refused = [](auto change, const std::string& message) {
    HashTable table = numbered(1, 2);
    table.append(numbered(2, 3));
    REQUIRE_NOTHROW(table.validate(3000));
    change(table);
    REQUIRE_THROWS_WITH(table.validate(3000), ContainsSubstring(message));
    REQUIRE_THROWS_AS(table.validate(3000), sida::InvalidArgument);
  };
  refused([](HashTable& t) { t.layers = -1; }, "layers and candidates >= 0");
  refused([](HashTable& t) { t.layers = 3; }, "3 x 5 x 2 elements, got 20, 20 and 20");
  refused([](HashTable& t) { t.layers = t.candidates = 0; }, "0 x 5 x 0 elements");
  refused([](HashTable& t) { t.offsets = {}; }, "3 offsets");
  refused([](HashTable& t) { t.offsets = {0, 5}; }, "3 offsets");
  refused([](HashTable& t) { t.offsets = {1, 2, 5}; }, "3 offsets");
  refused([](HashTable& t) { t.offsets = {0, 6, 5}; }, "3 offsets");
  refused([](HashTable& t) { t.offsets = {0, 2, std::int64_t{1} << 62}; }, "elements, got 20");
  refused([](HashTable& t) { t.probs.pop_back(); }, "got 20, 19 and 20");
  refused([](HashTable& t) { t.scale.pop_back(); }, "got 20, 20 and 19");
  refused([](HashTable& t) { t.ids[3] = 3000; }, "ids from -1 to 2999, got 3000");
  refused([](HashTable& t) { t.ids[3] = -2; }, "got -2");
  refused([](HashTable& t) { t.probs[3] = 1.5f; }, "from 0 to 1, got 1.5");
  refused([](HashTable& t) { t.probs[3] = std::numeric_limits<float>::quiet_NaN(); }, "got nan");
  REQUIRE_NOTHROW(HashTable{}.validate());
}
