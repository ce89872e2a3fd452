# SPDX-License-Identifier: Apache-2.0
"""What happens around a call of a model's stack: a pass begins and ends."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sida._core import HashTable
from sida.huggingface.adapter import ExpertAdapter, Stack
from sida.huggingface.batches import ArrivingBatch, StackBatch, read_batch
from sida.huggingface.decoding import DecoderTables
from sida.huggingface.engine import Engine
from sida.huggingface.tables import PredictedTables, Tables
from sida.huggingface.turn import Turn
from sida.torch import operators
from sida.torch.experts_module import CLOSED

READ = ("input_ids", "inputs_embeds", "attention_mask")
"""Arguments of a stack that name its batch."""
EXPORTED = (
    "torch.export would leave the experts behind, which sida keeps: close() the handle and export "
    "the model as it was, or use torch.compile, which leaves them where they are"
)
DECODER_KEY = 0x9E3779B97F4A7C15
"""Tells a decoder's pass from an encoder's over the same tokens."""


REARRANGED = (
    "the experts were given another budget while a compiled call began, whose graph is for the one "
    "before: call it again"
)


def is_exporting() -> bool:
    """Whether torch.export traces, by what `torch.compiler.is_exporting` returns.

    That function itself is true of any graph that dynamo traces, before torch 2.13.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def empty_table(layers: int, key: int) -> HashTable:
    """Return the hash table of a batch of which nothing is foretold."""
    nothing = torch.empty(layers, 0, 1)
    return HashTable(
        layers=layers,
        candidates=1,
        keys=[key],
        offsets=[0, 0],
        ids=nothing.int().numpy(),
        probs=nothing.numpy(),
        scale=nothing.numpy(),
    )


class Passes:
    """Makes every call of a model's stacks a pass; calls from several threads take turns.

    In a graph that is being compiled, operators begin and end the pass.

    Attributes:
        turn: Had during a pass.
        engine: None when closed.
        awaits_experts: Closed, but the model does not have its own experts yet.
        ahead_key: Key of the pass that was begun for the batch about to come, if one was.
        count: Passes since `reset`.
        tokens: Tokens in them, padding left out.
    """

    def __init__(self, adapter: ExpertAdapter, tables: Tables | None, engine: Engine) -> None:
        self.turn = Turn()
        self.engine: Engine | None = engine
        self.awaits_experts = False
        self.ahead_key: int | None = None
        self._adapter, self._tables = adapter, tables
        self._decoder: DecoderTables | None = None
        if adapter.causal and isinstance(tables, PredictedTables):
            self._decoder = DecoderTables(tables)
        self._number = operators.register(self)
        self.reset()

    def reset(self) -> None:
        """Count anew."""
        self.count = self.tokens = 0

    def install(self) -> None:
        """Wrap the stacks' forward, on the instances."""
        for place, stack in enumerate(self._adapter.stacks()):
            # not by hooks: those are not told of a KeyboardInterrupt
            stack.module.forward = self._wrapped(place, stack, stack.module.forward)

    def remove(self) -> None:
        """Unwrap the stacks' forward."""
        for stack in self._adapter.stacks():
            stack.module.__dict__.pop("forward", None)

    def forget(self) -> None:
        """Let go of the model; to be called last."""
        del self._adapter, self._tables, self._decoder

    def table_of(self, arguments: Mapping[str, Any]) -> tuple[int | None, HashTable]:
        """Return key and hash table of a batch that is yet to come."""
        batch = read_batch(arguments, self._adapter.embed)
        layers = len(self._adapter.layer_names)
        if batch is None:
            return None, empty_table(layers, 0)
        return batch.key, self._build(batch) or empty_table(layers, batch.key)

    def begin_compiled(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        stack: int,
        arrangement: str,
    ) -> None:
        """Begin the pass of a compiled stack; see `sida.torch.operators`."""
        arguments = dict(zip(READ, (input_ids, inputs_embeds, attention_mask), strict=True))
        with self.turn():
            engine = self.engine
            if engine is None:
                raise RuntimeError(CLOSED)
            if arrangement != engine.arrangement:
                raise RuntimeError(REARRANGED)
            engine.load_all()
            engine.begin_graphs()
            of = self._adapter.stacks()[stack]
            if self._may_name_later(engine, of, arguments):
                self._enter_unnamed(engine, of, arguments)
            else:  # a graph does not say which cache it is about: a decoder's states are not known
                self._enter(engine, of, arguments, has_states=False)
            self.turn.lend(engine.end_graphs)

    def end_compiled(self) -> None:
        """End the pass of a compiled stack."""
        self.turn.give_back()

    def _wrapped(self, place: int, stack: Stack, forward: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(forward).parameters)

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            if is_exporting():
                raise RuntimeError(EXPORTED)
            if torch.compiler.is_dynamo_compiling():
                read = [arguments.get(name) for name in READ]
                read = [value if isinstance(value, Tensor) else None for value in read]
                arrangement = "" if self.engine is None else self.engine.arrangement
                begun = operators.begin_pass(
                    operators.ORDER, *read, self._number, place, arrangement
                )
                if read[0] is not None or read[1] is not None:
                    name = READ[0] if read[0] is not None else READ[1]
                    args, kwargs = _with(name, begun, names, args, kwargs)
                output = forward(*args, **kwargs)
                operators.end_pass(operators.ORDER, _a_tensor(output), self._number)
                return output
            with self.turn():
                engine = self.engine
                if engine is None:
                    if self.awaits_experts:
                        raise RuntimeError(
                            "closing could not give this model its experts back: close the "
                            "handle again"
                        )
                    return forward(*args, **kwargs)
                engine.begin_graphs()  # of layers, where something breaks the model's own graph
                states = self._enter(engine, stack, arguments)
                try:
                    output = forward(*args, **kwargs)
                    if self._decoder is not None and states is not None:
                        self._decoder.keep(states, arguments, output)
                    return output
                finally:
                    engine.end_graphs()

        return run

    def _enter(
        self,
        engine: Engine,
        stack: Stack,
        arguments: Mapping[str, Any],
        *,
        has_states: bool = True,
    ) -> Tensor | None:
        """Begin a pass; return the states of a decoder's tokens, to be kept once it is over."""
        engine.follow_threads()
        batch = read_batch(arguments, self._adapter.embed)
        ahead, self.ahead_key = self.ahead_key, None
        self.count += 1
        if batch is None:
            engine.scheduler.begin_pass()
            return None
        self.tokens += int(batch.mask.sum())
        if batch.key == ahead and (stack.predictable or self._decoder is not None):
            engine.scheduler.set_mask(batch.mask)
        elif stack.predictable:
            engine.scheduler.begin_pass(self._build(batch), key=_key(stack, batch), mask=batch.mask)
        else:
            built = None
            if self._decoder is not None and has_states:
                built = self._decoder.build(batch, arguments)
            table, states = built or (None, None)
            engine.scheduler.begin_pass(table, key=_key(stack, batch), mask=batch.mask)
            return states
        return None

    def _may_name_later(self, engine: Engine, stack: Stack, arguments: Mapping[str, Any]) -> bool:
        """Whether a pass may begin before it is known which batch it is of: nothing is foretold."""
        return (
            bool(engine.arrangement)
            and self.ahead_key is None
            and not (stack.predictable and self._tables is not None)
            and ArrivingBatch.is_for(arguments)
        )

    def _enter_unnamed(self, engine: Engine, stack: Stack, arguments: Mapping[str, Any]) -> None:
        """Begin a pass without waiting for the GPU to say what it reads."""
        arriving = ArrivingBatch(arguments, self._adapter.embed)
        self.count += 1
        engine.scheduler.begin_pass()

        def name() -> None:
            batch = arriving.read()
            if batch is not None:
                self.tokens += int(batch.mask.sum())
                engine.scheduler.set_key(_key(stack, batch))
                engine.scheduler.set_mask(batch.mask)

        engine.name_later(name)

    def _build(self, batch: StackBatch) -> HashTable | None:
        if self._tables is None or batch.mask.numel() == 0:
            return None
        return self._tables.build(batch.key, batch.embeddings, batch.mask)


def _key(stack: Stack, batch: StackBatch) -> int:
    return batch.key if stack.predictable else batch.key ^ DECODER_KEY


def _with(
    name: str, value: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a call another value for the argument `name`, which it has."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    place = names.index(name)
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _a_tensor(output: Any) -> Tensor | None:
    """Return the first tensor of what a stack gives."""
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, (Mapping, tuple, list)) else (output,):
        if isinstance(value, Tensor):
            return value
    return None
