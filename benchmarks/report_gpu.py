# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/performance-gpu.md and of README.md that show what a GPU measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness import target
from report_tables import milliseconds, needs, number, table, targets_table

Results = Mapping[str, Any]


@needs("cuda_encoder")
def gpu_machine(results: Results) -> str:
    """What the figures were measured on."""
    found = results["cuda_encoder"]
    gpu = found["gpu"]
    rows = [
        ("GPU", gpu["name"]),
        ("driver", gpu["driver_version"]),
        ("CUDA", gpu["cuda"]),
        ("link", f"PCIe {gpu['pcie.link.gen.current']}, {_gigabytes(found)} GB/s at best"),
        ("host", f"{found['cores']} cores, {found['cpu']['model']}"),
        *((key, found[key]) for key in ("torch", "transformers", "python", "commit")),
    ]
    return table(("", ""), rows)


@needs("cuda_encoder")
def gpu_gains(results: Results) -> str:
    """What a user gains and loses, by batch."""
    shapes = results["cuda_encoder"]["shapes"]
    medians = {name: _medians(figures) for name, figures in shapes.items()}
    rows = [
        (what, *(f"{times[slow] / times[fast]:.1f}" for times in medians.values()))
        for what, slow, fast in (
            ("20 %, foretold, against accelerate with 20 %", "accelerate", "recorded"),
            ("20 %, without tables, against accelerate with 20 %", "accelerate", "no_tables"),
            ("20 %, foretold, against Hugging Face with 100 %", "hugging_face", "recorded"),
            ("100 %, against Hugging Face", "hugging_face", "sida"),
        )
    ]
    against = [f"{times['grouped_mm'] / times['sida']:.2f}" for times in medians.values()]
    rows.append(("100 %, against a rewrite with grouped_mm", *against))
    return table(("times as fast", *_batches(shapes)), rows)


@needs("cuda_encoder")
def gpu_encoder(results: Results) -> str:
    """All experts on the GPU: times of a batch."""
    rows = [
        (
            batch,
            *(milliseconds(figures["resident"][who]) for who in ("sida", "grouped_mm")),
            milliseconds(figures["resident"]["hugging_face"]),
        )
        for batch, figures in _by_batch(results)
    ]
    return table(("batch", "sida, ms", "grouped_mm, ms", "Hugging Face, ms"), rows)


@needs("cuda_encoder")
def gpu_fewer(results: Results) -> str:
    """A share of the experts on the GPU: times against their bounds."""
    rows = []
    for batch, figures in _by_batch(results):
        for share, few in figures.items():
            if not share.endswith("%") or share.startswith("accelerate"):
                continue
            own, recorded, plain = few["resident"], few["recorded"], few["no_tables"]
            rows.append(
                (
                    batch,
                    share,
                    f"{1e3 * own['median']:.1f}",
                    f"{1e3 * recorded['moving']:.1f}",
                    milliseconds(recorded),
                    f"{recorded['over_bound']:.2f}",
                    f"{few['bytes_over_belady']:.2f}",
                    milliseconds(plain),
                    f"{plain['over_bound']:.2f}",
                )
            )
    head = ("batch", "experts", "R, ms", "M, ms", "foretold, ms", "/ max(R, M)", "bytes / Belady's")
    return table((*head, "no tables, ms", "/ (R + M)"), rows)


ORIGINS = {
    "encoder": "encoders",
    "expert_layer": "one layer",
    "expert_layer_h100": "one layer, of before",
    "decoder": "decoders",
    "compiled_decoder": "decoders, compiled",
    "families": "every family",
    "generate": "`generate`",
    "link": "the link",
    "layer_call": "one call",
    "hash_building": "hash tables",
    "memory": "memory",
}
"""Parts of the page, by the name of their results."""


@needs("cuda_encoder")
def gpu_origins(results: Results) -> str:
    """Which GPU and commit each part's figures are of."""
    rows = []
    for name, part in ORIGINS.items():
        if f"cuda_{name}" not in results:
            continue
        found = results[f"cuda_{name}"]
        alone = {s: of for s, of in found.get("shapes", {}).items() if "device" in of}
        for shape, figures in (alone or {"": found}).items():  # recorded one by one, or together
            gpu = figures.get("gpu", figures.get("device"))
            device = gpu["name"] if isinstance(gpu, Mapping) else gpu
            about = f"{part}, {shape}" if shape else part
            rows.append((about, device, figures["commit"][:7], figures["date"]))
    return table(("part", "GPU", "commit", "date"), rows)


@needs("cuda_expert_layer")
def gpu_layers(results: Results) -> str:
    """One layer: sida beside Triton, grouped_mm and a loop over cuBLAS; by GPU."""
    shown = [
        f"On an {found['gpu']}:\n\n{_layers(found)}"
        for name, found in results.items()
        if name.startswith("cuda_expert_layer")
    ]
    return "\n\n".join(shown)


def _layers(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        times = row["median_us"]
        own = times["sida tuned"]  # the kernel that sida itself chooses
        others = [times.get(name) for name in ("triton", "grouped_mm", "cublas_loop")]
        rows.append(
            (
                f"{row['shape']}, {row['dtype']}, {row['routing']}",
                row["tokens"],
                number(own),
                *(number(other) if other else "" for other in others),
                *(f"{other / own:.2f}" if other else "" for other in others),
            )
        )
    peers = ("Triton", "grouped_mm", "cuBLAS")
    head = ("layer", "tokens", "sida, µs", *(f"{peer}, µs" for peer in peers))
    return table((*head, *(f"× {peer}" for peer in peers)), rows)


LAYER_TARGETS = {  # times as fast as Triton, uniform routing, bfloat16; LEAST everywhere else
    "switch-128": {1: 1.8, 64: 1.06, 1024: 1.0, 16384: 1.3},
    "qwen3-30b": {1: 1.28, 64: 1.02, 1024: 1.18, 4096: 1.3, 16384: 1.18},
    "mixtral": {1: 1.03, 64: 1.0, 1024: 1.18, 16384: 1.1},
}
LEAST = {"triton": 0.95, "grouped_mm": 1.0, "cublas_loop": 1.0}
"""How fast a layer is to be beside each peer, at least, as ratios."""


@needs("cuda_expert_layer")
def gpu_layer_targets(results: Results) -> str:
    """What one layer is to reach beside its peers, and whether it does."""
    named, worst = [], dict[str, tuple[float, str]]()
    for row in results["cuda_expert_layer"]["rows"]:
        times = row["median_us"]
        case = f"{row['shape']}, {row['dtype']}, {row['routing']}, {row['tokens']} tokens"
        ratios = {peer: times[peer] / times["sida tuned"] for peer in LEAST if peer in times}
        worst |= {
            peer: min(worst.get(peer, (ratio, case)), (ratio, case))
            for peer, ratio in ratios.items()
        }
        wanted = LAYER_TARGETS[row["shape"]].get(row["tokens"])
        if wanted and row["routing"] == "uniform" and "triton" in ratios:
            named.append(target(f"{case}, × Triton", ratios["triton"], at_least=wanted))
    least = [
        target(f"the least of all × {peer}: {case}", ratio, at_least=LEAST[peer])
        for peer, (ratio, case) in worst.items()
    ]
    return targets_table([*named, *least])


@needs("cuda_link")
def gpu_link(results: Results) -> str:
    """Rates of copies, and what a demand waits behind prefetches."""
    found = results["cuda_link"]
    copies = {copy["chunk_bytes"]: copy["gb_a_second"] for copy in found["copies"]}
    rows = [
        (
            row["threads"],
            f"{row['chunk_bytes'] / 2**20:.0f}",
            row["gb_a_second"],
            f"{row['gb_a_second'] / copies[row['chunk_bytes']]:.2f}",
            number(row["demand_alone_us"]),
            number(row["demand_behind_prefetches_us"]),
            number(row["worst_us"]),
        )
        for row in found["scheduler"]
    ]
    head = ("threads", "chunk, MiB", "GB/s", "of plain copies", "demand alone, µs")
    return table((*head, "behind 64 prefetches, µs", "at worst, µs"), rows)


@needs("cuda_layer_call")
def gpu_call(results: Results) -> str:
    """What a call keeps the calling thread for."""
    found = results["cuda_layer_call"]
    names = {
        "own_layer": "`OffloadedExperts`",
        "own_layer_to_out": "`OffloadedExperts`, with `out=`",
        "model_layer": "a layer of an offloaded model",
        "small_op": "one elementwise operation of torch's",
    }
    rows = [
        (name, *(f"{1e6 * found['seconds'][key][kind]:.1f}" for kind in ("median", "minimum")))
        for key, name in names.items()
    ]
    shown = table(("a call of", "median, µs", "minimum, µs"), rows)
    return f"{shown}\n\n{targets_table(found['targets'])}"


@needs("cuda_hash_building")
def gpu_tables(results: Results) -> str:
    """One hash table of a predictor on the GPU, and on the CPU."""
    rows = [
        (
            kind,
            batch,
            *(milliseconds(found[place]) for place in ("cuda", "cpu")),
            f"{found['cpu']['median'] / found['cuda']['median']:.1f}",
            f"{found['workspace_bytes'] / 2**20:.0f}",
        )
        for kind, shapes in results["cuda_hash_building"]["tables"].items()
        for batch, found in zip(_batches(shapes), shapes.values(), strict=True)
    ]
    head = ("predictor", "batch", "GPU, ms", "CPU, ms", "times as fast", "GPU memory, MiB")
    return table(head, rows)


@needs("cuda_hash_building")
def gpu_tables_map(results: Results) -> str:
    """What `map` loses by predicting."""
    found = results["cuda_hash_building"]
    shapes = found["map"]
    rows = [
        (
            batch,
            *(milliseconds(figures["seconds"][who]) for who in ("recorded", "cuda", "cpu")),
            *(f"{1e3 * figures['building_seconds'][place]:.2f}" for place in ("cuda", "cpu")),
        )
        for batch, figures in zip(_batches(shapes), shapes.values(), strict=True)
    ]
    head = ("batch", "recorded table, ms", "predictor on the GPU, ms", "on the CPU, ms")
    shown = table((*head, "a table on the GPU, ms", "on the CPU, ms"), rows)
    return f"{shown}\n\n{targets_table(found['targets'])}"


@needs("cuda_memory")
def gpu_memory(results: Results) -> str:
    """The GPU's memory that an offloaded encoder takes, against its limit."""
    found = results["cuda_memory"]
    rows = [
        (
            " x ".join(map(str, run["shape"])),
            f"{run['share']:.0%}",
            *(f"{run[what] / 2**20:.0f}" for what in ("taken_bytes", "limit_bytes")),
            run["samples"],
            f"{1e3 * run['longest_gap_seconds']:.1f}",
            "yes" if run["kept"] else "**no**",
        )
        for run in found["runs"]
    ]
    head = ("batch", "experts", "taken, MiB", "limit, MiB", "samples", "longest gap, ms", "kept")
    origin = f"{found['gpu']['name']}, {found['date']}, commit {found['commit']}"
    return f"{table(head, rows)}\n\n{origin}."


@needs("cuda_soak")
def gpu_soak(results: Results) -> str:
    """Random work: how many seeds went right, run by run and in all."""
    found = results["cuda_soak"]
    totals = found["totals"]
    rows = [
        (
            run["date"],
            run["device"],
            run["commit"][:7],
            run["seeds"],
            run["right_passes"],
            f"{run['seconds']:.0f}" if "seconds" in run else "",
            run.get("failed", ""),
        )
        for run in found["runs"]
    ]
    counts = [totals[what] for what in ("seeds", "right_passes")]
    rows.append(("all", "", "", *counts, f"{totals['seconds']:.0f}", totals["failed_runs"]))
    return table(("run", "GPU", "commit", "seeds", "right passes", "seconds", "failed"), rows)


@needs("cuda_encoder")
def gpu_targets(results: Results) -> str:
    """Every target of the encoder."""
    targets = results["cuda_encoder"]["targets"]
    missed = sum(not kept["met"] for kept in targets)
    return f"{missed} of {len(targets)} are missed.\n\n{targets_table(targets)}"


def _medians(figures: Mapping[str, Any]) -> dict[str, float]:
    times = {
        **figures["resident"],
        **{name: figures["20%"][name] for name in ("recorded", "no_tables")},
        "accelerate": figures["accelerate_20%"],
    }
    return {name: found["median"] for name, found in times.items()}


def _by_batch(results: Results) -> Sequence[tuple[str, Any]]:
    shapes = results["cuda_encoder"]["shapes"]
    return list(zip(_batches(shapes), shapes.values(), strict=True))


def _batches(shapes: Mapping[str, Any]) -> list[str]:
    return [name.replace("x", " x ") for name in shapes]


def _gigabytes(found: Mapping[str, Any]) -> str:
    return f"{found['link_bytes_per_second'] / 1e9:.1f}"


BLOCKS = {
    function.__name__.replace("_", "-"): function
    for function in (
        gpu_machine,
        gpu_gains,
        gpu_encoder,
        gpu_fewer,
        gpu_layers,
        gpu_layer_targets,
        gpu_origins,
        gpu_link,
        gpu_call,
        gpu_tables,
        gpu_tables_map,
        gpu_memory,
        gpu_soak,
        gpu_targets,
    )
}
