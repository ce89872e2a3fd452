// SPDX-License-Identifier: Apache-2.0
// How long it takes to lease a resident expert and give it back, alone and while another thread
// inserts experts. Prints JSON: seconds of one lookup, by repetition.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "sida/sida.hpp"

namespace {

using B = sida::CpuBackend;
using Cache = sida::ExpertCache<B, sida::LruPolicy>;
using Clock = std::chrono::steady_clock;

constexpr std::int32_t layers = 12, experts = 128;
constexpr std::size_t slab_bytes = std::size_t{64} << 10;
constexpr std::int64_t slots = 256;
constexpr int kept = 64;  // experts that are looked up
constexpr int lookups = 2000000;

/// Slabs of zeros.
class ZeroStore : public sida::ExpertStore {
 public:
  std::int32_t layers() const noexcept override { return ::layers; }
  std::int32_t experts() const noexcept override { return ::experts; }
  std::size_t slab_bytes() const noexcept override { return ::slab_bytes; }
  void read(sida::ExpertId, std::size_t, std::span<std::byte> destination) override {
    std::fill(destination.begin(), destination.end(), std::byte{0});
  }
};

sida::ExpertId kept_expert(int index) { return {0, index % kept}; }

void insert(Cache& cache, sida::ExpertId id) {
  auto loading = cache.reserve(id);
  if (!loading) return;
  cache.store().read(id, 0, {loading->slab(), slab_bytes});
  cache.commit(std::move(*loading));
}

/// Seconds of one lookup, on average over many.
double lookup_seconds(Cache& cache) {
  const auto begin = Clock::now();
  for (int i = 0; i < lookups; ++i) {
    if (!cache.try_lease(kept_expert(i))) {
      std::cerr << "an expert that is leased was evicted\n";
      std::exit(1);
    }
  }
  return std::chrono::duration<double>(Clock::now() - begin).count() / lookups;
}

/// The same while another thread inserts one expert after the other; `inserted` counts them.
double contended_seconds(Cache& cache, std::int64_t& inserted) {
  std::atomic<bool> stop{false}, started{false};
  std::thread transfer([&] {
    for (std::int32_t i = 0; !stop; ++i, started = true)
      insert(cache, {1 + i / experts % (layers - 1), i % experts}), ++inserted;
  });
  while (!started) std::this_thread::yield();
  const double seconds = lookup_seconds(cache);
  stop = true;
  transfer.join();
  return seconds;
}

void print(const char* name, const std::vector<double>& values) {
  std::cout << "\"" << name << "\": [";
  for (std::size_t i = 0; i < values.size(); ++i) std::cout << (i ? ", " : "") << values[i];
  std::cout << "]";
}

}  // namespace

int main(int argc, char** argv) {
  const int repetitions = argc > 1 ? std::max(1, std::atoi(argv[1])) : 20;
  B backend;
  Cache cache(backend, std::make_shared<ZeroStore>(),
              sida::Budget::parse(std::to_string(slots) + " experts"));
  std::vector<Cache::Lease> leases;  // they stay resident
  for (int i = 0; i < kept; ++i) {
    insert(cache, kept_expert(i));
    leases.push_back(std::move(*cache.try_lease(kept_expert(i))));
  }
  lookup_seconds(cache);
  std::vector<double> alone, contended;
  std::int64_t inserted = 0;
  for (int i = 0; i < repetitions; ++i) {
    alone.push_back(lookup_seconds(cache));
    contended.push_back(contended_seconds(cache, inserted));
  }
  std::cout << "{";
  print("alone", alone);
  std::cout << ", ";
  print("while_inserting", contended);
  std::cout << ", \"inserted\": " << inserted << ", \"slots\": " << slots
            << ", \"slab_bytes\": " << slab_bytes << "}\n";
}
