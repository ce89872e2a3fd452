// SPDX-License-Identifier: Apache-2.0
#include <system_error>
#include <thread>

#include "support/faults.hpp"

// The linker puts this in the place of what std::thread and std::jthread start threads with, see
// CMakeLists.txt; the names are libstdc++'s.
extern "C" {
void __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread*, void*, void (*)());
void __wrap__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
    std::thread* thread, void* state, void (*depend)()) {
  if (sida::test::Faults::strikes(sida::test::Fault::thread))
    throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
  __real__ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE(
      thread, state, depend);
}
}
