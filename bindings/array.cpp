// SPDX-License-Identifier: Apache-2.0
#include "array.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <span>
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

py::capsule export_array(const py::handle& object, const std::string& name) {
  if (!py::hasattr(object, "__dlpack__"))
    throw py::type_error(name +
                         ": expected an array with __dlpack__ (torch.Tensor, numpy.ndarray), got " +
                         py::str(py::type::of(object)).cast<std::string>());
  try {
    return object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a library from before DLPack 1.0
  }
  return object.attr("__dlpack__")();
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

Array::Array(const py::handle& object, const std::string& name) : name_(name) {
  const bool as_bfloat16 = is_numpy_bfloat16(object) && !py::hasattr(object, "detach");
  const py::object source =
      as_bfloat16 ? object.attr("view")("uint16") : py::reinterpret_borrow<py::object>(object);
  const py::capsule capsule = export_array(source, name);
  const dlpack::Tensor* tensor = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    owner_ =
        take<dlpack::ManagedVersioned>(capsule, "dltensor_versioned", "used_dltensor_versioned");
    const auto* managed = static_cast<const dlpack::ManagedVersioned*>(owner_.get());
    SIDA_EXPECTS(managed->version.major == 1,
                 name + ": expected DLPack 1.x, got " + std::to_string(managed->version.major));
    read_only_ = (managed->flags & dlpack::read_only) != 0;
    tensor = &managed->tensor;
  } else {
    owner_ = take<dlpack::Managed>(capsule, "dltensor", "used_dltensor");
    tensor = &static_cast<const dlpack::Managed*>(owner_.get())->tensor;
  }
  SIDA_EXPECTS(tensor->device.type == dlpack::cpu,
               name + ": expected an array in RAM (device cpu), got one on DLPack device " +
                   std::to_string(tensor->device.type) + ":" + std::to_string(tensor->device.id));
  type_ = type_of(tensor->type, as_bfloat16, name);
  SIDA_EXPECTS(contiguous(*tensor),
               name +
                   ": expected a contiguous array; call .contiguous() (torch) or "
                   "numpy.ascontiguousarray() on it");
  shape_.assign(tensor->shape, tensor->shape + tensor->dimensions);
  data_ = static_cast<const std::byte*>(tensor->data) + tensor->byte_offset;
  SIDA_EXPECTS(reinterpret_cast<std::uintptr_t>(data_) % size_of(type_) == 0,
               name + ": expected memory aligned to the dtype; copy the array first");
}

TensorView Array::writable() const {
  SIDA_EXPECTS(!read_only_,
               name_ + ": expected an array that can be written to, got a read-only one");
  return {static_cast<std::byte*>(const_cast<void*>(data_)), type_, shape_};
}

std::vector<std::int64_t> Array::indices() const {
  const auto count = static_cast<std::size_t>(view().elements());
  if (type_ == DataType::i64) {
    const auto* begin = static_cast<const std::int64_t*>(data_);
    return {begin, begin + count};
  }
  SIDA_EXPECTS(type_ == DataType::i32,
               name_ + ": expected int64 or int32, got " + view().describe());
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

py::object empty_array(const py::handle& like, DataType type,
                       const std::vector<std::int64_t>& shape) {
  static constexpr std::pair<DataType, const char*> names[] = {{DataType::f32, "float32"},
                                                               {DataType::f16, "float16"},
                                                               {DataType::bf16, "bfloat16"},
                                                               {DataType::f64, "float64"}};
  std::string name;
  for (const auto& [candidate, text] : names)
    if (candidate == type) name = text;
  const auto library = py::str(py::type::of(like).attr("__module__")).cast<std::string>();
  if (library.substr(0, library.find('.')) == "torch") {
    const py::module_ torch = py::module_::import("torch");
    return torch.attr("empty")(shape, py::arg("dtype") = torch.attr(name.c_str()),
                               py::arg("device") = "cpu");
  }
  const py::module_ numpy = py::module_::import("numpy");
  py::object dtype = py::str(name);
  if (type == DataType::bf16) dtype = py::module_::import("ml_dtypes").attr("bfloat16");
  const py::object array = numpy.attr("empty")(shape, py::arg("dtype") = dtype);
  if (library.substr(0, library.find('.')) == "numpy") return array;
  return like.attr("__array_namespace__")().attr("from_dlpack")(array);
}

}  // namespace sida::bindings
