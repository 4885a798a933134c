"""The figures of the notebooks on the sketch, the sweep and the regimes: tables in, `(figure, caption)` out, as in `pictures`."""

import matplotlib.pyplot as plt

from sketchkv.study import stats
from sketchkv.study.figures import PALETTE
from sketchkv.study.pictures import BARS, SMALL, WIDTH, label_ends, ticks, write
from sketchkv.study.stats import percent


def sketch_error(table, vocabulary, length):
    """The error beside its bound, for two kinds of stream."""
    fig, axes = plt.subplots(2, 1, figsize=(WIDTH, 7.0), sharex=True, sharey=True)
    for axis, (stream, part) in zip(axes, table.groupby("stream", sort=False)):
        ends = {}
        for colour, (depth, line) in zip(PALETTE, part.groupby("depth")):
            axis.fill_between(line.width, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(line.width, line.p95, color=colour, marker="o")
            ends[f"{depth} row{'s' * (depth > 1)}"] = (line.width.iloc[-1], line.p95.iloc[-1], colour)
        axis.plot(line.width, line.bound, color="black", linestyle="--")
        ends["bound e / width"] = (line.width.iloc[-1], line.bound.iloc[-1], "black")
        ticks(axis, line.width)
        ticks(axis, [0.001, 0.01, 0.1], "y", lambda share: f"{100 * share:g} %")
        axis.set_title(f"{stream} stream")
        label_ends(axis, ends)
    axis.set_xlabel("width (counters per row)")
    fig.supylabel("over-estimate, % of the total weight")
    inside = (table.p95 < table.bound).where(table.depth > 1, True).all()
    worst = table.loc[(table.misses / table.allowed).idxmax()]
    return fig, (
        f"With two rows or more the error stays {'below' if inside else 'near'} its bound, and shrinks with the width. "
        f"Lines: what 95 % of the {vocabulary} ids stay below, median over seeds; bands: 95 % of the seeds (n = {worst.seeds}); "
        f"{length} items. At {worst.width} x {worst.depth} counters {100 * worst.misses:.2f} % of the ids exceed the bound on the {worst.stream} "
        f"stream, where theory allows {100 * worst.allowed:.1f} %: none comes nearer to its limit."
    )


def sketch_of_keys(errors, recall, k, tokens, seed=0):
    """The index of keys: its error beside the bound, and the heavy tokens that it finds."""
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 7.6))
    by, ends = errors.groupby(["bits", "dim"]).error, {}
    for colour, (bits, line) in zip((PALETTE[0], PALETTE[9], PALETTE[2]), by.mean().groupby("bits")):
        upper.plot(line[bits].index, line[bits], color=colour, marker="o")
        ends[f"{bits} bit{'s' * (bits > 1)}"] = (line[bits].index[-1], line[bits].iloc[-1], colour)
    dims = line[bits].index.to_numpy()
    upper.plot(dims, dims**-0.5, color="black", linestyle="--")
    ticks(upper, dims)
    ticks(upper, [0.01, 0.03, 0.1, 0.2], "y")
    upper.set(xlabel="coordinates of a key (d)", ylabel="error / (|q| |k|)", title="random keys")
    label_ends(upper, ends | {"bound 1 / √d": (dims[-1], dims[-1] ** -0.5, "black")})

    shown = stats.intervals(recall, ["how", "bits"], "recall", seed)
    past = shown[shown.bits.isna()].iloc[0]
    counted, index = (
        shown[shown.how.str.startswith(name) & shown.bits.notna()].sort_values("bits")
        for name in ("Count", "index")
    )
    ends = {}
    for line, colour in ((counted, PALETTE[3]), (index, PALETTE[0])):
        spread = [line["mean"] - line.low, line.high - line["mean"]]
        lower.errorbar(line.bits, line["mean"], yerr=spread, color=colour, marker="o", capsize=3)
    for row in index.itertuples():
        write(lower, row.how.removeprefix("index, "), (row.bits, row.mean), (-7, 7), PALETTE[0], "right")
    lower.axhline(past["mean"], color=PALETTE[1], linestyle="--")
    first = index.iloc[0]
    lower.set(xlabel="bits per token and head", ylabel=f"share of a query's top {k} found", ylim=(0, 1.04))
    ticks(lower, [2**n for n in range(3, 10) if 2**n < 1.3 * shown.bits.max()])
    lower.set(title="a trained model's keys")
    last = shown.bits.max()
    ends = {
        "index of keys": (*index.iloc[-1][["bits", "mean"]], PALETTE[0]),
        "exact past scores": (last, past["mean"], PALETTE[1]),
    }
    label_ends(lower, ends)
    write(lower, "sketch of the past", counted.iloc[-1][["bits", "mean"]], (0, -14), PALETTE[3], "right")
    slope = stats.intervals(errors[errors.bits == 1], "dim", "slope", seed)
    root = by.mean().loc[1] * dims**0.5
    return fig, (
        f"One sign per coordinate finds {100 * first['mean']:.0f} % of what a query looks for, exact past scores {100 * past['mean']:.0f} %. The best "
        f"sketch of past attention: {100 * counted['mean'].max():.0f} %. Above: root mean square error; one bit reaches {root.min():.2f} to "
        f"{root.max():.2f} of the bound. It has no bias: the slope on the true product lies within {slope.low.min():.3f} to "
        f"{slope.high.max():.3f} in all dimensions (95 % intervals, n = {slope.n.min()} draws). Below: {first.bits:.0f} bits per token hold "
        f"signs, factor and centre; sinks and the 16 newest tokens are no candidates. {BARS}, n = {past.n} documents of {tokens} tokens."
    )


def sweep_use(summary, shape, full_bytes):
    """What each use of the sketch's memory costs, at one shape, and all configurations by their bytes."""
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 7.4))
    named = summary.use.where(summary.use == "aggregate", "top " + summary.attend_topk.astype(str))
    shown = summary.assign(uses=named, **{x: percent(summary[x]) for x in ("mean", "low", "high")})
    one = shown[(shown.width == shape[0]) & (shown.depth == shape[1])]
    colours = {"top 32": PALETTE[3], "top 64": PALETTE[1], "top 128": PALETTE[4], "aggregate": PALETTE[0]}
    ends = {}
    for step, (uses, colour) in enumerate(colours.items()):
        line = one[one.uses == uses].sort_values("max_cache_size")
        x = line.max_cache_size * 1.03 ** (step - 1.5)
        bars = [line["mean"] - line.low, line.high - line["mean"]]
        upper.errorbar(x, line["mean"], yerr=bars, color=colour, marker="o", capsize=3)
        ends[uses] = (x.iloc[-1], line["mean"].iloc[-1], colour)
        every = shown[shown.uses == uses]
        lower.scatter(100 * every.bytes_total / full_bytes, every["mean"], s=22, color=colour, alpha=0.7)
    ticks(upper, sorted(one.max_cache_size.unique()))
    fig.supylabel("perplexity above the full cache, % (lower is better)", fontsize=SMALL)
    upper.set(xlabel="tokens held", title=f"sketch {shape[0]} x {shape[1]}")
    label_ends(upper, ends)
    lower.set(xlabel="bytes held, % of the full cache", title="all configurations")
    cap = one.max_cache_size.max()
    at = one[one.max_cache_size == cap].set_index("uses")["mean"]
    k = f"top {one.attend_topk.clip(upper=cap).max()}"
    pays = at["aggregate"] < at[k] < at["top 32"]
    said = (
        "Leaving out stored tokens costs; remembering evicted ones pays"
        if pays
        else "The uses differ little here"
    )
    return fig, (
        f"{said}. With {cap} tokens: "
        f"attention over the top 32 costs {at['top 32']:.0f} %, over the {k} {at[k]:.0f} %, over all and a summary of the "
        f"evicted ones (aggregate) {at['aggregate']:.0f} %. Above: {BARS.lower()}, n = {summary.n.min()} documents. Below: all "
        f"{len(summary)} configurations, bytes of the sketch included; the full cache is 100 %. A k above the cap is the cap."
    )


def sketch_regimes(found, length):
    """The sketch beside exact scores in every regime, at equal slots and at equal bytes."""
    order = list(found.regime.unique())
    fig, axis = plt.subplots(figsize=(WIDTH, 1.4 + 0.62 * len(order)))
    looks = {"equal slots": ("0.5", "o", -0.16), "equal bytes": (PALETTE[3], "s", 0.16)}
    for name, (colour, marker, shift) in looks.items():
        part = found[found.method == name].set_index("regime").loc[order]
        for row, line in enumerate(part.itertuples()):
            more = (-line.mean, -line.high, -line.low)  # than exact scores lose
            mean, low, high = map(percent, more)
            axis.plot([low, high], [row + shift] * 2, color=colour, linewidth=2)
            axis.plot(mean, row + shift, marker, color=colour)
            if not row:
                write(axis, name, (high, row + shift), (8, 0), colour)
    axis.axvline(0, color="0.2", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(order)), [name.replace(" that", "\nthat") for name in order])
    axis.set(ylim=(len(order) - 0.5, -0.6), xlabel="perplexity above exact scores, % (left is better)")
    axis.grid(axis="y", visible=False)
    bytes_, slots = (found[found.method == f"equal {kind}"].verdict for kind in ("bytes", "slots"))
    better, worse = int((bytes_ == "better than").sum()), int((bytes_ == "worse than").sum())
    trials = len(bytes_)
    said = f"loses to exact scores in {'all ' * (worse == trials)}{worse}{f' of {trials}' * (worse < trials)} regimes"
    if better:
        said = f"beats exact scores in {better} of {trials} regimes"
    return fig, (
        f"At equal bytes the sketch {said}. At equal slots, a wide sketch whose bytes are not counted: better in "
        f"{int((slots == 'better than').sum())}, worse in {int((slots == 'worse than').sum())} of {len(slots)}. Rows: tokens that exact scores keep "
        f"per head, of texts of {length} tokens; in the last one a document is read, then another, then the first again, which alone is scored. "
        f"Paired differences with bootstrap 95 % intervals, n = {found.n.min()} documents; of {len(found)} intervals {0.05 * len(found):.1f} miss "
        "their truth by chance."
    )
