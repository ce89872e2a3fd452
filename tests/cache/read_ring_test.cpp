// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/read_ring.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "sida/core/error.hpp"
#include "support/catch.hpp"
#include "support/pattern_store.hpp"

namespace sida::test {
namespace {

constexpr std::size_t slab_bytes = 1000, piece_bytes = 96;
constexpr std::int32_t layers = 2, experts = 5;

/// A ring over a PatternStore, in memory of its own.
struct Ring {
  explicit Ring(std::size_t pieces, int readers = 4, PatternStore::OnRead on_read = {})
      : store(layers, experts, slab_bytes, std::move(on_read)),
        memory(pieces * piece_bytes + 5),
        ring(store, memory, piece_bytes, readers) {}

  PatternStore store;
  std::vector<std::byte> memory;
  ReadRing ring;
};

std::vector<std::byte> expected(ExpertId id, std::size_t offset, std::size_t bytes) {
  std::vector<std::byte> result;
  for (std::size_t i = 0; i < bytes; ++i) result.push_back(PatternStore::pattern(id, offset + i));
  return result;
}
std::vector<std::byte> rest_of(ReadRing::Reading& reading) {
  std::vector<std::byte> bytes;
  for (auto piece = reading.next(); !piece.empty(); piece = reading.next())
    bytes.insert(bytes.end(), piece.begin(), piece.end());
  return bytes;
}
std::vector<std::byte> taken(ReadRing& ring, ExpertId id, std::size_t offset, std::size_t bytes) {
  ReadRing::Reading reading(ring, id, offset, bytes);
  return rest_of(reading);
}

/// Waits for up to 200 µs, as the expert and the offset say.
void wait_a_little(ExpertId id, std::size_t offset, std::uint32_t seed) {
  std::mt19937 random(seed + static_cast<std::uint32_t>(id.expert * 131 + id.layer * 17) +
                      static_cast<std::uint32_t>(offset));
  std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
}

TEST_CASE("A ring hands out every range in order, whatever its size", "[ring]") {
  for (const std::size_t pieces : {1, 2, 16})
    for (const int readers : {1, 4}) {
      Ring ring(pieces, readers, [&](ExpertId id, std::size_t offset) {
        wait_a_little(id, offset, static_cast<std::uint32_t>(readers));
      });
      for (const auto& [offset, bytes] : {std::pair<std::size_t, std::size_t>{0, slab_bytes},
                                          {0, 96},
                                          {1, 96},
                                          {0, 97},
                                          {500, 0},
                                          {999, 1},
                                          {300, 700},
                                          {1000, 0}})
        CHECK(taken(ring.ring, {1, 3}, offset, bytes) == expected({1, 3}, offset, bytes));
    }
}

TEST_CASE("A ring reads several pieces at once, at most as many as it has memory for", "[ring]") {
  for (const std::size_t pieces : {1, 3, 16}) {
    std::atomic<int> under_way = 0, most = 0, begun = 0;
    Gate gate;
    Ring ring(pieces, 4, [&](ExpertId, std::size_t) {
      const int now = ++under_way;
      for (int seen = most; seen < now && !most.compare_exchange_weak(seen, now);) {
      }
      ++begun;
      gate.pass();
      --under_way;
    });
    ReadRing::Reading reading(ring.ring, {0, 0}, 0, slab_bytes);
    const int at_once = static_cast<int>(std::min<std::size_t>(pieces, 4));
    CHECK(eventually([&] { return under_way == at_once; }));
    gate.open();
    // 11 pieces: without one taken, no more are read than there is memory for.
    const int ahead = static_cast<int>(std::min<std::size_t>(pieces, 11));
    CHECK(eventually([&] { return begun == ahead && under_way == 0; }));
    CHECK(rest_of(reading) == expected({0, 0}, 0, slab_bytes));
    CHECK(begun == 11);
    CHECK(most == at_once);
  }
}

TEST_CASE("Pieces that become ready in reverse order come out in order", "[ring]") {
  std::atomic<std::size_t> last = 3 * piece_bytes;  // the only one that may be read
  Ring ring(4, 4, [&](ExpertId, std::size_t offset) {
    if (!eventually([&] { return last == offset; })) throw IoError("out of turn");
    last = offset - piece_bytes;
  });
  CHECK(taken(ring.ring, {0, 1}, 0, 4 * piece_bytes) == expected({0, 1}, 0, 4 * piece_bytes));
}

TEST_CASE("A read that fails reaches who takes its piece, and the next range is right", "[ring]") {
  for (const std::size_t fails_at : {0, 3, 10}) {
    std::atomic<bool> is_broken = true;
    Ring ring(4, 4, [&](ExpertId id, std::size_t offset) {
      wait_a_little(id, offset, 1);
      if (is_broken && offset == fails_at * piece_bytes) throw IoError("the disk is broken");
    });
    {
      ReadRing::Reading reading(ring.ring, {1, 1}, 0, slab_bytes);
      for (std::size_t piece = 0; piece < fails_at; ++piece)
        REQUIRE(reading.next().size() == piece_bytes);
      CHECK_THROWS_WITH(reading.next(), "the disk is broken");
      CHECK_THROWS_AS(reading.next(), IoError);
    }
    is_broken = false;
    CHECK(taken(ring.ring, {1, 1}, 0, slab_bytes) == expected({1, 1}, 0, slab_bytes));
  }
}

TEST_CASE("Behind a read that failed nothing more of its range is read", "[ring]") {
  std::atomic<int> reads = 0;
  Ring ring(16, 1, [&](ExpertId, std::size_t) {
    if (++reads == 3) throw IoError("the disk is broken");
  });
  {
    ReadRing::Reading reading(ring.ring, {0, 0}, 0, slab_bytes);
    CHECK_THROWS_AS(rest_of(reading), IoError);
  }
  CHECK(taken(ring.ring, {0, 0}, 0, piece_bytes) == expected({0, 0}, 0, piece_bytes));
  CHECK(reads == 4);
}

TEST_CASE("The range that was begun first is read first", "[ring]") {
  std::vector<std::int32_t> order;  // of one reader, which is done before it is looked at
  Gate gate;
  Ring ring(16, 1, [&](ExpertId id, std::size_t) {
    gate.pass();
    order.push_back(id.expert);
  });
  ReadRing::Reading first(ring.ring, {0, 1}, 0, 5 * piece_bytes);
  gate.wait_for_arrival();
  ReadRing::Reading second(ring.ring, {0, 2}, 0, 2 * piece_bytes);
  gate.open();
  rest_of(second);
  CHECK(order == std::vector<std::int32_t>{1, 1, 1, 1, 1, 2, 2});
}

TEST_CASE("A range that is given up waits for its reads under way and frees its memory", "[ring]") {
  std::atomic<bool> touched = false;
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    std::atomic<bool> is_gone = false;
    Ring ring(1 + seed % 5, 1 + static_cast<int>(seed % 4), [&](ExpertId id, std::size_t offset) {
      wait_a_little(id, offset, seed);
      if (id.layer == 0 && is_gone) touched = true;
      if (id.layer == 0 && seed % 3 == 0 && offset > 300) throw IoError("late");
    });
    {
      ReadRing::Reading reading(ring.ring, {0, 2}, 0, slab_bytes);
      for (std::uint32_t piece = 0; piece < seed % 4; ++piece)
        if (!reading.next().empty()) wait_a_little({0, 0}, piece, seed);
    }
    is_gone = true;
    if (seed % 2)  // else the ring goes at once
      REQUIRE(taken(ring.ring, {1, 2}, 0, slab_bytes) == expected({1, 2}, 0, slab_bytes));
  }
  CHECK_FALSE(touched);
}

TEST_CASE("Threads that share a ring get what they asked for, though reads fail and are given up",
          "[ring]") {
  std::atomic<std::uint32_t> reads = 0;
  Ring ring(6, 4, [&](ExpertId id, std::size_t offset) {
    const std::uint32_t now = reads++;
    if (now % 7 == 0) wait_a_little(id, offset, now);
    if (now % 23 == 0) throw IoError("now and then");
  });
  std::atomic<int> wrong = 0, right = 0, failed = 0;
  const auto take = [&](std::uint32_t seed) {
    std::mt19937 random(seed);
    for (int turn = 0; turn < 200; ++turn) {
      const ExpertId id{static_cast<std::int32_t>(random() % layers),
                        static_cast<std::int32_t>(random() % experts)};
      const std::size_t offset = random() % slab_bytes, bytes = random() % (slab_bytes - offset);
      try {
        if (random() % 8 == 0) {  // given up after a piece
          ReadRing::Reading(ring.ring, id, offset, bytes).next();
          continue;
        }
        ++(taken(ring.ring, id, offset, bytes) == expected(id, offset, bytes) ? right : wrong);
      } catch (const IoError&) {
        ++failed;
      }
    }
  };
  {
    std::vector<std::jthread> threads;
    for (std::uint32_t seed = 0; seed < 3; ++seed) threads.emplace_back(take, seed);
  }
  CHECK(wrong == 0);
  CHECK(right > 100);
  CHECK(failed > 10);
}

TEST_CASE("A ring refuses what it cannot read", "[ring]") {
  PatternStore store(layers, experts, slab_bytes);
  std::vector<std::byte> memory(piece_bytes - 1);
  CHECK_THROWS_AS(ReadRing(store, memory, piece_bytes), InvalidArgument);
  CHECK_THROWS_AS(ReadRing(store, memory, 0), InvalidArgument);
  CHECK_THROWS_AS(ReadRing(store, memory, 1, 0), InvalidArgument);
  Ring ring(2);
  CHECK_THROWS_AS(ReadRing::Reading(ring.ring, {0, 5}, 0, 1), OutOfRange);
  CHECK_THROWS_AS(ReadRing::Reading(ring.ring, {0, 0}, 1, slab_bytes), OutOfRange);
}

}  // namespace
}  // namespace sida::test
