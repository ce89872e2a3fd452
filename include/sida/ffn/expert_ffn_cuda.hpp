// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "sida/backend/cuda_backend.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/expert_ffn.hpp"
#include "sida/ffn/token_groups.hpp"

namespace sida {

/// Experts on a GPU: f32, f16 and bf16 with f32 sums, on hand-written kernels. Link sida::cuda.
///
/// Work is enqueued on one stream, the FFN's own or the one of set_stream(). Any thread may call,
/// one call at a time (the caller locks); the backend must outlive it. Buffers grow to the largest
/// call so far and are kept.
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
  /// is the legacy default stream.
  void set_stream(CUstream_st* stream);
  /// The stream in whose order `hidden` is read and `out` is written.
  CUstream_st* stream() const noexcept;

  /// Begins a layer call. `hidden` ([T, H], config's dtype) lies on the GPU and is read, in the
  /// order of the stream, until combine(). A call that was not combined is dropped.
  /// @throws InvalidArgument where hidden, groups and config disagree; OutOfMemory; CudaError.
  void begin(const ConstTensorView& hidden, const TokenGroups& groups);

  /// Computes the tasks, each all rows of one expert whose slab lies whole, in the order of
  /// SlabLayout, on the GPU; slabs of one call lie multiples of slab_bytes apart, as in a cache.
  /// Returns when the weights are no longer needed.
  /// @throws StateError outside a call; InvalidArgument for other tasks; CudaError.
  void compute(std::span<const ExpertTask> tasks);

  /// Ends the call: out[t] = Σ_j weights[t, j] * result(t, j), j ascending, summed in f32, rounded
  /// once; written in the order of the stream. Tokens without an assignment come out as zeros.
  ///
  /// weights: [T, k] as given to group_tokens, in host memory, not needed once it returns; out:
  /// [T, H] of config's dtype on the GPU.
  /// @throws StateError while rows are missing; InvalidArgument for shapes and dtypes; CudaError.
  void combine(const ConstTensorView& weights, const TensorView& out);

  const MoeConfig& config() const noexcept;
  /// Bytes of the GPU's memory held now.
  std::size_t workspace_bytes() const noexcept;

 private:
  class Call;
  std::unique_ptr<Call> call_;
};

}  // namespace sida
