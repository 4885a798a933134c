"""Is there a regime in which a sketch beats exact accumulators? At equal slots, its bytes uncounted, and at equal bytes."""

import pandas as pd
import torch
from transformers import DynamicCache

from sketchkv.decode import score
from sketchkv.study.baselines import GAIN_COLUMNS
from sketchkv.study.evaluate import BATCH, _model, evaluate
from sketchkv.study.evaluate import COLUMNS as SCORED
from sketchkv.study.methods import fit, make_cache, nbytes
from sketchkv.texts import documents as read_documents

# At equal slots a wide sketch. At equal bytes one so small that it leaves room for tokens: the best of nine shapes that were
# tried (data/archive/sketch_gains_shapes.csv), where counters of 16 and of 8 bits made no difference.
WIDE = {"method": "sketch", "width": 512, "depth": 4}
SMALL = {"method": "sketch", "width": 64, "depth": 2}

# Each regime as (cap of exact accumulators, recent window, what the text is). Longer texts are none: beyond the positions
# that it has seen with short contexts the embedded model fails under every bounded cache, random eviction included.
REGIMES = {
    "24 tokens": (24, 4, "document"),
    "40 tokens": (40, 4, "document"),
    "64 tokens": (64, 16, "document"),
    "128 tokens": (128, 16, "document"),
    "64, a text that comes back": (64, 16, "returning"),
}
COLUMNS = {
    "regime": "tokens that exact accumulators keep, and the text",
    "method": "exact accumulators; sketch at equal slots, its bytes uncounted; or sketch at equal bytes",
    "max_cache_size": "tokens kept per layer and KV head",
    "loss": "nats per token over the full cache",
    **{name: SCORED[name] for name in ("document", "evicted", "bytes_sketch", "bytes_total")},
}
PAIRS = (("equal slots", "exact"), ("equal bytes", "exact"))
GAINS = {"regime": COLUMNS["regime"]} | {k: told for k, told in GAIN_COLUMNS.items() if k != "budget"}


def methods(config, dtype, cap, recent_window, seed=0):
    """{name: method} of one regime, in half precision, under the same sinks and recent window. Raises ValueError where the
    small sketch does not fit into the bytes of exact accumulators."""
    common = {"bits": 16, "recent_window": recent_window}
    exact = common | {"method": "decayed", "max_cache_size": cap}
    small, budget = common | SMALL | {"seed": seed}, nbytes(config, dtype=dtype, **exact)["total"]
    return {
        "exact": exact,
        "equal slots": common | WIDE | {"seed": seed, "max_cache_size": cap},
        "equal bytes": small | {"max_cache_size": fit(config, budget, dtype, **small)},
    }


def point(method, *, text, revision, **texts):
    """A grid point: rows (list of dict), one per document. text: "document", scored whole, or "returning" (`come_back`);
    revision: of the text, among what names the point."""
    return (come_back if text == "returning" else evaluate)(method, **texts)


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
    scored = slice(2 * first.shape[1], None)  # from the second token of the return on: each from those before
    rows: list[dict] = []
    for part in ids.to(lm.device).split(BATCH):
        cache = make_cache(lm.config, length=length, **method)
        found, full = (
            score(lm, part, each)[:, scored].mean(1).tolist()
            for each in (cache, DynamicCache(config=lm.config))
        )
        evicted = cache.evicted_tokens / len(cache.layers)
        for nll, nll_full in zip(found, full):
            own = {"document": texts.names[len(rows)], "nll": nll, "nll_full": nll_full, "evicted": evicted}
            rows.append(own | {f"bytes_{kind}": n for kind, n in held.items()})
    return rows


def score_all(run, lm, regimes, length, seed=0, **settings):
    """All regimes, computed through `run.grid`: a DataFrame (`COLUMNS`), one row per regime, method and document."""
    asked = [
        (regime, name, {"method": method, "text": text, "length": length, **settings})
        for regime, (cap, recent, text) in regimes.items()
        for name, method in methods(lm.config, lm.dtype, cap, recent, seed).items()
    ]
    found = run.grid("sketches", point, [params for *_, params in asked])
    table = pd.DataFrame(
        {"regime": regime, "method": name, "max_cache_size": params["method"]["max_cache_size"], **row}
        for (regime, name, params), rows in zip(asked, found)
        for row in rows
    )
    table = table.assign(loss=table.nll - table.nll_full)[list(COLUMNS)]
    held = table.groupby(["regime", "method"]).bytes_total.first().unstack()
    assert (table.evicted > 0).all() and (held["equal bytes"] <= held["exact"]).all()
    return table
