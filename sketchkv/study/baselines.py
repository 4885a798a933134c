"""Every method at equal bytes: which grid points that makes, which of them no other beats, and what the hypothesis says."""

import numpy as np
import pandas as pd

from sketchkv.study import stats
from sketchkv.study.evaluate import evaluate
from sketchkv.study.figures import method_style
from sketchkv.study.methods import fit, full_nbytes

LIMIT = 0.02  # the hypothesis of the original study: perplexity less than 2 % worse ...
MEMORY = 1 / 4  # ... at a quarter of the memory

_LARGE = {"method": "sketch", "width": 512, "depth": 4}
_SMALL = {"method": "sketch", "width": 128, "depth": 2}
_SUMMARY = {"summary_slots": 4}
_INT8, _INT4 = ({"bits": bits, "rounding": "range"} for bits in (8, 4))  # rounding as the peers do it

# Methods with a cap. In half precision where nothing else is said: bytes are counted as of a half-precision cache.
BOUNDED: dict[str, dict] = {
    "random": {"method": "random"},
    "streaming": {"method": "streaming"},
    "h2o": {"method": "h2o"},
    "decayed": {"method": "decayed"},
    "tova": {"method": "tova"},
    "snapkv": {"method": "snapkv"},
    "sketch": _LARGE,
    "sketch_small": _SMALL,
    "sketch_summary": _SMALL | _SUMMARY,
    "decayed_summary": {"method": "decayed"} | _SUMMARY,
    "decayed_int8": {"method": "decayed"} | _INT8,
    "decayed_int4": {"method": "decayed"} | _INT4,
    "compact": {"method": "compact", "bits": [5, 4]},
    "window": {"method": "window"},
    "lru": {"method": "lru"},
    "key_norm": {"method": "key_norm"},
    "h2o_half": {"method": "h2o"},  # half the cap is recent window, as published
    "streaming_int4": {"method": "streaming"} | _INT4,
    "sketch_int4": _SMALL | _INT4,
}
QUARTER_ONLY = (
    "random",
    "snapkv",
    "window",
    "lru",
    "key_norm",
    "h2o_half",
    "sketch_summary",
    "streaming_int4",
    "sketch_int4",
)

# Methods that hold the whole text: one size each.
WHOLE = {
    "full": {"method": "full", "bits": 16, "evict_every": 1},
    "int8": {"method": "full", "evict_every": 1} | _INT8,
    "int4": {"method": "full", "evict_every": 1} | _INT4,
    "kivi8": {"method": "kivi", "bits": 8},
    "kivi4": {"method": "kivi", "bits": 4},
    "kivi2": {"method": "kivi", "bits": 2},
}

EQUAL_SLOTS = ("random", "streaming", "lru", "key_norm", "h2o", "decayed", "tova", "snapkv", "sketch")
AT_PREFILL = ("random", "streaming", "key_norm", "h2o", "decayed", "tova", "snapkv", "sketch")

LABELS = {
    "full": "full cache in float16",
    "random": "random",
    "window": "window without sinks",
    "streaming": "StreamingLLM",
    "lru": "LRU",
    "key_norm": "key norm",
    "h2o": "H2O",
    "h2o_half": "H2O half recent",
    "decayed": "decayed mean",
    "tova": "TOVA",
    "snapkv": "SnapKV",
    "sketch": "sketch 512x4",
    "sketch_small": "sketch 128x2",
    "sketch_summary": "sketch 128x2 + summary",
    "decayed_summary": "decayed + summary",
    "decayed_int8": "decayed + int8",
    "decayed_int4": "decayed + int4",
    "streaming_int4": "StreamingLLM + int4",
    "sketch_int4": "sketch 128x2 + int4",
    "compact": "compact",
    "int8": "int8 whole text",
    "int4": "int4 whole text",
    "kivi8": "KIVI 8 bits",
    "kivi4": "KIVI 4 bits",
    "kivi2": "KIVI 2 bits",
}


def at_budget(config, name, budget, length, dtype):
    """Method `name` of `BOUNDED` with the largest cap whose bytes in all are at most the share `budget` of a float16 full
    cache of `length` tokens. Raises ValueError if none fits, or if it would hold the whole text."""
    method = {"bits": 16} | BOUNDED[name]
    cap = fit(config, int(budget * full_nbytes(config, length)), dtype, **method)
    if cap + method.get("evict_every", 16) > length:
        raise ValueError(
            f"{LABELS[name]} holds all {length} tokens in a share of {budget} of the full cache's bytes"
        )
    if name == "h2o_half":
        method |= {"recent_window": max(16, cap // 2)}
    return method | {"max_cache_size": cap}


def equal_bytes(config, budgets, length, dtype, names=tuple(BOUNDED), seldom=QUARTER_ONLY):
    """What is compared at equal bytes: `(names, budgets, methods)` as a list of tuples, whole texts with a budget of None,
    and the reasons why others are left out. Methods in `seldom` are asked at a quarter of the bytes alone."""
    points, left_out = [(name, None, method) for name, method in WHOLE.items()], []
    for budget in budgets:
        for name in names:
            if name in seldom and budget != MEMORY:
                continue
            try:
                points.append((name, budget, at_budget(config, name, budget, length, dtype)))
            except ValueError as error:
                reason = "holds the whole text" if "holds all" in str(error) else "does not fit"
                left_out.append({"name": name, "budget": budget, "reason": reason})
    return points, left_out


def compute(run, groups, config, length, **settings):
    """The tables of several groups of points, each distinct method scored once, all in one `run.grid`.

    groups: {name: (points, prompt)}. Returns {name: DataFrame}, one row per method, budget and document.
    """
    asked = {
        name: [{"method": method, "length": length, "prompt": prompt, **settings} for *_, method in points]
        for name, (points, prompt) in groups.items()
    }
    distinct = []
    for params in (p for group in asked.values() for p in group):
        if params not in distinct:
            distinct.append(params)
    found = run.grid("baselines", evaluate, distinct)
    return {
        name: table(points, [found[distinct.index(params)] for params in asked[name]], config, length)
        for name, (points, _) in groups.items()
    }


def table(points, results, config, length):
    """One row per method, budget and document, from the rows that `evaluate` gave for each of `points`."""
    full, rows = full_nbytes(config, length), []
    for (name, budget, method), found in zip(points, results):
        own = {"method": name, "budget": budget, "max_cache_size": method.get("max_cache_size")}
        rows += [
            own | row | {"share": row["bytes_total"] / full, "loss": row["nll"] - row["nll_full"]}
            for row in found
        ]
    frame = pd.DataFrame(rows)
    return frame.assign(loss_late=frame.nll_late - frame.nll_late_full).astype({"max_cache_size": "Int64"})


COLUMNS = {
    "method": "name of the method",
    "budget": "bytes allowed, as a share of the full cache in float16; empty for methods that have one size",
    "max_cache_size": "tokens kept per KV head; empty where the whole text is held",
    "share": "bytes_total as a share of the full cache in float16",
    "loss": "nll - nll_full, nats per token",
    "loss_late": "the same over the second half of the scored tokens",
}


def pareto(size, loss):
    """Which points no other beats: none is as small with less loss, or smaller with as little. bool array."""
    size, loss = np.asarray(size), np.asarray(loss)
    smaller, better = size[:, None] <= size, loss[:, None] <= loss
    strictly = (size[:, None] < size) | (loss[:, None] < loss)
    return ~(smaller & better & strictly).any(0)


def hypothesis(frame, seed=0):
    """How much perplexity grows, and what that says of the hypothesis: a DataFrame with a row per method and budget, the
    least growth first.

    The perplexity of the text grows by `exp(mean loss) - 1`: mean and bootstrap interval over documents, all tokens and
    the late ones. "holds": the whole interval is below `LIMIT`; "fails": none of it is; "open": neither.
    """
    rows = []
    for (name, budget), part in frame.groupby(["method", "budget"], sort=False, dropna=False):
        row = {"method": name, "budget": budget, "share": part.share.iloc[0]}
        for suffix in ("", "_late"):
            loss = part[f"loss{suffix}"].to_numpy(copy=True)
            mean, low, high = (float(np.expm1(x)) for x in stats.paired_interval(loss, seed))
            verdict = "holds" if high < LIMIT else "fails" if low >= LIMIT else "open"
            row |= {
                f"increase{suffix}": mean,
                f"low{suffix}": low,
                f"high{suffix}": high,
                f"verdict{suffix}": verdict,
            }
        rows.append(row | {"n": len(part)})
    return pd.DataFrame(rows).sort_values("increase", ignore_index=True)


HYPOTHESIS_COLUMNS = {
    "method": COLUMNS["method"],
    "budget": COLUMNS["budget"],
    "share": COLUMNS["share"],
    "increase": "perplexity over the full cache's, less 1, all tokens",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "verdict": "less than 0.02? holds: all of the interval is; fails: none of it is; open: 0.02 is inside",
    "increase_late": "as increase, over the second half of the tokens alone",
    "low_late": "lower end of its 95 % interval",
    "high_late": "upper end of its 95 % interval",
    "verdict_late": "as verdict, for the second half",
    "n": "documents",
}


def equal_slots(names, max_cache_size, **more):
    """Methods of `BOUNDED` in half precision with the same cap, whatever their bytes: points without a budget."""
    return [
        (name, None, {"bits": 16} | BOUNDED[name] | {"max_cache_size": max_cache_size} | more)
        for name in names
    ]


def against_best(table, name, others, seed):
    """Method `name` beside the best of `others` at each budget: a DataFrame, one row a budget (`BEST_COLUMNS`). The best
    is the one with the least mean loss among those that fit, a whole text that is small enough included."""
    rows = []
    for budget in sorted(table.budget.dropna().unique(), reverse=True):
        at = table[(table.budget == budget) | (table.budget.isna() & (table.share <= budget))]
        fitting = at[at.method.isin(others)].groupby("method").loss.mean()
        if fitting.empty or name not in set(at.method):
            continue
        best, own = fitting.idxmin(), at[at.method == name]
        growth = np.expm1(stats.paired_interval(own.loss.to_numpy(copy=True), seed))
        rows.append(
            (
                budget,
                own.share.iloc[0],
                own.max_cache_size.iloc[0],
                *growth,
                own.kl.mean(),
                best,
                np.expm1(fitting[best]),
                at[at.method == best].kl.mean(),
                *compare(at, name, best, seed),
                1 - own.loss.mean() / fitting[best],
                len(own),
            )
        )
    return pd.DataFrame(rows, columns=list(BEST_COLUMNS))


BEST_COLUMNS = {
    "budget": "bytes allowed / bytes of a full cache in half precision",
    "share": "bytes held / bytes of a full cache in half precision",
    "max_cache_size": "tokens kept per layer and KV head",
    "increase": "growth of perplexity over the full cache",
    "low": "its 95 % interval, low",
    "high": "its 95 % interval, high",
    "kl": "KL divergence from the full cache, nats per token",
    "peer": "best other method that fits",
    "peer_increase": "its growth of perplexity",
    "peer_kl": "its KL divergence",
    "gain": "nats per token that it loses more, mean of paired differences",
    "gain_low": "95 % interval of the gain, low",
    "gain_high": "95 % interval of the gain, high",
    "less": "share of the peer's mean loss that is avoided",
    "n": "documents",
}


def compare(frame, method, other, seed=0, value="loss"):
    """How much less `method` loses than `other` on the same documents: (mean, low, high), positive if it is better."""
    by_document = frame.pivot(index="document", columns="method", values=value)
    return stats.paired_interval((by_document[other] - by_document[method]).to_numpy(copy=True), seed)


def against(interval):
    """What an interval of `compare` says, in words."""
    _, low, high = interval
    return "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"


def against_losses(low, high):
    """The same of the interval of a difference of losses, of which less is better."""
    return against((None, -high, -low))


def words(names):
    """ "a, b and c": labels of methods, "none" without any."""
    names = [LABELS.get(name, name) for name in names]
    return (", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]) if names else "none"


def forest(axis, rows, labels=True):
    """Means and intervals, one row each, from the top: `rows` has method, mean, low, high."""
    for y, row in enumerate(rows.itertuples()):
        style = method_style(row.method)
        axis.plot([row.low, row.high], [y, y], color=style["color"], linewidth=2)
        axis.plot(row.mean, y, linestyle="", markersize=8, **style)
    axis.set_yticks(range(len(rows)), [LABELS.get(m, m) for m in rows.method] if labels else [])
    axis.set_ylim(len(rows) - 0.5, -0.5)
