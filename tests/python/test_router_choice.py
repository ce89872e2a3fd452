# SPDX-License-Identifier: Apache-2.0
"""Which experts a router chooses is computed without its weights only where that is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sida.huggingface.router_choice import CORRECTION, ChoiceForm

EXPERTS, WIDTH, TOP_K = 12, 24, 3


class Router(nn.Module):
    """Chooses by what a subclass makes of the linear map's results."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(EXPERTS, WIDTH, generator=generator)
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return expert ids."""
        return self.scores(hidden).topk(TOP_K).indices

    def scores(self, hidden: Tensor) -> Tensor:
        """Return what is compared."""
        return F.linear(hidden.float(), self.weight.float()).softmax(-1)


class Own(Router):
    """Computes in its input's dtype."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Return what is compared."""
        return F.linear(hidden, self.weight)


class Corrected(Router):
    """Adds a correction to sigmoids."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer(CORRECTION, torch.linspace(-1, 1, EXPERTS))

    def scores(self, hidden: Tensor) -> Tensor:
        """Return what is compared."""
        correction = getattr(self, CORRECTION)
        return F.linear(hidden.float(), self.weight.float()).sigmoid() + correction


class WorstFirst(Router):
    """The chosen ones in another order."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return expert ids."""
        return super().forward(hidden).flip(-1)


class Grouped(Router):
    """Leaves half of the experts out by what the halves have in all."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Return what is compared."""
        halves = super().scores(hidden).unflatten(-1, (2, -1))
        best = halves.sum(-1, keepdim=True)
        return (halves * (best == best.amax(-2, keepdim=True))).flatten(-2)


class Least(Router):
    """Chooses the worst."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Return what is compared."""
        return -super().scores(hidden)


def inputs(dtype: torch.dtype) -> Tensor:
    """Return inputs that no form was told by."""
    return torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Router, Own, Corrected])
def test_a_form_that_is_known_chooses_what_the_router_does(
    kind: type[Router], dtype: torch.dtype
) -> None:
    router, hidden = kind(dtype), inputs(dtype)
    form = ChoiceForm.of(router, hidden, router)
    assert form is not None
    assert form.is_corrected == (kind is Corrected)
    scores = router.scores(hidden)
    chosen = form.choose(router, hidden)
    if kind is Own and dtype == torch.bfloat16:  # what ties when rounded may be told apart
        assert scores.gather(1, chosen).ge(scores.topk(TOP_K).values[:, -1:]).all()
    else:
        assert torch.equal(scores.gather(1, chosen), scores.topk(TOP_K).values)


@pytest.mark.parametrize("kind", [WorstFirst, Grouped, Least])
def test_of_another_form_the_router_itself_is_asked(kind: type[Router]) -> None:
    router = kind(torch.float32)
    assert ChoiceForm.of(router, inputs(torch.float32), router) is None


def test_a_router_without_a_plain_weight_has_no_form() -> None:
    router = nn.Sequential(Router(torch.float32))
    assert ChoiceForm.of(router, inputs(torch.float32), router) is None
    constant = Router(torch.float32)
    constant.weight.zero_()
    assert ChoiceForm.of(constant, inputs(torch.float32), constant) is None


def test_a_form_goes_by_the_weights_at_hand() -> None:
    router = Router(torch.float32)
    form = ChoiceForm.of(router, inputs(torch.float32), router)
    assert form is not None
    router.weight.neg_()
    hidden = inputs(torch.float32)
    assert torch.equal(form.choose(router, hidden).sort().values, router(hidden).sort().values)
