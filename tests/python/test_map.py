# SPDX-License-Identifier: Apache-2.0
"""Batches run one after the other, looked at ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from switch_models import decoder_inputs, make_batch, make_batches, make_encoder, make_seq2seq, run

import sida
from sida.huggingface import find_adapter
from sida.torch import fit_predictor


@pytest.fixture(scope="module")
def predictor() -> Any:
    adapter = find_adapter(make_encoder())
    return fit_predictor(adapter, make_batches(4), "token", steps=20, progress=False)


@pytest.mark.parametrize("ahead", [1, 3, 16])
@pytest.mark.parametrize("predicting", [False, True])
def test_results_come_in_order(predictor: Any, predicting: bool, ahead: int) -> None:
    batches = make_batches(7)
    with sida.offload(
        make_encoder(), memory=0.3, predictor=predictor if predicting else None
    ) as off:
        expected = [run(off.model, batch) for batch in batches]
        off.reset_stats()
        outputs = list(off.map(iter(batches), ahead=ahead))
        assert all(
            torch.equal(output.last_hidden_state, values)
            for output, values in zip(outputs, expected, strict=True)
        )
        assert off.stats()["passes"] == 7
        assert off.stats()["tokens"] == sum(int(b["attention_mask"].sum()) for b in batches)


def test_experts_come_early(predictor: Any) -> None:
    batches = make_batches(6)
    with sida.offload(make_encoder(), memory=0.5, predictor=predictor) as off:
        list(off.map(batches))
        assert off.stats()["prefetches"] > 0


def test_what_a_batch_may_be() -> None:
    batch = make_batch()
    ids = batch["input_ids"]
    with sida.offload(make_encoder(), memory=0.5) as off:
        (output,) = off.map([batch])
        assert torch.equal(output.last_hidden_state, run(off.model, batch))
        (output,) = off.map([ids])
        assert torch.equal(output.last_hidden_state, run(off.model, {"input_ids": ids}))
        (mean,) = off.map(
            [ids.tolist()], lambda model, b: run(model, {"input_ids": torch.tensor(b)})
        )
        assert torch.equal(mean, output.last_hidden_state)
        with pytest.raises(TypeError, match=r"dicts .* got list; pass fn\(model, batch\)"):
            list(off.map([[1, 2]]))
        assert list(off.map([])) == []


def test_generate_in_a_function() -> None:
    batches = make_batches(3, sentences=2)

    def generate(model: Any, batch: Any) -> Any:
        return model.generate(**batch, max_new_tokens=4, num_beams=2)

    with sida.offload(make_seq2seq(), memory=0.3) as off:
        expected = [generate(off.model, batch) for batch in batches]
        for tokens, same in zip(off.map(batches, generate), expected, strict=True):
            assert torch.equal(tokens, same)


def test_encoder_decoder_batches() -> None:
    batches = [decoder_inputs(batch) for batch in make_batches(3)]
    with sida.offload(make_seq2seq(), memory=0.3) as off:
        for output, batch in zip(off.map(batches), batches, strict=True):
            assert torch.equal(output.logits, run(off.model, batch))


def test_an_error_in_the_batches_comes_where_the_batch_would(predictor: Any) -> None:
    def batches() -> Iterator[Any]:
        yield from make_batches(3)
        raise LookupError("the fourth is missing")

    with sida.offload(make_encoder(), memory=0.3, predictor=predictor) as off:
        results = off.map(batches())
        assert len([next(results) for _ in range(3)]) == 3
        with pytest.raises(LookupError, match="the fourth is missing"):
            next(results)
        assert list(results) == []
        assert len(list(off.map(make_batches(2)))) == 2


def test_an_error_in_the_function_ends_the_map(predictor: Any) -> None:
    def fn(model: Any, batch: Any) -> Any:
        raise ArithmeticError("no")

    with sida.offload(make_encoder(), memory=0.3, predictor=predictor) as off:
        with pytest.raises(ArithmeticError):
            list(off.map(make_batches(3), fn))
        assert len(list(off.map(make_batches(2)))) == 2


def test_no_more_batches_are_pulled_than_may_wait() -> None:
    pulled: list[int] = []

    def batches() -> Iterator[Any]:
        for seed in range(50):
            pulled.append(seed)
            yield make_batch(seed)

    with sida.offload(make_encoder(), memory=0.3) as off:
        results = off.map(batches(), ahead=2)
        next(results)
        time.sleep(0.3)
        assert len(pulled) <= 1 + 2 + 1  # done, waiting, in hand
        results.close()


def test_leaving_early_ends_the_thread() -> None:
    ended = threading.Event()

    def batches() -> Iterator[Any]:
        try:
            for seed in range(10_000):
                yield make_batch(seed)
        finally:
            ended.set()

    with sida.offload(make_encoder(), memory=0.3) as off:
        source = batches()
        for count, _ in enumerate(off.map(source, ahead=2)):
            if count == 2:
                break
        source.close()  # raises ValueError while a thread is still in it
        assert ended.is_set()
        assert len(list(off.map(make_batches(2)))) == 2


def test_closing_the_handle_amid_a_map() -> None:
    off = sida.offload(make_encoder(), memory=0.3)
    results = off.map(make_batches(20), ahead=2)
    next(results)
    off.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(results)


def test_closing_the_handle_while_the_source_is_slow() -> None:
    off = sida.offload(make_encoder(), memory=0.3)
    more, waiting = threading.Event(), threading.Event()

    def batches() -> Iterator[Any]:
        yield make_batch()
        waiting.set()
        more.wait(30)
        yield make_batch()

    errors: list[BaseException] = []

    def work() -> None:
        try:
            list(off.map(batches()))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(30)
    closer = threading.Thread(target=off.close)
    closer.start()
    more.set()
    closer.join(30)
    thread.join(30)
    assert not thread.is_alive() and not closer.is_alive()
    assert len(errors) <= 1


def test_a_slow_source_does_not_delay_the_batch_at_hand_nor_other_calls() -> None:
    batch, more = make_batch(), threading.Event()

    def batches() -> Iterator[Any]:
        yield batch
        assert more.wait(60)
        yield batch

    with sida.offload(make_encoder(), memory=0.3) as off:
        results = off.map(batches())
        first = next(results)  # comes although the source is stuck
        done: list[Any] = []
        waiter = threading.Thread(target=lambda: done.append(next(results)))
        waiter.start()
        time.sleep(0.1)
        assert torch.equal(run(off.model, batch), first.last_hidden_state)  # neither is this
        more.set()
        waiter.join(30)
        assert torch.equal(done[0].last_hidden_state, first.last_hidden_state)


def test_batches_made_by_the_model_itself() -> None:
    with sida.offload(make_encoder(), memory=0.3) as off:

        def batches() -> Iterator[Any]:
            for seed in range(5):
                batch = make_batch(seed)
                run(off.model, batch)
                yield batch

        assert len(list(off.map(batches(), ahead=2))) == 5


def test_other_calls_between_two_results(predictor: Any) -> None:
    batches = make_batches(4)
    with sida.offload(make_encoder(), memory=0.3, predictor=predictor) as off:
        expected = [run(off.model, batch) for batch in batches]
        for i, output in enumerate(off.map(batches)):
            assert torch.equal(output.last_hidden_state, expected[i])
            assert torch.equal(run(off.model, batches[3 - i]), expected[3 - i])


def test_one_map_at_a_time_and_ahead_of_at_least_one() -> None:
    with sida.offload(make_encoder(), memory=0.3) as off:
        for ahead in (0, -1, True):
            with pytest.raises(ValueError, match="ahead >= 1"):
                off.map([], ahead=ahead)
        first = off.map(make_batches(3))
        next(first)
        with pytest.raises(RuntimeError, match="already"):
            next(off.map(make_batches(3)))
        assert len(list(first)) == 2


def test_gradients_are_off_within_and_as_before_outside() -> None:
    with sida.offload(make_encoder(), memory=0.3) as off:
        for output in off.map(make_batches(2)):
            assert torch.is_grad_enabled() and not output.last_hidden_state.requires_grad
