# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of README.md and of pages in docs from benchmarks/results.

What stands in those files between `<!-- NAME -->` and `<!-- /NAME -->` is replaced by what the
function of that name returns; the words around it are written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report_decoder
import report_gpu
import report_gpu_decoder
from report_tables import limit, milliseconds, needs, nothing, number, table, targets_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BUDGETS = ROOT / "docs" / "choosing-a-budget"
PLOTS = ROOT / "docs" / "performance"
GPU = ROOT / "docs" / "performance-gpu.md"
FAMILIES = ROOT / "docs" / "families.md"
DECODER = ROOT / "docs" / "decoder-routing"
PAGES = (
    PLOTS.with_suffix(".md"),
    BUDGETS.with_suffix(".md"),
    DECODER.with_suffix(".md"),
    GPU,
    FAMILIES,
    ROOT / "README.md",
)
GIB, MIB = 1 << 30, 1 << 20

Results = Mapping[str, Any]
"""What each benchmark recorded, by its name; those on a GPU begin with `cuda_`."""

WAYS = {
    "resident": "sida, all experts resident",
    "table": "sida, 20 %, recorded table",
    "predictor": "sida, 20 %, trained predictor",
    "none": "sida, 20 %, no prediction",
    "accelerate": "accelerate, experts on disk",
    "hugging_face": "Hugging Face, all resident",
    "disk": "the disk alone, the same bytes",
}
WAYS_OF_DECODER = {"none": "sida, 25 %, no prediction", "accelerate": WAYS["accelerate"]}


def load_results() -> Results:
    """Read everything that was recorded."""
    paths = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}
    paths |= {f"cuda_{path.stem}": path for path in sorted(RESULTS.glob("cuda/*.json"))}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}


def of_cpu(results: Results) -> Results:
    """Leave out what has a page of its own: what was recorded on a GPU, and a decoder's routing."""
    return {
        name: found
        for name, found in results.items()
        if not name.startswith("cuda_") and name != "decoder_routing"
    }


def gains(results: Results) -> str:
    """In a few lines what a user gains and what it costs."""
    lines = []
    if "peak_memory" in results:
        worst = max(results["peak_memory"]["runs"], key=lambda run: run["peak"])
        lines.append(
            f"**Memory.** A model with {worst['all_experts'] / GIB:.1f} GiB of experts is loaded "
            f"and run in {worst['peak'] / MIB:.0f} MiB, of which "
            f"{results['peak_memory']['budget_bytes'] / MIB:.0f} MiB are experts and "
            f"{worst['other_weights'] / MIB:.0f} MiB the other weights."
        )
    if "encoder_resident" in results:
        ratios = [
            _ratio(times, "hugging_face", "sida")
            for shapes in results["encoder_resident"]["seconds"].values()
            for times in shapes.values()
        ]
        lines.append(
            f"**Speed with all experts in memory.** {min(ratios):.1f} to {max(ratios):.1f} times "
            "that of Hugging Face's own layers."
        )
    lines += _with_a_fifth(results)
    targets = _targets(results)
    missed = sum(not kept["met"] for kept in targets)
    if targets:
        lines.append(f"**Targets.** {missed} of {len(targets)} are missed; the page names them.")
    return "\n".join(f"- {line}" for line in lines) or nothing()


def _with_a_fifth(results: Results) -> list[str]:
    """Gain and price of a fifth of the experts, from the page cache and from the disk."""
    gain, price = [], []
    if "encoder_warm" in results:
        warm = results["encoder_warm"]["seconds"]
        gain.append(
            f"{_ratio(warm, 'accelerate', 'none'):.1f} times accelerate's where the page cache "
            "holds the checkpoint"
        )
        price.append(
            f"{_ratio(warm, 'none', 'resident'):.1f} times as long where the page cache holds the "
            "checkpoint"
        )
    if "encoder_cold" in results:
        cold = results["encoder_cold"]["seconds"]
        gain.append(f"{_ratio(cold, 'accelerate', 'none'):.1f} times from the disk")
        price.append(
            f"{_ratio(cold, 'table', 'resident'):.1f} times from the disk with perfect prediction "
            f"and {_ratio(cold, 'none', 'resident'):.1f} times without"
        )
    if not gain:
        return []
    return [
        f"**Speed with a fifth of them.** {', '.join(gain)}.",
        f"**The price.** Against all experts in memory a batch takes {', '.join(price)}.",
    ]


def machine(results: Results) -> str:
    """What the figures were measured on."""
    results = of_cpu(results)
    if not results:
        return nothing()
    keys = ("sida", "torch", "transformers", "python", "kernel", "omp_wait_policy", "threads")
    latest = max(results.values(), key=lambda result: result.get("date", ""))
    rows = [
        ("processor", f"{latest['cpu']['model']}, {', '.join(latest['cpu']['isa'])}"),
        ("cores", latest["cores"]),
        ("memory", f"{latest['memory_bytes'] / GIB:.0f} GiB" if "memory_bytes" in latest else "?"),
        *((key.replace("_", " "), latest[key]) for key in keys if latest.get(key) is not None),
    ]
    if "encoder_cold" in results:
        disk = results["encoder_cold"]["disk"]
        rows.append(
            (
                "disk",
                f"{disk['file_system']} on {disk['device']}; cold reads of whole experts by "
                f"{disk['threads']} threads: {disk['bytes_per_second'] / 1e9:.2f} GB/s, at best "
                f"{disk['bytes_per_second_best'] / 1e9:.2f}",
            )
        )
    commits = sorted({str(result.get("commit")) for result in results.values()})
    rows.append(("commits", ", ".join(commits)))
    return table(("", ""), rows)


def targets(results: Results) -> str:
    """Every target, what was measured, and whether it is kept."""
    return targets_table(_targets(results))


def missed(results: Results) -> str:
    """The targets that are not kept."""
    rows = [
        f"- {kept['what']}: {number(kept['figure'])}, target {limit(kept)}"
        for kept in _targets(results)
        if not kept["met"]
    ]
    return "\n".join(rows) if rows else "None."


def _targets(results: Results) -> list[Mapping[str, Any]]:
    return [kept for result in of_cpu(results).values() for kept in result.get("targets", [])]


@needs("expert_layer")
def expert_layer(results: Results) -> str:
    """One layer: time, bound and Hugging Face."""
    rows = [
        (
            row["dtype"],
            row["tokens"],
            f"{row['active_experts']:.0f}",
            milliseconds(row["sida_seconds"]),
            milliseconds(row["eager_seconds"]),
            f"{1e3 * row['bound_seconds']:.2f}",
            f"{row['share_of_bound']:.0%}",
            f"{row['times_faster_than_eager']:.2f}",
        )
        for row in results["expert_layer"]["rows"]
    ]
    head = ("", "tokens", "active", "sida, ms", "eager, ms", "bound, ms", "of the bound", "× eager")
    return table(head, rows)


@needs("encoder_resident")
def encoder_resident(results: Results) -> str:
    """The encoder with all experts, by dtype and batch."""
    rows = [
        (
            dtype,
            shape,
            milliseconds(times["sida"]),
            milliseconds(times["hugging_face"]),
            f"{_ratio(times, 'hugging_face', 'sida'):.2f}",
        )
        for dtype, shapes in results["encoder_resident"]["seconds"].items()
        for shape, times in shapes.items()
    ]
    return table(("", "batch", "sida, ms", "Hugging Face, ms", "times as fast"), rows)


def encoder_warm(results: Results) -> str:
    """The encoder at 20 %, page cache warm."""
    return _ways(results, "encoder_warm", ("resident", "none", "accelerate"))


def encoder_cold(results: Results) -> str:
    """The encoder at 20 %, page cache dropped."""
    return _ways(results, "encoder_cold", ("resident", "disk", "table", "none", "accelerate"))


@needs("decoder_disk")
def decoder_disk(results: Results) -> str:
    """The decoder at 25 %, page cache warm and dropped."""
    rows = [
        (
            WAYS_OF_DECODER[way],
            cache,
            milliseconds(times["prompt"]),
            milliseconds(times["token"]),
        )
        for cache, ways in results["decoder_disk"]["seconds"].items()
        for way, times in ways.items()
    ]
    return table(("", "page cache", "prompt, ms", "a token, ms"), rows)


@needs("peak_memory")
def peak_memory(results: Results) -> str:
    """What loading and running took."""
    worst = max(results["peak_memory"]["runs"], key=lambda run: run["peak"])
    rows = [
        ("all experts, in the file", worst["all_experts"]),
        ("budget of experts", results["peak_memory"]["budget_bytes"]),
        ("other weights", worst["other_weights"]),
        ("imports of Python, torch and transformers", worst["imports"]),
        ("peak while loading, above the imports", worst["loading"]),
        ("peak while running, above the imports", worst["peak"]),
    ]
    return table(("", "MiB"), [(name, f"{count / MIB:.0f}") for name, count in rows])


@needs("cache_lookup")
def cache_lookup(results: Results) -> str:
    """A lease taken and given back."""
    rows = [
        (name.replace("_", " "), f"{1e9 * times['median']:.0f}", f"{1e9 * times['minimum']:.0f}")
        for name, times in results["cache_lookup"]["seconds"].items()
    ]
    return table(("", "median, ns", "minimum, ns"), rows)


@needs("hash_building")
def hash_building(results: Results) -> str:
    """What hash tables cost."""
    rows = [
        (
            name,
            milliseconds(model["seconds"]["predictor"]),
            milliseconds(model["seconds"]["table"]),
            milliseconds(model["building_seconds"]),
            milliseconds(model["building_beside_seconds"]),
        )
        for name, model in results["hash_building"]["models"].items()
    ]
    head = (
        "",
        "batch with the predictor, ms",
        "with its tables, ms",
        "building a table, ms",
        "beside the computation, ms",
    )
    return table(head, rows)


@needs("stall")
def stall(results: Results) -> str:
    """Stall and time over a slow link."""
    sizes = results["stall"]["sizes"]
    rows = [
        (
            found["batch"],
            WAYS[name],
            milliseconds(found["stall_seconds"][name]),
            milliseconds(found["seconds"][name]),
            f"{found['bytes_moved'][name] / 1e6:.1f}",
        )
        for found in sizes
        for name in ("none", "table", "predictor")
    ]
    links = "; ".join(
        f"{found['bytes_per_second'] / 1e9:.2f} GB/s for batches of {found['batch']}, which take "
        f"{1e3 * found['resident_seconds']:.1f} ms with all experts resident"
        for found in sizes
    )
    return (
        table(("sentences", "", "stall, ms", "batch, ms", "moved, MB"), rows)
        + f"\n\nLink: {links}."
        + _plot("stall", "Stall of a batch of one sentence")
    )


@needs("bytes_moved")
def bytes_moved(results: Results) -> str:
    """Bytes moved against Belady, under policy auto and under every policy."""
    found = results["bytes_moved"]
    probes = [row for row in found["rows"] if "probe" in row["trace"]]
    worst = max(probes, key=lambda row: row["predictor"])
    links, at_most = found["links"]["bytes_per_second"], found["links"]["worst"]
    return (
        f"Policy auto, {found['ahead']} tables ahead where nothing else is said:\n\n"
        f"{_records(found['rows'])}\n\n"
        f"A loss: with the probes' LSTM up to {worst['predictor']:.2f} ({worst['trace']}, batches "
        f"of {worst['batch']}, {worst['memory']}). Over links of {links[0] / 1e9:g} to "
        f"{links[-1] / 1e9:g} GB/s the recorded tables come to at most {at_most['recorded']:.2f}, "
        f"the trained model's own predictor to {at_most['predictor']:.2f}, the probes' LSTM to "
        f"{at_most['probes']:.2f}.\n\n"
        f"Every policy, without tables and with the recorded ones:\n\n"
        f"{_records(found['policies'])}"
    )


@needs("bytes_moved")
def inspect_shown(results: Results) -> str:
    """What sida inspect prints."""
    return _shown(results, "inspect")


@needs("bytes_moved")
def replay_shown(results: Results) -> str:
    """What sida replay prints."""
    return _shown(results, "replay")


@needs("bytes_moved")
def policies_shown(results: Results) -> str:
    """What sida replay prints of all policies."""
    return _shown(results, "policies")


@needs("bytes_moved")
def auto_policy(results: Results) -> str:
    """How policy auto compares with the others where there are no tables."""
    moved: dict[str, list[int]] = {}
    for curve in results["bytes_moved"]["curves"]:
        if curve["tables"] == "none":
            moved.setdefault(curve["policy"], []).extend(curve["moved"])
    own = moved.pop("auto")
    ratios = {
        policy: [other / least for other, least in zip(others, own, strict=True)]
        for policy, others in moved.items()
    }
    least = [min(at_place) for at_place in zip(*ratios.values(), strict=True)]
    lowest = sum(ratio >= 1 for ratio in least)
    text = (
        f"Of {len(own)} combinations of trace, batch and budget it moves the fewest bytes in "
        f"{lowest}"
    )
    if lowest < len(own):
        text += f"; where it does not, {100 * (1 - min(least)):.2f} % more than the best"
    others = ", ".join(
        f"{policy} {min(values):.2f} to {max(values):.2f}" for policy, values in ratios.items()
    )
    return f"{text}. The others' bytes over its own: {others}."


BLOCKS: Mapping[str, Callable[[Results], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        gains,
        machine,
        targets,
        missed,
        expert_layer,
        encoder_resident,
        encoder_warm,
        encoder_cold,
        decoder_disk,
        peak_memory,
        cache_lookup,
        hash_building,
        stall,
        bytes_moved,
        inspect_shown,
        replay_shown,
        policies_shown,
        auto_policy,
    )
} | {**report_decoder.BLOCKS, **report_gpu.BLOCKS, **report_gpu_decoder.BLOCKS}


def filled(text: str, results: Results) -> str:
    """Return a page with its blocks as the results give them.

    Raises:
        ValueError: A block is unknown.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"expected a block among {', '.join(BLOCKS)}; got {name}")
        return f"<!-- {name} -->\n{BLOCKS[name](results)}\n<!-- /{name} -->"

    pattern = r"<!-- ([a-z-]+) -->\n.*?<!-- /\1 -->"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def write_all() -> None:
    """Write pages and plots."""
    results = load_results()
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    _draw(results)


def _ways(results: Results, name: str, ways: Sequence[str]) -> str:
    if name not in results:
        return nothing()
    found = results[name]
    moved = found["bytes_moved"]
    moved = moved if isinstance(moved, dict) else {"none": moved}
    rows = [
        (
            WAYS[way],
            milliseconds(found["seconds"][way]),
            f"{moved[way] / 1e6:.0f}" if way in moved else "",
        )
        for way in ways
    ]
    return table(("", "batch, ms", "moved, MB"), rows) + _plot(name, "Time of a batch")


def _records(rows: Sequence[Mapping[str, Any]]) -> str:
    body = [
        [_figures(cell) if isinstance(cell, float) else cell for cell in row.values()]
        for row in rows
    ]
    return table(list(rows[0]), body)


def _figures(value: float) -> str:
    return number(value) if value >= 100 else f"{value:.2f}"


def _shown(results: Results, name: str) -> str:
    shown = results["bytes_moved"]["shown"][name]
    return f"```console\n$ {shown['command']}\n{shown['output']}\n```"


def _plot(name: str, title: str) -> str:
    return f"\n\n![{title}]({PLOTS.name}/{name}.svg)"


def _ratio(times: Mapping[str, Any], slower: str, faster: str) -> float:
    return float(times[slower]["median"] / times[faster]["median"])


def _draw(results: Results) -> None:
    PLOTS.mkdir(exist_ok=True)
    for name, key in (("encoder_cold", "seconds"), ("encoder_warm", "seconds"), ("stall", "")):
        if name not in results:
            continue
        found = results[name]
        bars = found[key] if key else found["sizes"][0]["stall_seconds"]
        _bars(
            PLOTS / f"{name}.svg",
            {WAYS[way]: times["median"] for way, times in bars.items()},
            "stall of a batch, ms" if name == "stall" else "batch, ms",
        )
    if "decoder_routing" in results:
        DECODER.mkdir(exist_ok=True)
        found = results["decoder_routing"]
        with _figure(DECODER / "rates.svg", (1, len(found["tasks"])), (9.6, 4)) as panels:
            report_decoder.draw_rates(panels[0], found)
    if "bytes_moved" in results:
        BUDGETS.mkdir(exist_ok=True)
        curves = results["bytes_moved"]["curves"]
        _policies(BUDGETS / "policies.svg", curves)
        _tables(BUDGETS / "tables.svg", [c for c in curves if c["trace"] == curves[0]["trace"]])


def _bars(path: Path, seconds: Mapping[str, float], label: str) -> None:
    with _figure(path, (1, 1), (6.4, 0.5 + 0.4 * len(seconds))) as panels:
        axes = panels[0][0]
        bars = axes.barh(list(seconds), [1e3 * value for value in seconds.values()])
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(label)


def _policies(path: Path, curves: Sequence[Mapping[str, Any]]) -> None:
    traces = list(dict.fromkeys(curve["trace"] for curve in curves))
    batches = list(dict.fromkeys(curve["sentences"] for curve in curves))
    with _figure(path, (len(batches), len(traces)), (9.6, 5.4)) as panels:
        for curve in (c for c in curves if c["tables"] == "none"):
            axes = panels[batches.index(curve["sentences"])][traces.index(curve["trace"])]
            moved = [m / b for m, b in zip(curve["moved"], curve["belady"], strict=True)]
            width = 2.2 if curve["policy"] == "auto" else 1.2
            axes.plot(curve["share"], moved, label=curve["policy"], linewidth=width)
            axes.set_title(f"{curve['trace']}, batches of {curve['sentences']}", fontsize="small")
        for row in panels:
            row[0].set_ylabel("moved / least possible")
            for axes in row:
                axes.set_ylim(bottom=1)
        for axes in panels[-1]:
            axes.set_xlabel("experts in memory, %")
        panels[0][0].legend(frameon=False, fontsize="small")


def _tables(path: Path, curves: Sequence[Mapping[str, Any]]) -> None:
    names = {"none": "no tables", "predictor": "trained predictor", "recorded": "recorded tables"}
    batches = list(dict.fromkeys(curve["sentences"] for curve in curves))
    with _figure(path, (len(batches), 2), (9.6, 5.4)) as panels:
        for curve in (c for c in curves if c["policy"] == "auto"):
            left, right = panels[batches.index(curve["sentences"])]
            name = names[curve["tables"]]
            left.plot(curve["share"], [each / 1e6 for each in curve["moved"]], label=name)
            right.plot(curve["share"], [1e3 * each for each in curve["stall_seconds"]], label=name)
            if curve["tables"] == "recorded":
                least = [each / 1e6 for each in curve["belady"]]
                left.plot(curve["share"], least, "k--", label="least possible")
            left.set_title(f"batches of {curve['sentences']}", fontsize="small")
            right.set_title(f"batches of {curve['sentences']}", fontsize="small")
            left.set_ylabel("moved a batch, MB")
            right.set_ylabel("stall a batch, ms")
        for axes in (axes for row in panels for axes in row):
            axes.set_ylim(bottom=0)
        for axes in panels[-1]:
            axes.set_xlabel("experts in memory, %")
        panels[0][0].legend(frameon=False, fontsize="small")


@contextmanager
def _figure(path: Path, grid: tuple[int, int], inches: tuple[float, float]) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure, panels = pyplot.subplots(
            *grid, figsize=inches, squeeze=False, layout="constrained" if grid != (1, 1) else None
        )
        yield panels
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    write_all()
