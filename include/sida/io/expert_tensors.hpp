// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/io/checkpoint.hpp"
#include "sida/io/expert_names.hpp"

namespace sida {

/// Where a part of one expert lies in a checkpoint. A matrix [rows, columns], row-major, or, where
/// `transposed`, stored as `columns` rows of `stride` elements, of which it takes `rows`, every
/// `step`-th one.
struct ExpertTensor {
  enum class Part : std::uint8_t { up, down, up_bias, down_bias };  ///< of the slab

  Part part = Part::up;
  std::int64_t first = 0;  ///< first element in the slab's part: `up` lies behind `gate`
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  bool transposed = false;
  std::int64_t stride = 0;
  std::int64_t step = 1;
  DataType type = DataType::f32;
  const SafetensorsFile* file = nullptr;
  std::uint64_t begin = 0;  ///< of its first element in the file
};

/// @cond
namespace detail {

/// The tensors of one MoE layer, as named in the checkpoint, on the way to ExpertTensors.
class LayerReader {
 public:
  explicit LayerReader(std::string name) : name_(std::move(name)) {}

  void add(const ExpertTensorName& parsed, const std::string& name,
           const CheckpointTensor& tensor) {
    if (!parsed.layout || (layout_ && *layout_ != *parsed.layout)) {
      if (unknown_.empty()) unknown_ = name;
      return;
    }
    layout_ = parsed.layout;
    experts_.insert(parsed.expert);
    tensors_.emplace(std::tuple(parsed.expert, parsed.matrix, parsed.bias), Named{name, tensor});
  }

  /// Shape of this layer; fields of the whole model (layers, activation, top_k) are left alone.
  /// `hidden_size` (0: not known) tells transposed tensors apart where their own shapes do not;
  /// with `assume_plain` those that it does not tell are taken to be untransposed.
  /// With `interleaved`, gate and up take turns in `gate_up_proj`.
  MoeConfig read(std::int32_t hidden_size, bool assume_plain, bool interleaved = false) {
    if (!unknown_.empty() || !layout_)
      throw InvalidArgument(
          in_quotes(unknown_) + ": expected an expert's tensor: experts.expert_0.wi.weight, " +
          "experts.0.gate_proj.weight, experts.0.w1.weight or experts.gate_up_proj and their " +
          "kind, one naming a layer; quantised and other experts are not supported");
    const std::int64_t first = *experts_.begin();
    const bool stacked = first < 0;
    gated_ = has(first, stacked ? ExpertMatrix::gate_up : ExpertMatrix::gate);
    up_bias_ = has(first, up_matrix(), true);
    down_bias_ = has(first, ExpertMatrix::down, true);
    if (interleaved && !(stacked && gated_))
      fail("expected experts.gate_up_proj, in which gate and up take turns, found none");
    if (stacked) {
      read_stacked(hidden_size, assume_plain, interleaved);
    } else {
      read_separate();
    }
    MoeConfig config;
    config.experts = narrow(static_cast<std::int64_t>(parts_.size()), "experts");
    const std::size_t halves = interleaved ? 1 + std::size_t{up_bias_} : 0;  // of one tensor
    if (tensors_.size() != (parts_[0].size() - halves) * (stacked ? 1 : parts_.size()))
      fail("expected the same tensors of every expert, found others beside them");
    config.hidden_size = narrow(hidden_, "hidden_size");
    config.intermediate_size = narrow(intermediate_, "intermediate_size");
    config.gated = gated_;
    config.up_bias = up_bias_;
    config.down_bias = down_bias_;
    return config;
  }

  const std::string& name() const noexcept { return name_; }
  std::string layout() const {
    return std::string(name_of(*layout_)) + (transposed_ ? ", transposed" : "") +
           (interleaved_ ? ", interleaved" : "");
  }
  std::vector<std::vector<ExpertTensor>>& parts() noexcept { return parts_; }

 private:
  using Part = ExpertTensor::Part;
  /// Experts without a byte cost nothing in a file, so a file could ask for any memory.
  static constexpr std::int64_t most_experts = 65536;

  struct Named {
    std::string name;
    CheckpointTensor tensor;
  };

  [[noreturn]] void fail(const std::string& message) const {
    throw InvalidArgument("layer " + in_quotes(name_) + ": " + message);
  }

  ExpertMatrix up_matrix() const {
    return gated_ && layout_ == ExpertLayout::stacked ? ExpertMatrix::gate_up : ExpertMatrix::up;
  }
  bool has(std::int64_t expert, ExpertMatrix matrix, bool bias = false) const {
    return tensors_.contains(std::tuple(expert, matrix, bias));
  }
  std::int32_t narrow(std::int64_t value, const char* what) const {
    if (value < 1 || value > INT32_MAX)
      fail(std::string("expected ") + what + " from 1 to 2147483647, got " + std::to_string(value));
    return static_cast<std::int32_t>(value);
  }

  const Named& get(std::int64_t expert, ExpertMatrix matrix, bool bias = false) const {
    const auto found = tensors_.find(std::tuple(expert, matrix, bias));
    if (found == tensors_.end()) {
      static constexpr std::array<const char*, 4> names{"gate", "up", "gate and up", "down"};
      fail("expected the " + std::string(names[static_cast<std::size_t>(matrix)]) +
           (bias ? " bias of " : " matrix of ") +
           (expert < 0 ? "all experts" : "expert " + std::to_string(expert)) + ", found none");
    }
    return found->second;
  }

  static const std::vector<std::int64_t>& shape(const Named& named) {
    return named.tensor.tensor->shape;
  }
  static void expect_shape(const Named& named, const std::vector<std::int64_t>& expected) {
    if (shape(named) == expected) return;
    const auto text = [](const std::vector<std::int64_t>& extents) {
      std::string result = "[";
      for (const std::int64_t extent : extents)
        result += (result.size() > 1 ? ", " : "") + std::to_string(extent);
      return result + "]";
    };
    throw InvalidArgument(in_quotes(named.name) + ": expected shape " + text(expected) + ", got " +
                          text(shape(named)));
  }
  static void expect_dimensions(const Named& named, std::size_t count) {
    if (shape(named).size() != count)
      throw InvalidArgument(in_quotes(named.name) + ": expected " + std::to_string(count) +
                            " dimensions, got " + std::to_string(shape(named).size()));
  }

  /// Expert `index` of a tensor that holds `rows` × `columns` for each.
  static ExpertTensor piece(const Named& named, Part part, std::int64_t first, std::int64_t rows,
                            std::int64_t columns, std::int64_t index = 0, bool transposed = false) {
    const SafetensorsTensor& tensor = *named.tensor.tensor;
    for (const DataType type : {DataType::f32, DataType::bf16, DataType::f16, DataType::f64}) {
      if (tensor.dtype != safetensors_name(type)) continue;
      const auto offset = static_cast<std::uint64_t>(index * rows * columns) * size_of(type);
      return {part,
              first,
              rows,
              columns,
              transposed,
              transposed ? rows : columns,
              1,
              type,
              named.tensor.file,
              tensor.begin + offset};
    }
    throw InvalidArgument(in_quotes(named.name) + ": expected F32, F16 or BF16, got " +
                          tensor.dtype + "; quantised experts are not supported");
  }

  void read_separate() {
    const Named& first_up = get(0, ExpertMatrix::up);
    expect_dimensions(first_up, 2);
    intermediate_ = shape(first_up)[0];
    hidden_ = shape(first_up)[1];
    for (std::int64_t e = 0; e < static_cast<std::int64_t>(experts_.size()); ++e) {
      std::vector<ExpertTensor>& parts = parts_.emplace_back();
      const auto add = [&](ExpertMatrix matrix, Part part, std::int64_t first, std::int64_t rows,
                           std::int64_t columns) {
        const Named& named = get(e, matrix);
        expect_shape(named, {rows, columns});
        parts.push_back(piece(named, part, first, rows, columns));
      };
      const auto add_bias = [&](ExpertMatrix matrix, Part part, std::int64_t first,
                                std::int64_t length) {
        const Named& named = get(e, matrix, true);
        expect_shape(named, {length});
        parts.push_back(piece(named, part, first, 1, length));
      };
      const std::int64_t behind_gate = gated_ ? intermediate_ : 0;
      if (gated_) add(ExpertMatrix::gate, Part::up, 0, intermediate_, hidden_);
      add(ExpertMatrix::up, Part::up, behind_gate * hidden_, intermediate_, hidden_);
      add(ExpertMatrix::down, Part::down, 0, hidden_, intermediate_);
      if (up_bias_ && gated_) add_bias(ExpertMatrix::gate, Part::up_bias, 0, intermediate_);
      if (up_bias_) add_bias(ExpertMatrix::up, Part::up_bias, behind_gate, intermediate_);
      if (down_bias_) add_bias(ExpertMatrix::down, Part::down_bias, 0, hidden_);
    }
  }

  void read_stacked(std::int32_t hidden_size, bool assume_plain, bool interleaved) {
    const Named& up = get(-1, up_matrix());
    const Named& down = get(-1, ExpertMatrix::down);
    expect_dimensions(up, 3);
    expect_dimensions(down, 3);
    transposed_ = is_transposed(up, down, hidden_size, assume_plain);
    const std::int64_t experts = shape(up)[0];
    const std::int64_t up_rows = shape(up)[transposed_ ? 2 : 1];
    hidden_ = shape(up)[transposed_ ? 1 : 2];
    intermediate_ = gated_ ? up_rows / 2 : up_rows;
    expect_shape(down, transposed_ ? std::vector{experts, intermediate_, hidden_}
                                   : std::vector{experts, hidden_, intermediate_});
    if (experts > most_experts)
      fail("expected at most " + std::to_string(most_experts) + " experts, got " +
           std::to_string(experts));
    const Named* up_bias = up_bias_ ? &get(-1, up_matrix(), true) : nullptr;
    const Named* down_bias = down_bias_ ? &get(-1, ExpertMatrix::down, true) : nullptr;
    if (up_bias) expect_shape(*up_bias, {experts, up_rows});
    if (down_bias) expect_shape(*down_bias, {experts, hidden_});
    if (interleaved && !transposed_)
      fail("expected gate and up that take turns in a transposed tensor, [E, H, 2I]");
    interleaved_ = interleaved;
    for (std::int64_t e = 0; e < experts; ++e) {
      std::vector<ExpertTensor>& parts = parts_.emplace_back();
      const auto add_up = [&](const Named& named, Part part, std::int64_t columns,
                              bool transposed) {
        const ExpertTensor whole = piece(named, part, 0, up_rows, columns, e, transposed);
        if (!interleaved) return parts.push_back(whole);
        parts.push_back(every_second(whole, 0));
        parts.push_back(every_second(whole, 1));
      };
      add_up(up, Part::up, hidden_, transposed_);
      parts.push_back(piece(down, Part::down, 0, hidden_, intermediate_, e, transposed_));
      if (up_bias) add_up(*up_bias, Part::up_bias, 1, interleaved);
      if (down_bias) parts.push_back(piece(*down_bias, Part::down_bias, 0, 1, hidden_, e));
    }
  }

  /// The gate's rows (`place` 0) or those of up (1) of a transposed tensor in which they take
  /// turns.
  static ExpertTensor every_second(ExpertTensor tensor, std::int64_t place) {
    tensor.rows /= 2;
    tensor.first = place * tensor.rows * tensor.columns;
    tensor.begin += static_cast<std::uint64_t>(place) * size_of(tensor.type);
    tensor.step = 2;
    return tensor;
  }

  /// Gated tensors tell by themselves, since the up matrix is twice the down matrix; others are
  /// told by the hidden size.
  bool is_transposed(const Named& up, const Named& down, std::int32_t hidden_size,
                     bool assume_plain) const {
    const std::int64_t rows = shape(up)[1], columns = shape(up)[2];
    if (gated_) {
      const bool plain = rows % 2 == 0 && shape(down)[1] == columns && shape(down)[2] == rows / 2;
      const bool transposed =
          columns % 2 == 0 && shape(down)[1] == columns / 2 && shape(down)[2] == rows;
      if (plain || transposed) return transposed;
      throw InvalidArgument(in_quotes(up.name) + " and " + in_quotes(down.name) +
                            ": expected [E, 2I, H] with [E, H, I], or [E, H, 2I] with [E, I, H]");
    }
    if (rows != columns && hidden_size == columns) return false;
    if (rows != columns && hidden_size == rows) return true;
    if (assume_plain) return false;
    throw InvalidArgument(
        in_quotes(up.name) + ": expected to be told whether [" + std::to_string(rows) + ", " +
        std::to_string(columns) +
        "] is [intermediate, hidden] or transposed; pass a MoeConfig with the hidden size" +
        (rows == columns ? " (equal sizes are then read untransposed)" : ""));
  }

  std::string name_, unknown_;
  std::optional<ExpertLayout> layout_;
  std::set<std::int64_t> experts_;
  std::map<std::tuple<std::int64_t, ExpertMatrix, bool>, Named> tensors_;
  bool gated_ = false, up_bias_ = false, down_bias_ = false, transposed_ = false,
       interleaved_ = false;
  std::int64_t hidden_ = 0, intermediate_ = 0;
  std::vector<std::vector<ExpertTensor>> parts_;
};

}  // namespace detail
/// @endcond

}  // namespace sida
