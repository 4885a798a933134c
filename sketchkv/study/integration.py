"""Watching a cache while it works: how full it is, what it keeps, what it holds in bytes."""

from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache

from sketchkv.decode import score
from sketchkv.study.evaluate import TOKENS


@torch.no_grad()
def fill(model, input_ids, caches, every=8):
    """Feeds a text token by token into each of `caches` (a dict of name to cache) and watches them fill.

    input_ids: `[1, tokens]`. Returns a long table: one row per cache, layer and watched step.
    """
    rows = []
    for name, cache in caches.items():
        for step in range(input_ids.shape[1]):
            model(input_ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            if step % every and step + 1 < input_ids.shape[1]:
                continue
            full = isinstance(cache, DynamicCache)
            for layer in range(len(cache.layers)):
                stored = cache.layers[layer].keys.shape[-2] if full else cache.stored_tokens()[layer]
                rows.append((name, step + 1, layer, cache.get_seq_length(layer), stored))
    return pd.DataFrame(rows, columns=["cache", "step", "layer", "seen_tokens", "stored_tokens"])


def held_bytes(cache):
    """Bytes a cache holds, by kind: as `SketchCache.nbytes`, with keys and values alone for transformers' full cache."""
    if isinstance(cache, DynamicCache):
        layers: list[Any] = cache.layers
        kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return {"kv": kv, "sketch": 0, "policy": 0, "total": kv}
    return cache.nbytes()


@torch.no_grad()
def memory(model, input_ids, make_caches, lengths):
    """Bytes held after texts of growing length: a long table over `make_caches` (name to function returning a cache)."""
    rows = []
    for name, make in make_caches.items():
        for length in lengths:
            cache = make()
            score(model, input_ids[:, :length], cache)
            rows += [(name, length, kind, count) for kind, count in held_bytes(cache).items()]
    return pd.DataFrame(rows, columns=["cache", "tokens", "kind", "bytes"])


def quality(model, input_ids, make_caches, batch=16):
    """Scores documents under each cache, in batches of equal length.

    input_ids: `[documents, tokens]`. Returns {name: nll `[documents, tokens - 1]`} and {name: evicted tokens per document,
    layer and head}, the latter so that a cache that never evicted cannot pass for a good one.
    """
    nll, evicted = {}, {}
    for name, make in make_caches.items():
        parts = []
        for ids in input_ids.split(batch):
            cache = make()
            parts.append(
                score(model, ids.to(model.device), cache, chunk_size=max(1, TOKENS // len(ids))).cpu()
            )
        nll[name] = torch.cat(parts)
        evicted[name] = 0 if isinstance(cache, DynamicCache) else cache.evicted_tokens // len(cache.layers)
    return nll, evicted
