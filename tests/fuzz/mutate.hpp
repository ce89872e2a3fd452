// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <string_view>

namespace fuzz {

/// Makes damaged copies of a valid file, the same ones for the same seed. Besides bytes it damages
/// what readers look at: numbers become extreme, quoted names are swapped, pieces are cut out,
/// doubled or nested.
class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {}

  std::string operator()(const std::string& valid) {
    std::string text = valid;
    for (std::size_t i = 0, times = 1 + below(3); i < times && !text.empty(); ++i) damage(text);
    return text;
  }

 private:
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }

  // Most of a file is data that no reader checks: damage the first bytes, where the header is, more
  // often.
  std::size_t position(const std::string& text) {
    const std::size_t head = std::min<std::size_t>(text.size(), 8 + 2048);
    return below(3) ? below(head) : below(text.size());
  }

  void damage(std::string& text) {
    const std::size_t at = position(text);
    switch (below(8)) {
      case 0:
        text[at] = static_cast<char>(random_());
        break;
      case 1:
        text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 2:
        text.resize(at);
        break;
      case 3:
        text.erase(at, 1 + below(16));
        break;
      case 4:
        text.insert(at, text.substr(at, 1 + below(64)));
        break;
      case 5:
        replace_number(text, at);
        break;
      case 6:
        text.insert(at, std::string(1 + below(2000), "[{\""[below(3)]));
        break;
      case 7:
        set_length(text);
        break;
    }
  }

  void replace_number(std::string& text, std::size_t at) {
    static constexpr const char* extremes[] = {"-1",
                                               "0",
                                               "1",
                                               "7",
                                               "4294967296",
                                               "9223372036854775807",
                                               "18446744073709551615",
                                               "-9223372036854775808",
                                               "1e308",
                                               "1e999",
                                               "0.5",
                                               "null",
                                               "\"\"",
                                               "[]"};
    constexpr std::string_view digits = "0123456789";
    const std::size_t begin = text.find_first_of(digits, at);
    if (begin == text.npos) return;
    const std::size_t end = std::min(text.find_first_not_of(digits, begin), text.size());
    text.replace(begin, end - begin, extremes[below(std::size(extremes))]);
  }

  // The first eight bytes of a safetensors file are the length of its header.
  void set_length(std::string& text) {
    if (text.size() < 8) return;
    std::uint64_t length = 0;
    std::memcpy(&length, text.data(), sizeof length);
    const std::uint64_t candidates[] = {
        0, 1, length - 1, length + 1, text.size(), ~std::uint64_t{0}, length * 2, 1ull << 63};
    length = candidates[below(std::size(candidates))];
    std::memcpy(text.data(), &length, sizeof length);
  }

  std::mt19937_64 random_;
};

}  // namespace fuzz
