// SPDX-License-Identifier: Apache-2.0
#include "choose_kernel.hpp"

#include "support/catch.hpp"

using namespace sida::cuda;

namespace {

constexpr TunedKernel entry{Dtype::bf16, true, 8, 128, 2048, 768, 48, Kernel::narrow};

LayerShape shape_of(const TunedKernel& calls) {
  LayerShape shape;
  shape.dtype = calls.dtype;
  shape.gated = calls.gated;
  shape.top_k = calls.top_k;
  shape.experts = calls.experts;
  shape.hidden = calls.hidden;
  shape.intermediate = calls.intermediate;
  shape.tokens = calls.tokens;
  return shape;
}

}  // namespace

// Neither needs a GPU.

TEST_CASE("a measured kernel is that of calls whose tokens come to the same power of two") {
  LayerShape shape = shape_of(entry);
  for (const int tokens : {33, 48, 64}) {
    shape.tokens = tokens;
    CHECK(tuned_kernel({entry}, shape) == Kernel::narrow);
  }
  for (const int tokens : {0, 1, 32, 65}) {
    shape.tokens = tokens;
    CHECK(tuned_kernel({entry}, shape) == Kernel::tuned);
  }
  shape.tokens = 64;
  TunedKernel other = entry;
  other.kernel = Kernel::wide;
  CHECK(tuned_kernel({other, entry}, shape) == Kernel::wide);
  CHECK(tuned_kernel({}, shape) == Kernel::tuned);
}

TEST_CASE("a measured kernel is for one shape alone") {
  const auto differing = [](auto&& change) {
    LayerShape shape = shape_of(entry);
    change(shape);
    return tuned_kernel({entry}, shape);
  };
  CHECK(differing([](LayerShape& shape) { shape.dtype = Dtype::f16; }) == Kernel::tuned);
  CHECK(differing([](LayerShape& shape) { shape.gated = false; }) == Kernel::tuned);
  CHECK(differing([](LayerShape& shape) { shape.top_k = 4; }) == Kernel::tuned);
  CHECK(differing([](LayerShape& shape) { shape.experts = 64; }) == Kernel::tuned);
  CHECK(differing([](LayerShape& shape) { shape.hidden = 1024; }) == Kernel::tuned);
  CHECK(differing([](LayerShape& shape) { shape.intermediate = 512; }) == Kernel::tuned);
  CHECK(differing([](LayerShape& shape) { shape.activation = Act::silu; }) == Kernel::narrow);
}

TEST_CASE("a device's table is set once") {
  constexpr int device = 63;  // no machine's
  CHECK(set_tuned_kernels(device, {entry}));
  CHECK_FALSE(set_tuned_kernels(device, {entry}));
  CHECK_FALSE(set_tuned_kernels(64, {entry}));
  CHECK_FALSE(set_tuned_kernels(-1, {entry}));
}
