# SPDX-License-Identifier: Apache-2.0
"""What sida does with models of Hugging Face transformers."""

from sida.huggingface.adapter import ExpertAdapter, ExpertParameter, find_adapter, register_adapter
from sida.huggingface.handle import Offloaded
from sida.huggingface.loading import from_pretrained
from sida.huggingface.module_adapter import ModuleAdapter
from sida.huggingface.offloading import offload

__all__ = [
    "ExpertAdapter",
    "ExpertParameter",
    "ModuleAdapter",
    "Offloaded",
    "find_adapter",
    "from_pretrained",
    "offload",
    "register_adapter",
]
