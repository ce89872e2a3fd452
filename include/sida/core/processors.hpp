// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace sida {

/// @cond
namespace detail {

inline constexpr int no_limit = std::numeric_limits<int>::max();

/// Whole processors that `quota` microseconds of every `period` are: more threads would be stopped
/// in the midst of their work until the next period.
inline int processors_of(long long quota, long long period) noexcept {
  if (quota <= 0 || period <= 0) return no_limit;
  return static_cast<int>(std::clamp<long long>(quota / period, 1, no_limit));
}

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

/// The limit of one control group, by the file of version 2 or those of version 1 in its folder.
inline int quota_in(const std::filesystem::path& folder) {
  const std::string both = content_of(folder / "cpu.max");  // "max 100000" is no limit
  if (const std::size_t space = both.find(' '); space != std::string::npos)
    return processors_of(number_of(both), number_of(std::string_view(both).substr(space + 1)));
  return processors_of(number_of(content_of(folder / "cpu.cfs_quota_us")),
                       number_of(content_of(folder / "cpu.cfs_period_us")));
}

/// The least limit of a group and those around it. A container may see the names of groups that are
/// mounted under others there, if at all: where a folder is missing nothing is limited.
inline int quota_of(const std::filesystem::path& hierarchy, const std::filesystem::path& group) {
  int least = quota_in(hierarchy);
  std::filesystem::path folder = hierarchy;
  for (const std::filesystem::path& part : group.relative_path())
    least = std::min(least, quota_in(folder /= part));
  return least;
}

inline bool names_cpu(std::string_view controllers) {
  for (std::size_t begin = 0; begin <= controllers.size();) {
    const std::size_t end = std::min(controllers.find(',', begin), controllers.size());
    if (controllers.substr(begin, end - begin) == "cpu") return true;
    begin = end + 1;
  }
  return false;
}

/// Processors in the calling thread's affinity mask.
inline int processors_in_affinity() {
  for (std::size_t masks = 1; masks <= 1024; masks *= 2) {
    std::vector<::cpu_set_t> set(masks);
    const std::size_t bytes = masks * sizeof(::cpu_set_t);
    if (::sched_getaffinity(0, bytes, set.data()) == 0) return CPU_COUNT_S(bytes, set.data());
    if (errno != EINVAL) break;  // EINVAL: the machine has more processors than the mask bits
  }
  return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace detail
/// @endcond

/// Whole processors that the control groups of this process let it use: the CPU quota of a
/// container (cgroup version 2 `cpu.max`, version 1 `cpu.cfs_quota_us`) rounded down, at least 1;
/// nothing where there is none. Files are sought under `root`.
inline std::optional<int> processor_quota(const std::filesystem::path& root = "/") {
  int least = detail::no_limit;
  const std::string groups = detail::content_of(root / "proc/self/cgroup");
  std::size_t next = 0;
  for (std::size_t begin = 0; begin < groups.size(); begin = next + 1) {
    next = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, next - begin);  // number:controllers:/group
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    std::vector<std::string> hierarchies;
    if (controllers.empty())
      hierarchies = {"", "unified"};
    else if (detail::names_cpu(controllers))
      hierarchies = {"cpu", controllers};
    for (const std::string& hierarchy : hierarchies)
      least = std::min(least, detail::quota_of(root / "sys/fs/cgroup" / hierarchy, group));
  }
  if (least == detail::no_limit) return std::nullopt;
  return least;
}

/// Threads that this process can run at once: the processors of the calling thread's affinity mask,
/// and no more than processor_quota(). At least 1.
inline int usable_processors() {
  const int processors = std::max(1, detail::processors_in_affinity());
  return std::min(processors, processor_quota().value_or(processors));
}

}  // namespace sida
