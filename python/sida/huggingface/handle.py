# SPDX-License-Identifier: Apache-2.0
"""The handle of a model whose experts sida keeps."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sida._core import HashTable
from sida.huggingface.adapter import ExpertAdapter
from sida.huggingface.engine import Engine, ExpertSource, Memory
from sida.huggingface.guards import Guards
from sida.huggingface.layer_weights import LayerWeights
from sida.huggingface.look_ahead import LookAhead
from sida.huggingface.passes import Passes
from sida.huggingface.tables import Tables
from sida.stats import Stats, collect
from sida.torch.experts_module import CLOSED
from sida.torch.teacher import model_device


class Offloaded:
    """A model whose experts are brought to fast memory as they are needed.

    Made by `sida.offload` and `sida.from_pretrained`. The model is called as before, directly or
    through `map`. Calls from several threads take turns. As a context manager it closes itself.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: ExpertAdapter,
        source: ExpertSource,
        *,
        memory: Memory,
        device: str,
        routing: str,
        tables: Tables | None,
        look_ahead: LookAhead,
        policy: str,
        threads: int | None,
        skip_padding: bool,
    ) -> None:
        self._model: nn.Module | None = model
        self._adapter, self._source = adapter, source
        self._routing, self._tables, self._policy = routing, tables, policy
        self._look_ahead = look_ahead
        self._threads, self._skip_padding = threads, skip_padding
        self._map_ready: threading.Semaphore | None = None
        self._engine: Engine | None = None
        self._closed = False
        self._home = model_device(model)
        self._start(memory)
        assert self._engine is not None
        try:
            model.to(device)
        except BaseException:
            self._stop()
            source.release()
            model.to(self._home)
            raise
        self._passes: Passes = Passes(adapter, tables, self._engine)
        self._passes.install()
        self._guards: Guards = Guards(model, adapter)
        self._guards.install()

    @property
    def model(self) -> nn.Module:
        """The model, to be called as before.

        Raises:
            RuntimeError: The handle loaded the model and was closed.
        """
        if self._model is None:
            raise RuntimeError(CLOSED)
        return self._model

    def map(
        self,
        batches: Iterable[Any],
        fn: Callable[[Any, Any], Any] | None = None,
        *,
        ahead: int = 16,
    ) -> Iterator[Any]:
        """Run the model on batch after batch, without gradients, and yield the results in order.

        A thread of sida's own pulls `batches` and, if there is a predictor, builds the hash tables
        of up to `ahead` batches, so that their experts come early. It ends with the iterator that
        is returned; an error in `batches` is raised where its batch would have come.

        Args:
            batches: Dicts of the model's arguments, tensors of `input_ids`, or anything that `fn`
                takes.
            fn: `fn(model, batch)` gives the result; by default `model(**batch)` or
                `model(input_ids=batch)`.
            ahead: Batches that may wait, one or more.
        """
        if isinstance(ahead, bool) or ahead < 1:
            raise ValueError(f"expected ahead >= 1, got {ahead!r}")
        self._open_engine()
        return self._map(iter(batches), fn, ahead)

    def stats(self) -> Stats:
        """Return what was counted since the handle was made or `reset_stats()` called."""
        engine = self._open_engine()
        names = self._adapter.layer_names
        stats = collect(
            engine.scheduler,
            engine.cache,
            names,
            predicted=self._predicted_layers(),
            total_experts=len(names) * self._adapter.num_experts,
            staging_bytes=self._source.staging_bytes,
            passes=self._passes.count,
            tokens=self._passes.tokens,
        )
        stats["routing"] = self._routing
        stats["look_ahead"]["off"] = list(self._look_ahead.off)
        return stats

    def reset_stats(self) -> None:
        """Begin statistics, trace and recorded routing anew."""
        with self._passes.turn():
            self._open_engine().scheduler.reset_stats()
            self._passes.reset()

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write what happened since `reset_stats()` as a timeline that ui.perfetto.dev opens."""
        self._open_engine().scheduler.trace(path)

    def record(self, path: str | os.PathLike[str]) -> HashTable:
        """Write the routing since `reset_stats()` as a hash table, and return it.

        Passed as `predictor=`, it foretells the same batches perfectly; ``sida replay`` reads it,
        and its notes on sizes and times of this run. Memory for it is bounded: the oldest passes
        go first.
        """
        engine = self._open_engine()
        table = engine.scheduler.record()
        notes = {
            "experts": str(self._adapter.num_experts),
            "expert_bytes": str(engine.cache.slot_bytes),
            **{name: repr(value) for name, value in engine.scheduler.times().items()},
        }
        table.save(path, notes=notes)
        return table

    def resize(self, memory: Memory) -> None:
        """Give experts another budget; waits for the call under way. What is resident is dropped.

        Experts that were used where the model has them are moved to a file if they no longer all
        fit; statistics, trace and recorded routing then begin anew.

        Raises:
            ValueError: The budget cannot be right; nothing has changed then.
        """
        with self._passes.turn():
            if not self._open_engine().cache.in_place:
                self._open_engine().scheduler.resize(memory)
                self._arrange(self._open_engine())
            elif not self._source.fits_in_place(memory, self._policy):
                self._stop()
                try:
                    self._start(memory)
                except BaseException:
                    self._start(1.0)
                    raise
                finally:
                    self._passes.engine = self._engine
                    self._passes.reset()

    def close(self) -> None:
        """End all threads and give back what was taken. Idempotent.

        After `sida.offload` the model has its own experts again, with equal weights; after
        `sida.from_pretrained` everything is freed, and later calls raise.

        Raises:
            OSError: The experts could not be read back. Calls of the model raise until closing
                again has succeeded.
        """
        if self._engine is not None:
            self._engine.scheduler.stop()  # not in turn: a source may be waiting for it
        with self._passes.turn():
            if self._closed:
                return
            if self._engine is not None:
                self._stop()
                self._passes.engine = None
                self._passes.awaits_experts = True
            if self._map_ready is not None:
                self._map_ready.release()
            self._source.release()
            self._closed = True
            self._passes.awaits_experts = False
            self._passes.remove()
            if not self._source.restores:
                self._model = None
                self._passes.forget()
                del self._adapter, self._look_ahead
                del self._guards  # which stay: the model has no experts to save
            elif self._model is not None:
                self._guards.remove()
                self._model.to(self._home)

    def __enter__(self) -> Offloaded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._engine is None:
            return "Offloaded(closed)"
        cache = self._engine.cache
        total = len(self._adapter.layer_names) * self._adapter.num_experts
        return (
            f"Offloaded({type(self._model).__name__}, room for {cache.slots} of {total} experts, "
            f"routing={self._routing!r}, policy={cache.policy!r}, device={cache.device!r})"
        )

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(CLOSED)
        return self._engine

    def _predicted_layers(self) -> frozenset[int]:
        if self._routing == "predicted" and self._tables is not None:
            return self._tables.layers
        return frozenset()

    def _start(self, memory: Memory) -> None:
        """Take the experts and let the engine compute them."""
        cache = self._source.open(memory, self._policy)
        try:
            engine = Engine(
                cache,
                len(self._adapter.layer_names),
                dtype=self._source.dtype,
                threads=self._threads,
                skip_padding=self._skip_padding,
                look_ahead=self._look_ahead,
            )
            for layer in range(len(self._adapter.layer_names)):
                self._install(engine, layer)
            self._arrange(engine)
        except BaseException:
            self._stop()
            del cache
            self._source.release()
            raise
        self._engine = engine

    def _install(self, engine: Engine, layer: int) -> None:
        def compute(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return engine.compute(layer, hidden, ids, weights)

        def compute_predicted(hidden: Tensor) -> Tensor:
            return engine.compute_predicted(layer, hidden)

        predicted = layer in self._predicted_layers()
        self._adapter.install(layer, compute, compute_predicted if predicted else None)
        stand_in: Any = self._adapter.experts(layer)
        stand_in.weights = LayerWeights(
            self._adapter, self._source, layer, engine.cache.device, lambda: self._passes.turn()
        )

    def _arrange(self, engine: Engine) -> None:
        """Tell the layers where their experts are, as graphs that are compiled go by it."""
        engine.arrange()
        for layer in range(len(self._adapter.layer_names)):
            stand_in: Any = self._adapter.experts(layer)
            stand_in.arrangement, stand_in.load_all = engine.arrangement, engine.load_all

    def _stop(self) -> None:
        """Take the engine away from the layers."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        for layer in range(len(self._adapter.layer_names)):
            self._adapter.remove(layer)

    def _map(
        self, batches: Iterator[Any], fn: Callable[[Any, Any], Any] | None, ahead: int
    ) -> Iterator[Any]:
        waiting: deque[tuple[int | None, Any]] = deque()
        ready = threading.Semaphore(0)

        def source() -> HashTable | None:
            try:
                try:
                    batch = next(batches)
                except StopIteration:
                    return None
                key, table = self._passes.table_of(_arguments(batch) or {})
                waiting.append((key, batch))
                return table
            finally:
                ready.release()

        scheduler = self._open_engine().scheduler
        scheduler.start(source, ahead=ahead)
        self._map_ready = ready
        try:
            while True:
                ready.acquire()  # not in turn: other calls go on while the source is slow
                with self._passes.turn():
                    self._open_engine()
                    if not scheduler.next_batch():
                        return
                    key, batch = waiting.popleft()
                    output = self._run(key, batch, fn)
                yield output
        finally:
            self._map_ready = None
            scheduler.stop()

    def _run(self, key: int | None, batch: Any, fn: Callable[[Any, Any], Any] | None) -> Any:
        """Call the model on a batch whose pass has begun."""
        self._passes.ahead_key = key
        try:
            with torch.no_grad():
                if fn is not None:
                    return fn(self.model, batch)
                arguments = _arguments(batch)
                if arguments is None:
                    raise TypeError(
                        "expected batches that are dicts of the model's arguments or tensors of "
                        f"input_ids, got {type(batch).__name__}; pass fn(model, batch)"
                    )
                return self.model(**arguments)
        finally:
            if self._passes.ahead_key is not None or key is None:
                self._passes.ahead_key = None
                if self._engine is not None:
                    self._engine.scheduler.end_pass()


def _arguments(batch: Any) -> Mapping[str, Any] | None:
    if isinstance(batch, Mapping):
        return batch
    return {"input_ids": batch} if isinstance(batch, Tensor) else None
