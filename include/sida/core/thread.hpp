// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "sida/core/error.hpp"

namespace sida {

/// Starts a thread of type `Thread` that calls `f` with `arguments`; `purpose` says what for, after
/// "a thread". @throws ThreadError when the system gives no more threads.
template <class Thread = std::thread, class F, class... Arguments>
Thread start_thread(const char* purpose, F&& f, Arguments&&... arguments) {
  try {
    return Thread(std::forward<F>(f), std::forward<Arguments>(arguments)...);
  } catch (const std::system_error& error) {
    throw ThreadError("could not start a thread " + std::string(purpose) + ": " + error.what() +
                      "; end other programs, or raise `ulimit -u`");
  }
}

}  // namespace sida
