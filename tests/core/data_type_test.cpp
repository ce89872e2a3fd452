// SPDX-License-Identifier: Apache-2.0
#include "sida/core/data_type.hpp"

#include "sida/core/moe_config.hpp"
#include "support/catch.hpp"

TEST_CASE("A dtype's name leads back to the dtype") {
  for (const auto type : {sida::DataType::f32, sida::DataType::f16, sida::DataType::bf16,
                          sida::DataType::f64, sida::DataType::i32, sida::DataType::i64}) {
    CHECK(sida::parse_data_type(sida::name_of(type)) == type);
  }
  CHECK_THROWS_AS(sida::parse_data_type("float"), sida::InvalidArgument);
}

TEST_CASE("A config that cannot be right is refused by the field's name") {
  sida::MoeConfig config{.layers = 2, .experts = 4, .hidden_size = 8, .intermediate_size = 16};
  CHECK_NOTHROW(sida::validate(config));
  config.top_k = 5;
  CHECK_THROWS_WITH(sida::validate(config), Catch::Matchers::ContainsSubstring("top_k"));
  config.top_k = 1;
  config.hidden_size = 0;
  CHECK_THROWS_WITH(sida::validate(config), Catch::Matchers::ContainsSubstring("hidden_size"));
}
