# SPDX-License-Identifier: Apache-2.0
"""``sida convert``: safetensors of a pickled checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sida.cli.output import Json, note, print_json, progress, report, user_errors
from sida.stats import size


@user_errors
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Folder with pytorch_model.bin, or its shards and pytorch_model.bin.index.json.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder to make; nothing may be there yet.", show_default=False
        ),
    ],
    max_shard_size: Annotated[
        str, typer.Option(help='Of a file of weights: "5GB", "500MB".')
    ] = "5GB",
    as_json: Json = False,
) -> None:
    """Make safetensors files of a pickled checkpoint, which are read expert by expert.

    Weights are copied one by one as they are, and the config, the tokenizer and other files beside
    them too. Code in a pickle is never run: one that holds more than tensors is refused. OUT is
    there when all is done, and not before.
    """
    note("importing torch and transformers ...")
    from sida.huggingface.converting import convert_checkpoint

    with progress() as bar:
        task = bar.add_task("tensors")
        done = convert_checkpoint(
            source,
            target,
            max_shard_size=max_shard_size,
            begun=lambda tensors: bar.update(task, total=tensors),
            advanced=lambda: bar.advance(task),
        )
    if as_json:
        print_json(
            {
                "source": str(source),
                "folder": str(target),
                "files": done.files,
                "copied": done.copied,
                "tensors": done.tensors,
                "bytes": done.size,
            }
        )
        return
    files = done.files[0] if len(done.files) == 1 else f"{len(done.files)} files"
    report().print(
        f"{target} has {done.tensors:,} tensors, {size(done.size)}, in {files}, and "
        f"{', '.join(done.copied) or 'no other file'}.",
        soft_wrap=True,
    )
