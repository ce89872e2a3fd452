# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained` of offloaded models, read by transformers as if sida had never been there."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import huggingface_hub
from family_models import BASE, MODELS, make_family, make_inputs, make_model
from safetensors.torch import load_file, safe_open
from switch_models import make_batch, make_encoder, make_seq2seq, relative, run

import sida
from sida.huggingface import saving
from sida.huggingface.layer_weights import LayerWeights


def weights_in(folder: Path) -> dict[str, Any]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def check_same(folder: Path, expected: Path) -> None:
    """The same tensors to the bit, whatever files they are in, and the same other files."""
    own, other = weights_in(folder), weights_in(expected)
    assert own.keys() == other.keys()
    for name, weight in other.items():
        assert own[name].dtype == weight.dtype and own[name].shape == weight.shape, name
        assert torch.equal(own[name], weight), name
    names = [{f.name for f in f.iterdir() if "model" not in f.name} for f in (folder, expected)]
    assert names[0] == names[1]
    for name in names[1]:
        assert (folder / name).read_text() == (expected / name).read_text()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_and_reads(name: str, dtype: Any, tmp_path: Path) -> None:
    model = make_model(name).to(dtype)
    model.save_pretrained(tmp_path / "original")
    for memory in ("1 expert", 1.0):
        with sida.offload(model, memory=memory):
            model.save_pretrained(tmp_path / str(memory), max_shard_size="20KB")
        check_same(tmp_path / str(memory), tmp_path / "original")
    with sida.from_pretrained(tmp_path / "original", memory=0.25) as off:
        off.model.save_pretrained(tmp_path / "loaded")
    read = type(model).from_pretrained(tmp_path / "original")
    read.save_pretrained(tmp_path / "theirs")  # some weights become float32 when they are read
    check_same(tmp_path / "loaded", tmp_path / "theirs")
    batch, _ = make_inputs(name)
    expected = run(read, batch)
    for folder in ("loaded", "1 expert"):
        again, info = type(model).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert again.dtype == dtype and relative(run(again, batch), expected) <= 1e-6


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files lie that would have been uploaded; without `fail` in it uploading works."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def create_commit(self: Any, repo_id: str, operations: Any, **kwargs: Any) -> str:
        assert repo_id == "me/model"
        if (folder / "fail").exists():
            raise OSError("the connection was lost")
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, folder / operation.path_in_repo)
        return "https://hub/me/model"

    def no_card(*args: Any, **kwargs: Any) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("there is no card")

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda *a, **k: SimpleNamespace(repo_id="me/model"))
    monkeypatch.setattr(api, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", no_card)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return folder


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "switch"])
def test_what_is_pushed_to_the_hub_is_what_transformers_saves(
    name: str, hub: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jinja2")
    model = make_model(name)
    model.save_pretrained(tmp_path / "original")
    with sida.offload(model, memory=0.25, offload_dir=tmp_path / "experts"):
        assert model.push_to_hub("me/model", max_shard_size="20KB") == "https://hub/me/model"
        assert not any((tmp_path / "tmp").iterdir())
    (hub / "README.md").unlink()
    assert len(list(hub.glob("*.safetensors"))) > 1
    check_same(hub, tmp_path / "original")
    batch, _ = make_inputs(name)
    assert torch.equal(run(type(model).from_pretrained(hub), batch), run(model, batch))


def test_a_push_that_fails_leaves_nothing_behind(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2")
    model = make_family("mixtral")
    with sida.offload(model, memory=0.25, offload_dir=tmp_path / "experts") as off:
        (hub / "fail").touch()
        with pytest.raises(OSError, match="the connection was lost"):
            model.push_to_hub("me/model")
        assert not any((tmp_path / "tmp").iterdir())
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"the disk of .*has 1,000 free.*TMPDIR"):
            model.push_to_hub("me/model")
        assert not any((tmp_path / "tmp").iterdir())
        monkeypatch.undo()
        assert off.stats()["passes"] == 0
        run(model, make_inputs("mixtral")[0])


def test_shards_have_the_size_asked_for_and_an_index(tmp_path: Path) -> None:
    model = make_family("mixtral")
    with sida.offload(model, memory=0.25):
        model.save_pretrained(tmp_path / "a", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "b", max_shard_size="50KB")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 2
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file.name) for file in files)
    index, theirs = (
        json.loads((tmp_path / folder / "model.safetensors.index.json").read_text())
        for folder in "ab"
    )
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "a" / file, "pt") as tensors:
            assert name in tensors.keys() and tensors.metadata() == {"format": "pt"}
    for file in files:
        assert sum(w.nbytes for w in load_file(file).values()) <= 50_000


def test_another_dtype_is_saved_as_loaded(tmp_path: Path) -> None:
    make_family("qwen3_moe").save_pretrained(tmp_path / "f32")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "f32", dtype="bfloat16")
    model.save_pretrained(tmp_path / "bf16")
    with sida.from_pretrained(tmp_path / "f32", memory=0.25, dtype="bfloat16") as off:
        off.model.save_pretrained(tmp_path / "streamed")
    check_same(tmp_path / "streamed", tmp_path / "bf16")


def test_the_models_own_format_on_request(tmp_path: Path) -> None:
    model = make_family("mixtral")
    model.save_pretrained(tmp_path / "original", save_original_format=False)
    with sida.offload(model, memory=0.25):
        model.save_pretrained(tmp_path / "streamed", save_original_format=False)
    check_same(tmp_path / "streamed", tmp_path / "original")
    assert any(name.endswith("gate_up_proj") for name in weights_in(tmp_path / "streamed"))
    ids = torch.arange(11)[None] % 7
    with torch.no_grad(), sida.from_pretrained(tmp_path / "streamed", memory=0.25) as off:
        assert relative(off.model(ids).logits, model(ids).logits) <= 1e-5


def test_a_conversion_that_asks_for_the_models_parameters(tmp_path: Path) -> None:
    """Such as transposing a weight if its shape is not the parameter's."""
    text = {
        **BASE,
        "head_dim": 8,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 4,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "original")
    with sida.offload(model, memory=0.25):
        model.save_pretrained(tmp_path / "streamed")
    check_same(tmp_path / "streamed", tmp_path / "original")
    with sida.from_pretrained(tmp_path / "original", memory=0.25) as off:
        off.model.save_pretrained(tmp_path / "loaded")
    type(model).from_pretrained(tmp_path / "original").save_pretrained(tmp_path / "theirs")
    check_same(tmp_path / "loaded", tmp_path / "theirs")


def test_a_part_of_the_model(tmp_path: Path) -> None:
    model = make_seq2seq()
    model.encoder.save_pretrained(tmp_path / "original")
    with sida.offload(model, memory=0.25):
        model.encoder.save_pretrained(tmp_path / "streamed")
    check_same(tmp_path / "streamed", tmp_path / "original")


def test_a_variant(tmp_path: Path) -> None:
    model = make_encoder()
    with sida.offload(model, memory=0.25):
        for size in ("5GB", "100KB"):
            model.save_pretrained(tmp_path / size, variant="mine", max_shard_size=size)
    assert (tmp_path / "5GB" / "model.mine.safetensors").exists()
    assert (tmp_path / "100KB" / "model.safetensors.index.mine.json").exists()
    for size in ("5GB", "100KB"):
        again = type(model).from_pretrained(tmp_path / size, variant="mine")
        assert torch.equal(run(again, make_batch()), run(model, make_batch()))


def test_saving_over_the_checkpoint_that_is_read(tmp_path: Path) -> None:
    model, batch = make_encoder(), make_batch()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "notes.txt").write_text("mine")
    with sida.from_pretrained(tmp_path, memory="1 expert") as off:
        expected = run(off.model, batch)
        off.model.save_pretrained(tmp_path)
        assert torch.equal(run(off.model, batch), expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert torch.equal(run(type(model).from_pretrained(tmp_path), batch), run(model, batch))


@pytest.mark.parametrize("new", [True, False])
def test_an_error_leaves_the_folder_as_it_was(
    new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, model, calls = tmp_path / "target", make_encoder(), [0]
    if not new:
        make_encoder(seed=1).save_pretrained(target)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    read = LayerWeights.read

    def fail_late(self: Any, expert: int) -> Any:
        calls[0] += 1
        if calls[0] == 11:
            raise KeyboardInterrupt
        return read(self, expert)

    with sida.offload(model, memory=0.25, offload_dir=tmp_path / "experts"):
        monkeypatch.setattr(LayerWeights, "read", fail_late)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(target)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before and target.exists() != new


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_encoder()
    usage = namedtuple("usage", "total used free")
    with sida.offload(model, memory=0.25):
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(10, 10, 1000))
        with pytest.raises(OSError, match=r"take [\d,]+ bytes, but .* has 1,000 free"):
            model.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_not_taken(tmp_path: Path) -> None:
    model = make_encoder()
    (tmp_path / "file").touch()
    with sida.offload(model, memory=0.25):
        with pytest.raises(ValueError, match=r"push_to_hub=True.*upload_folder"):
            model.save_pretrained(tmp_path / "new", push_to_hub=True)
        with pytest.raises(ValueError, match="distributed_checkpoint=True"):
            model.save_pretrained(tmp_path / "new", distributed_checkpoint=True)
        with pytest.raises(NotADirectoryError, match="expected a folder"):
            model.save_pretrained(tmp_path / "file")
        model.save_pretrained(tmp_path / "new", is_main_process=False)
        assert not (tmp_path / "new").exists()
        model.save_pretrained(tmp_path / "some", state_dict={"shared.weight": torch.ones(2)})
    assert list(weights_in(tmp_path / "some")) == ["shared.weight"]


def test_adapters_alone_are_saved_of_a_model_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_encoder()
    model.add_adapter(peft.LoraConfig(target_modules=["q", "v"], r=2))
    with sida.offload(model, memory=0.25):
        model.save_pretrained(tmp_path)
    assert all("lora" in name for name in weights_in(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda name: None if ".0.w2." in name else name, "expected to save .* bytes of weights"),
        (lambda name: name.replace(".0.w2.", ".one.w2."), "expected one place for .*found 0"),
    ],
)
def test_a_conversion_that_nobody_foresaw_is_an_error(
    wrong: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = saving.revert_weight_conversion

    def convert_experts_wrongly(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
        converted = convert(model, weights)
        if next(iter(weights.values())).is_meta:  # where the places are found out
            return converted
        return {new: w for name, w in converted.items() if (new := wrong(name))}

    model = make_family("mixtral")
    monkeypatch.setattr(saving, "revert_weight_conversion", convert_experts_wrongly)
    message += ".*save_original_format=False"
    with sida.offload(model, memory=0.25), pytest.raises(RuntimeError, match=message):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
