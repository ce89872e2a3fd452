// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "sida/core/control_groups.hpp"

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

/// The limit of one control group, by the file of version 2 or those of version 1 in its folder.
inline int quota_in(const std::filesystem::path& folder) {
  const std::string both = content_of(folder / "cpu.max");  // "max 100000" is no limit
  if (const std::size_t space = both.find(' '); space != std::string::npos)
    return processors_of(number_of(both), number_of(std::string_view(both).substr(space + 1)));
  return processors_of(number_of(content_of(folder / "cpu.cfs_quota_us")),
                       number_of(content_of(folder / "cpu.cfs_period_us")));
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
  detail::for_each_control_group(root, "cpu", [&](const std::filesystem::path& folder) {
    least = std::min(least, detail::quota_in(folder));
  });
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
