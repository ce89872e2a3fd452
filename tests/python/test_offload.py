# SPDX-License-Identifier: Apache-2.0
"""What offloading takes, gives back and refuses."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import types
import weakref
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import (
    decoder_inputs,
    experts_of,
    make_batch,
    make_encoder,
    make_seq2seq,
    relative,
    run,
)

import sida
from sida.huggingface import expert_file


def test_experts_go_to_a_file_that_closing_removes(tmp_path: Path) -> None:
    model = make_seq2seq()
    modules = dict(model.named_modules())
    weights = {name: weight.clone() for name, weight in experts_of(model).items()}
    off = sida.offload(model, memory=0.2, offload_dir=tmp_path / "new")
    (file,) = (tmp_path / "new").glob("*/*.safetensors")
    assert file.stat().st_size > sum(w.numel() * 4 for w in weights.values())
    assert not experts_of(model)
    assert all(p.is_meta for n, m in modules.items() if ".expert_" in n for p in m.parameters())
    off.close()
    assert not list((tmp_path / "new").iterdir())
    assert dict(model.named_modules()) == modules  # the very same modules
    restored = experts_of(model)
    assert all(torch.equal(restored[name], weight) for name, weight in weights.items())
    assert all(weight.requires_grad for weight in restored.values())


def test_all_experts_resident_stay_where_they_are(tmp_path: Path) -> None:
    model = make_encoder()
    places = {name: weight.data_ptr() for name, weight in experts_of(model).items()}
    off = sida.offload(model, memory=1.0, offload_dir=tmp_path)
    assert off.stats()["in_place"] and not list(tmp_path.iterdir())
    run(off.model, make_batch())
    off.close()
    assert {name: weight.data_ptr() for name, weight in experts_of(model).items()} == places


def test_closing_twice_and_after_an_error(tmp_path: Path) -> None:
    model, batch = make_encoder(), make_batch()
    expected = run(model, batch)

    def fail(module: Any, inputs: Any) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        sida.offload(model, memory=0.2, offload_dir=tmp_path) as off,
    ):
        hook = model.encoder.block[3].register_forward_pre_hook(fail)
        try:
            run(model, batch)
        finally:
            hook.remove()
    off.close()
    assert not list(tmp_path.iterdir())
    assert torch.equal(run(model, batch), expected)
    assert "forward" not in vars(model.encoder)


@pytest.mark.parametrize(
    ("error", "message"),
    [(OSError(5, "Input/output error"), "close the handle again"), (KeyboardInterrupt(), None)],
)
def test_experts_that_could_not_be_read_back_are_so_by_closing_again(
    error: BaseException, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_encoder(), make_batch()
    expected = run(model, batch)
    off = sida.offload(model, memory=0.2, offload_dir=tmp_path)
    read, reads = os.preadv, iter(range(100))

    def fail_once(*arguments: Any) -> int:
        if next(reads) == 3:
            raise error
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", fail_once)
    with pytest.raises(type(error), match=message):
        off.close()
    with pytest.raises(RuntimeError, match="close the handle again"):
        run(model, batch)
    with pytest.raises(ValueError, match="meta"):
        sida.offload(model, memory=0.2)
    off.close()
    assert torch.equal(run(model, batch), expected)
    assert not list(tmp_path.iterdir())


def test_a_failed_forward_does_not_keep_others_waiting() -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=0.2) as off:
        expected = run(off.model, batch)
        with pytest.raises((IndexError, RuntimeError)):
            run(off.model, {"input_ids": torch.full((2, 3), 99)})
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(run(off.model, batch)))
        thread.start()
        thread.join(30)
        assert len(results) == 1 and torch.equal(results[0], expected)


def test_closing_while_another_thread_computes() -> None:
    model, batch = make_seq2seq(), decoder_inputs(make_batch())
    off = sida.offload(model, memory="1 expert")
    errors: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        try:
            for _ in range(1000):
                run(off.model, batch)
                started.set()
                if not off.model.encoder.__dict__.get("forward"):
                    return  # closed between two calls; the model is itself again
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    off.close()
    thread.join(60)
    assert not thread.is_alive()
    assert all("closed" in str(error) for error in errors)


def test_a_model_that_nobody_holds_leaves_nothing_behind(tmp_path: Path) -> None:
    model = make_encoder()
    sida.offload(model, memory=0.2, offload_dir=tmp_path)
    run(model, make_batch())  # it works while the model lives
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not list(tmp_path.iterdir())


def test_leaving_the_interpreter_with_an_open_handle(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import sida
from switch_models import make_batches, make_encoder
off = sida.offload(make_encoder(), memory=0.2, offload_dir={str(tmp_path)!r})
results = off.map(make_batches(50), ahead=2)
next(results)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("memory", [0.25, 1.0])
def test_a_thousand_handles_leave_nothing_behind(memory: Any, tmp_path: Path) -> None:
    model, batch = make_encoder(), make_batch()
    weights = {name: weight.clone() for name, weight in experts_of(model).items()}
    size = sum(weight.nbytes for weight in weights.values())

    def cycle(count: int) -> tuple[int, int, int]:
        """Threads, open files and bytes of RAM after so many handles."""
        for i in range(count):
            with sida.offload(model, memory=memory, offload_dir=tmp_path):
                if i % 10 == 0:
                    run(model, batch)
        gc.collect()
        status = Path("/proc/self/status").read_text()
        (resident,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
        tasks, files = (len(os.listdir(f"/proc/self/{name}")) for name in ("task", "fd"))
        return tasks, files, int(resident) * 1024

    tasks, files, before = cycle(20)
    *after, resident = cycle(1000)
    print(f"{(resident - before) >> 10} KiB more after 1000 handles of {size >> 10} KiB of experts")
    assert after == [tasks, files] and not list(tmp_path.iterdir())
    assert resident - before < 20 * size
    assert all(torch.equal(experts_of(model)[name], weight) for name, weight in weights.items())


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(expert_file.shutil, "disk_usage", lambda path: usage(10, 10, 1000))
    model, batch = make_encoder(), make_batch()
    expected = run(model, batch)
    with pytest.raises(OSError, match=r"196,608 bytes, but .* has 1,000 free.*offload_dir="):
        sida.offload(model, memory=0.5, offload_dir=tmp_path)
    assert torch.equal(run(model, batch), expected)


def test_a_write_that_fails_half_way_gives_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_encoder(), make_batch()
    expected = run(model, batch)
    empty, calls = torch.empty, [0]

    def fail_late(*sizes: Any, **options: Any) -> Any:
        calls[0] += options.get("device") == "meta"
        if calls[0] == 20:  # in the second of the two layers
            calls[0] += 1
            raise OSError(28, "No space left on device")
        return empty(*sizes, **options)

    monkeypatch.setattr(expert_file.torch, "empty", fail_late)
    with pytest.raises(OSError, match="No space left"):
        sida.offload(model, memory=0.5, offload_dir=tmp_path)
    assert calls[0] > 20 and not list(tmp_path.iterdir())
    assert torch.equal(run(model, batch), expected)


def test_a_folder_in_ram_is_warned_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(expert_file, "file_system", lambda folder: "tmpfs")
    with pytest.warns(RuntimeWarning, match=r"is a tmpfs, that is RAM.*offload_dir="):
        sida.offload(make_encoder(), memory=0.5, offload_dir=tmp_path).close()


def test_file_system_of_a_folder() -> None:
    assert expert_file.file_system(Path("/proc/self")) == "proc"
    assert expert_file.file_system(Path("/")) not in (None, "proc")


def test_memory_is_what_was_asked_for() -> None:
    model = make_encoder()
    slab = 2 * 32 * 48 * 4
    for memory, slots in [
        ("1 expert", 1),
        (0.25, 4),
        ("50%", 8),
        ("3 experts", 3),
        (3 * slab + 5, 3),
        (f"{5 * slab} bytes", 5),
        ("12 KiB", 1),
        (10**12, 16),
        ("99 experts", 16),
    ]:
        with sida.offload(model, memory=memory) as off:
            stats = off.stats()
            assert stats["slots"] == slots, memory
            assert stats["budget_bytes"] == slots * slab


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (1, r'smallest valid value is 12288 bytes, or "1 expert".*1\.0'),
        (0, "smallest valid value"),
        (-5, "smallest valid value"),
        (0.0, r'smallest valid value is 0\.0625 .*"1 expert"'),
        (-0.5, "smallest valid value"),
        (float("nan"), "smallest valid value"),
        (0.01, "smallest valid value"),
        ("0 experts", '"1 expert"'),
        ("lots", "expected bytes"),
    ],
)
def test_budgets_that_cannot_be(memory: Any, message: str, tmp_path: Path) -> None:
    model = make_encoder()
    places = {name: weight.data_ptr() for name, weight in experts_of(model).items()}
    with pytest.raises(ValueError, match=message):
        sida.offload(model, memory=memory, offload_dir=tmp_path)
    assert {name: weight.data_ptr() for name, weight in experts_of(model).items()} == places
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", [None, True, [1]])
def test_budgets_of_the_wrong_type(memory: Any) -> None:
    with pytest.raises(TypeError, match="memory"):
        sida.offload(make_encoder(), memory=memory)


def test_resize_keeps_the_numbers(tmp_path: Path) -> None:
    model, batch = make_encoder(), make_batch()
    with sida.offload(model, memory=0.2, offload_dir=tmp_path) as off:
        expected = run(off.model, batch)
        for memory, slots in [("1 expert", 1), (0.5, 8), (1.0, 16), (0.25, 4)]:
            off.resize(memory)
            assert off.stats()["slots"] == slots
            assert torch.equal(run(off.model, batch), expected)
        with pytest.raises(ValueError, match="smallest valid value"):
            off.resize(0)
        assert torch.equal(run(off.model, batch), expected)


def test_resizing_while_other_threads_compute() -> None:
    batch, resized = make_batch(), threading.Event()
    with sida.offload(make_encoder(), memory=0.5) as off:
        expected = run(off.model, batch)
        wrong: list[Any] = []

        def work() -> None:
            while not resized.is_set():
                output = run(off.model, batch)
                if not torch.equal(output, expected):
                    wrong.append(output)

        with ThreadPoolExecutor(2) as threads:
            work_of_threads = [threads.submit(work) for _ in range(2)]
            try:
                for count in (1, 4, 2, 5, 3) * 4:
                    off.resize(f"{count} experts" if count > 1 else "1 expert")
                    assert off.stats()["slots"] == count
            finally:
                resized.set()
            for done in work_of_threads:
                done.result(60)
        assert wrong == []
        stats = off.stats()
        assert stats["hits"] + stats["late"] + stats["misses"] == stats["uses"] > 0


def test_resize_from_in_place_moves_the_experts_to_a_file(tmp_path: Path) -> None:
    model, batch = make_encoder(), make_batch()
    weights = {name: weight.clone() for name, weight in experts_of(model).items()}
    with sida.offload(model, memory=1.0, offload_dir=tmp_path) as off:
        expected = run(off.model, batch)
        off.resize("2 GiB")
        assert off.stats()["in_place"]
        with pytest.raises(ValueError, match=r"1\.0"):
            off.resize(1)
        assert off.stats()["in_place"] and torch.equal(run(off.model, batch), expected)
        off.resize("2 experts")
        assert list(tmp_path.iterdir()) and not experts_of(model)
        assert off.stats()["slots"] == 2 and torch.equal(run(off.model, batch), expected)
    assert all(torch.equal(experts_of(model)[name], w) for name, w in weights.items())


def test_a_second_handle_is_refused() -> None:
    model = make_encoder()
    with sida.offload(model, memory=0.5):
        with pytest.raises(ValueError, match=r"offloaded already: close\(\)"):
            sida.offload(model, memory=0.5)
        with pytest.raises(ValueError, match="offloaded already"):
            sida.offload(model.encoder, memory=0.5)
    sida.offload(model, memory=0.5).close()


def test_a_model_without_known_experts_is_told_what_was_looked_for() -> None:
    class StrangeMoeBlock(torch.nn.Module):
        pass

    model = torch.nn.Sequential(StrangeMoeBlock())
    message = "looked for SwitchTransformersSparseMLP .*found StrangeMoeBlock"
    with pytest.raises(ValueError, match=message):
        sida.offload(model, memory=0.5)
    with pytest.raises(ValueError, match="found no module that looks like one"):
        sida.offload(torch.nn.Linear(2, 2), memory=0.5)
    with pytest.raises(TypeError, match="torch module"):
        sida.offload("google/switch-base-8", memory=0.5)  # type: ignore[arg-type]


def test_a_model_that_accelerate_dispatched_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_encoder()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match="accelerate dispatched"):
        sida.offload(model, memory=0.5)
    mapped = make_encoder()
    mapped.hf_device_map = {"shared": "cpu", "encoder": "disk"}
    with pytest.raises(ValueError, match=r"accelerate dispatched.*disk"):
        sida.offload(mapped, memory=0.5)


def test_a_model_with_kernels_of_the_hub_is_refused(tmp_path: Path) -> None:
    model = make_encoder()
    model._use_kernels = True
    with pytest.raises(ValueError, match=r"use_kernels=True.*replace a MoE layer.*load it without"):
        sida.offload(model, memory=0.5)
    for name, value in (("use_kernels", True), ("kernel_config", object())):
        with pytest.raises(ValueError, match=f"does not take {name}=: kernels of the hub"):
            sida.from_pretrained(tmp_path, memory=0.5, **{name: value})


def test_a_quantised_model_is_refused() -> None:
    model = make_encoder()
    model.quantization_method = types.SimpleNamespace(value="bitsandbytes")
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\)"):
        sida.offload(model, memory=0.5)

    class Params4bit(torch.nn.Parameter):
        pass

    Params4bit.__module__ = "bitsandbytes.nn.modules"
    model = make_encoder()
    expert = model.encoder.block[1].layer[1].mlp.experts["expert_0"]
    expert.wi.weight = Params4bit(expert.wi.weight.data)
    with pytest.raises(ValueError, match="quantised by bitsandbytes"):
        sida.offload(model, memory=0.5)


def test_lora_on_experts_is_refused_and_elsewhere_works() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["wi"], r=2)
    with pytest.raises(ValueError, match="LoRA on experts"):
        sida.offload(peft.get_peft_model(make_encoder(), config), memory=0.5)
    config = peft.LoraConfig(target_modules=["q", "v"], r=2, init_lora_weights=False)
    model, batch = peft.get_peft_model(make_encoder(), config).eval(), make_batch()
    expected = run(model, batch)
    with sida.offload(model, memory=0.5) as off:
        assert relative(run(off.model, batch), expected) <= 1e-5
    assert torch.equal(run(model, batch), expected)


def test_a_wrapped_expert_is_refused() -> None:
    model = make_encoder()
    expert = model.encoder.block[1].layer[1].mlp.experts["expert_3"]

    class Lora(torch.nn.Module):
        def __init__(self, base_layer: Any) -> None:
            super().__init__()
            self.base_layer = base_layer

    expert.wo = Lora(expert.wo)
    with pytest.raises(ValueError, match=r"expert_3\.wo.*LoRA on experts.*merge_and_unload"):
        sida.offload(model, memory=0.5)


def test_experts_of_several_dtypes_or_none_are_refused() -> None:
    model = make_encoder()
    expert = model.encoder.block[1].layer[1].mlp.experts["expert_3"]
    expert.wo.to(torch.float16)
    with pytest.raises(ValueError, match=r"float32 .*float16 .*model\.to\(dtype\)"):
        sida.offload(model, memory=0.5)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        sida.offload(make_encoder().double(), memory=0.5)
    with pytest.raises(ValueError, match=r"no memory .*meta"):
        sida.offload(make_encoder().to("meta"), memory=0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routing": "magic"}, ValueError, 'expected routing="exact" or "predicted"'),
        ({"routing": "predicted"}, ValueError, "needs predictor="),
        ({"policy": "mru"}, ValueError, "fifo, lru, lfu, lookahead, auto"),
        ({"threads": 0}, ValueError, "threads >= 1"),
        ({"host_memory": "2GiB"}, ValueError, "cuda"),
        ({"device": "cuda:99"}, sida.CudaError, "cuda: "),
        ({"device": "meta"}, ValueError, 'expected device="cpu"'),
        ({"predictor": 3}, TypeError, "path, a predictor or a HashTable"),
        ({"predictor": "missing.safetensors"}, OSError, "found none at missing.safetensors"),
        ({"predictor": __file__}, OSError, "test_offload"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: Any, message: str) -> None:
    model = make_encoder()
    with pytest.raises(error, match=message):
        sida.offload(model, memory=0.5, **options)
    sida.offload(model, memory=0.5).close()


def test_gradients_and_dropout_are_refused_with_advice() -> None:
    model, batch = make_encoder(dropout_rate=0.1), make_batch()
    with sida.offload(model, memory=0.5) as off:
        expected = run(off.model, batch)
        with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\).*requires_grad_\(False\)"):
            off.model(**batch)
        with pytest.raises(RuntimeError, match=r"dropout .*model\.eval\(\)"):
            run(off.model.train(), batch)
        off.model.eval()
        off.model.requires_grad_(False)
        assert torch.equal(off.model(**batch).last_hidden_state, expected)


def test_training_mode_is_kept_across_offloading() -> None:
    model = make_encoder().train()
    sida.offload(model, memory=0.5).close()
    assert all(module.training for module in model.modules())


def test_calls_after_closing_raise() -> None:
    off = sida.offload(make_encoder(), memory=0.5)
    off.close()
    for call in (off.stats, off.reset_stats, lambda: off.map([]), lambda: off.resize(0.5)):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    assert repr(off) == "Offloaded(closed)"


def test_importing_sida_imports_neither_torch_nor_transformers() -> None:
    code = "import sida, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_file_cut_short_while_running_is_an_error_and_the_next_call_is_right(
    tmp_path: Path,
) -> None:
    batch = make_batch()
    with sida.offload(make_encoder(), memory="1 expert", offload_dir=tmp_path) as off:
        expected = run(off.model, batch)
        (path,) = tmp_path.rglob("*.safetensors")
        whole = path.read_bytes()
        os.truncate(path, len(whole) // 2)
        with pytest.raises(OSError, match="experts"):
            run(off.model, batch)
        path.write_bytes(whole)
        assert torch.equal(run(off.model, batch), expected)
