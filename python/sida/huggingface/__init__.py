# SPDX-License-Identifier: Apache-2.0
"""What sida does with models of Hugging Face transformers."""

from sida.huggingface.adapter import ExpertAdapter, ExpertParameter, find_adapter
from sida.huggingface.handle import Offloaded
from sida.huggingface.loading import from_pretrained
from sida.huggingface.offloading import offload

__all__ = [
    "ExpertAdapter",
    "ExpertParameter",
    "Offloaded",
    "find_adapter",
    "from_pretrained",
    "offload",
]
