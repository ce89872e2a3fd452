# SPDX-License-Identifier: Apache-2.0
"""What a model's routers decide for a batch, recorded as a predictor's target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any] | Tensor
"""A dict of what the model takes, or just the `input_ids` [B, S]."""


class MoeAdapter(Protocol):
    """Where a model keeps what a predictor deals with; one adapter for each model."""

    layer_names: list[str]
    """Module path of each MoE layer; its place in the list is the layer's index."""
    predictable: list[int]
    """Indices of the layers whose routing can be foretold from the stack's embeddings."""
    causal: bool
    """Whether a token is to be foretold from those before it alone, as a decoder meets them."""
    num_experts: int
    top_k: int

    def stack(self) -> nn.Module:
        """Return the module whose call begins a batch.

        It takes `input_ids` or `inputs_embeds`, and `attention_mask`, by name.
        """

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the token embeddings [B, S, D] as the stack's first layer sees them."""

    def routers(self) -> list[nn.Module]:
        """Return the router of each MoE layer."""

    def routing(self, layer: int, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Read what a router returned.

        Returns:
            Logits [T, E] float32, chosen experts [T, k] (a negative one or one beyond the last:
            the token was dropped), and the weights [T, k] that the router gives them.
        """

    def forced_routing(
        self, tables: Mapping[int, tuple[Tensor, Tensor]]
    ) -> AbstractContextManager[None]:
        """Route by table instead of by router while the context is open.

        Args:
            tables: For each MoE layer in question, experts [T, k] int64 and weights [T, k]
                float32 of all T = B * S tokens, padding included. An expert of -1 means that none
                runs: the layer adds nothing to that token. Layers that are not named keep their
                routers.
        """

    def fingerprint(self) -> str:
        """Return what tells this model's routing from any other's."""


@dataclass(frozen=True)
class RoutingRecord:
    """What one batch looks like to a predictor, and what it should say.

    N tokens without padding, row by row; one entry of the first axis for each layer recorded.
    """

    embeddings: Tensor
    """[B, S, D] float32."""
    mask: Tensor
    """[B, S] bool, True for tokens."""
    top_logits: Tensor
    """[layers, N, T] the router's largest logits, falling."""
    top_ids: Tensor
    """[layers, N, T] the experts that they belong to."""
    experts: Tensor
    """[layers, N, k] experts chosen; -1 where the router dropped the token."""
    weights: Tensor
    """[layers, N, k] weights that the router returned for them."""

    def bytes(self) -> int:
        """Memory that the record takes."""
        return sum(t.numel() * t.element_size() for t in vars(self).values())


def batch_arguments(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the batch as keyword arguments of the model, its tensors on `device`."""
    items = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in items.items()}


def model_device(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter that has memory."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")


@contextmanager
def evaluation_mode(*modules: nn.Module) -> Iterator[None]:
    """Switch modules to inference (no dropout, no jitter, no gradients), and back."""
    training = [m for module in modules for m in module.modules() if m.training]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def stack_inputs(adapter: MoeAdapter, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the stack's arguments for a batch, its embeddings [B, S, D] and its mask [B, S].

    Raises:
        ValueError: The batch has neither `input_ids` nor `inputs_embeds`, or a mask of another
            shape.
    """
    items = batch_arguments(batch, model_device(adapter.stack()))
    inputs = {
        name: items[name]
        for name in ("input_ids", "inputs_embeds", "attention_mask")
        if items.get(name) is not None
    }
    if "inputs_embeds" in inputs:
        embeddings = inputs["inputs_embeds"]
    elif "input_ids" in inputs:
        embeddings = adapter.embed(inputs["input_ids"])
    else:
        raise ValueError(
            f"expected a batch with input_ids or inputs_embeds, got {sorted(items) or 'nothing'}"
        )
    shape = embeddings.shape[:2]
    mask = inputs.get("attention_mask", torch.ones(shape, device=embeddings.device))
    if mask.shape != shape:
        raise ValueError(f"expected attention_mask of shape {list(shape)}, got {list(mask.shape)}")
    return inputs, embeddings.float(), mask.bool()


def record_routing(
    adapter: MoeAdapter, batch: Batch, *, layers: list[int] | None = None, top: int = 30
) -> RoutingRecord:
    """Run the stack on a batch and record what its routers decide.

    Args:
        adapter: The model, as it is or offloaded with exact routing.
        batch: What the model takes; only ids (or embeddings) and mask are used.
        layers: MoE layers to record; by default all predictable ones.
        top: Logits kept for each token.

    Raises:
        RuntimeError: A router did not run.
    """
    layers = adapter.predictable if layers is None else layers
    stack, routers = adapter.stack(), adapter.routers()
    outputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def hook(layer: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[layer] = adapter.routing(layer, output)

        return keep

    with evaluation_mode(stack):
        inputs, embeddings, mask = stack_inputs(adapter, batch)
        handles = [routers[layer].register_forward_hook(hook(layer)) for layer in layers]
        try:
            stack(**inputs)
        finally:
            for handle in handles:
                handle.remove()
    for layer in layers:
        if layer not in outputs:
            raise RuntimeError(
                f"the router of {adapter.layer_names[layer]} did not run; "
                "routing is recorded from a model that routes exactly"
            )
    rows = mask.flatten()
    logits = torch.stack([outputs[layer][0].flatten(0, -2)[rows].float() for layer in layers])
    experts = torch.stack([outputs[layer][1].flatten(0, -2)[rows].long() for layer in layers])
    weights = torch.stack([outputs[layer][2].flatten(0, -2)[rows].float() for layer in layers])
    dropped = (experts < 0) | (experts >= adapter.num_experts)
    top_logits, top_ids = logits.topk(min(top, adapter.num_experts), -1)
    return RoutingRecord(
        embeddings, mask, top_logits, top_ids, experts.masked_fill(dropped, -1), weights
    )
