// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iterator>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "sida/core/error.hpp"
#include "support/copied_store.hpp"
#include "support/layers.hpp"

namespace sida::test {

using Random = std::mt19937;

/// An integer from `least` to `most`.
inline int between(Random& random, int least, int most) {
  return least + static_cast<int>(random() % static_cast<std::uint32_t>(most - least + 1));
}

inline MoeConfig random_config(Random& random) {
  MoeConfig config;
  config.layers = between(random, 1, 4);
  config.experts = between(random, 1, 12);
  config.hidden_size = between(random, 1, 80);
  config.intermediate_size = between(random, 1, 80);
  config.top_k = between(random, 1, std::min(config.experts, 4));
  config.gated = random() % 2;
  config.up_bias = random() % 2;
  config.down_bias = random() % 2;
  config.activation = std::array{Activation::relu, Activation::relu2, Activation::gelu,
                                 Activation::gelu_tanh, Activation::silu}[random() % 5];
  config.dtype = std::array{DataType::f32, DataType::f16, DataType::bf16}[random() % 3];
  return config;
}

/// A store that is slow at times, and fails once where it was told to.
class RoughStore : public CopiedStore {
 public:
  using CopiedStore::CopiedStore;
  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    const std::uint32_t now = reads_++;
    if (now % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(now % 200));
    if (fails_.exchange(false)) throw IoError("a read that was to fail");
    CopiedStore::read(id, offset, destination);
  }
  void fail_once() { fails_ = true; }
  void repair() { fails_ = false; }

 private:
  std::atomic<std::uint32_t> reads_ = 0;
  std::atomic<bool> fails_ = false;
};

/// What a model's pass gives with all experts resident, and tables that foretell it, the first of
/// them rightly.
struct Truth {
  std::vector<std::byte> bytes;
  std::vector<HashTable> tables;
};

template <class Place>
Truth truth_of(const Model& model) {
  auto whole = Place::template make<LruPolicy>(model, model.store, Budget::fraction(1), {}, 0);
  Truth truth{whole->pass(), {}};
  truth.tables.push_back(whole->scheduler->recorded());
  for (const int shift : {1, 3}) {
    truth.tables.push_back(truth.tables[0]);
    for (std::int32_t& id : truth.tables.back().ids)
      if (id >= 0) id = (id + shift) % model.config.experts;
  }
  return truth;
}

/// One handle on a model: random calls on one thread, each of which has to give the truth, but for
/// those that were made to fail.
template <class Place, EvictionPolicy Policy>
class Handle {
 public:
  Handle(const Model& model, const Truth& truth, std::uint32_t seed)
      : model_(model),
        truth_(truth),
        random_(seed),
        store_(std::make_shared<RoughStore>(model.store)) {
    SchedulerOptions options;
    options.transfers.threads = between(random_, 1, 3);
    options.transfers.chunk_bytes = draw() % 2 ? 1000 : std::size_t{1} << 20;
    engine_ = Place::template make<Policy>(model_, store_, random_budget(), options, draw());
  }

  /// @returns the passes that were right. @throws std::exception for one that was not.
  int run() {
    const int calls = between(random_, 3, 12);
    for (int call = 0; call < calls; ++call) {
      Place::change_stream(*engine_, random_);
      switch (draw() % 7) {
        case 0:
          expect_truth("a pass", [&] { return engine_->pass(); });
          break;
        case 1:
          expect_truth("a foretold pass", [&] { return engine_->pass(random_table()); });
          break;
        case 2:
          expect_truth("a predicted pass", [&] { return predicted(); });
          break;
        case 3:
          tables_ahead();
          break;
        case 4:
          engine_->scheduler->resize(random_budget());
          break;
        case 5:
          failing_read();
          break;
        case 6:
          if (draw() % 3 == 0) return closed_meanwhile();
      }
    }
    check_counts();
    return right_;
  }

 private:
  std::uint32_t draw() { return static_cast<std::uint32_t>(random_()); }
  Budget random_budget() {
    return Budget::experts(between(random_, 1, model_.config.layers * model_.config.experts));
  }
  const HashTable& random_table() { return truth_.tables[draw() % truth_.tables.size()]; }

  template <class Pass>
  void expect_truth(const char* what, Pass&& pass) {
    if (pass() != truth_.bytes) throw std::runtime_error(std::string(what) + " gave other bits");
    ++right_;
  }
  std::vector<std::byte> predicted() {
    engine_->scheduler->begin_pass(truth_.tables[0], 0, {});
    return outputs_of_pass(*engine_,
                           [&](std::size_t layer) { return engine_->forward_predicted(layer); });
  }
  /// Batches whose tables are built ahead; at times given up before they are used up.
  void tables_ahead() {
    const int batches = between(random_, 1, 4), used = between(random_, 0, batches);
    engine_->scheduler->start(
        [this, batches, built = 0, first = draw()]() mutable -> std::optional<HashTable> {
          if (built == batches) return std::nullopt;
          return truth_
              .tables[(first + static_cast<std::uint32_t>(built++)) % truth_.tables.size()];
        },
        1 + draw() % 4);
    for (int batch = 0; batch < used; ++batch) {
      if (!engine_->scheduler->next_batch()) throw std::runtime_error("a batch is missing");
      expect_truth("a batch", [&] { return engine_->rest_of_pass(); });
    }
    engine_->scheduler->stop();
  }
  void failing_read() {
    store_->fail_once();
    try {
      expect_truth("a pass beside a failing read", [&] { return engine_->pass(); });
    } catch (const IoError&) {
    }
    store_->repair();
    expect_truth("the pass behind a failing read", [&] { return engine_->pass(); });
  }
  /// Another thread closes the handle while it computes: what comes later says so.
  int closed_meanwhile() {
    std::jthread closer([this, wait = draw() % 300] {
      std::this_thread::sleep_for(std::chrono::microseconds(wait));
      engine_->scheduler->close();
    });
    try {
      for (;;) expect_truth("a pass before the end", [&] { return engine_->pass(random_table()); });
    } catch (const StateError&) {
    }
    return right_;
  }
  void check_counts() {
    const auto total = engine_->scheduler->stats().total;
    if (total.hits + total.late + total.misses != total.uses)
      throw std::runtime_error("hits, late ones and misses do not add up to uses");
    if (engine_->cache.resident().size() > static_cast<std::size_t>(engine_->cache.slots()))
      throw std::runtime_error("more experts are resident than there are slots");
  }

  const Model& model_;
  const Truth& truth_;
  Random random_;
  std::shared_ptr<RoughStore> store_;
  std::unique_ptr<typename Place::template Engine<Policy>> engine_;
  int right_ = 0;
};

template <class Place>
int run_handle(const Model& model, const Truth& truth, std::uint32_t seed) {
  switch (seed % 4) {
    case 0:
      return Handle<Place, FifoPolicy>(model, truth, seed).run();
    case 1:
      return Handle<Place, LruPolicy>(model, truth, seed).run();
    case 2:
      return Handle<Place, LfuPolicy>(model, truth, seed).run();
    default:
      return Handle<Place, LookAheadPolicy>(model, truth, seed).run();
  }
}

/// One round: a model that the seed decides, and one to three handles on it at once.
/// @returns the passes that were right. @throws std::exception for the first that was not.
template <class Place>
int run_round(std::uint32_t seed) {
  Random random(seed);
  const Model model(random_config(random));
  const Truth truth = truth_of<Place>(model);
  std::atomic<int> right = 0;
  std::mutex mutex;
  std::exception_ptr error;
  {
    std::vector<std::jthread> handles;
    for (int handle = between(random, 1, 3); handle > 0; --handle)
      handles.emplace_back([&, its_seed = static_cast<std::uint32_t>(random())] {
        try {
          right += run_handle<Place>(model, truth, its_seed);
        } catch (...) {
          const std::lock_guard lock(mutex);
          error = std::current_exception();
        }
      });
  }
  if (error) std::rethrow_exception(error);
  return right;
}

/// Ends the process, with the seed, where a round does not come to its end.
class Watchdog {
 public:
  explicit Watchdog(std::chrono::seconds patience) : patience_(patience) {}

  void begin(std::uint32_t seed) {
    const std::lock_guard lock(mutex_);
    seed_ = seed;
    ++rounds_;
    changed_.notify_all();
  }

 private:
  void watch(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
      const auto before = rounds_;
      if (changed_.wait_for(lock, stop, patience_, [&] { return rounds_ != before; })) continue;
      if (stop.stop_requested()) return;
      std::fprintf(stderr, "soak: seed %u hangs; again: --first-seed %u --rounds 1\n", seed_,
                   seed_);
      std::_Exit(3);
    }
  }

  std::chrono::seconds patience_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::uint32_t seed_ = 0;
  std::uint64_t rounds_ = 0;
  std::jthread thread_{[this](const std::stop_token& stop) { watch(stop); }};
};

/// What a process holds; after a round as much as before.
struct Held {
  std::ptrdiff_t threads = 0, files = 0;
  std::ptrdiff_t bytes = 0;         ///< of RAM
  std::ptrdiff_t device_bytes = 0;  ///< of the device's memory, 0 where that is RAM
};

inline std::ptrdiff_t entries_of(const char* folder) {
  return std::distance(std::filesystem::directory_iterator(folder), {});
}

}  // namespace sida::test
