// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <memory>
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

void bind_cache(py::module_& module) {
  py::class_<AnyCache, std::shared_ptr<AnyCache>>(
      module, "ExpertCache",
      "Experts in fast memory under a hard limit: one arena of equal slots. Thread-safe.\n\n"
      "memory: bytes (int, \"2GiB\"), a fraction of all experts (float, \"20%\") or a count over "
      "all "
      "layers (\"12 experts\"). policy: fifo, lru, lfu, lookahead, auto. With arrays in RAM and a "
      "budget for all experts the arrays are used in place.")
      .def(
          py::init([](const Store& store, const py::object& memory, const std::string& policy,
                      const std::string& device) {
            const Budget budget = budget_of(memory);
            const Unlocked unlocked;
            return make_cache(store, budget, policy, device);
          }),
          py::arg("store"), py::arg("memory"), py::kw_only(), py::arg("policy") = "auto",
          py::arg("device") = "cpu",
          "Allocates the arena.\n\n"
          "Raises:\n    ValueError: A budget that buys no expert, or an unknown policy or device.\n"
          "    MemoryError: The budget is larger than the memory that is available.")
      .def_property_readonly("slots", &AnyCache::slots, "Experts that are resident at most.")
      .def_property_readonly("slot_bytes", &AnyCache::slot_bytes, "Bytes of one expert's slot.")
      .def_property_readonly("capacity_bytes", &AnyCache::capacity_bytes,
                             "Bytes of the arena; 0 in place.")
      .def_property_readonly("policy", &AnyCache::policy, "fifo, lru, lfu or lookahead.")
      .def_property_readonly("device", &AnyCache::device, "cpu.")
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
}

}  // namespace sida::bindings
