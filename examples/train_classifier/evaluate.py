# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a trained classifier and the load of its experts, run by transformers alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from classifier import Classifier, load_classifier
from glosses import Encoded, encode, read_jsonl


@torch.no_grad()
def evaluate(classifier: Classifier, texts: Encoded, *, batch_size: int = 256) -> dict[str, Any]:
    """Accuracy, and for each MoE layer how many experts are used and the largest share of tokens.

    Tokens are those of the attention mask: padding counts in nothing.
    """
    device = next(classifier.parameters()).device
    modules: Iterable[Any] = classifier.encoder.modules()
    routers = [module.router.classifier for module in modules if hasattr(module, "router")]
    logits: list[Tensor] = [torch.empty(0)] * len(routers)
    counts = [torch.zeros(router.out_features, dtype=torch.int64) for router in routers]

    def keep(layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            logits[layer] = output

        return hook

    hooks = [router.register_forward_hook(keep(i)) for i, router in enumerate(routers)]
    correct = 0
    classifier.eval()
    try:
        # Texts of one length together: less padding, the same results.
        parts = torch.split(texts.lengths.argsort(stable=True), batch_size)
        for index in tqdm(parts, desc="evaluate"):
            ids, mask, labels = (t.to(device) for t in texts.batch(index))
            correct += int((classifier(ids, mask).argmax(-1) == labels).sum())
            for layer, count in enumerate(counts):
                chosen = logits[layer].argmax(-1).view(mask.shape)[mask.bool()]
                count += chosen.bincount(minlength=len(count)).cpu()
    finally:
        for handle in hooks:
            handle.remove()
    return {
        "texts": len(texts.labels),
        "tokens": int(texts.lengths.sum()),
        "accuracy": correct / len(texts.labels),
        "experts used": [int((c > 0).sum()) for c in counts],
        "experts with over 0.1 % of the tokens": [int((c > 0.001 * c.sum()).sum()) for c in counts],
        "largest share of tokens": [round(float(c.max() / c.sum()), 4) for c in counts],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the trained classifier")
    parser.add_argument("texts", type=Path, help="a .jsonl file of texts and labels")
    parser.add_argument("--limit", type=int, help="only this many texts, evenly spaced")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)

    glosses = read_jsonl(options.texts)
    if options.limit:
        glosses = glosses[:: max(1, len(glosses) // options.limit)][: options.limit]
    texts = encode(AutoTokenizer.from_pretrained(options.model), glosses)
    classifier = load_classifier(options.model).to(options.device)
    print(json.dumps(evaluate(classifier, texts), indent=2))


if __name__ == "__main__":
    main()
