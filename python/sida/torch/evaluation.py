# SPDX-License-Identifier: Apache-2.0
"""How well a predictor foretells a model's routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sida.torch.teacher import (
    Batch,
    MoeAdapter,
    batch_arguments,
    evaluation_mode,
    model_device,
    record_routing,
)

if TYPE_CHECKING:
    from sida.torch.predictor import Predictor

NAMED = (1, 3)
"""Numbers of candidates that are scored."""


class Evaluation(dict[str, Any]):
    """What `evaluate` measured; a dict, and a table when printed.

    Keys: `layers` (names), `tokens`, `batches`; lists with one number a layer, over tokens without
    padding: `top1`, `top3` (share of tokens whose expert is the first, or among the first three,
    that the predictor names), `coverage1`, `coverage3` (share of a batch's experts that are among
    the first, or first three, of any token), `overfetch1`, `overfetch3` (experts so named for each
    expert needed), `scale_error` (mean absolute error of the scale); and `fidelity` (share of the
    model's predictions that stay the same when it is routed by the predictor).
    """

    def __str__(self) -> str:
        columns = [f"{name}{n}" for name in ("top", "coverage", "overfetch") for n in NAMED]
        width = max(len(str(name)) for name in [*self["layers"], "layer"])
        lines = ["  ".join(["layer".ljust(width), *columns, "scale error"])]
        for i, layer in enumerate(self["layers"]):
            cells = [f"{self[c][i]:.3f}".rjust(len(c)) for c in columns]
            cells.append(f"{self['scale_error'][i]:.3f}".rjust(len("scale error")))
            lines.append("  ".join([str(layer).ljust(width), *cells]))
        lines.append(
            f"{self['tokens']} tokens in {self['batches']} batches; routed by the predictor the "
            f"model keeps {100 * self['fidelity']:.2f} % of its predictions"
        )
        return "\n".join(lines)


def evaluate(
    predictor: Predictor,
    model: nn.Module | MoeAdapter,
    batches: Iterable[Batch],
    fn: Callable[[Any, Any], Any] | None = None,
) -> Evaluation:
    """Measure how well a predictor foretells a model's routing.

    Every batch runs three times: once for its routing, once for the model's predictions, once
    more with routing forced to what the predictor says.

    Args:
        predictor: Moved to the model's device if it is elsewhere.
        model: The model that the predictor was trained for, or its adapter (then `fn` is needed).
        batches: As for training; text that the predictor has not seen.
        fn: `fn(model, batch)` gives the output whose argmax is the model's prediction; by default
            the model's own: its logits, or else its last hidden states.

    Raises:
        ValueError: The predictor belongs to another model, or there is nothing to measure.
    """
    if isinstance(model, nn.Module):
        from sida.huggingface.adapter import find_adapter

        adapter: MoeAdapter = find_adapter(model)
    else:
        adapter = model
    predictor.check_fits(adapter)
    device = model_device(adapter.stack())
    network = predictor.network.to(device)
    totals = torch.zeros(len(_TOTALS), network.heads, dtype=torch.float64, device=device)
    kept = predictions = tokens = count = 0
    for batch in batches:
        record = record_routing(adapter, batch, layers=predictor.heads)
        named = predictor.predict(record.embeddings, record.mask, max(*NAMED, adapter.top_k))
        with torch.no_grad():
            _, scales = network(record.embeddings, record.mask)
        totals += _layer_totals(
            named.ids[:, record.mask], record.experts, scales, record.weights, network.experts
        )
        tables = {
            layer: (
                named.ids[head, ..., : adapter.top_k].flatten(0, 1),
                named.scale[head, ..., : adapter.top_k].flatten(0, 1),
            )
            for head, layer in enumerate(predictor.heads)
        }
        modules = [adapter.stack(), *([model] if isinstance(model, nn.Module) else [])]
        with evaluation_mode(*modules):
            exact = _predictions(model, batch, record.mask, fn, device)
            with adapter.forced_routing(tables):
                routed = _predictions(model, batch, record.mask, fn, device)
        kept += int((exact == routed).sum())
        predictions += exact.numel()
        tokens += int(record.mask.sum())
        count += 1
    if not tokens:
        raise ValueError("expected batches with tokens in them, got none")
    total = dict(zip(_TOTALS, totals, strict=True))
    result = Evaluation(
        layers=[adapter.layer_names[layer] for layer in predictor.heads],
        tokens=tokens,
        batches=count,
    )
    for n in NAMED:
        result[f"top{n}"] = (total[f"right{n}"] / total["routed"]).tolist()
    for n in NAMED:
        result[f"coverage{n}"] = (total[f"covered{n}"] / total["needed"]).tolist()
        result[f"overfetch{n}"] = (total[f"named{n}"] / total["needed"]).tolist()
    result["scale_error"] = (total["scale_error"] / total["routed"]).tolist()
    result["fidelity"] = kept / max(1, predictions)
    return result


_TOTALS = ["routed", "scale_error", "needed"] + [
    f"{name}{n}" for name in ("right", "covered", "named") for n in NAMED
]


def _layer_totals(
    named: Tensor, experts: Tensor, scales: Tensor, weights: Tensor, count: int
) -> Tensor:
    """Sums of one batch, [_TOTALS, heads].

    Args:
        named: [heads, N, candidates] predicted experts.
        experts: [heads, N, k] chosen experts, -1 for none.
        scales: [heads, N, count] predicted scales.
        weights: [heads, N, k] of the chosen experts.
        count: Experts of a layer.
    """
    routed = experts >= 0
    needed = _members(experts, count)
    error = (scales.gather(-1, experts.clamp_min(0)) - weights).abs() * routed
    rows = [routed.sum((1, 2)), error.sum((1, 2)), needed.sum(1)]
    right, covered, union = [], [], []
    for n in NAMED:
        first = named[..., :n]
        hit = (experts[..., :, None] == first[..., None, :]).any(-1) & routed
        right.append(hit.sum((1, 2)))
        members = _members(first, count)
        covered.append((members & needed).sum(1))
        union.append(members.sum(1))
    return torch.stack([row.double() for row in rows + right + covered + union])


def _members(ids: Tensor, count: int) -> Tensor:
    """Which of `count` experts occur in ids [heads, N, n], as bool [heads, count]."""
    seen = torch.zeros(ids.shape[0], count + 1, dtype=torch.bool, device=ids.device)
    flat = ids.flatten(1)
    seen.scatter_(1, torch.where(flat < 0, count, flat), True)
    return seen[:, :count]


def _predictions(
    model: Any,
    batch: Batch,
    mask: Tensor,
    fn: Callable[[Any, Any], Any] | None,
    device: torch.device,
) -> Tensor:
    """The model's predictions for a batch, flat; those at padding left out."""
    items = batch_arguments(batch, device)
    output = fn(model, batch) if fn else model(**items)
    values = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if values is None:
        values = getattr(output, "last_hidden_state", None)
    if not isinstance(values, Tensor):
        raise TypeError(
            "expected an output with logits or last_hidden_state, got "
            f"{type(output).__name__}; pass fn(model, batch) that returns a tensor"
        )
    chosen = values.argmax(-1)
    shown = items.get("decoder_attention_mask", mask).bool()
    return chosen[shown.to(chosen.device)] if chosen.shape == shown.shape else chosen.flatten()
