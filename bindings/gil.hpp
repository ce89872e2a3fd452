// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <cxxabi.h>
#include <unistd.h>

namespace sida::bindings {

// A thread that asks for Python's lock while the interpreter is taken down is unwound by force,
// through frames that must not be, which ends in std::terminate. What asks for the lock here stands
// still instead, until the process has ended; later versions of Python do the same.

/// What `function` returns; does not return once the interpreter is being taken down.
template <class Function>
auto or_stand_still(Function&& function) {
  try {
    return function();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
}

/// Lets go of Python's lock for as long as it lives: around whatever computes or waits.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    or_stand_still([this] { PyEval_RestoreThread(state_); });
  }

 private:
  PyThreadState* state_;
};

/// Holds Python's lock for as long as it lives: on threads that Python does not know.
class Locked {
 public:
  Locked() : state_(or_stand_still([] { return PyGILState_Ensure(); })) {}
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
  ~Locked() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

}  // namespace sida::bindings
