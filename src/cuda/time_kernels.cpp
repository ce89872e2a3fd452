// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "choose_kernel.hpp"
#include "device_scope.hpp"
#include "launched.hpp"
#include "layer_shape.hpp"
#include "measure.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/ffn/kernel_table.hpp"
#include "sida/ffn/slab_layout.hpp"

namespace sida {
namespace {

using cuda::expect;

constexpr std::size_t cold_bytes = std::size_t{256} << 20;  // some times the L2 of any GPU
constexpr std::int64_t max_assignments = std::int64_t{1} << 24;

struct Destroy {
  void operator()(CUevent_st* event) const { cudaEventDestroy(event); }
  void operator()(CUgraph_st* graph) const { cudaGraphDestroy(graph); }
  void operator()(CUgraphExec_st* graph) const { cudaGraphExecDestroy(graph); }
};
using Event = std::unique_ptr<CUevent_st, Destroy>;
using Graph = std::unique_ptr<CUgraph_st, Destroy>;
using Replay = std::unique_ptr<CUgraphExec_st, Destroy>;

Event timing_event() {
  cudaEvent_t event = nullptr;
  expect(cudaEventCreate(&event), "make an event");
  return Event(event);
}

/// One layer of random experts, and what a call of it with any kernel needs.
class MeasuredLayer {
 public:
  MeasuredLayer(CudaBackend& backend, const MoeConfig& config, std::int32_t tokens,
                std::uint32_t seed)
      : backend_(backend),
        layout_(config),
        shape_(cuda::shape_of(config)),
        stream_(backend.make_stream()),
        begin_(timing_event()),
        end_(timing_event()),
        random_(seed) {
    shape_.tokens = tokens;
    for (std::size_t k = 1; k < std::size(cuda::kernel_names); ++k)
      if (cuda::takes(shape_, static_cast<cuda::Kernel>(k)))
        kernels_.push_back(static_cast<cuda::Kernel>(k));
    allocate(config);
    fill(config, seed);
    route();
  }

  const std::vector<cuda::Kernel>& kernels() const { return kernels_; }
  cuda::Kernel chosen() const { return cuda::choose_kernel(shape_); }

  /// A call with one kernel, to be replayed.
  Replay record(cuda::Kernel kernel) {
    cuda::LayerShape shape = shape_;
    shape.kernel = kernel;
    cudaStream_t stream = stream_.native();
    expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin a graph");
    std::exception_ptr failed;
    try {
      enqueue(shape);
    } catch (...) {
      failed = std::current_exception();
    }
    cudaGraph_t recorded = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream, &recorded);
    const Graph graph(recorded);
    if (failed) std::rethrow_exception(failed);
    expect(status, "end a graph");
    cudaGraphExec_t replay = nullptr;
    expect(cudaGraphInstantiate(&replay, recorded, 0), "instantiate a graph");
    return Replay(replay);
  }

  /// Gives the calls that follow new routing.
  void route() {
    const auto experts = static_cast<std::size_t>(shape_.experts);
    const auto top_k = static_cast<std::size_t>(shape_.top_k);
    std::vector<std::int32_t> order(experts), ids;
    std::iota(order.begin(), order.end(), 0);
    for (int token = 0; token < shape_.tokens; ++token)
      for (std::size_t j = 0; j < top_k; ++j) {
        std::swap(order[j],
                  order[std::uniform_int_distribution<std::size_t>(j, experts - 1)(random_)]);
        ids.push_back(order[j]);
      }
    send(ids_, ids);
  }

  /// Microseconds of a call, from when L2 holds nothing of it.
  double time(const Replay& replay) {
    cuda::launched([&] {
      cuda::read_through(cold_.data(), cold_bytes, reinterpret_cast<unsigned*>(sink_.data()),
                         stream_.native());
    });
    expect(cudaEventRecord(begin_.get(), stream_.native()), "record an event");
    expect(cudaGraphLaunch(replay.get(), stream_.native()), "launch a graph");
    expect(cudaEventRecord(end_.get(), stream_.native()), "record an event");
    expect(cudaEventSynchronize(end_.get()), "compute a layer");
    float milliseconds = 0;
    expect(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "read the time");
    return 1e3 * static_cast<double>(milliseconds);
  }

 private:
  void allocate(const MoeConfig& config) {
    const auto buffer = [&](std::size_t bytes) { return Buffer<CudaBackend>(backend_, bytes); };
    std::size_t workspace = 0;
    for (const cuda::Kernel kernel : kernels_) {
      cuda::LayerShape shape = shape_;
      shape.kernel = kernel;
      workspace = std::max(workspace, cuda::workspace_bytes(shape));
    }
    const auto assignments =
        static_cast<std::size_t>(shape_.tokens) * static_cast<std::size_t>(shape_.top_k);
    const std::size_t hidden = static_cast<std::size_t>(shape_.tokens) *
                               static_cast<std::size_t>(shape_.hidden) * size_of(config.dtype);
    arena_ = buffer(layout_.slab_bytes * static_cast<std::size_t>(shape_.experts));
    slots_ = buffer(static_cast<std::size_t>(shape_.experts) * sizeof(std::int32_t));
    ids_ = buffer(assignments * sizeof(std::int32_t));
    weights_ = buffer(assignments * sizeof(float));
    hidden_ = buffer(hidden);
    out_ = buffer(hidden);
    plan_ = buffer(cuda::plan_bytes(shape_));
    workspace_ = buffer(workspace);
    counters_ = buffer(cuda::few_bytes(shape_));
    cold_ = buffer(cold_bytes);
    sink_ = buffer(sizeof(unsigned));
  }

  void fill(const MoeConfig& config, std::uint32_t seed) {
    const std::size_t element = size_of(config.dtype);
    const float scale = std::sqrt(3.0f / static_cast<float>(shape_.hidden));
    cuda::launched([&] {
      cuda::fill_random(shape_.dtype, arena_.data(), arena_.size() / element, scale, seed,
                        stream_.native());
      cuda::fill_random(shape_.dtype, hidden_.data(), hidden_.size() / element, 1.0f, seed + 1,
                        stream_.native());
      cuda::fill_random(cuda::Dtype::f32, cold_.data(), cold_bytes / sizeof(float), 1.0f, seed + 2,
                        stream_.native());
    });
    std::vector<std::int32_t> slots(static_cast<std::size_t>(shape_.experts));
    std::iota(slots.begin(), slots.end(), 0);
    std::ranges::shuffle(slots, random_);
    send(slots_, slots);
    send(counters_, std::vector<std::byte>(counters_.size()));
    send(weights_, std::vector<float>(weights_.size() / sizeof(float),
                                      1.0f / static_cast<float>(shape_.top_k)));
  }

  template <class T>
  void send(Buffer<CudaBackend>& to, const std::vector<T>& values) {
    backend_.copy_async(to.data(), values.data(), values.size() * sizeof(T), stream_);
    backend_.synchronize(backend_.fence(stream_));
  }

  void enqueue(const cuda::LayerShape& shape) {
    const cuda::ExpertSlabs slabs = cuda::slabs_in(arena_.data(), layout_, slots_.data());
    const cuda::Plan plan = cuda::plan_at(shape, plan_.data());
    const auto* weights = reinterpret_cast<const float*>(weights_.data());
    cudaStream_t stream = stream_.native();
    cuda::launched([&] {
      const cuda::GivenRouting given{ids_.data(), false, weights};
      if (cuda::is_few(shape))
        return cuda::compute_few(shape, given, {}, hidden_.data(), slabs, workspace_.data(),
                                 counters_.data(), out_.data(), stream);
      cuda::make_plan(shape, given, {}, plan, stream);
      cuda::compute_experts(shape, plan, hidden_.data(), slabs, workspace_.data(), stream);
      cuda::combine(shape, plan, weights, workspace_.data(), out_.data(), stream);
    });
  }

  CudaBackend& backend_;
  SlabLayout layout_;
  cuda::LayerShape shape_;
  CudaBackend::Stream stream_;
  Event begin_, end_;
  std::mt19937 random_;
  std::vector<cuda::Kernel> kernels_;
  Buffer<CudaBackend> arena_, slots_, ids_, weights_, hidden_, out_, plan_, workspace_, counters_,
      cold_, sink_;
};

struct Candidate {
  Replay replay;
  double first;  ///< what it took before the measurement
  bool is_chosen;
  KernelTimes times;
};

/// Each kernel's graph, without those that take far longer than the fastest.
std::vector<Candidate> candidates_of(MeasuredLayer& layer) {
  constexpr double hopeless = 3;
  std::vector<Candidate> found;
  for (const cuda::Kernel kernel : layer.kernels()) {
    Replay replay = layer.record(kernel);
    layer.time(replay);  // loads the kernel
    const double first = layer.time(replay);
    const std::string name(cuda::kernel_names[static_cast<std::size_t>(kernel)]);
    found.push_back({std::move(replay), first, kernel == layer.chosen(), {name, {}}});
  }
  const double fastest = std::ranges::min_element(found, {}, &Candidate::first)->first;
  std::erase_if(found, [&](const Candidate& each) {
    return !each.is_chosen && each.first > hopeless * fastest;
  });
  return found;
}

}  // namespace

std::vector<KernelTimes> time_kernels(CudaBackend& backend, const MoeConfig& config,
                                      std::int32_t tokens, int repetitions, std::uint32_t seed) {
  cuda::shape_of(config);  // checks it
  SIDA_EXPECTS(tokens >= 1 && std::int64_t{tokens} * config.top_k <= max_assignments,
               "tokens: expected 1 to " + std::to_string(max_assignments / config.top_k) +
                   ", got " + std::to_string(tokens));
  SIDA_EXPECTS(repetitions >= 1,
               "repetitions: expected 1 or more, got " + std::to_string(repetitions));
  const cuda::DeviceScope scope(backend.device());
  MeasuredLayer layer(backend, config, tokens, seed);
  std::vector<Candidate> candidates = candidates_of(layer);
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    layer.route();
    for (Candidate& each : candidates) each.times.microseconds.push_back(layer.time(each.replay));
  }
  std::vector<KernelTimes> times;
  for (Candidate& each : candidates) times.push_back(std::move(each.times));
  return times;
}

}  // namespace sida
