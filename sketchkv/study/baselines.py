"""Every method at equal bytes: what is compared, which points no other beats, and what the hypothesis says."""

import numpy as np
import pandas as pd

from sketchkv.study import stats
from sketchkv.study.evaluate import evaluate
from sketchkv.study.methods import BOUNDED, LABELS, PEERS, WHOLE, fit, full_nbytes

LIMIT = 0.02  # the hypothesis of the original study: perplexity less than 2 % worse ...
MEMORY = 1 / 4  # ... at a quarter of the memory
EVERYWHERE = (
    *("streaming", "h2o", "tova", "decayed", "sketch", "sketch_small"),
    *("decayed_summary", "decayed_int8", "decayed_int4", "compact"),
)
QUARTER_ONLY = (
    *("random", "window", "lru", "key_norm", "snapkv", "plain_sums"),
    *("sketch_summary", "sketch_int4", "streaming_int4"),
)
# What the report tells of at a quarter of the bytes: a method, and what it is compared with.
PAIRS = (
    *(
        (name, other)
        for name in ("sketch", "sketch_small")
        for other in ("decayed", "streaming", "h2o", "plain_sums")
    ),
    *(("sketch_summary", other) for other in ("decayed", "decayed_summary")),
    *(("compact", other) for other in ("kivi2", "decayed_int4", "decayed_summary")),
    *(("decayed", other) for other in ("h2o", "plain_sums", "snapkv", "tova", "streaming", "random")),
    *((f"decayed_{more}", "decayed") for more in ("int4", "int8", "summary")),
    *(("sketch_int4", "decayed_int4"), ("h2o", "plain_sums"), ("streaming", "random")),
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
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "n": "documents",
}
HYPOTHESIS_COLUMNS = {name: COLUMNS[name] for name in ("method", "budget", "share")} | {
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
BEST_COLUMNS = {
    "budget": "bytes allowed / bytes of a full cache in half precision",
    "share": "bytes held / bytes of a full cache in half precision",
    "max_cache_size": "tokens kept per layer and KV head",
    "increase": "growth of perplexity over the full cache",
    "low": "its 95 % interval, low",
    "high": "its 95 % interval, high",
    "kl": "KL divergence from the full cache, nats per token",
    "peer": "the method of `beside` that loses least",
    "peer_increase": "its growth of perplexity",
    "gain": "nats per token that it loses more, mean of paired differences",
    "gain_low": "95 % interval of the gain, low",
    "gain_high": "95 % interval of the gain, high",
    "less": "share of its mean loss that is avoided",
    "n": "documents",
    "beside": "peer: a published method; other: a combination or ablation of our own",
}


def at_budget(config, method, budget, length, dtype):
    """`method` (settings) with the largest cap whose bytes in all are at most the share `budget` of a float16 full cache of
    `length` tokens. Raises ValueError if none fits, or if it would hold the whole text."""
    cap = fit(config, int(budget * full_nbytes(config, length)), dtype, **method)
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
    sizes = table.groupby(["method", "budget"], sort=False, dropna=False)
    sizes = sizes.agg(
        share=("share", "first"), loss=("loss", "mean"), kl=("kl", "mean"), top1=("top1", "mean")
    )
    sizes = sizes.reset_index()
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
            mean, low, high = growth(part[f"loss{suffix}"], seed)
            verdict = "holds" if high < LIMIT else "fails" if low >= LIMIT else "open"
            found = {"increase": mean, "low": low, "high": high, "verdict": verdict}
            row |= {f"{key}{suffix}": value for key, value in found.items()}
        rows.append(row | {"n": len(part)})
    return pd.DataFrame(rows).sort_values("increase", ignore_index=True)


def growth(losses, seed=0):
    """Growth of perplexity, a share, of losses per document in nats: (mean, low, high)."""
    return tuple(float(np.expm1(x)) for x in stats.paired_interval(losses.to_numpy(copy=True), seed))


def against_best(table, name, others, seed=0):
    """Method `name` beside the best of `others` at each budget: a DataFrame, one row a budget (`BEST_COLUMNS` without
    "beside"). The best has the least mean loss among those that fit, a whole text that is small enough included."""
    rows = []
    for budget in sorted(table.budget.dropna().unique(), reverse=True):
        at = table[(table.budget == budget) | (table.budget.isna() & (table.share <= budget))]
        fitting = at[at.method.isin(others)].groupby("method").loss.mean()
        if fitting.empty or name not in set(at.method):
            continue
        best, own = fitting.idxmin(), at[at.method == name]
        held = budget, own.share.iloc[0], own.max_cache_size.iloc[0]
        beside = best, np.expm1(fitting[best]), *compare(at, name, best, seed)
        less = 1 - own.loss.mean() / fitting[best]
        rows.append((*held, *growth(own.loss, seed), own.kl.mean(), *beside, less, len(own)))
    return pd.DataFrame(rows, columns=[column for column in BEST_COLUMNS if column != "beside"])


def compact_beside(table, seed=0):
    """`compact` beside the best peer, and beside the best of our own, at each budget: a DataFrame (`BEST_COLUMNS`)."""
    own = set(table.method) - {*PEERS, "compact", "full"}
    found = {
        "peer": against_best(table, "compact", PEERS, seed),
        "other": against_best(table, "compact", own, seed),
    }
    return pd.concat([part.assign(beside=beside) for beside, part in found.items()], ignore_index=True)


def compare(frame, method, other, seed=0, value="loss"):
    """How much less `method` loses than `other` on the same documents: (mean, low, high), positive if it is better."""
    by_document = frame.pivot(index="document", columns="method", values=value)
    return stats.paired_interval((by_document[other] - by_document[method]).to_numpy(copy=True), seed)


def gains(table, seed=0, pairs=PAIRS):
    """Pairs of methods at each budget that has both: a DataFrame (`GAIN_COLUMNS`)."""
    rows = []
    for budget in sorted(table.budget.dropna().unique(), reverse=True):
        at = table[(table.budget == budget) | (table.budget.isna() & (table.share <= budget))]
        there = set(at.method)
        rows += [
            (budget, name, other, *compare(at, name, other, seed), at.document.nunique())
            for name, other in pairs
            if {name, other} <= there
        ]
    return pd.DataFrame(rows, columns=list(GAIN_COLUMNS))


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


def note(run, name, interval):
    """The facts NAME_mean, NAME_low and NAME_high."""
    for part, value in zip(("mean", "low", "high"), interval):
        run.fact(f"{name}_{part}", float(value))


def note_all(run, table, sizes, everywhere, pairs, beside):
    """The facts of this study: front_*, hypothesis_*, equal_bytes_* (all at a quarter of the bytes) and compact_at_*."""
    run.fact("baselines_documents", int(table.document.nunique()))
    run.fact("baselines_tokens", int(table.tokens.iloc[0]))
    best = list(dict.fromkeys(sizes[sizes.front].sort_values("share").method))
    run.fact("front_methods", words(best))
    run.fact("front_has_sketch", any(name.startswith("sketch") for name in best))
    half = [name for name in BOUNDED if BOUNDED[name].get("bits") == 16]
    run.fact("front_half_precision", words([name for name in best if name in half]))
    _note_hypothesis(run, everywhere, half)
    for row in pairs[pairs.budget == MEMORY].itertuples():
        interval = row.mean, row.low, row.high
        note(run, f"equal_bytes_{row.method}_over_{row.other}", interval)
        run.fact(f"equal_bytes_{row.method}_against_{row.other}", against(interval))
    for row in beside.itertuples():
        at = f"compact_at_{1 / row.budget:.0f}"
        if row.beside == "peer":
            for name in ("increase", "low", "high", "kl", "gain", "gain_low", "gain_high", "less"):
                run.fact(f"{at}_{name}", float(getattr(row, name)))
        run.fact(f"{at}_{row.beside}", LABELS[row.peer])
        run.fact(f"{at}_{row.beside}_increase", float(row.peer_increase))
        run.fact(f"{at}_against_{row.beside}", against((row.gain, row.gain_low, row.gain_high)))


def _note_hypothesis(run, everywhere, half):
    verdicts = everywhere[(everywhere.budget == MEMORY) | everywhere.budget.isna()]
    tested = verdicts[verdicts.share <= MEMORY]
    for name in ("holds", "open", "fails"):
        run.fact(f"hypothesis_{name}", words(list(tested[tested.verdict == name].method)))
        run.fact(f"hypothesis_{name}_late", words(list(tested[tested.verdict_late == name].method)))
        run.fact(f"hypothesis_{name}_count", int((tested.verdict == name).sum()))
    run.fact("hypothesis_tested", len(tested))
    run.fact("hypothesis_too_large", words(list(verdicts[verdicts.share > MEMORY].method)))
    for row in tested.itertuples():
        note(run, f"hypothesis_{row.method}", (row.increase, row.low, row.high))
        note(run, f"hypothesis_{row.method}_late", (row.increase_late, row.low_late, row.high_late))
        run.fact(f"hypothesis_{row.method}_verdict", row.verdict)
    least = (
        everywhere[everywhere.verdict == "holds"].sort_values("share").iloc[0]
    )  # memory at which it does hold
    run.fact("hypothesis_least_share", float(least.share))
    for key, row in (
        ("least", least),
        ("best", tested.iloc[0]),
        ("best_half_precision", tested[tested.method.isin(half)].iloc[0]),
    ):
        run.fact(f"hypothesis_{key}" if key != "least" else "hypothesis_least_method", LABELS[row.method])
        note(run, f"hypothesis_{key}", (row.increase, row.low, row.high))


def percent(loss):
    """Losses in nats per token as growth of perplexity, %."""
    return 100 * np.expm1(loss)


def front_caption(sizes, table):
    best = list(dict.fromkeys(sizes[sizes.front].sort_values("share").method))
    sketched = any(name.startswith("sketch") for name in best)
    finding = f"{'A' if sketched else 'No'} sketch is among the best choices at {'some' if sketched else 'any'} size"
    return (
        f"{finding}. No other method beats {words(best)}. Grey: all {sizes.method.nunique() - 1} methods; a line joins the "
        f"sizes of one; 0.1 % stands for less, too. Means of {table.document.nunique()} documents of "
        f"{table.tokens.iloc[0]} tokens."
    )


def compact_caption(beside, length):
    peers = beside[beside.beside == "peer"]
    wins = int((peers.gain_low > 0).sum())
    each = "; ".join(
        f"at 1/{1 / row.budget:.0f} {row.increase:.1%} ({row.low:.1%} to {row.high:.1%}), {LABELS[row.peer]} "
        f"{row.peer_increase:.1%}"
        for row in peers.itertuples()
    )
    return (
        f"One setting beats the best published method at {wins} of {len(peers)} sizes. Growth of perplexity: {each}. Bars: bootstrap "
        f"95 % intervals (n = {peers.n.iloc[0]} documents of {length} tokens). Below each line: "
        f"the best published method; above: compact, and the best of our other combinations."
    )
