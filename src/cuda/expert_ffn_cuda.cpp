// SPDX-License-Identifier: Apache-2.0
#include "sida/ffn/expert_ffn_cuda.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "expert_kernels.hpp"
#include "sida/backend/buffer.hpp"

namespace sida {
namespace {

cuda::Dtype kernel_type(DataType type) {
  switch (type) {
    case DataType::f32:
      return cuda::Dtype::f32;
    case DataType::f16:
      return cuda::Dtype::f16;
    case DataType::bf16:
      return cuda::Dtype::bf16;
    default:
      throw InvalidArgument("dtype: expected f32, f16 or bf16 on cuda, got " +
                            std::string(name_of(type)) + "; use device='cpu'");
  }
}

cuda::Act kernel_activation(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return cuda::Act::relu;
    case Activation::gelu:
      return cuda::Act::gelu;
    case Activation::gelu_tanh:
      return cuda::Act::gelu_tanh;
    case Activation::silu:
      return cuda::Act::silu;
  }
  throw InvalidArgument("activation: expected one of relu, gelu, gelu_tanh, silu");
}

cuda::LayerShape shape_of(const MoeConfig& config) {
  validate(config);
  SIDA_EXPECTS(config.experts <= cuda::max_experts && config.top_k <= cuda::max_top_k,
               "cuda: expected at most " + std::to_string(cuda::max_experts) +
                   " experts and top_k of at most " + std::to_string(cuda::max_top_k) + ", got " +
                   std::to_string(config.experts) + " and " + std::to_string(config.top_k));
  cuda::LayerShape shape;
  shape.dtype = kernel_type(config.dtype);
  shape.top_k = config.top_k;
  shape.experts = config.experts;
  shape.hidden = static_cast<int>(config.hidden_size);
  shape.intermediate = static_cast<int>(config.intermediate_size);
  shape.activation = kernel_activation(config.activation);
  shape.gated = config.gated;
  shape.up_bias = config.up_bias;
  shape.down_bias = config.down_bias;
  return shape;
}

// Runs what launches kernels; their errors come as CudaError.
template <class F>
void launched(F&& f) {
  try {
    f();
  } catch (const std::invalid_argument& error) {
    throw InvalidArgument(error.what());
  } catch (const std::runtime_error& error) {
    throw CudaError(error.what());
  }
}

}  // namespace

/// One layer call at a time, and the buffers that calls share.
class ExpertFfn<CudaBackend>::Call {
 public:
  Call(CudaBackend& backend, const MoeConfig& config)
      : backend_(backend),
        config_(config),
        layout_(config),
        shape_(shape_of(config)),
        stream_(backend.make_stream()),
        done_(backend.make_event()) {
    const std::size_t bytes = static_cast<std::size_t>(config.experts) * sizeof(std::int32_t);
    slots_host_ = PinnedBuffer(backend, bytes);
    slots_ = Buffer<CudaBackend>(backend, bytes);
  }
  ~Call() {
    try {
      finish();
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  void set_stream(CUstream_st* stream) {
    if (stream_.native() == stream) return;
    finish();  // buffers are handed from one stream to the other
    stream_ = CudaBackend::Stream::borrow(stream);
  }
  CUstream_st* stream() const noexcept { return stream_.native(); }
  const MoeConfig& config() const noexcept { return config_; }
  std::size_t workspace_bytes() const noexcept {
    return plan_.size() + weights_.size() + workspace_.size() + slots_.size();
  }

  void begin(const ConstTensorView& hidden, const TokenGroups& groups) {
    check_tokens(hidden.shape, hidden.type, groups.tokens, "hidden states", hidden.describe());
    SIDA_EXPECTS(groups.top_k <= cuda::max_top_k,
                 "cuda: expected at most " + std::to_string(cuda::max_top_k) +
                     " choices a token, got " + std::to_string(groups.top_k));
    SIDA_EXPECTS(groups.tokens * groups.top_k <= max_assignments,
                 "cuda: expected at most " + std::to_string(max_assignments) +
                     " rows in a call, got " + std::to_string(groups.tokens * groups.top_k) +
                     "; split the batch");
    in_call_ = false;
    finish();  // the host's buffers of the call before are free again
    shape_.tokens = static_cast<int>(groups.tokens);
    shape_.top_k = groups.top_k;
    hidden_ = hidden.data;
    experts_ = groups.experts;
    offsets_ = groups.offsets;
    rows_left_ = groups.rows();
    reserve(workspace_, cuda::workspace_bytes(shape_));
    upload_plan(groups);
    in_call_ = true;
  }

  void compute(std::span<const ExpertTask> tasks) {
    expect_call("compute");
    if (tasks.empty()) return;
    auto* const slot_of = reinterpret_cast<std::int32_t*>(slots_host_.data());
    std::fill_n(slot_of, config_.experts, -1);
    const std::byte* arena = slab_of(tasks.front());
    for (const ExpertTask& task : tasks) arena = std::min(arena, slab_of(task));
    std::int64_t rows = 0;
    for (const ExpertTask& task : tasks) {
      const auto distance = static_cast<std::size_t>(slab_of(task) - arena);
      SIDA_EXPECTS(distance % layout_.slab_bytes == 0,
                   "compute: expected slabs multiples of " + std::to_string(layout_.slab_bytes) +
                       " bytes apart, got " + std::to_string(distance));
      slot_of[expert_of(task)] = static_cast<std::int32_t>(distance / layout_.slab_bytes);
      rows += task.row_end - task.row_begin;
    }
    SIDA_EXPECTS(rows <= rows_left_, "compute: expected each row once, got " +
                                         std::to_string(rows - rows_left_) + " again");
    backend_.copy_async(slots_.data(), slot_of, slots_.size(), stream_);
    launched([&] {
      cuda::compute_experts(shape_, cuda::plan_at(shape_, plan_.data()), hidden_, slabs(arena),
                            workspace_.data(), stream_.native());
    });
    backend_.record(done_, stream_);
    backend_.synchronize(done_);
    rows_left_ -= rows;
  }

  void combine(const ConstTensorView& weights, const TensorView& out) {
    expect_call("combine");
    if (rows_left_ != 0)
      throw StateError("combine: expected all rows of the call to be computed; missing are " +
                       std::to_string(rows_left_));
    SIDA_EXPECTS(weights.shape.size() == 2 && weights.shape[0] == shape_.tokens &&
                     weights.shape[1] == shape_.top_k && weights.type <= DataType::f64,
                 "expert weights: expected [" + std::to_string(shape_.tokens) + ", " +
                     std::to_string(shape_.top_k) + "] in a floating-point dtype, got " +
                     weights.describe());
    check_tokens(out.shape, out.type, shape_.tokens, "out", out.describe());
    in_call_ = false;
    if (shape_.tokens == 0) return;
    const auto count = static_cast<std::size_t>(weights.elements());
    reserve(weights_host_, count * sizeof(float));
    reserve(weights_, count * sizeof(float));
    auto* const values = reinterpret_cast<float*>(weights_host_.data());
    for (std::size_t i = 0; i < count; ++i)
      values[i] = static_cast<float>(detail::load_real(weights, static_cast<std::int64_t>(i)));
    backend_.copy_async(weights_.data(), values, count * sizeof(float), stream_);
    launched([&] {
      cuda::combine(shape_, cuda::plan_at(shape_, plan_.data()),
                    reinterpret_cast<const float*>(weights_.data()), workspace_.data(), out.data,
                    stream_.native());
    });
    backend_.record(done_, stream_);
  }

 private:
  static constexpr std::int64_t max_assignments = std::int64_t{1} << 24;

  // Waits for the work so far; nothing on the GPU then uses the buffers.
  void finish() { backend_.synchronize(done_); }

  template <class Memory>
  void reserve(Memory& memory, std::size_t bytes) {
    if (memory.size() >= bytes) return;
    memory = {};
    memory = Memory(backend_, bytes);
  }

  // The plan as make_plan() would make it, from groups that the host has already.
  void upload_plan(const TokenGroups& groups) {
    const std::size_t bytes = cuda::plan_bytes(shape_);
    reserve(plan_host_, bytes);
    reserve(plan_, bytes);
    std::memset(plan_host_.data(), 0, bytes);
    const cuda::Plan plan = cuda::plan_at(shape_, plan_host_.data());
    const auto narrow = [](std::int64_t value) { return static_cast<std::int32_t>(value); };
    *plan.active_count = narrow(std::ssize(groups.experts));
    for (std::size_t i = 0; i < groups.experts.size(); ++i) {
      const std::int32_t rows = narrow(groups.offsets[i + 1] - groups.offsets[i]);
      plan.active[i] = {groups.experts[i], narrow(groups.offsets[i]), rows, 0};
      plan.counts[groups.experts[i]] = rows;
    }
    for (std::int32_t e = 0; e < config_.experts; ++e)
      plan.offsets[e + 1] = plan.offsets[e] + plan.counts[e];
    std::transform(groups.order.begin(), groups.order.end(), plan.order, narrow);
    for (std::size_t a = 0; a < groups.row_of.size(); ++a) plan.row_of[a] = -1;
    for (std::size_t i = 0; i < groups.experts.size(); ++i) {
      for (std::int64_t row = groups.offsets[i]; row < groups.offsets[i + 1]; ++row) {
        const std::int64_t assignment = groups.order[static_cast<std::size_t>(row)];
        plan.row_of[assignment] = narrow(row);
        plan.group_rows[assignment] = plan.counts[groups.experts[i]];
      }
    }
    backend_.copy_async(plan_.data(), plan_host_.data(), bytes, stream_);
    backend_.record(done_, stream_);
  }

  cuda::ExpertSlabs slabs(const std::byte* arena) const {
    return {arena,
            layout_.slab_bytes,
            reinterpret_cast<const std::int32_t*>(slots_.data()),
            layout_.up_offset,
            layout_.down_offset,
            layout_.up_bias_offset,
            layout_.down_bias_offset};
  }

  const std::byte* slab_of(const ExpertTask& task) const {
    const ExpertWeights& weights = task.weights;
    SIDA_EXPECTS(weights.up && weights.down, "compute: expected up and down weights, got null");
    const std::byte* const slab = weights.up - layout_.up_offset;
    const ExpertWeights expected = weights_in(layout_, slab);
    SIDA_EXPECTS(weights.down == expected.down && weights.up_bias == expected.up_bias &&
                     weights.down_bias == expected.down_bias,
                 "compute: expected an expert's parts in one slab, in the order of SlabLayout");
    return slab;
  }

  std::int32_t expert_of(const ExpertTask& task) const {
    const auto found = std::lower_bound(offsets_.begin(), offsets_.end(), task.row_begin);
    const auto group = static_cast<std::size_t>(found - offsets_.begin());
    SIDA_EXPECTS(group < experts_.size() && offsets_[group] == task.row_begin &&
                     offsets_[group + 1] == task.row_end,
                 "compute: expected all rows of one expert, got [" +
                     std::to_string(task.row_begin) + ", " + std::to_string(task.row_end) + ")");
    return experts_[group];
  }

  void expect_call(const char* method) const {
    if (!in_call_) throw StateError(std::string(method) + ": expected a call of begin() before it");
  }

  void check_tokens(const std::vector<std::int64_t>& shape, DataType type, std::int64_t tokens,
                    const char* name, const std::string& got) const {
    SIDA_EXPECTS(shape.size() == 2 && shape[0] == tokens && shape[1] == config_.hidden_size &&
                     type == config_.dtype,
                 std::string(name) + ": expected [" + std::to_string(tokens) + ", " +
                     std::to_string(config_.hidden_size) + "] " +
                     std::string(name_of(config_.dtype)) + ", got " + got);
  }

  CudaBackend& backend_;
  MoeConfig config_;
  SlabLayout layout_;
  cuda::LayerShape shape_;
  CudaBackend::Stream stream_;
  CudaBackend::Event done_;
  PinnedBuffer plan_host_, weights_host_, slots_host_;
  Buffer<CudaBackend> plan_, weights_, workspace_, slots_;
  const std::byte* hidden_ = nullptr;
  std::vector<std::int32_t> experts_;
  std::vector<std::int64_t> offsets_;
  std::int64_t rows_left_ = 0;
  bool in_call_ = false;
};

ExpertFfn<CudaBackend>::ExpertFfn(CudaBackend& backend, const MoeConfig& config)
    : call_(std::make_unique<Call>(backend, config)) {}
ExpertFfn<CudaBackend>::~ExpertFfn() = default;

void ExpertFfn<CudaBackend>::set_stream(CUstream_st* stream) { call_->set_stream(stream); }
CUstream_st* ExpertFfn<CudaBackend>::stream() const noexcept { return call_->stream(); }
void ExpertFfn<CudaBackend>::begin(const ConstTensorView& hidden, const TokenGroups& groups) {
  call_->begin(hidden, groups);
}
void ExpertFfn<CudaBackend>::compute(std::span<const ExpertTask> tasks) { call_->compute(tasks); }
void ExpertFfn<CudaBackend>::combine(const ConstTensorView& weights, const TensorView& out) {
  call_->combine(weights, out);
}
const MoeConfig& ExpertFfn<CudaBackend>::config() const noexcept { return call_->config(); }
std::size_t ExpertFfn<CudaBackend>::workspace_bytes() const noexcept {
  return call_->workspace_bytes();
}

}  // namespace sida
