// SPDX-License-Identifier: Apache-2.0
#include "sida/io/config_json.hpp"

#include "support/catch.hpp"

using Catch::Matchers::ContainsSubstring;
using nlohmann::json;
using sida::MoeConfig;

TEST_CASE("A MoeConfig is written to JSON field by field and comes back as it was") {
  const MoeConfig config{.layers = 4,
                         .experts = 32,
                         .hidden_size = 128,
                         .intermediate_size = 256,
                         .top_k = 2,
                         .activation = sida::Activation::gelu_tanh,
                         .gated = true,
                         .up_bias = true,
                         .down_bias = false,
                         .dtype = sida::DataType::bf16,
                         .limit = 10.5f};
  const json expected = json::parse(R"({"layers":4,"experts":32,"hidden_size":128,
      "intermediate_size":256,"top_k":2,"activation":"gelu_tanh","gated":true,"up_bias":true,
      "down_bias":false,"dtype":"bf16","limit":10.5})");
  CHECK(sida::to_json(config) == expected);
  CHECK(sida::moe_config_from_json(expected) == config);
}

TEST_CASE("JSON that is no MoeConfig is refused by the key") {
  const char* good = R"({"layers":1,"experts":2,"hidden_size":3,"intermediate_size":4})";
  CHECK(sida::moe_config_from_json(json::parse(good)).top_k == 1);
  struct Case {
    const char *key, *value;
  };
  for (const Case& bad :
       {Case{"layers", "0"}, Case{"layers", "-1"}, Case{"experts", "2.0"},
        Case{"hidden_size", "4294967296"}, Case{"gated", "1"}, Case{"activation", "\"tanh\""},
        Case{"activation", "3"}, Case{"dtype", "\"i32\""}, Case{"top_k", "3"}, Case{"limit", "0"},
        Case{"limit", "\"7\""}, Case{"d_model", "3"}}) {
    json config = json::parse(good);
    config[bad.key] = json::parse(bad.value);
    INFO(bad.key << ": " << bad.value);
    CHECK_THROWS_AS(sida::moe_config_from_json(config), sida::InvalidArgument);
    CHECK_THROWS_WITH(sida::moe_config_from_json(config), ContainsSubstring(bad.key));
  }
  CHECK_THROWS_AS(sida::moe_config_from_json(json::array()), sida::InvalidArgument);
}
