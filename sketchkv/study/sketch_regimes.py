"""Is there a regime in which a sketch beats exact accumulators? What keys it, where it breaks, and regimes at equal bytes."""

import pandas as pd
import torch
from transformers import DynamicCache

from sketchkv.decode import score
from sketchkv.study import baselines
from sketchkv.study.evaluate import BATCH, _model, evaluate
from sketchkv.study.methods import fit, make_cache, nbytes
from sketchkv.texts import documents as read_documents

EXACT = {"method": "decayed"}

# In all regimes, so small that it costs little beside the keys and values. Shape and code were chosen on the development
# documents.
SKETCHES = {"sketch of key directions": {"method": "sketch", "width": 64, "depth": 2, "counters": "uint8"}}

# Each regime as (cap of exact accumulators, recent window, what the text is).
REGIMES = {
    "cap 24": (24, 4, "document"),
    "cap 40": (40, 4, "document"),
    "cap 64": (64, 16, "document"),
    "cap 128": (128, 16, "document"),
    "long stream": (64, 16, "stream"),
    "tokens come back": (64, 16, "returning"),
}

KEYS = {
    "position": {"key": "position"},
    "token": {"key": "token"},
    "key direction": {"key": "lsh"},
    "query direction": {"key": "query"},
    "key direction, conservative": {"kind": "conservative"},
    "key direction, Count-Sketch": {"kind": "count_sketch"},
    "key direction, RACE": {"kind": "race"},
    "query direction, RACE": {"key": "query", "kind": "race"},
    "token, summed": {"key": "token", "mean": False},
    "key direction, summed": {"mean": False},
}

SHAPES = {
    **{f"{width}x{depth}": {"width": width, "depth": depth} for width in (16, 64, 256) for depth in (1, 2)},
    "64x2, 8 bits of direction": {"width": 64, "depth": 2, "lsh_bits": 8},
    "64x2, float16": {"width": 64, "depth": 2, "counters": "float16"},
    "64x2, uint8": {"width": 64, "depth": 2, "counters": "uint8"},
}

COLUMNS = {
    "document": "held-out file",
    "loss": "nats per token over the full cache",
    "evicted": "tokens evicted per layer and KV head",
    "bytes_sketch": "bytes of sketches, one sequence, all layers",
    "bytes_total": "all bytes held for one sequence",
    "max_cache_size": "tokens kept per layer and KV head",
}


def exact(cap, recent_window=16):
    """Exact accumulators with a cap of that many tokens, in half precision."""
    return {"bits": 16} | EXACT | {"recent_window": recent_window, "max_cache_size": cap}


def at_equal_bytes(config, dtype, cap, recent_window=16, **method):
    """`method` with the largest cap whose bytes in all are at most those of `exact(cap, recent_window)`, under the same
    sinks and recent window. Raises ValueError if none fits."""
    budget = nbytes(config, dtype=dtype, **exact(cap, recent_window))["total"]
    method = {"bits": 16, "recent_window": recent_window} | method
    return method | {"max_cache_size": fit(config, budget, dtype, **method)}


def point(method, *, text, revision, **texts):
    """A grid point: rows (list of dict, `COLUMNS`), one per document. text: "document" or "stream", scored whole, or
    "returning" (`come_back`); revision: of the text, among what names the point."""
    rows = (come_back if text == "returning" else evaluate)(method, **texts)
    return [
        {
            "document": row["document"],
            "loss": row["nll"] - row["nll_full"],
            "max_cache_size": method["max_cache_size"],
        }
        | {name: row[name] for name in ("evicted", "bytes_sketch", "bytes_total")}
        for row in rows
    ]


@torch.no_grad()
def come_back(
    method, *, model="embedded", dataset="embedded", device="cpu", split="test", documents=16, length=1024
):
    """Rows (list of dict), one per document: a third of `length` tokens of it, as many of the next document, then the first
    again, of which alone `nll` and `nll_full` speak. What returns was evicted in between, unless something said to keep it.
    """
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, split, documents, length // 3)
    first = texts.input_ids
    ids, held = torch.cat([first, first.roll(-1, 0), first], 1), nbytes(lm.config, length, lm.dtype, **method)
    rows: list[dict] = []
    scored = slice(2 * first.shape[1], None)  # from the second token of the return on: each from those before
    for part in ids.to(lm.device).split(BATCH):
        cache = make_cache(lm.config, length=length, **method)
        found = score(lm, part, cache)[:, scored].mean(1).tolist()
        full = score(lm, part, DynamicCache(config=lm.config))[:, scored].mean(1).tolist()
        for nll, nll_full in zip(found, full):
            rows.append(
                {
                    "document": texts.names[len(rows)],
                    "nll": nll,
                    "nll_full": nll_full,
                    "evicted": cache.evicted_tokens / len(cache.layers),
                    **{f"bytes_{kind}": n for kind, n in held.items()},
                }
            )
    return rows


def gains(table, group, seed=0):
    """What each method of `table` loses less than "exact" on the same documents of the same `group` (name of a column): a
    DataFrame, the least first, with `group`, "method", `GAINS`."""
    rows = []
    for value, part in table.groupby(group, sort=False):
        for name in (name for name in part.method.unique() if name != "exact"):
            interval, own = baselines.compare(part, name, "exact", seed), part[part.method == name]
            rows.append(
                (value, name, *interval, baselines.against(interval), own.max_cache_size.iloc[0], len(own))
            )
    return pd.DataFrame(rows, columns=[group, "method", *GAINS]).sort_values("mean", ignore_index=True)


GAINS = {
    "mean": "nats per token that it loses less than exact accumulators, mean of paired differences",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "verdict": "what the interval says",
    "max_cache_size": COLUMNS["max_cache_size"],
    "n": "documents",
}
