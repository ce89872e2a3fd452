// SPDX-License-Identifier: Apache-2.0
#include "stats.hpp"

namespace sida::bindings {

namespace py = pybind11;

namespace {

py::dict dict_of(const LookAheadStats& stats) {
  py::dict dict;
  dict["uses"] = stats.uses;
  dict["foretold"] = stats.foretold;
  dict["foretold_uses"] = stats.foretold_uses;
  return dict;
}

py::dict dict_of(const LayerStats& stats) {
  py::dict dict;
  dict["calls"] = stats.calls;
  dict["predicted_calls"] = stats.predicted_calls;
  dict["uses"] = stats.uses;
  dict["hits"] = stats.hits;
  dict["late"] = stats.late;
  dict["misses"] = stats.misses;
  dict["stall_seconds"] = stats.stall_seconds;
  dict["look_ahead"] = dict_of(stats.look_ahead);
  return dict;
}

}  // namespace

py::dict dict_of(const CacheStats& stats) {
  py::dict dict = dict_of(stats.total);
  dict["loads"] = stats.loads;
  dict["prefetches"] = stats.prefetches;
  dict["wasted"] = stats.wasted;
  dict["failed_prefetches"] = stats.failed_prefetches;
  dict["bytes_moved"] = stats.bytes_moved;
  dict["bytes_wasted"] = stats.bytes_wasted;
  dict["passes"] = stats.passes;
  dict["tables"] = stats.tables;
  py::dict look_ahead = dict["look_ahead"];
  look_ahead["loads"] = stats.look_ahead_loads;
  look_ahead["used"] = stats.look_ahead_used;
  look_ahead["wasted"] = stats.look_ahead_wasted;
  look_ahead["cancelled"] = stats.look_ahead_cancelled;
  py::list layers;
  for (const LayerStats& layer : stats.layers) layers.append(dict_of(layer));
  dict["layers"] = layers;
  return dict;
}

}  // namespace sida::bindings
