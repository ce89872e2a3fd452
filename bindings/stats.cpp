// SPDX-License-Identifier: Apache-2.0
#include "stats.hpp"

namespace sida::bindings {

namespace py = pybind11;

namespace {

py::dict dict_of(const LayerStats& stats) {
  py::dict dict;
  dict["calls"] = stats.calls;
  dict["predicted_calls"] = stats.predicted_calls;
  dict["uses"] = stats.uses;
  dict["hits"] = stats.hits;
  dict["late"] = stats.late;
  dict["misses"] = stats.misses;
  dict["stall_seconds"] = stats.stall_seconds;
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
  py::list layers;
  for (const LayerStats& layer : stats.layers) layers.append(dict_of(layer));
  dict["layers"] = layers;
  return dict;
}

}  // namespace sida::bindings
