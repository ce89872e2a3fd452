# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in fp8 with block scales and in MXFP4, against transformers with the same numbers."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from family_models import generate, make_family, make_prompt
from packed_checkpoints import (
    change_config,
    write_fp8,
    write_large_fp8,
    write_large_mxfp4,
    write_mxfp4,
)
from safetensors.torch import load_file, save_file
from switch_models import experts_of, relative, run
from typer.testing import CliRunner

import sida
from sida.cli.app import app

BUDGETS = ("1 expert", 0.25, 1.0)


class Packed:
    """A packed checkpoint, and transformers' model with the numbers that it stands for."""

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder, self.model = folder, model.eval()
        self.prompt = make_prompt()
        self.logits = run(self.model, self.prompt)
        self.tokens = generate(self.model, self.prompt)


def deepseek_by_hand(folder: Path) -> Packed:
    """transformers refuses blocks that are not full, as DeepSeek-V3's own kv_a_proj has them."""
    plain = folder.parent / "plain"
    tensors = write_fp8(folder, (16, 12))
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    config.save_pretrained(plain)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    return Packed(folder, transformers.DeepseekV3ForCausalLM.from_pretrained(plain))


def deepseek(folder: Path) -> Packed:
    write_fp8(folder, (4, 8), q_lora_rank=24)
    kind = transformers.DeepseekV3ForCausalLM
    return Packed(folder, kind.from_pretrained(folder, dtype=torch.float32))


def gpt_oss(folder: Path) -> Packed:
    write_mxfp4(folder)
    model = transformers.GptOssForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Packed(folder, model.float())  # 5.17 leaves experts in bfloat16, which has their numbers


@pytest.fixture(scope="module", params=[deepseek_by_hand, deepseek, gpt_oss])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    made: Packed = request.param(tmp_path_factory.mktemp("checkpoint") / "packed")
    return made


@pytest.mark.parametrize("memory", BUDGETS)
def test_same_as_transformers_with_the_dequantised_weights(packed: Packed, memory: Any) -> None:
    with sida.from_pretrained(packed.folder, memory=memory, dtype=torch.float32) as off:
        assert not experts_of(off.model)
        assert relative(run(off.model, packed.prompt), packed.logits) <= 1e-5
        assert generate(off.model, packed.prompt) == packed.tokens
        assert off.stats()["uses"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_weights_are_the_dequantised_ones_to_the_bit(packed: Packed, dtype: str) -> None:
    expected = dict(packed.model.named_parameters())
    with sida.from_pretrained(packed.folder, memory=0.5, dtype=dtype) as off:
        weights = dict(off.model.named_parameters())
    assert any(name.endswith("o_proj.weight") for name in weights)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name].to(weight.dtype)), name


def test_the_same_bits_at_every_budget_in_bfloat16_where_no_dtype_is_said(packed: Packed) -> None:
    change_config(packed.folder, dtype=None, torch_dtype=None)
    outputs = []
    for memory in BUDGETS:
        with sida.from_pretrained(packed.folder, memory=memory) as off:
            outputs.append(run(off.model, packed.prompt))
    assert all(output.dtype == torch.bfloat16 for output in outputs)
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert relative(outputs[0].float(), packed.logits) <= 0.05


def test_saving_writes_the_dequantised_weights(packed: Packed, tmp_path: Path) -> None:
    with sida.from_pretrained(packed.folder, memory="1 expert", dtype="float32") as off:
        off.model.save_pretrained(tmp_path)
    saved = type(packed.model).from_pretrained(tmp_path, dtype="float32")
    expected = packed.model.state_dict()
    assert saved.state_dict().keys() == expected.keys()
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def bytes_of_experts(folder: Path) -> int:
    return sum(
        tensor.numel() * tensor.itemsize
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".experts." in name
    )


def test_the_compression_given_up_is_said_once(
    packed: Packed, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, logger="sida"),
        sida.from_pretrained(packed.folder, memory=0.5, dtype="bfloat16") as off,
    ):
        stats = off.stats()
        generate(off.model, packed.prompt)
    (record,) = caplog.records
    lost = stats["total_experts"] * stats["slot_bytes"] / bytes_of_experts(packed.folder)
    assert record.name == "sida" and record.levelno == logging.WARNING
    assert f" {lost:.2f} times as much in bf16" in record.message
    assert lost > (1.5 if "fp8" in record.message else 3)


def test_nothing_is_said_of_plain_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_family("olmoe").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="sida"):
        sida.from_pretrained(tmp_path, memory=0.5, dtype="bfloat16").close()
    assert not caplog.records


def test_inspect_says_what_compression_is_given_up(packed: Packed) -> None:
    runner = CliRunner(env={"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"})
    result = runner.invoke(app, ["inspect", str(packed.folder), "--json"])
    found = json.loads(result.stdout)
    stored = bytes_of_experts(packed.folder)
    experts, others = [], []
    for name, tensor in packed.model.state_dict().items():
        (experts if ".experts." in name else others).append(tensor.numel())
    assert found["stored_bytes"] == stored and found["dtype"] == "bf16"
    assert found["ratio_lost"] == found["all_experts_bytes"] / stored
    assert found["all_experts_bytes"] == pytest.approx(2 * sum(experts), rel=0.05)  # aligned
    assert found["expert_parameters"] == sum(experts)
    assert found["other_parameters"] == sum(others)
    report = runner.invoke(app, ["inspect", str(packed.folder)]).stdout
    assert f"take {found['ratio_lost']:.2f} times as much in bf16" in report
    assert found["packing"] in report


def change_tensor(folder: Path, name: str, tensor: Any) -> None:
    """Replace a tensor, add it to the first shard, or take it out where it is None."""
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    places = contents["weight_map"]
    file = folder / places.setdefault(name, "model-1.safetensors")
    tensors = load_file(file)
    tensors[name] = tensor
    if tensor is None:
        del tensors[name], places[name]
    save_file(tensors, file, {"format": "pt"})
    index.write_text(json.dumps(contents))


def test_a_base_model_with_changes_to_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    write_fp8(folder, (4, 8), q_lora_rank=24)
    kind = transformers.DeepseekV3Model
    options: dict[str, Any] = {"num_experts_per_tok": 1, "attn_implementation": "eager"}
    expected = kind.from_pretrained(folder, dtype="float32", **options)
    with sida.from_pretrained(
        folder, memory=0.5, dtype="float32", model_class=kind, **options
    ) as off:
        assert type(off.model) is kind and off.model.config.num_experts_per_tok == 1
        assert off.model.config._attn_implementation == "eager"
        assert not hasattr(off.model.config, "quantization_config")
        assert relative(run(off.model, make_prompt()), run(expected, make_prompt())) <= 1e-5


def test_layers_that_the_model_leaves_out_may_be_in_fp8_too(tmp_path: Path) -> None:
    """DeepSeek-V3's checkpoints have one more layer, for predicting several tokens."""
    packed = deepseek(tmp_path / "packed")
    code = torch.ones(8, 8).to(torch.float8_e4m3fn)
    for name in ("eh_proj", "mlp.experts.0.up_proj"):
        change_tensor(packed.folder, f"model.layers.61.{name}.weight", code)
    with sida.from_pretrained(packed.folder, memory=0.5, dtype=torch.float32) as off:
        assert relative(run(off.model, packed.prompt), packed.logits) <= 1e-5


@pytest.mark.parametrize(
    ("quantisation", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised (gptq): expected weights in float32"),
        ({"bits": 4}, "quantised (without a quant_method)"),
        ({"quant_method": "fp8"}, "two positive integers, as DeepSeek-V3 has them, got 'null'"),
        ({"quant_method": "fp8", "weight_block_size": [0, 8]}, "got '[0,8]'; fp8 with other scale"),
        (
            {"quant_method": "fp8", "weight_block_size": [4, 8], "activation_scheme": "static"},
            "got 'static': scales of activations are not supported",
        ),
    ],
)
def test_what_is_quantised_otherwise_is_refused(
    quantisation: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_fp8(tmp_path, (4, 8))
    change_config(tmp_path, quantization_config=quantisation)
    with pytest.raises((ValueError, OSError), match=re.escape(reason)):
        sida.from_pretrained(tmp_path, memory=0.5)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"
SCALES = f"{O_PROJ}_scale_inv"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        (f"{O_PROJ}_scale_inv", None, f"{O_PROJ} is in fp8: expected its scales in {O_PROJ}_scale"),
        (
            f"{O_PROJ}_scale_inv",
            torch.ones(1, 4),
            "expected shape [8, 4] (weight_block_size 4 x 8)",
        ),
        (f"{O_PROJ}_scale_inv", torch.ones(8, 4, dtype=torch.uint8), "got [8, 4] in U8"),
        (O_PROJ, torch.ones(32, 32).to(torch.float8_e5m2), "got shape [32, 32] in F8_E5M2"),
    ],
)
def test_weights_of_the_rest_without_the_right_scales_are_named(
    name: str, tensor: Any, reason: str, tmp_path: Path
) -> None:
    write_fp8(tmp_path, (4, 8))
    change_tensor(tmp_path, name, tensor)
    with pytest.raises(ValueError, match=re.escape(reason)):
        sida.from_pretrained(tmp_path, memory=0.5)


def test_a_weight_that_transformers_renames_is_refused(tmp_path: Path) -> None:
    """It would be left without its scales."""
    make_family("mixtral").save_pretrained(tmp_path)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(2, 4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fp8 = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    change_config(tmp_path, quantization_config=fp8)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is in fp8: expected a weight of that"):
        sida.from_pretrained(tmp_path, memory=0.5)


PEAK = r"""
import re, sys
import torch, transformers, sida
from transformers import DeepseekV3ForCausalLM, GptOssForCausalLM
import sida.huggingface
def peak():  # getrusage would count what the process that started this one had
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
off = sida.from_pretrained(sys.argv[1], memory=sys.argv[2])
with torch.no_grad():
    for step in range(3):
        off.model(input_ids=(torch.arange(512).view(4, 128) * 7 + step) % 2000)
stats = off.stats()
assert stats["uses"] > 100, stats
print(peak() - before, stats["total_experts"] * stats["slot_bytes"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_large_fp8, write_large_mxfp4])
def test_memory_never_holds_all_experts(write: Any, tmp_path: Path) -> None:
    others = write(tmp_path / "large")
    budget = 60 << 20
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "large"), f"{budget} bytes"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr
    grown, experts = map(int, done.stdout.split())
    print(f"experts {experts >> 20} MiB, others {others >> 20} MiB, grown {grown >> 20} MiB")
    assert experts > 500 << 20
    assert grown <= others + budget + (300 << 20)
    assert budget // 2 < grown < experts
