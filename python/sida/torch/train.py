# SPDX-License-Identifier: Apache-2.0
"""Training a predictor on what a model's own routers decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from sida.torch.architectures import Network, kind_for_decoder, make_network
from sida.torch.predictor import Predictor
from sida.torch.teacher import Batch, MoeAdapter, RoutingRecord, record_routing

TRUNCATION = 30
"""Router logits of the teacher that are distilled (T of the paper's truncated distillation)."""
CROSS_ENTROPY_WEIGHT = 0.5
CACHE_BYTES = 1 << 30
"""Memory that recorded routing may take while a list of batches is gone through again."""


def train_predictor(
    model: nn.Module,
    batches: Iterable[Batch],
    kind: str = "lstm",
    *,
    steps: int = 2500,
    seed: int = 0,
) -> Predictor:
    """Train a predictor of a model's routing.

    The model runs on its own device, unchanged; no labels are needed. The same model, batches,
    seed and number of steps give the same predictor, on the CPU to the bit.

    Args:
        model: A Mixture-of-Experts model, original or offloaded with exact routing.
        batches: Dicts of what the model takes, or tensors of `input_ids`; gone through as often
            as `steps` asks for, a list in a new order each time.
        kind: "lstm" (the paper's), "transformer" (small, and nearer to the routers' choice) or
            "token" (looks at each token alone). For a decoder "lstm" is "causal_lstm", which
            foretells a token from those before it, and "transformer" is refused.
        steps: Batches to train on.
        seed: Of the initial weights and of the order of batches.

    Returns:
        The predictor, on the model's device.

    Raises:
        ValueError: There is nothing to train on or to train for, or no such kind.
    """
    from sida.huggingface.adapter import find_adapter

    return fit_predictor(find_adapter(model), batches, kind, steps=steps, seed=seed)


def fit_predictor(
    adapter: MoeAdapter,
    batches: Iterable[Batch],
    kind: str = "lstm",
    *,
    steps: int = 2500,
    seed: int = 0,
    hidden_size: int | None = None,
    learning_rate: float = 1e-3,
    progress: bool = True,
) -> Predictor:
    """Train a predictor for whatever an adapter stands for; see `train_predictor`.

    AdamW with a short warm-up and a cosine, on `predictor_loss`.

    Args:
        adapter: The model.
        batches: As in `train_predictor`.
        kind: As in `train_predictor`.
        steps: As in `train_predictor`.
        seed: As in `train_predictor`.
        hidden_size: Width of the network; by default the kind's usual one.
        learning_rate: Of AdamW, at its highest.
        progress: Show a progress bar.

    Raises:
        ValueError: There is nothing to train on or to train for.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if not adapter.predictable:
        raise ValueError("the model has no MoE layer whose routing could be foretold")
    if adapter.causal:
        kind = kind_for_decoder(kind)
    records = _records(adapter, batches, seed)
    record = next(records)
    devices = [record.embeddings.device] if record.embeddings.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        network = make_network(
            kind,
            record.embeddings.shape[-1],
            adapter.num_experts,
            len(adapter.predictable),
            hidden_size=hidden_size,
            # Weights above 1 come from routers with a scaling factor; leave room above the first.
            scale_factor=max(1.0, 1.5 * float(record.weights.max())),
        ).to(record.embeddings.device)
    # Models differ a hundredfold in the size of their embeddings; the learning rate suits size 1.
    size = float(record.embeddings[record.mask].square().mean().sqrt().clamp_min(1e-12))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.05)
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / warmup) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        ),
    )
    network.train()
    bar = tqdm(range(steps), desc=f"train {kind} predictor", disable=not progress)
    for step in bar:
        loss = predictor_loss(network, record, record.embeddings / size)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if step < steps - 1:
            record = next(records)
    with torch.no_grad():
        network.compress.weight.div_(size)
    return Predictor(
        kind,
        network.requires_grad_(False),
        layers=len(adapter.layer_names),
        heads=list(adapter.predictable),
        fingerprint=adapter.fingerprint(),
    )


def predictor_loss(network: Network, record: RoutingRecord, embeddings: Tensor) -> Tensor:
    """Distance of a network's prediction from a record, averaged over layers and tokens.

    Truncated knowledge distillation and cross-entropy (SiDA-MoE §3.5): the divergence between the
    teacher's and the network's distributions over the teacher's T = 30 likeliest experts, and the
    cross-entropy of the experts chosen; and the squared error of the scale at the experts chosen.
    The paper weights cross-entropy with 0.005 and its code measures the distance of distributions
    as L1; Kullback-Leibler divergence and a weight of 0.5 were measured to be better.

    Args:
        network: The network that is trained.
        record: What the routers decided.
        embeddings: The record's embeddings, scaled as the network expects them.
    """
    logits, scales = network(embeddings, record.mask)
    distilled = F.kl_div(
        logits.gather(-1, record.top_ids).log_softmax(-1),
        record.top_logits.softmax(-1),
        reduction="none",
    ).sum(-1)
    routed = record.experts >= 0
    experts = record.experts.clamp_min(0)
    count = routed.sum().clamp_min(1)
    chosen = -logits.log_softmax(-1).gather(-1, experts)
    error = (scales.gather(-1, experts) - record.weights).square()
    loss: Tensor = distilled.sum() / max(1, distilled.numel())
    loss += CROSS_ENTROPY_WEIGHT * (chosen * routed).sum() / count
    loss += (error * routed).sum() / count
    return loss


def _records(adapter: MoeAdapter, batches: Iterable[Batch], seed: int) -> Iterator[RoutingRecord]:
    """Records of the batches with tokens in them, round after round.

    Batches of a list stay what they are from round to round, so their records are kept while
    there is room; those of a loader, which may shuffle, are made anew.
    """
    if not isinstance(batches, Sequence) and iter(batches) is batches:
        batches = list(batches)
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, RoutingRecord] = {}
    room = CACHE_BYTES
    while True:
        found = False
        if isinstance(batches, Sequence):
            order = torch.randperm(len(batches), generator=generator).tolist()
            round_: Iterable[tuple[int, Batch]] = ((i, batches[i]) for i in order)
        else:
            round_ = enumerate(batches)
        for i, batch in round_:
            record = kept.get(i) or record_routing(adapter, batch, top=TRUNCATION)
            if isinstance(batches, Sequence) and i not in kept and record.bytes() <= room:
                kept[i] = record
                room -= record.bytes()
            if record.mask.any():
                found = True
                yield record
        if not found:
            raise ValueError("expected batches with tokens in them, got none")
