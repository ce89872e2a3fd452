// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <string>
#include <string_view>

#include "sida/core/control_groups.hpp"

namespace sida {

/// @cond
namespace detail {

inline constexpr std::size_t no_memory_limit = std::numeric_limits<std::size_t>::max();

/// The number behind the line's `name` in a file of names and numbers; 0 where there is none.
inline std::size_t field_of(std::string_view text, std::string_view name) {
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    std::string_view line = text.substr(begin, end - begin);
    begin = end + 1;
    if (!line.starts_with(name)) continue;
    line.remove_prefix(name.size());
    if (line.empty() || line.front() != ' ') continue;
    line.remove_prefix(std::min(line.find_first_not_of(' '), line.size()));
    return static_cast<std::size_t>(std::max(0LL, number_of(line)));
  }
  return 0;
}

/// What a control group leaves: its limit less what is used, but for pages of files, which make way
/// for other memory.
inline std::size_t memory_left_in(const std::filesystem::path& folder) {
  struct Files {
    const char *limit, *used, *files;
  };
  for (const Files& names :
       {Files{"memory.max", "memory.current", "inactive_file"},
        Files{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"}}) {
    const auto limit = number_of(content_of(folder / names.limit));  // "max" is no limit
    if (limit <= 0) continue;
    const auto used = std::max(0LL, number_of(content_of(folder / names.used)));
    const std::size_t files = field_of(content_of(folder / "memory.stat"), names.files);
    const std::size_t busy =
        static_cast<std::size_t>(used) - std::min(static_cast<std::size_t>(used), files);
    return static_cast<std::size_t>(limit) - std::min(static_cast<std::size_t>(limit), busy);
  }
  return no_memory_limit;
}

}  // namespace detail
/// @endcond

/// Bytes of RAM that can be taken before the system or a container's limit (of control groups,
/// version 1 or 2) is met, what other programs use taken off; the largest number where nobody
/// tells. Files are sought under `root`.
inline std::size_t available_memory(const std::filesystem::path& root = "/") {
  std::size_t least = detail::no_memory_limit;
  const std::string system = detail::content_of(root / "proc/meminfo");
  if (const std::size_t kib = detail::field_of(system, "MemAvailable:")) least = kib * 1024;
  detail::for_each_control_group(root, "memory", [&](const std::filesystem::path& folder) {
    least = std::min(least, detail::memory_left_in(folder));
  });
  return least;
}

}  // namespace sida
