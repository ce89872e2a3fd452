# SPDX-License-Identifier: Apache-2.0
"""``sida train-predictor`` and ``sida evaluate``."""

from __future__ import annotations


def train_predictor() -> None:
    """x."""


def evaluate() -> None:
    """x."""
