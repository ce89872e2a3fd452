# SPDX-License-Identifier: Apache-2.0
"""What sida does with PyTorch: predictors are trained, measured, saved and loaded here."""

from sida.torch.evaluation import Evaluation, evaluate
from sida.torch.predictor import Candidates, Predictor, load_predictor
from sida.torch.teacher import Batch, MoeAdapter, RoutingRecord, record_routing
from sida.torch.train import fit_predictor, train_predictor

__all__ = [
    "Batch",
    "Candidates",
    "Evaluation",
    "MoeAdapter",
    "Predictor",
    "RoutingRecord",
    "evaluate",
    "fit_predictor",
    "load_predictor",
    "record_routing",
    "train_predictor",
]
