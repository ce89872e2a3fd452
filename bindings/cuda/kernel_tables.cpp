// SPDX-License-Identifier: Apache-2.0
#include "kernel_tables.hpp"

#include <pybind11/stl.h>

#include <cctype>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "gil.hpp"
#include "sida/ffn/kernel_table.hpp"
#include "sida/io/kernel_table_file.hpp"

namespace sida::bindings {
namespace {

namespace py = pybind11;
using Path = std::filesystem::path;

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// "NVIDIA H100 80GB HBM3" as "nvidia-h100-80gb-hbm3".
std::string file_name_of(const std::string& gpu) {
  std::string name;
  for (const char letter : gpu) {
    const auto code = static_cast<unsigned char>(letter);
    if (std::isalnum(code))
      name += static_cast<char>(std::tolower(code));
    else if (!name.empty() && name.back() != '-')
      name += '-';
  }
  return "kernels-" + name + ".json";
}

// Where the table of GPUs of this name lies: at SIDA_KERNEL_TABLE, where that is set, and nowhere
// if it is set to nothing; else in the user's folder of configuration, by the XDG rules.
std::optional<Path> table_path(const std::string& gpu) {
  if (const char* chosen = std::getenv("SIDA_KERNEL_TABLE"))
    return *chosen ? std::optional<Path>(chosen) : std::nullopt;
  Path folder = setting("XDG_CONFIG_HOME");
  if (!folder.is_absolute()) {
    const std::string home = setting("HOME");
    if (home.empty()) return std::nullopt;
    folder = Path(home) / ".config";
  }
  return folder / "sida" / file_name_of(gpu);
}

void use_table_of_user(const CudaBackend& backend, bool may_lack) {
  static std::mutex mutex;
  static std::set<int> done;
  const std::lock_guard lock(mutex);
  if (done.contains(backend.device())) return;
  const std::optional<Path> path = table_path(backend.device_name());
  std::error_code unreadable;
  const bool is_wanted = !may_lack && std::getenv("SIDA_KERNEL_TABLE");
  if (path && (is_wanted || std::filesystem::exists(*path, unreadable))) {
    try {
      use_kernels(backend, load_kernel_table(*path));
    } catch (const InvalidArgument& error) {
      throw IoError(path->string() + ": " + error.what());
    }
  }
  done.insert(backend.device());
}

std::vector<std::pair<std::string, std::vector<double>>> time_kernels_of(const std::string& device,
                                                                         const MoeConfig& config,
                                                                         std::int32_t tokens,
                                                                         int repetitions,
                                                                         std::uint32_t seed) {
  const Unlocked unlocked;
  CudaBackend backend = open_gpu(device, true);
  std::vector<std::pair<std::string, std::vector<double>>> found;
  for (KernelTimes& times : time_kernels(backend, config, tokens, repetitions, seed))
    found.emplace_back(std::move(times.kernel), std::move(times.microseconds));
  return found;
}

}  // namespace

CudaBackend open_gpu(const std::string& device, bool may_lack) {
  CudaBackend backend(CudaBackend::device_index(device));
  use_table_of_user(backend, may_lack);
  return backend;
}

void bind_kernel_tables(py::module_& module) {
  module.def(
      "device_name",
      [](const std::string& device) {
        return CudaBackend(CudaBackend::device_index(device)).device_name();
      },
      py::arg("device"), "What the driver calls a GPU. Raises CudaError.");
  module.def(
      "kernel_table_path",
      [](const std::string& gpu) -> std::optional<std::string> {
        const std::optional<Path> path = table_path(gpu);
        return path ? std::optional(path->string()) : std::nullopt;
      },
      py::arg("gpu"),
      "The file with the kernels that were measured on GPUs of this name, or None.");
  module.def(
      "kernel_of",
      [](const std::string& device, const MoeConfig& config, std::int32_t tokens) {
        return kernel_of(open_gpu(device, true), config, tokens);
      },
      py::arg("device"), py::arg("config"), py::arg("tokens"),
      "The kernel that calls of so many tokens run with.");
  module.def("time_kernels", &time_kernels_of, py::arg("device"), py::arg("config"),
             py::arg("tokens"), py::arg("repetitions"), py::arg("seed") = 0,
             "(kernel, microseconds of each turn) of those that take the shape, in turns.");
}

}  // namespace sida::bindings
