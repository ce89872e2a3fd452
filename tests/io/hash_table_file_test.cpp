// SPDX-License-Identifier: Apache-2.0
#include "sida/io/hash_table_file.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "io/raw_safetensors.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;

namespace {

struct RawTable {
  std::string metadata =
      R"("format":"sida-hash-table","version":"1","layers":"2","candidates":"2")";
  std::string shape = "[2,3,2]";
  std::vector<std::int64_t> keys{-1, 7};
  std::vector<std::int64_t> offsets{0, 2, 3};
  std::string id_dtype = "I32";
  std::int32_t lowest_id = 5;
  float prob = 0.5f;

  std::string bytes() const {
    const std::vector<std::int32_t> ids{0, 1, 2, 3, 4, lowest_id, -1, -1, 8, 9, 10, 11};
    const std::vector<float> probs(12, prob), scale(12, 0.25f);
    return RawSafetensors()
        .add("keys", "I64", "[" + std::to_string(keys.size()) + "]", keys)
        .add("offsets", "I64", "[" + std::to_string(offsets.size()) + "]", offsets)
        .add("ids", id_dtype, shape, ids)
        .add("probs", "F32", shape, probs)
        .add("scale", "F32", shape, scale)
        .bytes(metadata);
  }
};

}  // namespace

TEST_CASE("A hash table is read from the tensors that the format names") {
  const TemporaryFolder folder;
  const auto table = sida::load_hash_table(folder.write("table", RawTable{}.bytes()));
  CHECK(table.layers == 2);
  CHECK(table.candidates == 2);
  CHECK(table.keys == std::vector<std::uint64_t>{0xffffffffffffffffu, 7});
  CHECK(table.offsets == std::vector<std::int64_t>{0, 2, 3});
  CHECK(table.ids[table.index(1, 0, 0)] == -1);
  CHECK(table.ids[table.index(1, 2, 1)] == 11);
  CHECK(table.probs == std::vector<float>(12, 0.5f));
  CHECK(table.scale == std::vector<float>(12, 0.25f));
}

TEST_CASE("A hash table that was saved is loaded as it was, bit by bit") {
  const TemporaryFolder folder;
  sida::HashTable table;
  table.layers = 3;
  table.candidates = 2;
  table.keys = {0x8000000000000001u, 42};
  table.offsets = {0, 1, 4};
  for (int i = 0; i < 24; ++i) {
    table.ids.push_back(i - 1);
    table.probs.push_back(1.0f / static_cast<float>(i + 3));
    table.scale.push_back(i == 5 ? -0.0f : std::ldexp(1.0f, -140 + i));
  }
  sida::save_hash_table(folder / "table", table);
  const auto loaded = sida::load_hash_table(folder / "table");
  CHECK(loaded.layers == 3);
  CHECK(loaded.candidates == 2);
  CHECK(loaded.keys == table.keys);
  CHECK(loaded.offsets == table.offsets);
  CHECK(loaded.ids == table.ids);
  CHECK(bytes_of(loaded.probs) == bytes_of(table.probs));
  CHECK(bytes_of(loaded.scale) == bytes_of(table.scale));

  sida::HashTable empty;
  empty.layers = 1;
  empty.candidates = 1;
  sida::save_hash_table(folder / "table", empty);
  CHECK(sida::load_hash_table(folder / "table").batches() == 0);

  table.ids.pop_back();
  CHECK_THROWS_AS(sida::save_hash_table(folder / "table", table), sida::InvalidArgument);
}

TEST_CASE("A file that is no hash table is refused") {
  const TemporaryFolder folder;
  const auto check_refused = [&](const RawTable& table, const char* reason) {
    const auto path = folder.write("bad", table.bytes());
    CHECK_THROWS_AS(sida::load_hash_table(path), sida::IoError);
    CHECK_THROWS_WITH(sida::load_hash_table(path), ContainsSubstring(reason));
  };
  check_refused({.metadata = R"("format":"pt")"}, "sida-hash-table");
  check_refused({.metadata = R"("format":"sida-hash-table","version":"2")"}, "version");
  check_refused({.metadata = R"("format":"sida-hash-table","version":"1","layers":"2")"},
                "candidates");
  check_refused(
      {.metadata = R"("format":"sida-hash-table","version":"1","layers":"two","candidates":"2")"},
      "'two'");
  check_refused(
      {.metadata = R"("format":"sida-hash-table","version":"1","layers":"-2","candidates":"2")"},
      "layers");
  check_refused(
      {.metadata = R"("format":"sida-hash-table","version":"1","layers":"3","candidates":"2")"},
      "[3, 3, 2]");
  check_refused({.shape = "[3,2,2]"}, "[2, 3, 2]");
  check_refused({.offsets = {0, 3}}, "offsets");
  check_refused({.offsets = {1, 2, 3}}, "offsets");
  check_refused({.offsets = {0, 4, 3}}, "offsets");
  check_refused({.offsets = {0, 2, 4}}, "[2, 4, 2]");
  check_refused({.id_dtype = "F32"}, "I32");
  check_refused({.lowest_id = -2}, "-2");
  check_refused({.prob = std::numeric_limits<float>::quiet_NaN()}, "probabilities");
}
