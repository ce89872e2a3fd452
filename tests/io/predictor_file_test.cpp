// SPDX-License-Identifier: Apache-2.0
#include "sida/io/predictor_file.hpp"

#include <map>
#include <string>

#include "io/raw_safetensors.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;

namespace {

using Metadata = std::map<std::string, std::string>;

Metadata good_metadata() {
  return {{"format", "sida-predictor"},
          {"version", "1"},
          {"kind", "lstm"},
          {"layers", "4"},
          {"heads", "0,3,1"},
          {"experts", "8"},
          {"embedding_size", "3"},
          {"hidden_size", "5"},
          {"scale_factor", "0.125"},
          {"fingerprint", "ab12"}};
}

std::string predictor_bytes(const Metadata& metadata, const char* dtype = "F32") {
  std::string text;
  for (const auto& [key, value] : metadata)
    text += (text.empty() ? "\"" : ",\"") + key + "\":\"" + value + "\"";
  return RawSafetensors()
      .add("fc.weight", dtype, "[2,3]", std::vector<float>{1, 2, 3, 4, 5, 6})
      .add("fc.bias", "F32", "[2]", std::vector<float>{-1, -2})
      .bytes(text);
}

}  // namespace

TEST_CASE("A predictor file gives architecture, fingerprint and every tensor") {
  const TemporaryFolder folder;
  const auto weights =
      sida::load_predictor(folder.write("predictor", predictor_bytes(good_metadata())));
  CHECK(weights.kind == "lstm");
  CHECK(weights.layers == 4);
  CHECK(weights.heads == std::vector<std::int32_t>{0, 3, 1});
  CHECK(weights.experts == 8);
  CHECK(weights.embedding_size == 3);
  CHECK(weights.hidden_size == 5);
  CHECK(weights.scale_factor == 0.125f);
  CHECK(weights.fingerprint == "ab12");
  REQUIRE(weights.tensors.size() == 2);
  CHECK(weights.tensors.at("fc.weight").shape == std::vector<std::int64_t>{2, 3});
  CHECK(weights.tensors.at("fc.weight").values == std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(weights.tensors.at("fc.bias").values == std::vector<float>{-1, -2});
}

TEST_CASE("A file that is no predictor is refused by what is wrong with it") {
  const TemporaryFolder folder;
  const auto check_refused = [&](const std::string& key, const std::string& value) {
    Metadata metadata = good_metadata();
    if (value == "-") {
      metadata.erase(key);
    } else {
      metadata[key] = value;
    }
    const auto path = folder.write("bad", predictor_bytes(metadata));
    INFO(key << " = " << value);
    CHECK_THROWS_AS(sida::load_predictor(path), sida::IoError);
    CHECK_THROWS_WITH(sida::load_predictor(path), ContainsSubstring(key));
  };
  check_refused("format", "sida-hash-table");
  check_refused("version", "2");
  for (const auto& [key, value] : good_metadata()) check_refused(key, "-");
  for (const char* heads : {"", "4", "-1", "0,", "0,,1", "a", "0, 1", "99999999999"})
    check_refused("heads", heads);
  for (const char* layers : {"0", "-4", "4.0", "4x", "99999999999"})
    check_refused("layers", layers);
  for (const char* factor : {"nan", "inf", "-1", "x"}) check_refused("scale_factor", factor);
  const auto path = folder.write("bad", predictor_bytes(good_metadata(), "I32"));
  CHECK_THROWS_WITH(sida::load_predictor(path),
                    ContainsSubstring("fc.weight") && ContainsSubstring("F32"));
}
