// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "place.hpp"
#include "sida/core/tensor_view.hpp"

namespace sida::dlpack {
struct Tensor;
}

namespace sida::bindings {

namespace py = pybind11;

/// An array of Python's (NumPy, torch, anything with __dlpack__), borrowed through DLPack for as
/// long as this object lives. Contiguous, in RAM or on a GPU.
class Array {
 public:
  /// `name` is what messages call the array; it outlives this. On a GPU the contents are ready in
  /// the order of `place.stream`. @throws InvalidArgument (ValueError) for an array that is
  /// elsewhere, not contiguous, or of a dtype that sida does not know.
  Array(const py::handle& object, const char* name, const Place& place = {});

  ConstTensorView view() const { return {static_cast<const std::byte*>(data_), type_, shape_}; }
  /// @throws InvalidArgument for an array that is read-only.
  TensorView writable() const;
  const std::vector<std::int64_t>& shape() const noexcept { return shape_; }
  DataType type() const noexcept { return type_; }

  /// The elements of an i64 or i32 array. @throws InvalidArgument for another dtype.
  std::vector<std::int64_t> indices() const;
  /// For each element, which are bool, u8, i32 or i64, whether it is not 0. @throws
  /// InvalidArgument.
  std::vector<std::uint8_t> flags() const;

 private:
  // What the tensor is; checks what the constructor promises.
  void describe(const dlpack::Tensor& tensor, const Place& place, bool as_bfloat16);

  const char* name_;
  std::shared_ptr<void> owner_;
  const void* data_ = nullptr;
  DataType type_ = DataType::f32;
  std::vector<std::int64_t> shape_;
  bool read_only_ = false;
};

/// The flags of a mask (nonzero: token); None has none, which means that all are tokens.
std::vector<std::uint8_t> mask_of(const py::object& mask);

/// Where an array is: in RAM, or on a GPU, to be used there in the order of the legacy default
/// stream.
Place place_of(const py::handle& array);

/// The stream that a call means: an int (a cudaStream_t), or an object that has one as
/// `__cuda_stream__()`, `cuda_stream` (torch) or `ptr` (CuPy). None: where arrays are of a library
/// that tells its current stream, such as torch, that one, else the legacy default stream.
/// @throws InvalidArgument, py::type_error.
Stream stream_of(const py::handle& stream, const py::handle& array, int cuda_device);

/// A new array where `like` is, of its shape, dtype and library (torch, NumPy, ...).
py::object empty_array(const py::handle& like);

}  // namespace sida::bindings
