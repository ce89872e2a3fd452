// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "sida/cache/cache_stats.hpp"
#include "sida/cache/expert_cache.hpp"
#include "sida/core/expert_id.hpp"
#include "sida/schedule/offload_plan.hpp"

namespace sida {

/// An expert that a router chose for some token.
struct RouterChoice {
  std::int32_t expert = 0;
  std::int32_t rank = 0;  ///< 0: its first choice; the best one among the tokens
};

/// One layer of one pass; see UseForecast for steps.
struct LayerStep {
  std::int32_t layer = -1;
  std::int64_t step = -1;

  friend bool operator==(const LayerStep&, const LayerStep&) = default;
};

/// Prediction without training: what the next layer's router chooses on the input of the layer at
/// hand, since hidden states change little from layer to layer.
///
/// A guess is as probable as guesses of its layer and rank were right so far of which a hash table
/// said as much, so that where the hidden states do change, or a table knows better, little is
/// brought in vain. It may take the slot of an expert whose next
/// use is to be expected later than its own. Guarded by the cache's mutex.
template <class Cache>
class RouterLookAhead {
 public:
  /// Guesses that are less probable than `threshold` bring nothing early.
  RouterLookAhead(Cache& cache, double threshold)
      : cache_(cache),
        threshold_(threshold),
        records_(static_cast<std::size_t>(cache.store().layers())),
        is_needed_(static_cast<std::size_t>(cache.store().experts())) {}

  /// The layer at `next` is expected to need these experts, each named once. What was foretold
  /// before is forgotten. @throws OutOfRange before anything is changed.
  void foretell(LayerStep next, std::span<const RouterChoice> choices) {
    for (const RouterChoice& choice : choices)
      cache_.residency_locked({next.layer, choice.expert});  // throws
    forget();
    next_ = next;
    for (const RouterChoice& choice : choices) {
      const ExpertId id{next.layer, choice.expert};
      const auto level = level_of(cache_.forecast().probability_at(id, next.step));
      const double probability = record(next.layer, choice.rank, level).precision();
      guesses_.push_back({choice, level});
      if (probability < threshold_) continue;
      cache_.forecast().add_guess(id, next.step, probability);
      uses_.push_back({next.step, id, static_cast<float>(probability)});
    }
    const auto surer = [](const PlannedUse& a, const PlannedUse& b) {
      return a.probability > b.probability;
    };
    std::stable_sort(uses_.begin(), uses_.end(), surer);
  }

  /// A layer begins and needs `experts`; `counted` is as in LayerNeeds::ask. Returns how right the
  /// guesses for it were, if there were any.
  LookAheadStats begin_layer(LayerStep begun, std::span<const std::int32_t> experts,
                             std::span<const std::uint8_t> counted) {
    LookAheadStats stats;
    if (begun == next_) {
      std::fill(is_needed_.begin(), is_needed_.end(), std::uint8_t{0});
      for (std::size_t i = 0; i < experts.size(); ++i) {
        const bool counts = counted.empty() || counted[i] != 0;
        is_needed_[static_cast<std::size_t>(experts[i])] = counts;
        stats.uses += counts;
      }
      for (const auto& [choice, level] : guesses_) {
        const bool is_right = is_needed_[static_cast<std::size_t>(choice.expert)] != 0;
        record(begun.layer, choice.rank, level).add(is_right);
        stats.foretold_uses += is_right;
      }
      stats.foretold = std::ssize(guesses_);
    }
    forget();
    return stats;
  }

  /// What was foretold is no longer to be expected.
  void forget() noexcept {
    next_ = {};
    guesses_.clear();
    uses_.clear();
  }

  /// Whether some expert that is to be brought early is absent.
  bool has_work() const {
    return std::ranges::any_of(uses_, [&](const PlannedUse& use) {
      return cache_.residency_locked(use.id) == Cache::Residency::absent;
    });
  }

  /// Whether the expert is to be brought early.
  bool names(ExpertId id) const {
    return std::ranges::any_of(uses_, [&](const PlannedUse& use) { return use.id == id; });
  }

  /// A load of the expert failed: it is not brought early.
  void give_up(ExpertId id) {
    std::erase_if(uses_, [&](const PlannedUse& use) { return use.id == id; });
  }

  /// A slot for the first expert that is foretold and absent, or nothing if none can be had for it.
  std::optional<typename Cache::Loading> reserve_next() {
    for (const PlannedUse& use : uses_) {
      if (cache_.residency_locked(use.id) != Cache::Residency::absent) continue;
      const double expected = cache_.forecast().expected_use(use.id);
      return cache_.reserve_locked(use.id, [&](ExpertId victim) {
        return cache_.forecast().expected_use(victim) > expected;
      });
    }
    return std::nullopt;
  }

 private:
  /// A choice, and how probable a hash table takes it to be.
  struct Guess {
    RouterChoice choice;
    std::size_t level;
  };

  /// How often guesses of one layer, rank and level were right.
  class Record {
   public:
    void add(bool is_right) noexcept {
      guesses_ += 1;
      right_ += is_right;
      if (guesses_ < 512) return;
      guesses_ /= 2;  // old ones fade, so that it follows a change of topic
      right_ /= 2;
    }
    double precision() const noexcept { return (right_ + 1) / (guesses_ + 2); }

   private:
    double guesses_ = 0, right_ = 0;
  };

  /// What a table says is told apart in steps that hold enough guesses each: hardly, perhaps,
  /// surely.
  static constexpr std::array levels{0.1, 0.4};
  static std::size_t level_of(double probability) {
    return static_cast<std::size_t>(std::ranges::upper_bound(levels, probability) - levels.begin());
  }

  Record& record(std::int32_t layer, std::int32_t rank, std::size_t level) {
    auto& ranks = records_[static_cast<std::size_t>(layer)];
    const auto place = static_cast<std::size_t>(rank);
    if (place >= ranks.size()) ranks.resize(place + 1);
    return ranks[place][level];
  }

  Cache& cache_;
  double threshold_;
  std::vector<std::vector<std::array<Record, levels.size() + 1>>> records_;  // by layer and rank
  LayerStep next_;
  std::vector<Guess> guesses_;    // for that layer
  std::vector<PlannedUse> uses_;  // of these, the ones to be brought, surest first
  std::vector<std::uint8_t> is_needed_;
};

}  // namespace sida
