# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Experts models beyond fast memory.

`offload` and `from_pretrained` are for models of Hugging Face transformers; `ModuleAdapter` and
`register_adapter` teach `offload` a MoE module of one's own, and `OffloadedExperts` is the experts
of one layer. `train_predictor` makes what brings experts early. The components behind them are here
too, for code that wants its own loop. torch and transformers are imported only when something needs
them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sida._core import (
    CudaError,
    ExpertCache,
    ExpertStore,
    HashPredictor,
    HashTable,
    MoeConfig,
    OffloadScheduler,
    __version__,
    replay,
)
from sida.layer import LayerExperts, OffloadedExperts
from sida.stats import Stats

if TYPE_CHECKING:
    from sida.huggingface import (
        ModuleAdapter,
        Offloaded,
        from_pretrained,
        offload,
        register_adapter,
    )
    from sida.torch import Predictor, load_predictor, train_predictor

__all__ = [
    "CudaError",
    "ExpertCache",
    "ExpertStore",
    "HashPredictor",
    "HashTable",
    "LayerExperts",
    "ModuleAdapter",
    "MoeConfig",
    "OffloadScheduler",
    "Offloaded",
    "OffloadedExperts",
    "Predictor",
    "Stats",
    "__version__",
    "from_pretrained",
    "load_predictor",
    "offload",
    "register_adapter",
    "replay",
    "train_predictor",
]

_LAZY = {
    "ModuleAdapter": "sida.huggingface",
    "Offloaded": "sida.huggingface",
    "Predictor": "sida.torch",
    "from_pretrained": "sida.huggingface",
    "load_predictor": "sida.torch",
    "offload": "sida.huggingface",
    "register_adapter": "sida.huggingface",
    "train_predictor": "sida.torch",
}
_EXTRAS = {"torch": "torch", "transformers": "transformers"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sida' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name in _EXTRAS:
            raise ImportError(
                f"sida.{name} needs {error.name}: pip install {_EXTRAS[error.name]}"
            ) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
