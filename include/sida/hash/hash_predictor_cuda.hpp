// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "sida/backend/cuda_backend.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/hash/hash_predictor.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/hash/predictor_weights.hpp"

namespace sida {

/// The predictor on a GPU, in f32, with the contract of the CPU's and its numbers to 1e-4. Link
/// sida::cuda.
///
/// Works on a stream of its own and waits for that alone. Thread-safe: calls take turns; copies
/// share weights and memory. Arrays may lie in RAM, pinned or not, or on the GPU, where they are
/// read and written in place. Tables are the same whatever the batch around a sentence.
///
/// Beside the weights it holds memory for 4096 tokens, or one sentence if that is longer, for the
/// states of 16384 earlier tokens in advance(), and at most 32 MiB for attention: with a hidden
/// size of 256 some 10 KiB a token and 5 KiB a state. It grows to the largest call so far and is
/// kept.
template <>
class HashPredictor<CudaBackend> {
 public:
  /// @throws InvalidArgument for weights that the CPU's refuses, and for an LSTM whose hidden_size
  /// is more than the GPU has room for; OutOfMemory; CudaError.
  HashPredictor(const CudaBackend& backend, PredictorWeights weights);

  /// Hash table of one batch, see HashPredictor<CpuBackend>. What lies on the GPU is read in the
  /// order of `stream`, the caller's; null is the legacy default stream.
  /// @throws InvalidArgument for other shapes or dtypes; OutOfMemory; CudaError.
  HashTable predict(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                    std::uint64_t key, std::int32_t max_candidates = 8,
                    CUstream_st* stream = nullptr) const;

  /// Whether advance() can go on: what is foretold of a token depends on none that follows.
  bool is_causal() const noexcept;
  /// Floats of a token's state; 0 where what is foretold of a token depends on it alone.
  std::int64_t state_size() const noexcept;

  /// As predict(), for the latest tokens of sentences that began earlier, see
  /// HashPredictor<CpuBackend>. `states` are there when it returns.
  /// @throws as predict(), and InvalidArgument for kinds that are not causal.
  HashTable advance(const ConstTensorView& embeddings, std::span<const std::uint8_t> mask,
                    const ConstTensorView& past, const TensorView& states, std::uint64_t key,
                    std::int32_t max_candidates = 8, CUstream_st* stream = nullptr) const;

  const PredictorWeights& weights() const noexcept;
  /// Bytes of the GPU's memory held now, weights among them.
  std::size_t workspace_bytes() const;

 private:
  class Parts;
  std::shared_ptr<Parts> parts_;
};

}  // namespace sida
