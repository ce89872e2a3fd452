// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

/// @cond
namespace sida::detail {

/// What a small file holds; nothing where it cannot be read. Without streams of C++: those need
/// locales, which crash in a Python process whose modules do not share one libstdc++.
inline std::string content_of(const std::filesystem::path& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "r"),
                                                             &std::fclose);
  std::string content;
  char part[4096];
  while (file) {
    const std::size_t bytes = std::fread(part, 1, sizeof part, file.get());
    if (bytes == 0) break;
    content.append(part, bytes);
  }
  return content;
}

/// The number that a text begins with; 0 where it begins with none.
inline long long number_of(std::string_view text) noexcept {
  long long number = 0;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

inline bool names(std::string_view controllers, std::string_view controller) {
  for (std::size_t begin = 0; begin <= controllers.size();) {
    const std::size_t end = std::min(controllers.find(',', begin), controllers.size());
    if (controllers.substr(begin, end - begin) == controller) return true;
    begin = end + 1;
  }
  return false;
}

/// Calls `f` with the folders of the control groups of this process that `controller` ("cpu",
/// "memory") may have limits in, of either version, and of those around them. A container may see
/// the names of groups that are mounted under others there, if at all: folders may be missing.
template <class F>
void for_each_control_group(const std::filesystem::path& root, const std::string& controller,
                            F&& f) {
  const std::string groups = content_of(root / "proc/self/cgroup");
  std::size_t next = 0;
  for (std::size_t begin = 0; begin < groups.size(); begin = next + 1) {
    next = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, next - begin);  // number:controllers:/group
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::filesystem::path group = line.substr(second + 1);
    std::vector<std::string> hierarchies;
    if (controllers.empty())
      hierarchies = {"", "unified"};
    else if (names(controllers, controller))
      hierarchies = {controller, controllers};
    for (const std::string& hierarchy : hierarchies) {
      std::filesystem::path folder = root / "sys/fs/cgroup" / hierarchy;
      f(folder);
      for (const std::filesystem::path& part : group.relative_path()) f(folder /= part);
    }
  }
}

}  // namespace sida::detail
/// @endcond
