# SPDX-License-Identifier: Apache-2.0
"""The experts of one MoE layer of one's own, beyond a memory budget."""

from __future__ import annotations

import os
import sys
from typing import Any

from sida._core import ExpertCache, ExpertStore, MoeConfig, OffloadScheduler, check_cuda
from sida._core import OffloadedExperts as _Layer
from sida.stats import Stats, collect
from sida.threads import default_threads

DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class LayerExperts:
    """The experts of one layer of a scheduler's model, for a pipeline put together by hand.

    Arrays may be torch tensors, NumPy arrays (bfloat16 is `ml_dtypes.bfloat16`) and whatever else
    has `__dlpack__`; results are of the kind of `hidden_states`. Inference only. Calls from several
    threads take turns.
    """

    def __init__(
        self,
        scheduler: OffloadScheduler,
        layer: int,
        *,
        threads: int | None = None,
        skip_padding: bool = False,
    ) -> None:
        """Compute layer `layer` of the experts that `scheduler` brings.

        Args:
            scheduler: Shared by all layers of a model.
            layer: Its index.
            threads: For computing; by default as many as torch uses, where torch is loaded, and
                no more than the process may run at once: a container's CPU quota and the
                processors of its affinity bound them.
            skip_padding: Leave out tokens that the pass's mask calls padding.
        """
        self._threads = threads
        self._used_threads = threads or default_threads()
        self._layer = _Layer(
            scheduler, layer, threads=self._used_threads, skip_padding=skip_padding
        )
        self._calls = self._tokens = 0

    def __call__(
        self,
        hidden_states: Any,
        top_k_index: Any,
        top_k_weights: Any,
        *,
        out: Any = None,
        stream: Any = None,
    ) -> Any:
        """Return sum over j of weights[t, j] * expert(index[t, j])(hidden[t]) for every token t.

        Args:
            hidden_states: [T, H], in the experts' dtype.
            top_k_index: [T, k] int32 or int64.
            top_k_weights: [T, k] float32 or the experts' dtype; a choice of weight 0 is left out.
            out: [T, H] to write to, instead of a new array.
            stream: Of a GPU, in whose order arrays are read and written: a cudaStream_t as an int,
                or an object with one (torch.cuda.Stream, cupy.cuda.Stream). By default torch's
                current stream, for arrays of other libraries the legacy default stream. The call
                returns when the work is enqueued. None on the CPU.

        Raises:
            IndexError: An expert's id is out of range; on the CPU nothing was computed then. A GPU
                leaves such a choice out, and the error may come from a later call or from stats().
            ValueError: Shapes or dtypes do not fit.
            RuntimeError: Gradients are wanted, or the scheduler was closed.
        """
        self._prepare(hidden_states, top_k_weights)
        arrays = [detached(array) for array in (hidden_states, top_k_index, top_k_weights)]
        result = self._layer.forward(*arrays, out=out, stream=stream)
        self._calls, self._tokens = self._calls + 1, self._tokens + len(hidden_states)
        return result

    def predicted(self, hidden_states: Any, *, out: Any = None, stream: Any = None) -> Any:
        """Compute as `__call__`, with experts and scales from the hash table of the pass.

        Raises:
            RuntimeError: The pass has no table, or one that foretells nothing for this layer.
        """
        self._prepare(hidden_states)
        return self._layer.forward_predicted(detached(hidden_states), out=out, stream=stream)

    def _prepare(self, *arrays: Any) -> None:
        _refuse_gradients(*arrays)
        wanted = self._threads or default_threads()
        if wanted != self._used_threads:
            self._layer.set_threads(wanted)
            self._used_threads = wanted


class OffloadedExperts(LayerExperts):
    """The experts of one MoE layer of one's own, of which no more than a budget is in fast memory.

    Example:
        >>> layer = sida.OffloadedExperts(up, down, gated=False, activation="relu", memory=0.5)
        >>> y = layer(hidden_states, top_k_index, top_k_weights)
    """

    def __init__(
        self,
        up_proj: Any,
        down_proj: Any,
        *,
        gated: bool,
        activation: str,
        memory: int | float | str,
        up_bias: Any = None,
        down_bias: Any = None,
        device: Any = None,
        policy: str = "auto",
        threads: int | None = None,
        limit: float = 7.0,
    ) -> None:
        """Take the arrays as the slow tier.

        On the CPU they are kept, and never copied whole. For a GPU they are copied to pinned memory
        and let go.

        Args:
            up_proj: [E, I, H]; gated: [E, 2 I, H], the gate's rows first.
            down_proj: [E, H, I].
            gated: Whether an activated gate multiplies the up projection.
            activation: "relu", "relu2" (its square), "gelu", "gelu_tanh", "silu"; gated only
                "silu_clamped" (as DeepSeek-V4) and "swiglu_clamped" (as gpt-oss), which cut gate
                and up at `limit`.
            memory: Limit for experts in fast memory: bytes (an int, "2GiB"), a share of all (0.2,
                "20%"), or a count ("12 experts", "1 expert"). If all fit, they are used in place.
            up_bias: [E, I], gated [E, 2 I], or None.
            down_bias: [E, H], or None.
            device: Where experts are computed, "cpu", "cuda" or "cuda:1"; by default where the
                arrays are.
            policy: "fifo", "lru", "lfu", "lookahead" or "auto".
            threads: For computing; by default as many as torch uses, where torch is loaded, and
                no more than the process may run at once: a container's CPU quota and the
                processors of its affinity bound them.
            limit: Of a clamped activation: gate is cut from above, up on both sides.

        Raises:
            ValueError: Shapes or dtypes do not fit, or the budget is too small.
            MemoryError: The budget is larger than what the GPU has free.
            CudaError: There is no such GPU, or no CUDA part of sida.
        """
        place = _device(up_proj if device is None else device)
        up, down = _shape(up_proj, "up_proj", 3), _shape(down_proj, "down_proj", 3)
        experts, hidden, intermediate = down
        expected = (experts, 2 * intermediate if gated else intermediate, hidden)
        if up != expected:
            raise ValueError(
                f"expected up_proj of shape [E, {'2 I' if gated else 'I'}, H] = {list(expected)} "
                f"beside down_proj [E, H, I] = {list(down)}, got {list(up)}"
            )
        for name, bias, size in (("up_bias", up_bias, up[1]), ("down_bias", down_bias, hidden)):
            if bias is not None and _shape(bias, name, 2) != (experts, size):
                raise ValueError(f"expected {name} of shape {[experts, size]}, got {bias.shape}")
        config = MoeConfig(
            layers=1,
            experts=experts,
            hidden_size=hidden,
            intermediate_size=intermediate,
            activation=activation,
            gated=gated,
            up_bias=up_bias is not None,
            down_bias=down_bias is not None,
            dtype=_dtype(up_proj),
            limit=limit,
        )
        parts = [_in_ram(detached(part)) for part in (up_proj, down_proj, up_bias, down_bias)]
        rows = [tuple(None if part is None else part[e] for part in parts) for e in range(experts)]
        store = ExpertStore.from_arrays(config, [rows])
        self._cache = ExpertCache(store, memory, policy=policy, device=place)
        self._scheduler = OffloadScheduler(self._cache)
        self._experts = experts
        super().__init__(self._scheduler, 0, threads=threads)

    def stats(self) -> Stats:
        """Return what was counted since the layer was made or `reset_stats()` called."""
        return collect(
            self._scheduler,
            self._cache,
            ["experts"],
            predicted=frozenset(),
            total_experts=self._experts,
            staging_bytes=0,
            passes=self._calls,
            tokens=self._tokens,
        )

    def reset_stats(self) -> None:
        """Begin statistics and trace anew."""
        self._scheduler.reset_stats()
        self._calls = self._tokens = 0

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write what happened since `reset_stats()` as a timeline that ui.perfetto.dev opens."""
        self._scheduler.trace(path)

    def resize(self, memory: int | float | str) -> None:
        """Give the experts another budget; what is resident is dropped."""
        self._scheduler.resize(memory)

    def close(self) -> None:
        """End all threads; later calls raise. Idempotent."""
        self._scheduler.close()

    def __enter__(self) -> OffloadedExperts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _shape(array: Any, name: str, dimensions: int) -> tuple[int, ...]:
    shape = tuple(getattr(array, "shape", ()))
    if len(shape) != dimensions:
        raise ValueError(
            f"expected {name} to be an array of {dimensions} dimensions, got "
            f"{'shape ' + str(list(shape)) if shape else type(array).__name__}"
        )
    return shape


def _dtype(array: Any) -> str:
    name = str(array.dtype).rpartition(".")[2]
    if name not in DTYPES:
        raise ValueError(f"expected experts in {', '.join(DTYPES)}, got {name}")
    return DTYPES[name]


def detached(array: Any) -> Any:
    """Return an array that torch lends: it refuses to where gradients are required."""
    return array.detach() if getattr(array, "requires_grad", False) else array


def _refuse_gradients(*arrays: Any) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    if any(getattr(array, "requires_grad", False) for array in arrays):
        raise RuntimeError(
            "gradients do not flow through offloaded experts: call the layer under "
            "torch.no_grad(), or pass detached tensors"
        )


def _device(place: Any) -> str:
    """Return the device that a name, a torch.device or an array stands for.

    Raises:
        ValueError: sida does not compute there.
        CudaError: There is no such GPU, or no CUDA part of sida.
    """
    if hasattr(place, "__dlpack_device__"):
        kind, index = place.__dlpack_device__()
        name = {1: "cpu", 2: f"cuda:{index}", 3: "cpu"}.get(int(kind), f"DLPack device {kind}")
    else:
        name = str(place)
    if name.partition(":")[0] == "cuda":
        check_cuda(name)
    elif name != "cpu":
        raise ValueError(f'expected device="cpu" or device="cuda", got {name!r}')
    return name


def _in_ram(array: Any) -> Any:
    # torch's tensors on a GPU; other libraries are asked for arrays in RAM
    return array.cpu() if hasattr(array, "cpu") else array
