// SPDX-License-Identifier: Apache-2.0
#include "measure.hpp"

#include "element.cuh"
#include "launch.hpp"

namespace sida::cuda {
namespace {

constexpr int measure_threads = 256, measure_blocks = 1024;

/// A number's bits stirred until neighbours have nothing in common.
__device__ unsigned stirred(unsigned long long number) {
  number = (number ^ (number >> 31)) * 0x9e3779b97f4a7c15ull;
  number = (number ^ (number >> 29)) * 0xd1b54a32d192ed03ull;
  return static_cast<unsigned>(number >> 32);
}

template <class Element>
__global__ void fill_kernel(Element* to, std::size_t count, float scale, unsigned seed) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * measure_threads;
  for (std::size_t i = blockIdx.x * std::size_t{measure_threads} + threadIdx.x; i < count;
       i += step) {
    const unsigned bits = stirred(i + (static_cast<unsigned long long>(seed) << 40) + 1);
    to[i] = rounded<Element>(scale * (static_cast<float>(bits) * 0x1p-31f - 1.0f));
  }
}

__global__ void read_kernel(const uint4* from, std::size_t count, unsigned* sink) {
  unsigned seen = 0;
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * measure_threads;
  for (std::size_t i = blockIdx.x * std::size_t{measure_threads} + threadIdx.x; i < count;
       i += step) {
    const uint4 value = from[i];
    seen |= value.x | value.y | value.z | value.w;
  }
  if (seen == 0xfeedbeefu) *sink = seen;
}

}  // namespace

void fill_random(Dtype dtype, std::byte* to, std::size_t count, float scale, std::uint32_t seed,
                 Stream stream) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    fill_kernel<<<measure_blocks, measure_threads, 0, stream>>>(reinterpret_cast<Element*>(to),
                                                                count, scale, seed);
  });
  check(cudaGetLastError(), "launch a filling of memory");
}

void read_through(const std::byte* from, std::size_t bytes, unsigned* sink, Stream stream) {
  read_kernel<<<measure_blocks, measure_threads, 0, stream>>>(reinterpret_cast<const uint4*>(from),
                                                              bytes / sizeof(uint4), sink);
  check(cudaGetLastError(), "launch a reading of memory");
}

}  // namespace sida::cuda
