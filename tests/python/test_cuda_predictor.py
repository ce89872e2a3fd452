# SPDX-License-Identifier: Apache-2.0
"""Hash predictors on a GPU, beside the CPU's and torch's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gpu import needs_gpu, on_gpu
from switch_models import make_batch, make_batches, make_encoder, relative, run

import sida
from sida import HashPredictor, HashTable
from sida.torch.architectures import make_network
from sida.torch.predictor import Predictor

pytestmark = needs_gpu

KINDS = ["lstm", "causal_lstm", "transformer", "token"]
EXPERTS, SIZE = 24, 96


def saved(folder: Path, kind: str, *, experts: int = EXPERTS, size: int = SIZE) -> Path:
    """A predictor with random weights, large enough that its layers say something."""
    torch.manual_seed(3)
    network = make_network(kind, size, experts, 2, scale_factor=1.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    predictor = Predictor(kind, network, layers=3, heads=[0, 2], fingerprint="f00d")
    predictor.save(folder / f"{kind}.safetensors")
    return folder / f"{kind}.safetensors"


def padded(sentences: int, length: int, size: int = SIZE) -> tuple[Any, Any]:
    """Embeddings with NaN in padding, and the mask; the first sentence has none."""
    torch.manual_seed(sentences * 1000 + length)
    embeddings = torch.randn(sentences, length, size)
    mask = torch.rand(sentences, length) < 0.7
    mask[0] = True
    embeddings[~mask] = float("nan")
    return embeddings, mask.to(torch.uint8)


def everything(table: HashTable, experts: int) -> tuple[Any, Any]:
    """Probabilities and scales [layers, tokens, experts], by expert; 0 for padding."""
    ids = torch.from_numpy(table.ids).long()
    assert table.candidates == experts
    place = torch.where(ids < 0, torch.arange(experts), ids)
    return tuple(
        torch.zeros(ids.shape).scatter_(2, place, torch.from_numpy(values))
        for values in (table.probs, table.scale)
    )


def difference(one: HashTable, other: HashTable, experts: int = EXPERTS) -> float:
    assert one.keys == other.keys and one.offsets == other.offsets
    assert np.array_equal(one.ids < 0, other.ids < 0)
    pairs = zip(everything(one, experts), everything(other, experts), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (9, 20), (33, 128), (2, 700), (300, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_cpu(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    path = saved(tmp_path, kind)
    on_cpu, on_gpu = HashPredictor.load(path), HashPredictor.load(path, device="cuda")
    assert (on_cpu.device, on_gpu.device) == ("cpu", "cuda:0")
    assert on_cpu.workspace_bytes == 0
    embeddings, mask = padded(*shape)
    expected = on_cpu.predict(embeddings, mask, key=7, candidates=EXPERTS)
    for given in (embeddings, embeddings.to("cuda"), embeddings.numpy()):
        table = on_gpu.predict(given, mask, key=7, candidates=EXPERTS)
        assert difference(table, expected) <= 1e-4
    assert on_gpu.workspace_bytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_torch(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path, kind)
    embeddings, mask = padded(9, 20)
    embeddings = embeddings.nan_to_num()
    named = sida.load_predictor(path).predict(embeddings, mask, candidates=EXPERTS)
    table = HashPredictor.load(path, device="cuda").predict(
        embeddings.to("cuda"), mask, candidates=EXPERTS
    )
    shape = (2, -1, EXPERTS)
    ids = named.ids.view(shape)
    place = torch.where(ids < 0, torch.arange(EXPERTS), ids)
    for found, values in zip(everything(table, EXPERTS), named[1:], strict=True):
        expected = torch.zeros(ids.shape).scatter_(2, place, values.view(shape))
        assert float((found[[0, 2]] - expected).abs().max()) <= 1e-4


def test_embeddings_are_read_behind_the_current_stream(tmp_path: Path) -> None:
    predictor = HashPredictor.load(saved(tmp_path, "lstm"), device="cuda")
    embeddings, mask = padded(4, 30)
    expected = predictor.predict(embeddings, mask, candidates=EXPERTS)
    source, late = embeddings.to("cuda"), torch.full_like(embeddings, torch.nan, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(source)
        table = predictor.predict(late, mask, candidates=EXPERTS)
    assert difference(table, expected) == 0


@pytest.mark.parametrize("kind", ["causal_lstm", "token"])
@pytest.mark.parametrize("states_on", ["cpu", "cuda"])
def test_states_go_on_where_they_lie(kind: str, states_on: str, tmp_path: Path) -> None:
    path = saved(tmp_path, kind)
    on_cpu, on_gpu = HashPredictor.load(path), HashPredictor.load(path, device="cuda")
    embeddings, mask = padded(5, 40)
    size = on_gpu.state_size
    assert size == on_cpu.state_size
    whole = on_cpu.predict(embeddings, mask, candidates=EXPERTS)
    past = torch.empty(5, 0, size, device=states_on)
    probs = np.zeros((3, 5, 40, EXPERTS), np.float32)
    begin = 0
    for step in (7, 1, 1, 30, 1):
        latest = slice(begin, begin + step)
        states = torch.full((5, step, size), torch.nan, device=states_on)
        table = on_gpu.advance(
            embeddings[:, latest].contiguous().to("cuda"),
            mask[:, latest].contiguous(),
            past=past,
            states=states,
            candidates=EXPERTS,
        )
        probs[:, :, latest] = everything(table, EXPERTS)[0].view(3, 5, step, EXPERTS)
        past, begin = torch.cat([past, states], 1), begin + step
    expected = everything(whole, EXPERTS)[0].view(3, 5, 40, EXPERTS).numpy()
    assert np.abs(probs - expected).max() <= 1e-4
    if size:
        assert torch.equal(past[..., 0].cpu() != 0, mask != 0)
        assert torch.isfinite(past).all()


def test_several_threads_share_one(tmp_path: Path) -> None:
    predictor = HashPredictor.load(saved(tmp_path, "lstm"), device="cuda")
    batches = [padded(3, length) for length in (5, 90, 33, 60)]
    expected = [predictor.predict(*batch, candidates=EXPERTS) for batch in batches]
    worst: list[float] = []

    def work(first: int) -> None:
        for turn in range(20):
            at = (first + turn) % len(batches)
            table = predictor.predict(*batches[at], candidates=EXPERTS)
            worst.append(difference(table, expected[at]))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [0.0] * 80


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, "lstm")
    with pytest.raises(ValueError, match='got "tpu"'):
        HashPredictor.load(path, device="tpu")
    with pytest.raises(sida.CudaError, match="got 99"):
        HashPredictor.load(path, device="cuda:99")
    predictor = HashPredictor.load(path, device="cuda")
    embeddings, mask = padded(2, 3)
    with pytest.raises(ValueError, match=r"\[B, S, 96\] f32"):
        predictor.predict(embeddings.bfloat16().to("cuda"), mask)
    with pytest.raises(ValueError, match="mask of 6 elements"):
        predictor.predict(embeddings, mask[:1])
    with pytest.raises(ValueError, match="causal_lstm or token"):
        predictor.advance(embeddings, mask, past=torch.empty(2, 0, 0), states=torch.empty(2, 3, 0))
    with pytest.raises(ValueError, match="device cpu"):
        HashPredictor.load(path).predict(embeddings.to("cuda"), mask)
    assert predictor.predict(embeddings, mask).tokens == 6  # and goes on


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("predictor_on", ["default", "cpu", "cuda"])
def test_a_model_on_a_gpu_with_its_predictor(kind: str, predictor_on: str, tmp_path: Path) -> None:
    model = make_encoder()
    batches = make_batches(6)
    path = tmp_path / "predictor.safetensors"
    sida.train_predictor(model, batches, kind=kind, steps=20).save(path)
    with sida.offload(model, memory=1.0, predictor=path, routing="predicted") as off:
        expected = [run(off.model, batch) for batch in batches]
    predictor: Any = path
    if predictor_on != "default":
        predictor = HashPredictor.load(path, device=predictor_on)
    with sida.offload(
        model, memory=0.2, device="cuda", predictor=predictor, routing="predicted"
    ) as off:
        there = [on_gpu(batch) for batch in batches]
        for got, wanted in zip(off.map(there, lambda m, b: run(m, b)), expected, strict=True):
            assert relative(got.cpu(), wanted) <= 1e-3
        for got, wanted in zip((run(off.model, b) for b in there), expected, strict=True):
            assert relative(got.cpu(), wanted) <= 1e-3


def test_exact_routing_has_the_same_bits_with_a_predictor_on_either(tmp_path: Path) -> None:
    model, batch = make_encoder(), on_gpu(make_batch())
    predictor = sida.train_predictor(model, make_batches(3), steps=5)
    predictor.save(tmp_path / "predictor")
    with sida.offload(model, memory=1.0, device="cuda") as off:
        expected = run(off.model, batch)
    for device in ("cpu", "cuda"):
        own = HashPredictor.load(tmp_path / "predictor", device=device)
        with sida.offload(model, memory=0.2, device="cuda", predictor=own) as off:
            for output in off.map([batch] * 5, lambda m, b: run(m, b)):
                assert torch.equal(output, expected)
