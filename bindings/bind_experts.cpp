// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>

#include "array.hpp"
#include "bind.hpp"
#include "engine.hpp"
#include "gil.hpp"
#include "sida/core/processors.hpp"

namespace sida::bindings {
namespace {

Place place_of_call(const AnyExperts& experts, const py::object& stream, const py::object& hidden) {
  const int device = experts.cuda_device();
  return {device, stream_of(stream, hidden, device)};
}

py::object forward(AnyExperts& self, const py::object& hidden_states, const py::object& top_k_index,
                   const py::object& top_k_weights, const py::object& out,
                   const py::object& next_top_k_index, bool guess_next, const py::object& stream) {
  const Place place = place_of_call(self, stream, hidden_states);
  const Array hidden(hidden_states, "hidden_states", place);
  std::optional<Array> next;
  if (!next_top_k_index.is_none()) next.emplace(next_top_k_index, "next_top_k_index");
  const Array ids(top_k_index, "top_k_index", place);
  const Array weights(top_k_weights, "top_k_weights", place);
  const py::object result = out.is_none() ? empty_array(hidden_states) : out;
  const Array written(result, "out", place);
  const TensorView view = written.writable();
  SIDA_EXPECTS(!guess_next || !next, "expected next_top_k_index or guess_next, got both");
  const Unlocked unlocked;
  if (guess_next)
    self.forward_guessing(hidden.view(), ids.view(), weights.view(), view, place.stream);
  else
    self.forward(hidden.view(), ids.view(), weights.view(), view,
                 next ? next->view() : ConstTensorView{}, place.stream);
  return result;
}

void set_next_router(AnyExperts& self, const py::object& weight, const py::object& bias,
                     const py::object& correction, std::int32_t top_k) {
  const Place place = place_of_call(self, py::none(), weight);
  const auto view = [&](const py::object& array, const char* name) {
    return array.is_none() ? ConstTensorView{} : Array(array, name, place).view();
  };
  self.set_next_router(
      {view(weight, "weight"), view(bias, "bias"), view(correction, "correction"), top_k});
}

py::object forward_predicted(AnyExperts& self, const py::object& hidden_states,
                             const py::object& out, const py::object& stream) {
  const Place place = place_of_call(self, stream, hidden_states);
  const Array hidden(hidden_states, "hidden_states", place);
  const py::object result = out.is_none() ? empty_array(hidden_states) : out;
  const Array written(result, "out", place);
  const TensorView view = written.writable();
  const Unlocked unlocked;
  self.forward_predicted(hidden.view(), view, place.stream);
  return result;
}

void capture(AnyExperts& self, const py::object& hidden_states, const py::object& top_k_index,
             const py::object& top_k_weights, const py::object& out, const py::object& workspace,
             const py::object& stream) {
  const Place place = place_of_call(self, stream, hidden_states);
  const Array hidden(hidden_states, "hidden_states", place);
  const Array ids(top_k_index, "top_k_index", place);
  const Array weights(top_k_weights, "top_k_weights", place);
  const Array written(out, "out", place);
  const Array scratch(workspace, "workspace", place);
  const TensorView view = written.writable(), memory = scratch.writable();
  const std::int64_t tokens = hidden.shape().empty() ? 0 : hidden.shape()[0];
  const std::int64_t top_k = ids.shape().size() == 2 ? ids.shape()[1] : 1;
  const std::size_t needed = self.graph_workspace_bytes(tokens, static_cast<std::int32_t>(top_k));
  SIDA_EXPECTS(memory.type == DataType::u8 && memory.shape.size() == 1 &&
                   static_cast<std::size_t>(memory.shape[0]) >= needed,
               "workspace: expected uint8 of " + std::to_string(needed) + " bytes, got " +
                   scratch.view().describe());
  const Unlocked unlocked;
  self.capture(hidden.view(), ids.view(), weights.view(), view, memory, place.stream);
}

template <void (AnyExperts::*method)(Stream)>
void on_stream(AnyExperts& self, const py::object& stream) {
  const Stream native = stream_of(stream, py::none(), self.cuda_device());
  const Unlocked unlocked;
  (self.*method)(native);
}

}  // namespace

void bind_experts(py::module_& module) {
  module.def("usable_processors", &usable_processors,
             "Threads that this process can run at once: the processors of the calling thread's "
             "affinity, and no more than a container's CPU quota pays for whole. At least 1.");
  py::class_<AnyExperts, std::shared_ptr<AnyExperts>>(
      module, "OffloadedExperts", py::release_gil_before_calling_cpp_dtor(),
      "The experts of one MoE layer. Calls from several threads take turns.\n\n"
      "Arrays are whatever has __dlpack__ and is contiguous, in RAM or, with a cache on a GPU, "
      "there; results are of the kind of hidden_states. On a GPU calls return when the work is "
      "enqueued, in the order of `stream`: a cudaStream_t, an object that has one, or by default "
      "the current stream of torch, for other libraries the legacy default stream. threads=0 takes "
      "usable_processors(); layers of one scheduler share the first's "
      "threads.")
      .def(
          py::init([](AnyScheduler& scheduler, std::int32_t layer, int threads, bool skip_padding) {
            return scheduler.make_experts(layer, threads > 0 ? threads : usable_processors(),
                                          skip_padding);
          }),
          py::arg("scheduler"), py::arg("layer"), py::kw_only(), py::arg("threads") = 0,
          py::arg("skip_padding") = false,
          "skip_padding leaves rows of padding, by the pass's mask, out: they come out as "
          "zeros.\n\n"
          "Raises:\n    IndexError: No such layer.")
      .def("forward", &forward, py::arg("hidden_states"), py::arg("top_k_index"),
           py::arg("top_k_weights"), py::kw_only(), py::arg("out") = py::none(),
           py::arg("next_top_k_index") = py::none(), py::arg("guess_next") = false,
           py::arg("stream") = py::none(),
           "out[t] = sum over j of weights[t, j] * expert index[t, j] (hidden[t]).\n\n"
           "hidden_states [T, H] of the config's dtype; top_k_index [T, k] int32 or int64; "
           "top_k_weights [T, k] float32 or the config's dtype. Choices of weight 0 are left out. "
           "Writes to out, where it is given. next_top_k_index [T, k] in RAM, int32 or int64: what "
           "the next layer's router chooses on an input like its own; these experts may come "
           "early. Ids out of range are left out there. On a GPU they may still be on the way to "
           "RAM, in the order of the stream. guess_next: on a GPU, have the router of "
           "set_next_router() asked, for calls of at most 32 tokens.\n\n"
           "Raises:\n    IndexError: An id out of range; on the CPU nothing is written then. On a "
           "GPU it counts as left out, and a later call or stats() may be what raises.\n"
           "    ValueError: A shape, dtype or device that does not fit.\n"
           "    OSError: An expert could not be read.\n"
           "    RuntimeError: The scheduler was closed.")
      .def("set_next_router", &set_next_router, py::arg("weight"), py::arg("bias"),
           py::arg("correction"), py::arg("top_k"),
           "On a GPU, the router of the next layer, as guess_next asks it: it chooses the top_k "
           "experts with the largest hidden @ weight.T + bias, or, where there is a correction, "
           "sigmoids of these plus it. weight [E, H] float32 or the config's dtype; bias and "
           "correction [E] float32, or None. The caller keeps them alive, where they are, for as "
           "long as the layer is called.\n\n"
           "Raises:\n    ValueError: It is of other sizes, or there is no next layer.")
      .def("forward_predicted", &forward_predicted, py::arg("hidden_states"), py::kw_only(),
           py::arg("out") = py::none(), py::arg("stream") = py::none(),
           "As forward, with experts and scales from the pass's hash table.\n\n"
           "Rows of padding are zeros.\n\n"
           "Raises:\n    RuntimeError: The pass has no table, or none for this layer.")
      .def("has_prediction", &AnyExperts::has_prediction,
           "Whether the pass's hash table foretells this layer.")
      .def("wants_look_ahead", &AnyExperts::wants_look_ahead, py::call_guard<Unlocked>(),
           "Whether forward() has a use for next_top_k_index in the pass at hand: there is a next "
           "layer, and not all experts have room.")
      .def("load_all", &AnyExperts::load_all, py::call_guard<Unlocked>(),
           "Brings all experts of the layer, and waits for it; they count as no uses.\n\n"
           "Raises:\n    OSError: An expert could not be read.\n"
           "    RuntimeError: The scheduler was closed.")
      .def("may_be_captured", &AnyExperts::may_be_captured, py::call_guard<Unlocked>(),
           "Whether a CUDA graph can hold the layer's calls once load_all() has brought its "
           "experts: all experts of the model have room on a GPU, and no padding is left out.")
      .def("graph_workspace_bytes", &AnyExperts::graph_workspace_bytes, py::arg("tokens"),
           py::arg("top_k"), "Bytes that capture() needs for a call of so many tokens and choices.")
      .def("capture", &capture, py::arg("hidden_states"), py::arg("top_k_index"),
           py::arg("top_k_weights"), py::arg("out"), py::arg("workspace"), py::kw_only(),
           py::arg("stream"),
           "As forward, while `stream` is being captured into a CUDA graph: enqueues the kernels "
           "and nothing else. The arrays are kept, where they are, for as long as the graph may be "
           "replayed; workspace, uint8 of graph_workspace_bytes() on the GPU, is its own. After "
           "resize() the graph is not to be replayed.\n\n"
           "Raises:\n    RuntimeError: The layer's experts do not all stay, or load_all() was not "
           "called.\n    ValueError: A shape, dtype or device that does not fit.")
      .def("begin_replays", &on_stream<&AnyExperts::begin_replays>, py::kw_only(),
           py::arg("stream"),
           "Before a pass whose graphs, replayed on `stream`, hold calls of any layers of the "
           "scheduler: each of them once at most. Waits for those of the pass before.\n\n"
           "Raises:\n    IndexError: One of those had an id out of range, and left it out.")
      .def("end_replays", &on_stream<&AnyExperts::end_replays>, py::kw_only(), py::arg("stream"),
           "Behind the replays of the pass at hand, which are counted once they are over.")
      .def("set_threads", &AnyExperts::set_threads, py::arg("threads"), py::call_guard<Unlocked>(),
           "Threads that compute, of all layers of the scheduler.");
}

}  // namespace sida::bindings
