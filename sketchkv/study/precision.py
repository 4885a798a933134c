"""Bits against slots: what one number of bytes is best spent on, and whether precision should fall with age or importance."""

import pandas as pd

from sketchkv.study import baselines, stats
from sketchkv.study.evaluate import evaluate
from sketchkv.study.methods import fit, full_nbytes

BUDGETS = (1 / 16, 1 / 8)
REFERENCE = "5/4"  # the bits of `SketchCache.compact`, whose scores and summary all settings here share
# Chosen on eight development documents from 5/4 bits over 4/3, 3 or 3/2 and 8 over 4, a fine share of 1/4 or 1/2: at the
# smaller budget by age and importance, at the larger by age alone, and not with every one of them.
_TIERS = {"bits": [5, 4], "coarse_bits": [4, 3], "fine": 0.25}
SETTINGS = {
    "16": {"bits": 16}, "8": {"bits": 8}, "5/4": {"bits": [5, 4]}, "4": {"bits": 4}, "4/3": {"bits": [4, 3]}, "3": {"bits": 3},
    "2": {"bits": 2}, "age": _TIERS | {"demote": "age"}, "importance": _TIERS | {"demote": "importance"},
}  # fmt: skip
COARSE = "4/3"  # for all slots: what falling precision ends in
SMALL_ONLY = ("16", "4", "3", "2")  # not at the largest budget, where many slots take time
FALLING = ("age", "importance")
LABELS = {
    "16": "16 bits", "8": "8 bits", "5/4": "5 and 4 bits", "4": "4 bits", "4/3": "4 and 3 bits", "3": "3 bits", "2": "2 bits",
    "age": "falling with age", "importance": "falling with importance",
}  # fmt: skip
COLUMNS = {
    "setting": "bits of keys and values; age, importance: what the bits fall with",
    "budget": "bytes allowed, as a share of the full cache in float16",
    "max_cache_size": "tokens kept per layer and KV head",
    "share": "bytes held, as a share of the full cache in float16",
    "document": "held-out file",
    "nll": "mean negative log-likelihood of its tokens, nats per token",
    "nll_full": "the same with the full cache",
    "loss": "nll - nll_full",
    "over": f"the loss less that of {REFERENCE} bits",
}


def compute(run, config, budgets, settings, dtype, seed, workers=None, **texts):
    """(rows, intervals): DataFrames, one row per setting, budget and document (`COLUMNS`); and per setting and budget, "mean",
    "low", "high" of the paired difference from `REFERENCE`, "loss" and its interval, bytes and cap. texts: as of `evaluate`."""
    full = full_nbytes(config, texts["length"])
    points = []
    for budget in budgets:
        for name in settings:
            if name in SMALL_ONLY and budget == max(budgets):
                continue
            method = {"method": "compact"} | SETTINGS[name]
            points.append((name, budget, method | {"max_cache_size": fit(config, int(budget * full), dtype, **method)}))
    found = run.grid("precision", evaluate, [{"method": method, **texts} for *_, method in points], workers)
    rows = [
        row | {"setting": name, "budget": budget, "max_cache_size": method["max_cache_size"], "share": row["bytes_total"] / full}
        for (name, budget, method), at in zip(points, found) for row in at
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table["loss"] = table.nll - table.nll_full
    reference = table[table.setting == REFERENCE].set_index(["budget", "document"]).loss.rename("reference")
    table = table.join(reference, on=["budget", "document"])
    table["over"] = table.loss - table.reference
    by = ["budget", "setting", "max_cache_size", "share"]
    paired, losses = (stats.intervals(table, by, value, seed) for value in ("over", "loss"))
    paired[["loss", "loss_low", "loss_high"]] = losses[["mean", "low", "high"]]
    return table[list(COLUMNS)], paired


def against(row):
    """What the interval of a paired difference says, in words."""
    return baselines.against_losses(row["low"], row["high"])
