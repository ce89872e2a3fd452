// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "budget.hpp"
#include "engine.hpp"
#include "gil.hpp"

namespace sida::bindings {

namespace py = pybind11;

Budget budget_of(const py::handle& memory) {
  if (py::isinstance<py::str>(memory)) return Budget::parse(memory.cast<std::string>());
  if (py::isinstance<py::float_>(memory)) return Budget::fraction(memory.cast<double>());
  if (py::isinstance<py::bool_>(memory) || !PyIndex_Check(memory.ptr()))
    throw py::type_error(
        "memory: expected bytes (int or \"2GiB\"), a fraction (float or \"20%\") or a count (\"12 "
        "experts\"), got " +
        py::repr(memory).cast<std::string>());
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(memory.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;  // beyond 64 bits: all experts, or less than none
  const long long bytes = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0)
    return Budget::bytes(overflow > 0 ? std::numeric_limits<std::int64_t>::max() : -1);
  return Budget::bytes(bytes);
}

const CudaPart& cuda_part() {
  try {
    const py::object capsule = py::module_::import("sida._cuda").attr("_part");
    return *static_cast<const CudaPart*>(PyCapsule_GetPointer(capsule.ptr(), "sida.CudaPart"));
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_ModuleNotFoundError))
      throw CudaError(
          "cuda: this installation of sida has no CUDA part; install sida where the CUDA toolkit "
          "(nvcc) is, or use device='cpu'");
    if (error.matches(PyExc_ImportError))
      throw CudaError("cuda: sida's CUDA part cannot be loaded: " + std::string(error.what()));
    throw;
  }
}

namespace {

// Bytes of pinned memory that `host_memory` allows for experts.
std::optional<std::size_t> host_bytes_of(const py::handle& host_memory, const Store& store) {
  if (host_memory.is_none()) return std::nullopt;
  const std::size_t slab = store.store->slab_bytes();
  const std::int64_t experts = budget_of(host_memory).slots(store.config.total_experts(), slab, 0);
  return static_cast<std::size_t>(experts) * slab;
}

// Calls a Python function from a thread that has let go of Python's lock.
FillReport report_to(const py::object& function) {
  if (function.is_none()) return {};
  return [&function](std::size_t done, std::size_t total) {
    const Locked locked;
    function(done, total);
  };
}

std::shared_ptr<AnyCache> make_cache(const Store& store, const py::object& memory,
                                     const std::string& policy, const std::string& device,
                                     const py::object& host_memory, const py::object& report) {
  const Budget budget = budget_of(memory);
  if (device == "cpu") {
    SIDA_EXPECTS(host_memory.is_none(),
                 "host_memory= bounds pinned memory and goes with device=\"cuda\"");
    const Unlocked unlocked;
    return make_cpu_cache(store, budget, policy);
  }
  SIDA_EXPECTS(device == "cuda" || device.starts_with("cuda:"),
               "device: expected \"cpu\", \"cuda\" or \"cuda:1\", got \"" + device + "\"");
  const CudaPart& cuda = cuda_part();
  const std::optional<std::size_t> host_bytes = host_bytes_of(host_memory, store);
  const FillReport told = report_to(report);
  const Unlocked unlocked;
  return cuda.make_cache(store, budget, policy, device, host_bytes, told);
}

}  // namespace

void bind_cache(py::module_& module) {
  py::class_<AnyCache, std::shared_ptr<AnyCache>>(
      module, "ExpertCache",
      "Experts in fast memory under a hard limit: one arena of equal slots. Thread-safe.\n\n"
      "memory: bytes (int, \"2GiB\"), a fraction of all experts (float, \"20%\") or a count over "
      "all "
      "layers (\"12 experts\"). policy: fifo, lru, lfu, lookahead, auto. With arrays in RAM and a "
      "budget for all experts the arrays are used in place.")
      .def(py::init(&make_cache), py::arg("store"), py::arg("memory"), py::kw_only(),
           py::arg("policy") = "auto", py::arg("device") = "cpu",
           py::arg("host_memory") = py::none(), py::arg("report") = py::none(),
           "Allocates the arena.\n\n"
           "device: \"cpu\", \"cuda\" or \"cuda:1\". For a GPU experts are read into pinned memory "
           "first, host_memory of it (as memory; by default nine tenths of the RAM); those beyond "
           "are read from the store each time, through a ring of up to 16 MiB of it. report(bytes "
           "read so far, bytes in all) is called meanwhile, by the caller's thread.\n\n"
           "Raises:\n    ValueError: A budget that buys no expert, or an unknown policy or "
           "device.\n"
           "    MemoryError: The budget is larger than the memory that is available.\n"
           "    CudaError: There is no such GPU, or no CUDA part of sida.")
      .def_property_readonly("slots", &AnyCache::slots, "Experts that are resident at most.")
      .def_property_readonly("slot_bytes", &AnyCache::slot_bytes, "Bytes of one expert's slot.")
      .def_property_readonly("capacity_bytes", &AnyCache::capacity_bytes,
                             "Bytes of the arena; 0 in place.")
      .def_property_readonly("policy", &AnyCache::policy, "fifo, lru, lfu or lookahead.")
      .def_property_readonly("device", &AnyCache::device, "cpu, or cuda:0 and the like.")
      .def_property_readonly("in_place", &AnyCache::in_place,
                             "Whether the store's arrays are used where they are.")
      .def(
          "resident",
          [](const AnyCache& cache) {
            std::vector<std::pair<std::int32_t, std::int32_t>> ids;
            for (const ExpertId id : cache.resident()) ids.emplace_back(id.layer, id.expert);
            return ids;
          },
          "(layer, expert) of every resident expert.")
      .def(
          "resize",
          [](AnyCache& cache, const py::object& memory) {
            const Budget budget = budget_of(memory);
            const Unlocked unlocked;
            cache.resize(budget);
          },
          py::arg("memory"), "Replaces the arena; waits until no expert is in use, and drops all.");
  module.def(
      "check_cuda", [](const std::string& device) { cuda_part().check(device); }, py::arg("device"),
      "Raises CudaError, saying what to do, unless experts can be computed on this GPU.");
}

}  // namespace sida::bindings
