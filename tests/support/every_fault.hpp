// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/budget.hpp"
#include "sida/core/error.hpp"
#include "sida/hash/hash_table.hpp"
#include "support/catch.hpp"
#include "support/faults.hpp"
#include "support/layers.hpp"

namespace sida::test {

/// Whether an error is of the type that says what a fault of this kind means to a user.
inline bool is_named_for(Fault kind, const std::exception& error) {
  switch (kind) {
    case Fault::allocation:
      return dynamic_cast<const OutOfMemory*>(&error) != nullptr;
    case Fault::thread:
      return dynamic_cast<const ThreadError*>(&error) != nullptr;
    case Fault::read:
      return dynamic_cast<const IoError*>(&error) != nullptr;
    default:
      return dynamic_cast<const CudaError*>(&error) != nullptr;
  }
}

/// A run of layers in which one operation of a kind fails, wherever that is: what the caller is
/// told, and that all that comes later is right.
template <class Engine>
class FaultyRun {
 public:
  FaultyRun(Fault kind, const std::vector<std::byte>& expected, const HashTable& table)
      : kind_(kind), expected_(expected), table_(table) {}

  template <class Make>
  void run(Make&& make) {
    again_if_it_fails([&] { engine_ = make(); });
    passes();
    tables_ahead();
    resize();
    again_if_it_fails([&] { check_counts(); });
    engine_.reset();
    CHECK(errors_ <= 1);
  }

 private:
  using Bytes = std::vector<std::byte>;

  /// Calls `f`, and once more if the fault struck there. @returns whether it did.
  template <class F>
  bool again_if_it_fails(F&& f) {
    try {
      f();
      return false;
    } catch (const std::exception& error) {
      INFO(error.what());
      CHECK(Faults::struck());
      CHECK(is_named_for(kind_, error));
      CHECK(std::string(error.what()).size() > 10);
      ++errors_;
    }
    f();
    return true;
  }
  template <class Pass>
  void expect_right(Pass&& pass) {
    Bytes bytes;
    again_if_it_fails([&] { bytes = pass(); });
    REQUIRE(bytes == expected_);
  }

  void passes() {
    expect_right([&] { return engine_->pass(); });
    expect_right([&] { return engine_->pass(table_); });
    expect_right([&] { return predicted(); });
    expect_right([&] { return engine_->pass(); });
  }
  Bytes predicted() {
    engine_->scheduler->begin_pass(table_, 0, {});
    return outputs_of_pass(*engine_,
                           [this](std::size_t layer) { return engine_->forward_predicted(layer); });
  }

  void tables_ahead() {
    const auto source = [this, left = 2]() mutable {
      return left-- > 0 ? std::optional(table_) : std::nullopt;
    };
    again_if_it_fails([&] { engine_->scheduler->start(source, 2); });
    for (int batch = 0; batch < 2; ++batch) {
      REQUIRE(engine_->scheduler->next_batch());
      bool is_begun = true;
      expect_right([&] {
        return std::exchange(is_begun, false) ? engine_->rest_of_pass() : engine_->pass();
      });
    }
    CHECK_FALSE(engine_->scheduler->next_batch());
    engine_->scheduler->stop();
  }

  void resize() {
    for (const int slots : {2, 18, 3}) {
      const std::size_t before = engine_->cache.capacity_bytes();
      const auto slots_before = engine_->cache.slots();
      bool is_first = true;
      again_if_it_fails([&] {
        if (!std::exchange(is_first, false)) {  // it failed: the old budget stands
          CHECK(engine_->cache.capacity_bytes() == before);
          CHECK(engine_->cache.slots() == slots_before);
          expect_right([&] { return engine_->pass(); });
        }
        engine_->scheduler->resize(Budget::experts(slots));
      });
      CHECK(engine_->cache.slots() == slots);
      expect_right([&] { return engine_->pass(); });
    }
  }

  void check_counts() {
    const auto stats = engine_->scheduler->stats();
    const auto& total = stats.total;
    CHECK(total.hits + total.late + total.misses == total.uses);
    CHECK(errors_ + stats.failed_prefetches <= 1);
    CHECK(engine_->cache.resident().size() <= static_cast<std::size_t>(engine_->cache.slots()));
  }

  Fault kind_;
  const Bytes& expected_;
  const HashTable& table_;
  std::unique_ptr<Engine> engine_;
  int errors_ = 0;
};

/// Lets each operation of a kind that a run has fail in turn; there are `at_least` so many of them.
/// `make()` gives a std::unique_ptr to an engine (Layers, or what is like it), whose passes are to
/// have the `expected` bytes; `table` is their routing.
template <class Make>
void survive_every_fault(Fault kind, int at_least, const std::vector<std::byte>& expected,
                         const HashTable& table, Make&& make) {
  using Engine = typename decltype(make())::element_type;
  int number = 0;
  for (bool struck = true; struck; ++number) {
    INFO("operation " << number << " of its kind fails");
    Faults::arm(kind, number);
    FaultyRun<Engine>(kind, expected, table).run(make);
    struck = Faults::struck();
    Faults::disarm();
  }
  CHECK(number > at_least);
}

}  // namespace sida::test
