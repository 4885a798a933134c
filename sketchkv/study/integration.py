"""Watching a cache while it works: how full it is, what it holds in bytes, what it keeps, and what that costs."""

from typing import Any

import pandas as pd
import torch
from transformers import DynamicCache

from sketchkv.decode import score
from sketchkv.study import stats
from sketchkv.study.baselines import against
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
KEPT = {
    "layer": "index of the layer",
    "head": "index of the KV head",
    "old_tokens": "tokens held at the last step that come from the first half of the text",
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


def kept(visible):
    """What each head still holds of the first half of a text after its last token: a DataFrame (`KEPT`). visible: as
    `oracle.decode_and_watch` gives it."""
    rows = [
        (layer, head, int(seen[-1, : seen.shape[1] // 2].sum()))
        for layer, heads in enumerate(visible)
        for head, seen in enumerate(heads[0])
    ]
    return pd.DataFrame(rows, columns=list(KEPT))


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


def losses(model, docs, make_caches, skip):
    """What each of `make_caches` (name to function returning a cache) loses beyond the first `skip` tokens of each document:
    a DataFrame (`LOSSES`). A cache that evicts nothing is refused."""
    full = {"full": lambda: DynamicCache(config=model.config)}
    nll, evicted = quality(model, docs.input_ids, full | make_caches)
    assert all(evicted[name] > 0 for name in make_caches), f"nothing was evicted: {evicted}"
    rows = [
        (name, document, (nll[name][row] - nll["full"][row])[skip:].mean().item())
        for name in make_caches
        for row, document in enumerate(docs.names)
    ]
    return pd.DataFrame(rows, columns=list(LOSSES))


def facts(table, seed=0):
    """{name: number or word} of `losses` under the caches of the notebook: each loss, and what the sketch loses less."""
    wide = table.pivot(index="document", columns="cache", values="loss")
    found: dict[str, object] = {}
    for name in table.cache.unique():
        key = name.replace(", ", "_").replace(" + ", "_").replace(" ", "_")
        found |= stats.named(f"loss_{key}", stats.paired_interval(wide[name].to_numpy(copy=True), seed))
        if name in ("sketch", "sketch, no sinks"):
            continue
        less = stats.paired_interval((wide[name] - wide["sketch"]).to_numpy(copy=True), seed)
        found |= stats.named(f"sketch_over_{key}", less) | {f"sketch_against_{key}": against(less)}
    return found
