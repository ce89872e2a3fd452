// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

/// The bytes of a safetensors file with this header and these bytes behind it, put together without
/// sida's writer.
inline std::string raw_safetensors(std::string_view header, std::string_view data) {
  const std::uint64_t length = header.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  bytes += header;
  bytes += data;
  return bytes;
}

/// The memory of `values`.
template <class T>
std::string bytes_of(const std::vector<T>& values) {
  static_assert(std::is_trivially_copyable_v<T>);
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// Collects tensors for a safetensors file written by hand.
class RawSafetensors {
 public:
  template <class T>
  RawSafetensors& add(std::string_view name, std::string_view dtype, std::string_view shape,
                      const std::vector<T>& values) {
    const std::string bytes = bytes_of(values);
    entries_ += (entries_.empty() ? "" : ",") + ("\"" + std::string(name)) + R"(":{"dtype":")" +
                std::string(dtype) + R"(","shape":)" + std::string(shape) + R"(,"data_offsets":[)" +
                std::to_string(data_.size()) + "," + std::to_string(data_.size() + bytes.size()) +
                "]}";
    data_ += bytes;
    return *this;
  }
  /// The file, with `metadata` (the inside of a JSON object) if there is any.
  std::string bytes(std::string_view metadata = "") const {
    std::string header =
        metadata.empty() ? "" : R"("__metadata__":{)" + std::string(metadata) + "}";
    if (!header.empty() && !entries_.empty()) header += ",";
    return raw_safetensors("{" + header + entries_ + "}", data_);
  }

 private:
  std::string entries_, data_;
};
