"""Watching a cache while it works: how full it is, what it holds in bytes, what it keeps, and what that costs."""

from itertools import islice
from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache

from sketchkv.decode import score
from sketchkv.study.evaluate import TOKENS

KINDS = ("kv", "sketch", "policy", "total")
FILL = {
    "cache": "which cache",
    "step": "tokens fed so far",
    "stored": "tokens held per layer, sequence and KV head",
    "kv": "bytes of keys and values, one sequence, all layers",
    "sketch": "bytes of sketches",
    "policy": "bytes of positions, scores and other state",
    "total": "all bytes held",
}
LOSSES = {
    "cache": "which cache",
    "document": "held-out file",
    "loss": "nats per token over the full cache, beyond the tokens that fill the cache",
}


def held_bytes(cache):
    """Bytes a cache holds, by kind: as `SketchCache.nbytes`, with keys and values alone for transformers' full cache."""
    if isinstance(cache, DynamicCache):
        layers: list[Any] = cache.layers
        kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return {"kv": kv, "sketch": 0, "policy": 0, "total": kv}
    return cache.nbytes()


@torch.no_grad()
def fill(model, input_ids, caches, every=8):
    """Feeds a text token by token into each of `caches` (a dict of name to cache): a DataFrame (`FILL`), one row per cache
    and watched step, one step in `every` and the last. input_ids: `[1, tokens]`."""
    rows = []
    for name, cache in caches.items():
        for step in range(input_ids.shape[1]):
            model(input_ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            if step % every and step + 1 < input_ids.shape[1]:
                continue
            full = isinstance(cache, DynamicCache)
            (stored,) = {layer.keys.shape[-2] for layer in cache.layers} if full else {*cache.stored_tokens()}
            assert cache.get_seq_length() == step + 1, "a token was not counted"
            rows.append((name, step + 1, stored, *(held_bytes(cache)[kind] for kind in KINDS)))
    return pd.DataFrame(rows, columns=list(FILL))


def losses(model, docs, make_caches, skip, batch=16):
    """What each of `make_caches` (name to function returning a cache) loses beyond the first `skip` tokens of each document:
    a DataFrame (`LOSSES`). A cache that evicts nothing is refused, so that it cannot pass for a good one."""
    rows, names = [], iter(docs.names)
    for ids in docs.input_ids.to(model.device).split(batch):
        size = max(1, TOKENS // len(ids))
        full = score(model, ids, DynamicCache(config=model.config), chunk_size=size)
        here = list(islice(names, len(ids)))
        for name, make in make_caches.items():
            cache = make()
            lost = (score(model, ids, cache, chunk_size=size) - full)[:, skip:].mean(1)
            assert cache.evicted_tokens > 0, f"{name}: nothing was evicted"
            rows += [(name, document, loss) for document, loss in zip(here, lost.tolist())]
    return pd.DataFrame(rows, columns=list(LOSSES))
