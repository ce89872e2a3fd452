# SPDX-License-Identifier: Apache-2.0
"""A torch module that has experts computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sida.torch import operators
from sida.torch.stand_in import StandIn


class ExpertsModule(StandIn):
    """Stands where a model keeps a layer's experts; has no parameters.

    Checks what the experts' arithmetic cannot honour, then calls `compute`; in a graph that is
    being compiled, through an operator of `sida.torch.operators`.

    Attributes:
        compute: (hidden states [T, H], ids [T, k], weights [T, k]) to [T, H]; None when closed.
        compute_predicted: The same without a router, where the layer is routed by hash table.
        num_experts: Experts of the layer.
        arrangement: Names where the experts are if all of them stay on the GPU, until another
            budget changes it; else empty. Graphs are compiled for one arrangement.
        load_all: Brings all experts of an arrangement.
        dropout: Share that the original experts drop in training.
    """

    def __init__(self, num_experts: int, dropout: float) -> None:
        super().__init__()
        self.compute: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.compute_predicted: Callable[[Tensor], Tensor] | None = None
        self.num_experts, self.dropout = num_experts, dropout
        self.arrangement = ""
        self.load_all: Callable[[], None] | None = None
        self._number = operators.register(self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts' weighted sum for every token.

        Where the layer is routed by hash table, it says nothing that the router chose.

        Raises:
            RuntimeError: Gradients or dropout are wanted, or the handle was closed.
        """
        if self.compute_predicted is not None:
            return self.predicted(hidden_states)
        self._check(hidden_states, top_k_weights)
        if torch.compiler.is_dynamo_compiling():
            given = hidden_states, top_k_index, top_k_weights, self._number
            out: Tensor = (
                operators.staying_experts(*given)
                if self.arrangement
                else operators.experts(operators.ORDER, *given)
            )
            return out
        return self.run(hidden_states, top_k_index, top_k_weights)

    def predicted(self, hidden_states: Tensor) -> Tensor:
        """Compute by hash table, with the same checks as `forward`."""
        self._check(hidden_states)
        if torch.compiler.is_dynamo_compiling():
            out: Tensor = operators.predicted_experts(operators.ORDER, hidden_states, self._number)
            return out
        return self.run_predicted(hidden_states)

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute, with nothing left to check but whether the handle was closed."""
        if self.compute is None:
            raise RuntimeError(CLOSED)
        return self.compute(hidden_states, top_k_index, top_k_weights)

    def run_staying(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Compute as `run`, where all experts stay; a CUDA graph may be captured, next time."""
        if self.load_all is not None and not torch.cuda.is_current_stream_capturing():
            self.load_all()
        return self.run(hidden_states, top_k_index, top_k_weights)

    def run_predicted(self, hidden_states: Tensor) -> Tensor:
        """Compute by hash table, as `run`."""
        if self.compute_predicted is None:
            raise RuntimeError(CLOSED)
        return self.compute_predicted(hidden_states)

    def extra_repr(self) -> str:
        """Return what repr(model) shows."""
        return f"{self.num_experts} experts, offloaded by sida"

    def _check(self, *tensors: Tensor) -> None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                "gradients do not flow through offloaded experts: call the model under "
                "torch.no_grad(), or model.requires_grad_(False) first"
            )
        if self.training and self.dropout > 0:
            raise RuntimeError(
                f"the model is in training mode, in which its experts have dropout "
                f"({self.dropout}); offloaded experts only do inference: call model.eval()"
            )


CLOSED = "the handle of this model's experts was closed; offload or load the model again"
