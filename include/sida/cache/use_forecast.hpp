// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "sida/cache/use_rates.hpp"
#include "sida/core/expert_id.hpp"

namespace sida {

/// What is known of future uses. Time is counted in steps: one step is one layer of one pass, and
/// step s is of layer s mod layers.
///
/// The scheduler writes it (uses foretold by hash tables, the needs of the layer at hand), eviction
/// and prefetching read it. Not thread-safe: guarded by the cache that holds it.
class UseForecast {
 public:
  using Step = std::int64_t;

  UseForecast(std::int32_t layers, std::int32_t experts)
      : layers_(layers),
        experts_(experts),
        uses_(static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts)),
        rates_(uses_.size()),
        horizons_(static_cast<std::size_t>(layers), -1),
        unknown_(static_cast<std::size_t>(layers)) {}

  /// The step of the layer at hand, or of the one that comes next.
  Step now() const noexcept { return now_; }

  /// The next step at which a use of the expert is foretold with this probability or more, `now()`
  /// included.
  std::optional<Step> next_use(ExpertId id, double probability = 0) const noexcept {
    for (const Use& use : uses_[index(id)])
      if (use.step >= now_ && use.probability >= probability) return use.step;
    return std::nullopt;
  }

  /// The step by which the expert's next use is to be expected. Comparable between experts.
  ///
  /// A sure use is expected at its step. Before uses that are not sure, and without any, the
  /// harmonic mean of the distances counts, each with the probability that the use there is the
  /// next: a use that may well be near makes the expert worth keeping, however far the other is.
  double expected_use(ExpertId id) const noexcept {
    if (std::exchange(is_unknown_old_, false)) look_at_layers();
    return expected(id, now_ - 1, unknown_[static_cast<std::size_t>(id.layer)]);
  }

  /// The same for the first use after `step`.
  double expected_use_after(ExpertId id, Step step) const noexcept {
    return expected(id, step, unknown_after(id.layer, step));
  }

  /// How probable a use of the expert at `step` is as far as foretold.
  double probability_at(ExpertId id, Step step) const noexcept {
    for (const Use& use : uses_[index(id)])
      if (use.step == step) return use.probability;
    return 0;
  }

  /// Foretells a use, with the probability that it takes place.
  void add(ExpertId id, Step step, double probability = 1) {
    add_guess(id, step, probability);
    Step& horizon = horizons_[static_cast<std::size_t>(id.layer)];
    horizon = std::max(horizon, step);
    is_unknown_old_ = true;
  }

  /// The same, of a guess: it says nothing of the layer's experts that it does not name. Of what is
  /// foretold for one step, the surer counts.
  void add_guess(ExpertId id, Step step, double probability) {
    std::vector<Use>& uses = uses_[index(id)];
    const auto place = first_from(uses, step);
    if (place != uses.end() && place->step == step)
      place->probability = std::max(place->probability, probability);
    else
      uses.insert(place, {step, probability});
  }

  /// A pass begins whose first layer is step `step`, which may be one that was passed before. What
  /// was foretold for steps before is over.
  void begin_pass(Step step) {
    advance(step);
    first_ = step;
    rates_.begin_pass();
  }

  /// Begins the layer at step `step`: what was foretold for it gives way to `needed`.
  void begin_layer(std::int32_t layer, Step step, const std::vector<std::int32_t>& needed) {
    drop_before(layer, step + 1);
    now_ = begun_ = step;
    is_unknown_old_ = true;
    rates_.begin_layer(index({layer, 0}), static_cast<std::size_t>(experts_), needed);
    for (const std::int32_t expert : needed) {
      std::vector<Use>& uses = uses_[index({layer, expert})];
      uses.insert(uses.begin(), {step, 1});
    }
  }

  /// The expert's rows of the layer at hand are done.
  void done(ExpertId id) noexcept {
    std::vector<Use>& uses = uses_[index(id)];
    if (!uses.empty() && uses.front().step == now_) uses.erase(uses.begin());
  }

  /// Moves to a step: what was foretold for steps before is over.
  void advance(Step step) {
    now_ = step;
    begun_ = step - 1;
    is_unknown_old_ = true;
    for (std::int32_t layer = 0; layer < layers_; ++layer) drop_before(layer, now_);
  }

  /// Forgets what was foretold for `step` and later; what was counted stays.
  void forget_from(Step step) {
    for (std::vector<Use>& uses : uses_) uses.erase(first_from(uses, step), uses.end());
    for (Step& horizon : horizons_) horizon = std::min(horizon, step - 1);
    is_unknown_old_ = true;
  }

 private:
  struct Use {
    Step step;
    double probability;
  };

  std::size_t index(ExpertId id) const noexcept { return index_of(id, experts_); }
  /// What lies beyond everything that is known of a layer.
  struct Unknown {
    Step again = 0;        // the walk comes to the layer
    Step passes = 0;       // from the pass at hand
    bool is_next = false;  // no table tells of uses in between
  };

  double expected(ExpertId id, Step step, const Unknown& beyond) const noexcept {
    const auto before = static_cast<double>(now_ - 1);
    double none_yet = 1, nearness = 0;
    for (const Use& use : uses_[index(id)]) {
      if (use.step <= step) continue;
      if (none_yet == 1 && use.probability >= 1) return static_cast<double>(use.step);
      nearness += none_yet * use.probability / (static_cast<double>(use.step) - before);
      none_yet *= 1 - use.probability;
      if (none_yet < 1e-3) break;
    }
    const double unknown = unknown_use(id, beyond);
    if (none_yet == 1) return unknown;
    return before + 1 / (nearness + none_yet / (unknown - before));
  }
  // The walk comes to the layer, and then 1 / chance times until it is this expert. How long ago
  // the last use was counts only where no table tells of uses in between.
  double unknown_use(ExpertId id, const Unknown& beyond) const noexcept {
    const double chance =
        beyond.is_next ? rates_.chance(index(id), beyond.passes) : rates_.frequency(index(id));
    return static_cast<double>(beyond.again) + layers_ * (1 / chance - 1);
  }
  Unknown unknown_after(std::int32_t layer, Step step) const noexcept {
    const Step after = std::max({step, begun_, horizons_[static_cast<std::size_t>(layer)]});
    const Step again = after + 1 + ((layer - after - 1) % layers_ + layers_) % layers_;
    return {again, (again - first_) / layers_, after == begun_};
  }
  // Once for all the experts among which a victim is looked for.
  void look_at_layers() const noexcept {
    for (std::int32_t layer = 0; layer < layers_; ++layer)
      unknown_[static_cast<std::size_t>(layer)] = unknown_after(layer, now_ - 1);
  }
  static std::vector<Use>::iterator first_from(std::vector<Use>& uses, Step step) noexcept {
    return std::find_if(uses.begin(), uses.end(), [&](const Use& use) { return use.step >= step; });
  }
  void drop_before(std::int32_t layer, Step step) {
    for (std::int32_t expert = 0; expert < experts_; ++expert) {
      std::vector<Use>& uses = uses_[index({layer, expert})];
      uses.erase(uses.begin(), first_from(uses, step));
    }
  }

  std::int32_t layers_, experts_;
  std::vector<std::vector<Use>> uses_;  // foretold uses of each expert, ascending
  UseRates rates_;
  std::vector<Step> horizons_;            // the last step at which something is known of each layer
  mutable std::vector<Unknown> unknown_;  // of each layer, from now on
  mutable bool is_unknown_old_ = true;
  Step now_ = 0;
  Step first_ = 0;   // of the pass that began last
  Step begun_ = -1;  // the last step whose layer has begun
};

}  // namespace sida
