// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/expert_ffn_cuda.hpp"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device_scope.hpp"
#include "expert_kernels.hpp"
#include "graph_calls.hpp"
#include "launched.hpp"
#include "layer_shape.hpp"
#include "next_guess.hpp"
#include "pinned_ring.hpp"
#include "routing_log.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/ffn/token_groups.hpp"

namespace sida {

template <>
class KeptExperts<CudaBackend> {
 public:
  const std::byte* arena = nullptr;
  Buffer<CudaBackend> slots;  ///< [E] i32, see cuda::ExpertSlabs
};

/// One layer call at a time, and the buffers that calls share.
class ExpertFfn<CudaBackend>::Call {
 public:
  Call(CudaBackend& backend, const MoeConfig& config)
      : backend_(backend),
        config_(config),
        layout_(config),
        shape_(cuda::shape_of(config)),
        stream_(backend.make_stream()),
        waited_(backend.make_event()),
        slots_(backend, slot_bytes()),
        counters_(backend, cuda::few_bytes(shape_) + cuda::guess_bytes(shape_.experts)),
        uploads_(backend),
        log_(backend, config.experts),
        graphs_(backend, config.experts),
        guess_(backend, counters_.data() + cuda::few_bytes(shape_)) {
    std::fill_n(uploads_.next(counters_.size()), counters_.size(), std::byte{0});
    uploads_.send(counters_.data(), counters_.size(), stream_);
    backend_.synchronize(backend_.fence(stream_));  // whichever stream the calls go on
  }
  ~Call() {
    try {
      abandon();
      if (last_) backend_.synchronize(*last_);
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  void set_stream(CUstream_st* stream) {
    if (stream_.native() == stream) return;
    abandon();
    stream_ = CudaBackend::Stream::borrow(stream);
    if (last_) backend_.wait(stream_, *last_);  // buffers pass from one stream to the other
  }
  CUstream_st* stream() const noexcept { return stream_.native(); }
  const MoeConfig& config() const noexcept { return config_; }
  std::size_t workspace_bytes() const noexcept {
    return plan_.size() + routing_.size() + keep_.size() + workspace_.size() + slots_.size() +
           counters_.size();
  }
  void settle() {
    log_.settle();
    graphs_.settle();
  }

  void synchronize() { backend_.synchronize(readers()); }

  std::size_t graph_workspace_bytes(std::int64_t tokens, std::int32_t top_k) const {
    const cuda::LayerShape shape = shape_of_call(tokens, top_k);
    return graph_workspace_at(shape, nullptr).bytes;
  }
  void capture(const ConstTensorView& hidden, const Routing& routing,
               const KeptExperts<CudaBackend>& kept, const TensorView& out, std::byte* memory,
               CUstream_st* stream, ReplayAccount account) {
    check(hidden, routing);
    const cuda::LayerShape shape = shape_of_call(hidden.shape[0], routing.ids.shape[1]);
    expect_tokens(out, shape.tokens, "out");
    SIDA_EXPECTS(!routing.is_foretold && !routing.skip_padding,
                 "capture: expected routing that the graph's own kernels give, got one in RAM");
    if (shape.tokens == 0) return;
    const cuda::RoutingMemory routed =
        graphs_.add(shape.tokens, shape.top_k, std::move(account)).memory();
    const GraphWorkspace workspace = graph_workspace_at(shape, memory);
    const cuda::GivenRouting given = given_by(routing);
    const cuda::TakenRouting taken{workspace.ids, workspace.weights, routed.ids(),
                                   routed.weights()};
    const cuda::ExpertSlabs slabs = slabs_at(kept.arena, &kept.slots);
    const cuda::DeviceScope scope(backend_.device());
    cuda::launched([&] {
      if (cuda::is_few(shape))
        return cuda::compute_few(shape, given, taken, hidden.data, slabs, workspace.results,
                                 counters_.data(), out.data, stream);
      const cuda::Plan plan = cuda::plan_at(shape, workspace.plan);
      cuda::make_plan(shape, given, taken, plan, stream);
      cuda::compute_experts(shape, plan, hidden.data, slabs, workspace.results, stream);
      cuda::combine(shape, plan, workspace.weights, workspace.results, out.data, stream);
    });
  }
  void begin_replays(CUstream_st* stream) {
    set_stream(stream);  // behind the calls before, with which graphs share counters
    graphs_.begin();
  }
  void end_replays(CUstream_st* stream, std::int64_t pass, std::span<const std::uint8_t> mask) {
    CudaBackend::Stream replayed = CudaBackend::Stream::borrow(stream);
    graphs_.end(replayed, pass, mask);
    if (CudaBackend::Event* const ended = graphs_.ended()) last_ = ended;
  }

  void begin(const ConstTensorView& hidden, const Routing& routing, Account account) {
    check(hidden, routing);
    abandon();
    shape_ = shape_of_call(hidden.shape[0], routing.ids.shape[1]);
    hidden_ = hidden.data;
    is_foretold_ = routing.is_foretold;
    entry_ = &log_.begin(shape_.tokens, shape_.top_k, routing.mask, std::move(account));
    const cuda::DeviceScope scope(backend_.device());
    reserve(workspace_, cuda::workspace_bytes(shape_));
    reserve(plan_, cuda::plan_bytes(shape_));
    reserve(routing_, 2 * assignments() * sizeof(float));
    is_planned_ = false;
    next_router_ = nullptr;
    guess_.forget();
    whole_.reset();
    experts_.clear();
    if (routing.is_foretold)
      upload(routing);
    else
      take(routing);
  }

  void guess(const NextRouter& router) {
    expect_call("guess");
    if (!is_foretold_ && 0 < shape_.tokens && shape_.tokens <= cuda::most_guessing_tokens)
      next_router_ = &router;
  }
  std::optional<ConstTensorView> guessed() { return guess_.take(); }

  const std::vector<std::int32_t>& experts() {
    expect_call("experts");
    if (!is_foretold_) wait_for_routing();
    experts_ = active_experts(entry_->routed());
    return experts_;
  }
  std::vector<std::uint8_t> counted() const { return sida::counted(entry_->routed(), experts_); }

  void compute(std::span<const ExpertTask> tasks) {
    expect_call("compute");
    if (tasks.empty()) return;
    const std::byte* arena = slab_of(tasks.front());
    for (const ExpertTask& task : tasks) {
      arena = std::min(arena, slab_of(task));
      SIDA_EXPECTS(0 <= task.expert && task.expert < config_.experts,
                   "compute: expected an expert from 0 to " + std::to_string(config_.experts - 1) +
                       ", got " + std::to_string(task.expert));
    }
    if (cuda::is_few(shape_) && !experts_.empty())
      compute_few(tasks, arena);
    else
      compute_many(tasks, arena);
  }
  bool is_passed(const CudaBackend::Fence& fence) const { return backend_.is_complete(fence); }
  void wait(const CudaBackend::Fence& arrival) { backend_.wait(stream_, arrival); }
  CudaBackend::Fence readers() { return backend_.fence(stream_); }

  std::shared_ptr<const KeptExperts<CudaBackend>> keep(std::span<const std::byte* const> slabs) {
    SIDA_EXPECTS(std::ssize(slabs) == config_.experts,
                 "keep: expected the slabs of all " + std::to_string(config_.experts) +
                     " experts, got " + std::to_string(slabs.size()));
    auto kept = std::make_shared<KeptExperts<CudaBackend>>();
    kept->arena = std::ranges::min(slabs);
    kept->slots = Buffer<CudaBackend>(backend_, slot_bytes());
    auto* const slot_of = reinterpret_cast<std::int32_t*>(uploads_.next(slot_bytes()));
    std::ranges::transform(slabs, slot_of,
                           [&](const std::byte* slab) { return slot_of_slab(slab, kept->arena); });
    uploads_.send(kept->slots.data(), slot_bytes(), stream_);
    return kept;
  }
  void compute(const KeptExperts<CudaBackend>& kept) {
    expect_call("compute");
    if (cuda::is_few(shape_)) {
      whole_ = {slabs_at(kept.arena, &kept.slots), {}};
      return;
    }
    make_plan();
    launch_experts(slabs_at(kept.arena, &kept.slots));
  }

  void combine(const TensorView& out) {
    expect_call("combine");
    expect_tokens(out, shape_.tokens, "out");
    if (whole_)
      launch_whole(out);
    else
      combine_results(out);
    finish(false);
  }

 private:
  static constexpr std::int64_t max_assignments = std::int64_t{1} << 24;

  void combine_results(const TensorView& out) {
    make_plan();  // of a call without experts
    const cuda::DeviceScope scope(backend_.device());
    cuda::launched([&] {
      cuda::combine(shape_, plan(), weights(), workspace_.data(), out.data, stream_.native());
    });
  }
  void launch_whole(const TensorView& out) {
    const cuda::DeviceScope scope(backend_.device());
    const cuda::TakenRouting taken = is_planned_ ? cuda::TakenRouting{} : taken_;
    cuda::launched([&] {
      cuda::compute_few(shape_, given_, taken, hidden_, whole_->slabs, workspace_.data(),
                        counters_.data(), out.data, stream_.native(), whole_->slots);
    });
  }

  // The slots go along with the launch.
  void compute_few(std::span<const ExpertTask> tasks, const std::byte* arena) {
    cuda::FewSlots slots;
    std::ranges::fill(slots.of, -1);
    for (const ExpertTask& task : tasks) {
      const auto place = std::ranges::lower_bound(experts_, task.expert) - experts_.begin();
      SIDA_EXPECTS(
          place < std::ssize(experts_) && experts_[static_cast<std::size_t>(place)] == task.expert,
          "compute: expected one of the call's experts, got " + std::to_string(task.expert));
      slots.of[place] = slot_of_slab(slab_of(task), arena);
    }
    if (tasks.size() == experts_.size()) {
      whole_ = {slabs_at(arena), slots};
      return;
    }
    make_plan();
    launch_experts(slabs_at(arena), slots);
  }
  void compute_many(std::span<const ExpertTask> tasks, const std::byte* arena) {
    make_plan();
    auto* const slot_of = reinterpret_cast<std::int32_t*>(uploads_.next(slot_bytes()));
    std::fill_n(slot_of, config_.experts, -1);
    for (const ExpertTask& task : tasks) slot_of[task.expert] = slot_of_slab(slab_of(task), arena);
    uploads_.send(slots_.data(), slot_bytes(), stream_);
    launch_experts(slabs_at(arena, &slots_));
  }

  void wait_for_routing() {
    make_plan();
    backend_.record(waited_, stream_);
    if (next_router_) ask_next();
    backend_.synchronize(waited_);
    const cuda::RoutingLog::Entry& entry = *entry_;
    try {
      log_.expect_experts(entry);
    } catch (...) {
      abandon();
      throw;
    }
  }

  // Behind the routing, for which alone the host waits.
  void ask_next() {
    const cuda::DeviceScope scope(backend_.device());
    guess_.ask(shape_, hidden_, *next_router_, stream_.native());
  }

  // Once for a call, as soon as something needs it.
  void make_plan() {
    if (std::exchange(is_planned_, true)) return;
    const cuda::DeviceScope scope(backend_.device());
    cuda::launched([&] { cuda::make_plan(shape_, given_, taken_, plan(), stream_.native()); });
  }

  // The call is over: what comes later on the stream may reuse the buffers.
  void finish(bool dropped) {
    last_ = &entry_->done();
    entry_ = nullptr;
    log_.commit(stream_, dropped);
  }
  void abandon() {
    if (entry_) finish(true);
  }

  void reserve(Buffer<CudaBackend>& memory, std::size_t bytes) {
    if (memory.size() >= bytes) return;
    memory = {};
    memory = Buffer<CudaBackend>(backend_, bytes);
  }

  static cuda::GivenRouting given_by(const Routing& routing) {
    return {routing.ids.data, routing.ids.type == DataType::i64, routing.weights.data,
            cuda::kernel_type(routing.weights.type)};
  }
  void take(const Routing& routing) {
    given_ = given_by(routing);
    taken_ = {ids(), weights(), entry_->memory().ids(), entry_->memory().weights()};
    if (!routing.skip_padding || routing.mask.empty()) return;
    reserve(keep_, routing.mask.size());
    std::byte* const mask = uploads_.next(routing.mask.size());
    std::ranges::copy(std::as_bytes(routing.mask), mask);
    uploads_.send(keep_.data(), routing.mask.size(), stream_);
    given_.keep = reinterpret_cast<const std::uint8_t*>(keep_.data());
  }
  void upload(const Routing& routing) {
    given_ = {ids(), false, weights()};
    taken_ = {};
    if (shape_.tokens == 0) return;
    const std::size_t bytes = 2 * assignments() * sizeof(float);
    auto* const to = reinterpret_cast<std::int32_t*>(uploads_.next(bytes));
    auto* const scale = reinterpret_cast<float*>(to + assignments());
    for (std::size_t a = 0; a < assignments(); ++a) {
      const auto assignment = static_cast<std::int64_t>(a);
      const bool is_padding = routing.skip_padding && !routing.mask.empty() &&
                              routing.mask[a / static_cast<std::size_t>(shape_.top_k)] == 0;
      scale[a] = is_padding ? 0.0f : detail::load<float>(routing.weights.data, assignment);
      to[a] = detail::load<std::int32_t>(routing.ids.data, assignment);
      entry_->memory().ids()[a] = scale[a] == 0 ? cuda::left_out : to[a];
      entry_->memory().weights()[a] = scale[a];
    }
    uploads_.send(routing_.data(), bytes, stream_);
  }

  void launch_experts(const cuda::ExpertSlabs& slabs, const cuda::FewSlots& slots = {}) {
    const cuda::DeviceScope scope(backend_.device());
    cuda::launched([&] {
      cuda::compute_experts(shape_, plan(), hidden_, slabs, workspace_.data(), stream_.native(),
                            slots);
    });
  }
  // Without a table of slots they go along with the launch.
  cuda::ExpertSlabs slabs_at(const std::byte* arena,
                             const Buffer<CudaBackend>* slots = nullptr) const {
    return cuda::slabs_in(arena, layout_, slots ? slots->data() : nullptr);
  }

  cuda::LayerShape shape_of_call(std::int64_t tokens, std::int64_t top_k) const {
    cuda::LayerShape shape = shape_;
    shape.tokens = static_cast<int>(tokens);
    shape.top_k = static_cast<int>(top_k);
    return shape;
  }
  static std::size_t assignments_of(const cuda::LayerShape& shape) noexcept {
    return static_cast<std::size_t>(shape.tokens) * static_cast<std::size_t>(shape.top_k);
  }
  std::size_t assignments() const noexcept { return assignments_of(shape_); }

  /// Of one call that a graph holds; not shared with other calls, which may replace theirs.
  struct GraphWorkspace {
    std::byte *results, *plan;
    std::int32_t* ids;
    float* weights;
    std::size_t bytes;
  };
  GraphWorkspace graph_workspace_at(const cuda::LayerShape& shape, std::byte* memory) const {
    const auto aligned = [](std::size_t bytes) { return (bytes + 255) / 256 * 256; };
    const std::size_t plan = aligned(cuda::workspace_bytes(shape));
    const std::size_t ids = plan + aligned(cuda::plan_bytes(shape));
    const std::size_t weights = ids + aligned(assignments_of(shape) * sizeof(std::int32_t));
    return {memory, memory + plan, reinterpret_cast<std::int32_t*>(memory + ids),
            reinterpret_cast<float*>(memory + weights),
            weights + aligned(assignments_of(shape) * sizeof(float))};
  }
  std::size_t slot_bytes() const noexcept {
    return static_cast<std::size_t>(config_.experts) * sizeof(std::int32_t);
  }
  cuda::Plan plan() const { return cuda::plan_at(shape_, plan_.data()); }
  std::int32_t* ids() const { return reinterpret_cast<std::int32_t*>(routing_.data()); }
  float* weights() const { return reinterpret_cast<float*>(ids() + assignments()); }

  const std::byte* slab_of(const ExpertTask& task) const {
    const ExpertWeights& weights = task.weights;
    SIDA_EXPECTS(weights.up && weights.down, "compute: expected up and down weights, got null");
    const std::byte* const slab = weights.up - layout_.up_offset;
    const ExpertWeights expected = weights_in(layout_, slab);
    SIDA_EXPECTS(weights.down == expected.down && weights.up_bias == expected.up_bias &&
                     weights.down_bias == expected.down_bias,
                 "compute: expected an expert's parts in one slab, in the order of SlabLayout");
    return slab;
  }
  std::int32_t slot_of_slab(const std::byte* slab, const std::byte* arena) const {
    const auto distance = static_cast<std::size_t>(slab - arena);
    SIDA_EXPECTS(distance % layout_.slab_bytes == 0,
                 "compute: expected slabs multiples of " + std::to_string(layout_.slab_bytes) +
                     " bytes apart, got " + std::to_string(distance));
    return static_cast<std::int32_t>(distance / layout_.slab_bytes);
  }

  void expect_call(const char* method) const {
    if (!entry_) throw StateError(std::string(method) + ": expected a call of begin() before it");
  }

  void check(const ConstTensorView& hidden, const Routing& routing) const {
    SIDA_EXPECTS(!hidden.shape.empty(), "hidden states: expected [T, H], got " + hidden.describe());
    expect_tokens(hidden, hidden.shape[0], "hidden states");
    detail::check_routing(routing.ids, routing.weights, {});
    SIDA_EXPECTS(routing.ids.shape[0] == hidden.shape[0],
                 "expert ids: expected a row for each of the " + std::to_string(hidden.shape[0]) +
                     " hidden states, got " + routing.ids.describe());
    SIDA_EXPECTS(routing.mask.empty() || std::ssize(routing.mask) == hidden.shape[0],
                 "mask: expected a flag for each of the " + std::to_string(hidden.shape[0]) +
                     " tokens, got " + std::to_string(routing.mask.size()));
    SIDA_EXPECTS(routing.ids.shape[1] <= cuda::max_top_k,
                 "cuda: expected at most " + std::to_string(cuda::max_top_k) +
                     " choices a token, got " + std::to_string(routing.ids.shape[1]));
    SIDA_EXPECTS(routing.ids.elements() <= max_assignments,
                 "cuda: expected at most " + std::to_string(max_assignments) +
                     " rows in a call, got " + std::to_string(routing.ids.elements()) +
                     "; split the batch");
    cuda::kernel_type(routing.weights.type);
  }
  template <class View>
  void expect_tokens(const View& view, std::int64_t tokens, const char* name) const {
    SIDA_EXPECTS(view.shape.size() == 2 && view.shape[0] == tokens &&
                     view.shape[1] == config_.hidden_size && view.type == config_.dtype,
                 std::string(name) + ": expected [" + std::to_string(tokens) + ", " +
                     std::to_string(config_.hidden_size) + "] " +
                     std::string(name_of(config_.dtype)) + ", got " + view.describe());
  }

  CudaBackend& backend_;
  MoeConfig config_;
  SlabLayout layout_;
  cuda::LayerShape shape_;
  CudaBackend::Stream stream_;
  CudaBackend::Event waited_;
  CudaBackend::Event* last_ = nullptr;  // behind the latest call that is over
  Buffer<CudaBackend> plan_, routing_, keep_, workspace_, slots_, counters_;
  cuda::PinnedRing uploads_;
  cuda::RoutingLog log_;
  cuda::GraphCalls graphs_;
  cuda::NextGuess guess_;
  const NextRouter* next_router_ = nullptr;   // whose choices the call at hand guesses
  cuda::RoutingLog::Entry* entry_ = nullptr;  // of the call at hand
  const std::byte* hidden_ = nullptr;
  cuda::GivenRouting given_;
  cuda::TakenRouting taken_;
  // What a call of few assignments goes to, whole: computed by combine(), which knows where to.
  struct Whole {
    cuda::ExpertSlabs slabs;
    cuda::FewSlots slots;
  };
  std::optional<Whole> whole_;
  bool is_planned_ = false;
  std::vector<std::int32_t> experts_;
  bool is_foretold_ = false;
};

ExpertFfn<CudaBackend>::ExpertFfn(CudaBackend& backend, const MoeConfig& config)
    : call_(std::make_unique<Call>(backend, config)) {}
ExpertFfn<CudaBackend>::~ExpertFfn() = default;

void ExpertFfn<CudaBackend>::set_stream(CUstream_st* stream) { call_->set_stream(stream); }
CUstream_st* ExpertFfn<CudaBackend>::stream() const noexcept { return call_->stream(); }
void ExpertFfn<CudaBackend>::begin(const ConstTensorView& hidden, const Routing& routing,
                                   Account account) {
  call_->begin(hidden, routing, std::move(account));
}
void ExpertFfn<CudaBackend>::guess(const NextRouter& router) { call_->guess(router); }
std::optional<ConstTensorView> ExpertFfn<CudaBackend>::guessed() { return call_->guessed(); }
const std::vector<std::int32_t>& ExpertFfn<CudaBackend>::experts() { return call_->experts(); }
std::vector<std::uint8_t> ExpertFfn<CudaBackend>::counted() const { return call_->counted(); }
void ExpertFfn<CudaBackend>::compute(std::span<const ExpertTask> tasks) { call_->compute(tasks); }
bool ExpertFfn<CudaBackend>::is_passed(const CudaBackend::Fence& fence) const {
  return call_->is_passed(fence);
}
void ExpertFfn<CudaBackend>::wait(const CudaBackend::Fence& arrival) { call_->wait(arrival); }
CudaBackend::Fence ExpertFfn<CudaBackend>::readers() { return call_->readers(); }
std::shared_ptr<const KeptExperts<CudaBackend>> ExpertFfn<CudaBackend>::keep(
    std::span<const std::byte* const> slabs) {
  return call_->keep(slabs);
}
void ExpertFfn<CudaBackend>::compute(const KeptExperts<CudaBackend>& kept) { call_->compute(kept); }
void ExpertFfn<CudaBackend>::combine(const TensorView& out) { call_->combine(out); }
void ExpertFfn<CudaBackend>::settle() { call_->settle(); }
void ExpertFfn<CudaBackend>::synchronize() { call_->synchronize(); }
std::size_t ExpertFfn<CudaBackend>::graph_workspace_bytes(std::int64_t tokens,
                                                          std::int32_t top_k) const {
  return call_->graph_workspace_bytes(tokens, top_k);
}
void ExpertFfn<CudaBackend>::capture(const ConstTensorView& hidden, const Routing& routing,
                                     const KeptExperts<CudaBackend>& kept, const TensorView& out,
                                     std::byte* workspace, CUstream_st* stream,
                                     ReplayAccount account) {
  call_->capture(hidden, routing, kept, out, workspace, stream, std::move(account));
}
void ExpertFfn<CudaBackend>::begin_replays(CUstream_st* stream) { call_->begin_replays(stream); }
void ExpertFfn<CudaBackend>::end_replays(CUstream_st* stream, std::int64_t pass,
                                         std::span<const std::uint8_t> mask) {
  call_->end_replays(stream, pass, mask);
}
const MoeConfig& ExpertFfn<CudaBackend>::config() const noexcept { return call_->config(); }
std::size_t ExpertFfn<CudaBackend>::workspace_bytes() const noexcept {
  return call_->workspace_bytes();
}

}  // namespace sida
