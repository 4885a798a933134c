"""The grid of the sweep: sketch shapes, caps, and two ways to use what the sketch remembers."""

import itertools

from sketchkv.study.evaluate import evaluate

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


def _named(use, width, depth, cap, k, summary_slots):
    name = f"{use}{k or ''} {width}x{depth} cap {cap}"
    return {
        "configuration": name,
        "use": use,
        "width": width,
        "depth": depth,
        "max_cache_size": cap,
        "attend_topk": k,
        "summary_slots": summary_slots if use == "aggregate" else 0,
    }


def configurations(summary_slots=4):
    """The 144 configurations, 108 of `topk` and 36 of `aggregate`, as dicts."""
    uses = [*(("topk", k) for k in TOPK), ("aggregate", 0)]
    return [
        _named(use, width, depth, cap, k, summary_slots)
        for (use, k), width, depth, cap in itertools.product(uses, WIDTHS, DEPTHS, CAPS)
    ]


def small(summary_slots=4):
    """A corner of the same grid, for a first look."""
    return [
        c
        for c in configurations(summary_slots)
        if (c["width"], c["depth"]) == (128, 2) and c["max_cache_size"] <= 128
    ]


def method(configuration, seed=0):
    """What `methods.make_cache` is given for a configuration. The summary's slots are taken out of the cap, so that both
    uses hold the same number of slots."""
    c = configuration
    return {
        "method": "sketch",
        "bits": 16,
        "width": c["width"],
        "depth": c["depth"],
        "seed": seed,
        "max_cache_size": c["max_cache_size"] - c["summary_slots"],
        **(
            {"summary_slots": c["summary_slots"]}
            if c["use"] == "aggregate"
            else {"attend_topk": min(c["attend_topk"], c["max_cache_size"])}
        ),
    }


def point(method, text, **texts):
    """A grid point: `evaluate`, with the revision of the text (`text`) among what names it."""
    return evaluate(method, **texts)
