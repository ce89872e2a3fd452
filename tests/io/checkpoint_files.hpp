// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "io/raw_safetensors.hpp"

/// A made-up MoE model whose weights are whole numbers below 251, so that every dtype holds them
/// exactly, written in any layout and expected in any dtype without sida's code.
struct ToyModel {
  int layers = 2, experts = 3, hidden = 4, intermediate = 5;
  bool gated = true, bias = false;

  enum Part { up, down, up_bias, down_bias };  // up: with `gated` the gate's rows first
  int up_rows() const { return gated ? 2 * intermediate : intermediate; }
  int rows(Part part) const { return part == up ? up_rows() : part == down ? hidden : 1; }
  int columns(Part part) const {
    return part == up || part == down_bias ? hidden : part == down ? intermediate : up_rows();
  }
  int value(int layer, int expert, Part part, int row, int column) const {
    return (layer * 101 + expert * 53 + part * 17 + row * 29 + column * 7 + 1) % 251;
  }

  /// The slab that sida's documentation promises: up, down, up_bias, down_bias, row-major, each at
  /// a multiple of 128 bytes.
  std::string slab(int layer, int expert, std::string_view dtype) const {
    std::string bytes;
    for (const Part part : {up, down, up_bias, down_bias}) {
      if ((part == up_bias || part == down_bias) && !bias) continue;
      for (int r = 0; r < rows(part); ++r)
        for (int c = 0; c < columns(part); ++c)
          bytes += element(value(layer, expert, part, r, c), dtype);
      bytes.resize((bytes.size() + 127) / 128 * 128, '\0');
    }
    return bytes;
  }

  /// The bytes of a whole number from 0 to 255 in the dtype, little-endian.
  static std::string element(int number, std::string_view dtype) {
    if (dtype == "F64") {
      return bytes_of(std::vector<double>{static_cast<double>(number)});
    }
    const float value = static_cast<float>(number);
    const std::string single = bytes_of(std::vector<float>{value});
    if (dtype == "F32") return single;
    if (dtype == "BF16") return single.substr(2);  // the upper half; the lower one is zero
    int exponent = 0;                              // F16
    while (number >> (exponent + 1)) ++exponent;
    const int bits =
        number == 0 ? 0 : (15 + exponent) << 10 | (number - (1 << exponent)) << (10 - exponent);
    return bytes_of(std::vector<std::uint16_t>{static_cast<std::uint16_t>(bits)});
  }
};

/// Writes a ToyModel's experts in one of the layouts.
class ToyCheckpoint {
 public:
  explicit ToyCheckpoint(ToyModel toy, std::string type = "F32")
      : model(toy), dtype(std::move(type)) {}

  ToyModel model;
  std::string dtype;
  RawSafetensors raw;

  using Cell = std::function<int(int, int)>;  // (row, column) -> number

  /// A tensor [rows, columns] or, with `depth` > 0, [depth, rows, columns] of cells (depth * rows).
  void matrix(const std::string& name, int rows, int columns, const Cell& cell, int depth = 0) {
    std::string bytes;
    for (int r = 0; r < rows * (depth ? depth : 1); ++r)
      for (int c = 0; c < columns; ++c) bytes += ToyModel::element(cell(r, c), dtype);
    const std::string shape = (depth ? std::to_string(depth) + "," : "") + std::to_string(rows) +
                              "," + std::to_string(columns);
    raw.add(name, dtype, "[" + shape + "]", std::vector<char>(bytes.begin(), bytes.end()));
  }
  void vector(const std::string& name, int length, const std::function<int(int)>& cell) {
    std::string bytes;
    for (int i = 0; i < length; ++i) bytes += ToyModel::element(cell(i), dtype);
    raw.add(name, dtype, "[" + std::to_string(length) + "]",
            std::vector<char>(bytes.begin(), bytes.end()));
  }

  /// One tensor a matrix: `prefix` + ".experts." + `expert_prefix` + e + "." + gate/up/down.
  void add_separate(int layer, const std::string& prefix, const std::string& expert_prefix,
                    const std::string& gate, const std::string& up, const std::string& down) {
    const ToyModel& m = model;
    for (int e = 0; e < m.experts; ++e) {
      const std::string module = prefix + ".experts." + expert_prefix + std::to_string(e) + ".";
      const auto value = [&, e](ToyModel::Part part, int r, int c) {
        return m.value(layer, e, part, r, c);
      };
      const int behind = m.gated ? m.intermediate : 0;
      if (m.gated)
        matrix(module + gate + ".weight", m.intermediate, m.hidden,
               [&](int r, int c) { return value(ToyModel::up, r, c); });
      matrix(module + up + ".weight", m.intermediate, m.hidden,
             [&](int r, int c) { return value(ToyModel::up, behind + r, c); });
      matrix(module + down + ".weight", m.hidden, m.intermediate,
             [&](int r, int c) { return value(ToyModel::down, r, c); });
      if (!m.bias) continue;
      if (m.gated)
        vector(module + gate + ".bias", m.intermediate,
               [&](int i) { return value(ToyModel::up_bias, 0, i); });
      vector(module + up + ".bias", m.intermediate,
             [&](int i) { return value(ToyModel::up_bias, 0, behind + i); });
      vector(module + down + ".bias", m.hidden,
             [&](int i) { return value(ToyModel::down_bias, 0, i); });
    }
  }

  /// All experts of a layer in one tensor a matrix.
  /// With `interleaved`, gate and up take turns.
  void add_stacked(int layer, const std::string& prefix, bool transposed,
                   bool interleaved = false) {
    const ToyModel& m = model;
    const std::string up = prefix + ".experts." + (m.gated ? "gate_up_proj" : "up_proj");
    const std::string down = prefix + ".experts.down_proj";
    const auto row_at = [&](ToyModel::Part part, int place) {
      const bool turns = interleaved && (part == ToyModel::up || part == ToyModel::up_bias);
      return turns ? place / 2 + place % 2 * m.intermediate : place;
    };
    const auto add = [&](const std::string& name, ToyModel::Part part) {
      const int rows = m.rows(part), columns = m.columns(part);
      if (transposed) {
        matrix(
            name, columns, rows,
            [&](int r, int c) {
              return m.value(layer, r / columns, part, row_at(part, c), r % columns);
            },
            m.experts);
      } else {
        matrix(
            name, rows, columns,
            [&](int r, int c) { return m.value(layer, r / rows, part, r % rows, c); }, m.experts);
      }
    };
    add(up, ToyModel::up);
    add(down, ToyModel::down);
    if (!m.bias) return;
    matrix(up + "_bias", m.experts, m.up_rows(), [&](int e, int i) {
      return m.value(layer, e, ToyModel::up_bias, 0, row_at(ToyModel::up_bias, i));
    });
    matrix(down + "_bias", m.experts, m.hidden,
           [&](int e, int i) { return m.value(layer, e, ToyModel::down_bias, 0, i); });
  }

  /// A tensor that has nothing to do with experts.
  void add_other(const std::string& name) {
    matrix(name, 1, 1, [](int, int) { return 7; });
  }
};
