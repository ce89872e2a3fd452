// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace sida {

/// The caller passed something that cannot be right: a shape, a dtype, a budget. Python:
/// ValueError.
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// An expert or layer index outside the model. Python: IndexError.
class OutOfRange : public std::out_of_range {
 public:
  using std::out_of_range::out_of_range;
};

/// Memory for experts could not be had. Python: MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

/// A file is missing, truncated, malformed or could not be read or written. Python: OSError.
class IoError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A call on the GPU failed. Python: sida.CudaError.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The system gives no more threads. Python: RuntimeError.
class ThreadError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The object was closed, or is used in an order that it does not allow. Python: RuntimeError.
class StateError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

}  // namespace sida

/// Throws sida::InvalidArgument with `message` (any std::string expression) unless `condition`.
/// For checks at public entry points, never per token.
#define SIDA_EXPECTS(condition, message)                      \
  do {                                                        \
    if (!(condition)) throw ::sida::InvalidArgument(message); \
  } while (false)
