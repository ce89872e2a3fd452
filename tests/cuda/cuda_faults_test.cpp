// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/layers_on_gpu.hpp"
#include "support/catch.hpp"
#include "support/every_fault.hpp"
#include "support/faulty_store.hpp"

using namespace sida;
using namespace sida::test;

TEMPLATE_TEST_CASE("Whichever call of CUDA fails, the caller is told and all that follows is right",
                   "[cuda][.faults]", LruPolicy, LookAheadPolicy) {
  if (!gpu_found()) return;
  const Model model;
  constexpr std::size_t some_pinned = 100'000;
  OnGpu<TestType> whole(model, all_pinned, Budget::fraction(1));
  const std::vector<std::byte> expected = whole.pass();
  const HashTable routing = whole.scheduler->recorded();
  const auto store = std::make_shared<FaultyStore>(model.store);
  // A kind of operation, and how many of it a run has at the least.
  const auto [kind, at_least] = GENERATE(table<Fault, int>({{Fault::allocation, 10},
                                                            {Fault::copy, 50},
                                                            {Fault::launch, 50},
                                                            {Fault::event, 200},
                                                            {Fault::read, 18},
                                                            {Fault::thread, 3}}));
  const int slots = GENERATE(2, 18);
  const std::size_t host_bytes = slots == 2 ? some_pinned : all_pinned;
  survive_every_fault(kind, at_least, expected, routing, [&] {
    return std::make_unique<OnGpu<TestType>>(model, host_bytes, Budget::experts(slots), store);
  });
}
