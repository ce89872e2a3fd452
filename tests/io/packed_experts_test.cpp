// SPDX-License-Identifier: Apache-2.0
//
// Experts that a checkpoint packs (fp8 in blocks, MXFP4), read into slabs.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "io/raw_safetensors.hpp"
#include "sida/core/half.hpp"
#include "sida/io/checkpoint_store.hpp"
#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

using Catch::Matchers::ContainsSubstring;
using sida::CheckpointStore;
using sida::DataType;

namespace packed_experts_test {
namespace {

using Bytes = std::vector<std::uint8_t>;

constexpr const char* fp8_config =
    R"({"hidden_size":37,"hidden_act":"silu","num_experts_per_tok":1,
        "quantization_config":{"quant_method":"fp8","weight_block_size":[8,16]}})";

/// Numbers as the formats define them, in f64.
double e4m3(unsigned code) {
  const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}
double e2m1(unsigned code) {
  const int exponent = static_cast<int>(code >> 1 & 3), mantissa = static_cast<int>(code & 1);
  const double magnitude = exponent == 0 ? mantissa / 2.0 : std::ldexp(2 + mantissa, exponent - 2);
  return code & 8 ? -magnitude : magnitude;
}

std::string extents(const std::vector<int>& shape) {
  std::string text;
  for (const int extent : shape) text += (text.empty() ? "[" : ",") + std::to_string(extent);
  return text + "]";
}

/// Packed matrices of random codes, and what they stand for.
class PackedFile {
 public:
  RawSafetensors raw;
  std::mt19937 random{7};

  /// A matrix in blocks of 8 × 16 with scales beside it; the numbers, row-major.
  std::vector<double> fp8(const std::string& name, int rows, int columns,
                          DataType scale_type = DataType::f32) {
    const int across = (columns + 15) / 16;
    std::vector<float> scales;
    for (int i = 0; i < (rows + 7) / 8 * across; ++i)
      scales.push_back(static_cast<float>(1 + random() % 64) / 256);  // of bf16 too
    Bytes codes;
    std::vector<double> numbers;
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < columns; ++c) {
        auto code = static_cast<std::uint8_t>(random());
        if ((code & 0x7f) == 0x7f) code ^= 1;  // no NaN
        codes.push_back(code);
        const int block = r / 8 * across + c / 16;
        numbers.push_back(e4m3(code) * scales[static_cast<std::size_t>(block)]);
      }
    }
    raw.add(name, "F8_E4M3", extents({rows, columns}), codes);
    const std::string shape = extents({(rows + 7) / 8, across});
    if (scale_type == DataType::f32) {
      raw.add(name + "_scale_inv", "F32", shape, scales);
    } else {
      std::vector<std::uint16_t> halves;
      for (const float scale : scales) halves.push_back(sida::to_bf16(scale).bits);
      raw.add(name + "_scale_inv", "BF16", shape, halves);
    }
    return numbers;
  }

  /// Matrices of several experts in blocks of 32 numbers; numbers [experts * rows * columns].
  std::vector<double> mxfp4(const std::string& name, int experts, int rows, int columns) {
    Bytes codes, scales;
    std::vector<double> numbers;
    for (int block = 0; block < experts * rows * columns / 32; ++block) {
      const auto exponent = static_cast<std::uint8_t>(120 + random() % 10);
      scales.push_back(exponent);
      for (int i = 0; i < 16; ++i) {
        const auto pair = static_cast<std::uint8_t>(random());
        codes.push_back(pair);
        numbers.push_back(std::ldexp(e2m1(pair & 15), exponent - 127));
        numbers.push_back(std::ldexp(e2m1(pair >> 4), exponent - 127));
      }
    }
    raw.add(name + "_blocks", "U8", extents({experts, rows, columns / 32, 16}), codes);
    raw.add(name + "_scales", "U8", extents({experts, rows, columns / 32}), scales);
    return numbers;
  }
};

std::string read(sida::ExpertStore& store, sida::ExpertId id, std::size_t offset,
                 std::size_t count) {
  std::string bytes(count, '?');
  store.read(id, offset, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

double number_in(const std::string& bytes, std::size_t offset, DataType type) {
  if (type == DataType::f32) {
    float value;
    std::memcpy(&value, bytes.data() + offset, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, bytes.data() + offset, sizeof bits);
  return type == DataType::bf16 ? sida::to_f32(sida::BFloat16{bits})
                                : sida::to_f32(sida::Half{bits});
}

/// The part of a slab that begins at `offset` is the expected numbers, rounded to the nearest.
void check_part(const std::string& slab, std::size_t offset, const std::vector<double>& expected,
                DataType type) {
  const double half_step = type == DataType::f32   ? std::ldexp(1, -24)
                           : type == DataType::f16 ? std::ldexp(1, -11)
                                                   : std::ldexp(1, -8);
  const double smallest = type == DataType::f16 ? std::ldexp(1, -25) : 0;  // half of a subnormal
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double got = number_in(slab, offset + i * sida::size_of(type), type);
    wrong +=
        !(std::abs(got - expected[i]) <= std::max(half_step * std::abs(expected[i]), smallest));
  }
  CHECK(wrong == 0);
}

/// Ranges that begin and end anywhere are those of the whole slab.
void check_ranges(CheckpointStore& store, sida::ExpertId id, const std::string& slab) {
  bool same = true;
  for (std::size_t offset = 0; offset < slab.size(); offset += 13) {
    for (const std::size_t count : {0, 1, 2, 3, 7, 41, 130, 1001}) {
      const std::string part = slab.substr(offset, count);
      same = same && read(store, id, offset, part.size()) == part;
    }
  }
  CHECK(same);
}

}  // namespace

TEST_CASE("Every code of the packed formats is the number that the format defines") {
  for (unsigned code = 0; code < 256; ++code) {
    const float number = sida::detail::e4m3_numbers[code];
    if ((code & 0x7f) == 0x7f) {
      CHECK(std::isnan(number));
    } else {
      CHECK(number == e4m3(code));
      CHECK(std::signbit(number) == (code >= 128));
    }
    const double power = std::ldexp(1.0, static_cast<int>(code) - 127);
    const auto exponent = static_cast<std::uint8_t>(code);
    if (code < 255) CHECK(sida::detail::power_of_two(exponent) == power);
  }
  CHECK(std::isinf(sida::detail::power_of_two(255)));
  for (unsigned code = 0; code < 16; ++code) {
    CHECK(sida::detail::e2m1_numbers[code] == e2m1(code));
    CHECK(std::signbit(sida::detail::e2m1_numbers[code]) == (code >= 8));
  }
}

TEST_CASE("fp8 experts of any size are dequantised block by block") {
  constexpr int hidden = 37, intermediate = 21;  // no multiples of the blocks of 8 × 16
  for (const DataType scale_type : {DataType::f32, DataType::bf16}) {
    const TemporaryFolder folder;
    PackedFile file;
    std::vector<std::vector<double>> ups, downs;
    for (const char* expert : {"0", "1", "2"}) {
      const std::string module = std::string("model.layers.3.mlp.experts.") + expert + ".";
      std::vector<double> up =
          file.fp8(module + "gate_proj.weight", intermediate, hidden, scale_type);
      const auto behind = file.fp8(module + "up_proj.weight", intermediate, hidden, scale_type);
      up.insert(up.end(), behind.begin(), behind.end());
      ups.push_back(up);
      downs.push_back(file.fp8(module + "down_proj.weight", hidden, intermediate, scale_type));
    }
    folder.write("model.safetensors", file.raw.bytes());
    folder.write("config.json", fp8_config);
    for (const DataType type : {DataType::f32, DataType::bf16, DataType::f16}) {
      const auto store = CheckpointStore::open(folder.path(), {.dtype = type});
      const sida::SlabLayout layout(store->config());
      CHECK(store->config().hidden_size == hidden);
      CHECK(store->config().intermediate_size == intermediate);
      CHECK(store->staging_bytes() > 0);
      CHECK(store->staging_bytes() <= store->slab_bytes());
      for (int e = 0; e < 3; ++e) {
        const std::string slab = read(*store, {0, e}, 0, store->slab_bytes());
        check_part(slab, layout.up_offset, ups[static_cast<std::size_t>(e)], type);
        check_part(slab, layout.down_offset, downs[static_cast<std::size_t>(e)], type);
        check_ranges(*store, {0, e}, slab);
      }
    }
  }
}

TEST_CASE("MXFP4 experts are dequantised, and gate and up that take turns told apart") {
  constexpr int experts = 3, hidden = 64, intermediate = 96;
  const TemporaryFolder folder;
  PackedFile file;
  const auto turns = file.mxfp4("m.experts.gate_up_proj", experts, 2 * intermediate, hidden);
  const auto downs = file.mxfp4("m.experts.down_proj", experts, hidden, intermediate);
  std::vector<float> up_bias, down_bias;
  for (int i = 0; i < experts * 2 * intermediate; ++i) up_bias.push_back(static_cast<float>(i));
  for (int i = 0; i < experts * hidden; ++i) down_bias.push_back(static_cast<float>(-i));
  file.raw.add("m.experts.gate_up_proj_bias", "F32", extents({experts, 2 * intermediate}), up_bias)
      .add("m.experts.down_proj_bias", "F32", extents({experts, hidden}), down_bias);
  folder.write("model.safetensors", file.raw.bytes());
  for (const bool interleaved : {true, false}) {
    for (const DataType type : {DataType::f32, DataType::bf16}) {
      const auto store =
          CheckpointStore::open(folder.path(), {.dtype = type, .interleaved = interleaved});
      const sida::SlabLayout layout(store->config());
      CHECK(store->config().hidden_size == hidden);
      CHECK(store->config().intermediate_size == intermediate);
      CHECK(store->config().gated);
      for (int e = 0; e < experts; ++e) {
        std::vector<double> up, biases;
        for (int r = 0; r < 2 * intermediate; ++r) {
          const int row = !interleaved ? r : r < intermediate ? 2 * r : 2 * (r - intermediate) + 1;
          const auto place = static_cast<std::ptrdiff_t>(e * 2 * intermediate + row);
          up.insert(up.end(), turns.begin() + place * hidden, turns.begin() + (place + 1) * hidden);
          biases.push_back(up_bias[static_cast<std::size_t>(place)]);
        }
        const auto begin = downs.begin() + std::ptrdiff_t{e} * hidden * intermediate;
        const std::string slab = read(*store, {0, e}, 0, store->slab_bytes());
        check_part(slab, layout.up_offset, up, type);
        check_part(slab, layout.down_offset, {begin, begin + hidden * intermediate}, type);
        check_part(slab, layout.up_bias_offset, biases, type);
        check_ranges(*store, {0, e}, slab);
      }
    }
  }
}

TEST_CASE("A packed tensor larger than the buffer goes through it piece by piece") {
  const TemporaryFolder folder;
  PackedFile file;
  const auto fp8 = file.fp8("fp8", 19, 45);
  const auto mxfp4 = file.mxfp4("m", 1, 19, 96);
  const auto path = folder.write("x", file.raw.bytes());
  const auto opened = sida::SafetensorsFile::open(path);
  const sida::ExpertTensor tensors[] = {
      {.rows = 19,
       .columns = 45,
       .type = DataType::u8,
       .file = &opened,
       .begin = opened.tensor("fp8").begin,
       .scales = sida::BlockScales{sida::Packing::fp8, &opened,
                                   opened.tensor("fp8_scale_inv").begin, DataType::f32, 8, 16, 3}},
      {.rows = 19,
       .columns = 96,
       .type = DataType::u8,
       .file = &opened,
       .begin = opened.tensor("m_blocks").begin,
       .scales = sida::BlockScales{sida::Packing::mxfp4, &opened, opened.tensor("m_scales").begin,
                                   DataType::u8, 1, 32, 3}}};
  for (const sida::ExpertTensor& tensor : tensors) {
    const bool is_fp8 = tensor.scales->packing == sida::Packing::fp8;
    const std::vector<double>& expected = is_fp8 ? fp8 : mxfp4;
    INFO(sida::name_of(tensor.scales->packing));
    CHECK(sida::stored_bytes(tensor) == (is_fp8 ? 19 * 45 + 3 * 3 * 4 : 19 * 48 + 19 * 3));
    for (const std::size_t buffer : {1, 100, 161, 300, 1000, 100000}) {
      INFO("buffer of " << buffer << " bytes");
      sida::ConvertingReader reader(DataType::f32, buffer);
      std::string bytes(expected.size() * 4, '?');
      reader.read(tensor, 0, std::as_writable_bytes(std::span(bytes)));
      check_part(bytes, 0, expected, DataType::f32);
    }
  }
}

TEST_CASE("Packed experts without the tensors or sizes that they need are refused by name") {
  const TemporaryFolder folder;
  PackedFile file;
  sida::ExpertSearch search;
  const auto refused = [&](const char* config, const std::string& reason) {
    folder.write("model.safetensors", file.raw.bytes());
    folder.write("config.json", config);
    CHECK_THROWS_WITH(CheckpointStore::open(folder.path(), search), ContainsSubstring(reason));
  };
  const char* config = R"({"hidden_act":"silu","num_experts_per_tok":1})";
  SECTION("fp8 scales of blocks of another size") {
    file.fp8("m.experts.0.w1.weight", 21, 37);
    file.fp8("m.experts.0.w3.weight", 21, 37);
    file.fp8("m.experts.0.w2.weight", 37, 21);
    refused(config,
            "'m.experts.0.w1.weight_scale_inv': expected shape [1, 1] (weight_block_size "
            "128 x 128), got [3, 3]");
  }
  SECTION("fp8 without scales") {
    file.raw.add("m.experts.0.w1.weight", "F8_E4M3", "[1,1]", Bytes{1})
        .add("m.experts.0.w3.weight", "F8_E4M3", "[1,1]", Bytes{1})
        .add("m.experts.0.w2.weight", "F8_E4M3", "[1,1]", Bytes{1});
    refused(config, "'m.experts.0.w1.weight_scale_inv', found none");
  }
  SECTION("fp8 scales of another dtype") {
    file.raw.add("m.experts.0.up_proj.weight", "F8_E4M3", "[1,1]", Bytes{1})
        .add("m.experts.0.down_proj.weight", "F8_E4M3", "[1,1]", Bytes{1})
        .add("m.experts.0.up_proj.weight_scale_inv", "U8", "[1,1]", Bytes{1})
        .add("m.experts.0.down_proj.weight_scale_inv", "U8", "[1,1]", Bytes{1});
    refused(config, "expected scales in F32, BF16 or F16, got U8");
  }
  SECTION("scales of weights that are not packed") {
    file.raw.add("m.experts.0.up_proj.weight", "F32", "[1,1]", std::vector<float>{1})
        .add("m.experts.0.down_proj.weight", "F32", "[1,1]", std::vector<float>{1})
        .add("m.experts.0.up_proj.weight_scale_inv", "F32", "[1,1]", std::vector<float>{1});
    refused(config, "'m.experts.0.up_proj.weight_scale_inv' beside them");
  }
  SECTION("a block size that is none") {
    file.fp8("m.experts.0.w1.weight", 8, 16);
    for (const char* size : {"null", "[128]", "[0,128]", "[128,-1]", "[128,1e99]", "\"128\""})
      refused((R"({"quantization_config":{"quant_method":"fp8","weight_block_size":)" +
               std::string(size) + "}}")
                  .c_str(),
              "weight_block_size");
  }
  SECTION("MXFP4 without scales") {
    file.raw.add("m.experts.gate_up_proj_blocks", "U8", "[1,64,1,16]", Bytes(1024))
        .add("m.experts.down_proj_blocks", "U8", "[1,32,1,16]", Bytes(512));
    refused(config, "expected the gate and up scales of all experts");
  }
  SECTION("MXFP4 of shapes that do not fit each other") {
    file.mxfp4("m.experts.gate_up_proj", 1, 64, 32);
    file.mxfp4("m.experts.down_proj", 1, 32, 64);
    refused(config, "'m.experts.gate_up_proj_blocks': expected shape [1, 128, 1, 16]");
  }
  SECTION("MXFP4 of another dtype, block or number of dimensions") {
    file.mxfp4("m.experts.down_proj", 1, 32, 32);
    file.raw.add("m.experts.up_proj_scales", "U8", "[1,32,1]", Bytes(32));
    SECTION("dtype") {
      file.raw.add("m.experts.up_proj_blocks", "I8", "[1,32,1,16]", Bytes(512));
      search.config =
          sida::MoeConfig{.layers = 1, .experts = 1, .hidden_size = 32, .intermediate_size = 32};
      refused(config, "expected U8, got I8");
    }
    SECTION("block") {
      file.raw.add("m.experts.up_proj_blocks", "U8", "[1,32,1,8]", Bytes(256));
      refused(config, "expected shape [1, 32, 1, 16]");
    }
    SECTION("dimensions") {
      file.raw.add("m.experts.up_proj_blocks", "U8", "[1,32,16]", Bytes(512));
      refused(config, "expected 4 dimensions, got 3");
    }
  }
}

TEST_CASE("Packed experts are computed in bf16 unless another dtype is asked for") {
  const TemporaryFolder folder;
  PackedFile file;
  file.mxfp4("m.experts.gate_up_proj", 1, 64, 32);
  file.mxfp4("m.experts.down_proj", 1, 32, 32);
  file.raw.add("m.experts.down_proj_bias", "F32", "[1,32]", std::vector<float>(32));
  folder.write("model.safetensors", file.raw.bytes());
  const auto checkpoint = sida::Checkpoint::open(folder.path());
  const auto experts = sida::find_experts(*checkpoint);
  CHECK(experts.config.dtype == DataType::bf16);
  CHECK(experts.layout == "stacked, mxfp4");
  CHECK(experts.stored_bytes() == 96 * 17 + 32 * 4);
}

}  // namespace packed_experts_test
