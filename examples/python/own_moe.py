# SPDX-License-Identifier: Apache-2.0
"""sida's pipeline put together by hand, around a MoE model of one's own."""

from collections.abc import Iterator, Sequence

from torch import Tensor, randn, stack

import sida


def forward(x: Tensor, routers: Tensor, layers: Sequence[sida.LayerExperts]) -> Tensor:
    for router, experts in zip(routers, layers, strict=True):  # the model: 2 of 16 experts, twice
        chosen = (x @ router).softmax(-1).topk(2)
        x = x + experts(x, chosen.indices, chosen.values)
    return x


def foretell(key: int, x: Tensor, routers: Tensor) -> sida.HashTable:
    p, ids = stack([(x @ r).softmax(-1) for r in routers]).topk(4)  # better: sida.HashPredictor
    where = {"keys": [key], "offsets": [0, len(x)]}
    return sida.HashTable(layers=2, candidates=4, **where, ids=ids.int(), probs=p, scale=p)


def run(batches: Tensor, routers: Tensor, up: Tensor, down: Tensor) -> Iterator[Tensor]:
    slabs = [[(up[n][e], down[n][e], None, None) for e in range(16)] for n in range(2)]
    config = sida.MoeConfig(layers=2, experts=16, hidden_size=64, intermediate_size=128, top_k=2)
    store = sida.ExpertStore.from_arrays(config, slabs)
    scheduler = sida.OffloadScheduler(sida.ExpertCache(store, "8 experts", policy="lookahead"))
    layers = [sida.LayerExperts(scheduler, n) for n in range(2)]
    tables = (foretell(key, batch, routers) for key, batch in enumerate(batches))
    scheduler.start(lambda: next(tables, None), ahead=4)  # on a thread of the scheduler's
    for batch in batches:
        scheduler.next_batch()
        yield forward(batch, routers, layers)
        scheduler.end_pass()
    print(scheduler.stats())


list(run(*(randn(s) / 8 for s in [(6, 32, 64), (2, 64, 16), (2, 16, 128, 64), (2, 16, 64, 128)])))
