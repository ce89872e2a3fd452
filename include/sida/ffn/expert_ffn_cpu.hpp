// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "sida/backend/cpu/isa.hpp"
#include "sida/backend/cpu_backend.hpp"
#include "sida/core/error.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/cpu/ffn_call.hpp"
#include "sida/ffn/cpu/thread_pool.hpp"
#include "sida/ffn/expert_ffn.hpp"
#include "sida/ffn/token_groups.hpp"

namespace sida {

/// Experts on the CPU: f32, f16 and bf16 storage with f32 sums, f64 in f64, on a thread pool of its
/// own whose threads sleep between calls.
///
/// Any thread may call, one call at a time (the caller locks). With Isa::avx512_bf16 and amx_bf16,
/// bf16 rows and intermediate rows stay bf16; else they are widened to f32. A row's bits depend
/// only on dtype, shape and instruction set, not even on the other rows of its expert. Between
/// calls at most 64 MiB of buffers are kept; during one, the call's results take 4 bytes (f64: 8)
/// times rows times H, its inputs as much as `hidden` or twice that, the intermediate rows at most
/// 8 MiB (or 16 rows); Isa::amx_bf16 keeps the inputs of these rows once more.
template <>
class ExpertFfn<CpuBackend> {
 public:
  /// `threads` counts the caller's. @throws InvalidArgument for a config that cannot be right,
  /// fewer than one thread, an instruction set that this processor lacks.
  explicit ExpertFfn(const MoeConfig& config, int threads, Isa isa = best_isa())
      : config_(config), isa_(isa), pool_(std::make_unique<ThreadPool>(threads)) {
    validate(config);
    expect_runs(isa);
    call_ = make_call();
  }

  /// Begins a layer call: takes over the rows of `hidden` ([T, H], config's dtype), so that neither
  /// argument is needed once it returns. A call that was not combined is dropped.
  /// @throws InvalidArgument where hidden, groups and config disagree; OutOfMemory.
  void begin(const ConstTensorView& hidden, const TokenGroups& groups) {
    check_tokens(hidden.shape, hidden.type, groups.tokens, "hidden states", hidden.describe());
    in_call_ = false;
    pool_->wake();
    call_->begin(hidden, groups, *pool_);
    tokens_ = groups.tokens;
    top_k_ = groups.top_k;
    rows_ = groups.rows();
    computed_ = 0;
    in_call_ = true;
  }

  /// Computes the tasks' rows; returns when the weights are no longer needed. Over a call, every
  /// row of the groups is to be in one task.
  /// @throws StateError outside a call; InvalidArgument for rows outside it or missing weights.
  void compute(std::span<const ExpertTask> tasks) {
    expect_call("compute");
    std::int64_t rows = 0;
    for (const ExpertTask& task : tasks) {
      check(task);
      rows += task.row_end - task.row_begin;
    }
    SIDA_EXPECTS(computed_ + rows <= rows_, "compute: expected each of the call's " +
                                                std::to_string(rows_) + " rows once, got " +
                                                std::to_string(computed_ + rows));
    call_->compute(tasks, *pool_);
    computed_ += rows;
  }

  /// Ends the call: out[t] = Σ_j weights[t, j] * result(t, j), j ascending, summed in f32 (f64 for
  /// f64), then rounded. Tokens without an assignment come out as zeros.
  ///
  /// weights: [T, k] as given to group_tokens; out: [T, H] of config's dtype, written whole.
  /// @throws StateError while rows are missing; InvalidArgument for shapes and dtypes.
  void combine(const ConstTensorView& weights, const TensorView& out) {
    expect_call("combine");
    if (computed_ != rows_)
      throw StateError("combine: expected all " + std::to_string(rows_) +
                       " rows of the call to be computed, got " + std::to_string(computed_));
    SIDA_EXPECTS(weights.shape.size() == 2 && weights.shape[0] == tokens_ &&
                     weights.shape[1] == top_k_ && weights.type <= DataType::f64,
                 "expert weights: expected [" + std::to_string(tokens_) + ", " +
                     std::to_string(top_k_) + "] in a floating-point dtype, got " +
                     weights.describe());
    check_tokens(out.shape, out.type, tokens_, "out", out.describe());
    in_call_ = false;
    call_->combine(weights, out, *pool_);
  }

  int threads() const noexcept { return pool_->threads(); }
  /// Takes effect at the next call of any method; not to be called during one.
  /// @throws InvalidArgument for fewer than one.
  void set_threads(int threads) {
    if (threads != pool_->threads()) pool_ = std::make_unique<ThreadPool>(threads);
  }

  Isa isa() const noexcept { return isa_; }
  const MoeConfig& config() const noexcept { return config_; }
  /// Bytes of buffers held now.
  std::size_t workspace_bytes() const noexcept { return call_->workspace_bytes(); }

 private:
  std::unique_ptr<detail::FfnCall> make_call() const {
    using namespace detail;
    if (config_.dtype == DataType::f64)
      return std::make_unique<FfnCallOf<double, double>>(config_, f64_kernels());
    if (has_bf16_products(config_.dtype, isa_))
      return std::make_unique<FfnCallOf<BFloat16, float>>(config_, bf16_kernels(isa_));
    return std::make_unique<FfnCallOf<float, float>>(config_, f32_kernels(config_.dtype, isa_));
  }

  void check_tokens(const std::vector<std::int64_t>& shape, DataType type, std::int64_t tokens,
                    const char* name, const std::string& got) const {
    SIDA_EXPECTS(shape.size() == 2 && shape[0] == tokens && shape[1] == config_.hidden_size &&
                     type == config_.dtype,
                 std::string(name) + ": expected [" + std::to_string(tokens) + ", " +
                     std::to_string(config_.hidden_size) + "] " +
                     std::string(name_of(config_.dtype)) + ", got " + got);
  }

  void expect_call(const char* method) const {
    if (!in_call_) throw StateError(std::string(method) + ": expected a call of begin() before it");
  }

  void check(const ExpertTask& task) const {
    SIDA_EXPECTS(0 <= task.row_begin && task.row_begin <= task.row_end && task.row_end <= rows_,
                 "compute: expected rows within [0, " + std::to_string(rows_) + "], got [" +
                     std::to_string(task.row_begin) + ", " + std::to_string(task.row_end) + ")");
    const ExpertWeights& weights = task.weights;
    SIDA_EXPECTS(weights.up && weights.down, "compute: expected up and down weights, got null");
    SIDA_EXPECTS(!weights.up_bias == !config_.up_bias && !weights.down_bias == !config_.down_bias,
                 "compute: expected biases where the config has them, and only there");
  }

  MoeConfig config_;
  Isa isa_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<detail::FfnCall> call_;
  bool in_call_ = false;
  std::int64_t tokens_ = 0, top_k_ = 1, rows_ = 0, computed_ = 0;
};

}  // namespace sida
