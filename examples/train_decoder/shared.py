# SPDX-License-Identifier: Apache-2.0
"""What this recipe takes from the classifier's, which lies in the folder beside it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "train_classifier"))

from glosses import PARTS_OF_SPEECH, find_wordnet, read_senses
from grouped_experts import by_expert, grouped_linear, routing_losses
from recipe import (
    is_held_out,
    learning_rate,
    load_checkpoint,
    provenance,
    round_weights,
    save_atomically,
    save_in_half,
    unpack_debian,
    write_json,
)

__all__ = [
    "PARTS_OF_SPEECH",
    "by_expert",
    "find_wordnet",
    "grouped_linear",
    "is_held_out",
    "learning_rate",
    "load_checkpoint",
    "provenance",
    "read_senses",
    "round_weights",
    "routing_losses",
    "save_atomically",
    "save_in_half",
    "unpack_debian",
    "write_json",
]
