// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sida {

/// How often each expert is used: by its share of the passes, and by how long ago its last use was.
///
/// What time since the last use says is learned: the tokens of a text that is written one after the
/// other share experts, the batches of an encoder hardly do. For each number of passes since, and
/// each frequency, both in powers of two, uses are counted beside those that frequency alone would
/// have let expect. Guarded by the cache's mutex, like the forecast that it is part of.
class UseRates {
 public:
  explicit UseRates(std::size_t experts) : counts_(experts, 0.0), last_(experts, never) {}

  void begin_pass() {
    ++pass_;
    passes_ += 1;
    // Old passes fade, so that frequencies follow a change of topic.
    if (passes_ < 512) return;
    passes_ /= 2;
    for (double& count : counts_) count /= 2;
  }

  /// A layer uses `used`, out of its experts, which begin at index `first`.
  void begin_layer(std::size_t first, std::size_t experts, const std::vector<std::int32_t>& used) {
    for (std::size_t expert = first; expert < first + experts; ++expert)
      habit_of(expert).expected += frequency(expert);
    for (const std::int32_t expert : used) {
      const std::size_t index = first + static_cast<std::size_t>(expert);
      habit_of(index).uses += 1;
      last_[index] = pass_;
    }
    for (const std::int32_t expert : used) counts_[first + static_cast<std::size_t>(expert)] += 1;
    for (Habit& habit : habits_) habit.settle();
  }

  /// The share of passes that use the expert; never 0.
  double frequency(std::size_t expert) const noexcept {
    return std::min(1.0, (counts_[expert] + 0.5) / (passes_ + 1));
  }

  /// The probability that the expert is used when its layer is called in `passes` from now, 0 in
  /// the pass at hand, with no use before.
  double chance(std::size_t expert, std::int64_t passes) const noexcept {
    const Habit& habit = habits_[habit_index(expert, pass_ + passes)];
    return std::min(1.0, frequency(expert) * habit.factor);
  }

 private:
  struct Habit {
    double uses = 0, expected = 0;
    double factor = 1;
    // Old uses fade; what few say counts for little.
    void settle() noexcept {
      constexpr double doubt = 8;
      if (expected >= 1024) {
        uses /= 2;
        expected /= 2;
      }
      factor = (uses + doubt) / (expected + doubt);
    }
  };
  static constexpr std::int64_t never = -(std::int64_t{1} << 40);
  static constexpr int ages = 7, rates = 8;

  std::size_t habit_index(std::size_t expert, std::int64_t pass) const noexcept {
    const auto since = static_cast<std::uint64_t>(std::max<std::int64_t>(pass - last_[expert], 1));
    const int age = std::min(static_cast<int>(std::bit_width(since)), ages) - 1;
    const int rate = std::min(exponent(1 / frequency(expert)), rates - 1);
    return static_cast<std::size_t>(age * rates + rate);
  }
  // What std::ilogb says of a normal number, in an instruction or two: it is asked of every expert
  // among which a victim is looked for.
  static int exponent(double value) noexcept {
    return static_cast<int>(std::bit_cast<std::uint64_t>(value) >> 52 & 0x7ff) - 1023;
  }
  Habit& habit_of(std::size_t expert) noexcept { return habits_[habit_index(expert, pass_)]; }

  std::vector<double> counts_;
  std::vector<std::int64_t> last_;  // passes
  std::array<Habit, static_cast<std::size_t>(ages* rates)> habits_;
  std::int64_t pass_ = 0;
  double passes_ = 0;  // that counts_ are of
};

}  // namespace sida
