// SPDX-License-Identifier: Apache-2.0
#include "launch.cuh"
#include "predictor_kernels.hpp"

namespace sida::cuda {
namespace {

constexpr int threads = 256;
constexpr int block_outs = 64;
constexpr int block_depth = 16;
constexpr int padding = 4;  // of rows in shared memory, against conflicts of banks

/// What a thread reads of a tile, [Rows, block_depth], before it goes to shared memory.
template <int Rows>
struct Piece {
  static constexpr int count = Rows * block_depth / threads;
  const float* row[count];
  float value[count];

  __device__ void load(int depth, int in) {
    const int k = depth + static_cast<int>(threadIdx.x) % block_depth;
#pragma unroll
    for (int i = 0; i < count; ++i) value[i] = row[i] && k < in ? row[i][k] : 0.0f;
  }
  __device__ void store(float (&tile)[block_depth][Rows + padding]) const {
#pragma unroll
    for (int i = 0; i < count; ++i)
      tile[threadIdx.x % block_depth][(threadIdx.x + i * threads) / block_depth] = value[i];
  }
};

/// A block works out Rows rows of block_outs outputs, a thread Rows / 16 rows of 4; sums go along
/// the depth one product after another, whatever the tile.
template <int Rows>
__global__ void __launch_bounds__(threads)
    linear_kernel(PredictorLinear linear, const float* x, const std::int32_t* rows, float* y,
                  int count, LinearResult result) {
  wait_for_previous();
  constexpr int own = Rows / 16;
  __shared__ __align__(16) float inputs[block_depth][Rows + padding];
  __shared__ __align__(16) float weights[block_depth][block_outs + padding];
  const int first_row = static_cast<int>(blockIdx.x) * Rows;
  const int first_out = static_cast<int>(blockIdx.y) * block_outs;
  Piece<Rows> input;
  Piece<block_outs> weight;
#pragma unroll
  for (int i = 0; i < Piece<Rows>::count; ++i) {
    const int row = first_row + (static_cast<int>(threadIdx.x) + i * threads) / block_depth;
    input.row[i] =
        row < count ? x + static_cast<std::size_t>(rows ? rows[row] : row) * linear.in : nullptr;
  }
#pragma unroll
  for (int i = 0; i < Piece<block_outs>::count; ++i) {
    const int out = first_out + (static_cast<int>(threadIdx.x) + i * threads) / block_depth;
    weight.row[i] =
        out < linear.out ? linear.weight + static_cast<std::size_t>(out) * linear.in : nullptr;
  }
  const int tile_row = static_cast<int>(threadIdx.x) / 16 * own;
  const int tile_out = static_cast<int>(threadIdx.x) % 16 * 4;
  float sums[own][4] = {};
  input.load(0, linear.in);
  weight.load(0, linear.in);
  for (int depth = 0; depth < linear.in; depth += block_depth) {
    input.store(inputs);
    weight.store(weights);
    __syncthreads();
    input.load(depth + block_depth, linear.in);
    weight.load(depth + block_depth, linear.in);
#pragma unroll
    for (int k = 0; k < block_depth; ++k) {
      const float4 w = *reinterpret_cast<const float4*>(&weights[k][tile_out]);
#pragma unroll
      for (int i = 0; i < own; ++i) {
        const float value = inputs[k][tile_row + i];
        sums[i][0] = fmaf(value, w.x, sums[i][0]);
        sums[i][1] = fmaf(value, w.y, sums[i][1]);
        sums[i][2] = fmaf(value, w.z, sums[i][2]);
        sums[i][3] = fmaf(value, w.w, sums[i][3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < own; ++i) {
    const int row = first_row + tile_row + i;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int out = first_out + tile_out + j;
      if (row >= count || out >= linear.out) continue;
      float value = sums[i][j];
      if (linear.bias) value += linear.bias[out];
      if (linear.second_bias) value += linear.second_bias[out];
      float& to = y[static_cast<std::size_t>(row) * linear.out + out];
      if (result == LinearResult::relu)
        to = value < 0.0f ? 0.0f : value;  // NaN stays NaN
      else
        to = result == LinearResult::added ? to + value : value;
    }
  }
}

}  // namespace

void apply(const PredictorLinear& linear, const float* x, const std::int32_t* rows, float* y,
           int count, LinearResult result, CUstream_st* stream) {
  constexpr const char* what = "launch a product of the predictor";
  if (count == 0) return;
  const auto blocks = [](int extent, int size) {
    return static_cast<unsigned>((extent + size - 1) / size);
  };
  const unsigned columns = blocks(linear.out, block_outs);
  // Small tiles where large ones would leave most of the device idle.
  if (blocks(count, 64) * columns < 128)
    launch(what, linear_kernel<16>, dim3(blocks(count, 16), columns), threads, stream, linear, x,
           rows, y, count, result);
  else
    launch(what, linear_kernel<64>, dim3(blocks(count, 64), columns), threads, stream, linear, x,
           rows, y, count, result);
}

}  // namespace sida::cuda
