// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/token_groups.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/random_weights.hpp"

namespace sida::test {
namespace {

Tensor tensor(std::vector<std::int64_t> shape, DataType type, const std::vector<double>& values) {
  Tensor result(std::move(shape), type);
  for (std::size_t i = 0; i < values.size(); ++i)
    result.set(static_cast<std::int64_t>(i), values[i]);
  return result;
}

using Ints = std::vector<std::int64_t>;

TEST_CASE("Assignments are grouped by expert, in token order within one", "[token_groups]") {
  const DataType ids_type = GENERATE(DataType::i32, DataType::i64);
  const DataType weights_type = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const Tensor ids = tensor({4, 2}, ids_type, {3, 1, 1, 3, 0, 0, 3, 5});
  const Tensor weights = tensor({4, 2}, weights_type, {1, .5, 1, .5, 1, .5, 1, .5});
  const TokenGroups groups = group_tokens(ids.view(), weights.view(), 6);
  CHECK(groups.tokens == 4);
  CHECK(groups.top_k == 2);
  CHECK(groups.rows() == 8);
  CHECK(groups.experts == std::vector<std::int32_t>{0, 1, 3, 5});
  CHECK(groups.offsets == Ints{0, 2, 4, 7, 8});
  CHECK(groups.order == Ints{4, 5, 1, 2, 0, 3, 6, 7});
  CHECK(groups.row_of == Ints{4, 2, 3, 5, 0, 1, 6, 7});
}

TEST_CASE("Weights of zero and tokens that are not kept are left out", "[token_groups]") {
  const Tensor ids = tensor({3, 2}, DataType::i64, {2, 1, -1, 99, 1, 2});
  const Tensor weights = tensor({3, 2}, DataType::f32, {1, -0.0, 1, 1, 1, 1});
  const std::vector<std::uint8_t> keep = {1, 0, 1};
  const TokenGroups groups = group_tokens(ids.view(), weights.view(), 3, keep);
  CHECK(groups.experts == std::vector<std::int32_t>{1, 2});
  CHECK(groups.offsets == Ints{0, 1, 3});
  CHECK(groups.order == Ints{4, 0, 5});
  CHECK(groups.row_of == Ints{1, -1, -1, -1, 0, 2});
}

TEST_CASE("No tokens make no groups", "[token_groups]") {
  const Tensor ids({0, 4}, DataType::i64), weights({0, 4}, DataType::f32);
  const TokenGroups groups = group_tokens(ids.view(), weights.view(), 8);
  CHECK(groups.experts.empty());
  CHECK(groups.offsets == Ints{0});
}

TEST_CASE("An id outside the experts is named", "[token_groups]") {
  const double bad = GENERATE(-1.0, 8.0, 4294967296.0);
  const Tensor ids = tensor({2, 1}, DataType::i64, {0, bad});
  const Tensor weights = tensor({2, 1}, DataType::f32, {1, 1});
  try {
    group_tokens(ids.view(), weights.view(), 8);
    FAIL("expected OutOfRange");
  } catch (const OutOfRange& error) {
    CHECK(std::string(error.what()) == "expert ids: expected 0 to 7, got " +
                                           std::to_string(static_cast<std::int64_t>(bad)) +
                                           " for token 1");
  }
}

TEST_CASE("Shapes and dtypes that do not fit are refused", "[token_groups]") {
  const Tensor ids({3, 2}, DataType::i64), weights({3, 2}, DataType::f32);
  const auto refused = [](const Tensor& i, const Tensor& w, std::span<const std::uint8_t> keep) {
    CHECK_THROWS_AS(group_tokens(i.view(), w.view(), 4, keep), InvalidArgument);
  };
  refused(Tensor({3, 2}, DataType::f32), weights, {});
  refused(Tensor({6}, DataType::i64), weights, {});
  refused(ids, Tensor({3, 3}, DataType::f32), {});
  refused(ids, Tensor({3, 2}, DataType::i32), {});
  refused(ids, weights, std::vector<std::uint8_t>(2));
}

}  // namespace
}  // namespace sida::test
