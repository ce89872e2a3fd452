// SPDX-License-Identifier: Apache-2.0
#include "sida/core/available_memory.hpp"

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <string>

#include "support/catch.hpp"
#include "support/temporary_folder.hpp"

namespace sida::test {
namespace {

/// What available_memory finds in a root folder with these files.
std::size_t available_in(const std::map<std::string, std::string>& files) {
  const TemporaryFolder root;
  for (const auto& [name, text] : files) {
    std::filesystem::create_directories((root / name).parent_path());
    std::ofstream(root / name) << text;
  }
  return available_memory(root.path());
}

const std::pair<const std::string, std::string> system{
    "proc/meminfo", "MemTotal:       8000 kB\nMemFree:   1 kB\nMemAvailable:    4000 kB\n"};
constexpr const char* groups = "proc/self/cgroup";

TEST_CASE("Available memory is what the system tells, and the rest of a container's limit") {
  CHECK(available_in({system}) == 4000 * 1024);
  CHECK(available_in({system, {groups, "0::/\n"}, {"sys/fs/cgroup/memory.max", "max\n"}}) ==
        4000 * 1024);
  // Version 2; pages of files make way.
  CHECK(available_in({system,
                      {groups, "0::/outer/inner\n"},
                      {"sys/fs/cgroup/outer/memory.max", "1000000\n"},
                      {"sys/fs/cgroup/outer/memory.current", "700000\n"},
                      {"sys/fs/cgroup/outer/memory.stat",
                       "anon 500000\ninactive_file 200000\nfile 5\n"}}) == 500000);
  // Version 1.
  CHECK(available_in({system,
                      {groups, "3:cpu:/\n7:memory:/docker/01\n"},
                      {"sys/fs/cgroup/memory/memory.limit_in_bytes", "3000000\n"},
                      {"sys/fs/cgroup/memory/memory.usage_in_bytes", "1000000\n"},
                      {"sys/fs/cgroup/memory/memory.stat",
                       "inactive_file 7\ntotal_inactive_file 400000\n"}}) == 2400000);
  // What is used beyond a limit that was lowered leaves nothing.
  CHECK(available_in({system,
                      {groups, "0::/\n"},
                      {"sys/fs/cgroup/memory.max", "1000\n"},
                      {"sys/fs/cgroup/memory.current", "5000\n"}}) == 0);
}

TEST_CASE("Where nobody tells, memory is not bounded") {
  CHECK(available_in({}) == std::numeric_limits<std::size_t>::max());
  CHECK(available_memory() > 0);
  CHECK(available_memory() < std::numeric_limits<std::size_t>::max());
}

}  // namespace
}  // namespace sida::test
