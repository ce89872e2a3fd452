// SPDX-License-Identifier: Apache-2.0
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "array.hpp"
#include "bind.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "sida/hash/batch_key.hpp"
#include "sida/io/hash_table_file.hpp"
#include "sida/io/predictor_file.hpp"

namespace sida::bindings {
namespace {

// Ids are not cast silently: 1.7 is no expert.
using Ids = py::array_t<std::int64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

void expect_shape(const py::array& array, const std::vector<std::int64_t>& expected,
                  const char* name) {
  const std::vector<std::int64_t> shape(array.shape(), array.shape() + array.ndim());
  SIDA_EXPECTS(shape == expected, std::string(name) +
                                      ": expected shape (layers, tokens, candidates) = " +
                                      py::str(py::cast(expected)).cast<std::string>() + ", got " +
                                      py::str(py::cast(shape)).cast<std::string>());
}

HashTable make_table(std::int32_t layers, std::int32_t candidates, std::vector<std::uint64_t> keys,
                     std::vector<std::int64_t> offsets, const Ids& ids, const Floats& probs,
                     const Floats& scale) {
  SIDA_EXPECTS(!offsets.empty(), "offsets: expected one more than keys, got none");
  const std::vector<std::int64_t> shape{layers, offsets.back(), candidates};
  expect_shape(ids, shape, "ids");
  expect_shape(probs, shape, "probs");
  expect_shape(scale, shape, "scale");
  HashTable table{layers, candidates, std::move(keys), std::move(offsets), {}, {}, {}};
  for (py::ssize_t i = 0; i < ids.size(); ++i) {
    const std::int64_t id = ids.data()[i];
    SIDA_EXPECTS(id >= -1 && id <= std::numeric_limits<std::int32_t>::max(),
                 "ids: expected experts, or -1 for none; got " + std::to_string(id));
    table.ids.push_back(static_cast<std::int32_t>(id));
  }
  table.probs.assign(probs.data(), probs.data() + probs.size());
  table.scale.assign(scale.data(), scale.data() + scale.size());
  table.validate();
  return table;
}

// A copy: the table may go before the array does.
template <class T>
py::array_t<T> shaped(const HashTable& table, const std::vector<T>& values) {
  py::array_t<T> array(std::vector<py::ssize_t>{table.layers, table.tokens(), table.candidates});
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

void bind_table(py::module_& module) {
  py::class_<HashTable>(
      module, "HashTable",
      "For every MoE layer and token, which experts will be active and with what scale.\n\n"
      "Holds one batch or many, their tokens one behind the other: batch b has tokens offsets[b] "
      "to "
      "offsets[b + 1] and is found by keys[b]. Arrays are given back as copies.")
      .def(py::init(&make_table), py::kw_only(), py::arg("layers"), py::arg("candidates"),
           py::arg("keys"), py::arg("offsets"), py::arg("ids"), py::arg("probs"), py::arg("scale"),
           "ids (integers, -1 for none), probs and scale are [layers, tokens, candidates].\n\n"
           "Raises:\n    ValueError: Sizes do not agree, or a value is out of range.")
      .def_static("load", &load_hash_table, py::arg("path"), py::call_guard<Unlocked>(),
                  "The table in a file that save() or a handle's record() wrote.")
      .def(
          "save",
          [](const HashTable& table, const std::filesystem::path& path,
             const std::map<std::string, std::string>& notes) {
            save_hash_table(path, table, notes);
          },
          py::arg("path"), py::kw_only(), py::arg("notes") = std::map<std::string, std::string>(),
          py::call_guard<Unlocked>(),
          "Writes the table, whole or not at all, with notes in the file's metadata.")
      .def(
          "find",
          [](const HashTable& table, std::uint64_t key) -> std::optional<HashTable> {
            const auto batch = table.find(key);
            return batch ? std::optional(table.slice(*batch)) : std::nullopt;
          },
          py::arg("key"), "The table of the first batch with this key alone, or None.")
      .def("slice", &HashTable::slice, py::arg("batch"), "The table of one batch alone.")
      .def("__len__", &HashTable::batches, "Number of batches.")
      .def_readonly("layers", &HashTable::layers, "All MoE layers of the model.")
      .def_readonly("candidates", &HashTable::candidates, "Experts named for each token.")
      .def_property_readonly("tokens", &HashTable::tokens, "Of all batches.")
      .def_readonly("keys", &HashTable::keys, "batch_key of each batch.")
      .def_readonly("offsets", &HashTable::offsets, "First token of each batch, and the end.")
      .def_property_readonly(
          "ids", [](const HashTable& table) { return shaped(table, table.ids); },
          "int32 [layers, tokens, candidates]; -1: nothing is foretold.")
      .def_property_readonly(
          "probs", [](const HashTable& table) { return shaped(table, table.probs); },
          "float32 [layers, tokens, candidates].")
      .def_property_readonly(
          "scale", [](const HashTable& table) { return shaped(table, table.scale); },
          "float32 [layers, tokens, candidates]: what the router would return as weight.")
      .def("__repr__", [](const HashTable& table) {
        return "HashTable(" + std::to_string(table.batches()) + " batches, " +
               std::to_string(table.layers) + " layers, " + std::to_string(table.tokens()) +
               " tokens, " + std::to_string(table.candidates) + " candidates)";
      });
}

std::shared_ptr<AnyPredictor> load(const std::filesystem::path& path, const std::string& device) {
  if (device == "cpu") {
    const Unlocked unlocked;
    return make_cpu_predictor(load_predictor(path));
  }
  SIDA_EXPECTS(device == "cuda" || device.starts_with("cuda:"),
               "device: expected \"cpu\", \"cuda\" or \"cuda:1\", got \"" + device + "\"");
  const CudaPart& cuda = cuda_part();
  const Unlocked unlocked;
  return cuda.make_predictor(load_predictor(path), device);
}

// An array in RAM or, for a predictor on a GPU, there.
Place place_for(const AnyPredictor& predictor, const py::object& array) {
  if (predictor.cuda_device() < 0 || place_of(array).cuda_device < 0) return {};
  return {predictor.cuda_device(), stream_of(py::none(), array, predictor.cuda_device())};
}

HashTable predict(const AnyPredictor& self, const py::object& embeddings, const py::object& mask,
                  std::uint64_t key, std::int32_t candidates) {
  const Place place = place_for(self, embeddings);
  const Array array(embeddings, "embeddings", place);
  const auto flags = mask_of(mask);
  const Unlocked unlocked;
  return self.predict(array.view(), flags, key, candidates, place.stream);
}

HashTable advance(const AnyPredictor& self, const py::object& embeddings, const py::object& mask,
                  const py::object& past, const py::object& states, std::uint64_t key,
                  std::int32_t candidates) {
  const Place place = place_for(self, states);
  const Array array(embeddings, "embeddings", place_for(self, embeddings));
  const Array earlier(past, "past", place_for(self, past));
  const Array written(states, "states", place);
  const TensorView out = written.writable();
  const auto flags = mask_of(mask);
  const Unlocked unlocked;
  return self.advance(array.view(), flags, earlier.view(), out, key, candidates, place.stream);
}

void bind_predictor(py::module_& module) {
  using Predictor = AnyPredictor;
  py::class_<Predictor, std::shared_ptr<Predictor>>(
      module, "HashPredictor", py::release_gil_before_calling_cpp_dtor(),
      "Foretells routing from token embeddings, on the CPU or on a GPU. Thread-safe.")
      .def_static(
          "load", &load, py::arg("path"), py::kw_only(), py::arg("device") = "cpu",
          "The predictor in a file that train_predictor(...).save() wrote.\n\n"
          "device: \"cpu\", \"cuda\" or \"cuda:1\": where it works; the tables are the same "
          "to 1e-4.\n\n"
          "Raises:\n    OSError: There is no such file, or it is not a predictor's.\n"
          "    ValueError: Another device's name.\n"
          "    MemoryError: The GPU has no memory left.\n"
          "    CudaError: There is no such GPU, or no CUDA part of sida.")
      .def("predict", &predict, py::arg("embeddings"), py::arg("mask") = py::none(), py::kw_only(),
           py::arg("key") = 0, py::arg("candidates") = 8,
           "HashTable of one batch from embeddings float32 [B, S, D] and mask [B, S] (nonzero: "
           "token).\n\n"
           "Padding gets no candidates; neither do layers without a head. For a predictor on a "
           "GPU embeddings may lie there, and are read in the order of torch's current stream.\n\n"
           "Raises:\n    ValueError: A shape, dtype or device that does not fit.")
      .def("advance", &advance, py::arg("embeddings"), py::arg("mask") = py::none(), py::kw_only(),
           py::arg("past"), py::arg("states"), py::arg("key") = 0, py::arg("candidates") = 8,
           "As predict, for the latest tokens [B, S, D] of sentences that began earlier.\n\n"
           "past float32 [B, P, state_size]: states of all tokens before. states float32 [B, S, "
           "state_size]: where those of the latest are written. Each lies where it likes, in RAM "
           "or on the predictor's GPU.\n\n"
           "Raises:\n    ValueError: The kind is not causal, or a shape, dtype or device does not "
           "fit.")
      .def_property_readonly(
          "device",
          [](const Predictor& p) {
            return p.cuda_device() < 0 ? "cpu" : "cuda:" + std::to_string(p.cuda_device());
          },
          "Where it works: cpu, or cuda:0 and the like.")
      .def_property_readonly("workspace_bytes", &Predictor::workspace_bytes,
                             "Of the GPU's memory held now, weights among them; 0 on the CPU.")
      .def_property_readonly("is_causal", &Predictor::is_causal,
                             "Whether advance() works: no token is foretold from later ones.")
      .def_property_readonly("state_size", &Predictor::state_size,
                             "Floats of a token's state; 0: each token is foretold by itself.")
      .def_property_readonly(
          "kind", [](const Predictor& p) { return p.weights().kind; },
          "lstm, causal_lstm, transformer or token.")
      .def_property_readonly(
          "heads", [](const Predictor& p) { return p.weights().heads; },
          "The MoE layers that are foretold.")
      .def_property_readonly(
          "layers", [](const Predictor& p) { return p.weights().layers; },
          "All MoE layers of the model.")
      .def_property_readonly(
          "experts", [](const Predictor& p) { return p.weights().experts; }, "In each layer.")
      .def_property_readonly(
          "embedding_size", [](const Predictor& p) { return p.weights().embedding_size; },
          "D of the embeddings.")
      .def_property_readonly(
          "fingerprint", [](const Predictor& p) { return p.weights().fingerprint; },
          "Of the model that it was trained on.");
}

}  // namespace

void bind_hash(py::module_& module) {
  bind_table(module);
  bind_predictor(module);
  module.def(
      "batch_key",
      [](const py::object& ids, const py::object& mask) {
        const Array array(ids, "ids");
        return batch_key(array.indices(), mask_of(mask));
      },
      py::arg("ids"), py::arg("mask") = py::none(),
      "Key by which a hash table finds its batch, from token ids and attention mask.");
}

}  // namespace sida::bindings
