# SPDX-License-Identifier: Apache-2.0
"""A decoder in plain PyTorch whose MoE module sida is taught, with few of its experts in memory.

python examples/python/own_module.py
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sida

WORDS, HIDDEN, SIZE, EXPERTS, TOP_K, LAYERS = 256, 64, 128, 16, 2, 4


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, SIZE, bias=False) for _ in range(2))
        self.out = nn.Linear(SIZE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.silu(self.gate(x)) * self.up(x))
        return out


class Moe(nn.Module):
    """Each token goes to 2 of 16 experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.router(rows).softmax(-1).topk(TOP_K)
        return index, weights

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        index, weights = self.route(rows)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, choice = (index == number).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(rows[token]) * weights[token, choice, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))
        self.qkv, self.mix = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.moe = Moe()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.moe(self.norms[1](x))
        return out


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(WORDS, HIDDEN), nn.Embedding(128, HIDDEN)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.position.weight[: input_ids.shape[1]]
        logits: Tensor = self.head(self.blocks(x))
        return logits


@sida.register_adapter
class MoeAdapter(sida.ModuleAdapter):
    """All that sida has to be told of Moe."""

    module_class = Moe

    def activation(self, module: nn.Module) -> str:
        return "silu"

    def experts_per_token(self, module: nn.Module) -> int:
        return TOP_K

    def parameter_name(self, name: str) -> str:  # "3.gate.weight" and so on
        number, matrix, _ = name.split(".")
        names = {"gate": "gate_proj", "up": "up_proj", "out": "down_proj"}
        return f"{number}.{names[matrix]}.weight"

    def forward(self, module: Any, experts: nn.Module, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # as Moe.forward, which goes through its experts by itself
        out: Tensor = experts(rows, *module.route(rows))
        return out.view_as(x)


@torch.no_grad()
def write(model: nn.Module, ids: Tensor, tokens: int = 16) -> Tensor:
    for _ in range(tokens):
        ids = torch.cat([ids, model(input_ids=ids)[:, -1:].argmax(-1)], 1)
    return ids


if __name__ == "__main__":
    torch.manual_seed(0)
    model, prompt = Decoder().eval(), torch.randint(WORDS, (2, 8))
    expected = write(model, prompt)
    for memory in ("1 expert", 0.25, 1.0):
        with sida.offload(model, memory=memory) as off:
            same = torch.equal(write(off.model, prompt), expected)
            stats = off.stats()
        rate = stats["hits"] / stats["uses"]
        print(f"memory={memory!r}: the same words {same}, {rate:.0%} of the experts were there")
    assert torch.equal(write(model, prompt), expected)  # closed: the model has its experts again
