// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>

#include "sida/core/error.hpp"

namespace sida {

/// How much fast memory experts may take: bytes, a fraction of all experts, or a count over all
/// layers. A hard limit; a budget above all experts is cut to all.
///
/// Any value can be put into a budget; slots() refuses one that cannot be right, because only where
/// the model is known can the message name the smallest valid one.
class Budget {
 public:
  /// Pays for slots and for a store's staging buffer.
  static Budget bytes(std::int64_t bytes) { return {Kind::bytes, 0, bytes}; }
  /// Buys slots for this share of all experts, rounded down.
  static Budget fraction(double fraction) { return {Kind::fraction, fraction, 0}; }
  /// Buys this many slots.
  static Budget experts(std::int64_t count) { return {Kind::experts, 0, count}; }

  /// Reads "2GiB", "512 MB", "100000 bytes", "20%", "0.2", "12 experts", "1 expert".
  /// @throws InvalidArgument for anything else; a bare whole number could be bytes or a count.
  static Budget parse(std::string_view text) {
    const std::string_view whole = trim(text);
    double number = 0;
    const auto [end, error] = std::from_chars(whole.data(), whole.data() + whole.size(), number);
    if (error != std::errc()) throw unreadable(text);
    std::string unit;
    for (const char c : trim(whole.substr(static_cast<std::size_t>(end - whole.data()))))
      unit += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    if (unit == "%") return fraction(number / 100);
    if (unit.empty()) {
      if (std::isfinite(number) && whole.find_first_of(".eE") == whole.npos) throw unreadable(text);
      return fraction(number);
    }
    const bool is_count = unit == "expert" || unit == "experts";
    const double amount = is_count ? number : std::trunc(number * bytes_of(unit, text));
    if (!(std::abs(amount) < 9.2e18) || amount != std::trunc(amount)) throw unreadable(text);
    const auto rounded = static_cast<std::int64_t>(amount);
    return is_count ? experts(rounded) : bytes(rounded);
  }

  /// Slots that the budget buys of a model with `total_experts` slabs of `slab_bytes`, at least 1
  /// and at most all. @throws InvalidArgument naming the smallest valid budget.
  std::int64_t slots(std::int64_t total_experts, std::size_t slab_bytes,
                     std::size_t staging_bytes) const {
    const auto slab = static_cast<std::int64_t>(slab_bytes);
    const auto staging = static_cast<std::int64_t>(staging_bytes);
    const double share = fraction_ * static_cast<double>(total_experts);
    std::int64_t count = amount_;
    if (kind_ == Kind::bytes) count = amount_ > staging ? (amount_ - staging) / slab : 0;
    if (kind_ == Kind::fraction) {
      // The small term undoes the rounding of products such as 0.29 * 100. NaN buys nothing.
      const bool all = fraction_ >= 1 && std::isfinite(fraction_);
      count = all                                         ? total_experts
              : share < 1 - 1e-9 || !std::isfinite(share) ? 0
                                                          : static_cast<std::int64_t>(share + 1e-9);
    }
    if (count < 1) refuse(total_experts, slab, staging);
    return std::min(count, total_experts);
  }

  /// "2147483648 bytes", "0.2", "12 experts".
  std::string describe() const {
    if (kind_ == Kind::fraction) return brief(fraction_);
    const char* const unit = kind_ == Kind::bytes ? " byte" : " expert";
    return std::to_string(amount_) + unit + (amount_ == 1 ? "" : "s");
  }

 private:
  enum class Kind : std::uint8_t { bytes, fraction, experts };

  Budget(Kind kind, double fraction, std::int64_t amount)
      : kind_(kind), fraction_(fraction), amount_(amount) {}

  [[noreturn]] void refuse(std::int64_t total_experts, std::int64_t slab,
                           std::int64_t staging) const {
    std::string message =
        "memory: " + describe() + " holds no expert; the smallest valid value is ";
    if (kind_ == Kind::bytes) {
      message += std::to_string(slab + staging) + " bytes";
      if (staging > 0)
        message += " (an expert of " + std::to_string(slab) + " and a buffer of " +
                   std::to_string(staging) + ")";
      message += ", or \"1 expert\"";
      if (amount_ == 1) message += ". Did you mean 1.0 (all experts)?";
    } else if (kind_ == Kind::fraction) {
      message += brief(1.0 / static_cast<double>(total_experts)) + " (1 of " +
                 std::to_string(total_experts) + " experts), or \"1 expert\"; 1.0 is all of them";
    } else {
      message += "\"1 expert\", of " + std::to_string(total_experts);
    }
    throw InvalidArgument(message);
  }

  static std::string brief(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    return text;
  }
  static std::string_view trim(std::string_view part) {
    while (!part.empty() && part.front() == ' ') part.remove_prefix(1);
    while (!part.empty() && part.back() == ' ') part.remove_suffix(1);
    return part;
  }
  static InvalidArgument unreadable(std::string_view text) {
    return InvalidArgument(
        "memory: expected bytes (\"2GiB\"), a share (\"20%\", \"0.2\") or a count (\"12 "
        "experts\"), got \"" +
        std::string(text) + "\"");
  }
  static double bytes_of(const std::string& unit, std::string_view text) {
    static constexpr std::pair<const char*, double> units[] = {{"b", 1},
                                                               {"byte", 1},
                                                               {"bytes", 1},
                                                               {"kb", 1e3},
                                                               {"mb", 1e6},
                                                               {"gb", 1e9},
                                                               {"tb", 1e12},
                                                               {"kib", 1024.0},
                                                               {"mib", 1048576.0},
                                                               {"gib", 1073741824.0},
                                                               {"tib", 1099511627776.0}};
    for (const auto& [name, size] : units)
      if (unit == name) return size;
    throw unreadable(text);
  }

  Kind kind_;
  double fraction_;
  std::int64_t amount_;
};

}  // namespace sida
