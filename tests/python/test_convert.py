# SPDX-License-Identifier: Apache-2.0
"""`sida convert`: safetensors of pickled checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open
from safetensors.torch import load_file
from switch_models import decoder_inputs, make_batch, make_encoder, make_model, run
from test_cli import check_failure, run_json
from test_cli import run as command

import sida
from sida.huggingface import converting


def write_pickles(folder: Path, tensors: Mapping[str, Any], shards: int = 1) -> Path:
    """Write pytorch_model.bin, or shards of it and their index; returns the folder."""
    folder.mkdir(exist_ok=True)
    if shards == 1:
        torch.save(dict(tensors), folder / "pytorch_model.bin")
        return folder
    places = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(list(tensors.items())[shard::shards])
        torch.save(part, folder / file)
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def read_all(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def is_same(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_reads_the_same_weights_from_it(shards: int, tmp_path: Path) -> None:
    model = make_model()
    source, target = tmp_path / "in", tmp_path / "out"
    weights = model.state_dict()
    write_pickles(source, weights, shards)
    model.config.save_pretrained(source)
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "tf_model.h5").write_text("weights for another library")
    done = run_json("convert", source, target, "--max-shard-size", "100KB")

    assert done["tensors"] == len(weights)
    assert done["bytes"] == sum(weight.nbytes for weight in weights.values())
    assert done["copied"] == ["config.json", "tokenizer.json"]
    assert (target / "tokenizer.json").read_text() == '{"version": "1.0"}'
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(done["files"]) > 2 and set(index["weight_map"].values()) == set(done["files"])
    written = {file.name for file in target.iterdir()}
    assert written == {*done["files"], *done["copied"], "model.safetensors.index.json"}
    assert max((target / file).stat().st_size for file in done["files"]) < 110_000

    loaded = type(model).from_pretrained(target)
    assert loaded.state_dict().keys() == weights.keys()
    assert all(is_same(loaded.state_dict()[name], weight) for name, weight in weights.items())
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight  # tied, as in the pickle
    batch = decoder_inputs(make_batch())
    with sida.offload(model, memory=1.0):
        expected = run(model, batch)
    with sida.from_pretrained(target, memory=0.2) as off:
        assert torch.equal(run(off.model, batch), expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_of_every_kind_are_copied_as_they_are(
    shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened anew for nearly each of them."""
    monkeypatch.setattr(converting, "MOST_MAPPED", 100)
    large = torch.randn(64, 32)
    tensors = {
        "large": large,
        "the same": large,
        "a part of it": large[3:5, 7],
        "turned": large.t(),
        "a parameter": torch.nn.Parameter(torch.randn(5)),
        "nothing": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "bf16": torch.randn(3, 3).to(torch.bfloat16),
        "f64": torch.randn(2, dtype=torch.float64),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
    }
    source = write_pickles(tmp_path / "in", tensors, shards)
    done = run_json("convert", source, tmp_path / "out")
    assert done["files"] == ["model.safetensors"] and done["copied"] == []
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    written = read_all(tmp_path / "out")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same = is_same(written[name].float(), tensor.detach().float())
        assert same and written[name].dtype == tensor.dtype, name
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 4 * large.nbytes
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_of_a_shard_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    source = write_pickles(tmp_path / "in", {"a": torch.ones(2), "b": torch.zeros(2)}, 2)
    index = source / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {"b": places["b"]}}))
    assert run_json("convert", source, tmp_path / "out")["tensors"] == 1
    assert list(read_all(tmp_path / "out")) == ["b"]


class Trap:
    """Leaves a file behind where its pickle is read as code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (os.fspath(self.file),)


def change_index(folder: Path, contents: Any) -> None:
    write_pickles(folder, {"a": torch.ones(2), "b": torch.ones(2)}, 2)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(contents))


def write_nothing(folder: Path) -> None:
    folder.mkdir()


def write_safetensors(folder: Path) -> None:
    make_encoder().save_pretrained(folder)


def write_code(folder: Path) -> None:
    write_pickles(folder, {"a": torch.ones(2), "b": Trap(folder / "trapped")})


def write_half(folder: Path) -> None:
    file = write_pickles(folder, {"a": torch.ones(1000)}) / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:2000])


def write_old_format(folder: Path) -> None:
    folder.mkdir()
    torch.save(
        {"a": torch.ones(2)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )


def write_one_tensor(folder: Path) -> None:
    folder.mkdir()
    torch.save(torch.ones(2), folder / "pytorch_model.bin")


REFUSED = {
    "nothing": (lambda folder: None, ["expected a checkpoint's folder, found none"]),
    "empty": (write_nothing, ["expected pytorch_model.bin or", "found neither"]),
    "safetensors": (write_safetensors, ["safetensors files already: use it as it is"]),
    "code": (write_code, ["expected tensors and nothing else", "what could run code"]),
    "half": (write_half, ["pytorch_model.bin is damaged"]),
    "old format": (write_old_format, ["as torch.save writes it since torch 1.6"]),
    "a tensor": (write_one_tensor, ["expected a dict of tensors by name, got Tensor"]),
    "nested": (
        lambda folder: write_pickles(folder, {"state_dict": {"a": torch.ones(2)}, "step": 3}),
        ["found dict at 'state_dict'", "save that entry alone"],
    ),
    "sparse": (
        lambda folder: write_pickles(folder, {"a": torch.ones(2).to_sparse()}),
        ["a is in torch.float32 (torch.sparse_coo)"],
    ),
    "complex": (
        lambda folder: write_pickles(folder, {"a": torch.ones(2, dtype=torch.complex64)}),
        ["a is in torch.complex64"],
    ),
    "no map": (lambda folder: change_index(folder, {"a": 1}), ['expected JSON with "weight_map"']),
    "a path": (
        lambda folder: change_index(folder, {"weight_map": {"a": "../in/x.bin"}}),
        ["expected names of files in that folder, got '../in/x.bin'"],
    ),
    "a missing shard": (
        lambda folder: change_index(folder, {"weight_map": {"a": "pytorch_model-3.bin"}}),
        ["expected the file pytorch_model-3.bin, found none"],
    ),
    "a missing tensor": (
        lambda folder: change_index(
            folder, {"weight_map": {"c": "pytorch_model-00001-of-00002.bin"}}
        ),
        ["pytorch_model-00001-of-00002.bin: expected the tensor c"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    write, words = REFUSED[name]
    write(tmp_path / "in")
    result = command("convert", tmp_path / "in", tmp_path / "out", columns=400)
    assert [file.name for file in tmp_path.iterdir() if file.name != "in"] == []
    assert not (tmp_path / "in" / "trapped").exists()
    check_failure(result, 2, *words)


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    source = write_pickles(tmp_path / "in", {"a": torch.ones(2)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        result = command("convert", source, tmp_path / name, columns=300)
        check_failure(result, 2, "something is at", name)
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"
    result = command("convert", source, tmp_path / "no" / "folder", columns=300)
    check_failure(result, 2, "expected a folder to make folder in, found none")
    result = command("convert", source, tmp_path / "out", "--max-shard-size", "much", columns=300)
    check_failure(result, 2, "much")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_in_the_middle_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_pickles(tmp_path / "in", {f"{i}": torch.ones(100) for i in range(9)}, 3)
    seen: list[Any] = []
    original = converting.write_tensor

    def fail(file: Any, tensor: Any) -> None:
        seen.append(tensor)
        if len(seen) == 5:
            assert any(child.name.endswith(".partial") for child in tmp_path.iterdir())
            raise error
        original(file, tensor)

    monkeypatch.setattr(converting, "write_tensor", fail)
    result = command("convert", source, tmp_path / "out", "--max-shard-size", "1KB")
    assert result.exit_code != 0 and len(seen) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
    if isinstance(error, OSError):
        check_failure(result, 1, "No space left")


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_pickles(tmp_path / "in", {"a": torch.ones(2)})
    usage = converting.shutil.disk_usage(tmp_path)._replace(free=7)
    monkeypatch.setattr(converting.shutil, "disk_usage", lambda folder: usage)
    result = command("convert", source, tmp_path / "out", columns=300)
    check_failure(result, 1, "the weights take 8 bytes", "7 free")


def test_a_report_for_people(tmp_path: Path) -> None:
    source = write_pickles(tmp_path / "in", {"a": torch.ones(256)})
    result = command("convert", source, tmp_path / "out", columns=300)
    assert result.exit_code == 0
    assert "has 1 tensors, 1.0 KiB, in model.safetensors, and no other file" in result.stdout


PEAK = r"""
import re, sys
from pathlib import Path
import torch, transformers
from sida.huggingface import converting
def peak():  # getrusage would count what the process that started this one had
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
converting.MOST_MAPPED = 32 << 20
before = peak()
converting.convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_size=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("max_shard_size", ["5GB", "50MB"])
def test_memory_never_holds_the_whole_checkpoint(max_shard_size: str, tmp_path: Path) -> None:
    source = write_pickles(tmp_path / "in", {f"{i}": torch.randn(1 << 20) for i in range(100)})
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out"), max_shard_size],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    print(f"grown {int(done.stdout) >> 20} MiB of 400")
    assert 20 << 20 < int(done.stdout) < 150 << 20
