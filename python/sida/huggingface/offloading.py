# SPDX-License-Identifier: Apache-2.0
"""Offloading the experts of a model that is in memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

from torch import nn

from sida.huggingface import checks
from sida.huggingface.adapter import find_adapter
from sida.huggingface.engine import Memory, ModelExperts, Place
from sida.huggingface.handle import Offloaded
from sida.huggingface.look_ahead import LookAhead
from sida.huggingface.tables import open_tables
from sida.torch.teacher import model_device

if TYPE_CHECKING:
    import torch

    from sida import HashPredictor, HashTable
    from sida.torch import Predictor


def offload(
    model: nn.Module,
    *,
    memory: Memory,
    device: str | torch.device | None = None,
    routing: str = "exact",
    predictor: HashPredictor
    | HashTable
    | Predictor
    | str
    | os.PathLike[str]
    | Literal[False]
    | None = None,
    policy: str = "auto",
    threads: int | None = None,
    skip_padding: bool = False,
    offload_dir: str | os.PathLike[str] | None = None,
    host_memory: Memory | None = None,
) -> Offloaded:
    """Keep no more of a model's experts in fast memory than `memory` allows.

    Switch Transformers (encoder, encoder-decoder, with a language-modelling head), and models whose
    experts follow transformers' experts interface. The experts are written to one file, layer by
    layer, and read as they are needed; if all fit, they stay where they are. For a GPU they move,
    layer by layer, to pinned memory. The model is then called as before, `generate` and
    `torch.compile` included, and gives the same results: to the bit at every budget, policy and
    predictor. Inference only.

    Meanwhile `save_pretrained` writes the experts one by one, as transformers would; `state_dict`
    copies all of them to memory, if there is enough; and what would copy the model, or change the
    dtype or device of its other weights alone, raises and says what to do.

    Args:
        model: A model of transformers; changed in place until the handle is closed.
        memory: Limit for experts over all layers: bytes (an int, "2GiB"), a share of all (0.2,
            "20%"), or a count ("12 experts", "1 expert").
        device: Where experts are computed, and where the other weights go: "cpu", "cuda", "cuda:1";
            by default where the model is. For a GPU the experts are kept in pinned memory.
        routing: "exact": the model's own routers decide, and a predictor only brings experts
            early. "predicted" (SiDA-MoE): in the layers that the predictor foretells, experts and
            scales come from its hash table, and the routers never run; their logits are then
            missing among a model's `router_logits`, or zeros in a decoder. Padding is left out in
            those layers. A decoder's pass needs a DynamicCache that it filled itself, or none.
        predictor: From `sida.train_predictor`, the path of one, or (of an encoder) a recorded
            HashTable. It works where the experts are computed; a `sida.HashPredictor` where it was
            loaded for. Whatever it is, with exact routing a decoder's passes look ahead, too: the
            next layer's router, on this layer's input, tells which experts may come early; see
            `look_ahead` in `stats()`. False: no look-ahead either.
        policy: Which expert makes way: "fifo", "lru", "lfu", "lookahead" (what the hash tables
            need last), or "auto".
        threads: For computing experts; by default as many as torch uses, and no more than the
            process may run at once: a container's CPU quota and the processors of its affinity
            bound them.
        skip_padding: Leave out tokens of padding; their rows come out of the experts as zeros.
        offload_dir: Where the experts' file goes; by default the system's temporary folder.
        host_memory: Limit of pinned memory, as `memory`, for a GPU; experts beyond it are read from
            the file each time, by four threads, through a ring of up to 16 MiB of it. By default
            experts of a model in RAM all move there, one layer after the other, and those of a
            checkpoint as far as nine tenths of the RAM that is available, to a container too.

    Returns:
        A handle; closing it (or leaving it as a context) gives the model its experts back.

    Raises:
        ValueError: Unknown or dispatched model, quantised experts, LoRA on experts, a second
            handle, a budget too small, a predictor of another model.
        OSError: There is no room for the experts' file.
        MemoryError: The GPU has less memory free than the budget, or the RAM cannot be pinned.
        CudaError: There is no such GPU, or no CUDA part of sida.
    """
    checks.warn_of_untested_transformers()
    checks.check_options(
        routing=routing,
        predictor=predictor,
        policy=policy,
        threads=threads,
    )
    adapter = find_adapter(model)
    checks.check_model(model)
    dtype = checks.experts_dtype(adapter)
    place = Place(checks.find_device(device, model_device(model), host_memory), host_memory)
    tables = open_tables(predictor, adapter, device=place.device)
    return Offloaded(
        model,
        adapter,
        ModelExperts(adapter, adapter.config(dtype), offload_dir, place),
        memory=memory,
        device=place.device,
        routing=routing,
        tables=tables,
        look_ahead=LookAhead(adapter, wanted=predictor is not False),
        policy=policy,
        threads=threads,
        skip_padding=skip_padding,
    )
