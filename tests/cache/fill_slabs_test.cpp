// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/fill_slabs.hpp"

#include <cstddef>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "support/catch.hpp"
#include "support/pattern_store.hpp"

namespace sida::test {
namespace {

constexpr std::size_t slab_bytes = 96;
using Reports = std::vector<std::pair<std::size_t, std::size_t>>;

TEST_CASE("Slabs are filled in order, and the caller's thread is told how far it is") {
  PatternStore store(3, 5, slab_bytes);
  for (const int threads : {1, 4})
    for (const std::size_t count : {std::size_t{0}, std::size_t{7}, std::size_t{15}}) {
      std::vector<std::byte> slabs(count * slab_bytes), expected(count * slab_bytes);
      for (std::size_t i = 0; i < count; ++i)
        store.read({static_cast<std::int32_t>(i / 5), static_cast<std::int32_t>(i % 5)}, 0,
                   std::span(expected).subspan(i * slab_bytes, slab_bytes));
      Reports reports;
      const auto caller = std::this_thread::get_id();
      fill_slabs(store, slabs, threads, [&](std::size_t done, std::size_t total) {
        REQUIRE(std::this_thread::get_id() == caller);
        reports.emplace_back(done, total);
      });
      CHECK(slabs == expected);
      REQUIRE(!reports.empty());
      CHECK(reports.back() == std::pair(count * slab_bytes, count * slab_bytes));
      CHECK(std::is_sorted(reports.begin(), reports.end()));
      if (threads == 1) CHECK(reports.size() == count + 1);
    }
}

TEST_CASE("What reading or telling throws comes back when all threads have ended") {
  std::vector<std::byte> slabs(15 * slab_bytes);
  for (const int threads : {1, 4}) {
    PatternStore fails(3, 5, slab_bytes, [](ExpertId id, std::size_t) {
      if (id == ExpertId{1, 3}) throw IoError("injected");
    });
    CHECK_THROWS_WITH(fill_slabs(fails, slabs, threads), "injected");
    CHECK_NOTHROW(fill_slabs(fails, std::span(slabs).first(8 * slab_bytes), threads));
    PatternStore store(3, 5, slab_bytes);
    const auto interrupted = [](std::size_t, std::size_t) { throw std::runtime_error("told"); };
    CHECK_THROWS_WITH(fill_slabs(store, slabs, threads, interrupted), "told");
  }
}

}  // namespace
}  // namespace sida::test
