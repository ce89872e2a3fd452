# SPDX-License-Identifier: Apache-2.0
"""What experts compute, in NumPy and float64, written from the formula alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sida import MoeConfig

DTYPES = {"f32": np.float32, "f16": np.float16}


def random_experts(config: MoeConfig, seed: int = 0) -> list[list[tuple[Any, ...]]]:
    """[layer][expert] -> (up, down, up_bias, down_bias) of the config's dtype."""
    random = np.random.default_rng(seed)
    rows = config.intermediate_size * (2 if config.gated else 1)

    def array(*shape: int) -> np.ndarray:
        values = random.normal(size=shape) / np.sqrt(shape[-1])
        if config.dtype == "bf16":
            import ml_dtypes

            return values.astype(ml_dtypes.bfloat16)
        return values.astype(DTYPES[config.dtype])

    def expert() -> tuple[Any, ...]:
        return (
            array(rows, config.hidden_size),
            array(config.hidden_size, config.intermediate_size),
            array(rows) if config.up_bias else None,
            array(config.hidden_size) if config.down_bias else None,
        )

    return [[expert() for _ in range(config.experts)] for _ in range(config.layers)]


def _activation(name: str, x: np.ndarray) -> np.ndarray:
    if name == "relu":
        return np.maximum(x, 0)
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / np.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp(-x))


def moe(
    config: MoeConfig,
    experts: list[tuple[Any, ...]],
    hidden: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """out[t] = sum over j of weights[t, j] * expert ids[t, j] (hidden[t]), float64 [T, H]."""
    out = np.zeros(hidden.shape)
    for t, row in enumerate(hidden.astype(np.float64)):
        for j, expert in enumerate(ids[t]):
            up, down, up_bias, down_bias = (
                None if part is None else part.astype(np.float64) for part in experts[expert]
            )
            inner = up @ row + (0 if up_bias is None else up_bias)
            if config.gated:
                gate, value = np.split(inner, 2)
                inner = _activation(config.activation, gate) * value
            else:
                inner = _activation(config.activation, inner)
            result = down @ inner + (0 if down_bias is None else down_bias)
            out[t] += float(weights[t, j]) * result
    return out
