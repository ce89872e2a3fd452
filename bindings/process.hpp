// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <stdexcept>

namespace sida::bindings {

/// The process that it was made in. One that is forked off from it has the memory, but none of the
/// threads: whoever waited for one there would wait for ever.
class Process {
 public:
  bool is_this() const noexcept { return ::getpid() == id_; }

  /// @throws std::runtime_error in a process that was forked off.
  void check() const {
    if (is_this()) return;
    throw std::runtime_error(
        "this process was forked from the one whose experts these are, and its threads stayed "
        "there: offload in this process, or start it by multiprocessing's \"spawn\"");
  }

 private:
  ::pid_t id_ = ::getpid();
};

}  // namespace sida::bindings
