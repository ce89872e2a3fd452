# SPDX-License-Identifier: Apache-2.0
"""The time of one expert layer on a GPU: sida's kernels, vLLM's Triton kernel, torch's grouped_mm.

Where the dtype is not bfloat16, it is a loop over experts with two products of cuBLAS each that
sida's kernels stand beside; in float32 without TF32, as sida's compute. The loop has its rows from
the host, once, and keeps them: what it would cost to bring each call's rows there is not counted.

All run in one process on the same tensors, each in a CUDA graph, in turn, with cold L2 (256 MB are
read before each run) and new routing each repetition. Experts lie in shuffled slots. Triton's tiles
are tuned first for each shape and token count; the tiles and what they took are in the result.

    python benchmarks/fetch_triton_moe.py
    library=build/gpu/benchmarks/libcuda_expert_layer.so
    python benchmarks/cuda_expert_layer.py --library $library --json FILE
"""

import argparse
import ctypes
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {  # hidden, intermediate, experts, top_k, gated
    "switch-128": (768, 3072, 128, 1, False),
    "qwen3-30b": (2048, 768, 128, 8, True),
    "mixtral": (4096, 14336, 8, 2, True),
}
TOKENS = {
    "switch-128": (1, 64, 1024, 16384),
    "qwen3-30b": (1, 64, 1024, 4096, 16384),
    "mixtral": (1, 64, 1024, 16384),
}
KERNELS = tuple("tuned narrow wide grouped swapped hopper dot tiled general".split())
ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu", "silu_clamped", "swiglu_clamped")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Layer = Callable[[], Tensor]
"""Enqueues a layer; its result."""
Tile = tuple[int, ...]
"""One of triton_moe.TILES."""
READ_PER_US, FLOPS_PER_US = 4.49e6, 784e6  # of one H200; floors of other GPUs are not given


class Pointers(ctypes.Structure):
    """ExpertLayerPointers of cuda_expert_layer.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in "ids weights hidden arena slot_of plan workspace counters out".split()
        ),
        *(
            (name, ctypes.c_uint64)
            for name in "stride down_offset up_bias_offset down_bias_offset".split()
        ),
    ]


class SidaLayer:
    """sida's kernels over an arena of experts in shuffled slots."""

    def __init__(
        self,
        library: ctypes.CDLL,
        kernel: str,
        up: Tensor,
        down: Tensor,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        gated: bool,
    ) -> None:
        self.library = library
        tokens, top_k = ids.shape
        experts, intermediate = up.shape[0], down.shape[2]
        values = (DTYPES.index(hidden.dtype), tokens, top_k, experts, hidden.shape[1], intermediate)
        self.shape = (ctypes.c_int * 11)(
            *values, ACTIVATIONS.index(activation), gated, 0, 0, KERNELS.index(kernel)
        )
        element = hidden.element_size()
        up_bytes, down_bytes = up[0].numel() * element, down[0].numel() * element
        self.out = torch.empty_like(hidden)
        make: dict[str, Any] = dict(device=hidden.device, dtype=torch.uint8)
        self.plan_memory = torch.empty(library.expert_layer_plan_bytes(self.shape), **make)
        self.workspace = torch.empty(library.expert_layer_workspace_bytes(self.shape), **make)
        self.counters = torch.zeros(library.expert_layer_counter_bytes(self.shape), **make)
        slot_of, arena = arena_of(up, down)
        self.kept = (ids, weights, hidden, slot_of, arena)
        addresses = (t.data_ptr() for t in (ids, weights, hidden, arena, slot_of, self.plan_memory))
        self.pointers = Pointers(
            *addresses,
            self.workspace.data_ptr(),
            self.counters.data_ptr(),
            self.out.data_ptr(),
            up_bytes + down_bytes,
            up_bytes,
            0,
            0,
        )

    def enqueue(self, plan_only: bool = False) -> None:
        """Enqueues the layer, or its plan."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if self.library.expert_layer(
            self.shape, ctypes.byref(self.pointers), int(plan_only), stream
        ):
            raise RuntimeError("sida's layer failed")

    def __call__(self) -> Tensor:
        """Enqueues the layer; its result."""
        self.enqueue()
        return self.out

    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        """Active experts, their count and the order of rows, as plan_at() lays them out."""
        self.enqueue(plan_only=True)
        experts, assignments = self.shape[3], self.shape[1] * self.shape[2]
        words = self.plan_memory.view(torch.int32)
        behind = 4 * experts + 8 + (experts + 3) // 4 * 4
        return words[: 4 * experts], words[4 * experts :][:1], words[behind:][:assignments]


_arenas: dict[int, tuple[Tensor, Tensor]] = {}


def arena_of(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Experts in shuffled slots, and the slot of each."""
    if up.data_ptr() not in _arenas:
        _arenas.clear()
        experts = up.shape[0]
        slot_of = torch.randperm(experts, device=up.device)
        arena = torch.empty(
            experts, up[0].numel() + down[0].numel(), device=up.device, dtype=up.dtype
        )
        arena[slot_of, : up[0].numel()] = up.flatten(1)
        arena[slot_of, up[0].numel() :] = down.flatten(1)
        _arenas[up.data_ptr()] = (slot_of.to(torch.int32), arena)
    return _arenas[up.data_ptr()]


def grouped_chain(
    up: Tensor, down: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, gated: bool
) -> Layer:
    """Torch's grouped_mm with what must stand around it; no step waits for the host."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    ends = torch.arange(1, up.shape[0] + 1, device=up.device, dtype=torch.int32)
    top_k = ids.shape[1]

    def layer() -> Tensor:
        ordered, order = ids.flatten().sort()
        token = order // top_k
        offsets = torch.searchsorted(ordered, ends).to(torch.int32)
        h = grouped_mm(hidden[token], up.transpose(1, 2), offs=offsets)
        if gated:
            gate, beside = h.chunk(2, -1)
            h = F.silu(gate) * beside
        else:
            h = F.relu(h)
        o = grouped_mm(h, down.transpose(1, 2), offs=offsets)
        o = o * weights.flatten()[order].to(o.dtype).unsqueeze(-1)
        return torch.zeros_like(hidden).index_add_(0, token, o)

    return layer


def cublas_loop(
    up: Tensor, down: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, gated: bool
) -> Layer:
    """Two products an expert by cuBLAS, for the rows that `ids` give now."""
    rows = []
    for expert in torch.unique(ids).tolist():
        token, j = (ids == expert).nonzero(as_tuple=True)
        rows.append((expert, token, weights[token, j].to(hidden.dtype).unsqueeze(-1)))

    def layer() -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, token, weight in rows:
            h = hidden[token] @ up[expert].T
            if gated:
                gate, beside = h.chunk(2, -1)
                h = F.silu(gate) * beside
            else:
                h = F.relu(h)
            out.index_add_(0, token, (h @ down[expert].T) * weight)
        return out

    return layer


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Distance of two results, relative to the second."""
    exact = exact.double()
    return float((out.double() - exact).norm() / exact.norm())


def reference(
    up: Tensor, down: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, gated: bool
) -> Tensor:
    """The layer in f64."""
    out = torch.zeros(hidden.shape, device=hidden.device, dtype=torch.float64)
    for expert in torch.unique(ids).tolist():
        token, j = (ids == expert).nonzero(as_tuple=True)
        h = hidden[token].double() @ up[expert].double().T
        if gated:
            gate, beside = h.chunk(2, -1)
            h = F.silu(gate) * beside
        else:
            h = F.relu(h)
        out.index_add_(
            0, token, (h @ down[expert].double().T) * weights[token, j].double().unsqueeze(-1)
        )
    return out


def graph_of(function: Layer) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `function` enqueues."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def new_ids(tokens: int, experts: int, top_k: int, routing: str) -> Tensor:
    """Fresh choices of experts: `uniform`, `zipf`, or all tokens to `one`."""
    if routing == "one":
        return torch.arange(top_k, device="cuda").expand(tokens, top_k).contiguous()
    scores = torch.rand(tokens, experts, device="cuda")
    if routing == "zipf":  # Gumbel top-k over weights 1 / rank
        rank = torch.arange(1, experts + 1, device="cuda").float()
        scores = -torch.log(rank) - torch.log(-torch.log(scores.clamp(1e-9, 1 - 1e-7)))
    return scores.topk(top_k, -1).indices


def compile_tiles(case: tuple[str, int]) -> None:
    """Compiles Triton's kernels for one case, so that processes do it side by side."""
    from triton_moe import TritonLayer, options_for

    name, tokens = case
    hidden_size, intermediate, experts, top_k, gated = SHAPES[name]
    make: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    up = torch.empty(experts, (1 + gated) * intermediate, hidden_size, **make)
    down = torch.empty(experts, hidden_size, intermediate, **make)
    hidden = torch.empty(tokens, hidden_size, **make)
    ids = torch.zeros(tokens, top_k, device="cuda", dtype=torch.int32)
    weights = torch.zeros(tokens, top_k, device="cuda")
    nothing = torch.zeros(experts + 4, device="cuda", dtype=torch.int32)
    peer = TritonLayer(up, down, hidden, ids, weights, gated, lambda: (nothing, nothing, nothing))
    for tile in options_for(tokens * top_k / experts):
        try:
            peer(tile)
        except Exception as error:  # a tile may not fit
            print(name, tokens, tile, str(error)[:200], flush=True)
    torch.cuda.synchronize()


class Timer:
    """Times a graph, in microseconds, with cold L2."""

    def __init__(self) -> None:
        self.cold = torch.empty(64 << 20, device="cuda", dtype=torch.float32)
        self.begin, self.end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    def __call__(self, graph: torch.cuda.CUDAGraph) -> float:
        """What one replay takes."""
        self.cold.max()  # 256 MB pass through L2 and leave no dirty lines
        self.begin.record()
        graph.replay()
        self.end.record()
        self.end.synchronize()
        return float(self.begin.elapsed_time(self.end)) * 1e3


def measure(
    library: ctypes.CDLL,
    name: str,
    tokens: int,
    up: Tensor,
    down: Tensor,
    kernels: Sequence[str],
    routing: str,
    repetitions: int,
    tiles: Tile | None,
    timer: Timer,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Times one shape and token count; a row of the result."""
    hidden_size, intermediate, experts, top_k, gated = SHAPES[name]
    activation = "silu" if gated else "relu"
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=dtype)
    ids = new_ids(tokens, experts, top_k, routing).to(torch.int32)
    weights = torch.rand(tokens, top_k, device="cuda") + 0.1
    common = (up, down, hidden, ids, weights)
    candidates, errors = {}, {}
    own = {
        f"sida {kernel}": SidaLayer(library, kernel, *common, activation, gated)
        for kernel in kernels
    }
    layers: dict[str, Layer] = dict(own)
    row: dict[str, Any] = {
        "shape": name,
        "tokens": tokens,
        "routing": routing,
        "dtype": str(dtype).split(".")[1],
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if dtype == torch.bfloat16:
        from triton_moe import TritonLayer, options_for

        peer = TritonLayer(*common, gated, next(iter(own.values())).plan)
        if tiles is None:
            tried = {}
            for tile in options_for(tokens * top_k / experts):
                try:
                    graph = graph_of(functools.partial(peer, tile))
                    tried[tile] = statistics.median(timer(graph) for _ in range(5))
                except Exception as error:  # a tile may not fit
                    print(name, tokens, tile, str(error)[:200], flush=True)
            tiles = min(tried, key=tried.__getitem__)
            row["triton_tried"] = {str(tile): round(time, 2) for tile, time in tried.items()}
        row["triton_tile"] = tiles
        layers["triton"] = lambda: peer(tiles)
        layers["grouped_mm"] = grouped_chain(*common, gated)
    else:
        layers["cublas_loop"] = cublas_loop(*common, gated)
    if tokens <= 4096 or dtype != torch.bfloat16:
        exact = reference(*common, gated)
    else:
        exact = grouped_chain(*common, gated)()
    for label, layer in list(layers.items()):
        out = layer()
        torch.cuda.synchronize()
        errors[label] = relative_error(out, exact)
        candidates[label] = graph_of(layer)
    times: dict[str, list[float]] = {label: [] for label in candidates}
    active = 0
    for repetition in range(repetitions + 3):
        fresh = new_ids(tokens, experts, top_k, routing)
        ids.copy_(fresh)
        active += len(torch.unique(fresh))
        for label, graph in candidates.items():
            took = timer(graph)
            if repetition >= 3:
                times[label].append(took)
    matrices = 3 if gated else 2
    parameters = matrices * hidden_size * intermediate
    loaded = active / (repetitions + 3) * parameters * hidden.element_size() / READ_PER_US
    row["floor_us"] = round(max(loaded, 2 * parameters * tokens * top_k / FLOPS_PER_US), 2)
    row["median_us"] = {label: round(statistics.median(t), 2) for label, t in times.items()}
    row["min_us"] = {label: round(min(t), 2) for label, t in times.items()}
    row["errors"] = {label: float(f"{error:.2e}") for label, error in errors.items()}
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    row["sm_mhz_and_watts"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return row


def summary(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    times = row["median_us"]
    base = times.get("triton") or times.get("cublas_loop")
    shown = "  ".join(f"{label} {time:.1f}" for label, time in times.items())
    ratio = f"  {base / times['sida tuned']:.2f}x" if base and "sida tuned" in times else ""
    worst = max(row["errors"].values(), default=0)
    case = f"{row['shape']:11}{row['tokens']:6} {row['routing']:8}"
    return f"{case}floor {row['floor_us']:8.1f}  {shown}{ratio}  err {worst:.1e}"


def main() -> None:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", required=True)
    parser.add_argument("--json")
    parser.add_argument("--kernels", default="tuned", help="of sida's, separated by commas")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", help="separated by commas, instead of each shape's own")
    parser.add_argument("--routing", default="uniform", choices=("uniform", "zipf", "one"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--tiles", help="a result of this program, whose tiles Triton takes")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    library = ctypes.CDLL(options.library)
    for memory in ("plan", "workspace", "counter"):
        getattr(library, f"expert_layer_{memory}_bytes").restype = ctypes.c_uint64
    sys.path.insert(0, str(Path(__file__).parent))
    known = {}
    if options.tiles:
        for row in json.loads(Path(options.tiles).read_text())["rows"]:
            known[row["shape"], row["tokens"]] = tuple(row["triton_tile"])
    cases = [
        (name, tokens)
        for name in options.shapes.split(",")
        for tokens in (map(int, options.tokens.split(",")) if options.tokens else TOKENS[name])
    ]
    if options.dtype == "bfloat16" and not known:
        with multiprocessing.get_context("spawn").Pool(len(cases)) as pool:
            pool.map(compile_tiles, cases, chunksize=1)
    torch.manual_seed(0)
    timer, rows, dtype = Timer(), [], getattr(torch, options.dtype)
    started = time.perf_counter()
    for name in options.shapes.split(","):
        hidden_size, intermediate, experts, _, gated = SHAPES[name]
        make: dict[str, Any] = dict(device="cuda", dtype=dtype)
        up = (
            torch.randn(experts, (1 + gated) * intermediate, hidden_size, **make)
            * hidden_size**-0.5
        )
        down = torch.randn(experts, hidden_size, intermediate, **make) * intermediate**-0.5
        for tokens in (tokens for shape, tokens in cases if shape == name):
            kernels = options.kernels.split(",")
            if tokens > 2048:
                kernels = [k for k in kernels if k not in ("narrow", "wide")]
            row = measure(
                library, name, tokens, up, down, kernels, options.routing, options.repetitions,
                known.get((name, tokens)), timer, dtype,
            )  # fmt: skip
            rows.append(row)
            print(summary(row), f" {time.perf_counter() - started:.0f} s", flush=True)
            if options.json:
                device = {
                    "gpu": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "command": sys.argv,
                }
                Path(options.json).write_text(json.dumps({**device, "rows": rows}, indent=1) + "\n")
        del up, down
        _arenas.clear()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
