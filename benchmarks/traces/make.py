# SPDX-License-Identifier: Apache-2.0
"""Makes the traces beside this file anew.

Without arguments: routing of models/wordnet-switch-32 on held-out sentences, and what its predictor
foretells of it. With --routing FILE.npz NAME: the same from arrays `ids` [layer, sentence,
position], `x` [sentence, position] (0 is padding) and `lstm` [layer, sentence, position, rank].
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import sida

FOLDER = Path(__file__).parent
MODEL = FOLDER.parents[1] / "models" / "wordnet-switch-32"
SENTENCES = 400
CANDIDATES = 4


def main() -> None:
    """Write the traces that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routing", nargs=2, metavar=("FILE", "NAME"))
    options = parser.parse_args()
    if options.routing:
        from_arrays(np.load(options.routing[0]), options.routing[1])
    else:
        from_model()


def from_model() -> None:
    """Record the committed model sentence by sentence, and build its predictor's tables."""
    import torch

    from sida.cli.classifier import Classifier, be_quiet, load_encoder
    from sida.cli.locate import draw_sentences

    be_quiet()
    torch.set_num_threads(1)
    sentences = draw_sentences(MODEL, SENTENCES)
    batches = Classifier(MODEL).batches(sentences, 1)
    model = load_encoder(MODEL)
    embed = model.get_input_embeddings()
    predictor = sida.HashPredictor.load(MODEL / "predictor.safetensors")
    with sida.offload(model, memory="20%") as off:
        for _ in off.map(batches):
            pass
        routing = off.record(FOLDER / "wordnet-switch-32.safetensors")
    tables = [
        predictor.predict(
            embed(batch["input_ids"]).detach().float(),
            batch["attention_mask"].to(torch.uint8),
            key=key,
            candidates=CANDIDATES,
        )
        for key, batch in zip(routing.keys, batches, strict=True)
    ]
    sida.HashTable(
        layers=routing.layers,
        candidates=CANDIDATES,
        keys=routing.keys,
        offsets=routing.offsets,
        ids=np.concatenate([table.ids for table in tables], axis=1),
        probs=np.concatenate([table.probs for table in tables], axis=1),
        scale=np.concatenate([table.scale for table in tables], axis=1),
    ).save(FOLDER / "wordnet-switch-32.foretold.safetensors")


def from_arrays(arrays: Mapping[str, Any], name: str) -> None:
    """Write routing and an LSTM's best three, each with its rank's share of right answers.

    The shares are those of the sentences that are left out here.
    """
    mask = arrays["x"] != 0
    shown = mask.copy()
    shown[SENTENCES:] = False
    ids, ranked = arrays["ids"], arrays["lstm"]
    layers = len(ids)
    rest = mask & ~shown
    shares = np.array(
        [(ranked[i][rest] == ids[i][rest][:, None]).mean(axis=0) for i in range(layers)]
    )
    offsets = [0, *np.cumsum(shown[:SENTENCES].sum(axis=1)).tolist()]
    routing = np.stack([ids[i][shown] for i in range(layers)])[..., None]
    foretold = np.stack([ranked[i][shown] for i in range(layers)])
    probs = np.broadcast_to(shares[:, None, :], foretold.shape)
    _save(name, offsets, routing, np.ones(routing.shape))
    _save(f"{name}.foretold", offsets, foretold, probs)


def _save(name: str, offsets: list[int], ids: Any, probs: Any) -> None:
    notes = {"experts": name.removesuffix(".foretold").rsplit("-", 1)[1], "expert_bytes": "524288"}
    sida.HashTable(
        layers=len(ids),
        candidates=ids.shape[-1],
        keys=range(len(offsets) - 1),
        offsets=offsets,
        ids=ids.astype(np.int32),
        probs=probs.astype(np.float32),
        scale=probs.astype(np.float32),
    ).save(FOLDER / f"{name}.safetensors", notes=notes)


if __name__ == "__main__":
    main()
