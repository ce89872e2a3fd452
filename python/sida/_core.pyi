# SPDX-License-Identifier: Apache-2.0
# Types of the compiled module; tests/python/test_stubs.py holds the two together.
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import NotRequired

__version__: str

class _DLPackArray(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

_Array = TypeVar("_Array", bound=_DLPackArray)
_Path: TypeAlias = str | os.PathLike[str]
_Expert: TypeAlias = Sequence[_DLPackArray | None]

class LookAheadStats(TypedDict):
    uses: int
    foretold: int
    foretold_uses: int
    # over all layers only
    loads: NotRequired[int]
    used: NotRequired[int]
    wasted: NotRequired[int]
    cancelled: NotRequired[int]

class LayerStats(TypedDict):
    calls: int
    predicted_calls: int
    uses: int
    hits: int
    late: int
    misses: int
    stall_seconds: float
    look_ahead: LookAheadStats

class CacheStats(LayerStats):
    loads: int
    prefetches: int
    wasted: int
    failed_prefetches: int
    bytes_moved: int
    bytes_wasted: int
    passes: int
    tables: int
    layers: list[LayerStats]

class CudaError(RuntimeError): ...

class MoeConfig:
    def __init__(
        self,
        *,
        layers: int,
        experts: int,
        hidden_size: int,
        intermediate_size: int,
        top_k: int = 1,
        activation: str = "relu",
        gated: bool = False,
        up_bias: bool = False,
        down_bias: bool = False,
        dtype: str = "f32",
        limit: float = 7.0,
    ) -> None: ...
    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def gated(self) -> bool: ...
    @property
    def up_bias(self) -> bool: ...
    @property
    def down_bias(self) -> bool: ...
    @property
    def dtype(self) -> str: ...
    @property
    def limit(self) -> float: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def slab_parts(self) -> list[tuple[int, int]]: ...
    @property
    def total_experts(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...

class HashTable:
    def __init__(
        self,
        *,
        layers: int,
        candidates: int,
        keys: Sequence[int],
        offsets: Sequence[int],
        ids: ArrayLike,
        probs: ArrayLike,
        scale: ArrayLike,
    ) -> None: ...
    @staticmethod
    def load(path: _Path) -> HashTable: ...
    def save(self, path: _Path, *, notes: Mapping[str, str] = {}) -> None: ...
    def find(self, key: int) -> HashTable | None: ...
    def slice(self, batch: int) -> HashTable: ...
    def __len__(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def candidates(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def keys(self) -> list[int]: ...
    @property
    def offsets(self) -> list[int]: ...
    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def probs(self) -> NDArray[np.float32]: ...
    @property
    def scale(self) -> NDArray[np.float32]: ...

class HashPredictor:
    @staticmethod
    def load(path: _Path) -> HashPredictor: ...
    def predict(
        self,
        embeddings: _DLPackArray,
        mask: _DLPackArray | None = None,
        *,
        key: int = 0,
        candidates: int = 8,
    ) -> HashTable: ...
    def advance(
        self,
        embeddings: _DLPackArray,
        mask: _DLPackArray | None = None,
        *,
        past: _DLPackArray,
        states: _DLPackArray,
        key: int = 0,
        candidates: int = 8,
    ) -> HashTable: ...
    @property
    def is_causal(self) -> bool: ...
    @property
    def state_size(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def heads(self) -> list[int]: ...
    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def embedding_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

def batch_key(ids: _DLPackArray, mask: _DLPackArray | None = None) -> int: ...

class ExpertStore:
    @staticmethod
    def open(
        path: _Path,
        *,
        layers: Sequence[str] | None = None,
        dtype: str | None = None,
        config: MoeConfig | None = None,
        interleaved: bool = False,
    ) -> ExpertStore: ...
    @staticmethod
    def from_arrays(config: MoeConfig, experts: Sequence[Sequence[_Expert]]) -> ExpertStore: ...
    def throttled(
        self, *, bytes_per_second: float, latency_seconds: float = 0.0
    ) -> ExpertStore: ...
    @property
    def config(self) -> MoeConfig: ...
    @property
    def layer_names(self) -> list[str]: ...
    @property
    def layout(self) -> str: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def staging_bytes(self) -> int: ...
    def slots(self, memory: int | float | str) -> int: ...
    def read(self, layer: int, expert: int) -> NDArray[np.uint8]: ...

def checkpoint_tensors(path: _Path) -> list[str]: ...

class PinnedLayers:
    def __init__(self, config: MoeConfig, device: str) -> None: ...
    @property
    def store(self) -> ExpertStore: ...
    def take(self, experts: Sequence[_Expert]) -> None: ...
    def give_back(self, layer: int, experts: Sequence[_Expert]) -> None: ...

class ExpertCache:
    def __init__(
        self,
        store: ExpertStore,
        memory: int | float | str,
        *,
        policy: str = "auto",
        device: str = "cpu",
        host_memory: int | float | str | None = None,
        report: Callable[[int, int], object] | None = None,
    ) -> None: ...
    @property
    def slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def policy(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def in_place(self) -> bool: ...
    def resident(self) -> list[tuple[int, int]]: ...
    def resize(self, memory: int | float | str) -> None: ...

def check_cuda(device: str) -> None: ...

class OffloadScheduler:
    def __init__(
        self,
        cache: ExpertCache,
        *,
        transfer_threads: int = 2,
        chunk_bytes: int = 4194304,
        uses_ahead: int = 4,
        threshold: float = 0.4,
    ) -> None: ...
    def start(self, source: Callable[[], HashTable | None], *, ahead: int = 16) -> None: ...
    def next_batch(self) -> bool: ...
    def stop(self) -> None: ...
    def begin_pass(
        self, table: HashTable | None = None, *, key: int = 0, mask: _DLPackArray | None = None
    ) -> None: ...
    def set_mask(self, mask: _DLPackArray | None) -> None: ...
    def end_pass(self) -> None: ...
    def current_table(self) -> HashTable | None: ...
    def current_key(self) -> int: ...
    def stats(self) -> CacheStats: ...
    def reset_stats(self) -> None: ...
    def trace(self, path: _Path) -> None: ...
    def record(self) -> HashTable: ...
    def times(self) -> dict[str, float]: ...
    def resize(self, memory: int | float | str) -> None: ...
    def close(self) -> None: ...

class OffloadedExperts:
    def __init__(
        self,
        scheduler: OffloadScheduler,
        layer: int,
        *,
        threads: int = 0,
        skip_padding: bool = False,
    ) -> None: ...
    def forward(
        self,
        hidden_states: _Array,
        top_k_index: _DLPackArray,
        top_k_weights: _DLPackArray,
        *,
        out: _Array | None = None,
        next_top_k_index: _DLPackArray | None = None,
        stream: Any = None,
    ) -> _Array: ...
    def forward_predicted(
        self, hidden_states: _Array, *, out: _Array | None = None, stream: Any = None
    ) -> _Array: ...
    def has_prediction(self) -> bool: ...
    def wants_look_ahead(self) -> bool: ...
    def set_threads(self, threads: int) -> None: ...

def replay(
    routing: HashTable,
    foretold: HashTable | None = None,
    *,
    experts: int,
    expert_bytes: int,
    memory: int | float | str,
    policy: str = "auto",
    ahead: int = 16,
    bytes_per_second: float | None = None,
    latency_seconds: float = 0.0,
    layer_seconds: float = 0.0,
    expert_seconds: float = 0.0,
    transfer_threads: int = 2,
    chunk_bytes: int = 4194304,
    uses_ahead: int = 4,
    threshold: float = 0.4,
) -> dict[str, Any]: ...
