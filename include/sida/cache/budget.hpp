// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "sida/core/error.hpp"

namespace sida {

/// How much fast memory experts may take: bytes, a fraction of all experts, or a count over all
/// layers. A budget above all experts is cut to all.
class Budget {
 public:
  /// Pays for slots and for a store's staging buffer. @throws InvalidArgument for 0.
  static Budget bytes(std::uint64_t bytes) {
    SIDA_EXPECTS(bytes > 0, "memory: expected more than 0 bytes, got 0");
    return {Kind::bytes, static_cast<double>(bytes), bytes};
  }
  /// Buys slots for this share of all experts, rounded down. @throws InvalidArgument unless > 0.
  static Budget fraction(double fraction) {
    SIDA_EXPECTS(std::isfinite(fraction) && fraction > 0,
                 "memory: expected a fraction above 0 (1.0 is all experts), got " +
                     std::to_string(fraction));
    return {Kind::fraction, fraction, 0};
  }
  /// Buys this many slots. @throws InvalidArgument unless > 0.
  static Budget experts(std::int64_t count) {
    SIDA_EXPECTS(count > 0, "memory: expected \"1 expert\" or more, got " + std::to_string(count));
    return {Kind::experts, 0, static_cast<std::uint64_t>(count)};
  }

  /// Reads "2GiB", "512 MB", "100000 bytes", "20%", "0.2", "12 experts", "1 expert".
  /// @throws InvalidArgument for anything else.
  static Budget parse(std::string_view text) {
    const auto trim = [](std::string_view part) {
      while (!part.empty() && part.front() == ' ') part.remove_prefix(1);
      while (!part.empty() && part.back() == ' ') part.remove_suffix(1);
      return part;
    };
    const std::string_view whole = trim(text);
    double number = 0;
    const auto [end, error] = std::from_chars(whole.data(), whole.data() + whole.size(), number);
    SIDA_EXPECTS(error == std::errc() && std::isfinite(number), unreadable(text));
    std::string unit;
    for (const char c : trim(whole.substr(static_cast<std::size_t>(end - whole.data()))))
      unit += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    if (unit == "%") return fraction(number / 100);
    if (unit.empty()) {
      SIDA_EXPECTS(whole.find_first_of(".eE") != whole.npos, unreadable(text));
      return fraction(number);
    }
    if (unit == "expert" || unit == "experts") {
      SIDA_EXPECTS(number == std::floor(number) && std::abs(number) < 9e15, unreadable(text));
      return experts(static_cast<std::int64_t>(number));
    }
    const double size = number * bytes_of(unit, text);
    SIDA_EXPECTS(size >= 1 && size < 9.2e18, unreadable(text));
    return bytes(static_cast<std::uint64_t>(size));
  }

  /// Slots that the budget buys of a model with `total_experts` slabs of `slab_bytes`, at least 1
  /// and at most all. @throws InvalidArgument naming the smallest valid budget.
  std::int64_t slots(std::int64_t total_experts, std::size_t slab_bytes,
                     std::size_t staging_bytes) const {
    std::int64_t count = 0;
    switch (kind_) {
      case Kind::bytes:
        count = amount_ <= staging_bytes ? 0
                                         : static_cast<std::int64_t>(std::min<std::uint64_t>(
                                               (amount_ - staging_bytes) / slab_bytes,
                                               static_cast<std::uint64_t>(total_experts)));
        SIDA_EXPECTS(count > 0, "memory: one expert takes " +
                                    std::to_string(slab_bytes + staging_bytes) +
                                    " bytes, the smallest budget in bytes; got " + describe() +
                                    (amount_ == 1 ? ". Did you mean 1.0 (all experts) or \"1 "
                                                    "expert\"?"
                                                  : ", or ask for \"1 expert\""));
        return count;
      case Kind::fraction:
        count =
            fraction_ >= 1
                ? total_experts
                : static_cast<std::int64_t>(fraction_ * static_cast<double>(total_experts) + 1e-9);
        SIDA_EXPECTS(count > 0, "memory: " + describe() + " of " + std::to_string(total_experts) +
                                    " experts is less than one; expected " +
                                    std::to_string(1.0 / static_cast<double>(total_experts)) +
                                    " or more, or \"1 expert\"");
        return count;
      case Kind::experts:
        return static_cast<std::int64_t>(
            std::min<std::uint64_t>(amount_, static_cast<std::uint64_t>(total_experts)));
    }
    return count;
  }

  std::string describe() const {
    switch (kind_) {
      case Kind::bytes:
        return std::to_string(amount_) + (amount_ == 1 ? " byte" : " bytes");
      case Kind::fraction:
        return std::to_string(fraction_);
      case Kind::experts:
        return std::to_string(amount_) + (amount_ == 1 ? " expert" : " experts");
    }
    return {};
  }

 private:
  enum class Kind { bytes, fraction, experts };

  Budget(Kind kind, double fraction, std::uint64_t amount)
      : kind_(kind), fraction_(fraction), amount_(amount) {}

  static std::string unreadable(std::string_view text) {
    return "memory: expected bytes (\"2GiB\"), a share (\"20%\", \"0.2\") or a count (\"12 "
           "experts\"), got \"" +
           std::string(text) + "\"";
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
    throw InvalidArgument(unreadable(text));
  }

  Kind kind_;
  double fraction_;
  std::uint64_t amount_;
};

}  // namespace sida
