"""Tried, and not worth keeping: what was measured of code that has left the package.

The tables lie in `data/archive` as they were made, with a manifest that names for each its checksum, the commit and the
notebook that made it, and on how many documents. The commit `code` of the manifest is the last that holds all of the code.
"""

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sketchkv.study import baselines, sources, stats

FOLDER = sources.ROOT / "data" / "archive"
NATS = "nats per token more"
ABOVE = "nats per token above the full cache"
FOUND = "share of the answers found; more is better"
COLUMNS = {
    "what": "what was tried",
    "where": "at which size, in which regime",
    "beside": "what it was compared with, which stays in the package",
    "unit": "unit of the effect",
    "effect": "mean of the paired differences, or what `unit` says (of the cost model, the mean relative error); less is better",
    "low": "lower end of its 95 % interval (bootstrap; of shares, exact binomial)",
    "high": "upper end of its interval",
    "verdict": "what the interval says of it beside that",
    "n": "documents (of the cost model, measured pieces of a step)",
    "commit": "commit that holds the code and made the table",
    "file": "table in data/archive",
}

_SUMMARIES = {
    "nearest": "4 summary slots, each token to the nearest mean",
    "nearest_8": "8 summary slots, each token to the nearest mean",
    "sliding": "4 summary slots, neighbours in time merge",
    "segments": "4 summary slots, one for a stretch of the text",
    "count_sketch": "a Count-Sketch of sums, 6 cells",
    "mass": "a summary weighted by attention",
    "decay": "a summary that fades",
}
_REGIMES = {
    "exact with a sketched prior": "a sketched prior of the token beside exact scores",
    "sketch of tokens for all layers": "one sketch of tokens for all layers",
}
_SHAPES = {
    "64x2, one for all heads": "one sketch of key directions for all heads of a layer",
    "64x2, one for all layers": "one sketch of key directions for all layers",
    "64x2, uint8": "counters of 8 bits",
}
_KEYS = {
    "bigram": "a sketch keyed by bigrams",
    "key direction, RACE": "RACE of key directions",
    "query direction, RACE": "RACE of query directions",
    "key direction, Count-Sketch": "a Count-Sketch of key directions",
    "key direction, conservative": "conservative update of key directions",
}
_SPLITS = {
    "ada_kv": "heads that compete for a layer's slots",
    "pyramid": "caps that fall from layer to layer",
    "inverted": "caps that grow from layer to layer",
    "adaptive": "layers that lend each other slots",
}
_MODELS = {
    "gpt2": "GPT-2 class",
    "rotary": "Llama class",
    "embedded": "GPT-2 class",
    "data/model-rotary": "Llama class",
}
_LONG = {
    "streaming": "StreamingLLM",
    "decayed": "decayed mean",
    "sketch": "sketch",
    "decayed + summary": "decayed mean and 8 summary slots",
}
_FALLING = {"age": "precision that falls with age", "importance": "precision that falls with importance"}


class ArchiveError(RuntimeError):
    """A file of the archive is not what was archived."""


def manifest(folder=FOLDER):
    """The manifest, after a check that the archive holds exactly the files that it names, unchanged. Raises ArchiveError."""
    listed = sources.read_json(folder / "manifest.json")
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {"manifest.json"}
    if there != set(listed["files"]):
        raise ArchiveError(
            f"{folder} and its manifest differ in {', '.join(sorted(there ^ set(listed['files'])))}: git checkout it"
        )
    for name, entry in listed["files"].items():
        if sources.sha256(folder / name) != entry["sha256"]:
            raise ArchiveError(
                f"{folder / name} is not what was archived (its checksum differs): git checkout it"
            )
    return listed


def table(folder=FOLDER):
    """What was tried and left the package: a DataFrame, one row per comparison (`COLUMNS`). Raises ArchiveError."""
    files, rows = manifest(folder)["files"], []

    def read(name):
        return pd.read_csv(folder / f"{name}.csv")

    def add(what, where, beside, unit, interval, n, name):
        verdict = baselines.against_losses(*interval[1:]) if unit == NATS else "not compared"
        rows.append(
            [what, where, beside, unit, *interval, verdict, n, files[f"{name}.csv"]["commit"], f"{name}.csv"]
        )

    def more(name, column, labels, where, beside, sign=1):
        """Rows of an archived table of intervals. sign: -1 where the table says how much less a method loses."""
        for row in (found := read(name))[found[column].isin(labels)].to_dict("records"):
            ends = sorted((sign * row["low"], sign * row["high"]))
            add(
                labels[row[column]],
                where.format(**row),
                beside,
                NATS,
                (sign * row["mean"], *ends),
                row["n"],
                name,
            )

    exact = "exact scores of the same bytes"
    more(
        "precision_intervals",
        "setting",
        _FALLING,
        "{budget:.2%} of the bytes",
        "5-bit keys and 4-bit values for all slots",
    )
    more(
        "self_tuned_intervals",
        "method",
        {"self_tuned": "decay and window that each head sets"},
        "{max_cache_size} slots",
        "decay 0.99, window 16",
    )
    more(
        "budget_split_intervals",
        "split",
        _SPLITS,
        "{max_cache_size} slots",
        "as many slots for each layer and head",
    )
    more("summary_gains", "kind", _SUMMARIES, "bytes of {budget} slots", "1 summary slot, plain mean")
    more("sketch_gains_regimes", "method", _REGIMES, "{group}", exact, -1)
    more("sketch_gains_shapes", "method", _SHAPES, "{group}", exact, -1)
    more("sketch_gains_keys", "method", _KEYS, "{group}", "exact scores", -1)
    long = read("long_by_length")
    long["last"] = long.groupby("model").tokens.transform("max")
    for row in long[(long.tokens == long["last"]) & long.method.isin(_LONG)].itertuples():
        where = f"128 slots, {row.tokens} tokens, {_MODELS[row.model]}"
        found = row.mean, row.low, row.high
        add(f"{_LONG[row.method]} on long texts", where, "full cache", ABOVE, found, row.n, "long_by_length")
    quality = read("targets")
    for row in quality[quality.method == "compact"].itertuples():
        where = f"{row.budget:.3g} of the bytes, {row.length} tokens, {_MODELS[row.model]}"
        found = tuple(np.log1p((row.increase, row.low, row.high)))
        add("compact, measured on a GPU", where, "full cache", ABOVE, found, row.n, "targets")
    recalled = read("targets_recall")
    recalled = recalled[recalled.method == "compact"].assign(
        found=lambda t: (t.exact * t.n).round().astype(int)
    )
    for depth, part in recalled.groupby("depth"):
        right, n = int(part.found.sum()), int(part.n.sum())
        ends = binomtest(right, n).proportion_ci()
        where = f"0.125 of the bytes, fact at {depth} of the text, 2 tasks, 2 models"
        add(
            "compact, asked for a fact", where, "not compared", FOUND, (right / n, *ends), n, "targets_recall"
        )
    errors = read("scaling_fit").error.abs()
    add(
        "a cost model of steps on other GPUs",
        f"off by {errors.max():.0%} at most",
        "measured kernels",
        "relative error",
        stats.paired_interval(errors.to_numpy(copy=True)),
        len(errors),
        "scaling_fit",
    )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def facts(tried):
    """What the report says of the table: {name: number or word}."""
    counts = {
        f"tried_{word}": int(tried.verdict.str.startswith(word).sum())
        for word in ("better", "worse", "not d")
    }
    return {
        "tried_better": counts["tried_better"],
        "tried_worse": counts["tried_worse"],
        "tried_not": counts["tried_not d"],
        "tried_rows": int((tried.unit == NATS).sum()),
        "tried_things": int(tried.what.nunique()),
        "tried_code": manifest()["code"],
    }
