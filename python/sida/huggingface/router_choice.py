# SPDX-License-Identifier: Apache-2.0
"""The experts that a router chooses, without the weights that it gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CORRECTION = "e_score_correction_bias"
"""What routers that choose by corrected sigmoids (as DeepSeek-V3) call the correction."""
ROWS = 512
"""Random inputs by which a router's form is told: enough for roundings to show."""


@dataclass(frozen=True, eq=False)
class LinearRouter:
    """A router that chooses the best of a linear map's results, as a kernel of sida's asks it.

    With a correction it compares sigmoids to which that is added.
    """

    module: nn.Module
    """The router."""
    owner: nn.Module
    """The module that has the map's weight: the router, or a part of it."""
    weight: Tensor
    """[E, H]."""
    bias: Tensor | None
    """[E] float32."""
    correction: Tensor | None
    """[E] float32."""
    top_k: int

    @classmethod
    def of(
        cls, module: nn.Module, owner: nn.Module, correction: Tensor | None, top_k: int
    ) -> LinearRouter:
        """Take a router's weights as they are now."""
        weight = owner.weight
        assert isinstance(weight, Tensor)
        added = (_added(getattr(owner, "bias", None)), _added(correction))
        return cls(module, owner, weight.detach(), *added, top_k)

    def is_of(self, module: nn.Module) -> bool:
        """Whether these are still a router's weights."""
        weight: Any = self.owner.weight
        return module is self.module and weight.data_ptr() == self.weight.data_ptr()

    def fits(self, hidden: Tensor) -> bool:
        """Whether the kernel reads weights of this kind beside such hidden states."""
        weight = self.weight
        return (
            weight.device == hidden.device
            and weight.dtype in (torch.float32, hidden.dtype)
            and weight.shape[1:] == hidden.shape[1:]
            and weight.is_contiguous()
            and weight.data_ptr() % 16 == 0
        )


def _added(values: Any) -> Tensor | None:
    return values.detach().float().contiguous() if isinstance(values, Tensor) else None


@dataclass(frozen=True)
class ChoiceForm:
    """A router that chooses the best of a linear map's results, for each token by itself."""

    is_corrected: bool
    """Whether it compares sigmoids to which a correction is added; else the results themselves."""
    in_float32: bool
    """Whether the map is computed in float32; else in the dtype of the input."""
    is_sorted: bool
    """Whether the best comes first."""
    top_k: int

    @classmethod
    def of(
        cls, router: nn.Module, hidden: Tensor, choose: Callable[[Tensor], Tensor]
    ) -> ChoiceForm | None:
        """Tell the form by what the router does, since families spell it in many ways.

        Args:
            router: The module.
            hidden: An input, [T, H], that those to come are like in width, dtype and device.
            choose: Gives the router's expert ids [T, k] for inputs [T, H].

        Returns:
            The form whose choices are the router's, ties aside; None if there is none.
        """
        weight = getattr(router, "weight", None)
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
            return None  # of a kind with arithmetic of its own
        if weight.shape[1:] != hidden.shape[1:]:
            return None
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(ROWS, hidden.shape[1], generator=generator).to(hidden)
        spread = float(F.linear(rows.float(), weight.detach().float()).std())
        if not 0 < spread < torch.inf:  # all are equal: nothing can be told
            return None
        rows = rows / spread  # such that sigmoids are not all 0 or 1
        ids = choose(rows).view(ROWS, -1)
        is_corrected = isinstance(getattr(router, CORRECTION, None), Tensor)
        # float32 first: scores that are rounded tie, and take more choices for the same
        is_float32 = weight.dtype == hidden.dtype == torch.float32
        widths = [True] * (not is_float32) + [False] * (weight.dtype == hidden.dtype)
        for in_float32, is_sorted in product(widths, (True, False)):
            form = cls(is_corrected, in_float32, is_sorted, ids.shape[1])
            scores = form.scores(router, rows)
            chosen = scores.gather(1, ids.long().clamp(0, scores.shape[1] - 1))
            if torch.equal(scores.gather(1, form.best(scores)), chosen):
                return form
        return None

    def linear(self, router: nn.Module) -> LinearRouter:
        """Return the weights of a router of this form."""
        correction = getattr(router, CORRECTION) if self.is_corrected else None
        return LinearRouter.of(router, router, correction, self.top_k)

    def choose(self, router: nn.Module, hidden: Tensor) -> Tensor:
        """Return the expert ids [T, k] int64 that a router of this form chooses."""
        return self.best(self.scores(router, hidden))

    def scores(self, router: nn.Module, hidden: Tensor) -> Tensor:
        """Return what the router compares, [T, experts]."""
        weight, bias = router.weight, getattr(router, "bias", None)
        assert isinstance(weight, Tensor)
        if self.in_float32:
            hidden, weight = hidden.float(), weight.float()
            bias = None if bias is None else bias.float()
        scores = F.linear(hidden, weight, bias)
        return scores.sigmoid() + getattr(router, CORRECTION) if self.is_corrected else scores

    def best(self, scores: Tensor) -> Tensor:
        """Return the places of the best scores, [T, k]."""
        return scores.topk(self.top_k, sorted=self.is_sorted).indices
