# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose experts stay in their files."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, safe_open, save_file
from switch_models import (
    decoder_inputs,
    make_batch,
    make_config,
    make_encoder,
    make_model,
    make_seq2seq,
    relative,
    run,
)
from transformers.models.switch_transformers import modeling_switch_transformers as modeling

import sida
from sida.huggingface import find_adapter


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of `make_encoder()`."""
    make_encoder().save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def unpatched() -> bool:
    return (
        modeling.SwitchTransformersSparseMLP.__name__ == "SwitchTransformersSparseMLP"
        and modeling.SwitchTransformersPreTrainedModel._keys_to_ignore_on_load_unexpected is None
    )


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (make_encoder, lambda batch: batch),
        (make_model, decoder_inputs),
        (make_seq2seq, decoder_inputs),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_same_bits_as_offload(make: Any, inputs: Any, shards: bool, tmp_path: Path) -> None:
    model, batch = make(), inputs(make_batch())
    expected = run(model, batch)
    model.save_pretrained(tmp_path, max_shard_size="100KB" if shards else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    with sida.offload(model, memory=1.0) as off:
        exact = run(off.model, batch)
    for memory in ("1 expert", 0.1, 0.5, 1.0):
        with sida.from_pretrained(tmp_path, memory=memory) as off:
            assert type(off.model) is type(model) and not off.model.training
            assert torch.equal(run(off.model, batch), exact)
    assert relative(exact, expected) <= 1e-5
    assert unpatched()


def test_experts_are_not_among_the_weights(checkpoint: Path) -> None:
    with sida.from_pretrained(checkpoint, memory=0.5) as off:
        names = [name for name, _ in off.model.named_parameters()]
        assert not any("expert_" in name for name in names)
        assert any("router" in name for name in names)
        assert not any(parameter.is_meta for parameter in off.model.parameters())


def test_generate(tmp_path: Path) -> None:
    model, batch = make_seq2seq(), make_batch()
    model.save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "num_beams": 3}
    with sida.offload(model, memory=1.0):
        expected = model.generate(**batch, **options)
    with sida.from_pretrained(tmp_path, memory=0.2) as off:
        assert torch.equal(off.model.generate(**batch, **options), expected)


def test_one_class_of_a_checkpoint_of_another(tmp_path: Path) -> None:
    model, batch = make_seq2seq(), make_batch()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.encoder(**batch).last_hidden_state
    with sida.from_pretrained(
        tmp_path, memory=0.2, model_class=transformers.SwitchTransformersEncoderModel
    ) as off:
        assert relative(run(off.model, batch), expected) <= 1e-5
        assert off.stats()["total_experts"] == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", torch.float32])
def test_dtype(checkpoint: Path, dtype: Any) -> None:
    batch = make_batch()
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = transformers.SwitchTransformersEncoderModel.from_pretrained(checkpoint, dtype=dtype)
    with sida.offload(model, memory=1.0):
        expected = run(model, batch)
    with sida.from_pretrained(checkpoint, memory=0.2, dtype=dtype) as off:
        actual = run(off.model, batch)
        assert off.stats()["slot_bytes"] == 2 * 32 * 48 * kind.itemsize
    assert actual.dtype == kind and torch.equal(actual, expected)


def test_auto_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    make_encoder().to(torch.bfloat16).save_pretrained(tmp_path)
    with sida.from_pretrained(tmp_path, memory=0.2) as off:
        assert run(off.model, make_batch()).dtype == torch.bfloat16


def test_other_arguments_reach_transformers(checkpoint: Path) -> None:
    with sida.from_pretrained(checkpoint, memory=0.2, attn_implementation="eager") as off:
        assert off.model.config._attn_implementation == "eager"
    for name, value in [
        ("device_map", "auto"),
        ("load_in_8bit", True),
        ("quantization_config", object()),
        ("torch_dtype", torch.float16),
    ]:
        with pytest.raises(ValueError, match=f"does not take {name}="):
            sida.from_pretrained(checkpoint, memory=0.2, **{name: value})


def test_predicted_routing(checkpoint: Path, tmp_path: Path) -> None:
    batch = make_batch()
    with sida.from_pretrained(checkpoint, memory=0.5) as off:
        exact = run(off.model, batch)
        off.record(tmp_path / "table")
    with sida.from_pretrained(
        checkpoint, memory=0.2, routing="predicted", predictor=tmp_path / "table"
    ) as off:
        tokens = batch["attention_mask"] == 1
        assert relative(run(off.model, batch)[tokens], exact[tokens]) <= 1e-6


def test_the_fingerprint_is_the_same_however_the_model_was_loaded(checkpoint: Path) -> None:
    expected = find_adapter(make_encoder()).fingerprint()
    with sida.from_pretrained(checkpoint, memory=0.2) as off:
        assert find_adapter(off.model).fingerprint() == expected


def test_expert_keys_are_not_reported_and_missing_ones_are(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger="transformers")
    try:
        sida.from_pretrained(checkpoint, memory=0.2).close()
        assert ".experts." not in caplog.text
        file = checkpoint / "model.safetensors"
        tensors = load_file(file)
        del tensors["encoder.final_layer_norm.weight"]
        save_file(tensors, file, {"format": "pt"})
        sida.from_pretrained(checkpoint, memory=0.2).close()
        assert "final_layer_norm" in caplog.text and ".experts." not in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_a_missing_expert_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.3.layer.1.mlp.experts.expert_5.wo.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((OSError, ValueError), match=r"block\.3.*expert 5"):
        sida.from_pretrained(checkpoint, memory=0.2)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_encoder().save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        sida.from_pretrained(tmp_path, memory=0.2)
    assert unpatched()


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _nested_header(folder: Path) -> None:
    header = b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}"
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _nested_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


def _overlap(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    next(v for k, v in header.items() if "expert_3" in k)["data_offsets"] = [0, 4 * 48 * 32]
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + content[end:]
    (folder / "model.safetensors").write_bytes(data)


def _shard_elsewhere(folder: Path) -> None:
    file = folder / "model.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(file), "../model-1.safetensors")}
    file.rename(folder.parent / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, folder / "model-2.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"model\.safetensors: .*may be truncated"),
        (_nested_header, r"model\.safetensors.*nested more than"),
        (_nested_config, r"config\.json.*nested more than"),
        (_overlap, r"model\.safetensors: .*expert_3.*overlap"),
        (_shard_elsewhere, r"index\.json: .*own folder, got '\.\./model-1\.safetensors'"),
    ],
)
def test_a_damaged_file_is_named_before_transformers_reads_it(
    checkpoint: Path, damage: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(checkpoint)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(OSError, match=message):
        sida.from_pretrained(checkpoint, memory=0.2)


def test_a_pickled_checkpoint_is_told_how_to_be_converted(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    torch.save(load_file(file), checkpoint / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(OSError, match=rf"pickle \(pytorch_model.bin\).*sida convert {checkpoint} "):
        sida.from_pretrained(checkpoint, memory=0.2)


def test_paths_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        sida.from_pretrained("google/switch-base-8", memory=0.2)
    with pytest.raises(FileNotFoundError, match=r"expected \*\.safetensors"):
        sida.from_pretrained(tmp_path, memory=0.2)


def test_a_revision_of_the_hubs_cache_and_a_folder_in_it(tmp_path: Path) -> None:
    cached = tmp_path / "models--somebody--encoder"
    (cached / "refs").mkdir(parents=True)
    models = {"main": make_encoder(), "halved": make_encoder()}
    with torch.no_grad():
        for parameter in models["halved"].parameters():
            parameter.mul_(0.5)
    for revision, model in models.items():
        model.save_pretrained(cached / "snapshots" / revision / "inside")
        (cached / "refs" / revision).write_text(revision)
    batch = make_batch()
    for revision, model in models.items():
        with sida.from_pretrained(
            "somebody/encoder",
            memory=0.25,
            cache_dir=tmp_path,
            revision=None if revision == "main" else revision,
            subfolder="inside",
        ) as off:
            assert relative(run(off.model, batch), run(model, batch)) <= 1e-5
    with pytest.raises(FileNotFoundError, match="at revision gone in the hub's cache"):
        sida.from_pretrained("somebody/encoder", memory=0.2, cache_dir=tmp_path, revision="gone")
    with pytest.raises(ValueError, match="does not take variant="):
        sida.from_pretrained("somebody/encoder", memory=0.2, cache_dir=tmp_path, variant="fp16")


def test_a_model_of_another_family_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("its weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", fail)
    with pytest.raises(ValueError, match="T5EncoderModel has no MoE layer that sida knows"):
        sida.from_pretrained(tmp_path, memory=0.2)
    assert unpatched()


def test_an_error_while_loading_leaves_transformers_as_it_was(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling.SwitchTransformersSparseMLP

    def fail(*args: Any) -> None:
        raise ArithmeticError("while the model was built")

    with monkeypatch.context() as patch:
        patch.setattr(modeling.SwitchTransformersStack, "post_init", fail)
        with pytest.raises(ArithmeticError):
            sida.from_pretrained(checkpoint, memory=0.2)
    assert modeling.SwitchTransformersSparseMLP is original and unpatched()
    assert "expert_0" in make_encoder().encoder.block[1].layer[1].mlp.experts


def test_other_threads_build_whole_models_meanwhile(checkpoint: Path) -> None:
    wrong: list[Any] = []
    stop = threading.Event()

    def build() -> None:
        while not stop.is_set():
            model = transformers.SwitchTransformersEncoderModel(make_config())
            if not any("expert_0" in name for name, _ in model.named_parameters()):
                wrong.append(model)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        for _ in range(5):
            sida.from_pretrained(checkpoint, memory=0.2).close()
    finally:
        stop.set()
        thread.join(60)
    assert not wrong


def test_closing_frees_everything_and_later_calls_raise(checkpoint: Path) -> None:
    off = sida.from_pretrained(checkpoint, memory=0.2)
    run(off.model, make_batch())
    model = off.model
    gone = weakref.ref(model)
    off.close()
    off.close()
    with pytest.raises(RuntimeError, match="closed"):
        off.model  # noqa: B018
    with pytest.raises(RuntimeError, match="closed"):
        run(model, make_batch())
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="closed"):
        off.stats()


def test_offloading_what_was_loaded_is_refused(checkpoint: Path) -> None:
    with (
        sida.from_pretrained(checkpoint, memory=0.2) as off,
        pytest.raises(ValueError, match="offloaded already"),
    ):
        sida.offload(off.model, memory=0.2)


@pytest.mark.slow
def test_a_hundred_loads_leave_nothing_behind(checkpoint: Path) -> None:
    def cycle(count: int) -> list[int]:
        """Threads and open files after so many handles."""
        for _ in range(count):
            with sida.from_pretrained(checkpoint, memory=0.25) as off:
                run(off.model, make_batch())
        gc.collect()
        return [len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd")]

    before = cycle(3)
    assert cycle(100) == before


def make_large(folder: Path) -> tuple[int, int]:
    """Write a checkpoint of about 400 MiB expert by expert; returns bytes of experts and others."""
    config = make_config(d_model=256, d_ff=1024, vocab_size=2000, num_experts=100, num_layers=4)
    config.architectures = ["SwitchTransformersEncoderModel"]
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.SwitchTransformersEncoderModel(config)
    index, sizes = {}, {True: 0, False: 0}
    shards: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if name == "encoder.embed_tokens.weight":
            continue  # tied
        block = name.split(".")[2] if ".block." in name else "0"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = parameter
        sizes["expert_" in name] += parameter.numel() * 4
    for file, parameters in shards.items():
        save_file(
            {name: torch.randn(p.shape) * 0.05 for name, p in parameters.items()},
            folder / file,
            {"format": "pt"},
        )
        index.update(dict.fromkeys(parameters, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return sizes[True], sizes[False]


PEAK = r"""
import re, sys
import torch, transformers, sida
from transformers import SwitchTransformersEncoderModel
import sida.huggingface
def peak():  # getrusage would count what the process that started this one had
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
off = sida.from_pretrained(sys.argv[1], memory=sys.argv[2])
ids = torch.arange(2, 1026).view(8, 128)
with torch.no_grad():
    for step in range(3):
        off.model(input_ids=(ids + step) % 2000)
uses = off.stats()["uses"]
assert uses > 100, uses
off.model.save_pretrained(sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_never_holds_all_experts(tmp_path: Path) -> None:
    experts, others = make_large(tmp_path / "large")
    budget = experts // 10
    done = subprocess.run(
        [
            *(sys.executable, "-c", PEAK, str(tmp_path / "large"), f"{budget} bytes"),
            str(tmp_path / "copy"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"},
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    print(f"experts {experts >> 20} MiB, others {others >> 20} MiB, grown {grown >> 20} MiB")
    assert experts > 350 << 20
    assert grown <= others + budget + (300 << 20)
    assert budget // 2 < grown < experts
    (copy,) = (tmp_path / "copy").glob("*.safetensors")
    with safe_open(copy, "pt") as saved:
        for file in (tmp_path / "large").glob("*.safetensors"):
            for name, weight in load_file(file).items():
                assert torch.equal(saved.get_tensor(name), weight), name
