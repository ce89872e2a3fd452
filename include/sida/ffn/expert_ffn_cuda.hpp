// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "sida/backend/cuda_backend.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/expert_ffn.hpp"
#include "sida/ffn/next_router.hpp"
#include "sida/ffn/routed_call.hpp"

namespace sida {

/// Where all experts of a layer lie on the GPU, in its own memory. Made by ExpertFfn::keep().
template <>
class KeptExperts<CudaBackend>;

/// Experts on a GPU: f32, f16 and bf16 with f32 sums, on hand-written kernels. Link sida::cuda.
///
/// Work is enqueued on one stream, the FFN's own or the one of set_stream(), and the routing stays
/// on the GPU: begin(), compute() and combine() do not wait for it. Any thread may call, one call
/// at a time (the caller locks; settle() locks by itself); the backend must outlive it. Buffers
/// grow to the largest call so far and are kept; beside them there is pinned memory for the routing
/// of the latest calls, which the GPU writes and the host reads when it is there.
template <>
class ExpertFfn<CudaBackend> {
 public:
  /// @throws InvalidArgument for a config that cannot be right or that no kernel computes: f64,
  /// more than 512 experts, top_k above 16; CudaError.
  ExpertFfn(CudaBackend& backend, const MoeConfig& config);
  ExpertFfn(const ExpertFfn&) = delete;
  ExpertFfn& operator=(const ExpertFfn&) = delete;
  ~ExpertFfn();

  /// From the next begin() on, work goes to this stream of the caller's, who keeps it alive; null
  /// is the legacy default stream. Work on the former stream comes first.
  void set_stream(CUstream_st* stream);
  /// The stream in whose order `hidden`, ids and weights are read and `out` is written.
  CUstream_st* stream() const noexcept;

  /// Begins a layer call. `hidden` ([T, H], config's dtype), ids and weights (f32, f16 or bf16) lie
  /// on the GPU and are read, in the order of the stream, until combine(); of foretold routing, in
  /// RAM, a copy is taken. `account` is called when the routing is in RAM, by a later begin() or by
  /// settle(). A call that was not combined is dropped.
  ///
  /// Ids from 0 to E - 1 are experts; E is none, and is left out. Any other touches no memory: it
  /// is left out, and raised by experts(), or by a later begin() or settle() as OutOfRange.
  /// @throws InvalidArgument where hidden and routing disagree with each other or the config;
  /// OutOfRange for an earlier call's id; OutOfMemory; CudaError.
  void begin(const ConstTensorView& hidden, const Routing& routing, Account account);

  /// Has the call's experts() also ask what the next layer's router would choose on `hidden`: one
  /// kernel, which runs while the host deals with what experts() gave. Nothing where the call has
  /// more than 32 tokens, or foretold routing. `router` is read in the order of the stream.
  /// @throws StateError outside a call.
  void guess(const NextRouter& router);
  /// That guess, [T, k] i32 in RAM until the next call's; nothing where none was made, or where it
  /// is not there some microseconds after it should be.
  std::optional<ConstTensorView> guessed();

  /// The call's active experts, ascending: one small copy from the GPU, which is waited for; none
  /// where routing was foretold. @throws StateError outside a call; OutOfRange, which drops the
  /// call; CudaError.
  const std::vector<std::int32_t>& experts();
  /// For each of experts(), which is to be called before, whether a token that is no padding needs
  /// it; empty without a mask.
  std::vector<std::uint8_t> counted() const;

  /// Computes the tasks, each of one expert whose slab lies whole, in the order of SlabLayout, on
  /// the GPU; slabs of one call lie multiples of slab_bytes apart, as in a cache. The weights are
  /// read in the order of the stream; where the tasks are all of the call's, by combine() at last.
  /// @throws StateError outside a call; InvalidArgument; CudaError.
  void compute(std::span<const ExpertTask> tasks);
  /// Whether the fence's work is done. @throws CudaError.
  bool is_passed(const CudaBackend::Fence& fence) const;
  /// What is enqueued from here on comes behind the fence. @throws CudaError.
  void wait(const CudaBackend::Fence& arrival);
  /// Behind all that is enqueued so far: the weights are no longer needed. @throws CudaError.
  CudaBackend::Fence readers();

  /// Notes where the slabs of all experts of a layer lie, for compute(). @throws as compute().
  std::shared_ptr<const KeptExperts<CudaBackend>> keep(std::span<const std::byte* const> slabs);
  /// Computes all experts of the call, without waiting. The weights are read in the order of the
  /// stream. @throws StateError outside a call; CudaError.
  void compute(const KeptExperts<CudaBackend>& kept);

  /// Ends the call: out[t] = Σ_j weights[t, j] * result(t, j), j ascending, summed in f32, rounded
  /// once; written in the order of the stream. Tokens without an assignment come out as zeros.
  ///
  /// out: [T, H] of config's dtype on the GPU. Every active expert must have been computed.
  /// @throws StateError outside a call; InvalidArgument for shape and dtype; CudaError.
  void combine(const TensorView& out);

  /// Waits for all that is enqueued so far. @throws CudaError.
  void synchronize();

  /// Bytes of the GPU's memory that capture() needs for a call of `tokens` with `top_k` choices.
  std::size_t graph_workspace_bytes(std::int64_t tokens, std::int32_t top_k) const;
  /// A whole call for a CUDA graph: enqueues it on `stream`, which is being captured, and nothing
  /// else. Every replay reads hidden states, ids and weights, and writes `out`, where they lie now;
  /// `kept` and the graph's `workspace`, of graph_workspace_bytes() aligned to 256, are there as
  /// long as it may be replayed. Replays come between begin_replays() and end_replays(), each call
  /// once at most; `account` is told of every one.
  /// @throws as begin() and compute().
  void capture(const ConstTensorView& hidden, const Routing& routing,
               const KeptExperts<CudaBackend>& kept, const TensorView& out, std::byte* workspace,
               CUstream_st* stream, ReplayAccount account);
  /// What comes on `stream` from here on may replay graphs: waits for the replays before the latest
  /// end_replays(). @throws OutOfRange for an id in one of them, CudaError.
  void begin_replays(CUstream_st* stream);
  /// The replays on `stream` were those of `pass`; `mask` is as in RoutedTokens. @throws CudaError.
  void end_replays(CUstream_st* stream, std::int64_t pass, std::span<const std::uint8_t> mask);

  /// Waits for all calls that were combined, and for all replays that have ended, and accounts for
  /// them. From any thread. @throws OutOfRange for an id in one of them, CudaError.
  void settle();

  const MoeConfig& config() const noexcept;
  /// Bytes of the GPU's memory held now.
  std::size_t workspace_bytes() const noexcept;

 private:
  class Call;
  std::unique_ptr<Call> call_;
};

/// On the GPU a call needs its routing in RAM only where experts are to be brought.
template <>
class RoutedCall<CudaBackend> {
 public:
  static constexpr bool is_deferred = true;

  /// @throws as ExpertFfn::begin().
  RoutedCall(ExpertFfn<CudaBackend>& ffn, const ConstTensorView& hidden, const Routing& routing,
             Account account)
      : ffn_(ffn) {
    ffn_.begin(hidden, routing, std::move(account));
  }
  RoutedCall(const RoutedCall&) = delete;
  RoutedCall& operator=(const RoutedCall&) = delete;

  void guess(const NextRouter& router) { ffn_.guess(router); }
  std::optional<ConstTensorView> guessed() { return ffn_.guessed(); }
  const std::vector<std::int32_t>& experts() { return ffn_.experts(); }
  std::vector<std::uint8_t> counted() const { return ffn_.counted(); }
  ExpertTask task(std::int32_t expert, const ExpertWeights& weights) const {
    return {weights, 0, 0, expert};
  }
  bool is_passed(const CudaBackend::Fence& fence) const { return ffn_.is_passed(fence); }
  void wait(const CudaBackend::Fence& arrival) { ffn_.wait(arrival); }
  void compute(std::span<const ExpertTask> tasks) { ffn_.compute(tasks); }
  CudaBackend::Fence readers() { return ffn_.readers(); }
  void compute(const KeptExperts<CudaBackend>& kept) { ffn_.compute(kept); }
  void combine(const TensorView& out) { ffn_.combine(out); }

 private:
  ExpertFfn<CudaBackend>& ffn_;
};

}  // namespace sida
