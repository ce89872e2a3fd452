// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "sida/hash/hash_predictor_cpu.hpp"
#include "sida/io/predictor_file.hpp"
#include "support/catch.hpp"

// Predictors that PyTorch trained, and what PyTorch says that they foretell; made by
// tests/data/make_predictor_fixture.py.
TEST_CASE("Predictors trained in PyTorch foretell the same in C++") {
  for (const std::string kind : {"lstm", "causal_lstm", "transformer", "token"}) {
    CAPTURE(kind);
    const std::string path = std::string(SIDA_TEST_DATA) + "/predictor_" + kind;
    const sida::HashPredictor<sida::CpuBackend> predictor(
        sida::load_predictor(path + ".safetensors"));
    const auto expected = sida::SafetensorsFile::open(path + "_expected.safetensors");
    const auto embeddings = sida::read_values<float>(expected, "embeddings");
    const auto tokens = sida::read_values<std::int32_t>(expected, "mask");
    const std::vector<std::uint8_t> mask(tokens.begin(), tokens.end());
    const auto ids = sida::read_values<std::int32_t>(expected, "ids");
    const auto probs = sida::read_values<float>(expected, "probs");
    const auto scale = sida::read_values<float>(expected, "scale");

    const sida::HashTable table =
        predictor.predict({reinterpret_cast<const std::byte*>(embeddings.data()),
                           sida::DataType::f32, expected.tensor("embeddings").shape},
                          mask, 0, 4);

    REQUIRE(table.ids == ids);
    double worst = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      worst = std::max<double>(worst, std::abs(table.probs[i] - probs[i]));
      worst = std::max<double>(worst, std::abs(table.scale[i] - scale[i]));
    }
    CHECK(worst < 1e-5);
  }
}
