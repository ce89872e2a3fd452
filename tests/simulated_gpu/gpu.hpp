// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <vector>

#include "simulated_gpu/accesses.hpp"
#include "simulated_gpu/clock.hpp"

namespace sida::simulated {

/// The place behind an operation of a stream.
struct Place {
  StreamId stream = 0;
  std::uint64_t number = 0;
};

/// GPUs in RAM, for all that the host does with streams, events, copies and graphs. An operation
/// runs on a thread that waits for it, or, now and then, on one that enqueues another: streams take
/// turns at random, and everything that is not waited for may come late. So what misses a wait is
/// seen: by Accesses, or as memory that the host used again too early. Thread-safe.
class Gpu {
 public:
  static constexpr int devices = 2;
  static constexpr std::size_t device_bytes = std::size_t{256} << 20;

  struct Event {
    std::optional<Place> at;  // nothing before it was recorded
    Clock before;
    std::shared_ptr<double> seconds = std::make_shared<double>(0);  // when it was passed
  };
  using Graph = std::vector<Work>;

  static Gpu& get();

  StreamId make_stream(int device);
  /// The stream's operations still run.
  void end_stream(StreamId stream);
  StreamId default_stream(int device) const { return static_cast<StreamId>(device) + 1; }
  int device_of(StreamId stream);

  /// Enqueues work; where the stream is being captured it becomes part of the graph.
  void enqueue(StreamId stream, Work work);
  void record(StreamId stream, Event& event);
  void wait(StreamId stream, const Event& event);
  /// Runs what is needed until the event is passed.
  void synchronize(const Event& event);
  bool is_passed(const Event& event);
  void synchronize(StreamId stream);
  void synchronize();

  /// @returns whether it began: a stream is captured once at a time.
  bool begin_capture(StreamId stream);
  std::optional<Graph> end_capture(StreamId stream);
  bool is_captured(StreamId stream);

  /// Memory of a device, full of NaNs; null where it has no more.
  void* allocate(int device, std::size_t bytes);
  /// @returns whether there was such memory. Waits for all work, as CUDA does.
  bool deallocate(void* data);
  std::size_t free_bytes(int device);
  bool is_device_memory(const void* data);
  /// @returns whether it was not pinned before.
  bool pin(void* data, std::size_t bytes);
  bool unpin(void* data);
  bool is_pinned(const void* data);

 private:
  struct Item {
    Operation operation;
    Work work;                  // or
    std::optional<Place> for_;  // what the stream waits for
  };
  struct Stream {
    int device;
    std::deque<Item> waiting;
    Clock before;  // of its next operation
    std::uint64_t enqueued = 0, done = 0;
    std::optional<Graph> captured;
    bool is_ended = false;
  };
  struct Block {
    std::size_t bytes;
    int device;
  };

  Gpu();
  Item& add(StreamId stream);
  bool is_done(const Place& place) const;
  void run_some();
  bool step();
  void run(std::map<StreamId, Stream>::iterator stream);
  template <class IsEnough>
  void run_until(IsEnough&& is_enough);
  void drop_if_over(StreamId stream);
  void forget_what_all_know();
  template <class T>
  static typename std::map<const std::byte*, T>::iterator holder(std::map<const std::byte*, T>& of,
                                                                 const void* data);

  std::mutex mutex_;
  std::mt19937 random_;
  std::uint32_t chance_ = 0;  // that something runs which is not waited for
  std::map<StreamId, Stream> streams_;
  StreamId last_stream_ = devices;
  Clock known_;  // what the host waited for, on whichever thread
  Accesses accesses_;
  std::size_t most_accesses_ = 2000;  // of more, those are dropped that no later one can meet
  std::map<const std::byte*, Block> blocks_;
  std::map<const std::byte*, std::size_t> pinned_;
  std::size_t free_[devices];
};

}  // namespace sida::simulated
