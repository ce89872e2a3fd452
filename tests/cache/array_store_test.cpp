// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/array_store.hpp"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "support/catch.hpp"

using sida::ArrayPart;
using sida::ArrayStore;
using sida::ExpertId;

namespace {

const std::byte* bytes(const char* text) { return reinterpret_cast<const std::byte*>(text); }

/// Two layers of one expert; the slab of 12 bytes has gaps before, between and behind its parts.
ArrayStore make_store(std::shared_ptr<const void> owner = {}) {
  return ArrayStore(
      2, 1, 12, {{{1, bytes("abc"), 3}, {6, bytes("defg"), 4}}, {{0, bytes("ABCDEFGHIJKL"), 12}}},
      std::move(owner));
}

std::string read(sida::ExpertStore& store, ExpertId id, std::size_t offset, std::size_t count) {
  std::string text(count, '?');
  store.read(id, offset, std::as_writable_bytes(std::span(text)));
  return text;
}

}  // namespace

TEST_CASE("A slab is put together from arrays, with zeros between them") {
  ArrayStore store = make_store();
  CHECK(store.layers() == 2);
  CHECK(store.experts() == 1);
  CHECK(store.slab_bytes() == 12);
  CHECK(store.staging_bytes() == 0);
  const std::string whole("\0abc\0\0defg\0\0", 12);
  for (std::size_t offset = 0; offset <= 12; ++offset) {
    for (std::size_t count = 0; offset + count <= 12; ++count)
      CHECK(read(store, {0, 0}, offset, count) == whole.substr(offset, count));
  }
  CHECK(read(store, {1, 0}, 0, 12) == "ABCDEFGHIJKL");
}

TEST_CASE("An expert or a range outside an array store is refused before memory is touched") {
  ArrayStore store = make_store();
  for (const ExpertId id : {ExpertId{-1, 0}, ExpertId{2, 0}, ExpertId{0, -1}, ExpertId{0, 1}})
    CHECK_THROWS_AS(read(store, id, 0, 1), sida::OutOfRange);
  CHECK_THROWS_AS(read(store, {0, 0}, 12, 1), sida::OutOfRange);
  CHECK_THROWS_AS(read(store, {0, 0}, 0, 13), sida::OutOfRange);
  CHECK_THROWS_AS(read(store, {0, 0}, SIZE_MAX, 2), sida::OutOfRange);
  CHECK_THROWS_WITH(read(store, {2, 0}, 0, 1), Catch::Matchers::ContainsSubstring("layer 2"));
}

TEST_CASE("Parts that do not make up slabs are refused") {
  const auto refused = [](std::int32_t experts, std::vector<std::vector<ArrayPart>> parts) {
    CHECK_THROWS_AS(ArrayStore(1, experts, 8, std::move(parts)), sida::InvalidArgument);
  };
  const char* text = "12345678";
  refused(0, {});
  refused(2, {{{0, bytes(text), 8}}});
  refused(1, {{{0, nullptr, 8}}});
  refused(1, {{{1, bytes(text), 8}}});
  refused(1, {{{SIZE_MAX, bytes(text), 2}}});
  refused(1, {{{0, bytes(text), 4}, {3, bytes(text), 4}}});
  refused(1, {{{4, bytes(text), 4}, {0, bytes(text), 4}}});
}

TEST_CASE("An array store is read in place and keeps its owner alive, no longer") {
  auto owner = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = owner;
  {
    const ArrayStore store = make_store(std::move(owner));
    CHECK(!watch.expired());
    REQUIRE(store.parts({1, 0}).size() == 1);
    CHECK(std::memcmp(store.parts({1, 0})[0].data, "ABCDEFGHIJKL", 12) == 0);
    CHECK(store.parts({0, 0})[1].slab_offset == 6);
  }
  CHECK(watch.expired());
}
