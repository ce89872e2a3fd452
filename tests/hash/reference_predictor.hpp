// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "sida/hash/predictor_weights.hpp"

/// The predictors written down once more, in f64, one number at a time.
namespace reference {

using Vector = std::vector<double>;
using Vectors = std::vector<Vector>;

inline double at(const sida::PredictorWeights& w, const std::string& name, std::size_t i) {
  return static_cast<double>(w.tensors.at(name).values.at(i));
}

inline Vector linear(const sida::PredictorWeights& w, const std::string& weight,
                     const std::string& bias, const Vector& x) {
  const auto out = static_cast<std::size_t>(w.tensors.at(weight).shape.at(0));
  Vector y(out, 0.0);
  for (std::size_t o = 0; o < out; ++o) {
    if (!bias.empty()) y[o] = at(w, bias, o);
    for (std::size_t i = 0; i < x.size(); ++i) y[o] += at(w, weight, o * x.size() + i) * x[i];
  }
  return y;
}

inline Vector layer(const sida::PredictorWeights& w, const std::string& name, const Vector& x) {
  return linear(w, name + ".weight", name + ".bias", x);
}

inline Vector relu(Vector x) {
  for (double& v : x) v = std::max(0.0, v);
  return x;
}

inline Vector add(Vector a, const Vector& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

inline double dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// The threshold at which the positive parts add up to 1, by bisection.
inline Vector sparsemax(Vector z) {
  double high = *std::max_element(z.begin(), z.end());
  double low = high - 1;
  for (int i = 0; i < 200; ++i) {
    const double middle = (low + high) / 2;
    double sum = 0;
    for (const double v : z) sum += std::max(0.0, v - middle);
    (sum > 1 ? low : high) = middle;
  }
  for (double& v : z) v = std::max(0.0, v - high);
  return z;
}

inline Vector softmax(Vector z) {
  const double largest = *std::max_element(z.begin(), z.end());
  double sum = 0;
  for (double& v : z) sum += v = std::exp(v - largest);
  for (double& v : z) v /= sum;
  return z;
}

inline Vector rms_norm(const sida::PredictorWeights& w, const std::string& name, Vector x) {
  const double factor = 1 / std::sqrt(dot(x, x) / static_cast<double>(x.size()) + 1e-6);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] *= factor * at(w, name, i);
  return x;
}

inline Vectors lstm(const sida::PredictorWeights& w, const std::string& suffix,
                    const Vectors& inputs) {
  const auto size = static_cast<std::size_t>(w.hidden_size);
  Vector h(size, 0.0);
  Vector c(size, 0.0);
  Vectors outputs;
  for (const Vector& x : inputs) {
    const Vector g = add(linear(w, "lstm.weight_ih" + suffix, "lstm.bias_ih" + suffix, x),
                         linear(w, "lstm.weight_hh" + suffix, "lstm.bias_hh" + suffix, h));
    for (std::size_t i = 0; i < size; ++i) {
      c[i] = sigmoid(g[size + i]) * c[i] + sigmoid(g[i]) * std::tanh(g[2 * size + i]);
      h[i] = sigmoid(g[3 * size + i]) * std::tanh(c[i]);
    }
    outputs.push_back(h);
  }
  return outputs;
}

inline Vectors lstm_hidden(const sida::PredictorWeights& w, const Vectors& sentence) {
  Vectors compressed;
  for (const Vector& x : sentence) compressed.push_back(relu(layer(w, "compress", x)));
  const Vectors states = lstm(w, "_l1", lstm(w, "_l0", compressed));
  Vectors hidden;
  for (std::size_t i = 0; i < states.size(); ++i) {
    Vector scores;
    const std::size_t seen = w.kind == "causal_lstm" ? i + 1 : states.size();
    for (std::size_t j = 0; j < seen; ++j) scores.push_back(dot(states[i], states[j]));
    const Vector weights = sparsemax(scores);
    Vector y = layer(w, "residual", compressed[i]);
    for (std::size_t j = 0; j < seen; ++j)
      for (std::size_t k = 0; k < y.size(); ++k) y[k] += weights[j] * states[j][k];
    hidden.push_back(y);
  }
  return hidden;
}

/// The vector seen as complex numbers (x[i], x[i + n / 2]), each turned by position · base^(-2i/n).
inline Vector rotated(const Vector& x, std::size_t position) {
  const std::size_t half = x.size() / 2;
  Vector y(x.size());
  for (std::size_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) *
                         std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(half));
    y[i] = x[i] * std::cos(angle) - x[half + i] * std::sin(angle);
    y[half + i] = x[half + i] * std::cos(angle) + x[i] * std::sin(angle);
  }
  return y;
}

inline Vectors transformer_hidden(const sida::PredictorWeights& w, const Vectors& sentence) {
  const auto width = static_cast<std::size_t>(w.hidden_size);
  const std::size_t size = width / 4;
  Vectors x;
  for (const Vector& token : sentence) x.push_back(layer(w, "compress", token));
  for (const std::string block : {"blocks.0", "blocks.1"}) {
    Vectors qkv;
    for (const Vector& token : x)
      qkv.push_back(linear(w, block + ".qkv.weight", "",
                           rms_norm(w, block + ".attention_norm.weight", token)));
    const auto part = [&](std::size_t which, std::size_t head, std::size_t i) {
      const auto begin = qkv[i].begin() + static_cast<std::ptrdiff_t>(which * width + head * size);
      return Vector(begin, begin + static_cast<std::ptrdiff_t>(size));
    };
    for (std::size_t i = 0; i < x.size(); ++i) {
      Vector mixed;
      for (std::size_t head = 0; head < 4; ++head) {
        Vector scores;
        for (std::size_t j = 0; j < x.size(); ++j)
          scores.push_back(dot(rotated(part(0, head, i), i), rotated(part(1, head, j), j)) /
                           std::sqrt(static_cast<double>(size)));
        const Vector weights = softmax(scores);
        Vector sum(size, 0.0);
        for (std::size_t j = 0; j < x.size(); ++j)
          for (std::size_t k = 0; k < size; ++k) sum[k] += weights[j] * part(2, head, j)[k];
        mixed.insert(mixed.end(), sum.begin(), sum.end());
      }
      x[i] = add(x[i], linear(w, block + ".output.weight", "", mixed));
    }
    for (Vector& token : x)
      token =
          add(token, layer(w, block + ".down",
                           relu(layer(w, block + ".up",
                                      rms_norm(w, block + ".feed_forward_norm.weight", token)))));
  }
  for (Vector& token : x) token = rms_norm(w, "norm.weight", token);
  return x;
}

/// Probabilities and scales of every expert, for one token.
struct Prediction {
  Vectors probs;   // [heads][experts]
  Vectors scales;  // [heads][experts]
};

/// What the predictor says of a sentence without padding.
inline std::vector<Prediction> predict(const sida::PredictorWeights& w, const Vectors& sentence) {
  Vectors hidden;
  if (w.kind == "lstm" || w.kind == "causal_lstm") {
    hidden = lstm_hidden(w, sentence);
  } else if (w.kind == "transformer") {
    hidden = transformer_hidden(w, sentence);
  } else {
    for (const Vector& x : sentence) hidden.push_back(relu(layer(w, "compress", x)));
  }
  std::vector<Prediction> predictions;
  for (const Vector& h : hidden) {
    const Vector logits = layer(w, "routing", h);
    const Vector scales = layer(w, "scale", h);
    Prediction prediction;
    for (std::size_t head = 0; head < w.heads.size(); ++head) {
      const auto begin = static_cast<std::ptrdiff_t>(head) * w.experts;
      prediction.probs.push_back(
          softmax(Vector(logits.begin() + begin, logits.begin() + begin + w.experts)));
      Vector scale(scales.begin() + begin, scales.begin() + begin + w.experts);
      for (double& v : scale) v = static_cast<double>(w.scale_factor) * sigmoid(v);
      prediction.scales.push_back(scale);
    }
    predictions.push_back(prediction);
  }
  return predictions;
}

/// A predictor with random weights, of a size at which every part of it matters.
inline sida::PredictorWeights random_weights(const std::string& kind, std::int32_t embedding,
                                             std::int32_t hidden, std::int32_t experts) {
  sida::PredictorWeights w;
  w.kind = kind;
  w.embedding_size = embedding;
  w.hidden_size = hidden;
  w.experts = experts;
  w.layers = 5;
  w.heads = {1, 4};
  w.scale_factor = 2.5f;
  w.fingerprint = "f00d";
  std::mt19937 generator(7);
  const auto tensor = [&](const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t count = 1;
    for (const std::int64_t extent : shape) count *= extent;
    std::normal_distribution<float> normal(
        0.0f, 1.5f / std::sqrt(static_cast<float>(shape.size() == 2 ? shape[1] : 1)));
    sida::PredictorTensor values{std::move(shape), {}};
    for (std::int64_t i = 0; i < count; ++i) values.values.push_back(normal(generator));
    w.tensors.emplace(name, std::move(values));
  };
  const auto layer_of = [&](const std::string& name, std::int64_t out, std::int64_t in) {
    tensor(name + ".weight", {out, in});
    tensor(name + ".bias", {out});
  };
  layer_of("compress", hidden, embedding);
  layer_of("routing", 2 * experts, hidden);
  layer_of("scale", 2 * experts, hidden);
  if (kind == "lstm" || kind == "causal_lstm") {
    for (const std::string suffix : {"_l0", "_l1"}) {
      for (const std::string part : {"ih", "hh"}) {
        tensor("lstm.weight_" + part + suffix, {4 * hidden, hidden});
        tensor("lstm.bias_" + part + suffix, {4 * hidden});
      }
    }
    layer_of("residual", hidden, hidden);
  }
  if (kind == "transformer") {
    for (const std::string block : {"blocks.0", "blocks.1"}) {
      tensor(block + ".attention_norm.weight", {hidden});
      tensor(block + ".qkv.weight", {3 * hidden, hidden});
      tensor(block + ".output.weight", {hidden, hidden});
      tensor(block + ".feed_forward_norm.weight", {hidden});
      layer_of(block + ".up", 2 * hidden, hidden);
      layer_of(block + ".down", hidden, 2 * hidden);
    }
    tensor("norm.weight", {hidden});
  }
  return w;
}

}  // namespace reference
