// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "soak/soak_main.hpp"
#include "support/ringed_backend.hpp"

namespace {

using namespace sida;
using namespace sida::test;

/// The CPU, with loads through a ring, as those of a GPU whose experts are not all pinned.
struct OnCpu {
  template <EvictionPolicy Policy>
  using Engine = Layers<RingedBackend, Policy>;

  template <EvictionPolicy Policy>
  static std::unique_ptr<Engine<Policy>> make(const Model& model,
                                              std::shared_ptr<ExpertStore> store,
                                              const Budget& budget, const SchedulerOptions& options,
                                              std::uint32_t seed) {
    return std::make_unique<Engine<Policy>>(
        model, budget, std::make_shared<RingedStore>(std::move(store), 1 + seed % 6), options);
  }
  template <class Engine>
  static void change_stream(Engine&, Random&) noexcept {}
  static std::ptrdiff_t device_bytes() noexcept { return 0; }
  static std::string name() { return "cpu"; }
};

}  // namespace

int main(int count, char** arguments) { return soak<OnCpu>(count, arguments); }
