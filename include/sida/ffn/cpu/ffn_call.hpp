// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sida/core/moe_config.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/ffn/cpu/convert.hpp"
#include "sida/ffn/cpu/ffn_kernels.hpp"
#include "sida/ffn/cpu/row_buffer.hpp"
#include "sida/ffn/cpu/thread_pool.hpp"
#include "sida/ffn/expert_ffn.hpp"
#include "sida/ffn/token_groups.hpp"

namespace sida::detail {

/// One layer call at a time, on kernels of some type: what ExpertFfn<CpuBackend> hands on to once
/// the arguments are checked.
class FfnCall {
 public:
  FfnCall() = default;
  FfnCall(const FfnCall&) = delete;
  FfnCall& operator=(const FfnCall&) = delete;
  virtual ~FfnCall() = default;

  virtual void begin(const ConstTensorView& hidden, const TokenGroups& groups,
                     ThreadPool& pool) = 0;
  virtual void compute(std::span<const ExpertTask> tasks, ThreadPool& pool) = 0;
  virtual void combine(const ConstTensorView& weights, const TensorView& out, ThreadPool& pool) = 0;
  virtual std::size_t workspace_bytes() const noexcept = 0;
};

/// Bytes of buffers that an object keeps between calls; larger ones are given back.
inline constexpr std::size_t kept_workspace_bytes = std::size_t{64} << 20;

/// Bytes of intermediate rows that exist at once (or 16 rows, where these are more).
inline constexpr std::int64_t intermediate_bytes = std::int64_t{8} << 20;

/// A call whose rows are held as `Input` and whose sums are `Real`.
///
/// Work is cut into (expert, block of output columns), first all of up, then all of down, so that
/// one expert with many rows and many experts with one row both occupy every thread.
template <class Input, class Real>
class FfnCallOf final : public FfnCall {
 public:
  FfnCallOf(const MoeConfig& config, FfnKernels<Input, Real> kernels)
      : config_(config),
        kernels_(kernels),
        hidden_(config.hidden_size),
        intermediate_(config.intermediate_size),
        element_(static_cast<std::int64_t>(size_of(config.dtype))) {}

  void begin(const ConstTensorView& hidden, const TokenGroups& groups, ThreadPool& pool) override {
    top_k_ = groups.top_k;
    order_ = groups.order;
    row_of_ = groups.row_of;
    inputs_.resize(groups.tokens, padded(hidden_));
    results_.resize(groups.rows(), hidden_);
    for_each_token(groups.tokens, pool, [&](std::int64_t token) {
      Input* row = inputs_.row(token);
      read_row(hidden.data + token * hidden_ * element_, config_.dtype, row, hidden_);
      std::fill(row + hidden_, row + padded(hidden_), Input{});
    });
  }

  void compute(std::span<const ExpertTask> tasks, ThreadPool& pool) override {
    const std::int64_t row_bytes = padded(intermediate_) * static_cast<std::int64_t>(sizeof(Input));
    const std::int64_t capacity =
        std::max<std::int64_t>(packed_rows, intermediate_bytes / row_bytes);
    std::int64_t filled = 0;
    for (const ExpertTask& task : tasks) {
      for (std::int64_t row = task.row_begin; row < task.row_end;) {
        const std::int64_t left = task.row_end - row;
        if (filled > 0 && filled + std::min(left, capacity) > capacity) flush(filled, pool);
        const std::int64_t taken = std::min(left, capacity);
        pieces_.push_back({task.weights, row, taken, filled});
        filled += taken;
        row += taken;
      }
    }
    flush(filled, pool);
  }

  void combine(const ConstTensorView& weights, const TensorView& out, ThreadPool& pool) override {
    for_each_token(out.shape[0], pool,
                   [&](std::int64_t token) { combine_token(token, weights, out); });
    if (workspace_bytes() > kept_workspace_bytes) {
      inputs_.release();
      packed_inputs_.release();
      results_.release();
      intermediates_.release();
    }
  }

  std::size_t workspace_bytes() const noexcept override {
    return inputs_.bytes() + packed_inputs_.bytes() + results_.bytes() + intermediates_.bytes();
  }

 private:
  static constexpr std::int64_t block_columns = 32;  // outputs of one unit of work
  static constexpr std::int64_t max_block_rows = 6 * packed_rows;
  using Block = Real[max_block_rows * block_columns];

  /// Rows of one expert whose intermediate rows are in memory together.
  struct Piece {
    ExpertWeights weights;
    std::int64_t row;  // first row of the sorted order
    std::int64_t rows;
    std::int64_t intermediate;  // where its intermediate rows begin
  };

  /// Rows that are packed together: from row `row` of the sorted order, to row `packed`.
  struct PackedGroup {
    std::int64_t row, rows, packed;
  };

  static constexpr std::int64_t padded(std::int64_t count) {
    return (count + input_padding - 1) / input_padding * input_padding;
  }
  static constexpr std::int64_t blocks(std::int64_t columns) {
    return (columns + block_columns - 1) / block_columns;
  }

  template <class Body>
  static void for_each_token(std::int64_t tokens, ThreadPool& pool, const Body& body) {
    constexpr std::int64_t share = 16;
    pool.run((tokens + share - 1) / share, [&](std::int64_t i) {
      for (std::int64_t t = i * share; t < std::min(tokens, (i + 1) * share); ++t) body(t);
    });
  }

  /// Computes the pieces collected so far.
  void flush(std::int64_t& filled, ThreadPool& pool) {
    intermediates_.resize(filled, padded(intermediate_));
    if (kernels_.pack) pack_inputs(filled, pool);
    const auto pieces = static_cast<std::int64_t>(pieces_.size());
    const std::int64_t up_blocks = blocks(intermediate_), down_blocks = blocks(hidden_);
    const auto piece = [&](std::int64_t i) -> const Piece& {
      return pieces_[static_cast<std::size_t>(i)];
    };
    pool.run(pieces * up_blocks, [&](std::int64_t i) {
      compute_up(piece(i / up_blocks), i % up_blocks * block_columns);
    });
    pool.run(pieces * down_blocks, [&](std::int64_t i) {
      compute_down(piece(i / down_blocks), i % down_blocks * block_columns);
    });
    pieces_.clear();
    filled = 0;
  }

  /// The pieces' input rows, packed, in the order of their intermediate rows.
  void pack_inputs(std::int64_t filled, ThreadPool& pool) {
    packed_inputs_.resize(filled, padded(hidden_));
    groups_.clear();
    for (const Piece& piece : pieces_)
      for (std::int64_t r = 0; r < piece.rows; r += packed_rows)
        groups_.push_back(
            {piece.row + r, std::min(packed_rows, piece.rows - r), piece.intermediate + r});
    pool.run(static_cast<std::int64_t>(groups_.size()), [&](std::int64_t i) {
      const PackedGroup& group = groups_[static_cast<std::size_t>(i)];
      const Input* rows[packed_rows];
      for (std::int64_t r = 0; r < group.rows; ++r) rows[r] = input_row(group.row + r);
      kernels_.pack(rows, group.rows, padded(hidden_), packed_inputs_.row(group.packed));
    });
  }

  const Input* input_row(std::int64_t row) const {
    return inputs_.row(order_[static_cast<std::size_t>(row)] / top_k_);
  }

  /// Intermediate columns [column, column + block_columns) of a piece's rows.
  void compute_up(const Piece& piece, std::int64_t column) {
    const std::int64_t columns = std::min(block_columns, intermediate_ - column);
    const std::int64_t up_column = column + (config_.gated ? intermediate_ : 0);
    const std::byte* bias = piece.weights.up_bias;
    Block first, second;  // gate and up, or up alone
    const Input* rows[max_block_rows];
    for (std::int64_t r = 0; r < piece.rows; r += kernels_.rows_at_once) {
      const std::int64_t count = std::min(kernels_.rows_at_once, piece.rows - r);
      for (std::int64_t i = 0; i < count; ++i) rows[i] = input_row(piece.row + r + i);
      Product<Input, Real> product = rows_of(rows, count, packed_inputs_, piece.intermediate + r);
      multiply(product, piece.weights.up, hidden_, column, columns, first);
      add_bias(bias, column, columns, first, count);
      if (config_.gated) {
        multiply(product, piece.weights.up, hidden_, up_column, columns, second);
        add_bias(bias, up_column, columns, second, count);
      }
      activate(first, second, count, piece.intermediate + r, column, columns);
    }
  }

  /// Writes a block of intermediate rows [row, row + count).
  void activate(Block& first, Block& second, std::int64_t count, std::int64_t row,
                std::int64_t column, std::int64_t columns) {
    const std::int64_t whole = (columns + 15) / 16 * 16;
    const bool last = column + columns == intermediate_;
    const auto apply = [&](std::int64_t i, Input* h) {
      Real* values = first + i * block_columns;
      Real* factors = second + i * block_columns;
      std::fill(values + columns, values + whole, Real{});
      if (config_.gated) std::fill(factors + columns, factors + whole, Real{});
      kernels_.activate(config_.activation, config_.limit, values,
                        config_.gated ? factors : nullptr, h, whole);
      if (last) std::fill(h + columns, h + padded(intermediate_) - column, Input{});
    };
    if (!kernels_.pack) {
      for (std::int64_t i = 0; i < count; ++i) apply(i, intermediates_.row(row + i) + column);
      return;
    }
    for (std::int64_t begin = 0; begin < count; begin += packed_rows) {
      const std::int64_t rows = std::min(packed_rows, count - begin);
      Input block[packed_rows][block_columns];
      const Input* pointers[packed_rows];
      for (std::int64_t i = 0; i < rows; ++i) {
        apply(begin + i, block[i]);
        pointers[i] = block[i];
      }
      kernels_.pack(pointers, rows, block_columns, intermediates_.row(row + begin) + column * rows);
    }
  }

  /// Result columns [column, column + block_columns) of a piece's rows.
  void compute_down(const Piece& piece, std::int64_t column) {
    const std::int64_t columns = std::min(block_columns, hidden_ - column);
    Block block;
    const Input* rows[max_block_rows];
    for (std::int64_t r = 0; r < piece.rows; r += kernels_.rows_at_once) {
      const std::int64_t count = std::min(kernels_.rows_at_once, piece.rows - r);
      const std::int64_t from = piece.intermediate + r;
      for (std::int64_t i = 0; i < count; ++i) rows[i] = intermediates_.row(from + i);
      Product<Input, Real> product = rows_of(rows, count, intermediates_, from);
      multiply(product, piece.weights.down, intermediate_, column, columns, block);
      add_bias(piece.weights.down_bias, column, columns, block, count);
      for (std::int64_t i = 0; i < count; ++i)
        std::copy_n(block + i * block_columns, columns, results_.row(piece.row + r + i) + column);
    }
  }

  /// `rows`, or in kernels that read them packed the rows of `packed` from `first` on.
  Product<Input, Real> rows_of(const Input* const* rows, std::int64_t count,
                               const RowBuffer<Input>& packed, std::int64_t first) const {
    Product<Input, Real> product;
    product.inputs = rows;
    product.rows = count;
    if (kernels_.pack) product.packed = packed.row(first);
    return product;
  }

  void multiply(Product<Input, Real>& product, const std::byte* weights, std::int64_t depth,
                std::int64_t column, std::int64_t columns, Block& out) const {
    product.row_bytes = depth * element_;
    product.weights = weights + column * product.row_bytes;
    product.element_bytes = element_;
    product.depth = depth;
    product.outputs = columns;
    product.out = out;
    product.out_stride = block_columns;
    kernels_.multiply(product);
  }

  void add_bias(const std::byte* bias, std::int64_t column, std::int64_t columns, Block& block,
                std::int64_t rows) const {
    if (!bias) return;
    Real values[block_columns];
    read_row(bias + column * element_, config_.dtype, values, columns);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t n = 0; n < columns; ++n) block[r * block_columns + n] += values[n];
  }

  void combine_token(std::int64_t token, const ConstTensorView& weights,
                     const TensorView& out) const {
    constexpr std::int64_t width = 256;
    for (std::int64_t column = 0; column < hidden_; column += width) {
      const std::int64_t columns = std::min(width, hidden_ - column);
      Real sum[width] = {};
      for (std::int64_t a = token * top_k_; a < (token + 1) * top_k_; ++a) {
        const std::int64_t row = row_of_[static_cast<std::size_t>(a)];
        if (row < 0) continue;
        const Real weight = static_cast<Real>(load_real(weights, a));
        const Real* result = results_.row(row) + column;
        for (std::int64_t n = 0; n < columns; ++n) sum[n] += weight * result[n];
      }
      write_row(sum, config_.dtype, out.data + (token * hidden_ + column) * element_, columns);
    }
  }

  MoeConfig config_;
  FfnKernels<Input, Real> kernels_;
  std::int64_t hidden_, intermediate_, element_;
  std::int64_t top_k_ = 1;
  std::vector<std::int64_t> order_, row_of_;
  std::vector<Piece> pieces_;
  std::vector<PackedGroup> groups_;
  RowBuffer<Input> inputs_;         // [tokens, padded H]
  RowBuffer<Input> packed_inputs_;  // [rows in memory together, padded H], if the kernels pack
  RowBuffer<Input> intermediates_;  // [rows in memory together, padded I]
  RowBuffer<Real> results_;         // [rows of the call, H]
};

}  // namespace sida::detail
