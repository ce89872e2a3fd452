// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "sida/core/error.hpp"
#include "sida/io/file.hpp"

namespace sida {

/// `text` in quotes, cut to a length that fits into a message: names from a file are untrusted.
inline std::string in_quotes(std::string_view text) {
  constexpr std::size_t longest = 160;
  return text.size() <= longest ? "'" + std::string(text) + "'"
                                : "'" + std::string(text.substr(0, longest)) + "…'";
}

/// The JSON document in `text`. `source` names it in errors. Nesting beyond 32 levels and a key
/// that an object holds twice are refused, since one of its values would go unseen.
/// @throws IoError.
inline nlohmann::json parse_json(std::string_view text, const std::string& source) {
  using Json = nlohmann::json;
  constexpr std::size_t deepest = 32;
  std::vector<std::unordered_set<std::string>> keys;  // of each object or array that is open
  const auto check = [&](int, Json::parse_event_t event, const Json& parsed) {
    switch (event) {
      case Json::parse_event_t::object_start:
      case Json::parse_event_t::array_start:
        if (keys.size() == deepest)
          throw IoError(source + ": JSON is nested more than " + std::to_string(deepest) +
                        " levels deep");
        keys.emplace_back();
        break;
      case Json::parse_event_t::object_end:
      case Json::parse_event_t::array_end:
        keys.pop_back();
        break;
      case Json::parse_event_t::key:
        if (const auto& key = parsed.get_ref<const std::string&>(); !keys.back().insert(key).second)
          throw IoError(source + ": expected each key once, got " + in_quotes(key) + " twice");
        break;
      case Json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return Json::parse(text, check);
  } catch (const Json::exception& error) {
    throw IoError(source + ": not valid JSON: " + in_quotes(error.what()));
  }
}

/// The JSON document in a file of at most `max_bytes`. @throws IoError.
inline nlohmann::json read_json(const std::filesystem::path& path, std::uint64_t max_bytes) {
  const InputFile file(path);
  if (file.size() > max_bytes)
    throw IoError(path.string() + ": expected a JSON file of at most " + std::to_string(max_bytes) +
                  " bytes, got " + std::to_string(file.size()));
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read(0, std::as_writable_bytes(std::span(text)));
  return parse_json(text, path.string());
}

}  // namespace sida
