// SPDX-License-Identifier: Apache-2.0
#include "array.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>

#include "dlpack.hpp"
#include "sida/core/error.hpp"

namespace sida::bindings {
namespace {

// NumPy has no bfloat16 of its own, and DLPack no way to ask it for one: it crosses as uint16.
bool is_numpy_bfloat16(const py::handle& object) {
  return py::hasattr(object, "dtype") && py::hasattr(object, "view") &&
         py::str(object.attr("dtype")).cast<std::string>() == "bfloat16";
}

bool is_of(const py::handle& array, const char* library) {
  const auto module = py::str(py::type::of(array).attr("__module__")).cast<std::string>();
  return module.substr(0, module.find('.')) == library;
}

// The functions by which a type lends its arrays, or null. Types that have some are few, and stay.
const dlpack::Exchange* exchange_of(const py::handle& object) {
  static auto* const known = new std::unordered_map<PyTypeObject*, const dlpack::Exchange*>;
  PyTypeObject* const type = Py_TYPE(object.ptr());
  if (const auto found = known->find(type); found != known->end()) return found->second;
  const py::object capsule =
      py::getattr(py::type::of(object), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* exchange = static_cast<const dlpack::Exchange*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (exchange && exchange->version.major != 1) exchange = exchange->older;
  if (exchange) {
    Py_INCREF(type);
    known->emplace(type, exchange);
  }
  return exchange;
}

py::object called(const py::handle& object, const Place& place, bool is_versioned) {
  py::dict arguments;
  if (is_versioned) arguments["max_version"] = py::make_tuple(1, 0);
  if (place.cuda_device >= 0) {
    const auto native = reinterpret_cast<std::uintptr_t>(place.stream);
    arguments["stream"] = native == 0 ? 1 : native;  // 0 is ambiguous to DLPack
  }
  return object.attr("__dlpack__")(**arguments);
}

py::capsule export_array(const py::handle& object, const std::string& name, const Place& place) {
  if (!py::hasattr(object, "__dlpack__"))
    throw py::type_error(name +
                         ": expected an array with __dlpack__ (torch.Tensor, numpy.ndarray), got " +
                         py::str(py::type::of(object)).cast<std::string>());
  try {
    return called(object, place, true);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a library from before DLPack 1.0
  }
  return called(object, place, false);
}

std::string name_of(const dlpack::Device& device) {
  if (device.type == dlpack::cpu) return "cpu";
  if (device.type == dlpack::cuda) return "cuda:" + std::to_string(device.id);
  return "DLPack device " + std::to_string(device.type) + ":" + std::to_string(device.id);
}

void expect_place(const dlpack::Device& device, const Place& place, const std::string& name) {
  const bool is_in_ram = device.type == dlpack::cpu || device.type == dlpack::cuda_host;
  if (place.cuda_device < 0)
    SIDA_EXPECTS(is_in_ram,
                 name + ": expected an array in RAM (device cpu), got one on " + name_of(device));
  else
    SIDA_EXPECTS(device.type == dlpack::cuda && device.id == place.cuda_device,
                 name + ": expected an array on cuda:" + std::to_string(place.cuda_device) +
                     ", where it is to be used, got one on " + name_of(device));
}

// An array's place, asked for before the array: a library may refuse to lend to another.
void expect_place_of(const py::handle& object, const Place& place, const std::string& name) {
  if (!py::hasattr(object, "__dlpack_device__")) return;
  const auto [type, id] =
      object.attr("__dlpack_device__")().cast<std::pair<std::int32_t, std::int32_t>>();
  expect_place({type, id}, place, name);
}

// Takes the managed tensor out of the capsule, which then no longer owns it.
template <class ManagedTensor>
std::shared_ptr<void> take(const py::capsule& capsule, const char* name, const char* used) {
  auto* managed = static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (!managed) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), used);
  return {managed, [](void* pointer) {
            auto* tensor = static_cast<ManagedTensor*>(pointer);
            if (tensor->deleter) tensor->deleter(tensor);
          }};
}

DataType type_of(const dlpack::Type& type, bool as_bfloat16, const std::string& name) {
  if (type.lanes == 1) {
    if (type.code == dlpack::real && type.bits == 64) return DataType::f64;
    if (type.code == dlpack::real && type.bits == 32) return DataType::f32;
    if (type.code == dlpack::real && type.bits == 16) return DataType::f16;
    if (type.code == dlpack::brain_real && type.bits == 16) return DataType::bf16;
    if (as_bfloat16 && type.code == dlpack::unsigned_integer && type.bits == 16)
      return DataType::bf16;
    if (type.code == dlpack::integer && type.bits == 64) return DataType::i64;
    if (type.code == dlpack::integer && type.bits == 32) return DataType::i32;
    if (type.code == dlpack::unsigned_integer && type.bits == 8) return DataType::u8;
    if (type.code == dlpack::boolean && type.bits == 8) return DataType::u8;
  }
  throw InvalidArgument(
      name +
      ": expected a dtype among float32, float16, bfloat16, float64, int32, int64, "
      "uint8, bool; got another (DLPack code " +
      std::to_string(type.code) + ", " + std::to_string(type.bits) + " bits)");
}

bool contiguous(const dlpack::Tensor& tensor) {
  if (!tensor.strides) return true;
  const std::span<const std::int64_t> shape(tensor.shape,
                                            static_cast<std::size_t>(tensor.dimensions));
  if (std::ranges::find(shape, 0) != shape.end()) return true;
  std::int64_t expected = 1;
  for (std::int32_t d = tensor.dimensions; d-- > 0;) {
    if (tensor.shape[d] != 1 && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

}  // namespace

Array::Array(const py::handle& object, const char* name, const Place& place) : name_(name) {
  const dlpack::Exchange* const exchange = exchange_of(object);
  if (exchange && !py::getattr(object, "requires_grad", py::bool_(false)).cast<bool>()) {
    dlpack::ManagedVersioned* managed = nullptr;
    if (exchange->lend(object.ptr(), &managed) != 0) throw py::error_already_set();
    owner_ = {managed, [](dlpack::ManagedVersioned* tensor) {
                if (tensor->deleter) tensor->deleter(tensor);
              }};
    read_only_ = (managed->flags & dlpack::read_only) != 0;
    describe(managed->tensor, place, false);
    return;
  }
  const bool as_bfloat16 = is_numpy_bfloat16(object) && !py::hasattr(object, "detach");
  const py::object source =
      as_bfloat16 ? object.attr("view")("uint16") : py::reinterpret_borrow<py::object>(object);
  if (place.cuda_device >= 0) expect_place_of(source, place, name);
  const py::capsule capsule = export_array(source, name, place);
  const dlpack::Tensor* tensor = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    owner_ =
        take<dlpack::ManagedVersioned>(capsule, "dltensor_versioned", "used_dltensor_versioned");
    const auto* managed = static_cast<const dlpack::ManagedVersioned*>(owner_.get());
    SIDA_EXPECTS(managed->version.major == 1, std::string(name) + ": expected DLPack 1.x, got " +
                                                  std::to_string(managed->version.major));
    read_only_ = (managed->flags & dlpack::read_only) != 0;
    tensor = &managed->tensor;
  } else {
    owner_ = take<dlpack::Managed>(capsule, "dltensor", "used_dltensor");
    tensor = &static_cast<const dlpack::Managed*>(owner_.get())->tensor;
  }
  describe(*tensor, place, as_bfloat16);
}

void Array::describe(const dlpack::Tensor& tensor, const Place& place, bool as_bfloat16) {
  expect_place(tensor.device, place, name_);
  type_ = type_of(tensor.type, as_bfloat16, name_);
  SIDA_EXPECTS(contiguous(tensor),
               std::string(name_) +
                   ": expected a contiguous array; call .contiguous() (torch) or "
                   "numpy.ascontiguousarray() on it");
  shape_.assign(tensor.shape, tensor.shape + tensor.dimensions);
  data_ = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
  SIDA_EXPECTS(reinterpret_cast<std::uintptr_t>(data_) % size_of(type_) == 0,
               std::string(name_) + ": expected memory aligned to the dtype; copy the array first");
}

TensorView Array::writable() const {
  SIDA_EXPECTS(!read_only_, std::string(name_) +
                                ": expected an array that can be written to, got a read-only one");
  return {static_cast<std::byte*>(const_cast<void*>(data_)), type_, shape_};
}

std::vector<std::int64_t> Array::indices() const {
  const auto count = static_cast<std::size_t>(view().elements());
  if (type_ == DataType::i64) {
    const auto* begin = static_cast<const std::int64_t*>(data_);
    return {begin, begin + count};
  }
  SIDA_EXPECTS(type_ == DataType::i32,
               std::string(name_) + ": expected int64 or int32, got " + view().describe());
  const auto* begin = static_cast<const std::int32_t*>(data_);
  return {begin, begin + count};
}

std::vector<std::uint8_t> Array::flags() const {
  std::vector<std::uint8_t> flags;
  if (type_ == DataType::u8) {
    const auto* begin = static_cast<const std::uint8_t*>(data_);
    for (std::int64_t i = 0; i < view().elements(); ++i) flags.push_back(begin[i] != 0);
  } else {
    for (const std::int64_t value : indices()) flags.push_back(value != 0);
  }
  return flags;
}

std::vector<std::uint8_t> mask_of(const py::object& mask) {
  return mask.is_none() ? std::vector<std::uint8_t>{} : Array(mask, "mask").flags();
}

Place place_of(const py::handle& array) {
  if (!py::hasattr(array, "__dlpack_device__")) return {};
  const auto [type, id] =
      array.attr("__dlpack_device__")().cast<std::pair<std::int32_t, std::int32_t>>();
  return {type == dlpack::cuda ? id : -1};
}

Stream stream_of(const py::handle& stream, const py::handle& array, int cuda_device) {
  SIDA_EXPECTS(cuda_device >= 0 || stream.is_none(),
               "stream: expected None, since the experts are computed on the CPU");
  if (cuda_device < 0) return nullptr;
  if (stream.is_none()) {
    void* native = nullptr;
    if (const dlpack::Exchange* exchange = exchange_of(array)) {
      if (exchange->current_stream(dlpack::cuda, cuda_device, &native) != 0)
        throw py::error_already_set();
    } else if (is_of(array, "torch")) {
      const py::object current =
          py::module_::import("torch").attr("cuda").attr("current_stream")(cuda_device);
      native = reinterpret_cast<void*>(current.attr("cuda_stream").cast<std::uintptr_t>());
    }
    return static_cast<Stream>(native);
  }
  py::object number = py::reinterpret_borrow<py::object>(stream);
  if (py::hasattr(stream, "__cuda_stream__"))
    number = stream.attr("__cuda_stream__")().attr("__getitem__")(1);
  else if (py::hasattr(stream, "cuda_stream"))
    number = stream.attr("cuda_stream");
  else if (py::hasattr(stream, "ptr"))
    number = stream.attr("ptr");
  if (!py::isinstance<py::int_>(number))
    throw py::type_error(
        "stream: expected None, a cudaStream_t as an int, or an object with one "
        "(torch.cuda.Stream, cupy.cuda.Stream), got " +
        py::repr(stream).cast<std::string>());
  return reinterpret_cast<Stream>(number.cast<std::uintptr_t>());
}

py::object empty_array(const py::handle& like) {
  if (is_of(like, "torch")) {
    static const py::handle empty_like =  // for as long as Python runs
        py::object(py::module_::import("torch").attr("empty_like")).release();
    return empty_like(like);
  }
  if (is_of(like, "numpy")) return py::module_::import("numpy").attr("empty_like")(like);
  const py::object library = like.attr("__array_namespace__")();
  return library.attr("empty")(like.attr("shape"), py::arg("dtype") = like.attr("dtype"),
                               py::arg("device") = like.attr("device"));
}

}  // namespace sida::bindings
