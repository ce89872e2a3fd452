# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of small models in fp8 with block scales (DeepSeek-V3) and MXFP4 (gpt-oss)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from family_models import BASE, FAMILIES, make_family
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""What the lower three of four bits stand for; the highest is the sign."""


def write_fp8(
    folder: Path, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, Tensor]:
    """Write a DeepSeek-V3 in fp8; returns its tensors dequantised."""
    sizes = {"q_lora_rank": 20, "first_k_dense_replace": 1, **changes}
    make_family("deepseek_v3", **sizes).save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = plain[name] = weight
            continue
        scales = _largest(weight.abs(), block) / 448
        scales = scales.clamp(min=1e-12).to(scale_dtype)
        spread = _spread(scales.float(), block, weight)
        stored[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        plain[name] = stored[name].float() * spread
    _write(folder, stored, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)})
    return plain


def _largest(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Of each block, those at the edges not being full."""
    rows = [band.amax(0) for band in torch.split(weight, block[0])]
    return torch.stack(
        [torch.stack([run.amax() for run in torch.split(row, block[1])]) for row in rows]
    )


def _spread(scales: Tensor, block: tuple[int, int], weight: Tensor) -> Tensor:
    rows = scales.repeat_interleave(block[0], 0)[: weight.shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : weight.shape[1]]


def write_mxfp4(folder: Path, **changes: Any) -> None:
    """Write a gpt-oss with its experts in MXFP4."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, **changes}
    make_family("gpt_oss", **sizes).save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith((".gate_up_proj", ".down_proj")):
            stored[name] = weight
            continue
        rows = weight.transpose(1, 2)  # [experts, out, in]
        groups = rows.reshape(*rows.shape[:2], -1, 32)
        exponents = (groups.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        nearest = (groups.abs() / exponents.exp2()).unsqueeze(-1) - E2M1
        codes = nearest.abs().argmin(-1) + 8 * (groups < 0)
        stored[f"{name}_blocks"] = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = (exponents.squeeze(-1) + 127).to(torch.uint8)
    _write(folder, stored, {"quant_method": "mxfp4"})


def _write(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any]) -> None:
    """In place of a plain checkpoint, in two shards, weights and their scales apart."""
    (folder / "model.safetensors").unlink()
    parts: list[dict[str, Tensor]] = [{}, {}]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        parts[number % 2][name] = tensor.contiguous()
    _write_shards(folder, parts)
    change_config(folder, quantization_config=quantisation)


def _write_shards(folder: Path, parts: Iterable[dict[str, Tensor]]) -> None:
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(part, file))
    contents = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(contents))


def change_config(folder: Path, **changes: Any) -> None:
    """Change fields of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


LARGE = {"vocab_size": 2000, "hidden_size": 512, "max_position_embeddings": 256}
EXPERTS, LAYERS, WIDTH = 96, 4, 512


def write_large_fp8(folder: Path) -> int:
    """Write a DeepSeek-V3 whose experts take 600 MB in bf16; returns bytes of the others."""
    size = WIDTH * WIDTH

    def experts(layer: int) -> Iterator[tuple[str, Tensor]]:
        for expert in range(EXPERTS):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                codes = torch.randint(0, 126, (size,), dtype=torch.uint8)  # none of them NaN
                yield name, codes.view(torch.float8_e4m3fn).view(WIDTH, WIDTH)
                yield f"{name}_scale_inv", torch.full((4, 4), 1e-4)

    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    sizes = {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH}
    return _write_large(folder, "deepseek_v3", sizes, experts, quantisation)


def write_large_mxfp4(folder: Path) -> int:
    """Write a gpt-oss whose experts take 600 MB in bf16; returns bytes of the others."""

    def experts(layer: int) -> Iterator[tuple[str, Tensor]]:
        for matrix, rows in (("gate_up_proj", 2 * WIDTH), ("down_proj", WIDTH)):
            name = f"model.layers.{layer}.mlp.experts.{matrix}"
            shape = (EXPERTS, rows, WIDTH // 32)
            yield f"{name}_blocks", torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            yield f"{name}_scales", torch.full(shape, 120, dtype=torch.uint8)
            yield f"{name}_bias", torch.zeros(EXPERTS, rows, dtype=torch.bfloat16)

    sizes = {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}
    sizes["layer_types"] = ["full_attention"] * LAYERS
    return _write_large(folder, "gpt_oss", sizes, experts, {"quant_method": "mxfp4"})


def _write_large(
    folder: Path,
    family: str,
    sizes: dict[str, Any],
    experts: Callable[[int], Iterable[tuple[str, Tensor]]],
    quantisation: dict[str, Any],
) -> int:
    name, values = FAMILIES[family]
    kind: Any = getattr(transformers, name)
    changes = {**LARGE, "num_hidden_layers": LAYERS, **sizes}
    config = kind.config_class(**{**BASE, **values, **changes}, architectures=[name])
    config.save_pretrained(folder)
    change_config(folder, quantization_config=quantisation, dtype="bfloat16")
    with torch.device("meta"):
        model = kind(config)
    others = {
        name: torch.randn(parameter.shape).to(torch.bfloat16) * 0.05
        for name, parameter in model.named_parameters()
        if ".experts." not in name
    }
    _write_shards(folder, itertools.chain([others], (dict(experts(i)) for i in range(LAYERS))))
    return sum(weight.nbytes for weight in others.values())
