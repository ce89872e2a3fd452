// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace sida {

/// Foretells from a batch's token embeddings which experts each MoE layer will use (paper §3.4).
///
/// Made from PredictorWeights, of one of four kinds: "lstm" (the paper's), "causal_lstm" (the same
/// for decoders), "transformer" (two small layers; nearer to the routers' choice) and "token" (each
/// token alone; cheapest). All see the tokens of a sentence only, so where and how far a batch is
/// padded does not matter. Backends specialise it, each in a header of its own;
/// `hash_predictor_cpu.hpp` has the contract.
template <class Backend>
class HashPredictor;

}  // namespace sida
