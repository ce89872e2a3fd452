// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bind.hpp"
#include "budget.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "sida/schedule/belady.hpp"
#include "stats.hpp"

namespace sida::bindings {

namespace py = pybind11;

namespace {

std::size_t natural(const char* name, std::int64_t value) {
  SIDA_EXPECTS(value >= 0,
               std::string(name) + ": expected 0 or more, got " + std::to_string(value));
  return static_cast<std::size_t>(value);
}

py::dict replay_of(const HashTable& routing, const HashTable* foretold, std::int32_t experts,
                   std::int64_t expert_bytes, const py::object& memory, const std::string& policy,
                   std::int64_t ahead, std::optional<double> bytes_per_second,
                   double latency_seconds, double layer_seconds, double expert_seconds,
                   int transfer_threads, std::int64_t chunk_bytes, std::int64_t uses_ahead,
                   double threshold) {
  ReplayOptions options;
  options.experts = experts;
  options.slab_bytes = natural("expert_bytes", expert_bytes);
  options.memory = budget_of(memory);
  options.ahead = natural("ahead", ahead);
  if (bytes_per_second) options.bytes_per_second = *bytes_per_second;
  options.latency_seconds = latency_seconds;
  options.layer_seconds = layer_seconds;
  options.expert_seconds = expert_seconds;
  options.transfers = {transfer_threads, natural("chunk_bytes", chunk_bytes), uses_ahead,
                       threshold};
  ReplayResult result;
  std::int64_t fewest = 0;
  {
    const Unlocked unlocked;
    result = replay(policy, routing, foretold ? *foretold : routing, options);
    fewest = belady_loads(uses_of(routing), result.slots);
  }
  py::dict dict = dict_of(result.stats);
  dict["slots"] = result.slots;
  dict["seconds"] = result.seconds;
  dict["belady_loads"] = fewest;
  dict["belady_bytes"] = fewest * expert_bytes;
  return dict;
}

}  // namespace

void bind_replay(py::module_& module) {
  const TransferOptions defaults;
  module.def(
      "replay", &replay_of, py::arg("routing"), py::arg("foretold") = py::none(), py::kw_only(),
      py::arg("experts"), py::arg("expert_bytes"), py::arg("memory"), py::arg("policy") = "auto",
      py::arg("ahead") = 16, py::arg("bytes_per_second") = py::none(),
      py::arg("latency_seconds") = 0.0, py::arg("layer_seconds") = 0.0,
      py::arg("expert_seconds") = 0.0, py::arg("transfer_threads") = defaults.threads,
      py::arg("chunk_bytes") = defaults.chunk_bytes, py::arg("uses_ahead") = defaults.uses_ahead,
      py::arg("threshold") = defaults.threshold,
      "What a run would do: recorded routing through the scheduler's decisions in imagined "
      "time.\n\n"
      "routing: what record() wrote, `experts` a layer of `expert_bytes` each. foretold: hash "
      "tables of the same batches, by default `routing` itself, which a perfect predictor would "
      "give. memory, policy and ahead are as for a run; ahead=0 is a run without tables. "
      "bytes_per_second (None: no limit) and latency_seconds are the slow tier's, layer_seconds "
      "and expert_seconds "
      "as OffloadScheduler.times() gives them.\n\n"
      "Returns the statistics of OffloadScheduler.stats(), `slots`, `seconds` of the whole run, "
      "and `belady_loads` and `belady_bytes`, the fewest possible.\n\n"
      "Raises:\n    ValueError: Tables of other batches, a budget or a number that cannot be "
      "right.");
}

}  // namespace sida::bindings
