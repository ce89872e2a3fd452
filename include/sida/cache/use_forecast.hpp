// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "sida/core/expert_id.hpp"

namespace sida {

/// What is known of future uses. Time is counted in steps: one step is one layer of one pass.
///
/// The scheduler writes it (uses foretold by hash tables, the needs of the layer at hand), eviction
/// and prefetching read it. Not thread-safe: guarded by the cache that holds it.
class UseForecast {
 public:
  using Step = std::int64_t;

  UseForecast(std::int32_t layers, std::int32_t experts)
      : layers_(layers),
        experts_(experts),
        steps_(static_cast<std::size_t>(layers) * static_cast<std::size_t>(experts)),
        uses_(steps_.size(), 0),
        passes_(static_cast<std::size_t>(layers), 0) {}

  /// The step of the layer at hand, or of the one that comes next.
  Step now() const noexcept { return now_; }

  /// The next step at which the expert is known to be used, `now()` included.
  std::optional<Step> next_use(ExpertId id) const noexcept {
    const std::deque<Step>& steps = steps_[index(id)];
    if (steps.empty()) return std::nullopt;
    return steps.front();
  }

  /// Time until the expert's next use: known, or else estimated from how often passes used it, and
  /// then beyond everything that is known. Comparable between experts.
  double expected_use(ExpertId id) const noexcept {
    if (const auto known = next_use(id)) return static_cast<double>(*known);
    const auto layer = static_cast<std::size_t>(id.layer);
    const double frequency =
        (static_cast<double>(uses_[index(id)]) + 0.5) / (static_cast<double>(passes_[layer]) + 1.0);
    const std::int32_t until = (id.layer - layer_ - 1 + 2 * layers_) % layers_;
    return static_cast<double>(std::max(horizon_, now_) + 1 + until) +
           layers_ * (1.0 / std::min(frequency, 1.0) - 1.0);
  }

  /// Foretells a use. Steps of one expert come in rising order.
  void add(ExpertId id, Step step) {
    steps_[index(id)].push_back(step);
    horizon_ = std::max(horizon_, step);
  }

  /// Begins the layer at step `step`: what was foretold for it gives way to `needed`.
  void begin_layer(std::int32_t layer, Step step, const std::vector<std::int32_t>& needed) {
    drop_before(layer, step + 1);
    now_ = step;
    layer_ = layer;
    ++passes_[static_cast<std::size_t>(layer)];
    for (const std::int32_t expert : needed) {
      steps_[index({layer, expert})].push_front(step);
      ++uses_[index({layer, expert})];
    }
  }

  /// The expert's rows of the layer at hand are done.
  void done(ExpertId id) noexcept {
    std::deque<Step>& steps = steps_[index(id)];
    if (!steps.empty() && steps.front() == now_) steps.pop_front();
  }

  /// Ends the layer at hand, or moves to a step ahead: what was foretold for before is dropped.
  void advance(Step step) {
    now_ = std::max(now_, step);
    for (std::int32_t layer = 0; layer < layers_; ++layer) drop_before(layer, now_);
  }

  /// Forgets all that was foretold; what was counted stays.
  void forget() {
    for (std::deque<Step>& steps : steps_) steps.clear();
    horizon_ = now_;
  }

 private:
  std::size_t index(ExpertId id) const noexcept {
    return static_cast<std::size_t>(id.layer) * static_cast<std::size_t>(experts_) +
           static_cast<std::size_t>(id.expert);
  }
  void drop_before(std::int32_t layer, Step step) {
    for (std::int32_t expert = 0; expert < experts_; ++expert) {
      std::deque<Step>& steps = steps_[index({layer, expert})];
      while (!steps.empty() && steps.front() < step) steps.pop_front();
    }
  }

  std::int32_t layers_, experts_;
  std::vector<std::deque<Step>> steps_;
  std::vector<std::int64_t> uses_;    // of each expert
  std::vector<std::int64_t> passes_;  // through each layer
  Step now_ = 0, horizon_ = 0;
  std::int32_t layer_ = 0;
};

}  // namespace sida
