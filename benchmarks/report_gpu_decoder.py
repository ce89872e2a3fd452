# SPDX-License-Identifier: Apache-2.0
"""The blocks of docs/performance-gpu.md that show decoders, alone and behind an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from report_tables import milliseconds, needs, table, targets_table

Results = Mapping[str, Any]
NAME, COMPILED, GENERATE = "cuda_decoder", "cuda_compiled_decoder", "cuda_generate"
EVERY = "cuda_families"
PEERS = ("eager", "grouped_mm", "batched_mm")
BESIDE_PEERS = ("", "sida, ms", *(f"{peer}, ms" for peer in PEERS))
WAYS = {"no_prediction": "without prediction", "look_ahead": "look-ahead"}
CANDIDATES = {
    "no_prediction": "sida, {share}, without prediction",
    "look_ahead": "sida, {share}, look-ahead",
    "resident": "sida, 100%",
    "hugging_face": "Hugging Face, 100%",
    "accelerate": "accelerate, {share}",
}
"""Of whole calls of `generate`."""
FEWER = ("a token", "hits", "R, ms", "M, ms", "ms", "/ (R + M)")


@needs(NAME)
def gpu_decoder(results: Results) -> str:
    """All experts on the GPU, and half of them on the host by accelerate: times by shape."""
    rows = []
    for shape, found in results[NAME]["shapes"].items():
        for what, key, moved in (
            ("a token", "resident", "token"),
            ("a prompt of 512", "prompt_resident", "prompt"),
        ):
            times = found[key]
            half = milliseconds(found["accelerate"][moved])
            name = f"{shape}, {found['layers']} layers, {what}"
            rows.append((name, *_beside_peers(times), half))
    return table((*BESIDE_PEERS, "accelerate, ms"), rows)


@needs(NAME)
def gpu_decoder_fewer(results: Results) -> str:
    """A share of the experts on the GPU: a token's times against R + M."""
    shapes = results[NAME]["shapes"].items()
    return table(FEWER, [row for shape, found in shapes for row in _fewer_rows(shape, found)])


@needs(NAME)
def gpu_decoder_alone(results: Results) -> str:
    """MoE blocks and their experts by themselves."""
    rows = []
    for shape, found in results[NAME]["shapes"].items():
        for part, what in (
            ("blocks_eager", "block, to its end"),
            ("experts_eager", "experts, to their end"),
            ("experts_thread", "experts, calling thread"),
        ):
            times = found["alone"][part]
            figures = [f"{1e6 * times[who]['median']:.0f}" for who in ("sida", *PEERS[1:])]
            rows.append((f"{shape}, {what}", *figures))
    return table(("a layer, one token", "sida, µs", "grouped_mm, µs", "batched_mm, µs"), rows)


@needs(NAME)
def gpu_decoder_targets(results: Results) -> str:
    """Every target of the decoders, and how skewed the routing was."""
    found = results[NAME]
    skews = ", ".join(
        f"{100 * figures['most_used_tenth']:.0f} % ({shape})"
        for shape, figures in found["shapes"].items()
    )
    missed = sum(not kept["met"] for kept in found["targets"])
    return (
        f"The tenth of a layer's experts that is used most has {skews} of its uses.\n\n"
        f"{missed} of {len(found['targets'])} are missed.\n\n{targets_table(found['targets'])}"
    )


@needs(EVERY)
def gpu_families(results: Results) -> str:
    """All experts on the GPU: a token, a prompt and the MoE block alone, by family."""
    rows = []
    for family, found in results[EVERY]["shapes"].items():
        for what, key in (
            ("a token", "resident"),
            ("a prompt of 512", "prompt_resident"),
            ("a layer's MoE block", "block"),
        ):
            rows.append((f"{family}, {what}", *_beside_peers(found[key])))
    shown = table(BESIDE_PEERS, rows)
    return f"{shown}\n\n{targets_table(results[EVERY]['targets'])}"


@needs(COMPILED)
def gpu_decoder_compiled(results: Results) -> str:
    """Compiled steps: all experts on the GPU, a share of them, and the targets."""
    rows: list[tuple[str, ...]] = []
    few_rows: list[tuple[str, ...]] = []
    for shape, found in results[COMPILED]["shapes"].items():
        times = found["resident"]
        figures = [milliseconds(times[way]) for way in ("sida", "sida_eager", *PEERS[1:])]
        rows.append((shape, *figures, milliseconds(found["accelerate"])))
        few_rows += _fewer_rows(shape, found)
    head = ("", "sida, ms", "sida, not compiled, ms", "grouped_mm, ms", "batched_mm, ms")
    targets = targets_table(results[COMPILED]["targets"])
    return "\n\n".join(
        (table((*head, "accelerate, not compiled, ms"), rows), table(FEWER, few_rows), targets)
    )


@needs(GENERATE)
def gpu_generate(results: Results) -> str:
    """Whole calls of `generate`: times by batch and candidate, and the targets."""
    found = results[GENERATE]
    share = f"{found['share']:.0%}"
    rows = [
        (
            f"{batch.replace('x', ' x ')}, {what.format(share=share)}",
            milliseconds(figures[way]),
            f"{figures['accelerate']['median'] / figures[way]['median']:.1f}",
            *_moving(figures[way]),
            f"{100 * figures[way]['same_tokens']:.0f} %",
        )
        for batch, figures in found["shapes"].items()
        for way, what in CANDIDATES.items()
    ]
    head = (f"{found['new_tokens']} tokens a sentence", "ms", "× accelerate", "hits", "M, ms")
    shown = table((*head, "tokens as Hugging Face's"), rows)
    return f"{shown}\n\n{targets_table(found['targets'])}"


def _beside_peers(times: Mapping[str, Any]) -> list[str]:
    """Return sida's time and those of the peers that were measured, as BESIDE_PEERS has them."""
    ways = ("sida", *PEERS)
    return [milliseconds(times[way]) if way in times else "" for way in ways]


def _moving(figures: Mapping[str, Any]) -> tuple[str, str]:
    if "moving" not in figures:
        return "", ""
    return f"{100 * figures['hit_rate']:.0f} %", f"{1e3 * figures['moving']:.1f}"


def _fewer_rows(shape: str, found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for share in _shares(found):
        own = found[share]["resident"]["median"]
        for way, what in WAYS.items():
            few = found[share][way]
            rows.append(
                (
                    f"{shape}, {share}, {what}",
                    f"{100 * few['hit_rate']:.0f} %",
                    f"{1e3 * own:.1f}",
                    f"{1e3 * few['moving']:.1f}",
                    milliseconds(few),
                    f"{few['over_bound']:.2f}",
                )
            )
    return rows


def _shares(found: Mapping[str, Any]) -> list[str]:
    return [name for name in found if name.endswith("%")]


BLOCKS = {
    function.__name__.replace("_", "-"): function
    for function in (
        gpu_decoder,
        gpu_decoder_fewer,
        gpu_decoder_alone,
        gpu_decoder_targets,
        gpu_decoder_compiled,
        gpu_families,
        gpu_generate,
    )
}
