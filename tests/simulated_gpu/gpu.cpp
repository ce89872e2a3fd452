// SPDX-License-Identifier: Apache-2.0
#include "simulated_gpu/gpu.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

namespace sida::simulated {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::uint32_t seed() {
  const char* const given = std::getenv("SIDA_SIMULATED_SEED");
  return given ? static_cast<std::uint32_t>(std::strtoul(given, nullptr, 10)) : 1;
}

}  // namespace

Gpu& Gpu::get() {
  static Gpu& gpu = *new Gpu;  // outlives what the program ends later
  return gpu;
}

Gpu::Gpu() : random_(seed()) {
  for (int device = 0; device < devices; ++device) {
    streams_[default_stream(device)].device = device;
    free_[device] = device_bytes;
  }
}

StreamId Gpu::make_stream(int device) {
  const std::lock_guard lock(mutex_);
  streams_[++last_stream_].device = device;
  return last_stream_;
}

void Gpu::end_stream(StreamId stream) {
  const std::lock_guard lock(mutex_);
  streams_.at(stream).is_ended = true;
  drop_if_over(stream);
}

int Gpu::device_of(StreamId stream) {
  const std::lock_guard lock(mutex_);
  return streams_.at(stream).device;
}

void Gpu::enqueue(StreamId stream, Work work) {
  const std::lock_guard lock(mutex_);
  if (auto& captured = streams_.at(stream).captured) {
    captured->push_back(std::move(work));
    return;
  }
  add(stream).work = std::move(work);
  run_some();
}

void Gpu::record(StreamId stream, Event& event) {
  const std::lock_guard lock(mutex_);
  Item& item = add(stream);
  event.at = {stream, item.operation.number};
  event.before = streams_.at(stream).before;
  event.seconds = std::make_shared<double>(0);
  item.work = [seconds = event.seconds](const Memory&) { *seconds = seconds_now(); };
  run_some();
}

void Gpu::wait(StreamId stream, const Event& event) {
  const std::lock_guard lock(mutex_);
  if (!event.at) return;
  add(stream).for_ = event.at;
  streams_.at(stream).before.join(event.before);
  run_some();
}

void Gpu::synchronize(const Event& event) {
  const std::lock_guard lock(mutex_);
  if (!event.at) return;
  run_until([&] { return is_done(*event.at); });
  known_.join(event.before);
}

bool Gpu::is_passed(const Event& event) {
  const std::lock_guard lock(mutex_);
  if (!event.at) return true;
  run_some();
  if (!is_done(*event.at)) {
    step();  // who asks again and again sees it pass
    return false;
  }
  known_.join(event.before);
  return true;
}

void Gpu::synchronize(StreamId stream) {
  const std::lock_guard lock(mutex_);
  run_until([&] { return streams_.at(stream).waiting.empty(); });
  known_.join(streams_.at(stream).before);
}

void Gpu::synchronize() {
  const std::lock_guard lock(mutex_);
  while (step()) {
  }
  // Nothing that comes can meet what was before.
  accesses_ = {};
  known_ = {};
  for (auto& [id, stream] : streams_) stream.before = {};
}

bool Gpu::begin_capture(StreamId stream) {
  const std::lock_guard lock(mutex_);
  auto& captured = streams_.at(stream).captured;
  if (captured) return false;
  captured.emplace();
  return true;
}

std::optional<Gpu::Graph> Gpu::end_capture(StreamId stream) {
  const std::lock_guard lock(mutex_);
  return std::exchange(streams_.at(stream).captured, std::nullopt);
}

bool Gpu::is_captured(StreamId stream) {
  const std::lock_guard lock(mutex_);
  return streams_.at(stream).captured.has_value();
}

void* Gpu::allocate(int device, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  void* data = nullptr;
  if (bytes > free_[device] || ::posix_memalign(&data, 256, bytes) != 0) return nullptr;
  std::memset(data, 0xff, bytes);
  free_[device] -= bytes;
  blocks_[static_cast<std::byte*>(data)] = {bytes, device};
  return data;
}

bool Gpu::deallocate(void* data) {
  synchronize();
  const std::lock_guard lock(mutex_);
  const auto block = blocks_.find(static_cast<std::byte*>(data));
  if (block == blocks_.end()) return false;
  free_[block->second.device] += block->second.bytes;
  blocks_.erase(block);
  std::free(data);
  return true;
}

std::size_t Gpu::free_bytes(int device) {
  const std::lock_guard lock(mutex_);
  return free_[device];
}

bool Gpu::pin(void* data, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  return pinned_.emplace(static_cast<std::byte*>(data), bytes).second;
}

bool Gpu::unpin(void* data) {
  const std::lock_guard lock(mutex_);
  return pinned_.erase(static_cast<std::byte*>(data)) > 0;
}

template <class T>
typename std::map<const std::byte*, T>::iterator Gpu::holder(std::map<const std::byte*, T>& of,
                                                             const void* data) {
  const auto behind = of.upper_bound(static_cast<const std::byte*>(data));
  return behind == of.begin() ? of.end() : std::prev(behind);
}

bool Gpu::is_device_memory(const void* data) {
  const std::lock_guard lock(mutex_);
  const auto block = holder(blocks_, data);
  return block != blocks_.end() && data < block->first + block->second.bytes;
}

bool Gpu::is_pinned(const void* data) {
  const std::lock_guard lock(mutex_);
  const auto block = holder(pinned_, data);
  return block != pinned_.end() && data < block->first + block->second;
}

Gpu::Item& Gpu::add(StreamId id) {
  Stream& stream = streams_.at(id);
  stream.before.join(known_);
  Item& item = stream.waiting.emplace_back();
  item.operation = {id, ++stream.enqueued, stream.before};
  stream.before.advance(id, stream.enqueued);
  return item;
}

// The operations of a stream that is no longer there have run.
bool Gpu::is_done(const Place& place) const {
  const auto stream = streams_.find(place.stream);
  return stream == streams_.end() || place.number <= stream->second.done;
}

void Gpu::run_some() {
  // For a while nothing runs that is not waited for, for a while nearly everything at once.
  constexpr std::uint32_t chances[] = {0, 1, 4, 16};  // of 16
  if (random_() % 256 == 0) chance_ = chances[random_() % std::size(chances)];
  if (random_() % 16 < chance_)
    for (auto steps = random_() % 8; steps > 0 && step(); --steps) {
    }
}

// Runs one operation of any stream. @returns whether one could run.
bool Gpu::step() {
  const auto can_run = [&](const auto& stream) {
    const auto& waiting = stream.second.waiting;
    return !waiting.empty() && (!waiting.front().for_ || is_done(*waiting.front().for_));
  };
  const auto able = std::ranges::count_if(streams_, can_run);
  if (able == 0) return false;
  auto others = static_cast<std::ptrdiff_t>(random_() % static_cast<std::uint32_t>(able));
  auto stream = std::ranges::find_if(streams_, can_run);
  for (; others > 0; --others) stream = std::find_if(std::next(stream), streams_.end(), can_run);
  run(stream);
  return true;
}

void Gpu::run(std::map<StreamId, Stream>::iterator stream) {
  const Item item = std::move(stream->second.waiting.front());
  stream->second.waiting.pop_front();
  if (item.work) item.work(Memory(accesses_, item.operation));
  stream->second.done = item.operation.number;
  drop_if_over(stream->first);
  if (accesses_.size() > most_accesses_) forget_what_all_know();
}

template <class IsEnough>
void Gpu::run_until(IsEnough&& is_enough) {
  while (!is_enough())
    if (!step()) {
      std::fputs("simulated GPU: what is waited for can never come\n", stderr);
      std::abort();
    }
}

void Gpu::drop_if_over(StreamId id) {
  const auto stream = streams_.find(id);
  if (!stream->second.is_ended || !stream->second.waiting.empty()) return;
  streams_.erase(stream);
}

void Gpu::forget_what_all_know() {
  accesses_.forget([&](StreamId stream, std::uint64_t number) {
    return known_.covers(stream, number) && std::ranges::all_of(streams_, [&](const auto& other) {
             return other.first == stream ||
                    std::ranges::all_of(other.second.waiting, [&](const Item& item) {
                      return item.operation.before.covers(stream, number);
                    });
           });
  });
  most_accesses_ = std::max(most_accesses_, 2 * accesses_.size());
}

}  // namespace sida::simulated
