# SPDX-License-Identifier: Apache-2.0
"""What a compiled graph calls of an offloaded model, as operators of torch.

A graph has neither locks nor Python objects; its operators find the handle and the layer by number.
They do more than their results show (a pass begins, experts are loaded and counted), so all of them
are declared to write to one tensor, `ORDER`: none is left out, and they run in the model's order.

None of these goes into a CUDA graph: a replay would repeat the kernels of a call, not the
decisions about which experts are brought. Where all experts stay on the GPU there are none to make,
and `staying_experts`, which shows all that it does, may go into one. What it must not pass, the
beginning and the end of its pass, it is tied to by tensors: `begin_pass` gives what the stack
reads, `end_pass` takes what the stack gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

with torch.inference_mode(False):  # to be written to outside inference mode, too
    ORDER = torch.zeros(1, dtype=torch.int64, device="cpu")
"""Stands for all that the operators change; nothing is ever read from it or written to it."""


class CompiledPasses(Protocol):
    """Begins and ends the passes of a handle."""

    def begin_compiled(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        stack: int,
        arrangement: str,
    ) -> None:
        """Begin a stack's pass, in turn; it lasts until `end_compiled`, or the call's end.

        Raises:
            RuntimeError: Experts are not where they were when the graph was made.
        """

    def end_compiled(self) -> None:
        """End the pass that this thread began."""


class CompiledExperts(Protocol):
    """Computes the experts of a layer."""

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute them as the router chose."""

    def run_staying(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Compute them where all of them stay; in a CUDA graph, if one is being captured."""

    def run_predicted(self, hidden_states: Tensor) -> Tensor:
        """Compute them as the pass's hash table says."""


_numbers = itertools.count(1)
_owners: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(owner: CompiledPasses | CompiledExperts) -> int:
    """Return the number by which operators find `owner` while it lives."""
    number = next(_numbers)
    _owners[number] = owner
    return number


def _owner(number: int) -> Any:
    owner = _owners.get(number)
    if owner is None:
        raise RuntimeError(
            "this graph was compiled for an offloaded model that is gone: compile the model again"
        )
    return owner


_LIBRARY: Any = torch.library.Library("sida", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag,)
UNSAFE = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
"""Keeps an operator out of CUDA graphs; before torch knew the tag, `ORDER` did."""


def _operator(
    schema: str, fake: Callable[..., Any], tags: tuple[torch.Tag, ...]
) -> Callable[[Callable[..., Any]], Any]:
    """Declare an operator, whose decorated function computes it on every device.

    By torch's library itself: what `torch.library.custom_op` puts around a function that writes to
    an argument costs the calling thread three times as long as the call.

    Args:
        schema: Its name, arguments and results.
        fake: Gives results of the right shape, while a graph is traced.
        tags: Beside those of all of sida's.
    """
    name = schema.partition("(")[0]

    def declare(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema, tags=(*_TAGS, *tags))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sida::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.sida, name).default

    return declare


def _begun(
    order: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, *arguments: Any
) -> Tensor:
    for tensor in (input_ids, inputs_embeds):
        if tensor is not None:
            return tensor.clone(memory_format=torch.contiguous_format)
    return order.new_empty(0)


def _nothing(order: Tensor, *arguments: Any) -> None:
    return None


def _like(hidden_states: Tensor, *arguments: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _rows(order: Tensor, hidden_states: Tensor, *arguments: Any) -> Tensor:
    return _like(hidden_states)


@_operator(
    "begin_pass(Tensor(a!) order, Tensor? input_ids, Tensor? inputs_embeds, "
    "Tensor? attention_mask, int handle, int stack, str arrangement) -> Tensor",
    _begun,
    UNSAFE,
)
def begin_pass(
    order: Tensor,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    handle: int,
    stack: int,
    arrangement: str,
) -> Tensor:
    """Begin a pass; return a copy of the ids, or else the embeddings, that it reads."""
    passes: CompiledPasses = _owner(handle)
    passes.begin_compiled(input_ids, inputs_embeds, attention_mask, stack, arrangement)
    return _begun(order, input_ids, inputs_embeds)


@_operator("end_pass(Tensor(a!) order, Tensor? result, int handle) -> ()", _nothing, UNSAFE)
def end_pass(order: Tensor, result: Tensor | None, handle: int) -> None:
    """End the pass that this thread began, whose stack gave `result`."""
    passes: CompiledPasses = _owner(handle)
    passes.end_compiled()


@_operator(
    "experts(Tensor(a!) order, Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, "
    "int layer) -> Tensor",
    _rows,
    UNSAFE,
)
def experts(
    order: Tensor, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: int
) -> Tensor:
    """Compute the experts of a layer: [T, H], [T, k] and [T, k] to [T, H]."""
    owner: CompiledExperts = _owner(layer)
    return owner.run(hidden_states, top_k_index, top_k_weights)


@_operator(
    "predicted_experts(Tensor(a!) order, Tensor hidden_states, int layer) -> Tensor", _rows, UNSAFE
)
def predicted_experts(order: Tensor, hidden_states: Tensor, layer: int) -> Tensor:
    """Compute the experts of a layer by hash table: [T, H] to [T, H]."""
    owner: CompiledExperts = _owner(layer)
    return owner.run_predicted(hidden_states)


@_operator(
    "staying_experts(Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, int layer) "
    "-> Tensor",
    _like,
    (),
)
def staying_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, layer: int
) -> Tensor:
    """Compute the experts of a layer, as `experts`, where they all stay on the GPU."""
    owner: CompiledExperts = _owner(layer)
    return owner.run_staying(hidden_states, top_k_index, top_k_weights)
