// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/io/file.hpp"
#include "sida/io/json.hpp"

namespace sida {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

/// Where a tensor lies in a safetensors file, and what it is.
struct SafetensorsTensor {
  std::string dtype;  ///< as the file spells it: "F32", "BF16", "I64", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  ///< bytes [begin, end) of the file, row-major
  std::uint64_t end = 0;
};

/// @cond
namespace detail {

struct SafetensorsType {
  const char* name;
  unsigned bits;
};
inline constexpr SafetensorsType safetensors_types[] = {
    {"F64", 64},        {"F32", 32},        {"F16", 16},    {"BF16", 16},   {"I64", 64},
    {"I32", 32},        {"I16", 16},        {"I8", 8},      {"U64", 64},    {"U32", 32},
    {"U16", 16},        {"U8", 8},          {"BOOL", 8},    {"C64", 64},    {"F8_E5M2", 8},
    {"F8_E5M2FNUZ", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6},
    {"F6_E3M2", 6},     {"F4", 4}};

/// Bits of one element; 0 for a dtype that the format does not have.
inline unsigned safetensors_bits(std::string_view dtype) noexcept {
  for (const SafetensorsType& type : safetensors_types)
    if (dtype == type.name) return type.bits;
  return 0;
}

}  // namespace detail
/// @endcond

/// The safetensors spelling of a dtype.
constexpr const char* safetensors_name(DataType type) noexcept {
  switch (type) {
    case DataType::f64:
      return "F64";
    case DataType::f32:
      return "F32";
    case DataType::f16:
      return "F16";
    case DataType::bf16:
      return "BF16";
    case DataType::i64:
      return "I64";
    case DataType::i32:
      return "I32";
    case DataType::u8:
      return "U8";
  }
  return "?";
}

/// A safetensors file: its header, checked in full when the file is opened, and positioned reads.
/// No tensor is kept in memory, and nothing is mapped. Thread-safe.
class SafetensorsFile {
 public:
  /// Reads and checks the header: lengths, JSON, dtypes, shapes, and that the tensors cover the
  /// file without hole or overlap. @throws IoError naming what is wrong.
  static SafetensorsFile open(const std::filesystem::path& path) {
    return SafetensorsFile(InputFile(path));
  }

  const std::filesystem::path& path() const noexcept { return file_.path(); }
  const std::map<std::string, SafetensorsTensor>& tensors() const noexcept { return tensors_; }
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }

  /// The tensor called `name`. @throws IoError if there is none.
  const SafetensorsTensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("expected a tensor " + in_quotes(name) + ", found none");
    return found->second;
  }

  /// Fills `destination` with the bytes of the file that begin at `begin`, a tensor's `begin` or a
  /// position behind it. @throws IoError if the file ends before.
  void read(std::uint64_t begin, std::span<std::byte> destination) const {
    file_.read(begin, destination);
  }
  /// See InputFile::will_read.
  void will_read(std::uint64_t begin, std::uint64_t bytes) const noexcept {
    file_.will_read(begin, bytes);
  }

 private:
  static constexpr std::uint64_t max_header_bytes = 100'000'000;  // the format's own limit

  explicit SafetensorsFile(InputFile file) : file_(std::move(file)) {
    const nlohmann::json header = read_header();
    if (!header.is_object()) fail("expected the header to be a JSON object");
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        read_metadata(entry);
      } else {
        tensors_.emplace(name, read_entry(name, entry));
      }
    }
    check_cover();
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw IoError(path().string() + ": safetensors: " + message);
  }
  [[noreturn]] void fail(const std::string& name, const std::string& message) const {
    fail("tensor " + in_quotes(name) + ": " + message);
  }

  nlohmann::json read_header() {
    std::uint64_t length = 0;
    if (file_.size() < sizeof length)
      fail("expected at least 8 bytes, got " + std::to_string(file_.size()));
    file_.read(0, std::as_writable_bytes(std::span(&length, 1)));
    if (length > max_header_bytes || length > file_.size() - sizeof length)
      fail("the header is said to have " + std::to_string(length) + " bytes, but the file has " +
           std::to_string(file_.size()) + " and a header at most " +
           std::to_string(max_header_bytes));
    data_begin_ = sizeof length + length;
    std::string text(static_cast<std::size_t>(length), '\0');
    file_.read(sizeof length, std::as_writable_bytes(std::span(text)));
    return parse_json(text, path().string() + ": safetensors header");
  }

  void read_metadata(const nlohmann::json& entries) {
    if (!entries.is_object()) fail("expected __metadata__ to be an object");
    for (const auto& [key, value] : entries.items()) {
      if (!value.is_string()) fail("expected __metadata__ " + in_quotes(key) + " to be a string");
      metadata_.emplace(key, value.get<std::string>());
    }
  }

  SafetensorsTensor read_entry(const std::string& name, const nlohmann::json& entry) const {
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") ||
        !entry.contains("shape") || !entry.contains("data_offsets"))
      fail(name, "expected dtype, shape and data_offsets");
    SafetensorsTensor tensor;
    const nlohmann::json& dtype = entry["dtype"];
    const unsigned bits =
        dtype.is_string() ? detail::safetensors_bits(dtype.get_ref<const std::string&>()) : 0;
    if (bits == 0) fail(name, "unknown dtype " + in_quotes(dtype.dump()));
    tensor.dtype = dtype.get<std::string>();
    std::uint64_t total_bits = bits;
    if (!entry["shape"].is_array()) fail(name, "expected shape to be an array");
    for (const nlohmann::json& extent : entry["shape"]) {
      tensor.shape.push_back(static_cast<std::int64_t>(unsigned_value(name, "shape", extent)));
      if (__builtin_mul_overflow(total_bits, extent.get<std::uint64_t>(), &total_bits))
        fail(name, "the shape has more elements than any file can hold");
    }
    const nlohmann::json& offsets = entry["data_offsets"];
    if (!offsets.is_array() || offsets.size() != 2) fail(name, "expected two data_offsets");
    const std::uint64_t begin = unsigned_value(name, "data_offsets", offsets[0]);
    const std::uint64_t end = unsigned_value(name, "data_offsets", offsets[1]);
    const std::uint64_t data_bytes = file_.size() - data_begin_;
    if (begin > end || end > data_bytes)
      fail(name, "data_offsets [" + std::to_string(begin) + ", " + std::to_string(end) +
                     "] do not lie in the " + std::to_string(data_bytes) +
                     " bytes behind the header; the file may be truncated");
    if (total_bits % 8 != 0 || total_bits / 8 != end - begin)
      fail(name, "shape and dtype ask for " + std::to_string(total_bits / 8) +
                     " bytes, data_offsets hold " + std::to_string(end - begin));
    tensor.begin = data_begin_ + begin;
    tensor.end = data_begin_ + end;
    return tensor;
  }

  std::uint64_t unsigned_value(const std::string& name, const char* what,
                               const nlohmann::json& value) const {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() > INT64_MAX)
      fail(name, std::string("expected non-negative integers in ") + what + ", got " +
                     in_quotes(value.dump()));
    return value.get<std::uint64_t>();
  }

  /// The tensors cover the bytes behind the header exactly.
  void check_cover() const {
    std::vector<const std::pair<const std::string, SafetensorsTensor>*> order;
    for (const auto& entry : tensors_) order.push_back(&entry);
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
      return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
    });
    std::uint64_t covered = data_begin_;
    for (const auto* entry : order) {
      if (entry->second.begin != covered)
        fail(entry->first,
             std::string("expected it to begin where the tensor before it ends, ") +
                 (entry->second.begin < covered ? "they overlap" : "there is a hole"));
      covered = entry->second.end;
    }
    if (covered != file_.size())
      fail("expected the tensors to end with the file, " + std::to_string(file_.size() - covered) +
           " bytes are left over");
  }

  InputFile file_;
  std::uint64_t data_begin_ = 0;
  std::map<std::string, SafetensorsTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace sida
