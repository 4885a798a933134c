"""The grid of the sweep: sketch shapes, caps, and two ways to use what the sketch remembers."""

import itertools

import pandas as pd

from sketchkv.study import stats

WIDTHS = (128, 256, 512, 1024)
DEPTHS = (2, 4, 6)
CAPS = (64, 128, 256)
TOPK = (32, 64, 128)

COLUMNS = {
    "configuration": "name of the configuration",
    "use": "topk: attention over the highest ranked stored tokens; aggregate: over all of them and a summary of the evicted",
    "width": "counters per row of the sketch",
    "depth": "rows of the sketch",
    "max_cache_size": "tokens kept per layer and KV head",
    "attend_topk": "stored tokens that attention runs over, 0 for all and the summary",
}
SUMMARY = COLUMNS | {
    "mean": "nats per token over the full cache, mean over documents",
    **stats.ENDS,
    "bytes_total": "bytes of one sequence",
    "bytes_sketch": "bytes of the sketches among them",
}


def configurations(summary_slots=4):
    """The 144 configurations, 108 of `topk` and 36 of `aggregate`, as dicts."""
    uses = [*(("topk", k) for k in TOPK), ("aggregate", 0)]
    return [
        {
            "configuration": f"{use}{k or ''} {width}x{depth} cap {cap}",
            "use": use,
            "width": width,
            "depth": depth,
            "max_cache_size": cap,
            "attend_topk": k,
            "summary_slots": summary_slots if use == "aggregate" else 0,
        }
        for (use, k), width, depth, cap in itertools.product(uses, WIDTHS, DEPTHS, CAPS)
    ]


def small(summary_slots=4):
    """A corner of the same grid, for a first look."""
    corner = {"width": 128, "depth": 2}.items()
    return [
        c for c in configurations(summary_slots) if corner <= c.items() and c["max_cache_size"] < max(CAPS)
    ]


def method(configuration, seed=0):
    """What `methods.make_cache` is given for a configuration. The summary's slots are taken out of the cap, so that both
    uses hold the same number of slots."""
    c = configuration
    own = {
        "width": c["width"],
        "depth": c["depth"],
        "max_cache_size": c["max_cache_size"] - c["summary_slots"],
    }
    if c["use"] == "aggregate":
        own["summary_slots"] = c["summary_slots"]
    else:
        own["attend_topk"] = min(c["attend_topk"], c["max_cache_size"])
    return {"method": "sketch", "bits": 16, "seed": seed} | own


def table(grid, found):
    """All rows of the grid points `found` under the names of their configurations, and the least eviction asserted."""
    rows = pd.concat([pd.DataFrame(part).assign(**c) for c, part in zip(grid, found)], ignore_index=True)
    assert (rows.evicted >= rows.tokens - rows.max_cache_size - 16).all() and (rows.evicted > 0).all()
    assert rows.groupby("configuration").nll.mean().nunique() > len(grid) / 2, "configurations hardly differ"
    return rows


def summary(rows, seed=0):
    """Loss and bytes of each configuration: a DataFrame (`SUMMARY`), the least loss first."""
    found = stats.intervals(rows.assign(loss=rows.nll - rows.nll_full), list(COLUMNS), "loss", seed)
    held = rows.groupby("configuration", as_index=False)[["bytes_total", "bytes_sketch"]].mean()
    return found.merge(held).sort_values("mean", ignore_index=True)[list(SUMMARY)]


def spread(found):
    """How far perplexity moves with the sketch's shape alone, in percent of the full cache's: the most over uses and caps."""
    every = found[(found.use == "aggregate") | (found.attend_topk >= found.max_cache_size)]
    return (
        every.assign(perplexity=stats.percent(every["mean"]))
        .groupby(["use", "max_cache_size"])
        .perplexity.agg(lambda x: x.max() - x.min())
        .max()
    )
