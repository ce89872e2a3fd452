# SPDX-License-Identifier: Apache-2.0
"""Makes the predictors that C++ is compared with: trained in PyTorch, with what they foretell.

Writes predictor_KIND.safetensors and predictor_KIND_expected.safetensors beside itself; run it as
`PYTHONPATH=python:tests/python python tests/data/make_predictor_fixture.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save
from tiny_moe import make_batches, make_tiny

from sida.torch.architectures import NETWORKS
from sida.torch.train import fit_predictor

HERE = Path(__file__).parent

torch.set_num_threads(1)
for kind in NETWORKS:
    adapter = make_tiny(size=8, experts=6, layers=4)
    adapter.predictable = [1, 3]
    predictor = fit_predictor(
        adapter,
        make_batches(count=16),
        kind,
        steps=200,
        hidden_size=8,
        learning_rate=1e-2,
        progress=False,
    )
    predictor.save(HERE / f"predictor_{kind}.safetensors")
    # Sentences padded right, left, on both sides and inside, one of a token, one of none, one full.
    mask = torch.tensor(
        [
            [1, 1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 1, 1, 1, 1, 1],
            [0, 1, 1, 1, 1, 1, 1, 1, 0],
            [1, 0, 1, 1, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 1, 1, 1, 1, 1],
        ],
        dtype=torch.uint8,
    )
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(5))
    embeddings = adapter.embed(ids).detach()
    embeddings[mask == 0] = torch.nan
    candidates = predictor.predict(embeddings, mask, 4)
    expected = {"embeddings": embeddings, "mask": mask.to(torch.int32)}
    for name, values in candidates._asdict().items():
        missing = -1 if name == "ids" else 0
        table = values.new_full((4, mask.numel(), 4), missing)
        table[predictor.heads] = values.flatten(1, 2)
        expected[name] = table.to(torch.int32) if name == "ids" else table
    (HERE / f"predictor_{kind}_expected.safetensors").write_bytes(save(expected))
