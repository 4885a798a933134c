"""Every method at equal bytes: what is compared, which points no other beats, and what the hypothesis says."""

import numpy as np
import pandas as pd

from sketchkv.study import stats
from sketchkv.study.evaluate import evaluate
from sketchkv.study.methods import BOUNDED, LABELS, PEERS, WHOLE, fit, full_nbytes

LIMIT = 0.02  # the hypothesis of the original study: perplexity less than 2 % worse ...
MEMORY = 1 / 4  # ... at a quarter of the memory
EVERYWHERE = (
    "streaming h2o tova decayed sketch sketch_small decayed_summary decayed_int8 decayed_int4 compact".split()
)
QUARTER_ONLY = (
    "random window lru key_norm snapkv plain_sums sketch_summary sketch_int4 streaming_int4".split()
)
# What the report tells of at a quarter of the bytes: a method, and what it is compared with.
PAIRS = (
    *(
        (name, other)
        for name in ("sketch", "sketch_small")
        for other in ("decayed", "streaming", "h2o", "plain_sums")
    ),
    *(("sketch_summary", other) for other in ("decayed", "decayed_summary")),
    *(("compact", other) for other in (*PEERS, "decayed_int4", "decayed_summary")),
    *(("sketch_int4", "decayed_int4"), ("h2o", "plain_sums")),
)

COLUMNS = {
    "method": "name of the method",
    "budget": "bytes allowed, as a share of the full cache in float16; empty for methods that have one size",
    "max_cache_size": "tokens kept per KV head; empty where the whole text is held",
    "share": "bytes_total as a share of the full cache in float16",
    "loss": "nll - nll_full, nats per token",
    "loss_late": "the same over the second half of the scored tokens",
}
FRONT_COLUMNS = {name: COLUMNS[name] for name in ("method", "budget", "share")} | {
    "loss": "mean nats per token worse than the full cache",
    "kl": "mean KL divergence from the full cache, nats per token",
    "top1": "mean share of tokens with the full cache's most probable next token",
    "front": "no other point has less loss at no more bytes",
}
GAIN_COLUMNS = {
    "budget": COLUMNS["budget"],
    "method": "a method",
    "other": "what it is compared with",
    "mean": "nats per token that the method loses less, mean of paired differences",
    **stats.ENDS,
    "verdict": "what the interval says of the method",
}
HYPOTHESIS_COLUMNS = {name: COLUMNS[name] for name in ("method", "budget", "share")} | {
    "increase": "perplexity over the full cache's, less 1, all tokens",
    **stats.ENDS,
    "verdict": "less than 0.02? holds: all of the interval is; fails: none of it is; open: 0.02 is inside",
    "increase_late": "as increase, over the second half of the tokens alone",
    "low_late": "lower end of its 95 % interval",
    "high_late": "upper end of its 95 % interval",
    "verdict_late": "as verdict, for the second half",
}


def at_budget(config, method, budget, length, dtype):
    """`method` (settings) with the largest cap whose bytes in all are at most the share `budget` of a float16 full cache of
    `length` tokens. Raises ValueError if none fits, or if it would hold the whole text."""
    cap = fit(config, int(budget * full_nbytes(config, length)), dtype, length=length, **method)
    if cap + method.get("evict_every", 16) > length:
        raise ValueError(
            f"{method} holds all {length} tokens in a share of {budget} of the full cache's bytes"
        )
    return method | {"max_cache_size": cap}


def equal_bytes(config, budgets, length, dtype, names=(*EVERYWHERE, *QUARTER_ONLY)):
    """What is compared at equal bytes: `(names, budgets, methods)` as a list of tuples, whole texts with a budget of None,
    and the reasons why others are left out. Methods of `QUARTER_ONLY` are asked at a quarter of the bytes alone."""
    points, left_out = [(name, None, method) for name, method in WHOLE.items()], []
    for budget in budgets:
        for name in names:
            if name in QUARTER_ONLY and budget != MEMORY:
                continue
            try:
                points.append((name, budget, at_budget(config, BOUNDED[name], budget, length, dtype)))
            except ValueError as error:
                reason = "holds the whole text" if "holds all" in str(error) else "does not fit"
                left_out.append({"name": name, "budget": budget, "reason": reason})
    return points, left_out


def losses(run, points, config, length, **settings):
    """One row per method, budget and document: a DataFrame. settings: of `evaluate`."""
    full, rows = full_nbytes(config, length), []
    settings |= {"length": length, "device": run.device, "text": run.data_revision}
    asked = [{"method": method, **settings} for *_, method in points]
    for (name, budget, method), found in zip(points, run.grid("losses", evaluate, asked)):
        own = {"method": name, "budget": budget, "max_cache_size": method.get("max_cache_size")}
        rows += [
            own | row | {"share": row["bytes_total"] / full, "loss": row["nll"] - row["nll_full"]}
            for row in found
        ]
    frame = pd.DataFrame(rows)
    frame = frame.assign(loss_late=frame.nll_late - frame.nll_late_full).astype({"max_cache_size": "Int64"})
    bounded = frame[frame.budget.notna()]
    assert (bounded.share <= bounded.budget).all(), "a method holds more than it may"
    assert (bounded.evicted > 0).all() and (frame[frame.budget.isna()].evicted == 0).all()
    return frame


def pareto(size, loss):
    """Which points no other beats: none is as small with less loss, or smaller with as little. bool array."""
    size, loss = np.asarray(size), np.asarray(loss)
    smaller, better = size[:, None] <= size, loss[:, None] <= loss
    strictly = (size[:, None] < size) | (loss[:, None] < loss)
    return ~(smaller & better & strictly).any(0)


def front(table):
    """Size and mean loss of each method at each budget, and which no other beats: a DataFrame (`FRONT_COLUMNS`)."""
    how = {"share": "first", "loss": "mean", "kl": "mean", "top1": "mean"}
    sizes = table.groupby(["method", "budget"], sort=False, dropna=False, as_index=False).agg(how)
    # Caps are whole tokens: at one budget, a few bytes less are no merit.
    return sizes.assign(front=pareto(sizes.budget.fillna(sizes.share), sizes.loss))


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
            losses = part[f"loss{suffix}"]
            mean, low, high = np.expm1(stats.paired_interval(losses, seed))
            verdict = "holds" if high < LIMIT else "fails" if low >= LIMIT else "open"
            found = {"increase": mean, "low": low, "high": high, "verdict": verdict}
            row |= {f"{key}{suffix}": value for key, value in found.items()}
        rows.append(row | {"n": len(part)})
    return pd.DataFrame(rows).sort_values("increase", ignore_index=True)


def compare(frame, method, other, seed=0):
    """How much less `method` loses than `other` on the same documents: (mean, low, high), positive if it is better."""
    by_document = frame.pivot(index="document", columns="method", values="loss")
    return stats.paired_interval(by_document[other] - by_document[method], seed)


def gains(table, pairs=PAIRS, seed=0, by="budget"):
    """Pairs of methods in each group of the column `by` that has both: a DataFrame (`GAIN_COLUMNS`, the first named `by`).
    A whole text has no budget and belongs to each that it fits."""
    rows, whole = [], table[table[by].isna()]
    for group, at in table.groupby(by, sort=False):
        at = pd.concat([at, whole[whole["share"] <= group]]) if len(whole) else at
        for name, other in pairs:
            if {name, other} <= set(at.method):
                less = compare(at, name, other, seed)
                rows.append((group, name, other, *less, at.document.nunique(), stats.against(less)))
    return pd.DataFrame(rows, columns=[by, *list(GAIN_COLUMNS)[1:]])


def words(names):
    """ "a, b and c": labels of methods, "none" without any."""
    names = [LABELS.get(name, name) for name in names]
    return (", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]) if names else "none"


def front_caption(sizes, pairs, table):
    best = list(dict.fromkeys(sizes[sizes.front].sort_values("share").method))
    sketched = any(name.startswith("sketch") for name in best)
    finding = f"{'A' if sketched else 'No'} sketch is among the best choices at {'some' if sketched else 'any'} size"
    beside = pairs[(pairs.method == "compact") & pairs.other.isin(PEERS)].groupby("budget").verdict
    wins = beside.agg(lambda said: (said == "better than").all())
    return (
        f"{finding}. No other method beats {words(best)}. At {wins.sum()} of {len(wins)} sizes compact loses measurably less "
        f"than every published method. Grey: all {sizes.method.nunique() - 1} methods; a line joins the "
        f"sizes of one; 0.1 % stands for less, too. Means of {table.document.nunique()} documents of "
        f"{table.tokens.iloc[0]} tokens."
    )
