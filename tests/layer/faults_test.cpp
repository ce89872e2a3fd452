// SPDX-License-Identifier: Apache-2.0
#include <memory>
#include <vector>

#include "support/catch.hpp"
#include "support/every_fault.hpp"
#include "support/faulty_backend.hpp"
#include "support/faulty_store.hpp"
#include "support/layers.hpp"

using namespace sida;
using namespace sida::test;

TEMPLATE_TEST_CASE("Whichever operation fails, the caller is told and all that follows is right",
                   "[layer][faults]", LruPolicy, LookAheadPolicy) {
  const Model model;
  Default whole(model, Budget::fraction(1));
  const std::vector<std::byte> expected = whole.pass();
  const HashTable routing = whole.scheduler->recorded();
  // A kind of operation, and how many of it a run has at the least.
  const auto [kind, at_least] = GENERATE(table<Fault, int>({{Fault::allocation, 4},
                                                            {Fault::copy, 50},
                                                            {Fault::launch, 20},
                                                            {Fault::event, 50},
                                                            {Fault::read, 50},
                                                            {Fault::thread, 3}}));
  const int slots = GENERATE(1, 5);
  const auto store = std::make_shared<FaultyStore>(model.store);
  survive_every_fault(kind, at_least, expected, routing, [&] {
    return std::make_unique<Layers<FaultyBackend, TestType>>(model, Budget::experts(slots), store);
  });
}
