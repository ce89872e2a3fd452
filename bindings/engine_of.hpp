// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "process.hpp"
#include "sida/backend/backend.hpp"
#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "sida/ffn/expert_ffn.hpp"
#include "sida/hash/hash_predictor.hpp"
#include "sida/layer/offloaded_experts.hpp"

// What stands behind the interfaces of engine.hpp, for any backend and policy. Each backend's
// module instantiates it; its headers come before this one.
namespace sida::bindings {

/// The number of the GPU that a backend stands for; -1 for none.
template <Backend B>
int cuda_device(const B& backend) noexcept {
  if constexpr (requires { backend.device(); })
    return backend.device();
  else
    return -1;
}

template <Backend B>
std::shared_ptr<ExpertFfn<B>> make_ffn(B& backend, const MoeConfig& config, int threads) {
  if constexpr (std::is_constructible_v<ExpertFfn<B>, B&, const MoeConfig&>)
    return std::make_shared<ExpertFfn<B>>(backend, config);
  else
    return std::make_shared<ExpertFfn<B>>(config, threads);
}

template <Backend B, EvictionPolicy Policy>
class Experts : public AnyExperts {
 public:
  Experts(OffloadedExperts<B, Policy> layer, int device, std::shared_ptr<void> engine)
      : engine_(std::move(engine)), layer_(std::move(layer)), device_(device) {}

  void forward(const ConstTensorView& hidden, const ConstTensorView& ids,
               const ConstTensorView& weights, const TensorView& out,
               const ConstTensorView& next_ids, Stream stream) override {
    const auto turn = here().scheduler().turn();
    follow(stream);
    here().forward(hidden, ids, weights, out, next_ids);
  }
  void set_next_router(NextRouter router) override { here().set_next_router(std::move(router)); }
  void forward_guessing(const ConstTensorView& hidden, const ConstTensorView& ids,
                        const ConstTensorView& weights, const TensorView& out,
                        Stream stream) override {
    const auto turn = here().scheduler().turn();
    follow(stream);
    here().forward_guessing(hidden, ids, weights, out);
  }
  bool wants_look_ahead() const override { return here().wants_look_ahead(); }
  void forward_predicted(const ConstTensorView& hidden, const TensorView& out,
                         Stream stream) override {
    const auto turn = here().scheduler().turn();
    follow(stream);
    here().forward_predicted(hidden, out);
  }
  int cuda_device() const override { return device_; }
  bool has_prediction() const override { return here().has_prediction(); }
  void set_threads(int threads) override {
    if constexpr (requires { here().ffn().set_threads(threads); }) {
      const auto turn = here().scheduler().turn();
      here().ffn().set_threads(threads);
    }
  }
  void load_all() override { here().load_all(); }
  bool may_be_captured() const override { return here().may_be_captured(); }
  std::size_t graph_workspace_bytes(std::int64_t tokens, std::int32_t top_k) const override {
    return here().graph_workspace_bytes(tokens, top_k);
  }
  void capture(const ConstTensorView& hidden, const ConstTensorView& ids,
               const ConstTensorView& weights, const TensorView& out, const TensorView& workspace,
               Stream stream) override {
    here().capture(hidden, ids, weights, out, workspace.data, stream);
  }
  void begin_replays(Stream stream) override { here().begin_replays(stream); }
  void end_replays(Stream stream) override { here().end_replays(stream); }

 private:
  void follow(Stream stream) {
    if constexpr (requires { layer_.ffn().set_stream(stream); }) layer_.ffn().set_stream(stream);
  }

  OffloadedExperts<B, Policy>& here() {
    process_.check();
    return layer_;
  }
  const OffloadedExperts<B, Policy>& here() const {
    process_.check();
    return layer_;
  }

  Process process_;
  std::shared_ptr<void> engine_;  // outlives the layer
  OffloadedExperts<B, Policy> layer_;
  int device_;
};

template <Backend B, EvictionPolicy Policy>
class Scheduler : public AnyScheduler, public std::enable_shared_from_this<Scheduler<B, Policy>> {
 public:
  Scheduler(B& backend, ExpertCache<B, Policy>& cache, const MoeConfig& config,
            const SchedulerOptions& options, std::shared_ptr<void> owner)
      : owner_(std::move(owner)),
        backend_(backend),
        config_(config),
        scheduler_(std::make_shared<OffloadScheduler<B, Policy>>(backend, cache, options)) {}

  const MoeConfig& config() const override { return config_; }
  void start(HashBuilder::Source source, std::size_t ahead) override {
    here().start(std::move(source), ahead);
  }
  bool wait_for_batch(std::chrono::milliseconds longest) override {
    return here().wait_for_batch(longest);
  }
  bool next_batch() override { return here().next_batch(); }
  void stop() override {
    if (process_.is_this()) scheduler_->stop();  // else there is nothing to end
  }
  void begin_pass(std::optional<HashTable> table, std::uint64_t key,
                  std::span<const std::uint8_t> mask) override {
    here().begin_pass(std::move(table), key, mask);
  }
  void set_mask(std::span<const std::uint8_t> mask) override { here().set_mask(mask); }
  void set_key(std::uint64_t key) override { here().set_key(key); }
  void end_pass() override { here().end_pass(); }
  const HashTable* table() const override { return here().table(); }
  std::uint64_t key() const override { return here().key(); }
  CacheStats stats() const override { return here().stats(); }
  void reset_stats() override { here().reset_stats(); }
  std::vector<TraceEvent> trace() override { return here().traced(); }
  HashTable recorded() override { return here().recorded(); }
  RunTimes times() override {
    return run_times(here().traced(), here().layers(), here().cache().slot_bytes());
  }
  void resize(const Budget& budget) override { here().resize(budget); }
  void close() override {
    if (process_.is_this()) scheduler_->close();
  }

  std::shared_ptr<AnyExperts> make_experts(std::int32_t layer, int threads,
                                           bool skip_padding) override {
    {
      const std::lock_guard lock(ffn_mutex_);
      if (!ffn_) ffn_ = make_ffn(backend_, config_, threads);
    }
    OffloadedExperts<B, Policy> experts(config_, layer, scheduler_, ffn_);
    experts.set_skip_padding(skip_padding);
    return std::make_shared<Experts<B, Policy>>(std::move(experts), cuda_device(backend_),
                                                this->shared_from_this());
  }

 private:
  OffloadScheduler<B, Policy>& here() const {
    process_.check();
    return *scheduler_;
  }

  Process process_;
  std::shared_ptr<void> owner_;  // the cache, which outlives the scheduler
  B& backend_;
  MoeConfig config_;
  std::shared_ptr<OffloadScheduler<B, Policy>> scheduler_;
  std::mutex ffn_mutex_;
  std::shared_ptr<ExpertFfn<B>> ffn_;  // shared by the layers
};

template <Backend B, EvictionPolicy Policy>
class Cache : public AnyCache, public std::enable_shared_from_this<Cache<B, Policy>> {
 public:
  /// `slow` has the experts of `store` where the backend copies from.
  Cache(const B& backend, const Store& store, std::shared_ptr<ExpertStore> slow,
        const Budget& budget)
      : store_(store), backend_(backend), cache_(backend_, std::move(slow), budget) {}

  const Store& store() const override { return store_; }
  std::string policy() const override { return std::string(Policy::name()); }
  std::string device() const override {
    const int device = cuda_device(backend_);
    return device < 0 ? "cpu" : "cuda:" + std::to_string(device);
  }
  std::int64_t slots() const override { return cache_.slots(); }
  std::size_t slot_bytes() const override { return cache_.slot_bytes(); }
  std::size_t capacity_bytes() const override { return cache_.capacity_bytes(); }
  bool in_place() const override { return cache_.in_place(); }
  std::vector<ExpertId> resident() const override { return cache_.resident(); }
  void resize(const Budget& budget) override { cache_.resize(budget); }
  std::shared_ptr<AnyScheduler> make_scheduler(const SchedulerOptions& options) override {
    return std::make_shared<Scheduler<B, Policy>>(backend_, cache_, store_.config, options,
                                                  this->shared_from_this());
  }

 private:
  Store store_;
  B backend_;
  ExpertCache<B, Policy> cache_;
};

template <Backend B>
class Predictor : public AnyPredictor {
 public:
  Predictor(HashPredictor<B> predictor, int device)
      : predictor_(std::move(predictor)), device_(device) {}

  HashTable predict(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                    std::uint64_t key, std::int32_t candidates, Stream stream) const override {
    if constexpr (has_streams)
      return here().predict(embeddings, mask, key, candidates, stream);
    else
      return here().predict(embeddings, mask, key, candidates);
  }
  HashTable advance(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                    const ConstTensorView& past, const TensorView& states, std::uint64_t key,
                    std::int32_t candidates, Stream stream) const override {
    if constexpr (has_streams)
      return here().advance(embeddings, mask, past, states, key, candidates, stream);
    else
      return here().advance(embeddings, mask, past, states, key, candidates);
  }
  bool is_causal() const override { return predictor_.is_causal(); }
  std::int64_t state_size() const override { return predictor_.state_size(); }
  const PredictorWeights& weights() const override { return predictor_.weights(); }
  int cuda_device() const override { return device_; }
  std::size_t workspace_bytes() const override {
    if constexpr (has_streams)
      return here().workspace_bytes();
    else
      return 0;
  }

 private:
  static constexpr bool has_streams = requires(const HashPredictor<B>& predictor) {
    predictor.workspace_bytes();
  };

  const HashPredictor<B>& here() const {
    if constexpr (has_streams) process_.check();  // another process has no part of the GPU
    return predictor_;
  }

  Process process_;
  HashPredictor<B> predictor_;
  int device_;
};

template <class T>
struct Type {};

/// Calls `function` with the policy of that name.
template <class F>
auto with_policy(const std::string& name, F&& function) {
  if (name == "lookahead" || name == "auto") return function(Type<LookAheadPolicy>{});
  if (name == "fifo") return function(Type<FifoPolicy>{});
  if (name == "lru") return function(Type<LruPolicy>{});
  if (name == "lfu") return function(Type<LfuPolicy>{});
  throw InvalidArgument("policy: expected fifo, lru, lfu, lookahead or auto, got \"" + name + "\"");
}

}  // namespace sida::bindings
