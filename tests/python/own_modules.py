# SPDX-License-Identifier: Apache-2.0
"""MoE modules that are not from transformers, in several forms, and their adapters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sida

VOCABULARY, HIDDEN, SIZE, EXPERTS, TOP_K, LAYERS = 40, 24, 20, 5, 2, 3


class Expert(nn.Module):
    """Two matrices with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, SIZE), nn.Linear(SIZE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedExpert(nn.Module):
    """Three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(HIDDEN, SIZE, bias=False) for _ in range(2))
        self.w2 = nn.Linear(SIZE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Stack(nn.Module):
    """All experts in two tensors; called as sida calls experts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(EXPERTS, 2 * SIZE, HIDDEN) * HIDDEN**-0.5)
        self.outer = nn.Parameter(torch.randn(EXPERTS, HIDDEN, SIZE) * SIZE**-0.5)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("th,tkih->tki", x, self.inner[ids]).chunk(2, -1)
        y = torch.einsum("tki,tkhi->tkh", F.relu(gate).square() * up, self.outer[ids])
        return (y * weights[..., None]).sum(1)


class Moe(nn.Module):
    """A router, and a list of experts that it goes through itself."""

    expert: ClassVar[type[nn.Module]] = Expert
    top_k = TOP_K

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.ffn = nn.ModuleList(self.expert() for _ in range(EXPERTS))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (4 * self.router(x)).softmax(-1).topk(TOP_K)
        return ids, weights

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        rows = x.flatten(0, -2)
        ids, weights = self.route(rows)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.ffn):
            token, choice = (ids == e).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(rows[token]) * weights[token, choice, None])
        return out.view_as(x) * scale


class GatedMoe(Moe):
    expert = GatedExpert


class StackedMoe(nn.Module):
    """A router, and experts in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = Stack()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        rows = x.flatten(0, -2)
        weights, ids = (4 * self.router(rows)).softmax(-1).topk(TOP_K)
        return self.experts(rows, ids, weights).view_as(x) * scale


class BareMoe(nn.Module):
    """A router among the parameters of the experts, whose matrices are transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(EXPERTS, HIDDEN, SIZE) * HIDDEN**-0.5)
        self.inner_bias = nn.Parameter(torch.randn(EXPERTS, SIZE) / 2)
        self.router = nn.Parameter(torch.randn(HIDDEN, EXPERTS) * HIDDEN**-0.5)
        self.outer = nn.Parameter(torch.randn(EXPERTS, SIZE, HIDDEN) * SIZE**-0.5)
        self.register_buffer("scale", torch.tensor(4.0))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (self.scale * (x @ self.router)).softmax(-1).topk(TOP_K)
        return ids, weights

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        rows = x.flatten(0, -2)
        ids, weights = self.route(rows)
        y = torch.einsum("th,tkhi->tki", rows, self.inner[ids]) + self.inner_bias[ids]
        y = torch.einsum("tki,tkih->tkh", F.gelu(y, approximate="tanh"), self.outer[ids])
        return (y * weights[..., None]).sum(1).view_as(x) * scale


class ListsMoe(nn.Module):
    """A router, and lists of matrices beside it, those of the gate too."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.ModuleList(nn.Linear(HIDDEN, SIZE, bias=False) for _ in range(EXPERTS))
        self.w2 = nn.ModuleList(nn.Linear(SIZE, HIDDEN, bias=False) for _ in range(EXPERTS))
        self.w3 = nn.ParameterList(torch.randn(SIZE, HIDDEN) / 5 for _ in range(EXPERTS))
        self.router = nn.Linear(HIDDEN, EXPERTS)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = (4 * self.router(x)).softmax(-1).topk(TOP_K)
        return ids, weights

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        rows = x.flatten(0, -2)
        ids, weights = self.route(rows)
        all_experts = torch.stack(
            [
                w2(F.silu(w1(rows)) * F.linear(rows, w3))
                for w1, w2, w3 in zip(self.w1, self.w2, self.w3, strict=True)
            ],
            1,
        )
        chosen = all_experts.gather(1, ids[..., None].expand(-1, -1, HIDDEN))
        return (chosen * weights[..., None]).sum(1).view_as(x) * scale


class Model(nn.Module):
    """Embeds, mixes each token with those before it, and sends it through MoE modules."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = F.layer_norm(x + x.cumsum(1) / 4, (HIDDEN,))
            x = x + layer(x, scale=1.5)
        return self.head(x)


class ListAdapter(sida.ModuleAdapter):
    """For modules that go through a list of experts."""

    module_class = Moe
    experts_name = "ffn"
    names: ClassVar[dict[str, str]] = {
        "fc1": "up_proj", "fc2": "down_proj", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
    }  # fmt: skip

    def activation(self, module: Any) -> str:
        return "silu" if isinstance(module, GatedMoe) else "gelu"

    def experts_per_token(self, module: Any) -> int:
        return TOP_K

    def parameter_name(self, name: str) -> str:
        expert, matrix, kind = name.split(".")
        return f"{expert}.{self.names[matrix]}.{kind}"

    def forward(self, module: Any, experts: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        rows = x.flatten(0, -2)
        return experts(rows, *module.route(rows)).view_as(x) * scale

    def choose_experts(self, module: Any, hidden_states: Tensor) -> Tensor:
        return module.route(hidden_states)[0]


class StackAdapter(sida.ModuleAdapter):
    """For modules whose experts are one module."""

    module_class = StackedMoe

    def activation(self, module: Any) -> str:
        return "relu2"

    def experts_per_token(self, module: Any) -> int:
        return TOP_K

    def parameter_name(self, name: str) -> str:
        return {"inner": "gate_up_proj", "outer": "down_proj"}[name]


class BareAdapter(sida.ModuleAdapter):
    """For modules that hold the experts' parameters themselves."""

    module_class = BareMoe
    experts_name = ""
    names: ClassVar[dict[str, str]] = {
        "inner": "up_proj", "inner_bias": "up_proj_bias", "outer": "down_proj",
    }  # fmt: skip

    def activation(self, module: Any) -> str:
        return "gelu_tanh"

    def experts_per_token(self, module: Any) -> int:
        return TOP_K

    def transposed(self, module: Any) -> bool:
        return True

    def parameter_name(self, name: str) -> str | None:
        return self.names.get(name)

    def forward(self, module: Any, experts: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        rows = x.flatten(0, -2)
        return experts(rows, *module.route(rows)).view_as(x) * scale

    def choose_experts(self, module: Any, hidden_states: Tensor) -> Tensor:
        return module.route(hidden_states)[0]


class ListsAdapter(BareAdapter):
    """For modules that hold them in lists."""

    module_class = ListsMoe
    names: ClassVar[dict[str, str]] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

    def activation(self, module: Any) -> str:
        return "silu"

    def transposed(self, module: Any) -> bool:
        return False

    def parameter_name(self, name: str) -> str | None:
        matrix, expert, *_ = name.split(".")
        return f"{expert}.{self.names[matrix]}.weight" if matrix in self.names else None


ADAPTERS = {
    Moe: ListAdapter,
    GatedMoe: ListAdapter,
    StackedMoe: StackAdapter,
    BareMoe: BareAdapter,
    ListsMoe: ListsAdapter,
}
IN_PLACE = (Moe, StackedMoe)
"""Modules whose experts lie as sida's kernels read them."""


def make_own(kind: type[nn.Module], seed: int = 0) -> Model:
    """A model in evaluation mode; experts weigh enough for one of them to be missed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Model(kind)
        for name, parameter in model.named_parameters():
            if ".ffn." in name:
                parameter.data.mul_(2)
    return model.eval()


def make_ids(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (3, 9), generator=generator)
