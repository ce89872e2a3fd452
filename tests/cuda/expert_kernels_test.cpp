// SPDX-License-Identifier: Apache-2.0
#include "expert_kernels.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cuda/device.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/ffn/token_groups.hpp"
#include "support/catch.hpp"
#include "support/random_weights.hpp"
#include "support/reference_ffn.hpp"

using namespace sida;
using namespace sida::test;

namespace {

MoeConfig config_of(DataType dtype, std::int32_t experts, std::int32_t top_k, std::int32_t hidden,
                    std::int32_t intermediate, bool gated = false,
                    Activation activation = Activation::relu, bool biases = false) {
  MoeConfig config;
  config.layers = 1;
  config.experts = experts;
  config.top_k = top_k;
  config.hidden_size = hidden;
  config.intermediate_size = intermediate;
  config.gated = gated;
  config.activation = activation;
  config.up_bias = config.down_bias = biases;
  config.dtype = dtype;
  return config;
}

cuda::LayerShape shape_of(const MoeConfig& config, std::int64_t tokens,
                          cuda::Kernel kernel = cuda::Kernel::tuned) {
  cuda::LayerShape shape;
  shape.kernel = kernel;
  shape.dtype = config.dtype == DataType::f32   ? cuda::Dtype::f32
                : config.dtype == DataType::f16 ? cuda::Dtype::f16
                                                : cuda::Dtype::bf16;
  shape.tokens = static_cast<int>(tokens);
  shape.top_k = config.top_k;
  shape.experts = config.experts;
  shape.hidden = config.hidden_size;
  shape.intermediate = config.intermediate_size;
  shape.activation = static_cast<cuda::Act>(config.activation);
  shape.limit = config.limit;
  shape.gated = config.gated;
  shape.up_bias = config.up_bias;
  shape.down_bias = config.down_bias;
  return shape;
}

struct Input {
  Tensor hidden, ids, weights;
};

Input random_input(const MoeConfig& config, std::int64_t tokens, std::uint32_t seed,
                   DataType ids_type = DataType::i64) {
  Input input{random_tensor({tokens, config.hidden_size}, config.dtype, seed),
              Tensor({tokens, config.top_k}, ids_type),
              Tensor({tokens, config.top_k}, DataType::f32)};
  std::mt19937 random(seed + 1);
  for (std::int64_t a = 0; a < tokens * config.top_k; ++a) {
    input.ids.set(a, static_cast<double>(random() % static_cast<std::uint32_t>(config.experts)));
    input.weights.set(a, 0.25 + 0.75 * static_cast<double>(random() % 1024) / 1024);
  }
  return input;
}

/// Plan, scratch, counters and result of one call, NaN before it but for the counters; and its
/// routing, taken into one form.
struct CallMemory {
  CallMemory(const cuda::LayerShape& shape, const Input& input) {
    hidden.fill(input.hidden.bytes);
    ids.fill(input.ids.bytes);
    weights.fill(input.weights.bytes);
    plan_memory.poison(cuda::plan_bytes(shape));
    workspace.poison(cuda::workspace_bytes(shape));
    counters.fill(std::vector<std::byte>(cuda::few_bytes(shape)));
    const auto assignments = static_cast<std::size_t>(input.ids.elements());
    taken_ids.poison(assignments * 4);
    taken_weights.poison(assignments * 4);
    out.poison(input.hidden.bytes.size());
    plan = cuda::plan_at(shape, plan_memory.data());
    given = {ids.data(), input.ids.type == DataType::i64, weights.data()};
    taken = {reinterpret_cast<std::int32_t*>(taken_ids.data()),
             reinterpret_cast<float*>(taken_weights.data())};
  }

  DeviceBuffer hidden, ids, weights, plan_memory, workspace, counters, taken_ids, taken_weights,
      out;
  cuda::Plan plan;
  cuda::GivenRouting given;
  cuda::TakenRouting taken;
};

/// One layer on the GPU. The arena has three slots that hold no expert, full of NaN, and experts
/// lie in the others in reverse order; plan, scratch and result are NaN before each call.
class GpuLayer {
 public:
  GpuLayer(const MoeConfig& config, const std::vector<std::vector<std::byte>>& slabs,
           cuda::Kernel kernel = cuda::Kernel::tuned)
      : config_(config), layout_(config), kernel_(kernel), slots_(config.experts + 3) {
    std::vector<std::byte> arena(layout_.slab_bytes * static_cast<std::size_t>(slots_),
                                 std::byte{0xff});
    for (std::int32_t e = 0; e < config.experts; ++e)
      std::copy(slabs[static_cast<std::size_t>(e)].begin(),
                slabs[static_cast<std::size_t>(e)].end(),
                arena.begin() + static_cast<std::ptrdiff_t>(layout_.slab_bytes *
                                                            static_cast<std::size_t>(slot_of(e))));
    arena_.fill(arena);
  }

  /// Calls with the experts divided over `waves` calls of compute_experts().
  Tensor run(const Input& input, std::int32_t waves = 1) {
    const cuda::LayerShape shape = shape_of(config_, input.hidden.shape[0], kernel_);
    CallMemory call(shape, input);
    DeviceBuffer slots;
    cuda::make_plan(shape, call.given, call.taken, call.plan, nullptr);
    for (std::int32_t wave = 0; wave < waves; ++wave) {
      slots.fill(bytes_of(slots_of(wave, waves)));
      cuda::compute_experts(shape, call.plan, call.hidden.data(), slabs_in(slots),
                            call.workspace.data(), nullptr);
      synchronize();
    }
    cuda::combine(shape, call.plan, call.taken.weights, call.workspace.data(), call.out.data(),
                  nullptr);
    synchronize();
    copy_to_host(&invalid_, call.plan.invalid, sizeof(invalid_));
    return result_of(call, input);
  }

  /// The same as one call of compute_few(), `calls` times on the same memory.
  Tensor run_few(const Input& input, int calls = 1) {
    const cuda::LayerShape shape = shape_of(config_, input.hidden.shape[0], kernel_);
    CallMemory call(shape, input);
    DeviceBuffer slots;
    slots.fill(bytes_of(slots_of(0, 1)));
    for (int i = 0; i < calls; ++i) {
      call.out.poison(input.hidden.bytes.size());
      cuda::compute_few(shape, call.given, {}, call.hidden.data(), slabs_in(slots),
                        call.workspace.data(), call.counters.data(), call.out.data(), nullptr);
      synchronize();
    }
    return result_of(call, input);
  }

  /// Captures a call with `input` into a graph and replays it with the numbers of `other`.
  Tensor replay(const Input& input, const Input& other) {
    const cuda::LayerShape shape = shape_of(config_, input.hidden.shape[0], kernel_);
    CallMemory call(shape, input);
    DeviceBuffer slots;
    slots.fill(bytes_of(slots_of(0, 1)));
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replayed = nullptr;
    check_cuda(cudaStreamCreate(&stream));
    check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    if (cuda::is_few(shape)) {
      cuda::compute_few(shape, call.given, {}, call.hidden.data(), slabs_in(slots),
                        call.workspace.data(), call.counters.data(), call.out.data(), stream);
    } else {
      cuda::make_plan(shape, call.given, call.taken, call.plan, stream);
      cuda::compute_experts(shape, call.plan, call.hidden.data(), slabs_in(slots),
                            call.workspace.data(), stream);
      cuda::combine(shape, call.plan, call.taken.weights, call.workspace.data(), call.out.data(),
                    stream);
    }
    check_cuda(cudaStreamEndCapture(stream, &graph));
    check_cuda(cudaGraphInstantiate(&replayed, graph, 0));
    check_cuda(cudaGraphLaunch(replayed, stream));
    synchronize();
    copy_to_device(call.hidden.data(), other.hidden.bytes);
    copy_to_device(call.ids.data(), other.ids.bytes);
    copy_to_device(call.weights.data(), other.weights.bytes);
    check_cuda(cudaGraphLaunch(replayed, stream));
    synchronize();
    check_cuda(cudaGraphExecDestroy(replayed));
    check_cuda(cudaGraphDestroy(graph));
    check_cuda(cudaStreamDestroy(stream));
    return result_of(call, input);
  }

  /// Ids that were out of range in the last call.
  std::int32_t invalid() const { return invalid_; }

 private:
  std::int32_t slot_of(std::int32_t expert) const { return slots_ - 2 - expert; }

  std::vector<std::int32_t> slots_of(std::int32_t wave, std::int32_t waves) const {
    std::vector<std::int32_t> slots;
    for (std::int32_t e = 0; e < config_.experts; ++e)
      slots.push_back(e % waves == wave ? slot_of(e) : -1);
    return slots;
  }

  Tensor result_of(const CallMemory& call, const Input& input) const {
    Tensor result(input.hidden.shape, config_.dtype);
    copy_to_host(result.bytes.data(), call.out.data(), result.bytes.size());
    return result;
  }

  static std::vector<std::byte> bytes_of(const std::vector<std::int32_t>& values) {
    std::vector<std::byte> bytes(values.size() * sizeof(std::int32_t));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
  }

  cuda::ExpertSlabs slabs_in(const DeviceBuffer& slots) const {
    return {arena_.data(),
            layout_.slab_bytes,
            reinterpret_cast<const std::int32_t*>(slots.data()),
            layout_.up_offset,
            layout_.down_offset,
            layout_.up_bias_offset,
            layout_.down_bias_offset};
  }

  MoeConfig config_;
  SlabLayout layout_;
  cuda::Kernel kernel_;
  std::int32_t slots_;
  DeviceBuffer arena_;
  std::int32_t invalid_ = 0;
};

double error_of(const MoeConfig& config, const Input& input,
                cuda::Kernel kernel = cuda::Kernel::tuned) {
  const auto slabs = random_slabs(config, 7);
  const Tensor out = GpuLayer(config, slabs, kernel).run(input);
  const Matrix expected = reference_layer(config, slabs, input.hidden, input.ids, input.weights);
  return relative_error(matrix(out.bytes.data(), out.type, expected.rows(), expected.cols()),
                        expected);
}

}  // namespace

TEST_CASE("a plan is the CPU's grouping of tokens") {
  if (!gpu_found()) return;
  const auto experts = GENERATE(1, 5, 128, 512);
  const auto tokens = GENERATE(0, 1, 33, 700);
  const auto top_k = GENERATE(1, 8, 16);
  if (top_k > experts) return;
  CAPTURE(experts, tokens, top_k);
  const MoeConfig config = config_of(DataType::f32, experts, top_k, 8, 8);
  Input input = random_input(config, tokens, 3, tokens % 2 ? DataType::i32 : DataType::i64);
  for (std::int64_t a = 0; a < input.ids.elements(); a += 5) input.weights.set(a, 0);

  const TokenGroups expected = group_tokens(input.ids.view(), input.weights.view(), experts);
  const cuda::LayerShape shape = shape_of(config, tokens);
  const CallMemory call(shape, input);
  const cuda::Plan& plan = call.plan;
  cuda::make_plan(shape, call.given, call.taken, plan, nullptr);
  synchronize();

  const auto assignments = static_cast<std::size_t>(tokens) * static_cast<std::size_t>(top_k);
  std::int32_t active_count = -1, invalid = -1;
  std::vector<cuda::ActiveExpert> active(static_cast<std::size_t>(experts));
  std::vector<std::int32_t> order(assignments), row_of(assignments), group_rows(assignments);
  copy_to_host(&active_count, plan.active_count, 4);
  copy_to_host(&invalid, plan.invalid, 4);
  copy_to_host(active.data(), plan.active, active.size() * sizeof(cuda::ActiveExpert));
  copy_to_host(order.data(), plan.order, assignments * 4);
  copy_to_host(row_of.data(), plan.row_of, assignments * 4);
  copy_to_host(group_rows.data(), plan.group_rows, assignments * 4);

  CHECK(invalid == 0);
  REQUIRE(static_cast<std::size_t>(active_count) == expected.experts.size());
  for (std::size_t i = 0; i < expected.experts.size(); ++i) {
    CHECK(active[i].expert == expected.experts[i]);
    CHECK(active[i].row_begin == expected.offsets[i]);
    CHECK(active[i].rows == expected.offsets[i + 1] - expected.offsets[i]);
  }
  CHECK(std::equal(expected.row_of.begin(), expected.row_of.end(), row_of.begin()));
  CHECK(std::equal(expected.order.begin(), expected.order.end(), order.begin()));
}

TEST_CASE("a layer is within its dtype's limit of the definition in f64") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const auto tokens = GENERATE(1, 7, 40, 300);
  struct Case {
    std::int32_t experts, top_k, hidden, intermediate;
    bool gated;
    Activation activation;
    bool biases;
  };
  const auto c = GENERATE(Case{8, 1, 96, 3072, false, Activation::relu, false},
                          Case{16, 4, 128, 40, true, Activation::silu, false},
                          Case{4, 2, 72, 200, true, Activation::gelu_tanh, true},
                          Case{4, 2, 64, 136, false, Activation::gelu, true},
                          Case{4, 2, 64, 136, false, Activation::relu2, false},
                          Case{5, 3, 37, 21, true, Activation::silu, true},
                          Case{3, 2, 40, 33, false, Activation::relu, true});
  const MoeConfig config = config_of(dtype, c.experts, c.top_k, c.hidden, c.intermediate, c.gated,
                                     c.activation, c.biases);
  CAPTURE(name_of(dtype), tokens, c.experts, c.top_k, c.hidden, c.intermediate, c.gated, c.biases,
          name_of(c.activation));
  CHECK(error_of(config, random_input(config, tokens, 11)) < tolerance(dtype));
}

TEST_CASE("every kernel is within its dtype's limit of the definition in f64") {
  if (!gpu_found()) return;
  const auto kernel = GENERATE(cuda::Kernel::narrow, cuda::Kernel::wide, cuda::Kernel::grouped,
                               cuda::Kernel::swapped, cuda::Kernel::hopper, cuda::Kernel::dot,
                               cuda::Kernel::tiled, cuda::Kernel::general);
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const bool full = kernel == cuda::Kernel::dot || kernel == cuda::Kernel::tiled;
  if (kernel != cuda::Kernel::general && full != (dtype == DataType::f32)) return;
  const auto tokens = GENERATE(1, 5, 65, 300, 700);
  struct Case {
    std::int32_t experts, top_k, hidden, intermediate;
    bool gated;
    Activation activation;
    bool biases;
  };
  const auto c = GENERATE(Case{3, 1, 320, 200, false, Activation::relu, true},
                          Case{4, 2, 72, 264, true, Activation::gelu_tanh, true},
                          Case{2, 1, 328, 136, true, Activation::silu, false},
                          Case{5, 3, 64, 64, false, Activation::gelu, true},
                          Case{5, 3, 64, 64, false, Activation::relu2, true});
  const MoeConfig config = config_of(dtype, c.experts, c.top_k, c.hidden, c.intermediate, c.gated,
                                     c.activation, c.biases);
  CAPTURE(static_cast<int>(kernel), name_of(dtype), tokens, c.experts, c.hidden, c.intermediate);
  CHECK(error_of(config, random_input(config, tokens, 17), kernel) < tolerance(dtype));
}

TEST_CASE("products of more tiles than blocks are right, each time that a plan is computed") {
  if (!gpu_found()) return;
  const auto kernel = GENERATE(cuda::Kernel::grouped, cuda::Kernel::swapped, cuda::Kernel::hopper);
  const MoeConfig config = config_of(DataType::bf16, 40, 2, 264, 120, true, Activation::silu, true);
  const Input input = random_input(config, 6000, 51);
  const auto slabs = random_slabs(config, 8);
  GpuLayer layer(config, slabs, kernel);
  const Tensor out = layer.run(input);
  const Matrix expected = reference_layer(config, slabs, input.hidden, input.ids, input.weights);
  CAPTURE(static_cast<int>(kernel));
  CHECK(relative_error(matrix(out.bytes.data(), out.type, expected.rows(), expected.cols()),
                       expected) < tolerance(DataType::bf16));
  CHECK(layer.run(input).bytes == out.bytes);
  CHECK(layer.run(input, 2).bytes == out.bytes);
}

TEST_CASE("activations that are clamped are their definitions, past the limit too") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const auto kernel = GENERATE(cuda::Kernel::narrow, cuda::Kernel::grouped, cuda::Kernel::swapped,
                               cuda::Kernel::hopper, cuda::Kernel::tiled, cuda::Kernel::general);
  const auto activation = GENERATE(Activation::silu_clamped, Activation::swiglu_clamped);
  const bool swiglu = activation == Activation::swiglu_clamped;
  MoeConfig config = config_of(dtype, 1, 1, 64, 72, true, activation, true);
  config.limit = 5.5f;
  Input input = random_input(config, 90, 41);
  for (std::int64_t i = 0; i < input.hidden.elements(); ++i)
    input.hidden.set(i, 16 * input.hidden.at(i));
  const auto slabs = random_slabs(config, 6);
  const SlabLayout layout(config);
  const auto part = [&](std::size_t offset, Eigen::Index rows, Eigen::Index columns) {
    return matrix(slabs[0].data() + offset, dtype, rows, columns);
  };
  Matrix expected(90, 64);
  int limited = 0;
  for (Eigen::Index t = 0; t < 90; ++t) {
    const Vector x = matrix(input.hidden.bytes.data(), dtype, 90, 64).row(t);
    const Vector up =
        part(layout.up_offset, 144, 64) * x + Vector(part(layout.up_bias_offset, 144, 1));
    Vector h(72);
    for (Eigen::Index i = 0; i < 72; ++i) {
      const double gate = std::min(up[i], 5.5), beside = std::clamp(up[72 + i], -5.5, 5.5);
      limited += gate != up[i] && beside != up[72 + i];
      h[i] = (beside + (swiglu ? 1 : 0)) * gate / (1 + std::exp((swiglu ? -1.702 : -1) * gate));
    }
    expected.row(t) = input.weights.at(t) * (part(layout.down_offset, 64, 72) * h +
                                             Vector(part(layout.down_bias_offset, 64, 1)))
                                                .transpose();
  }
  REQUIRE(limited > 0);
  GpuLayer layer(config, slabs, kernel);
  const Tensor out = layer.run(input);
  CAPTURE(name_of(dtype), static_cast<int>(kernel), name_of(activation));
  CHECK(relative_error(matrix(out.bytes.data(), dtype, 90, 64), expected) < tolerance(dtype));
}

TEST_CASE("all tokens may go to one expert, and a token to one expert twice") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const auto tokens = GENERATE(1, 6, 100);
  const MoeConfig config = config_of(dtype, 64, 2, 64, 1536, true, Activation::silu);
  Input input = random_input(config, tokens, 5);
  for (std::int64_t a = 0; a < input.ids.elements(); ++a) input.ids.set(a, 63);
  CAPTURE(name_of(dtype), tokens);
  CHECK(error_of(config, input) < tolerance(dtype));
}

TEST_CASE("no tokens are no work") {
  if (!gpu_found()) return;
  const MoeConfig config = config_of(DataType::bf16, 4, 2, 64, 64);
  CHECK(GpuLayer(config, random_slabs(config, 1)).run(random_input(config, 0, 1)).bytes.empty());
}

TEST_CASE("ids out of range are counted and left out, the sentinel and weight 0 left out",
          "[racecheck]") {
  if (!gpu_found()) return;
  const auto type = GENERATE(DataType::i32, DataType::i64);
  const MoeConfig config = config_of(DataType::bf16, 8, 2, 64, 128);
  Input input = random_input(config, 20, 9, type);
  Input kept = input;
  const auto leave_out = [&](std::int64_t a, double id, bool weightless = false) {
    input.ids.set(a, id);
    if (weightless) input.weights.set(a, 0);
    kept.weights.set(a, 0);
  };
  leave_out(0, 8);
  leave_out(1, 8);
  leave_out(5, -1);
  leave_out(8, 9);
  leave_out(9, std::numeric_limits<std::int32_t>::max());
  leave_out(10, 3, true);
  leave_out(12, -5, true);
  if (type == DataType::i64) leave_out(13, 4294967296.0);
  const auto slabs = random_slabs(config, 2);
  GpuLayer layer(config, slabs);
  const Tensor out = layer.run(input);
  CHECK(layer.invalid() == (type == DataType::i64 ? 4 : 3));
  CHECK(out.bytes == layer.run(kept).bytes);
  CHECK(layer.invalid() == 0);
  const Matrix expected = reference_layer(config, slabs, kept.hidden, kept.ids, kept.weights);
  CHECK(relative_error(matrix(out.bytes.data(), out.type, 20, 64), expected) < 5e-3);
}

TEST_CASE("bits depend neither on the run nor on how experts are divided over calls") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f32, DataType::f16, DataType::bf16);
  const auto tokens = GENERATE(1, 8, 50, 200);
  const MoeConfig config = config_of(dtype, 16, 4, 128, 1600, true, Activation::silu);
  const Input input = random_input(config, tokens, 21);
  GpuLayer layer(config, random_slabs(config, 3));
  const Tensor once = layer.run(input);
  CAPTURE(name_of(dtype), tokens);
  CHECK(layer.run(input).bytes == once.bytes);
  CHECK(layer.run(input, 2).bytes == once.bytes);
  CHECK(layer.run(input, 16).bytes == once.bytes);
}

TEST_CASE("a call of few assignments gives the bits of its parts, call after call", "[racecheck]") {
  if (!gpu_found()) return;
  const auto dtype = GENERATE(DataType::f16, DataType::bf16);
  const auto top_k = GENERATE(1, 4, 8);
  const auto tokens = GENERATE(1, 2, 4);
  const auto biases = GENERATE(false, true);
  // The down product of the first is split, of the others not; not all rows are multiples of 16.
  const auto [hidden, intermediate] = GENERATE(std::pair(256, 3072), std::pair(72, 40));
  const MoeConfig config =
      config_of(dtype, 12, top_k, hidden, intermediate, biases, Activation::silu, biases);
  Input input = random_input(config, tokens, 51, tokens == 2 ? DataType::i32 : DataType::i64);
  GpuLayer layer(config, random_slabs(config, 5), cuda::Kernel::narrow);
  CAPTURE(name_of(dtype), top_k, tokens, biases, hidden);
  REQUIRE(cuda::is_few(shape_of(config, tokens)));
  CHECK(layer.run_few(input, 3).bytes == layer.run(input).bytes);
  // Of what is left out nothing is computed: a sentinel, an id out of range, a weight of 0.
  const auto last = input.ids.elements() - 1;
  input.ids.set(0, 12);
  CHECK(layer.run_few(input).bytes == layer.run(input).bytes);
  input.ids.set(last, -7);
  CHECK(layer.run_few(input).bytes == layer.run(input).bytes);
  input.weights.set(last / 2, 0);
  CHECK(layer.run_few(input).bytes == layer.run(input).bytes);
}

TEST_CASE("a call is one of few up to a warp of assignments, on weights that are streamed") {
  if (!gpu_found()) return;
  const auto is_few = [](DataType dtype, std::int64_t tokens, std::int32_t hidden = 64) {
    return cuda::is_few(shape_of(config_of(dtype, 64, 4, hidden, 64), tokens));
  };
  CHECK(is_few(DataType::bf16, 1));
  CHECK(is_few(DataType::f16, 8));
  CHECK_FALSE(is_few(DataType::bf16, 0));
  CHECK_FALSE(is_few(DataType::bf16, 9));
  CHECK_FALSE(is_few(DataType::f32, 1));
  CHECK_FALSE(is_few(DataType::bf16, 1, 63));
}

TEST_CASE("a graph replayed with new ids gives what a call with them gives") {
  if (!gpu_found()) return;
  const auto tokens = GENERATE(1, 6, 130, 400);
  const MoeConfig config = config_of(DataType::bf16, 12, 8, 64, 256, true, Activation::silu);
  const Input first = random_input(config, tokens, 31), second = random_input(config, tokens, 32);
  GpuLayer layer(config, random_slabs(config, 4));
  CAPTURE(tokens);
  CHECK(layer.replay(first, second).bytes == layer.run(second).bytes);
}

TEST_CASE("sizes that the kernels do not take are refused") {
  MoeConfig config = config_of(DataType::bf16, 600, 1, 8, 8);
  CHECK_THROWS_WITH(cuda::make_plan(shape_of(config, 1), {}, {}, {}, nullptr),
                    Catch::Matchers::ContainsSubstring("expected 1 to 512 experts, got 600"));
  config.experts = 32;
  config.top_k = 17;
  CHECK_THROWS_WITH(cuda::make_plan(shape_of(config, 1), {}, {}, {}, nullptr),
                    Catch::Matchers::ContainsSubstring("expected top_k from 1 to 16, got 17"));
}
