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
#include "sida/io/block_scales.hpp"
#include "sida/io/checkpoint.hpp"
#include "sida/io/expert_names.hpp"

namespace sida {

/// Where a part of one expert lies in a checkpoint. A matrix [rows, columns], row-major, of which
/// it takes every `step`-th row of the file's; or, where `transposed`, stored as `columns` rows of
/// `stride` elements, of which it takes `rows`, every `step`-th one.
struct ExpertTensor {
  enum class Part : std::uint8_t { up, down, up_bias, down_bias };  ///< of the slab

  Part part = Part::up;
  std::int64_t first = 0;  ///< first element in the slab's part: `up` lies behind `gate`
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  bool transposed = false;
  std::int64_t stride = 0;
  std::int64_t step = 1;
  DataType type = DataType::f32;  ///< in the file; u8 where it is packed
  const SafetensorsFile* file = nullptr;
  std::uint64_t begin = 0;                 ///< of its first element in the file
  std::optional<BlockScales> scales = {};  ///< where it is packed; then it is not transposed
};

/// What a layer's tensors do not say of themselves.
struct ExpertHints {
  /// Tells transposed tensors apart where their own shapes do not; 0: not known.
  std::int32_t hidden_size = 0;
  /// Whether those that hidden_size does not tell are untransposed.
  bool assume_plain = false;
  /// Whether gate and up take turns in `gate_up_proj`.
  bool interleaved = false;
  /// Rows and columns of the blocks of fp8 weights.
  std::array<std::int64_t, 2> fp8_block = {128, 128};
};

/// Bytes of the file that the tensor takes, scales included.
inline std::uint64_t stored_bytes(const ExpertTensor& tensor) noexcept {
  const auto elements = static_cast<std::uint64_t>(tensor.rows * tensor.columns);
  if (!tensor.scales) return elements * size_of(tensor.type);
  const BlockScales& scales = *tensor.scales;
  const std::int64_t rows = (tensor.rows + scales.block_rows - 1) / scales.block_rows;
  return elements / static_cast<std::uint64_t>(scales.codes_per_byte()) +
         static_cast<std::uint64_t>(rows * scales.columns) * size_of(scales.type);
}

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
    tensors_.emplace(std::tuple(parsed.expert, parsed.matrix, parsed.role), Named{name, tensor});
  }

  /// Shape of this layer; fields of the whole model (layers, activation, top_k) are left alone.
  MoeConfig read(const ExpertHints& hints) {
    if (!unknown_.empty() || !layout_)
      throw InvalidArgument(
          in_quotes(unknown_) + ": expected an expert's tensor: experts.expert_0.wi.weight, " +
          "experts.0.gate_proj.weight, experts.0.w1.weight or experts.gate_up_proj and their " +
          "kind, one naming a layer; experts quantised otherwise than in fp8 with "
          "weight_scale_inv " +
          "or in MXFP4 are not supported");
    const std::int64_t first = *experts_.begin();
    const bool stacked = first < 0;
    const auto mxfp4 = [&](ExpertMatrix matrix) { return has(first, matrix, ExpertRole::blocks); };
    const bool packed = stacked && mxfp4(ExpertMatrix::down);
    gated_ = packed ? mxfp4(ExpertMatrix::gate_up)
                    : has(first, stacked ? ExpertMatrix::gate_up : ExpertMatrix::gate);
    up_bias_ = has(first, up_matrix(), ExpertRole::bias);
    down_bias_ = has(first, ExpertMatrix::down, ExpertRole::bias);
    if (hints.interleaved && !(stacked && gated_))
      fail("expected experts.gate_up_proj, in which gate and up take turns, found none");
    interleaved_ = hints.interleaved;
    if (packed) {
      read_mxfp4();
    } else if (stacked) {
      read_stacked(hints);
    } else {
      read_separate(hints.fp8_block);
    }
    for (const auto& [key, named] : tensors_)
      if (!named.used)
        fail("expected the same tensors of every expert, found " + in_quotes(named.name) +
             " beside them");
    MoeConfig config;
    config.experts = narrow(static_cast<std::int64_t>(parts_.size()), "experts");
    config.hidden_size = narrow(hidden_, "hidden_size");
    config.intermediate_size = narrow(intermediate_, "intermediate_size");
    config.gated = gated_;
    config.up_bias = up_bias_;
    config.down_bias = down_bias_;
    return config;
  }

  const std::string& name() const noexcept { return name_; }
  std::string layout() const {
    return std::string(name_of(*layout_)) +
           (packing_ ? ", " + std::string(name_of(*packing_)) : "") +
           (transposed_ ? ", transposed" : "") + (interleaved_ ? ", interleaved" : "");
  }
  std::vector<std::vector<ExpertTensor>>& parts() noexcept { return parts_; }

 private:
  using Part = ExpertTensor::Part;
  /// Experts without a byte cost nothing in a file, so a file could ask for any memory.
  static constexpr std::int64_t most_experts = 65536;
  /// In a block of MXFP4.
  static constexpr std::int64_t mxfp4_numbers = 32, mxfp4_bytes = 16;

  struct Named {
    std::string name;
    CheckpointTensor tensor;
    bool used = false;
  };

  [[noreturn]] void fail(const std::string& message) const {
    throw InvalidArgument("layer " + in_quotes(name_) + ": " + message);
  }

  ExpertMatrix up_matrix() const {
    return gated_ && layout_ == ExpertLayout::stacked ? ExpertMatrix::gate_up : ExpertMatrix::up;
  }
  bool has(std::int64_t expert, ExpertMatrix matrix, ExpertRole role = ExpertRole::weight) const {
    return tensors_.contains(std::tuple(expert, matrix, role));
  }
  std::int32_t narrow(std::int64_t value, const char* what) const {
    if (value < 1 || value > INT32_MAX)
      fail(std::string("expected ") + what + " from 1 to 2147483647, got " + std::to_string(value));
    return static_cast<std::int32_t>(value);
  }

  const Named& get(std::int64_t expert, ExpertMatrix matrix, ExpertRole role = ExpertRole::weight) {
    const auto found = tensors_.find(std::tuple(expert, matrix, role));
    if (found == tensors_.end()) {
      static constexpr std::array<const char*, 4> names{"gate", "up", "gate and up", "down"};
      static constexpr std::array<const char*, 4> roles{"matrix", "bias", "blocks", "scales"};
      fail("expected the " + std::string(names[static_cast<std::size_t>(matrix)]) + " " +
           roles[static_cast<std::size_t>(role)] + " of " +
           (expert < 0 ? "all experts" : "expert " + std::to_string(expert)) + ", found none");
    }
    found->second.used = true;
    return found->second;
  }

  static const std::vector<std::int64_t>& shape(const Named& named) {
    return named.tensor.tensor->shape;
  }
  static void expect_shape(const Named& named, const std::vector<std::int64_t>& expected,
                           const std::string& why = "") {
    if (shape(named) == expected) return;
    const auto text = [](const std::vector<std::int64_t>& extents) {
      std::string result = "[";
      for (const std::int64_t extent : extents)
        result += (result.size() > 1 ? ", " : "") + std::to_string(extent);
      return result + "]";
    };
    throw InvalidArgument(in_quotes(named.name) + ": expected shape " + text(expected) + why +
                          ", got " + text(shape(named)));
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
              tensor.begin + offset,
              {}};
    }
    throw InvalidArgument(in_quotes(named.name) +
                          ": expected F32, F16 or BF16, or in a matrix of a single expert F8_E4M3 "
                          "with scales; got " +
                          tensor.dtype);
  }

  /// A matrix that may be packed in fp8.
  ExpertTensor separate_matrix(const Named& named, std::int64_t expert, ExpertMatrix matrix,
                               Part part, std::int64_t first, std::int64_t rows,
                               std::int64_t columns, const std::array<std::int64_t, 2>& block) {
    const SafetensorsTensor& tensor = *named.tensor.tensor;
    if (tensor.dtype != "F8_E4M3") return piece(named, part, first, rows, columns);
    if (!has(expert, matrix, ExpertRole::scales))
      throw InvalidArgument(in_quotes(named.name) + ": it is F8_E4M3; expected its scales in " +
                            in_quotes(named.name + "_scale_inv") + ", found none");
    const Named& scales = get(expert, matrix, ExpertRole::scales);
    const auto blocks = [](std::int64_t extent, std::int64_t size) {
      return extent / size + (extent % size != 0);
    };
    expect_shape(
        scales, {blocks(rows, block[0]), blocks(columns, block[1])},
        " (weight_block_size " + std::to_string(block[0]) + " x " + std::to_string(block[1]) + ")");
    packing_ = Packing::fp8;
    return {
        .part = part,
        .first = first,
        .rows = rows,
        .columns = columns,
        .type = DataType::u8,
        .file = named.tensor.file,
        .begin = tensor.begin,
        .scales = BlockScales{Packing::fp8, scales.tensor.file, scales.tensor.tensor->begin,
                              scale_type(scales), block[0], block[1], blocks(columns, block[1])}};
  }

  static DataType scale_type(const Named& scales) {
    for (const DataType type : {DataType::f32, DataType::bf16, DataType::f16})
      if (scales.tensor.tensor->dtype == safetensors_name(type)) return type;
    throw InvalidArgument(in_quotes(scales.name) + ": expected scales in F32, BF16 or F16, got " +
                          scales.tensor.tensor->dtype);
  }

  void read_separate(const std::array<std::int64_t, 2>& block) {
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
        parts.push_back(separate_matrix(named, e, matrix, part, first, rows, columns, block));
      };
      const auto add_bias = [&](ExpertMatrix matrix, Part part, std::int64_t first,
                                std::int64_t length) {
        const Named& named = get(e, matrix, ExpertRole::bias);
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

  void read_stacked(const ExpertHints& hints) {
    const Named& up = get(-1, up_matrix());
    const Named& down = get(-1, ExpertMatrix::down);
    expect_dimensions(up, 3);
    expect_dimensions(down, 3);
    transposed_ = is_transposed(up, down, hints);
    const std::int64_t experts = shape(up)[0];
    const std::int64_t up_rows = shape(up)[transposed_ ? 2 : 1];
    hidden_ = shape(up)[transposed_ ? 1 : 2];
    intermediate_ = gated_ ? up_rows / 2 : up_rows;
    expect_shape(down, transposed_ ? std::vector{experts, intermediate_, hidden_}
                                   : std::vector{experts, hidden_, intermediate_});
    if (interleaved_ && !transposed_)
      fail("expected gate and up that take turns in a transposed tensor, [E, H, 2I]");
    for (std::int64_t e = 0; e < checked_experts(experts); ++e) {
      std::vector<ExpertTensor>& parts = parts_.emplace_back();
      add_up(parts, piece(up, Part::up, 0, up_rows, hidden_, e, transposed_));
      parts.push_back(piece(down, Part::down, 0, hidden_, intermediate_, e, transposed_));
      add_stacked_biases(parts, e, experts, up_rows);
    }
  }

  /// gpt-oss: codes [E, rows, columns / 32, 16] and their scales [E, rows, columns / 32] of rows
  /// that are not transposed, whatever transformers makes of them.
  void read_mxfp4() {
    const Named& up = get(-1, up_matrix(), ExpertRole::blocks);
    const Named& down = get(-1, ExpertMatrix::down, ExpertRole::blocks);
    expect_dimensions(up, 4);
    expect_dimensions(down, 4);
    const std::int64_t experts = shape(up)[0], up_rows = shape(up)[1];
    const std::int64_t up_groups = shape(up)[2], down_groups = shape(down)[2];
    expect_shape(up, {experts, up_rows, up_groups, mxfp4_bytes});
    hidden_ = up_groups * mxfp4_numbers;
    intermediate_ = down_groups * mxfp4_numbers;
    expect_shape(down, {experts, hidden_, down_groups, mxfp4_bytes});
    const std::int64_t expected_rows = gated_ ? 2 * intermediate_ : intermediate_;
    expect_shape(up, {experts, expected_rows, up_groups, mxfp4_bytes});
    const Named& up_scales = get(-1, up_matrix(), ExpertRole::scales);
    const Named& down_scales = get(-1, ExpertMatrix::down, ExpertRole::scales);
    expect_shape(up_scales, {experts, up_rows, up_groups});
    expect_shape(down_scales, {experts, hidden_, down_groups});
    packing_ = Packing::mxfp4;
    for (std::int64_t e = 0; e < checked_experts(experts); ++e) {
      std::vector<ExpertTensor>& parts = parts_.emplace_back();
      add_up(parts, mxfp4_piece(up, up_scales, Part::up, up_rows, up_groups, e));
      parts.push_back(mxfp4_piece(down, down_scales, Part::down, hidden_, down_groups, e));
      add_stacked_biases(parts, e, experts, up_rows);
    }
  }

  /// Expert `index` of a packed tensor that holds `rows` × `groups` blocks for each.
  static ExpertTensor mxfp4_piece(const Named& blocks, const Named& scales, Part part,
                                  std::int64_t rows, std::int64_t groups, std::int64_t index) {
    for (const Named* named : {&blocks, &scales})
      if (named->tensor.tensor->dtype != "U8")
        throw InvalidArgument(in_quotes(named->name) + ": expected U8, got " +
                              named->tensor.tensor->dtype);
    const auto before = static_cast<std::uint64_t>(index * rows * groups);
    return {.part = part,
            .rows = rows,
            .columns = groups * mxfp4_numbers,
            .type = DataType::u8,
            .file = blocks.tensor.file,
            .begin = blocks.tensor.tensor->begin + before * mxfp4_bytes,
            .scales = BlockScales{Packing::mxfp4, scales.tensor.file,
                                  scales.tensor.tensor->begin + before, DataType::u8, 1,
                                  mxfp4_numbers, groups}};
  }

  std::int64_t checked_experts(std::int64_t experts) const {
    if (experts > most_experts)
      fail("expected at most " + std::to_string(most_experts) + " experts, got " +
           std::to_string(experts));
    return experts;
  }

  void add_up(std::vector<ExpertTensor>& parts, const ExpertTensor& whole) const {
    if (!interleaved_) return parts.push_back(whole);
    parts.push_back(every_second(whole, 0));
    parts.push_back(every_second(whole, 1));
  }

  void add_stacked_biases(std::vector<ExpertTensor>& parts, std::int64_t expert,
                          std::int64_t experts, std::int64_t up_rows) {
    if (up_bias_) {
      const Named& bias = get(-1, up_matrix(), ExpertRole::bias);
      expect_shape(bias, {experts, up_rows});
      add_up(parts, piece(bias, Part::up_bias, 0, up_rows, 1, expert, interleaved_));
    }
    if (down_bias_) {
      const Named& bias = get(-1, ExpertMatrix::down, ExpertRole::bias);
      expect_shape(bias, {experts, hidden_});
      parts.push_back(piece(bias, Part::down_bias, 0, 1, hidden_, expert));
    }
  }

  /// The gate's rows (`place` 0) or those of up (1) of a tensor in which they take turns.
  static ExpertTensor every_second(ExpertTensor tensor, std::int64_t place) {
    tensor.rows /= 2;
    tensor.first = place * tensor.rows * tensor.columns;
    tensor.step = 2;
    if (place == 0) return tensor;
    if (tensor.scales) {
      tensor.begin += static_cast<std::uint64_t>(tensor.columns / tensor.scales->codes_per_byte());
      tensor.scales->begin += static_cast<std::uint64_t>(tensor.scales->columns);
    } else {
      tensor.begin += size_of(tensor.type);
    }
    return tensor;
  }

  /// Gated tensors tell by themselves, since the up matrix is twice the down matrix; others are
  /// told by the hidden size.
  bool is_transposed(const Named& up, const Named& down, const ExpertHints& hints) const {
    const std::int64_t rows = shape(up)[1], columns = shape(up)[2];
    if (gated_) {
      const bool plain = rows % 2 == 0 && shape(down)[1] == columns && shape(down)[2] == rows / 2;
      const bool transposed =
          columns % 2 == 0 && shape(down)[1] == columns / 2 && shape(down)[2] == rows;
      if (plain || transposed) return transposed;
      throw InvalidArgument(in_quotes(up.name) + " and " + in_quotes(down.name) +
                            ": expected [E, 2I, H] with [E, H, I], or [E, H, 2I] with [E, I, H]");
    }
    if (rows != columns && hints.hidden_size == columns) return false;
    if (rows != columns && hints.hidden_size == rows) return true;
    if (hints.assume_plain) return false;
    throw InvalidArgument(
        in_quotes(up.name) + ": expected to be told whether [" + std::to_string(rows) + ", " +
        std::to_string(columns) +
        "] is [intermediate, hidden] or transposed; pass a MoeConfig with the hidden size" +
        (rows == columns ? " (equal sizes are then read untransposed)" : ""));
  }

  std::string name_, unknown_;
  std::optional<ExpertLayout> layout_;
  std::set<std::int64_t> experts_;
  std::map<std::tuple<std::int64_t, ExpertMatrix, ExpertRole>, Named> tensors_;
  bool gated_ = false, up_bias_ = false, down_bias_ = false, transposed_ = false,
       interleaved_ = false;
  std::optional<Packing> packing_;
  std::int64_t hidden_ = 0, intermediate_ = 0;
  std::vector<std::vector<ExpertTensor>> parts_;
};

}  // namespace detail
/// @endcond

}  // namespace sida
