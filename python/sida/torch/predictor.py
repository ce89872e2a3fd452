# SPDX-License-Identifier: Apache-2.0
"""A trained predictor of a model's routing, and its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sida.torch.architectures import Network, make_network
from sida.torch.teacher import Batch, MoeAdapter

if TYPE_CHECKING:
    from sida.torch.evaluation import Evaluation

FORMAT, VERSION = "sida-predictor", "1"


class Candidates(NamedTuple):
    """The experts that a predictor names, most probable first; lower ids first among equals."""

    ids: Tensor
    """[heads, B, S, candidates] int64; -1 for padding."""
    probs: Tensor
    """[heads, B, S, candidates] float32; 0 for padding."""
    scale: Tensor
    """[heads, B, S, candidates] float32: weights that the router would return."""


class Predictor:
    """Foretells from token embeddings which experts a model's MoE layers will use.

    Attributes:
        kind: "lstm", "causal_lstm", "transformer" or "token".
        network: The torch module.
        layers: MoE layers of the model.
        heads: Index of the MoE layer that each head of the network predicts.
        fingerprint: The model's; a predictor is of no use to another model.
    """

    def __init__(
        self, kind: str, network: Network, *, layers: int, heads: list[int], fingerprint: str
    ) -> None:
        if len(heads) != network.heads or sorted(set(heads)) != heads:
            raise ValueError(
                f"expected the {network.heads} heads' layers in rising order, got {heads}"
            )
        if not all(0 <= head < layers for head in heads):
            raise ValueError(f"expected heads of layers 0 to {layers - 1}, got {heads}")
        self.kind, self.network, self.layers = kind, network.eval(), layers
        self.heads, self.fingerprint = heads, fingerprint

    def __repr__(self) -> str:
        return (
            f"Predictor(kind={self.kind!r}, layers={self.layers}, heads={self.heads}, "
            f"experts={self.network.experts}, embedding_size={self.network.embedding_size}, "
            f"hidden_size={self.network.hidden_size})"
        )

    @torch.no_grad()
    def predict(self, embeddings: Tensor, mask: Tensor, candidates: int = 8) -> Candidates:
        """Name the likeliest experts of every token.

        Args:
            embeddings: [B, S, D], on the network's device.
            mask: [B, S], nonzero for tokens.
            candidates: Experts to name for each token, at most.
        """
        mask = mask.bool()
        logits, scales = self.network(embeddings.float(), mask)
        probs, ids = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        count = min(candidates, self.network.experts)
        probs, ids = probs[..., :count], ids[..., :count]

        def spread(values: Tensor, pad: float) -> Tensor:
            table = values.new_full((self.network.heads, *mask.shape, count), pad)
            table[:, mask] = values
            return table

        return Candidates(spread(ids, -1), spread(probs, 0.0), spread(scales.gather(-1, ids), 0.0))

    def check_fits(self, adapter: MoeAdapter) -> None:
        """Raise unless the predictor was trained for this model.

        Raises:
            ValueError: The model has other layers, experts or weights.
        """
        for name, own, model in (
            ("MoE layers", self.layers, len(adapter.layer_names)),
            ("experts", self.network.experts, adapter.num_experts),
            ("fingerprint", self.fingerprint, adapter.fingerprint()),
        ):
            if own != model:
                raise ValueError(
                    f"the predictor was trained for another model: {name} {own}, but the model "
                    f"has {model}; train one with sida.train_predictor(model, batches)"
                )

    def evaluate(
        self,
        model: nn.Module | MoeAdapter,
        batches: Iterable[Batch],
        fn: Callable[[Any, Any], Any] | None = None,
    ) -> Evaluation:
        """Measure how well the predictor does on `batches`; see `sida.torch.evaluation`."""
        from sida.torch.evaluation import evaluate

        return evaluate(self, model, batches, fn)

    def metadata(self) -> dict[str, str]:
        """Return what the file says of the predictor beside its tensors."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "layers": str(self.layers),
            "heads": ",".join(map(str, self.heads)),
            "experts": str(self.network.experts),
            "embedding_size": str(self.network.embedding_size),
            "hidden_size": str(self.network.hidden_size),
            "scale_factor": repr(self.network.scale_factor),
            "fingerprint": self.fingerprint,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {
            name: value.detach().to("cpu", torch.float32).contiguous().clone()
            for name, value in self.network.state_dict().items()
        }
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            partial.write_bytes(save(tensors, self.metadata()))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def load_predictor(path: str | os.PathLike[str]) -> Predictor:
    """Read a predictor that `Predictor.save` wrote; its network is on the CPU.

    Raises:
        OSError: There is no such file, or it is not a predictor's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a predictor's file, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise OSError(f"{path}: expected a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise OSError(
            f"{path}: expected format {FORMAT!r} version {VERSION!r}, got "
            f"{metadata.get('format')!r} version {metadata.get('version')!r}"
        )
    try:
        heads = [int(head) for head in metadata["heads"].split(",")]
        network = make_network(
            metadata["kind"],
            int(metadata["embedding_size"]),
            int(metadata["experts"]),
            len(heads),
            hidden_size=int(metadata["hidden_size"]),
            scale_factor=float(metadata["scale_factor"]),
        )
        network.load_state_dict(tensors)
        return Predictor(
            metadata["kind"],
            network,
            layers=int(metadata["layers"]),
            heads=heads,
            fingerprint=metadata["fingerprint"],
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise OSError(f"{path}: the predictor is damaged: {error}") from error
