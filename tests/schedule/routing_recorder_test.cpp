// SPDX-License-Identifier: Apache-2.0
#include "sida/schedule/routing_recorder.hpp"

#include <vector>

#include "support/catch.hpp"

using namespace sida;

TEST_CASE("What was recorded is the table that a perfect predictor would have built",
          "[recorder]") {
  RoutingRecorder recorder(2, 1 << 20);
  recorder.begin_pass(11);
  recorder.add(recorder.pass(), 0, 2, 1, std::vector<std::int32_t>{3, -1}, std::vector<float>{1, 0},
               std::vector<float>{0.5F, 0});
  recorder.add(recorder.pass(), 1, 2, 1, std::vector<std::int32_t>{0, 2}, std::vector<float>{0, 1},
               std::vector<float>{0.25F, 1});
  recorder.end_pass();
  recorder.begin_pass(12);
  recorder.add(recorder.pass(), 1, 1, 1, std::vector<std::int32_t>{1}, std::vector<float>{1},
               std::vector<float>{0.75F});
  recorder.begin_pass(13);  // ends the one before

  const HashTable table = recorder.table();
  CHECK_NOTHROW(table.validate(4));
  CHECK(table.keys == std::vector<std::uint64_t>{11, 12});
  CHECK(table.offsets == std::vector<std::int64_t>{0, 2, 3});
  CHECK(table.ids == std::vector<std::int32_t>{3, -1, -1, 0, 2, 1});  // layer 0 of pass 2 not run
  CHECK(table.probs == std::vector<float>{1, 0, 0, 0, 1, 1});         // 0: for padding
  CHECK(table.scale == std::vector<float>{0.5F, 0, 0, 0.25F, 1, 0.75F});
}

TEST_CASE("Routing that arrives late belongs to its own pass", "[recorder]") {
  RoutingRecorder recorder(1, 20 * 12);
  const auto add = [&](std::int64_t pass, float weight) {
    recorder.add(pass, 0, 10, 1, std::vector<std::int32_t>(10, 1), std::vector<float>(10, 1.0F),
                 std::vector<float>(10, weight));
  };
  CHECK(recorder.pass() == -1);
  add(-1, 9);
  std::vector<std::int64_t> passes;
  for (std::uint64_t key = 0; key < 3; ++key) {
    recorder.begin_pass(key);
    passes.push_back(recorder.pass());
    recorder.end_pass();
  }
  add(passes[1], 2);
  add(passes[0], 1);
  HashTable table = recorder.table();
  CHECK(table.keys == std::vector<std::uint64_t>{0, 1});
  CHECK(table.scale.front() == 1);
  CHECK(table.scale.back() == 2);
  add(passes[2], 3);  // the oldest makes way
  add(passes[0], 4);
  table = recorder.table();
  CHECK(table.keys == std::vector<std::uint64_t>{1, 2});
  recorder.clear();
  add(passes[2], 5);
  CHECK(recorder.table().keys.empty());
}

TEST_CASE("The recorder keeps the latest passes within its bytes", "[recorder]") {
  RoutingRecorder recorder(1, 30 * 12);
  for (std::uint64_t pass = 0; pass < 10; ++pass) {
    recorder.begin_pass(pass);
    recorder.add(recorder.pass(), 0, 10, 1, std::vector<std::int32_t>(10, 1),
                 std::vector<float>(10, 1.0F), std::vector<float>(10, 1.0F));
    recorder.end_pass();
  }
  CHECK(recorder.table().keys == std::vector<std::uint64_t>{7, 8, 9});
  recorder.clear();
  CHECK(recorder.table().keys.empty());
  CHECK(recorder.table().layers == 1);
}
