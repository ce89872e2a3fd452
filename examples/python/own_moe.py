# SPDX-License-Identifier: Apache-2.0
"""sida's pipeline put together by hand, around a MoE model of one's own."""

import torch

import sida


def forward(embedded, routers, layers):  # the model: each token goes to 2 of 16 experts, twice
    for router, experts in zip(routers, layers, strict=True):
        weights, index = (embedded @ router).softmax(-1).topk(2)
        embedded = embedded + experts(embedded, index, weights)
    return embedded


def foretell(key, embedded, routers):  # a trained sida.HashPredictor does this better
    scale, ids = torch.stack([(embedded @ r).softmax(-1) for r in routers]).topk(4)
    options = {"keys": [key], "offsets": [0, len(embedded)], "probs": scale, "scale": scale}
    return sida.HashTable(layers=2, candidates=4, ids=ids.int(), **options)


def run(batches, routers, up, down, memory="8 experts"):
    slabs = [[(up[n][e], down[n][e], None, None) for e in range(16)] for n in range(2)]
    config = sida.MoeConfig(layers=2, experts=16, hidden_size=64, intermediate_size=128, top_k=2)
    store = sida.ExpertStore.from_arrays(config, slabs)
    scheduler = sida.OffloadScheduler(sida.ExpertCache(store, memory, policy="lookahead"))
    layers = [sida.LayerExperts(scheduler, n) for n in range(2)]
    tables = (foretell(key, batch, routers) for key, batch in enumerate(batches))
    scheduler.start(lambda: next(tables, None), ahead=4)  # on a thread of the scheduler's
    for batch in batches:
        scheduler.next_batch()
        yield forward(batch, routers, layers)
        scheduler.end_pass()
    print(scheduler.stats())


if __name__ == "__main__":
    weights = [torch.randn(2, *shape) / 8 for shape in ((64, 16), (16, 128, 64), (16, 64, 128))]
    outputs = list(run(torch.randn(6, 32, 64), *weights))
