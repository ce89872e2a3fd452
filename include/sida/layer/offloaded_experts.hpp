// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/array_store.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/expert_ffn.hpp"
#include "sida/ffn/next_router.hpp"
#include "sida/ffn/routed_call.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/layer/router_choices.hpp"
#include "sida/schedule/offload_scheduler.hpp"

namespace sida {

/// The experts of one MoE layer, end to end: tokens grouped by expert, experts brought to fast
/// memory, computed as they arrive, results summed once per token in the order of choices.
///
/// Layers of one model share the scheduler and the ExpertFfn. Calls from several threads take
/// turns.
template <Backend B, EvictionPolicy Policy>
class OffloadedExperts {
 public:
  using Scheduler = OffloadScheduler<B, Policy>;

  /// @throws InvalidArgument if the cache's slabs are not of `config`, OutOfRange for the layer.
  OffloadedExperts(const MoeConfig& config, std::int32_t layer,
                   std::shared_ptr<Scheduler> scheduler, std::shared_ptr<ExpertFfn<B>> ffn)
      : config_(config),
        layout_(config),
        layer_(layer),
        scheduler_(std::move(scheduler)),
        ffn_(std::move(ffn)) {
    const auto& cache = scheduler_->cache();
    SIDA_EXPECTS(
        cache.slot_bytes() == layout_.slab_bytes && scheduler_->experts() == config.experts,
        "OffloadedExperts: expected a cache of " + std::to_string(config.experts) +
            " experts a layer in slabs of " + std::to_string(layout_.slab_bytes) + " bytes, got " +
            std::to_string(scheduler_->experts()) + " in " + std::to_string(cache.slot_bytes()));
    if (layer < 0 || layer >= scheduler_->layers())
      throw OutOfRange("OffloadedExperts: expected a layer from 0 to " +
                       std::to_string(scheduler_->layers() - 1) + ", got " + std::to_string(layer));
    if (cache.in_place()) check_arrays();
    if constexpr (RoutedCall<B>::is_deferred)
      scheduler_->set_settle([shared = ffn_] { shared->settle(); });
  }

  /// Leave rows of padding (by the pass's mask) out: they come out as zeros.
  void set_skip_padding(bool skip) noexcept { skip_padding_ = skip; }

  /// out[t] = Σ_j weights[t, j] * expert(ids[t, j])(hidden[t]): the model's own routing.
  ///
  /// hidden, out: [T, H] of the config's dtype; ids: [T, k] i32 or i64; weights: [T, k]. Choices of
  /// weight 0 are left out. `out` is written whole, or not at all when an id is out of range.
  ///
  /// `next_ids`: [T, k] i32 or i64 in RAM, what the next layer's router chooses on an input that is
  /// like its own: these experts may come early, see OffloadScheduler::look_ahead; a view without
  /// shape tells nothing. Ids out of range are left out. They are read once `ids` are in RAM, so
  /// that on a GPU they may be on the way there in the order of the same stream.
  /// @throws InvalidArgument, OutOfRange, what a load threw, StateError after close().
  void forward(const ConstTensorView& hidden, const ConstTensorView& ids,
               const ConstTensorView& weights, const TensorView& out,
               const ConstTensorView& next_ids = {}) {
    const auto turn = scheduler_->turn();
    if (!next_ids.shape.empty()) check_next(hidden, next_ids);
    run(hidden, {ids, weights, mask_for(hidden), skip_padding_}, out, {next_ids, nullptr});
  }

  /// On a backend that routes by itself, forward_guessing() asks this router, which stands for the
  /// next layer's, as cheaply as can be. What it borrows must outlive the layer's calls.
  /// @throws InvalidArgument for a router of other sizes, and for the last layer.
  void set_next_router(NextRouter router) {
    expect_next();
    check_router(router, config_.experts, config_.hidden_size, config_.dtype);
    const auto turn = scheduler_->turn();
    next_router_ = std::move(router);
  }
  /// As forward(), with `next_ids` that the layer asks of the router itself, for at most 32 tokens.
  /// @throws StateError without set_next_router().
  void forward_guessing(const ConstTensorView& hidden, const ConstTensorView& ids,
                        const ConstTensorView& weights, const TensorView& out) {
    const auto turn = scheduler_->turn();
    if (!next_router_) throw StateError("forward_guessing: expected set_next_router() before it");
    run(hidden, {ids, weights, mask_for(hidden), skip_padding_}, out, {{}, &*next_router_});
  }

  /// Whether forward() has a use for `next_ids` in the pass at hand.
  bool wants_look_ahead() const {
    return layer_ + 1 < scheduler_->layers() && scheduler_->wants_look_ahead();
  }

  /// Whether the pass's hash table foretells this layer.
  bool has_prediction() const {
    const auto turn = scheduler_->turn();
    const HashTable* table = scheduler_->table();
    if (!table || table->tokens() == 0) return table != nullptr;
    const std::size_t begin = table->index(layer_, 0, 0), end = table->index(layer_ + 1, 0, 0);
    for (std::size_t i = begin; i < end; ++i)
      if (table->ids[i] >= 0) return true;
    return false;
  }

  /// As forward, with experts and scales from the pass's hash table (paper §3.3): the first top_k
  /// candidates of each token. Padding, for which nothing is foretold, comes out as zeros.
  /// @throws StateError without a table, or with one that foretells nothing for this layer (see
  /// has_prediction); InvalidArgument if it is of another batch size or names too few candidates.
  void forward_predicted(const ConstTensorView& hidden, const TensorView& out) {
    const auto turn = scheduler_->turn();
    const HashTable* table = scheduler_->table();
    if (!table) throw StateError("forward_predicted: the pass has no hash table");
    SIDA_EXPECTS(table->candidates >= config_.top_k,
                 "forward_predicted: expected a hash table of " + std::to_string(config_.top_k) +
                     " candidates or more, got " + std::to_string(table->candidates));
    if (!has_prediction())
      throw StateError("forward_predicted: the pass's hash table foretells nothing for layer " +
                       std::to_string(layer_) + "; route it exactly");
    SIDA_EXPECTS(!hidden.shape.empty() && hidden.shape[0] == table->tokens(),
                 "forward_predicted: expected hidden states of the table's " +
                     std::to_string(table->tokens()) + " tokens, got " + hidden.describe());
    const std::int64_t tokens = table->tokens();
    const std::int32_t k = config_.top_k;
    std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * k), 0);
    std::vector<float> weights(ids.size(), 0.0f);
    for (std::int64_t t = 0, i = 0; t < tokens; ++t) {
      for (std::int32_t j = 0; j < k; ++j, ++i) {
        const std::size_t at = table->index(layer_, t, j);
        if (table->ids[at] < 0) continue;
        ids[static_cast<std::size_t>(i)] = table->ids[at];
        weights[static_cast<std::size_t>(i)] = table->scale[at];
      }
    }
    const std::vector<std::int64_t> shape{tokens, k};
    run(hidden,
        {{std::as_bytes(std::span(ids)).data(), DataType::i32, shape},
         {std::as_bytes(std::span(weights)).data(), DataType::f32, shape},
         mask_for(hidden),
         true,
         true},
        out);
  }

  /// Brings all experts of the layer and waits until they are there; counts no use of them.
  /// @throws what a load threw, StateError after close().
  void load_all() {
    const auto turn = scheduler_->turn();
    auto demand = scheduler_->demand_all(layer_);
    for (;;) {
      const auto leases = demand.next_ready();
      if (leases.empty()) break;
      if constexpr (RoutedCall<B>::is_deferred)
        for (const auto& lease : leases) ffn_->wait(lease.arrival());
    }
    if constexpr (RoutedCall<B>::is_deferred) {
      find_kept();
      ffn_->synchronize();
    }
  }

  /// Whether the layer's experts, once load_all() has brought them, stay where they are until the
  /// cache is resized, such that a CUDA graph can hold the layer's calls.
  bool may_be_captured() const {
    const auto& cache = scheduler_->cache();
    return RoutedCall<B>::is_deferred && !skip_padding_ && !cache.in_place() &&
           cache.slots() >= cache.total_experts();
  }
  /// Bytes of the GPU's memory that capture() needs for a call of `tokens` with `top_k` choices.
  std::size_t graph_workspace_bytes(std::int64_t tokens, std::int32_t top_k) const {
    if constexpr (RoutedCall<B>::is_deferred) return ffn_->graph_workspace_bytes(tokens, top_k);
    return 0;
  }
  /// As forward, for a CUDA graph: enqueues the call's kernels on `stream`, which is being
  /// captured, and nothing else; see ExpertFfn<CudaBackend>::capture() for what must be there as
  /// long as the graph may be replayed. Each pass replays it once at most, between begin_replays()
  /// and end_replays() of any layer of the scheduler. After resize() a graph is not to be replayed.
  /// @throws InvalidArgument; StateError unless load_all() has brought all experts to stay.
  template <class Stream>
  void capture(const ConstTensorView& hidden, const ConstTensorView& ids,
               const ConstTensorView& weights, const TensorView& out, std::byte* workspace,
               Stream stream) {
    if constexpr (RoutedCall<B>::is_deferred) {
      const auto turn = scheduler_->turn();
      if (!may_be_captured() || !is_kept())
        throw StateError(
            "capture: expected a layer all of whose experts stay in fast memory, after load_all()");
      ffn_->capture(hidden, {ids, weights}, *kept_, out, workspace, stream, replay_account());
    }
  }
  /// See capture(). Work that is enqueued on `stream` from here on may replay graphs.
  template <class Stream>
  void begin_replays(Stream stream) {
    if constexpr (RoutedCall<B>::is_deferred) {
      const auto turn = scheduler_->turn();
      ffn_->begin_replays(stream);
    }
  }
  /// See capture(). What was enqueued on `stream` since begin_replays() is of the pass at hand.
  template <class Stream>
  void end_replays(Stream stream) {
    if constexpr (RoutedCall<B>::is_deferred) {
      const auto turn = scheduler_->turn();
      ffn_->end_replays(stream, scheduler_->recorder().pass(), scheduler_->mask());
    }
  }

  Scheduler& scheduler() const noexcept { return *scheduler_; }
  ExpertFfn<B>& ffn() const noexcept { return *ffn_; }

 private:
  using Fence = typename B::Fence;

  // The pass's mask where it is of this call's tokens: a decoder's call has others.
  std::span<const std::uint8_t> mask_for(const ConstTensorView& hidden) const {
    const auto mask = scheduler_->mask();
    const bool fits =
        !hidden.shape.empty() && static_cast<std::int64_t>(mask.size()) == hidden.shape[0];
    return fits ? mask : std::span<const std::uint8_t>();
  }

  // What tells which experts the next layer will need, if anything does.
  struct Next {
    ConstTensorView ids = {};
    const NextRouter* router = nullptr;
  };

  void expect_next() const {
    SIDA_EXPECTS(layer_ + 1 < scheduler_->layers(),
                 "the last layer has no next one to look ahead to");
  }
  void check_next(const ConstTensorView& hidden, const ConstTensorView& next_ids) const {
    expect_next();
    check_choices(next_ids, hidden.shape.empty() ? 0 : hidden.shape[0]);
  }

  void run(const ConstTensorView& hidden, const Routing& routing, const TensorView& out,
           const Next& next = {}) {
    const bool is_kept = find_kept();
    RoutedCall<B> call(*ffn_, hidden, routing, account(routing, is_kept));
    if (is_kept) {
      compute_kept(call);
      call.combine(out);
    } else {
      compute_demanded(call, routing, next, out);
    }
  }

  // Experts as they are resident, in waves.
  void compute_demanded(RoutedCall<B>& call, const Routing& routing, const Next& next,
                        const TensorView& out) {
    if constexpr (RoutedCall<B>::is_deferred)
      if (next.router) call.guess(*next.router);
    const auto& experts = call.experts();
    auto demand = scheduler_->demand(layer_, experts, call.counted(), routing.is_foretold);
    look_ahead(call, routing, next);
    std::vector<ExpertTask> tasks;
    std::optional<Fence> enqueued;  // behind what the call has enqueued so far
    bool is_combined = false;
    for (;;) {
      auto leases = demand.next_ready();
      if (leases.empty()) break;
      tasks.clear();
      Fence arrival;
      for (const auto& lease : leases) {
        arrival.add(lease.arrival());
        tasks.push_back(call.task(lease.id().expert, weights_of(lease)));
      }
      wait(call, arrival, enqueued);
      const double begin = Trace::now();
      call.compute(tasks);
      if (RoutedCall<B>::is_deferred && demand.is_over()) {
        call.combine(out);  // which may read the weights
        is_combined = true;
      }
      enqueued = call.readers();
      for (auto& lease : leases) lease.end_after(*enqueued);
      trace_compute(begin, tasks.size());
    }
    if (!is_combined) call.combine(out);
  }
  void look_ahead(RoutedCall<B>& call, const Routing& routing, const Next& next) {
    std::optional<ConstTensorView> ids;
    if (!next.ids.shape.empty()) ids = next.ids;
    if constexpr (RoutedCall<B>::is_deferred)
      if (next.router) ids = call.guessed();
    if (ids) scheduler_->look_ahead(layer_ + 1, choices_of(*ids, routing.mask, config_.experts));
  }
  // What the call computes from here on comes behind the experts' arrival.
  void wait(RoutedCall<B>& call, const Fence& arrival, const std::optional<Fence>& enqueued) {
    if constexpr (RoutedCall<B>::is_deferred) {
      if (call.is_passed(arrival)) return;
      scheduler_->add_stall(layer_, enqueued ? *enqueued : call.readers(), arrival);
      call.wait(arrival);
    }
  }

  // On a backend that routes by itself, experts that stay need neither leases nor a look at the
  // routing. Whether they do; the turn keeps it so.
  bool find_kept() {
    if constexpr (RoutedCall<B>::is_deferred) {
      if (is_kept()) return true;
      auto& cache = scheduler_->cache();
      const std::lock_guard lock(cache.mutex());
      kept_ = nullptr;
      const std::vector<const std::byte*> slabs = cache.kept_locked(layer_);
      if (slabs.empty()) return false;
      kept_ = ffn_->keep(slabs);
      kept_arena_ = cache.arenas_locked();
      return true;
    } else {
      return false;
    }
  }
  bool is_kept() const {
    auto& cache = scheduler_->cache();
    const std::lock_guard lock(cache.mutex());
    return kept_ && kept_arena_ == cache.arenas_locked();
  }
  void compute_kept(RoutedCall<B>& call) {
    if constexpr (RoutedCall<B>::is_deferred) {
      const double begin = Trace::now();
      call.compute(*kept_);
      trace_compute(begin, static_cast<std::size_t>(config_.experts));
    }
  }
  void trace_compute(double begin, std::size_t experts) {
    const auto bytes = static_cast<std::int64_t>(experts * layout_.slab_bytes);
    scheduler_->trace().add({TraceKind::compute, {layer_, -1}, begin, Trace::now(), bytes, 0});
  }

  // Records the call's routing as what a perfect predictor would have foretold; what padding needs
  // has probability 0. Counts its uses where no demand does.
  Account account(const Routing& routing, bool is_kept) const {
    const std::int64_t pass = scheduler_->recorder().pass();
    return [scheduler = scheduler_.get(), layer = layer_, pass, is_kept,
            predicted = routing.is_foretold](const RoutedTokens& routed) {
      record(*scheduler, layer, pass, routed);
      if (is_kept) count(*scheduler, layer, routed, predicted);
    };
  }
  // The same of every replay of a graph.
  ReplayAccount replay_account() const {
    return [scheduler = scheduler_.get(), layer = layer_](const RoutedTokens& routed,
                                                          std::int64_t pass) {
      record(*scheduler, layer, pass, routed);
      count(*scheduler, layer, routed, false);
    };
  }
  static void record(Scheduler& scheduler, std::int32_t layer, std::int64_t pass,
                     const RoutedTokens& routed) {
    std::vector<float> probs(routed.ids.size());
    for (std::size_t a = 0; a < probs.size(); ++a) probs[a] = routed.is_token(a) ? 1.0f : 0.0f;
    scheduler.recorder().add(pass, layer, routed.tokens, routed.top_k, routed.ids, probs,
                             routed.weights);
  }
  static void count(Scheduler& scheduler, std::int32_t layer, const RoutedTokens& routed,
                    bool predicted) {
    const std::vector<std::int32_t> experts = active_experts(routed);
    scheduler.count_resident(layer, experts, counted(routed, experts), predicted);
  }

  ExpertWeights weights_of(const typename Scheduler::Lease& lease) const {
    if (const std::byte* slab = lease.slab()) return weights_in(layout_, slab);
    ExpertWeights weights;  // in place: the store's own arrays
    const auto& store = static_cast<const ArrayStore&>(scheduler_->cache().store());
    for (const ArrayPart& part : store.parts(lease.id())) {
      if (part.slab_offset == layout_.up_offset) weights.up = part.data;
      if (part.slab_offset == layout_.down_offset) weights.down = part.data;
      if (layout_.up_bias_bytes && part.slab_offset == layout_.up_bias_offset)
        weights.up_bias = part.data;
      if (layout_.down_bias_bytes && part.slab_offset == layout_.down_bias_offset)
        weights.down_bias = part.data;
    }
    return weights;
  }

  // Arrays that are used in place must be the parts that the kernels read, whole.
  void check_arrays() const {
    const auto& store = static_cast<const ArrayStore&>(scheduler_->cache().store());
    const std::pair<std::size_t, std::size_t> expected[] = {
        {layout_.up_offset, layout_.up_bytes},
        {layout_.down_offset, layout_.down_bytes},
        {layout_.up_bias_offset, layout_.up_bias_bytes},
        {layout_.down_bias_offset, layout_.down_bias_bytes}};
    for (std::int32_t expert = 0; expert < config_.experts; ++expert) {
      const auto parts = store.parts({layer_, expert});
      for (const auto& [offset, bytes] : expected) {
        const auto is_whole = [&, offset = offset, bytes = bytes](const ArrayPart& part) {
          return part.slab_offset == offset && part.bytes == bytes;
        };
        SIDA_EXPECTS(bytes == 0 || std::any_of(parts.begin(), parts.end(), is_whole),
                     "OffloadedExperts: to be used in place, layer " + std::to_string(layer_) +
                         "'s expert " + std::to_string(expert) + " needs one array of " +
                         std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
                         " of its slab; join the arrays, or keep fewer than all experts");
      }
    }
  }

  MoeConfig config_;
  SlabLayout layout_;
  std::int32_t layer_;
  std::shared_ptr<Scheduler> scheduler_;
  std::shared_ptr<ExpertFfn<B>> ffn_;
  bool skip_padding_ = false;
  std::optional<NextRouter> next_router_;
  std::shared_ptr<const KeptExperts<B>> kept_;  // where the layer's experts stay
  std::uint64_t kept_arena_ = 0;
};

}  // namespace sida
