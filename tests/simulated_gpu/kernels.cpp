// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "expert_kernels.hpp"
#include "guess.hpp"
#include "launch.hpp"
#include "simulated_gpu/accesses.hpp"
#include "support/random_weights.hpp"
#include "support/reference_ffn.hpp"

// What sida's kernels compute, in plain C++ and with as many launches, on the simulated GPU.
namespace sida::cuda {
namespace {

using simulated::Memory;
using simulated::Work;
using test::element;

void launch(const char* what, Stream stream, Work work) {
  cudaLaunchConfig_t config{};
  config.stream = stream;
  check(cudaLaunchKernelExC(&config, &work, nullptr), what);
}

DataType type_of(Dtype dtype) {
  return dtype == Dtype::f32 ? DataType::f32 : dtype == Dtype::f16 ? DataType::f16 : DataType::bf16;
}
std::size_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }
std::size_t assignments_of(const LayerShape& shape) { return size(shape.tokens * shape.top_k); }

/// An array of a dtype, all of whose elements an operation reads.
class Numbers {
 public:
  Numbers(const Memory& memory, const void* data, Dtype dtype, std::int64_t count)
      : values_(size(count)) {
    const auto* const from =
        memory.read(static_cast<const std::byte*>(data), size(count) * bytes_of(dtype));
    for (std::int64_t i = 0; i < count; ++i) values_[size(i)] = element(from, type_of(dtype), i);
  }
  double operator[](std::int64_t i) const { return values_[size(i)]; }
  const double* at(std::int64_t i) const { return values_.data() + i; }

 private:
  std::vector<double> values_;
};

double product_of(const double* a, const double* b, std::int64_t count) {
  return std::inner_product(a, a + count, b, 0.0);
}

/// A call's routing as a kernel reads it, and the experts' rows.
struct Routed {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

Routed read_given(const LayerShape& shape, const GivenRouting& given, const Memory& memory) {
  const std::size_t count = assignments_of(shape);
  Routed routed;
  const auto* const narrow = static_cast<const std::int32_t*>(given.ids);
  const auto* const wide = static_cast<const std::int64_t*>(given.ids);
  if (given.wide_ids)
    memory.read(wide, count);
  else
    memory.read(narrow, count);
  if (given.keep) memory.read(given.keep, size(shape.tokens));
  const Numbers weights(memory, given.weights, given.weights_type,
                        static_cast<std::int64_t>(count));
  constexpr std::int64_t most = 0x7fffffff;
  for (std::size_t a = 0; a < count; ++a) {
    const std::int64_t id = given.wide_ids ? wide[a] : narrow[a];
    routed.ids.push_back(static_cast<std::int32_t>(std::clamp(id, -most, most)));
    const bool is_kept = !given.keep || given.keep[a / size(shape.top_k)] != 0;
    routed.weights.push_back(is_kept ? static_cast<float>(weights[static_cast<std::int64_t>(a)])
                                     : 0.0f);
  }
  return routed;
}

void write_taken(const LayerShape& shape, const TakenRouting& taken, const Routed& routed,
                 const Memory& memory) {
  const std::size_t count = routed.ids.size();
  if (taken.ids) {
    std::ranges::copy(routed.ids, memory.write(taken.ids, count));
    std::ranges::copy(routed.weights, memory.write(taken.weights, count));
  }
  if (!taken.host_ids) return;
  memory.write(taken.host_ids, count);
  memory.write(taken.host_weights, count);
  for (std::size_t a = 0; a < count; ++a) {
    const bool is_left_out = routed.weights[a] == 0 || routed.ids[a] == shape.experts;
    taken.host_ids[a] = is_left_out ? left_out : routed.ids[a];
    taken.host_weights[a] = is_left_out ? 0 : routed.weights[a];
  }
}

/// Writes a plan that lies anywhere.
void plan_rows(const LayerShape& shape, const Routed& routed, const Plan& plan) {
  const auto assignments = static_cast<std::int32_t>(routed.ids.size());
  std::int32_t row = 0, active = 0;
  *plan.invalid = 0;
  std::fill_n(plan.row_of, assignments, -1);
  std::fill_n(plan.group_rows, assignments, 0);
  for (std::int32_t a = 0; a < assignments; ++a)
    if (routed.weights[size(a)] != 0 &&
        (routed.ids[size(a)] < 0 || routed.ids[size(a)] > shape.experts))
      ++*plan.invalid;
  for (std::int32_t expert = 0; expert < shape.experts; ++expert) {
    const std::int32_t begin = row;
    for (std::int32_t a = 0; a < assignments; ++a) {
      if (routed.ids[size(a)] != expert || routed.weights[size(a)] == 0) continue;
      plan.row_of[a] = row;
      plan.order[row++] = a;
    }
    plan.counts[expert] = row - begin;
    for (std::int32_t r = begin; r < row; ++r) plan.group_rows[plan.order[r]] = row - begin;
    if (row > begin) plan.active[active++] = {expert, begin, row - begin, 0};
  }
  *plan.active_count = active;
}

/// Notes that an operation reads a plan that others see.
void read_plan(const LayerShape& shape, const Plan& plan, const Memory& memory) {
  memory.read(reinterpret_cast<const std::byte*>(plan.active), plan_bytes(shape));
}

/// Intermediate activations and results in f32, all rows of both.
struct Workspace {
  Workspace(const LayerShape& shape, const std::byte* memory)
      : up(reinterpret_cast<float*>(const_cast<std::byte*>(memory))),
        down(up + assignments_of(shape) * size(shape.intermediate)) {}
  float *up, *down;
};

/// One product of the experts' rows with weights of theirs that are present.
class Product {
 public:
  Product(const LayerShape& shape, const Plan& plan, const ExpertSlabs& slabs, const FewSlots& few)
      : shape_(shape), plan_(plan), slabs_(slabs), few_(few) {}

  void up(const Memory& memory, const void* hidden, float* to) const {
    const Numbers x(memory, hidden, shape_.dtype, std::int64_t{shape_.tokens} * shape_.hidden);
    const std::int64_t parts = shape_.gated ? 2 : 1, width = shape_.intermediate;
    for_experts(memory, [&](const ActiveExpert& expert, const std::byte* slab) {
      const Numbers weights(memory, slab + slabs_.up_offset, shape_.dtype,
                            parts * width * shape_.hidden);
      const Numbers bias(memory, slab + slabs_.up_bias_offset, shape_.dtype,
                         shape_.up_bias ? parts * width : 0);
      memory.write(to + expert.row_begin * width, size(expert.rows * width));
      for_rows(expert, [&](std::int64_t row) {
        const std::int64_t token = plan_.order[row] / shape_.top_k;
        const auto product = [&](std::int64_t output) {
          return (shape_.up_bias ? bias[output] : 0) +
                 product_of(weights.at(output * shape_.hidden), x.at(token * shape_.hidden),
                            shape_.hidden);
        };
        for (std::int64_t i = 0; i < width; ++i)
          to[row * width + i] = activated(product(i), shape_.gated ? product(width + i) : 0);
      });
    });
  }
  void down(const Memory& memory, const float* from, float* to) const {
    const std::int64_t width = shape_.hidden, depth = shape_.intermediate;
    for_experts(memory, [&](const ActiveExpert& expert, const std::byte* slab) {
      const Numbers weights(memory, slab + slabs_.down_offset, shape_.dtype, width * depth);
      const Numbers bias(memory, slab + slabs_.down_bias_offset, shape_.dtype,
                         shape_.down_bias ? width : 0);
      const Numbers in(memory, from + expert.row_begin * depth, Dtype::f32, expert.rows * depth);
      memory.write(to + expert.row_begin * width, size(expert.rows * width));
      for_rows(expert, [&](std::int64_t row) {
        for (std::int64_t i = 0; i < width; ++i)
          to[row * width + i] = static_cast<float>(
              (shape_.down_bias ? bias[i] : 0) +
              product_of(weights.at(i * depth), in.at((row - expert.row_begin) * depth), depth));
      });
    });
  }

 private:
  template <class F>
  void for_experts(const Memory& memory, F&& f) const {
    const std::int32_t count = *plan_.active_count;
    if (slabs_.slot_of) memory.read(slabs_.slot_of, size(shape_.experts));
    for (std::int32_t i = 0; i < count; ++i) {
      const ActiveExpert& expert = plan_.active[i];
      const std::int32_t slot = slabs_.slot_of ? slabs_.slot_of[expert.expert] : few_.of[i];
      if (slot >= 0) f(expert, slabs_.arena + size(slot) * slabs_.stride);
    }
  }
  template <class F>
  static void for_rows(const ActiveExpert& expert, F&& f) {
    for (std::int64_t row = expert.row_begin; row < expert.row_begin + expert.rows; ++row) f(row);
  }
  float activated(double gate, double beside) const {
    static constexpr Activation same[] = {Activation::relu,          Activation::relu2,
                                          Activation::gelu,          Activation::gelu_tanh,
                                          Activation::silu,          Activation::silu_clamped,
                                          Activation::swiglu_clamped};
    const auto limit = static_cast<double>(shape_.limit);
    const double value =
        test::reference_activation(same[static_cast<std::size_t>(shape_.activation)], gate, limit);
    if (!shape_.gated) return static_cast<float>(value);
    const bool is_clamped =
        shape_.activation == Act::silu_clamped || shape_.activation == Act::swiglu_clamped;
    if (is_clamped) beside = std::clamp(beside, -limit, limit);
    if (shape_.activation == Act::swiglu_clamped) beside += 1;
    return static_cast<float>(value * beside);
  }

  LayerShape shape_;
  Plan plan_;
  ExpertSlabs slabs_;
  FewSlots few_;
};

void sum_choices(const LayerShape& shape, const Plan& plan, const float* weights,
                 const float* results, void* out, const Memory& memory) {
  const std::int64_t width = shape.hidden;
  const std::int32_t* const row_of = plan.row_of;
  const auto rows = std::count_if(row_of, row_of + assignments_of(shape),
                                  [](std::int32_t row) { return row >= 0; });
  memory.read(results, size(rows * width));
  auto* const to = memory.write(static_cast<std::byte*>(out),
                                size(shape.tokens * width) * bytes_of(shape.dtype));
  for (std::int64_t token = 0; token < shape.tokens; ++token)
    for (std::int64_t i = 0; i < width; ++i) {
      float sum = 0;
      for (std::int64_t a = token * shape.top_k; a < (token + 1) * shape.top_k; ++a)
        if (row_of[a] >= 0) sum += weights[a] * results[row_of[a] * width + i];
      test::store(to, type_of(shape.dtype), token * width + i, static_cast<double>(sum));
    }
}

/// A plan in memory of an operation's own, which is nobody else's to meet.
class OwnPlan {
 public:
  OwnPlan(const LayerShape& shape, const Routed& routed)
      : memory_(plan_bytes(shape)), plan_(plan_at(shape, memory_.data())) {
    plan_rows(shape, routed, plan_);
  }
  const Plan& operator*() const { return plan_; }

 private:
  std::vector<std::byte> memory_;
  Plan plan_;
};

}  // namespace

std::size_t workspace_bytes(const LayerShape& shape) {
  return sizeof(float) * assignments_of(shape) * size(shape.hidden + shape.intermediate);
}

void make_plan(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
               const Plan& plan, Stream stream) {
  launch("launch the plan of expert rows", stream, [=](const Memory& memory) {
    const Routed routed = read_given(shape, given, memory);
    write_taken(shape, taken, routed, memory);
    memory.write(reinterpret_cast<std::byte*>(plan.active), plan_bytes(shape));
    plan_rows(shape, routed, plan);
  });
}

void compute_experts(const LayerShape& shape, const Plan& plan, const void* hidden,
                     const ExpertSlabs& slabs, std::byte* memory_of_call, Stream stream,
                     const FewSlots& few) {
  if (shape.tokens == 0) return;
  const Workspace workspace(shape, memory_of_call);
  const Product product(shape, plan, slabs, few);
  launch("launch a product of expert weights", stream, [=](const Memory& memory) {
    read_plan(shape, plan, memory);
    product.up(memory, hidden, workspace.up);
  });
  launch("launch a product of expert weights", stream, [=](const Memory& memory) {
    read_plan(shape, plan, memory);
    product.down(memory, workspace.up, workspace.down);
  });
}

void combine(const LayerShape& shape, const Plan& plan, const float* weights,
             const std::byte* memory_of_call, void* out, Stream stream) {
  if (shape.tokens == 0) return;
  const Workspace workspace(shape, memory_of_call);
  launch("launch the sum over experts", stream, [=](const Memory& memory) {
    read_plan(shape, plan, memory);
    memory.read(weights, assignments_of(shape));
    sum_choices(shape, plan, weights, workspace.down, out, memory);
  });
}

bool is_few(const LayerShape& shape) {
  return 0 < shape.tokens && shape.tokens * shape.top_k <= few_assignments &&
         shape.dtype != Dtype::f32;
}

std::size_t few_bytes(const LayerShape& shape) { return size(shape.hidden) * sizeof(unsigned); }

void compute_few(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
                 const void* hidden, const ExpertSlabs& slabs, std::byte* memory_of_call,
                 std::byte* counters, void* out, Stream stream, const FewSlots& few) {
  const Workspace workspace(shape, memory_of_call);
  const TakenRouting told{nullptr, nullptr, taken.host_ids, taken.host_weights};
  launch("launch a call of few rows", stream, [=](const Memory& memory) {
    const Routed routed = read_given(shape, given, memory);
    write_taken(shape, told, routed, memory);
    const OwnPlan plan(shape, routed);
    Product(shape, *plan, slabs, few).up(memory, hidden, workspace.up);
  });
  launch("launch a call of few rows", stream, [=](const Memory& memory) {
    const Routed routed = read_given(shape, given, memory);
    const OwnPlan plan(shape, routed);
    Product(shape, *plan, slabs, few).down(memory, workspace.up, workspace.down);
    auto* const ended = memory.write(counters, few_bytes(shape));
    if (std::any_of(ended, ended + few_bytes(shape),
                    [](std::byte it) { return it != std::byte{}; }))
      throw std::logic_error("compute_few: expected counters of zeros");
    sum_choices(shape, *plan, routed.weights.data(), workspace.down, out, memory);
  });
}

std::size_t guess_bytes(int experts) { return size(experts) * sizeof(float); }

void guess_choices(Dtype dtype, int tokens, int hidden_size, const void* hidden,
                   const RouterWeights& router, std::byte* scratch, std::int32_t* host_ids,
                   Stream stream) {
  if (tokens > most_guessing_tokens || router.top_k > max_top_k)
    throw std::invalid_argument("guess: too many tokens or choices");
  launch("launch a guess", stream, [=](const Memory& memory) {
    const Numbers x(memory, hidden, dtype, std::int64_t{tokens} * hidden_size);
    const Numbers weights(memory, router.weight, router.weight_type,
                          std::int64_t{router.experts} * hidden_size);
    const Numbers bias(memory, router.bias, Dtype::f32, router.bias ? router.experts : 0);
    const Numbers correction(memory, router.correction, Dtype::f32,
                             router.correction ? router.experts : 0);
    memory.write(scratch, guess_bytes(router.experts));
    memory.write(host_ids, size(tokens * router.top_k));
    for (std::int64_t token = 0; token < tokens; ++token) {
      std::vector<double> scores;
      for (std::int64_t expert = 0; expert < router.experts; ++expert) {
        double score =
            (router.bias ? bias[expert] : 0) +
            product_of(x.at(token * hidden_size), weights.at(expert * hidden_size), hidden_size);
        if (router.correction) score = 1 / (1 + std::exp(-score)) + correction[expert];
        scores.push_back(score);
      }
      for (int choice = 0; choice < router.top_k; ++choice) {
        std::int32_t best = -1;
        for (std::int32_t expert = 0; expert < router.experts; ++expert)
          if (!std::isnan(scores[size(expert)]) &&
              (best < 0 || scores[size(expert)] > scores[size(best)]))
            best = expert;
        if (best >= 0) scores[size(best)] = NAN;
        // The host reads while this runs.
        std::atomic_ref(host_ids[token * router.top_k + choice])
            .store(best, std::memory_order_release);
      }
    }
  });
}

}  // namespace sida::cuda
