// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "device_scope.hpp"
#include "guess.hpp"
#include "launched.hpp"
#include "layer_shape.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/backend/cuda_backend.hpp"
#include "sida/ffn/next_router.hpp"

namespace sida::cuda {

/// What the next layer's router would choose, asked for by one kernel and read without an event:
/// the host sees the ids come.
class NextGuess {
 public:
  /// `zeros`, guess_bytes() on the GPU, outlives this.
  NextGuess(CudaBackend& backend, std::byte* zeros)
      : scratch_(zeros), ids_(backend, places * most_ids * sizeof(std::int32_t)) {}

  /// Enqueues the kernel, for at most most_guessing_tokens tokens. @throws CudaError.
  void ask(const LayerShape& shape, const std::byte* hidden, const NextRouter& router,
           CUstream_st* stream) {
    // Not the place of the guess before, which may yet come.
    at_ = (at_ + 1) % places;
    tokens_ = shape.tokens;
    top_k_ = std::min(router.top_k, max_top_k);
    std::fill_n(ids(), count(), not_there);
    RouterWeights weights;
    weights.weight = router.weight.data;
    weights.weight_type = kernel_type(router.weight.type);
    weights.bias = floats(router.bias);
    weights.correction = floats(router.correction);
    weights.experts = shape.experts;
    weights.top_k = top_k_;
    launched([&] {
      guess_choices(shape.dtype, shape.tokens, shape.hidden, hidden, weights, scratch_, ids(),
                    stream);
    });
    is_asked_ = true;
  }
  /// Drops what was asked for.
  void forget() noexcept { is_asked_ = false; }

  /// The ids [T, k], once; waits for them as long as it takes what is asked for in time.
  std::optional<ConstTensorView> take() {
    using Clock = std::chrono::steady_clock;
    if (!is_asked_) return std::nullopt;
    is_asked_ = false;
    const auto end = Clock::now() + std::chrono::microseconds(20);
    while (!is_there())
      if (Clock::now() > end) return std::nullopt;
    return ConstTensorView{
        reinterpret_cast<const std::byte*>(ids()), DataType::i32, {tokens_, top_k_}};
  }

 private:
  static constexpr std::size_t places = 4;
  static constexpr std::size_t most_ids = std::size_t{most_guessing_tokens} * max_top_k;
  static constexpr std::int32_t not_there = -2;

  static const float* floats(const ConstTensorView& view) {
    return view.shape.empty() ? nullptr : reinterpret_cast<const float*>(view.data);
  }
  std::int32_t* ids() const {
    return reinterpret_cast<std::int32_t*>(ids_.data()) + at_ * most_ids;
  }
  std::size_t count() const {
    return static_cast<std::size_t>(tokens_) * static_cast<std::size_t>(top_k_);
  }
  bool is_there() const {
    for (std::size_t i = 0; i < count(); ++i)
      if (std::atomic_ref(ids()[i]).load(std::memory_order_acquire) == not_there) return false;
    return true;
  }

  std::byte* scratch_;
  PinnedBuffer ids_;
  std::size_t at_ = 0;
  int tokens_ = 0;
  std::int32_t top_k_ = 1;
  bool is_asked_ = false;
};

}  // namespace sida::cuda
