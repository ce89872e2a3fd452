// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "predictor_kernels.hpp"
#include "warp.cuh"

namespace sida::cuda {
namespace {

constexpr int threads = 256;

/// A warp a row.
__global__ void __launch_bounds__(threads)
    rms_norm_kernel(const float* x, const float* weight, float* y, int rows, int size) {
  wait_for_previous();
  const int row = static_cast<int>(blockIdx.x * (threads / 32) + threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (row >= rows) return;
  x += static_cast<std::size_t>(row) * size;
  y += static_cast<std::size_t>(row) * size;
  float squares = 0.0f;
  for (int k = lane; k < size; k += 32) squares = fmaf(x[k], x[k], squares);
  const float factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(size) + 1e-6f);
  for (int k = lane; k < size; k += 32) y[k] = x[k] * factor * weight[k];
}

/// A thread turns one pair of numbers of every head of a row. Angles in f64: those of f32 are off
/// by 1e-4 after a thousand tokens.
__global__ void __launch_bounds__(threads)
    rotate_kernel(float* qkv, const std::int32_t* position, int rows, int heads, int size) {
  wait_for_previous();
  const int half = size / 2;
  const int row = static_cast<int>((blockIdx.x * threads + threadIdx.x) / half);
  const int i = static_cast<int>((blockIdx.x * threads + threadIdx.x) % half);
  if (row >= rows) return;
  const double angle = position[row] * pow(10000.0, -2.0 * i / size);
  double exact_sine, exact_cosine;
  sincos(angle, &exact_sine, &exact_cosine);
  const auto sine = static_cast<float>(exact_sine), cosine = static_cast<float>(exact_cosine);
  float* const at = qkv + static_cast<std::size_t>(row) * 3 * heads * size + i;
  for (int part = 0; part < 2 * heads; ++part) {  // the queries' heads, then the keys'
    const float first = at[part * size], second = at[part * size + half];
    at[part * size] = first * cosine - second * sine;
    at[part * size + half] = second * cosine + first * sine;
  }
}

/// A block a sentence.
__global__ void __launch_bounds__(threads)
    gather_past_kernel(PastStates past, float* seen, int seen_rows, std::int32_t* earlier,
                       std::int32_t* last) {
  wait_for_previous();
  const std::size_t stride = 1 + 4 * static_cast<std::size_t>(past.hidden);
  const int sentence = static_cast<int>(blockIdx.x);
  const float* state = past.states + static_cast<std::size_t>(sentence) * past.tokens * stride;
  float* to = seen + static_cast<std::size_t>(sentence) * seen_rows * past.hidden;
  int count = 0, latest = -1;
  for (int token = 0; token < past.tokens; ++token, state += stride) {
    if (state[0] == 0.0f) continue;
    for (int k = static_cast<int>(threadIdx.x); k < past.hidden; k += threads)
      to[static_cast<std::size_t>(count) * past.hidden + k] = state[1 + 2 * past.hidden + k];
    ++count;
    latest = sentence * past.tokens + token;
  }
  if (threadIdx.x == 0) {
    earlier[sentence] = count;
    last[sentence] = latest;
  }
}

/// A block copies one row of each sentence.
__global__ void __launch_bounds__(threads)
    append_kernel(const float* output, const SentenceRows* sentences, int hidden, float* seen,
                  int seen_rows, const std::int32_t* earlier) {
  wait_for_previous();
  const SentenceRows sentence = sentences[blockIdx.y];
  const int token = static_cast<int>(blockIdx.x);
  if (token >= sentence.length) return;
  const float* const from = output + (static_cast<std::size_t>(sentence.begin) + token) * hidden;
  const std::size_t row =
      static_cast<std::size_t>(sentence.index) * seen_rows + earlier[sentence.index] + token;
  for (int k = static_cast<int>(threadIdx.x); k < hidden; k += threads)
    seen[row * hidden + k] = from[k];
}

struct StateParts {
  const float* part[4];
};

/// A block a row.
__global__ void __launch_bounds__(threads)
    write_states_kernel(StateParts parts, const std::int32_t* tokens, int hidden, float* states) {
  wait_for_previous();
  const std::size_t row = blockIdx.x, stride = 1 + 4 * static_cast<std::size_t>(hidden);
  float* const state = states + static_cast<std::size_t>(tokens[row]) * stride;
  if (threadIdx.x == 0) state[0] = 1.0f;
#pragma unroll
  for (int part = 0; part < 4; ++part)
    for (int k = static_cast<int>(threadIdx.x); k < hidden; k += threads)
      state[1 + part * hidden + k] = parts.part[part][row * hidden + k];
}

unsigned blocks_of(std::size_t count, std::size_t size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace

void rms_norm(const float* x, const float* weight, float* y, int rows, int size,
              CUstream_st* stream) {
  if (rows == 0) return;
  launch("launch the predictor's norm", rms_norm_kernel,
         dim3(blocks_of(static_cast<std::size_t>(rows), threads / 32)), threads, stream, x, weight,
         y, rows, size);
}

void rotate(float* qkv, const std::int32_t* position, int rows, int heads, int size,
            CUstream_st* stream) {
  if (rows == 0) return;
  const std::size_t pairs = static_cast<std::size_t>(rows) * static_cast<std::size_t>(size / 2);
  launch("launch the predictor's rotation", rotate_kernel, dim3(blocks_of(pairs, threads)), threads,
         stream, qkv, position, rows, heads, size);
}

void gather_past(const PastStates& past, float* seen, int seen_rows, std::int32_t* earlier,
                 std::int32_t* last, CUstream_st* stream) {
  if (past.sentences == 0) return;
  launch("gather the predictor's states", gather_past_kernel,
         dim3(static_cast<unsigned>(past.sentences)), threads, stream, past, seen, seen_rows,
         earlier, last);
}

void append_latest(const float* output, const SentenceRows* sentences, int count, int hidden,
                   float* seen, int seen_rows, const std::int32_t* earlier, int longest,
                   CUstream_st* stream) {
  if (count == 0) return;
  launch("gather the predictor's states", append_kernel,
         dim3(static_cast<unsigned>(longest), static_cast<unsigned>(count)), threads, stream,
         output, sentences, hidden, seen, seen_rows, earlier);
}

void write_states(const float* const (&parts)[4], const std::int32_t* tokens, int rows, int hidden,
                  float* states, CUstream_st* stream) {
  if (rows == 0) return;
  const StateParts all{{parts[0], parts[1], parts[2], parts[3]}};
  launch("write the predictor's states", write_states_kernel, dim3(static_cast<unsigned>(rows)),
         threads, stream, all, tokens, hidden, states);
}

}  // namespace sida::cuda
