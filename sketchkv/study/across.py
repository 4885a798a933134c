"""Each claim of the report on each model: "holds", "does not" or "open", computed from the tables.

A claim holds on a model where every interval is on its side, on prose and on code where both were measured;
where both were computed, over all tokens and over the second half of the texts. Without a measurement it is open.
"""

import pandas as pd
from scipy.stats import binomtest

from sketchkv.study import baselines, measured
from sketchkv.study.stats import paired_interval

EIGHTH, QUARTER, LEVEL = 1 / 8, 1 / 4, 0.1
CLAIMS = {
    "hypothesis": f"A cache of a quarter of the bytes adds less than {100 * baselines.LIMIT:.0f} % to perplexity",
    "bits": "Few bits and one slot beat half precision at the same bytes",
    "past": "A sketch of past attention does not beat exact scores at equal bytes",
    "keys": "An index that each query asks beats exact scores at equal bytes",
    "parts": "The smallest cache measured loses most by the tail that it drops",
    "slot": "One slot for what was evicted pays",
    "forgotten": "Evicted is forgotten: fewer than half of the far facts of the full cache are found",
    "speed": f"A step of compact takes the same time, within {100 * LEVEL:.0f} % for each doubling of the text",
}
MODELS = ("embedded", "SmolLM2", "Gemma 3")


def verdicts(found, folder=measured.BENCHMARKS):
    """A DataFrame: a row for each of `CLAIMS`, a column for each of `MODELS`, and "everywhere": the verdict if it is the same on
    all of them, else "open" or "differs".

    found: `sketchkv.study.report.Results`; folder: of what was measured of SmolLM2, of Gemma in its folder "gemma3".
    """
    rows = []
    for name, claim in CLAIMS.items():
        words = [
            _asked(_EMBEDDED.get(name), found),
            _asked((_PRETRAINED | _TIMED).get(name), found, folder),
            _asked(_PRETRAINED.get(name), found, folder / measured.GEMMA.name),
        ]
        known = set(words)
        alike = words[0] if len(known) == 1 else "differs" if {"holds", "does not"} <= known else "open"
        rows.append([claim, *words, alike])
    return pd.DataFrame(rows, columns=["claim", *MODELS, "everywhere"])


def _asked(ask, *sources):
    try:
        return ask(*sources) if ask else "open"
    except (KeyError, FileNotFoundError):
        return "open"


# From intervals to words


def below(intervals, limit=0.0):
    """Whether all `intervals` (low, high) lie below `limit`."""
    intervals = list(intervals)
    if not intervals:
        return "open"
    if all(high < limit for _, high in intervals):
        return "holds"
    return "does not" if any(low >= limit for low, _ in intervals) else "open"


def not_below_zero(intervals):
    """Whether none of `intervals` lies below zero; open where that is only because none tells."""
    intervals = list(intervals)
    if any(high < 0 for _, high in intervals):
        return "does not"
    return "holds" if any(low > 0 for low, _ in intervals) else "open"


def any_method(table):
    """The hypothesis, of `baselines.hypothesis`: some method of the table must do it, over all tokens and the second half."""
    both = table[["verdict", "verdict_late"]]
    if (both == "holds").all(axis=1).any():
        return "holds"
    return "does not" if (both == "fails").any(axis=1).all() else "open"


def more(table, one, other):
    """Intervals of what `one` loses more than `other` on the same documents: over all tokens, and over the second half.
    table: columns method, document, loss, loss_late. Raises KeyError for a method that it lacks."""
    held = {name: part.set_index("document") for name, part in table.groupby("method")}
    for column in ("loss", "loss_late"):
        yield paired_interval((held[one][column] - held[other][column]).to_numpy(copy=True))[1:]


# What was measured of the embedded model: of `found`


def _hypothesis(found):
    table = found.frame("baseline_hypothesis")
    return any_method(table[(table.share <= QUARTER) & (table.budget.isna() | (table.budget == QUARTER))])


def _bits(found):
    table = found.frame("baselines")
    return below(more(table[table.budget == EIGHTH], "compact", "decayed"))


def _past(found):
    table = found.frame("sketch_gains_regimes")
    table = table[table.method == "equal bytes"]
    return not_below_zero(zip(-table.high, -table.low))


def _keys(found):
    table = found.frame("asked_gains")
    table = table[table.other == "decayed"]
    return below(zip(-table.high, -table.low))


def _parts(found):
    table = found.frame("why_steps")
    table = table[
        (table.slots == table.slots.min())
        & table.step.isin(("sketch error", "wrong eviction", "lost tail", "rest"))
    ]
    tail, others = table[table.step == "lost tail"].iloc[0], table[table.step != "lost tail"]
    return below([(others.share_low.max() - tail.share_high, others.share_high.max() - tail.share_low)])


def _slot(found):
    table = found.frame("summary_gains")
    table = table[(table.method == "decayed none") & (table.other == "decayed one")]
    return below(zip(table.low, table.high))


def _forgotten(found):
    table = found.frame("recall_shares")
    table = table[table["where"] == "far"].set_index("method")
    return below([tuple(table.loc["compact", ["low", "high"]])], table.share["full"] / 2)


_EMBEDDED = {
    "hypothesis": _hypothesis,
    "bits": _bits,
    "past": _past,
    "keys": _keys,
    "parts": _parts,
    "slot": _slot,
    "forgotten": _forgotten,
}

# What was measured of a pretrained model: of a folder, and of `found` where its shape is timed


def texts(folder, share):
    """Losses at one share of the bytes, code and prose apart, on the shortest texts measured: tables as `more` and
    `baselines.hypothesis` take them."""
    table = pd.read_csv(folder / "pretrained_quality.csv")
    table = table[
        (table.tokens == table.tokens.min()) & ((table.share == share) | table.name.isin(measured.WHOLE))
    ]
    table = table.rename(columns={"name": "method", "share": "budget"})
    table["share"] = table.bytes_total / table.bytes_full
    table["loss"], table["loss_late"] = table.nll - table.nll_full, table.nll_late - table.nll_late_full
    return [part for _, part in table[table["share"] <= share].groupby("text")]


def _differences(one, other, judge):
    return lambda _, folder: judge(each for part in texts(folder, EIGHTH) for each in more(part, one, other))


def _on_both(_, folder):
    """The hypothesis on prose and on code: one method must do it on both."""
    tables = [baselines.hypothesis(part).set_index("method") for part in texts(folder, QUARTER)]
    if not tables:
        return "open"
    words = [
        {any_method(table.loc[[name]]) for table in tables}
        for name in set.intersection(*(set(table.index) for table in tables))
    ]
    if {"holds"} in words:
        return "holds"
    return "does not" if all("does not" in each for each in words) else "open"


def _far(_, folder):
    table = pd.read_csv(folder / "pretrained_recall.csv")
    table = table[(table.task == "needle") & (table.tokens == measured.LENGTH) & (table.depth <= 0.5)]
    right = {name: part.exact for name, part in table.groupby("name")}
    interval = binomtest(int(right["compact"].sum()), len(right["compact"])).proportion_ci()
    return below([tuple(interval)], right["full"].mean() / 2)


def _slope(found, _):
    low, high = found.frame("speed_rows").set_index("row").loc["compact, slope per doubling", ["low", "high"]]
    return below([(max(low, -high), max(high, -low))], LEVEL)


_PRETRAINED = {
    "hypothesis": _on_both,
    "bits": _differences("compact", "decayed", below),
    "past": _differences("sketch", "decayed", not_below_zero),
    "keys": _differences("recall", "decayed", below),
    "forgotten": _far,
}
_TIMED = {"speed": _slope}
