// SPDX-License-Identifier: Apache-2.0
#include "sida/core/processors.hpp"

#include <sched.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>

#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

namespace sida::test {
namespace {

/// The quota that processor_quota finds in a root folder with these files.
std::optional<int> quota_of(const std::map<std::string, std::string>& files) {
  const TemporaryFolder root;
  for (const auto& [name, text] : files) {
    std::filesystem::create_directories((root / name).parent_path());
    std::ofstream(root / name) << text;
  }
  return processor_quota(root.path());
}

constexpr const char* groups = "proc/self/cgroup";

TEST_CASE("A container's CPU quota is found, in either version of control groups") {
  CHECK(quota_of({{groups, "0::/\n"}, {"sys/fs/cgroup/cpu.max", "400000 100000\n"}}) == 4);
  CHECK(quota_of({{groups, "12:memory:/\n4:cpu,cpuacct:/\n0::/\n"},
                  {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n"},
                  {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"}}) == 3);
  CHECK(quota_of({{groups, "4:cpuacct,cpu:/a\n"},
                  {"sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "50000\n"},
                  {"sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "10000\n"}}) == 5);
  CHECK(quota_of({{groups, "1:cpu:/\n0::/\n"},
                  {"sys/fs/cgroup/unified/cpu.max", "200000 100000\n"}}) == 2);
}

TEST_CASE("Parts of a processor do not count, but one is always there") {
  const auto of = [](const std::string& text) {
    return quota_of({{groups, "0::/\n"}, {"sys/fs/cgroup/cpu.max", text}});
  };
  CHECK(of("399999 100000\n") == 3);
  CHECK(of("150000 100000\n") == 1);
  CHECK(of("1000 100000\n") == 1);
}

TEST_CASE("The tightest of the groups around a process counts, those that are not mounted do not") {
  std::map<std::string, std::string> files{{groups, "0::/outer/middle/inner\n"},
                                           {"sys/fs/cgroup/outer/cpu.max", "200000 100000\n"},
                                           {"sys/fs/cgroup/outer/middle/cpu.max", "max 100000\n"},
                                           {"sys/fs/cgroup/outer/other/cpu.max", "100000 100000"}};
  CHECK(quota_of(files) == 2);
  files["sys/fs/cgroup/outer/middle/inner/cpu.max"] = "700000 100000\n";
  CHECK(quota_of(files) == 2);
  CHECK(quota_of({{groups, "4:cpu:/docker/0123\n"},  // seen from inside: mounted as the root
                  {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "600000\n"},
                  {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}}) == 6);
}

TEST_CASE("Where nothing limits the processors there is no quota") {
  CHECK(quota_of({}) == std::nullopt);
  CHECK(quota_of({{groups, "0::/\n"}}) == std::nullopt);
  CHECK(quota_of({{groups, "0::/\n"}, {"sys/fs/cgroup/cpu.max", "max 100000\n"}}) == std::nullopt);
  CHECK(quota_of({{groups, "4:cpu:/\n"},
                  {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"},
                  {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}}) == std::nullopt);
  // Not the group of the processors.
  CHECK(quota_of({{groups, "4:cpuset:/\n"},
                  {"sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n"},
                  {"sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"}}) == std::nullopt);
  for (const char* damaged : {"", "x", "::", "100000", "0 0", "100000 0", "-5 100000"})
    CHECK(quota_of({{groups, std::string("0::/\n") + damaged},
                    {"sys/fs/cgroup/cpu.max", damaged}}) == std::nullopt);
}

TEST_CASE("A thread's affinity bounds the processors that are used") {
  ::cpu_set_t before;
  REQUIRE(::sched_getaffinity(0, sizeof before, &before) == 0);
  CHECK(usable_processors() >= 1);
  CHECK(usable_processors() <= CPU_COUNT(&before));
  ::cpu_set_t one;
  CPU_ZERO(&one);
  for (int processor = 0; processor < CPU_SETSIZE; ++processor)
    if (CPU_ISSET(processor, &before)) {
      CPU_SET(processor, &one);
      break;
    }
  REQUIRE(::sched_setaffinity(0, sizeof one, &one) == 0);
  CHECK(usable_processors() == 1);
  REQUIRE(::sched_setaffinity(0, sizeof before, &before) == 0);
}

}  // namespace
}  // namespace sida::test
