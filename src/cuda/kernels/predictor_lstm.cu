// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "predictor_kernels.hpp"
#include "warp.cuh"

namespace sida::cuda {
namespace {

constexpr int group = 8;                 // sentences that a block takes its steps with
constexpr int gates = 4;                 // rows of weights of a unit
constexpr int max_units = 8;             // of a block
constexpr unsigned counter_stride = 32;  // a counter has a line of the cache to itself

/// Blocks that share sentences meet here after each step. They must all run at the same time.
class Meeting {
 public:
  __device__ explicit Meeting(unsigned* counter) : counter_(counter) {}

  /// This block's step is done: its writes will be seen by those who wait.
  __device__ void arrive() {
    __syncthreads();
    expected_ += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter_, 1u);
    }
  }
  /// Until all blocks have done the step.
  __device__ void wait() const {
    if (threadIdx.x == 0) {
      unsigned arrived;
      do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(counter_)
                     : "memory");
      while (arrived < expected_);
    }
    __syncthreads();
  }

 private:
  unsigned* counter_;
  unsigned expected_ = 0;
};

__device__ inline float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

/// A sentence of the group at hand.
struct Member {
  std::int32_t begin, length;
  std::int32_t last;  ///< row of `past`, or below 0
};

/// A block keeps the weights of some units in shared memory, a warp each unit's four rows, and
/// takes `Group` sentences through their steps; the other blocks of its row of the grid have the
/// other units of the same sentences. A step's output is the next one's input, for all of them.
template <int Group>
__global__ void __launch_bounds__(32 * max_units) lstm_kernel(LstmCall call) {
  wait_for_previous();
  extern __shared__ float shared[];
  __shared__ Member members[Group];
  const int hidden = call.hidden, units = static_cast<int>(blockDim.x) / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int unit = static_cast<int>(blockIdx.x) * units + warp;
  const bool has_unit = unit < hidden;
  float* const weights = shared + static_cast<std::size_t>(warp) * gates * hidden;
  float* const inputs = shared + static_cast<std::size_t>(units) * gates * hidden;
  for (int gate = 0; gate < gates; ++gate)
    for (int k = lane; k < hidden; k += 32)
      weights[gate * hidden + k] =
          has_unit ? call.recurrent[(static_cast<std::size_t>(gate) * hidden + unit) * hidden + k]
                   : 0.0f;
  const int gate = lane / 8, mine = Group == 1 ? 0 : lane % 8;
  Meeting meeting(call.counters + blockIdx.y * counter_stride);
  for (int first = static_cast<int>(blockIdx.y) * Group; first < call.count;
       first += static_cast<int>(gridDim.y) * Group) {
    if (threadIdx.x < Group) {
      Member member{0, 0, -1};
      if (first + static_cast<int>(threadIdx.x) < call.count) {
        const SentenceRows rows = call.sentences[first + threadIdx.x];
        member = {rows.begin, rows.length, call.last ? call.last[rows.index] : -1};
      }
      members[threadIdx.x] = member;
    }
    __syncthreads();
    const Member own = members[mine];
    const int steps = members[0].length;
    float cell = 0.0f;
    if (has_unit && own.last >= 0)
      cell = call.past[static_cast<std::size_t>(own.last) * call.past_stride + call.past_column +
                       hidden + unit];
    for (int t = 0; t < steps; ++t) {
      const bool is_running = has_unit && t < own.length;
      float value = 0.0f;
      if (is_running)
        value = call.gates[(static_cast<std::size_t>(own.begin) + t) * gates * hidden +
                           gate * hidden + unit];
      if (t > 0) meeting.wait();
      for (int i = static_cast<int>(threadIdx.x); i < Group * hidden;
           i += static_cast<int>(blockDim.x)) {
        const int sentence = Group == 1 ? 0 : i / hidden, k = i - sentence * hidden;
        const Member member = members[sentence];
        float input = 0.0f;
        if (t < member.length && t > 0)  // written by other blocks: not from the L1 cache
          input =
              __ldcg(call.output + (static_cast<std::size_t>(member.begin) + t - 1) * hidden + k);
        else if (t < member.length && member.last >= 0)
          input = call.past[static_cast<std::size_t>(member.last) * call.past_stride +
                            call.past_column + k];
        inputs[i] = input;
      }
      __syncthreads();
      float sums[gates * Group] = {};
      for (int k = lane; k < hidden; k += 32) {
        float weight[gates];
#pragma unroll
        for (int g = 0; g < gates; ++g) weight[g] = weights[g * hidden + k];
#pragma unroll
        for (int s = 0; s < Group; ++s) {
          const float input = inputs[s * hidden + k];
#pragma unroll
          for (int g = 0; g < gates; ++g)
            sums[g * Group + s] = fmaf(weight[g], input, sums[g * Group + s]);
        }
      }
      value += sum_each<gates * Group>(sums, lane);
      const float in = __shfl_sync(whole_warp, value, lane % 8);
      const float forget = __shfl_sync(whole_warp, value, 8 + lane % 8);
      const float fresh = __shfl_sync(whole_warp, value, 16 + lane % 8);
      const float out = __shfl_sync(whole_warp, value, 24 + lane % 8);
      cell = logistic(forget) * cell + logistic(in) * tanhf(fresh);
      if (is_running && lane < Group) {
        const std::size_t at = (static_cast<std::size_t>(own.begin) + t) * hidden + unit;
        __stcg(call.output + at, logistic(out) * tanhf(cell));
        if (call.cell) call.cell[at] = cell;
      }
      meeting.arrive();
    }
    __syncthreads();  // `members` were read
  }
}

std::size_t shared_bytes(int units, int hidden) {
  return sizeof(float) * static_cast<std::size_t>(hidden) *
         static_cast<std::size_t>(units * gates + group);
}

// As much as there is, whichever predictor comes next: the limit is the kernel's, for all threads.
void allow_shared(int room) {
  for (auto* const kernel : {lstm_kernel<1>, lstm_kernel<group>})
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room),
          "make room for the predictor's LSTM");
}

}  // namespace

LstmPlan plan_lstm(int hidden) {
  const int room = shared_memory_room();
  allow_shared(room);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  for (int units = max_units; units >= 1; units /= 2) {
    const std::size_t bytes = shared_bytes(units, hidden);
    if (bytes > static_cast<std::size_t>(room)) continue;
    int fitting = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, lstm_kernel<group>, 32 * units,
                                                        bytes),
          "plan the predictor's LSTM");
    const int blocks = (hidden + units - 1) / units;
    const int lanes = std::min(fitting, 2) * processors / blocks;
    if (lanes > 0) return {units, blocks, lanes, bytes};
  }
  throw std::invalid_argument("predictor: hidden_size " + std::to_string(hidden) +
                              " is too large for the LSTM on this GPU; use device='cpu'");
}

std::size_t lstm_counters(const LstmPlan& plan) {
  return static_cast<std::size_t>(plan.lanes) * counter_stride;
}

void run_lstm(const LstmPlan& plan, const LstmCall& given, CUstream_st* stream) {
  constexpr const char* what = "launch the predictor's LSTM";
  if (given.count == 0) return;
  LstmCall call = given;
  check(cudaMemsetAsync(call.counters, 0, lstm_counters(plan) * sizeof(unsigned), stream), what);
  const int groups = call.count == 1 ? 1 : (call.count + group - 1) / group;
  const dim3 grid(static_cast<unsigned>(plan.blocks),
                  static_cast<unsigned>(std::min(groups, plan.lanes)));
  void* arguments[] = {&call};
  check(cudaLaunchCooperativeKernel(call.count == 1 ? lstm_kernel<1> : lstm_kernel<group>, grid,
                                    dim3(static_cast<unsigned>(32 * plan.units)), arguments,
                                    plan.shared_bytes, stream),
        what);
}

}  // namespace sida::cuda
