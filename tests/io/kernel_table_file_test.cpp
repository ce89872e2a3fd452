// SPDX-License-Identifier: Apache-2.0
#include "sida/io/kernel_table_file.hpp"

#include <filesystem>
#include <string>

#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;
using nlohmann::json;

namespace {

json good_table() {
  return json::parse(R"({"format": "sida-kernels", "gpu": "GPU 1", "sida": "1.2", "choices": [
      {"dtype": "bf16", "gated": true, "top_k": 8, "experts": 128, "hidden_size": 2048,
       "intermediate_size": 768, "tokens": 64, "kernel": "narrow", "gain_us": 1.5},
      {"dtype": "f32", "gated": false, "top_k": 1, "experts": 2, "hidden_size": 3,
       "intermediate_size": 4, "tokens": 5, "kernel": "dot"}]})");
}

}  // namespace

TEST_CASE("A table of kernels is read field by field, what it says beside them left out") {
  const TemporaryFolder folder;
  const sida::KernelTable table =
      sida::load_kernel_table(folder.write("kernels.json", good_table().dump()));
  CHECK(table == sida::KernelTable{"GPU 1",
                                   {{sida::DataType::bf16, true, 8, 128, 2048, 768, 64, "narrow"},
                                    {sida::DataType::f32, false, 1, 2, 3, 4, 5, "dot"}}});
}

TEST_CASE("A file that is no table of kernels is refused by file, entry and key") {
  const TemporaryFolder folder;
  struct Case {
    const char *key, *value;
  };
  for (const Case& bad :
       {Case{"format", "\"sida-predictor\""}, Case{"gpu", "3"}, Case{"choices", "{}"},
        Case{"/choices/1", "7"}, Case{"/choices/1/dtype", "\"i32\""}, Case{"/choices/1/gated", "1"},
        Case{"/choices/1/top_k", "0"}, Case{"/choices/1/experts", "-1"},
        Case{"/choices/1/hidden_size", "4294967296"}, Case{"/choices/1/intermediate_size", "2.5"},
        Case{"/choices/1/tokens", "\"5\""}, Case{"/choices/1/kernel", "null"}}) {
    json table = good_table();
    const std::string key(bad.key);
    table[json::json_pointer(key.starts_with('/') ? key : "/" + key)] = json::parse(bad.value);
    const auto path = folder.write("kernels.json", table.dump());
    INFO(bad.key << ": " << bad.value);
    CHECK_THROWS_AS(sida::load_kernel_table(path), sida::IoError);
    const std::string name = key.substr(key.rfind('/') + 1);
    CHECK_THROWS_WITH(sida::load_kernel_table(path),
                      ContainsSubstring(path.string()) && ContainsSubstring("sida tune") &&
                          ContainsSubstring(name == "1" ? "dtype" : name));
    if (key.starts_with('/'))
      CHECK_THROWS_WITH(sida::load_kernel_table(path), ContainsSubstring("entry 1"));
    if (key.starts_with("/choices/1/")) {
      table["choices"][1].erase(name);
      CHECK_THROWS_WITH(sida::load_kernel_table(folder.write("kernels.json", table.dump())),
                        ContainsSubstring("got nothing"));
    }
  }
  CHECK_THROWS_AS(sida::load_kernel_table(folder.write("kernels.json", "{")), sida::IoError);
  CHECK_THROWS_AS(sida::load_kernel_table(folder.write("kernels.json", "[]")), sida::IoError);
  CHECK_THROWS_AS(sida::load_kernel_table(folder / "none.json"), sida::IoError);
}
