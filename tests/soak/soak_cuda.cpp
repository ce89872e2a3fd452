// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "cuda/device.hpp"
#include "cuda/layers_on_gpu.hpp"
#include "soak/soak_main.hpp"

namespace {

using namespace sida;
using namespace sida::test;

/// A GPU, with all, some or none of the experts pinned.
struct OnCuda {
  template <EvictionPolicy Policy>
  using Engine = OnGpu<Policy>;

  template <EvictionPolicy Policy>
  static std::unique_ptr<Engine<Policy>> make(const Model& model,
                                              std::shared_ptr<ExpertStore> store,
                                              const Budget& budget, const SchedulerOptions& options,
                                              std::uint32_t seed) {
    const auto experts = static_cast<std::size_t>(model.config.layers) *
                         static_cast<std::size_t>(model.config.experts);
    const std::size_t host_bytes = store->slab_bytes() * (1 + seed % experts);
    return std::make_unique<Engine<Policy>>(model, host_bytes, budget, std::move(store), options);
  }
  /// Calls go on the FFN's own stream, or on one of two others.
  template <class Engine>
  static void change_stream(Engine& engine, Random& random) {
    static CudaBackend backend;
    static CudaBackend::Stream streams[] = {backend.make_stream(), backend.make_stream()};
    const auto choice = random() % 3;
    engine.ffn->set_stream(choice == 2 ? nullptr : streams[choice].native());
  }
  static std::ptrdiff_t device_bytes() {
    std::size_t free = 0, all = 0;
    check_cuda(cudaMemGetInfo(&free, &all));
    return static_cast<std::ptrdiff_t>(all - free);
  }
  static std::string name() { return "cuda"; }
};

}  // namespace

int main(int count, char** arguments) {
  if (!gpu_found()) return 4;
  return soak<OnCuda>(count, arguments);
}
