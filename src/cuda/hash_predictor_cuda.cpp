// SPDX-License-Identifier: Apache-2.0
#include "sida/hash/hash_predictor_cuda.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device_scope.hpp"
#include "launched.hpp"
#include "predictor_batch.hpp"
#include "predictor_kernels.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/hash/predictor_contract.hpp"
#include "sida/hash/predictor_tensors.hpp"

namespace sida {
namespace {

using cuda::LinearResult;
using cuda::PredictorLinear;

constexpr std::int64_t chunk_tokens = 4096;
constexpr std::int64_t chunk_states = 16384;

/// Arguments of predict() and advance(); without states there are no data in `past` and `states`.
struct Call {
  const ConstTensorView& embeddings;
  std::span<const std::uint8_t> mask;
  ConstTensorView past;
  TensorView states;
  std::int64_t earlier = 0;  ///< tokens of a sentence
};

std::size_t count_of(std::int64_t count) { return static_cast<std::size_t>(count); }

}  // namespace

class HashPredictor<CudaBackend>::Parts {
 public:
  Parts(const CudaBackend& backend, PredictorWeights given)
      : backend_(backend),
        weights_(detail::checked(std::move(given))),
        tensors_(weights_),
        stream_(backend_.make_stream()) {
    const cuda::DeviceScope scope(backend_.device());
    const bool is_transformer = weights_.kind == "transformer";
    if (!is_lstm() && !is_transformer && weights_.kind != "token") detail::refuse_kind(weights_);
    read_tensors();
    if (is_transformer) detail::expect_transformer_size(weights_);
    tensors_.expect_all_read();
    if (is_lstm()) cuda::launched([&] { lstm_ = cuda::plan_lstm(weights_.hidden_size); });
    upload();
  }
  Parts(const Parts&) = delete;
  Parts& operator=(const Parts&) = delete;
  ~Parts() { drain(); }

  const PredictorWeights& weights() const noexcept { return weights_; }
  std::size_t workspace_bytes() {
    const std::lock_guard lock(mutex_);
    return parameters_.size() + memory_.size();
  }

  void fill(const Call& call, CUstream_st* stream, HashTable& table) {
    const std::lock_guard lock(mutex_);
    const cuda::DeviceScope scope(backend_.device());
    CudaBackend::Stream callers = CudaBackend::Stream::borrow(stream);
    if (is_here(call.embeddings.data) || is_here(call.past.data) || is_here(call.states.data))
      backend_.wait(stream_, backend_.fence(callers));
    const std::int64_t sentences = call.embeddings.shape[0], length = call.embeddings.shape[1];
    const std::int64_t tokens = std::max<std::int64_t>(length, 1);
    const std::int64_t at_once = std::max<std::int64_t>(
        std::min(chunk_tokens / tokens, chunk_states / (tokens + call.earlier)), 1);
    try {
      for (std::int64_t first = 0; first < sentences && length > 0; first += at_once)
        fill_some(call, first, std::min(at_once, sentences - first), table);
    } catch (...) {
      drain();  // the caller's arrays are no longer read
      throw;
    }
  }

 private:
  /// What a block of kind "transformer" has.
  struct Block {
    const float* attention_norm;
    PredictorLinear qkv, output;
    const float* feed_forward_norm;
    PredictorLinear up, down;
  };
  /// What an LSTM layer has.
  struct Layer {
    PredictorLinear input;
    const float* recurrent;
  };

  /// Where things lie in the memory for one chunk.
  struct Places {
    std::size_t plan, sentences, tiles;  // what the host says of the batch
    std::size_t embeddings, past, states;
    std::size_t compressed, wide, first, second, first_cell, second_cell, hidden;
    std::size_t seen, earlier, last, counters, scratch, choices;
  };

  bool is_lstm() const { return weights_.kind == "lstm" || weights_.kind == "causal_lstm"; }

  // Pointers are of the host's copy until upload() turns them into the GPU's.
  void read_tensors() {
    const std::int64_t hidden = weights_.hidden_size;
    const std::int64_t outputs = std::int64_t{weights_.experts} * std::ssize(weights_.heads);
    linear(routing_, "routing", outputs, hidden);
    linear(scale_, "scale", outputs, hidden);
    linear(compress_, "compress", hidden, weights_.embedding_size);
    if (is_lstm()) {
      for (std::size_t i = 0; i < layers_.size(); ++i) {
        const std::string suffix = "_l" + std::to_string(i);
        Layer& layer = layers_[i];
        layer.input.out = static_cast<int>(4 * hidden);
        layer.input.in = static_cast<int>(hidden);
        matrix(layer.input.weight, "lstm.weight_ih" + suffix, 4 * hidden, hidden);
        row(layer.input.bias, "lstm.bias_ih" + suffix, 4 * hidden);
        row(layer.input.second_bias, "lstm.bias_hh" + suffix, 4 * hidden);
        matrix(layer.recurrent, "lstm.weight_hh" + suffix, 4 * hidden, hidden);
      }
      linear(residual_, "residual", hidden, hidden);
    }
    if (weights_.kind == "transformer") {
      for (std::size_t i = 0; i < blocks_.size(); ++i) {
        const std::string name = "blocks." + std::to_string(i);
        Block& block = blocks_[i];
        row(block.attention_norm, name + ".attention_norm.weight", hidden);
        product(block.qkv, name + ".qkv", 3 * hidden, hidden);
        product(block.output, name + ".output", hidden, hidden);
        row(block.feed_forward_norm, name + ".feed_forward_norm.weight", hidden);
        linear(block.up, name + ".up", 2 * hidden, hidden);
        linear(block.down, name + ".down", hidden, 2 * hidden);
      }
      row(norm_, "norm.weight", hidden);
    }
  }

  void matrix(const float*& at, const std::string& name, std::int64_t rows, std::int64_t columns) {
    uploads_.push_back({&at, tensors_.matrix(name, rows, columns), count_of(rows * columns)});
  }
  void row(const float*& at, const std::string& name, std::int64_t size) {
    uploads_.push_back({&at, tensors_.row(name, size), count_of(size)});
  }
  void product(PredictorLinear& linear, const std::string& name, std::int64_t out,
               std::int64_t in) {
    matrix(linear.weight, name + ".weight", out, in);
    linear.out = static_cast<int>(out);
    linear.in = static_cast<int>(in);
  }
  void linear(PredictorLinear& linear, const std::string& name, std::int64_t out, std::int64_t in) {
    product(linear, name, out, in);
    row(linear.bias, name + ".bias", out);
  }

  void upload() {
    cuda::Layout layout;
    std::vector<std::size_t> places;
    for (const Upload& tensor : uploads_) places.push_back(layout.place<float>(tensor.count));
    parameters_ = Buffer<CudaBackend>(backend_, layout.bytes());
    for (std::size_t i = 0; i < uploads_.size(); ++i) {
      auto* const to = reinterpret_cast<float*>(parameters_.data() + places[i]);
      backend_.copy_async(to, uploads_[i].values, uploads_[i].count * sizeof(float), stream_);
      *uploads_[i].at = to;
    }
    backend_.synchronize(backend_.fence(stream_));
    uploads_.clear();
  }

  // Whether memory is this GPU's own, not the host's. @throws InvalidArgument for another GPU's.
  bool is_here(const void* data) const {
    if (!data) return false;
    cudaPointerAttributes found{};
    cuda::expect(cudaPointerGetAttributes(&found, data), "tell where an array lies");
    if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged) return false;
    SIDA_EXPECTS(
        found.device == backend_.device(),
        "predictor: expected arrays in RAM or on cuda:" + std::to_string(backend_.device()) +
            ", got one on cuda:" + std::to_string(found.device));
    return true;
  }

  void drain() noexcept {
    try {
      backend_.synchronize(backend_.fence(stream_));
    } catch (const CudaError&) {  // nothing more to wait for
    }
  }

  template <class T>
  T* at(std::size_t place) const {
    return reinterpret_cast<T*>(memory_.data() + place);
  }

  void fill_some(const Call& call, std::int64_t first, std::int64_t count, HashTable& table) {
    const std::int64_t length = call.embeddings.shape[1];
    const std::int64_t width = detail::state_size(weights_);
    const auto mask = call.mask.empty()
                          ? call.mask
                          : call.mask.subspan(count_of(first * length), count_of(count * length));
    const int key_rows = call.earlier > 0 ? static_cast<int>(call.earlier + length) : 0;
    const cuda::PredictorBatch batch =
        cuda::make_batch(static_cast<int>(count), static_cast<int>(length), mask, key_rows,
                         weights_.kind == "causal_lstm");
    const std::size_t state_bytes = count_of(count * length * width) * sizeof(float);
    std::byte* const states =
        state_bytes > 0 && call.states.data
            ? call.states.data + count_of(first) * state_bytes / count_of(count)
            : nullptr;
    const bool copies_states = states && !is_here(states);
    const Places places = reserve(call, batch, count, table.candidates, copies_states);
    float* const written =
        copies_states ? at<float>(places.states) : reinterpret_cast<float*>(states);
    if (states)
      cuda::expect(cudaMemsetAsync(written, 0, state_bytes, stream_.native()), "clear states");
    if (batch.rows() > 0) {
      send(batch, places);
      const std::int64_t size = weights_.embedding_size;
      const float* const embeddings = here(call.embeddings.data, first * length * size,
                                           count * length * size, places.embeddings);
      const float* const past = call.earlier > 0
                                    ? here(call.past.data, first * call.earlier * width,
                                           count * call.earlier * width, places.past)
                                    : nullptr;
      cuda::launched(
          [&] { run(batch, places, embeddings, past, call.earlier, length, written, table); });
    }
    if (copies_states) backend_.copy_async(states, written, state_bytes, stream_);
    backend_.synchronize(backend_.fence(stream_));
    take_choices(batch, first * length, table);
  }

  // Elements [begin, begin + count) of an array on the GPU: where they lie, or a copy.
  const float* here(const std::byte* data, std::int64_t begin, std::int64_t count,
                    std::size_t place) {
    const float* const from = reinterpret_cast<const float*>(data) + begin;
    if (is_here(data)) return from;
    backend_.copy_async(at<float>(place), from, count_of(count) * sizeof(float), stream_);
    return at<float>(place);
  }

  Places reserve(const Call& call, const cuda::PredictorBatch& batch, std::int64_t count,
                 std::int32_t candidates, bool copies_states) {
    const std::size_t rows = count_of(batch.rows()), hidden = count_of(weights_.hidden_size);
    const std::size_t sentences = count_of(count), length = count_of(call.embeddings.shape[1]);
    const std::size_t earlier = count_of(call.earlier);
    const std::size_t width = count_of(detail::state_size(weights_));
    const std::size_t outputs = weights_.heads.size() * count_of(weights_.experts);
    const bool is_transformer = weights_.kind == "transformer";
    const bool keeps_cells = call.states.data != nullptr && is_lstm();
    const auto unless = [](bool spare, std::size_t size) { return spare ? 0 : size; };
    cuda::Layout layout;
    Places places{};
    places.plan = layout.place<std::int32_t>(2 * rows);
    places.sentences = layout.place<cuda::SentenceRows>(sentences);
    places.tiles = layout.place<cuda::AttentionTile>(batch.tiles.size());
    const std::size_t plan_bytes = layout.bytes();
    places.choices = layout.place<float>(choice_count(batch, candidates) * 3);
    places.embeddings = layout.place<float>(unless(
        is_here(call.embeddings.data), sentences * length * count_of(weights_.embedding_size)));
    places.past = layout.place<float>(unless(is_here(call.past.data), sentences * earlier * width));
    places.states = layout.place<float>(unless(!copies_states, sentences * length * width));
    places.compressed = layout.place<float>(rows * hidden);
    // Gates of an LSTM, queries, keys and values or a feed-forward layer, and logits in the end.
    places.wide =
        layout.place<float>(rows * std::max(is_lstm() ? 4 * hidden : 3 * hidden, outputs));
    places.first = layout.place<float>(unless(weights_.kind == "token", rows * hidden));
    places.second = layout.place<float>(unless(weights_.kind == "token", rows * hidden));
    places.first_cell = layout.place<float>(unless(!keeps_cells, rows * hidden));
    places.second_cell = layout.place<float>(unless(!keeps_cells, rows * hidden));
    places.hidden = layout.place<float>(unless(!is_lstm(), rows * hidden));
    places.seen =
        layout.place<float>(unless(earlier == 0, sentences * (earlier + length) * hidden));
    places.earlier = layout.place<std::int32_t>(sentences);
    places.last = layout.place<std::int32_t>(sentences);
    places.counters = layout.place<unsigned>(is_lstm() ? cuda::lstm_counters(lstm_) : 0);
    places.scratch = layout.place<std::byte>(cuda::attention_scratch(
        static_cast<int>(batch.tiles.size()), is_transformer ? detail::transformer_heads : 1,
        batch.longest + static_cast<int>(earlier)));
    if (memory_.size() < layout.bytes()) {
      memory_ = {};
      memory_ = Buffer<CudaBackend>(backend_, layout.bytes());
    }
    const std::size_t pinned =
        std::max(plan_bytes, choice_count(batch, candidates) * 3 * sizeof(float));
    if (pinned_.size() < pinned) {
      pinned_ = {};
      pinned_ = PinnedBuffer(backend_, pinned);
    }
    return places;
  }

  std::size_t choice_count(const cuda::PredictorBatch& batch, std::int32_t candidates) const {
    return count_of(batch.rows()) * weights_.heads.size() * count_of(candidates);
  }

  // Sends what the host says of the batch; the memory that it is sent from is free until then.
  void send(const cuda::PredictorBatch& batch, const Places& places) {
    std::byte* const memory = pinned_.data();
    const auto put = [&](const auto& values, std::size_t place) {
      const std::size_t bytes = values.size() * sizeof(values[0]);
      std::memcpy(memory + place, values.data(), bytes);
      return place + bytes;
    };
    put(batch.positions, put(batch.tokens, places.plan));
    put(batch.sentences, places.sentences);
    const std::size_t end = put(batch.tiles, places.tiles);
    backend_.copy_async(memory_.data(), memory, end, stream_);
  }

  void run(const cuda::PredictorBatch& batch, const Places& places, const float* embeddings,
           const float* past, std::int64_t earlier, std::int64_t length, float* states,
           const HashTable& table) {
    const int rows = batch.rows();
    const auto* const tokens = at<std::int32_t>(places.plan);
    auto* const compressed = at<float>(places.compressed);
    cuda::apply(compress_, embeddings, tokens, compressed, rows,
                weights_.kind == "transformer" ? LinearResult::plain : LinearResult::relu,
                stream_.native());
    const float* hidden = compressed;
    if (is_lstm())
      hidden = run_lstm(batch, places, past, earlier, length, states);
    else if (weights_.kind == "transformer")
      hidden = run_transformer(batch, places);
    auto* const logits = at<float>(places.wide);
    cuda::apply(routing_, hidden, nullptr, logits, rows, LinearResult::plain, stream_.native());
    auto* const ids = at<std::int32_t>(places.choices);
    const std::size_t count = choice_count(batch, table.candidates);
    auto* const probs = reinterpret_cast<float*>(ids + count);
    cuda::choose_experts(logits, hidden, scale_, rows, static_cast<int>(weights_.heads.size()),
                         weights_.experts, table.candidates, weights_.scale_factor,
                         {ids, probs, probs + count}, stream_.native());
    // The plan has arrived by then: its memory takes up the results.
    backend_.copy_async(pinned_.data(), ids, 3 * count * sizeof(float), stream_);
  }

  const float* run_lstm(const cuda::PredictorBatch& batch, const Places& places, const float* past,
                        std::int64_t earlier, std::int64_t length, float* states) {
    const int rows = batch.rows(), size = weights_.hidden_size;
    const auto* const sentences = at<cuda::SentenceRows>(places.sentences);
    auto* const compressed = at<float>(places.compressed);
    auto* const hidden = at<float>(places.hidden);
    auto* const seen = at<float>(places.seen);
    auto* const counts = at<std::int32_t>(places.earlier);
    const int seen_rows = static_cast<int>(earlier + length);
    float* const outputs[] = {at<float>(places.first), at<float>(places.second)};
    float* const cells[] = {at<float>(places.first_cell), at<float>(places.second_cell)};
    if (past)
      cuda::gather_past({past, batch.count, static_cast<int>(earlier), size}, seen, seen_rows,
                        counts, at<std::int32_t>(places.last), stream_.native());
    cuda::LstmCall step;
    step.gates = at<float>(places.wide);
    step.sentences = sentences;
    step.count = batch.count;
    step.hidden = size;
    step.last = past ? at<std::int32_t>(places.last) : nullptr;
    step.past = past;
    step.past_stride = 1 + 4 * size;
    step.counters = at<unsigned>(places.counters);
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      cuda::apply(layers_[layer].input, layer == 0 ? compressed : outputs[0], nullptr,
                  at<float>(places.wide), rows, LinearResult::plain, stream_.native());
      step.recurrent = layers_[layer].recurrent;
      step.past_column = 1 + static_cast<int>(layer) * 2 * size;
      step.output = outputs[layer];
      step.cell = states ? cells[layer] : nullptr;
      cuda::run_lstm(lstm_, step, stream_.native());
    }
    cuda::apply(residual_, compressed, nullptr, hidden, rows, LinearResult::plain,
                stream_.native());
    if (past)
      cuda::append_latest(outputs[1], sentences, batch.count, size, seen, seen_rows, counts,
                          batch.longest, stream_.native());
    cuda::AttentionCall attention = attention_of(batch, places);
    attention.size = size;
    attention.query = outputs[1];
    attention.key = attention.value = past ? seen : outputs[1];
    attention.query_stride = attention.key_stride = size;
    attention.earlier = past ? counts : nullptr;
    attention.is_causal = weights_.kind == "causal_lstm";
    attention.out = hidden;
    attention.longest += static_cast<int>(earlier);
    cuda::attend_sparsely(attention, stream_.native());
    if (states)
      cuda::write_states({outputs[0], cells[0], outputs[1], cells[1]},
                         at<std::int32_t>(places.plan), rows, size, states, stream_.native());
    return hidden;
  }

  const float* run_transformer(const cuda::PredictorBatch& batch, const Places& places) {
    const int rows = batch.rows(), size = weights_.hidden_size;
    constexpr int heads = detail::transformer_heads;
    CUstream_st* const stream = stream_.native();
    auto* const x = at<float>(places.compressed);
    auto* const normed = at<float>(places.first);
    auto* const mixed = at<float>(places.second);
    auto* const wide = at<float>(places.wide);
    cuda::AttentionCall attention = attention_of(batch, places);
    attention.heads = heads;
    attention.size = size / heads;
    attention.query = wide;
    attention.key = wide + size;
    attention.value = wide + 2 * size;
    attention.query_stride = attention.key_stride = 3 * size;
    attention.out = mixed;
    for (const Block& block : blocks_) {
      cuda::rms_norm(x, block.attention_norm, normed, rows, size, stream);
      cuda::apply(block.qkv, normed, nullptr, wide, rows, LinearResult::plain, stream);
      cuda::rotate(wide, at<std::int32_t>(places.plan) + rows, rows, heads, size / heads, stream);
      cuda::attend(attention, stream);
      cuda::apply(block.output, mixed, nullptr, x, rows, LinearResult::added, stream);
      cuda::rms_norm(x, block.feed_forward_norm, normed, rows, size, stream);
      cuda::apply(block.up, normed, nullptr, wide, rows, LinearResult::relu, stream);
      cuda::apply(block.down, wide, nullptr, x, rows, LinearResult::added, stream);
    }
    cuda::rms_norm(x, norm_, normed, rows, size, stream);
    return normed;
  }

  cuda::AttentionCall attention_of(const cuda::PredictorBatch& batch, const Places& places) const {
    cuda::AttentionCall attention;
    attention.tiles = at<cuda::AttentionTile>(places.tiles);
    attention.tile_count = static_cast<int>(batch.tiles.size());
    attention.scratch = at<float>(places.scratch);
    attention.longest = batch.longest;
    return attention;
  }

  void take_choices(const cuda::PredictorBatch& batch, std::int64_t first_token,
                    HashTable& table) const {
    const auto candidates = static_cast<std::ptrdiff_t>(table.candidates);
    const std::size_t count = choice_count(batch, table.candidates);
    const auto* ids = reinterpret_cast<const std::int32_t*>(pinned_.data());
    const auto* probs = reinterpret_cast<const float*>(ids + count);
    const float* scale = probs + count;
    for (const std::int32_t layer : weights_.heads)
      for (const std::int32_t token : batch.tokens) {
        const std::size_t to = table.index(layer, first_token + token, 0);
        std::copy_n(ids, candidates, table.ids.data() + to);
        std::copy_n(probs, candidates, table.probs.data() + to);
        std::copy_n(scale, candidates, table.scale.data() + to);
        ids += candidates, probs += candidates, scale += candidates;
      }
  }

  struct Upload {
    const float** at;
    const float* values;
    std::size_t count;
  };

  CudaBackend backend_;
  PredictorWeights weights_;
  detail::PredictorTensors tensors_;
  std::mutex mutex_;
  CudaBackend::Stream stream_;
  Buffer<CudaBackend> parameters_, memory_;
  PinnedBuffer pinned_;
  std::vector<Upload> uploads_;
  PredictorLinear compress_, routing_, scale_, residual_;
  std::array<Layer, 2> layers_{};
  std::array<Block, 2> blocks_{};
  const float* norm_ = nullptr;
  cuda::LstmPlan lstm_;
};

HashPredictor<CudaBackend>::HashPredictor(const CudaBackend& backend, PredictorWeights weights)
    : parts_(std::make_shared<Parts>(backend, std::move(weights))) {}

HashTable HashPredictor<CudaBackend>::predict(const ConstTensorView& embeddings,
                                              std::span<const std::uint8_t> mask, std::uint64_t key,
                                              std::int32_t max_candidates,
                                              CUstream_st* stream) const {
  detail::check_batch(weights(), embeddings, mask, max_candidates);
  HashTable table = detail::empty_table(weights(), embeddings.shape[0] * embeddings.shape[1], key,
                                        std::min(weights().experts, max_candidates));
  parts_->fill({embeddings, mask, {}, {}}, stream, table);
  return table;
}

bool HashPredictor<CudaBackend>::is_causal() const noexcept { return detail::is_causal(weights()); }

std::int64_t HashPredictor<CudaBackend>::state_size() const noexcept {
  return detail::state_size(weights());
}

HashTable HashPredictor<CudaBackend>::advance(const ConstTensorView& embeddings,
                                              std::span<const std::uint8_t> mask,
                                              const ConstTensorView& past, const TensorView& states,
                                              std::uint64_t key, std::int32_t max_candidates,
                                              CUstream_st* stream) const {
  detail::check_batch(weights(), embeddings, mask, max_candidates);
  detail::check_states(weights(), embeddings, past, states);
  HashTable table = detail::empty_table(weights(), embeddings.shape[0] * embeddings.shape[1], key,
                                        std::min(weights().experts, max_candidates));
  const bool has_states = state_size() > 0;
  const std::int64_t earlier = has_states ? past.shape[1] : 0;
  parts_->fill({embeddings, mask, earlier > 0 ? past : ConstTensorView{},
                has_states ? states : TensorView{}, earlier},
               stream, table);
  return table;
}

const PredictorWeights& HashPredictor<CudaBackend>::weights() const noexcept {
  return parts_->weights();
}

std::size_t HashPredictor<CudaBackend>::workspace_bytes() const {
  return parts_->workspace_bytes();
}

}  // namespace sida
