// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hopper.cuh"

namespace sida::cuda {

/// Blocks of a cluster, which share what each brings.
constexpr int cluster_blocks = 2;

/// Where a block is told what to compute next, in shared memory.
struct Told {
  static constexpr int places = 8;  // more than any ring has stages: none is further behind
  int numbers[places];
  std::uint64_t told[places];

  /// By one thread, before the cluster meets.
  __device__ void init() {
    for (std::uint64_t& barrier : told) {
      hopper::init_barrier(&barrier, 1);
      hopper::arrive_expecting(&barrier, sizeof(int));
    }
  }
};

/// The numbers of a cluster's sets of tiles, of `count`: the first one is its own number among
/// clusters, further ones are those that no cluster has taken yet, so that none waits for a slow
/// one. One thread of the cluster `takes` them, a set ahead, from a counter that is zero before and
/// after each product; all others are told, and one of each block `arms` the places for it.
class Tickets {
 public:
  __device__ Tickets(Told& place, std::int32_t* counter, int count, bool takes, bool arms)
      : place_(place), counter_(counter), count_(count), takes_(takes), arms_(arms) {}

  __device__ bool next(int& number) {
    number = turn_ == 0 ? static_cast<int>(blockIdx.x) / cluster_blocks : hear();
    ++turn_;
    if (number >= count_) return false;
    if (takes_) ticket_ = atomicAdd(counter_, 1);
    return true;
  }

  /// Tells all what comes next, amid a set of tiles; by the thread that takes.
  __device__ void tell() {
    if (ticket_ == count_ - 1) *counter_ = 0;  // the last one: there are as many as sets
    const int number = static_cast<int>(gridDim.x) / cluster_blocks + ticket_;
    const int at = turn_ % Told::places;
    for (unsigned rank = 0; rank < cluster_blocks; ++rank)
      hopper::store_in(rank, &place_.numbers[at], number, &place_.told[at]);
  }

 private:
  __device__ int hear() {
    const int at = turn_ % Told::places;
    hopper::wait(&place_.told[at], (turn_ - 1) / Told::places % 2);
    if (arms_) hopper::arrive_expecting(&place_.told[at], sizeof(int));
    return place_.numbers[at];
  }

  Told& place_;
  std::int32_t* counter_;
  int count_, ticket_ = 0, turn_ = 0;
  bool takes_, arms_;
};

}  // namespace sida::cuda
