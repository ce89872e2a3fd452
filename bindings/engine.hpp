// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "place.hpp"
#include "sida/cache/array_store.hpp"
#include "sida/cache/budget.hpp"
#include "sida/cache/cache_stats.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/fill_slabs.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/next_router.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/hash/predictor_weights.hpp"
#include "sida/schedule/offload_scheduler.hpp"
#include "sida/schedule/replay.hpp"
#include "sida/schedule/run_times.hpp"

namespace sida::bindings {

// Cache, scheduler, layer and predictor behind interfaces: Python picks backend and policy by
// argument, C++ at compile time. engine_of.hpp has what stands behind the interfaces, engine.cpp
// and cuda/ its instantiations.

/// What Python calls an ExpertStore: a store, and what its slabs mean.
struct Store {
  std::shared_ptr<ExpertStore> store;
  MoeConfig config;
  std::vector<std::string> layer_names;
  std::string layout;              ///< of the tensors that slabs are read from
  std::uint64_t stored_bytes = 0;  ///< that all experts take where they are read from
};

/// Bytes that all experts take as slabs.
inline std::uint64_t bytes_of_slabs(const MoeConfig& config) {
  return static_cast<std::uint64_t>(config.total_experts()) * SlabLayout(config).slab_bytes;
}

class AnyExperts {
 public:
  virtual ~AnyExperts() = default;
  virtual void forward(const ConstTensorView& hidden, const ConstTensorView& ids,
                       const ConstTensorView& weights, const TensorView& out,
                       const ConstTensorView& next_ids, Stream stream) = 0;
  virtual void set_next_router(NextRouter router) = 0;
  virtual void forward_guessing(const ConstTensorView& hidden, const ConstTensorView& ids,
                                const ConstTensorView& weights, const TensorView& out,
                                Stream stream) = 0;
  virtual bool wants_look_ahead() const = 0;
  virtual void forward_predicted(const ConstTensorView& hidden, const TensorView& out,
                                 Stream stream) = 0;
  /// The GPU that arrays are to be on; -1: in RAM.
  virtual int cuda_device() const = 0;
  virtual bool has_prediction() const = 0;
  virtual void set_threads(int threads) = 0;
  virtual void load_all() = 0;
  // For CUDA graphs; see OffloadedExperts.
  virtual bool may_be_captured() const = 0;
  virtual std::size_t graph_workspace_bytes(std::int64_t tokens, std::int32_t top_k) const = 0;
  virtual void capture(const ConstTensorView& hidden, const ConstTensorView& ids,
                       const ConstTensorView& weights, const TensorView& out,
                       const TensorView& workspace, Stream stream) = 0;
  virtual void begin_replays(Stream stream) = 0;
  virtual void end_replays(Stream stream) = 0;
};

class AnyScheduler {
 public:
  virtual ~AnyScheduler() = default;
  virtual const MoeConfig& config() const = 0;
  virtual void start(HashBuilder::Source source, std::size_t ahead) = 0;
  virtual bool wait_for_batch(std::chrono::milliseconds longest) = 0;
  virtual bool next_batch() = 0;
  virtual void stop() = 0;
  virtual void begin_pass(std::optional<HashTable> table, std::uint64_t key,
                          std::span<const std::uint8_t> mask) = 0;
  virtual void set_mask(std::span<const std::uint8_t> mask) = 0;
  virtual void set_key(std::uint64_t key) = 0;
  virtual void end_pass() = 0;
  virtual const HashTable* table() const = 0;
  virtual std::uint64_t key() const = 0;
  virtual CacheStats stats() const = 0;
  virtual void reset_stats() = 0;
  virtual std::vector<TraceEvent> trace() = 0;
  virtual HashTable recorded() = 0;
  virtual RunTimes times() = 0;
  virtual void resize(const Budget& budget) = 0;
  virtual void close() = 0;
  virtual std::shared_ptr<AnyExperts> make_experts(std::int32_t layer, int threads,
                                                   bool skip_padding) = 0;
};

class AnyCache {
 public:
  virtual ~AnyCache() = default;
  virtual const Store& store() const = 0;
  virtual std::string policy() const = 0;
  virtual std::string device() const = 0;
  virtual std::int64_t slots() const = 0;
  virtual std::size_t slot_bytes() const = 0;
  virtual std::size_t capacity_bytes() const = 0;
  virtual bool in_place() const = 0;
  virtual std::vector<ExpertId> resident() const = 0;
  virtual void resize(const Budget& budget) = 0;
  virtual std::shared_ptr<AnyScheduler> make_scheduler(const SchedulerOptions& options) = 0;
};

class AnyPredictor {
 public:
  virtual ~AnyPredictor() = default;
  virtual HashTable predict(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                            std::uint64_t key, std::int32_t candidates, Stream stream) const = 0;
  virtual HashTable advance(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                            const ConstTensorView& past, const TensorView& states,
                            std::uint64_t key, std::int32_t candidates, Stream stream) const = 0;
  virtual bool is_causal() const = 0;
  virtual std::int64_t state_size() const = 0;
  virtual const PredictorWeights& weights() const = 0;
  /// The GPU that arrays may be on; -1: in RAM alone.
  virtual int cuda_device() const = 0;
  /// Of the GPU's memory.
  virtual std::size_t workspace_bytes() const = 0;
};

/// @throws InvalidArgument for other names than fifo, lru, lfu, lookahead and auto, and as replay.
ReplayResult replay(const std::string& policy, const HashTable& routing, const HashTable& foretold,
                    const ReplayOptions& options);

/// A cache in RAM. `policy`: fifo, lru, lfu, lookahead or auto.
/// @throws InvalidArgument for other names, and as ExpertCache.
std::shared_ptr<AnyCache> make_cpu_cache(const Store& store, const Budget& budget,
                                         const std::string& policy);

/// @throws as HashPredictor.
std::shared_ptr<AnyPredictor> make_cpu_predictor(PredictorWeights weights);

/// See PinnedLayers.
class AnyPinnedLayers {
 public:
  virtual ~AnyPinnedLayers() = default;
  virtual const Store& store() const = 0;
  virtual void take(std::span<const std::vector<ArrayPart>> parts) = 0;
  virtual void give_back(std::int32_t layer, std::span<const std::vector<ArrayPart>> parts) = 0;
};

/// What sida._core reaches sida._cuda through.
struct CudaPart {
  /// A cache on a GPU, of experts in at most `host_bytes` of pinned memory (by default nine tenths
  /// of the RAM), whose filling is reported. @throws as make_cpu_cache, CudaError, what `report`
  /// throws.
  std::shared_ptr<AnyCache> (*make_cache)(const Store& store, const Budget& budget,
                                          const std::string& policy, const std::string& device,
                                          std::optional<std::size_t> host_bytes,
                                          const FillReport& report);
  /// Pinned memory for experts that are taken layer by layer. @throws CudaError.
  std::shared_ptr<AnyPinnedLayers> (*pin_layers)(const MoeConfig& config,
                                                 const std::string& device);
  /// @throws as HashPredictor.
  std::shared_ptr<AnyPredictor> (*make_predictor)(PredictorWeights weights,
                                                  const std::string& device);
  /// @throws InvalidArgument, CudaError unless there is a GPU of this name.
  void (*check)(const std::string& device);
};

/// @throws CudaError where sida._cuda was not built, or cannot be loaded. Needs the GIL.
const CudaPart& cuda_part();

}  // namespace sida::bindings
