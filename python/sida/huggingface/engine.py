# SPDX-License-Identifier: Apache-2.0
"""Where a model's experts are kept, and what computes them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sida._core import ExpertCache, ExpertStore, MoeConfig, OffloadedExperts, OffloadScheduler
from sida.huggingface import checks
from sida.huggingface.adapter import ExpertAdapter
from sida.huggingface.expert_file import ExpertFile
from sida.huggingface.look_ahead import LookAhead
from sida.huggingface.pinned_experts import PinnedExperts
from sida.huggingface.progress import reporting
from sida.huggingface.router_choice import LinearRouter
from sida.layer import detached
from sida.threads import default_threads
from sida.torch.experts_module import CLOSED

DTYPES = {name: dtype for dtype, name in checks.DTYPES.items()}
NO_TABLE = (
    "this layer's routing is predicted, and the pass has no hash table to take it from: call the "
    "model or its encoder, not a layer by itself, and a decoder with a DynamicCache that it filled "
    'itself, not compiled; or offload with routing="exact"'
)
MOST_GUESSING_TOKENS = 32
"""Of a call, up to which a kernel asks the next layer's router."""
_ARRANGEMENTS = itertools.count(1)
Memory = int | float | str
"""Bytes, a share of all experts, or "2GiB", "20%", "12 experts"."""


class ExpertSource(Protocol):
    """The slow tier that a handle's experts come from."""

    dtype: str
    """Of the experts: "f32", "f16" or "bf16"."""
    restores: bool
    """Whether closing gives the model its experts back."""
    staging_bytes: int
    """Memory that reading takes beside the cache."""

    @property
    def store(self) -> ExpertStore:
        """The experts where they are kept now.

        Raises:
            RuntimeError: They were released.
        """

    def fits_in_place(self, memory: Memory, policy: str) -> bool:
        """Whether under this budget experts are used where the model has them.

        Raises:
            ValueError: The budget cannot be right.
        """

    def open(self, memory: Memory, policy: str) -> ExpertCache:
        """Return a cache of the experts, having moved them as the budget asks."""

    def release(self) -> None:
        """Give the experts back to the model, or let them go. Idempotent."""


@dataclass(frozen=True)
class Place:
    """Where experts are computed."""

    device: str
    """"cpu", or "cuda:0" and the like."""
    host_memory: Memory | None = None
    """Limit of pinned memory for a GPU's experts."""

    def cache(self, store: ExpertStore, memory: Memory, policy: str) -> ExpertCache:
        """Return a cache of a store's experts there."""
        if self.device == "cpu":
            return ExpertCache(store, memory, policy=policy)
        with reporting("Pinning experts") as report:
            return ExpertCache(
                store,
                memory,
                policy=policy,
                device=self.device,
                host_memory=self.host_memory,
                report=report,
            )


class ModelExperts:
    """The experts of a model in memory: used where they are, or moved."""

    restores, staging_bytes = True, 0

    def __init__(
        self,
        adapter: ExpertAdapter,
        config: MoeConfig,
        folder: str | os.PathLike[str] | None,
        place: Place,
    ) -> None:
        self._adapter, self._config, self._folder = adapter, config, folder
        self._place, self.dtype = place, config.dtype
        self._moved: ExpertFile | PinnedExperts | None = None
        self._store: ExpertStore | None = None

    @property
    def store(self) -> ExpertStore:
        """The model's arrays, or where they were moved."""
        return _kept(self._store)

    def fits_in_place(self, memory: Memory, policy: str) -> bool:
        """Whether all experts fit the budget; not on a GPU, where all have slots."""
        return self._open_in_place(memory, policy) is not None

    def open(self, memory: Memory, policy: str) -> ExpertCache:
        """Return a cache over the model's arrays if all fit, else over where they are moved."""
        self._store = None  # one of arrays holds on to those that are to go
        if self._moved is None:
            if found := self._open_in_place(memory, policy):
                self._store, cache = found
                return cache
            self._moved = self._move()
        try:
            if isinstance(self._moved, PinnedExperts):
                self._store = self._moved.store
            else:
                self._store = ExpertStore.open(
                    self._moved.path,
                    layers=self._adapter.layer_names,
                    config=self._config,
                    interleaved=self._adapter.interleaved,
                )
            return self._place.cache(self._store, memory, policy)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Put the experts back where they were."""
        self._store = None
        if self._moved is not None:
            self._moved.restore()
            self._moved = None

    def _move(self) -> ExpertFile | PinnedExperts:
        """Take the experts to pinned memory for a GPU, or to a file.

        The file is for the CPU, for bounded pinned memory, and for weights that are transposed.
        """
        all_pinned = self._place.device != "cpu" and self._place.host_memory is None
        if all_pinned and self._adapter.arrays(0) is not None:
            return PinnedExperts(self._adapter, self._config, self._place.device)
        return ExpertFile(self._adapter, self._folder)

    def _open_in_place(self, memory: Memory, policy: str) -> tuple[ExpertStore, ExpertCache] | None:
        """Return the model's own arrays and a cache over them; None where they cannot stay.

        That is on a GPU, where they were moved, where their layout forbids it, and where not all of
        them fit.
        """
        if self._place.device != "cpu" or self._moved is not None:
            return None
        experts = []
        for layer in range(len(self._adapter.layer_names)):
            arrays = self._adapter.arrays(layer)
            if arrays is None:
                return None
            experts.append(arrays)
        store = ExpertStore.from_arrays(self._config, experts)
        cache = self._place.cache(store, memory, policy)
        return (store, cache) if cache.in_place else None


class CheckpointExperts:
    """The experts of a checkpoint, read from it as they are needed."""

    restores = False

    def __init__(self, store: ExpertStore, place: Place) -> None:
        self._store: ExpertStore | None = store
        self._place, self.dtype = place, store.config.dtype
        self.staging_bytes = store.staging_bytes

    @property
    def store(self) -> ExpertStore:
        """The checkpoint's experts."""
        return _kept(self._store)

    def fits_in_place(self, memory: Memory, policy: str) -> bool:
        """Never: a file's experts are not in memory."""
        return False

    def open(self, memory: Memory, policy: str) -> ExpertCache:
        """Return a cache of the checkpoint's experts."""
        return self._place.cache(self.store, memory, policy)

    def release(self) -> None:
        """Let go of the file."""
        self._store = None


def _kept(store: ExpertStore | None) -> ExpertStore:
    if store is None:
        raise RuntimeError(CLOSED)
    return store


class Engine:
    """Cache, scheduler and the layers' experts, on one cache.

    Attributes:
        cache: Experts in fast memory.
        scheduler: What brings them there.
        arrangement: See `sida.torch.experts_module.ExpertsModule`.
    """

    def __init__(
        self,
        cache: ExpertCache,
        layers: int,
        *,
        dtype: str,
        threads: int | None,
        skip_padding: bool,
        look_ahead: LookAhead,
    ) -> None:
        self.cache, self._fixed_threads, self._look_ahead = cache, threads, look_ahead
        self._threads = threads or default_threads()
        self._dtype = DTYPES[dtype]
        self.scheduler = OffloadScheduler(cache)
        self._layers = [
            OffloadedExperts(
                self.scheduler, layer, threads=self._threads, skip_padding=skip_padding
            )
            for layer in range(layers)
        ]
        self.arrangement = ""
        self._are_loaded = False
        self._name: Callable[[], None] | None = None
        self._stream: torch.cuda.Stream | None = None  # of the pass at hand's graphs
        self._routers: dict[int, LinearRouter] = {}

    def arrange(self) -> None:
        """Name where the experts are; to be called when they have another budget."""
        stay = self._layers[0].may_be_captured()
        self.arrangement = str(next(_ARRANGEMENTS)) if stay else ""
        self._are_loaded = False

    def load_all(self) -> None:
        """Bring all experts, if they stay; before a CUDA graph is made of calls of them."""
        if self.arrangement and not self._are_loaded:
            for layer in self._layers:
                layer.load_all()
            self._are_loaded = True

    def begin_graphs(self) -> None:
        """Prepare for a pass that CUDA graphs may be part of, if there can be any."""
        if self._are_loaded:
            self._stream = torch.cuda.current_stream(self.cache.device)
            self._layers[0].begin_replays(stream=self._stream)

    def name_later(self, name: Callable[[], None]) -> None:
        """Have the pass at hand named by `name` once something needs it, or at its end."""
        self._name = name

    def end_graphs(self) -> None:
        """End that pass, or any other."""
        try:
            self._name_batch()
            stream, self._stream = self._stream, None
            if stream is not None:
                self._layers[0].end_replays(stream=stream)
        finally:
            self.scheduler.end_pass()

    def _name_batch(self) -> None:
        name, self._name = self._name, None
        if name is not None:
            name()

    def compute(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute a layer's experts as its router chose; see `sida.OffloadedExperts`.

        Experts compute in their own dtype, as transformers' grouped_mm does, under autocast too;
        the result has the dtype of `hidden`.
        """
        experts, values = self._layers[layer], self._input(hidden)
        if self.arrangement:
            if torch.cuda.is_current_stream_capturing():
                return _in(hidden.dtype, _captured(experts, values, ids, weights))
            self._name_batch()
        next_ids, guess_next = None, False
        if self._look_ahead.is_made(layer) and experts.wants_look_ahead():
            guess_next = values.is_cuda and self._may_guess(layer, values)
            if not guess_next and self._look_ahead.is_made(layer):
                next_ids = self._look_ahead.choose(layer, detached(hidden))
        out: Tensor = experts.forward(
            values,
            ids.contiguous(),
            detached(weights).contiguous(),
            next_top_k_index=next_ids,
            guess_next=guess_next,
        )
        return _in(hidden.dtype, out)

    def _may_guess(self, layer: int, hidden: Tensor) -> bool:
        """Whether a kernel of sida's, which costs less than torch's, asks the next router."""
        if len(hidden) > MOST_GUESSING_TOKENS:
            return False
        router = self._look_ahead.router(layer, hidden)
        if router is not None and self._routers.get(layer) is not router:
            self._layers[layer].set_next_router(
                router.weight, router.bias, router.correction, router.top_k
            )
            self._routers[layer] = router  # which keeps its weights alive
        return router is not None

    def compute_predicted(self, layer: int, hidden: Tensor) -> Tensor:
        """Compute a layer's experts as the pass's hash table says, zeros where it says nothing."""
        if not self._layers[layer].has_prediction():
            if self.scheduler.current_table() is None:
                raise RuntimeError(NO_TABLE)
            return hidden.new_zeros(hidden.shape)
        out: Tensor = self._layers[layer].forward_predicted(self._input(hidden))
        return _in(hidden.dtype, out)

    def follow_threads(self) -> None:
        """Use `default_threads()` as it is now, unless a number was asked for."""
        wanted = self._fixed_threads or default_threads()
        if wanted != self._threads:
            self._layers[0].set_threads(wanted)  # shared by all layers
            self._threads = wanted

    def close(self) -> None:
        """End all threads. Idempotent."""
        self.scheduler.close()

    def _input(self, hidden: Tensor) -> Tensor:
        values: Tensor = detached(hidden)
        if values.dtype in DTYPES.values():  # of others the layer says what it expects
            values = _in(self._dtype, values)
        return values.contiguous()


def _in(dtype: torch.dtype, values: Tensor) -> Tensor:
    """The values in a dtype; torch's own `to` takes microseconds where they are in it already."""
    return values if values.dtype == dtype else values.to(dtype)


def _captured(experts: OffloadedExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Make a call part of the CUDA graph that the current stream is captured into."""
    ids, weights = ids.contiguous(), detached(weights).contiguous()
    out = torch.empty_like(hidden)
    needed = experts.graph_workspace_bytes(*ids.shape)
    # Of the graph's own memory, where later kernels of the graph may have it again.
    workspace = torch.empty(needed, dtype=torch.uint8, device=hidden.device)
    stream = torch.cuda.current_stream(hidden.device)
    experts.capture(hidden, ids, weights, out, workspace, stream=stream)
    return out
