// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "bind.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/ffn/slab_layout.hpp"

namespace sida::bindings {

namespace py = pybind11;

void bind_config(py::module_& module) {
  py::class_<MoeConfig>(module, "MoeConfig",
                        "The shape that all experts of a model share.\n\n"
                        "An expert computes down(activation(up(x))), or gated "
                        "down(activation(gate(x)) * up(x)).")
      .def(py::init([](std::int32_t layers, std::int32_t experts, std::int32_t hidden_size,
                       std::int32_t intermediate_size, std::int32_t top_k,
                       const std::string& activation, bool gated, bool up_bias, bool down_bias,
                       const std::string& dtype, float limit) {
             const MoeConfig config{layers,      experts,
                                    hidden_size, intermediate_size,
                                    top_k,       parse_activation(activation),
                                    gated,       up_bias,
                                    down_bias,   parse_data_type(dtype),
                                    limit};
             validate(config);
             return config;
           }),
           py::kw_only(), py::arg("layers"), py::arg("experts"), py::arg("hidden_size"),
           py::arg("intermediate_size"), py::arg("top_k") = 1, py::arg("activation") = "relu",
           py::arg("gated") = false, py::arg("up_bias") = false, py::arg("down_bias") = false,
           py::arg("dtype") = "f32", py::arg("limit") = MoeConfig{}.limit,
           "activation: relu, relu2, gelu, gelu_tanh, silu, silu_clamped, swiglu_clamped; dtype: "
           "f32, f16, bf16; limit: what clamped activations cut gate and up at.\n\n"
           "Raises:\n    ValueError: A value that cannot be right, by name.")
      .def_readonly("layers", &MoeConfig::layers, "MoE layers of the model.")
      .def_readonly("experts", &MoeConfig::experts, "Experts in each layer.")
      .def_readonly("hidden_size", &MoeConfig::hidden_size, "H, of the hidden states.")
      .def_readonly("intermediate_size", &MoeConfig::intermediate_size, "I, inside an expert.")
      .def_readonly("top_k", &MoeConfig::top_k, "Experts that a token is routed to.")
      .def_property_readonly(
          "activation",
          [](const MoeConfig& config) { return std::string(name_of(config.activation)); },
          "relu, relu2 (its square), gelu (exact), gelu_tanh, silu; and gated only silu_clamped "
          "(silu(gate) * up) and swiglu_clamped (gate * sigmoid(1.702 * gate) * (up + 1)), with "
          "gate and up cut at limit.")
      .def_readonly("limit", &MoeConfig::limit, "What clamped activations cut gate and up at.")
      .def_readonly("gated", &MoeConfig::gated, "Whether an activated gate multiplies up.")
      .def_readonly("up_bias", &MoeConfig::up_bias, "Whether up (and gate) have biases.")
      .def_readonly("down_bias", &MoeConfig::down_bias, "Whether down has a bias.")
      .def_property_readonly(
          "dtype", [](const MoeConfig& config) { return std::string(name_of(config.dtype)); },
          "Of weights and hidden states: f32, f16, bf16 or f64.")
      .def_property_readonly(
          "slab_bytes", [](const MoeConfig& config) { return SlabLayout(config).slab_bytes; },
          "Bytes of fast memory that one expert takes.")
      .def_property_readonly(
          "slab_parts",
          [](const MoeConfig& config) {
            const SlabLayout layout(config);
            return std::vector<std::pair<std::size_t, std::size_t>>{
                {layout.up_offset, layout.up_bytes},
                {layout.down_offset, layout.down_bytes},
                {layout.up_bias_offset, layout.up_bias_bytes},
                {layout.down_bias_offset, layout.down_bias_bytes}};
          },
          "(offset, bytes) in an expert's slab of up_proj, down_proj, up_bias and down_bias; no "
          "bytes for a bias that there is not.")
      .def_property_readonly("total_experts", &MoeConfig::total_experts, "Over all layers.")
      .def(
          "__eq__", [](const MoeConfig& a, const MoeConfig& b) { return a == b; },
          py::is_operator())
      .def("__repr__", [](const MoeConfig& config) {
        return "MoeConfig(layers=" + std::to_string(config.layers) +
               ", experts=" + std::to_string(config.experts) +
               ", hidden_size=" + std::to_string(config.hidden_size) +
               ", intermediate_size=" + std::to_string(config.intermediate_size) +
               ", top_k=" + std::to_string(config.top_k) + ", activation='" +
               std::string(name_of(config.activation)) +
               "', gated=" + (config.gated ? "True" : "False") +
               ", up_bias=" + (config.up_bias ? "True" : "False") +
               ", down_bias=" + (config.down_bias ? "True" : "False") + ", dtype='" +
               std::string(name_of(config.dtype)) +
               "', limit=" + std::string(py::str(py::float_(static_cast<double>(config.limit)))) +
               ")";
      });
}

}  // namespace sida::bindings
