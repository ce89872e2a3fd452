// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <list>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "sida/cache/expert_store.hpp"
#include "sida/cache/slab_parts.hpp"
#include "sida/core/error.hpp"
#include "sida/core/expert_id.hpp"
#include "sida/core/thread.hpp"

namespace sida {

/// Ranges of slabs that are read ahead of who takes them, through memory of a fixed size: each is
/// cut into pieces, which a few threads read at once, become ready in any order and are taken in
/// order.
///
/// Several threads may read through one ring; a range that was begun earlier goes first. As pieces
/// are read in the order in which they are taken, one who waits for a piece never waits for memory
/// that nobody will give back.
class ReadRing {
 public:
  /// Reads from `source`, `readers` pieces at once, to `memory`, which holds one piece of
  /// `piece_bytes` or more; both outlive the ring. @throws InvalidArgument, ThreadError.
  ReadRing(ExpertStore& source, std::span<std::byte> memory, std::size_t piece_bytes,
           int readers = 4)
      : source_(source), piece_bytes_(piece_bytes) {
    SIDA_EXPECTS(piece_bytes > 0 && memory.size() >= piece_bytes && readers > 0,
                 "ReadRing: expected one reader or more, and memory for a piece or more, got " +
                     std::to_string(readers) + " readers and " + std::to_string(memory.size()) +
                     " bytes for pieces of " + std::to_string(piece_bytes));
    for (std::size_t at = 0; memory.size() - at >= piece_bytes; at += piece_bytes)
      free_.push_back(memory.data() + at);
    try {
      for (int i = 0; i < readers; ++i)
        readers_.push_back(start_thread("that reads experts", [this] { read_pieces(); }));
    } catch (...) {
      stop();
      throw;
    }
  }
  ReadRing(const ReadRing&) = delete;
  ReadRing& operator=(const ReadRing&) = delete;
  /// No Reading may be left.
  ~ReadRing() { stop(); }

  class Reading;

 private:
  struct Piece {
    std::span<std::byte> memory;
    bool is_over = false;  ///< read, or failed with `error`
    std::exception_ptr error;
  };

  void read_pieces() noexcept;
  Reading* next_reading() noexcept;

  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_.notify_all();
    for (std::thread& reader : readers_) reader.join();
  }

  ExpertStore& source_;
  std::size_t piece_bytes_;
  std::mutex mutex_;
  std::condition_variable work_;  ///< for readers
  std::condition_variable over_;  ///< for who takes pieces
  std::vector<std::byte*> free_;
  std::list<Reading*> readings_;  ///< in the order in which they were begun
  std::vector<std::thread> readers_;
  bool stopping_ = false;
};

/// A range of a slab on its way through the ring. For one thread; the ring outlives it.
class ReadRing::Reading {
 public:
  /// Begins to read bytes [offset, offset + bytes) of the expert's slab. @throws OutOfRange.
  Reading(ReadRing& ring, ExpertId id, std::size_t offset, std::size_t bytes)
      : ring_(ring), id_(id), begin_(offset), end_(offset + bytes) {
    check_read(ring.source_, id, offset, bytes);
    const std::lock_guard lock(ring.mutex_);
    ring.readings_.push_back(this);
    ring.work_.notify_all();
  }
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;
  /// Gives up what was not taken; waits for the reads that are under way.
  ~Reading() {
    std::unique_lock lock(ring_.mutex_);
    ring_.readings_.remove(this);
    for (; !pieces_.empty(); give_back()) wait_for_piece(lock);
    ring_.work_.notify_all();
  }

  /// The range's next piece, empty at its end; it stays until the next call.
  /// @throws what the source threw for this piece.
  std::span<const std::byte> next() {
    std::unique_lock lock(ring_.mutex_);
    if (std::exchange(is_taken_, false)) {
      give_back();
      ring_.work_.notify_one();
    }
    if (pieces_.empty() && begin_ == end_) return {};
    wait_for_piece(lock);
    if (pieces_.front().error) std::rethrow_exception(pieces_.front().error);
    is_taken_ = true;
    return pieces_.front().memory;
  }

 private:
  friend ReadRing;

  void wait_for_piece(std::unique_lock<std::mutex>& lock) {
    ring_.over_.wait(lock, [this] { return !pieces_.empty() && pieces_.front().is_over; });
  }
  void give_back() noexcept {
    ring_.free_.push_back(pieces_.front().memory.data());
    pieces_.pop_front();
  }

  ReadRing& ring_;
  ExpertId id_;
  std::size_t begin_, end_;   ///< what no reader has begun
  std::deque<Piece> pieces_;  ///< begun or read, and not given back, in order
  bool is_taken_ = false;     ///< the first of them
};

/// The oldest range of which something is not begun; null if there is none.
inline ReadRing::Reading* ReadRing::next_reading() noexcept {
  for (Reading* reading : readings_)
    if (reading->begin_ < reading->end_) return reading;
  return nullptr;
}

inline void ReadRing::read_pieces() noexcept {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    Reading* const reading = free_.empty() ? nullptr : next_reading();
    if (!reading) {
      work_.wait(lock);
      continue;
    }
    const std::size_t offset = reading->begin_;
    const std::size_t bytes = std::min(piece_bytes_, reading->end_ - offset);
    Piece& piece = reading->pieces_.emplace_back();
    piece.memory = {free_.back(), bytes};
    free_.pop_back();
    reading->begin_ += bytes;
    lock.unlock();
    std::exception_ptr error;
    try {
      source_.read(reading->id_, offset, piece.memory);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    piece.is_over = true;
    if ((piece.error = error)) reading->begin_ = reading->end_;  // the rest is in vain
    over_.notify_all();
  }
}

}  // namespace sida
