// SPDX-License-Identifier: Apache-2.0
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "array.hpp"
#include "bind.hpp"
#include "budget.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "sida/cache/array_store.hpp"
#include "sida/cache/throttled_store.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/io/checkpoint_store.hpp"

namespace sida::bindings {
namespace {

Store open_store(const std::filesystem::path& path,
                 const std::optional<std::vector<std::string>>& layers,
                 const std::optional<std::string>& dtype, const std::optional<MoeConfig>& config,
                 bool interleaved) {
  ExpertSearch search;
  if (layers) search.layers = *layers;
  if (dtype) search.dtype = parse_data_type(*dtype);
  search.config = config;
  search.interleaved = interleaved;
  const auto checkpoint = Checkpoint::open(path);
  const CheckpointExperts experts = find_experts(*checkpoint, search);
  return {std::make_shared<CheckpointStore>(checkpoint, experts), experts.config,
          experts.layer_names, experts.layout, experts.stored_bytes()};
}

std::vector<std::string> tensors_of_checkpoint(const std::filesystem::path& path) {
  const auto checkpoint = Checkpoint::open(path);
  std::vector<std::string> names;
  for (const auto& [name, tensor] : checkpoint->tensors()) names.push_back(name);
  return names;
}

// The arrays of the experts, kept as long as the store.
using Arrays = std::vector<Array>;

void add_part(const py::handle& object, const std::string& name, const MoeConfig& config,
              const std::vector<std::int64_t>& shape, std::size_t offset, Arrays& arrays,
              std::vector<ArrayPart>& parts, bool anywhere) {
  Array array(object, name.c_str(), anywhere ? place_of(object) : Place());
  const ConstTensorView view = array.view();
  const ConstTensorView expected{nullptr, config.dtype, shape};
  SIDA_EXPECTS(view.type == config.dtype && view.shape == shape,
               name + ": expected " + expected.describe() + ", got " + view.describe());
  if (view.bytes() > 0) parts.push_back({offset, view.data, view.bytes()});
  arrays.push_back(std::move(array));
}

std::vector<ArrayPart> parts_of(const py::sequence& expert, const std::string& where,
                                const MoeConfig& config, const SlabLayout& layout, Arrays& arrays,
                                bool anywhere) {
  SIDA_EXPECTS(py::len(expert) == 4, where + ": expected (up, down, up_bias, down_bias), got " +
                                         std::to_string(py::len(expert)) + " entries");
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t intermediate = config.intermediate_size;
  const std::int64_t up_rows = config.gated ? 2 * intermediate : intermediate;
  std::vector<ArrayPart> parts;
  const auto add = [&](std::size_t index, const char* name, bool present,
                       const std::vector<std::int64_t>& shape, std::size_t offset) {
    const py::object part = expert[index];
    SIDA_EXPECTS(part.is_none() != present, where + ": " + name + ": expected " +
                                                (present ? "an array" : "None") +
                                                ", as the config says");
    if (present)
      add_part(part, where + ": " + name, config, shape, offset, arrays, parts, anywhere);
  };
  add(0, "up", true, {up_rows, hidden}, layout.up_offset);
  add(1, "down", true, {hidden, intermediate}, layout.down_offset);
  add(2, "up_bias", config.up_bias, {up_rows}, layout.up_bias_offset);
  add(3, "down_bias", config.down_bias, {hidden}, layout.down_bias_offset);
  return parts;
}

Store store_of_arrays(const MoeConfig& config, const py::sequence& layers) {
  const SlabLayout layout(config);
  SIDA_EXPECTS(static_cast<std::int32_t>(py::len(layers)) == config.layers,
               "experts: expected " + std::to_string(config.layers) + " layers, got " +
                   std::to_string(py::len(layers)));
  auto arrays = std::make_shared<Arrays>();
  std::vector<std::vector<ArrayPart>> parts;
  std::vector<std::string> names;
  for (std::size_t l = 0; l < py::len(layers); ++l) {
    const py::sequence experts = layers[l];
    SIDA_EXPECTS(static_cast<std::int32_t>(py::len(experts)) == config.experts,
                 "experts: expected " + std::to_string(config.experts) + " in layer " +
                     std::to_string(l) + ", got " + std::to_string(py::len(experts)));
    for (std::size_t e = 0; e < py::len(experts); ++e)
      parts.push_back(parts_of(experts[e],
                               "layer " + std::to_string(l) + ", expert " + std::to_string(e),
                               config, layout, *arrays, false));
    names.push_back("layer" + std::to_string(l));
  }
  return {std::make_shared<ArrayStore>(config.layers, config.experts, layout.slab_bytes,
                                       std::move(parts), arrays),
          config, names, "arrays", bytes_of_slabs(config)};
}

// The parts of a layer's experts, in arrays in RAM or on a GPU, which `arrays` keeps.
std::vector<std::vector<ArrayPart>> layer_parts(const py::sequence& experts,
                                                const MoeConfig& config, Arrays& arrays) {
  std::vector<std::vector<ArrayPart>> parts;
  for (std::size_t e = 0; e < py::len(experts); ++e)
    parts.push_back(parts_of(experts[e], "expert " + std::to_string(e), config, SlabLayout(config),
                             arrays, true));
  return parts;
}

void bind_pinned_layers(py::module_& module) {
  py::class_<AnyPinnedLayers, std::shared_ptr<AnyPinnedLayers>>(
      module, "PinnedLayers",
      "Experts in pinned memory for a GPU, taken layer by layer, so that whoever had them can let "
      "each layer go before the next. Arrays are in RAM or on the GPU.")
      .def(py::init([](const MoeConfig& config, const std::string& device) {
             return cuda_part().pin_layers(config, device);
           }),
           py::arg("config"), py::arg("device"))
      .def_property_readonly("store", &AnyPinnedLayers::store,
                             "The experts, for an ExpertCache, once all layers are there.")
      .def(
          "take",
          [](AnyPinnedLayers& self, const py::sequence& experts) {
            Arrays arrays;
            const auto parts = layer_parts(experts, self.store().config, arrays);
            const Unlocked unlocked;
            self.take(parts);
          },
          py::arg("experts"), "Takes the next layer: [expert] -> (up, down, up_bias, down_bias).")
      .def(
          "give_back",
          [](AnyPinnedLayers& self, std::int32_t layer, const py::sequence& experts) {
            Arrays arrays;
            const auto parts = layer_parts(experts, self.store().config, arrays);
            for (const Array& array : arrays) array.writable();  // throws
            const Unlocked unlocked;
            self.give_back(layer, parts);
          },
          py::arg("layer"), py::arg("experts"),
          "Copies a layer to such arrays, and frees its memory.");
}

}  // namespace

void bind_store(py::module_& module) {
  py::class_<Store>(module, "ExpertStore",
                    "The slow tier: every expert of a model, read from files or arrays as it is "
                    "needed. Thread-safe.")
      .def_static("open", &open_store, py::arg("path"), py::kw_only(),
                  py::arg("layers") = py::none(), py::arg("dtype") = py::none(),
                  py::arg("config") = py::none(), py::arg("interleaved") = false,
                  py::call_guard<Unlocked>(),
                  "The experts of a checkpoint: a safetensors file, or a folder with one or with "
                  "shards.\n\n"
                  "interleaved: gate and up take turns in gate_up_proj.")
      .def_static(
          "from_arrays", &store_of_arrays, py::arg("config"), py::arg("experts"),
          "Experts in arrays: [layer][expert] -> (up, down, up_bias, down_bias), used in place.")
      .def(
          "throttled",
          [](const Store& self, double bytes_per_second, double latency_seconds) {
            return Store{
                std::make_shared<ThrottledStore>(self.store, bytes_per_second, latency_seconds),
                self.config, self.layer_names, self.layout, self.stored_bytes};
          },
          py::kw_only(), py::arg("bytes_per_second"), py::arg("latency_seconds") = 0.0,
          "The same experts behind a link of the stated bandwidth and latency.")
      .def_readonly("config", &Store::config)
      .def_readonly("layer_names", &Store::layer_names)
      .def_readonly("layout", &Store::layout,
                    "How the checkpoint keeps its experts' tensors; \"arrays\" without one.")
      .def_readonly("stored_bytes", &Store::stored_bytes,
                    "Bytes that all experts take where they are read from: fewer than in slabs "
                    "where they are packed there.")
      .def_property_readonly("slab_bytes",
                             [](const Store& self) { return self.store->slab_bytes(); })
      .def_property_readonly(
          "staging_bytes", [](const Store& self) { return self.store->staging_bytes(); },
          "Bytes that reading needs beside the destination.")
      .def(
          "slots",
          [](const Store& self, const py::object& memory) {
            return budget_of(memory).slots(self.config.total_experts(), self.store->slab_bytes(),
                                           self.store->staging_bytes());
          },
          py::arg("memory"),
          "Experts that ExpertCache(self, memory) has room for; takes no memory itself.")
      .def(
          "read",
          [](const Store& self, std::int32_t layer, std::int32_t expert) {
            py::array_t<std::uint8_t> slab(static_cast<py::ssize_t>(self.store->slab_bytes()));
            auto* data = reinterpret_cast<std::byte*>(slab.mutable_data());
            const Unlocked unlocked;
            self.store->read({layer, expert}, 0, {data, self.store->slab_bytes()});
            return slab;
          },
          py::arg("layer"), py::arg("expert"), "The expert's slab, uint8 [slab_bytes].");
  module.def("checkpoint_tensors", &tensors_of_checkpoint, py::arg("path"),
             py::call_guard<Unlocked>(),
             "The names of a checkpoint's tensors, once every header is found to be right.");
  bind_pinned_layers(module);
}

}  // namespace sida::bindings
