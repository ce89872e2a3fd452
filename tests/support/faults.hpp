// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>

namespace sida::test {

/// Operations that a test can let fail.
enum class Fault { allocation, copy, launch, event, thread, read };

/// Makes one operation of a kind fail: the one of a given number, counted from where it was armed.
/// Operations ask strikes() whether they are the one. Thread-safe.
class Faults {
 public:
  static void arm(Fault kind, int number) {
    disarm();
    kind_ = kind;
    left_ = number;
    armed_ = true;
  }
  static void disarm() { armed_ = false; }
  /// Whether the operation came that was to fail.
  static bool struck() { return left_ < 0; }

  static bool strikes(Fault kind) {
    if (exempt_ > 0 || !armed_ || kind != kind_) return false;
    return left_-- == 0;
  }

 private:
  friend class FaultsExempt;
  inline static std::atomic<bool> armed_ = false;
  inline static std::atomic<Fault> kind_ = Fault::allocation;
  inline static std::atomic<int> left_ = -1;
  inline static thread_local int exempt_ = 0;
};

/// While it lives, what this thread does is the test's own, and neither fails nor counts.
class FaultsExempt {
 public:
  FaultsExempt() { ++Faults::exempt_; }
  FaultsExempt(const FaultsExempt&) = delete;
  FaultsExempt& operator=(const FaultsExempt&) = delete;
  ~FaultsExempt() { --Faults::exempt_; }
};

}  // namespace sida::test
