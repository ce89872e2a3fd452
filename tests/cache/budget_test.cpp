// SPDX-License-Identifier: Apache-2.0
#include "sida/cache/budget.hpp"

#include <cmath>
#include <limits>
#include <string>

#include "support/catch.hpp"

using namespace sida;

namespace {

// Of a model with 100 experts of 1000 bytes.
std::int64_t slots(const Budget& budget, std::size_t staging = 0) {
  return budget.slots(100, 1000, staging);
}
std::string refusal(const Budget& budget, std::size_t staging = 0) {
  try {
    slots(budget, staging);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}
bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("Text is read as bytes, shares or counts", "[budget]") {
  struct Case {
    const char* text;
    std::int64_t slots;
  };
  for (const auto& [text, expected] :
       {Case{"1000 B", 1},      Case{"2500 bytes", 2}, Case{"3kB", 3},
        Case{"3 KB", 3},        Case{"3KiB", 3},       Case{"0.05 MB", 50},
        Case{"0.05MiB", 52},    Case{"1 MB", 100},     Case{"2GiB", 100},
        Case{"1e-1 TB", 100},   Case{"0.2", 20},       Case{"0.29", 29},
        Case{"1.0", 100},       Case{"20%", 20},       Case{" 20 % ", 20},
        Case{"100%", 100},      Case{"0.999", 99},     Case{"1 expert", 1},
        Case{"12 experts", 12}, Case{"12Experts", 12}, Case{"1000 experts", 100}}) {
    CAPTURE(text);
    CHECK(slots(Budget::parse(text)) == expected);
  }
}

TEST_CASE("Text that is no budget is refused with examples of what is", "[budget]") {
  for (const char* text : {"", " ", "much", "2 GiBs", "GiB", "12", "1", "0x10", "1.5 experts",
                           "1,5 GB", "12 expert s", "99999999999 GiB", "1e300 experts", "% 20"}) {
    CAPTURE(text);
    CHECK_THROWS_AS(Budget::parse(text), InvalidArgument);
    CHECK_THROWS_WITH(Budget::parse(text), Catch::Matchers::ContainsSubstring("2GiB") &&
                                               Catch::Matchers::ContainsSubstring("12 experts"));
  }
}

TEST_CASE("Fractions and counts buy slots, bytes pay for staging too", "[budget]") {
  CHECK(slots(Budget::fraction(0.2)) == 20);
  CHECK(slots(Budget::fraction(0.01)) == 1);
  CHECK(slots(Budget::fraction(0.2), 5000) == 20);
  CHECK(slots(Budget::experts(7), 5000) == 7);
  CHECK(slots(Budget::bytes(7999)) == 7);
  CHECK(slots(Budget::bytes(7999), 1000) == 6);
  CHECK(slots(Budget::bytes(2000), 1000) == 1);
}

TEST_CASE("Every fraction of n experts that is k/n buys k", "[budget]") {
  for (std::int64_t total = 1; total < 200; ++total)
    for (std::int64_t k = 1; k <= total; ++k)
      REQUIRE(Budget::fraction(static_cast<double>(k) / static_cast<double>(total))
                  .slots(total, 8, 0) == k);
}

TEST_CASE("A budget above all experts is cut to all", "[budget]") {
  CHECK(slots(Budget::bytes(std::numeric_limits<std::int64_t>::max())) == 100);
  CHECK(slots(Budget::fraction(1e300)) == 100);
  CHECK(slots(Budget::experts(std::numeric_limits<std::int64_t>::max())) == 100);
}

TEST_CASE("A budget without a slot is refused, naming the smallest valid one", "[budget]") {
  CHECK(contains(refusal(Budget::bytes(999)), "1000 bytes"));
  CHECK(contains(refusal(Budget::bytes(1999), 1000), "2000 bytes"));
  CHECK(contains(refusal(Budget::bytes(0)), "1000 bytes"));
  CHECK(contains(refusal(Budget::bytes(-5)), "1000 bytes"));
  CHECK(contains(refusal(Budget::bytes(-5)), "-5 bytes"));
  for (const double fraction :
       {0.0, -0.5, 0.009, 1e-300, std::nan(""), std::numeric_limits<double>::infinity(),
        -std::numeric_limits<double>::infinity()}) {
    CAPTURE(fraction);
    CHECK(contains(refusal(Budget::fraction(fraction)), "0.01 (1 of 100 experts)"));
  }
  for (const std::int64_t count : {std::int64_t{0}, std::int64_t{-3}})
    CHECK(contains(refusal(Budget::experts(count)), "\"1 expert\""));
}

TEST_CASE("One byte is told about 1.0 and \"1 expert\"", "[budget]") {
  const std::string message = refusal(Budget::bytes(1));
  CHECK(contains(message, "1.0"));
  CHECK(contains(message, "\"1 expert\""));
}
