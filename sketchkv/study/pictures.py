"""The figures of the notebooks on the model, the cache, the sketch, attention and loss: tables in, `(figure, caption)` out.

Loss is drawn in percent of perplexity above the full cache, less to the left or below. The first sentence of a caption
is the finding, of at most 90 characters, worded by what the numbers say.
"""

import math

import matplotlib.pyplot as plt
import numpy as np

from sketchkv.study import figures, stats, why
from sketchkv.study.figures import PALETTE
from sketchkv.study.stats import percent

LOSS = "perplexity above the full cache, % (left is better)"
BARS = "Bars: bootstrap 95 % intervals"


def label_ends(axis, ends, gap=13):
    """Writes each label of `ends`, {label: (x, y, colour)}, right of its point, at least `gap` points from the next."""
    axis.figure.draw_without_rendering()  # places the axes
    points = 72 / axis.figure.dpi
    at = {label: axis.transData.transform((x, y))[1] * points for label, (x, y, _) in ends.items()}
    previous = -np.inf
    for label in sorted(ends, key=at.get):
        x, y, colour = ends[label]
        previous = max(at[label], previous + gap)
        axis.annotate(
            label,
            (x, y),
            (7, previous - at[label]),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize="small",
        )


def dots(axis, table, by, order, seed=0, value="loss", scale=percent):
    """Each document of `table` as a grey dot, the mean of each of `order` (values of the column `by`) with its interval and
    number. Returns the intervals, as `scale` turns nats into what is drawn."""
    found = stats.intervals(table, by, value, seed).set_index(by).loc[order]
    shown = found.assign(**{end: scale(found[end]) for end in ("mean", "low", "high")})
    for row, (name, line) in enumerate(shown.iterrows()):
        each = scale(table.loc[table[by] == name, value])
        axis.scatter(each, [row + 0.28] * len(each), color="0.65", s=9, linewidths=0)
        axis.plot([line.low, line.high], [row, row], color=PALETTE[0], linewidth=2)
        axis.plot(line["mean"], row, "o", color=PALETTE[0])
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(len(order) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    return shown


# -- the cache


def fill(table, cap, evict_every):
    """Tokens and bytes as a text passes."""
    fig, (left, right) = plt.subplots(1, 2, figsize=figures.FULL)
    colours = dict(zip(table.cache.unique(), ("0.2", PALETTE[0], PALETTE[9], PALETTE[3])))
    last, ends = table.step.max(), ({}, {})
    for name, line in table.groupby("cache", sort=False):
        kib = line.total / 1024
        right.plot(line.step, kib, color=colours[name])
        ends[1][name] = (last, kib.iloc[-1], colours[name])
        if name in ("full", "sketch 512 x 4"):
            left.plot(line.step, line.stored, color=colours[name])
            ends[0]["full" if name == "full" else "bounded"] = (last, line.stored.iloc[-1], colours[name])
    left.axhline(cap, color="0.4", linewidth=1, linestyle=":")
    left.set(xlabel="tokens fed", ylabel="tokens stored per layer and head", ylim=(0, None))
    right.set(xlabel="tokens fed", ylabel="KiB held, all layers", ylim=(0, None))
    for axis, labels in zip((left, right), ends):
        label_ends(axis, labels)
    end = table[table.step == last].set_index("cache")
    share = end.sketch["sketch 512 x 4"] / end.kv["sketch 512 x 4"]
    return fig, (
        f"The cache fills, stops at {cap} tokens, and holds the same bytes ever after. After {last} tokens the full cache "
        f"holds {end.stored['full']} and {end.total['full'] / end.total['window']:.1f} times the bytes of a window; ours "
        f"holds at most {cap + evict_every - 1} after each token, {cap} right after an eviction (dotted). The sketch is no "
        f"gift: 512 x 4 counters per head add {share:.0%} to the keys and values that they manage. One document, n = 1; all "
        "layers hold the same number."
    )


def kept(table, visible, cap):
    """Which tokens three heads hold while a text passes."""
    layers = sorted({0, len(visible) // 2, len(visible) - 1})
    fig, axes = plt.subplots(1, len(layers), figsize=figures.FULL, sharey=True, squeeze=False)
    for axis, layer in zip(axes[0], layers):
        seen = visible[layer][0, 0].cpu()
        axis.imshow(seen, cmap="Greys", aspect="auto", interpolation="nearest", vmin=0, vmax=1.3)
        axis.set(xlabel="position in the text", title=f"layer {layer}, head 0")
        axis.grid(False)
    tokens = len(seen)
    axes[0, 0].set_ylabel("step of decoding")
    arrow = {"arrowstyle": "-|>", "color": PALETTE[3]}
    for words, at, text in (
        ("recent window", (0.52, 0.53), (0.66, 0.25)),
        ("sinks", (0.006, 0.3), (0.2, 0.12)),
    ):
        at, text = ((x * tokens, y * tokens) for x, y in (at, text))
        axes[0, 0].annotate(words, at, text, arrowprops=arrow, color=PALETTE[3], fontsize="small")
    low, high, middle = table.old_tokens.min(), table.old_tokens.max(), table.old_tokens.median()
    return fig, (
        f"Each head keeps its own old tokens: between {low} and {high} of {cap}. Dark: held. A column ends where its token is "
        f"evicted; the columns that stay are what the sketch found important. Counted at the last of {tokens} steps: tokens of "
        f"the text's first half, median {middle:.0f} over {len(table)} heads of all layers; a window would hold only the sinks. "
        "One document, n = 1."
    )


def quality(table, cap, length, seed=0):
    """What the choice of tokens costs, at equal slots."""
    order = list(stats.intervals(table, "cache", "loss").sort_values("mean").cache)
    fig, axis = plt.subplots(figsize=(7.4, 4.2))
    shown = dots(axis, table, "cache", order, seed)
    axis.set(xlabel=LOSS, xlim=(min(0, shown.low.min()), 1.25 * shown.high.max()))
    wide = table.pivot(index="document", columns="cache", values="loss")
    gap = stats.paired_interval((wide["sketch"] - wide["exact"]).to_numpy(copy=True), seed)
    verdict = "better than" if gap[2] < 0 else "worse than" if gap[1] > 0 else "as well as"
    low, mean, high = (percent(gap[i]) for i in (1, 0, 2))
    return fig, (
        f"At equal slots the sketch chooses {verdict} the exact scores that it estimates. With {cap} of {length} tokens: "
        + ", ".join(f"{name} {shown['mean'][name]:.1f} %" for name in order)
        + f". The sketch's loss beside exact scores, paired: {mean:+.1f} % ({low:+.1f} to {high:+.1f}). Equal slots are not equal "
        f"bytes: the sketch's counters come on top. Dots: documents (n = {len(wide)}), some beyond the axis. {BARS}."
    )


# -- the sketch


def ticks(axis, values, which="x", words=str):
    """Marks these values, and no others, on an axis that is logarithmic."""
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}ticks")(values, [words(value) for value in values])
    axis.minorticks_off()


def size(count):
    """Bytes in words."""
    unit = min(2, max(0, int(math.log2(count)) // 10))
    return f"{count / 2 ** (10 * unit):.0f} {('B', 'KiB', 'MiB')[unit]}"


def sketch_error(table, vocabulary, length):
    """The error beside its bound, for two kinds of stream."""
    fig, axes = plt.subplots(1, 2, figsize=figures.FULL, sharex=True, sharey=True)
    for axis, (stream, part) in zip(axes, table.groupby("stream", sort=False)):
        ends = {}
        for colour, (depth, line) in zip(PALETTE, part.groupby("depth")):
            axis.fill_between(line.width, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(line.width, line.p95, color=colour, marker="o")
            ends[f"{depth} row{'s' * (depth > 1)}"] = (line.width.iloc[-1], line.p95.iloc[-1], colour)
        axis.plot(line.width, line.bound, color="black", linestyle="--")
        ends["bound e / width"] = (line.width.iloc[-1], line.bound.iloc[-1], "black")
        ticks(axis, line.width)
        axis.set(yscale="log", xlabel="width (counters per row)", title=f"{stream} stream")
        label_ends(axis, ends)
    axes[0].set_ylabel("over-estimate / total weight")
    inside = (table.p95 < table.bound).where(table.depth > 1, True).all()
    worst = table.loc[(table.misses / table.allowed).idxmax()]
    return fig, (
        f"With two rows or more the error stays {'below' if inside else 'near'} its bound, and shrinks with the width. "
        f"Lines: what 95 % of the {vocabulary} ids stay below, median over seeds; bands: 95 % of the seeds (n = {worst.seeds}); "
        f"{length} items. At {worst.width} x {worst.depth} counters {worst.misses:.2%} of the ids exceed the bound on the {worst.stream} "
        f"stream, where theory allows {worst.allowed:.1%}: no setting uses more of what it is allowed."
    )


def sketch_topk(table, k, vocabulary):
    """How many of the heaviest ids a sketch finds."""
    fig, axis = plt.subplots(figsize=(7.4, 4.2))
    ends = {}
    for colour, (exponent, line) in zip(
        ("0.5", PALETTE[9], PALETTE[0], PALETTE[2]), table.groupby("exponent")
    ):
        axis.fill_between(line.bytes, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(line.bytes, line["mean"], color=colour, marker="o")
        label = f"Zipf {exponent:g}" if exponent else "uniform stream"
        ends[label] = (line.bytes.iloc[-1], line["mean"].iloc[-1], colour)
    axis.axhline(k / vocabulary, color="black", linestyle=":")
    axis.set(xlabel="bytes of the sketch, four rows", ylabel=f"share of the top {k} found", ylim=(0, 1.04))
    ticks(axis, list(line.bytes)[::2], words=size)
    label_ends(axis, ends)
    found = table.set_index(["exponent", "width"])["mean"].loc[1.0]
    return fig, (
        f"A wide sketch finds {found.iloc[-1]:.0%} of the heavy ids, a narrow one {found.iloc[0]:.0%}: it fails without a word. Zipf 1, "
        f"{found.index[-1]} and {found.index[0]} counters a row; chance is {k / vocabulary:.1%} (dotted). A uniform stream has hardly "
        f"any heavy ids. Bands: 95 % intervals over seeds (n = {table.n.min()}); {k} of {vocabulary} ids."
    )


def sketch_memory(table, cap, head_dim):
    """Bytes of what could remember importance."""
    wide = table.pivot(index="distinct", columns="store", values="bytes")
    fig, axis = plt.subplots(figsize=(7.6, 4.4))
    colours = dict.fromkeys(wide, PALETTE[0]) | {
        "exact, every id": PALETTE[2],
        "exact, stored slots": PALETTE[1],
        "fp16 keys and values": "0.3",
    }
    for store in wide:
        axis.plot(wide.index, wide[store], color=colours[store])
    ticks(axis, list(wide.index)[::3])
    ticks(axis, [2**n for n in range(8, 20, 2)], "y", size)
    axis.set(xlabel="distinct ids seen", ylabel="bytes per head")
    label_ends(axis, {store: (wide.index[-1], wide[store].iloc[-1], colours[store]) for store in wide})
    slots, middle, kv = (
        wide[name].iloc[0] for name in ("exact, stored slots", "sketch 512 x 4", "fp16 keys and values")
    )
    return fig, (
        f"A 512 x 4 sketch takes {middle / slots:.0f} times the bytes of one exact score per stored slot. {cap} slots need {slots} B "
        f"of scores and {kv} B of keys and values (head dimension {head_dim}), the sketch {middle} B. It saves memory only beside exact "
        f"scores of everything ever seen, from {middle / 8:.0f} distinct ids on."
    )


def sketch_of_keys(errors, recall, k, tokens, seed=0):
    """The index of keys: its error beside the bound, and the heavy tokens that it finds."""
    fig, (left, right) = plt.subplots(1, 2, figsize=figures.FULL)
    by, ends = errors.groupby(["bits", "dim"]).error, {}
    for colour, (bits, line) in zip((PALETTE[0], PALETTE[9], PALETTE[2]), by.mean().groupby("bits")):
        left.plot(line[bits].index, line[bits], color=colour, marker="o")
        ends[f"{bits} bit{'s' * (bits > 1)}"] = (line[bits].index[-1], line[bits].iloc[-1], colour)
    dims = line[bits].index.to_numpy()
    left.plot(dims, dims**-0.5, color="black", linestyle="--")
    ticks(left, dims)
    ticks(left, [0.01, 0.03, 0.1, 0.2], "y")
    left.set(xlabel="coordinates of a key (d)", ylabel="error / (|q| |k|)", title="random keys")
    label_ends(left, ends | {"bound 1 / √d": (dims[-1], dims[-1] ** -0.5, "black")})

    shown = stats.intervals(recall, ["how", "bits"], "recall", seed)
    past = shown[shown.bits.isna()].iloc[0]
    counted, index = (
        shown[shown.how.str.startswith(name) & shown.bits.notna()].sort_values("bits")
        for name in ("Count", "index")
    )
    ends = {}
    for line, colour in ((counted, PALETTE[3]), (index, PALETTE[0])):
        spread = [line["mean"] - line.low, line.high - line["mean"]]
        right.errorbar(line.bits, line["mean"], yerr=spread, color=colour, marker="o", capsize=3)
    for row in index.itertuples():
        at = {"textcoords": "offset points", "ha": "right", "fontsize": "small", "color": PALETTE[0]}
        right.annotate(row.how.removeprefix("index, "), (row.bits, row.mean), (-6, 5), **at)
    right.axhline(past["mean"], color=PALETTE[1], linestyle="--")
    first = index.iloc[0]
    right.set(
        xlabel="bits per token and head", ylabel=f"share of a query's top {k} found", ylim=(0, 1.04)
    )
    ticks(right, [2**n for n in range(3, 10) if 2**n < 1.3 * shown.bits.max()])
    right.set(title="a trained model's keys")
    last = shown.bits.max()
    ends = {
        "index of keys": (*index.iloc[-1][["bits", "mean"]], PALETTE[0]),
        "exact past scores": (last, past["mean"], PALETTE[1]),
    }
    label_ends(right, ends | {"sketch of the past": (*counted.iloc[-1][["bits", "mean"]], PALETTE[3])})
    slope, root = (
        stats.intervals(errors[errors.bits == 1], "dim", "slope", seed),
        by.mean().loc[1] * dims**0.5,
    )
    return fig, (
        f"One sign per coordinate finds {first['mean']:.0%} of what a query looks for, exact past scores {past['mean']:.0%}. The best "
        f"sketch of past attention: {counted['mean'].max():.0%}. Left: root mean square error; one bit reaches {root.min():.2f} to "
        f"{root.max():.2f} of the bound. It has no bias: the slope on the true product lies within {slope.low.min():.3f} to "
        f"{slope.high.max():.3f} in all dimensions (95 % intervals, n = {slope.n.min()} draws). Right: {first.bits:.0f} bits per token hold "
        f"signs, factor and centre; sinks and the 16 newest tokens are no candidates. {BARS}, n = {past.n} documents of {tokens} tokens."
    )


# -- the sweep


def sweep_use(table, summary, shape, full_bytes, seed=0):
    """What each use of the sketch's memory costs, at one shape, and all configurations by their bytes."""
    fig, (left, right) = plt.subplots(1, 2, figsize=figures.FULL)
    named = summary.use.where(summary.use == "aggregate", "top " + summary.attend_topk.astype(str))
    shown = summary.assign(uses=named, **{x: percent(summary[x]) for x in ("mean", "low", "high")})
    one = shown[(shown.width == shape[0]) & (shown.depth == shape[1])]
    colours, ends = (
        dict(
            zip(
                ("top 32", "top 64", "top 128", "aggregate"), (PALETTE[3], PALETTE[1], PALETTE[4], PALETTE[0])
            )
        ),
        {},
    )
    for step, (uses, colour) in enumerate(colours.items()):
        line = one[one.uses == uses].sort_values("max_cache_size")
        x = line.max_cache_size * 1.03 ** (step - 1.5)
        bars = [line["mean"] - line.low, line.high - line["mean"]]
        left.errorbar(x, line["mean"], yerr=bars, color=colour, marker="o", capsize=3)
        ends[uses] = (x.iloc[-1], line["mean"].iloc[-1], colour)
        every = shown[shown.uses == uses]
        right.scatter(100 * every.bytes_total / full_bytes, every["mean"], s=22, color=colour, alpha=0.7)
    ticks(left, sorted(one.max_cache_size.unique()))
    levels = [
        n for n in (1, 2, 5, 10, 20, 50, 100, 200) if shown["mean"].min() / 2 < n < 2 * shown["mean"].max()
    ]
    for axis in (left, right):
        ticks(axis, levels, "y")
    left.set(xlabel="tokens held", ylabel="perplexity above full, %", title=f"sketch {shape[0]} x {shape[1]}")
    label_ends(left, ends)
    right.set(xlabel="bytes held, % of the full cache", title="all configurations")
    cap = one.max_cache_size.max()
    at, k = (
        one[one.max_cache_size == cap].set_index("uses"),
        f"top {max(min(x, cap) for x in one.attend_topk)}",
    )
    pays = at["mean"]["aggregate"] < at["mean"][k] < at["mean"]["top 32"]
    return fig, (
        f"{'Leaving out stored tokens costs; remembering evicted ones pays' if pays else 'The uses differ little here'}. With {cap} tokens: "
        f"attention over the top 32 costs {at['mean']['top 32']:.0f} %, over the {k} {at['mean'][k]:.0f} %, over all and a summary of the "
        f"evicted ones (aggregate) {at['mean']['aggregate']:.0f} %. Left: {BARS.lower()}, n = {summary.n.min()} documents. Right: all "
        f"{len(summary)} configurations, bytes of the sketch included; the full cache is 100 %. A k above the cap is the cap."
    )


# -- attention, and why a cache loses


def heavy_hitters(table, seed=0):
    """How few tokens hold the attention, chosen in three ways."""
    ways = {
        "each query": "anew for each query",
        "hindsight": "best fixed set",
        "foresight": "by past attention",
    }
    fig, axis = plt.subplots(figsize=(7.4, 4.2))
    for (way, label), colour, side in zip(ways.items(), (PALETTE[2], PALETTE[0], PALETTE[3]), (1, 0, -1)):
        mean = table[table.chosen == way].groupby("tokens").mass.mean()
        axis.plot(mean.index, mean, color=colour, marker="o")
        at = (mean.index[3], mean.iloc[3])
        axis.annotate(
            label, at, (10, 8 * side - 5), textcoords="offset points", color=colour, fontsize="small"
        )
    axis.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1)
    axis.annotate("all tokens alike", (0.62, 0.56), color="0.4", fontsize="small")
    axis.set(xlabel="share of the tokens", ylabel="share of the attention", ylim=(0, 1.04))
    tenth = table[table.tokens == 0.1].groupby(["document", "chosen"]).mass.mean().unstack()
    top = tenth.mean()
    lost, unforeseen = (
        stats.paired_interval((tenth[a] - tenth[b]).to_numpy(copy=True), seed)
        for a, b in (("each query", "hindsight"), ("hindsight", "foresight"))
    )
    return fig, (
        f"A tenth of the tokens holds {top['each query']:.0%} of the attention, chosen by the past {top['foresight']:.0%}. Chosen anew for "
        f"each query, as the best fixed set ({top['hindsight']:.0%}), and by past attention. To fix the set costs {lost[0]:.2f} "
        f"({lost[1]:.2f} to {lost[2]:.2f}), to choose it beforehand another {unforeseen[0]:.2f} ({unforeseen[1]:.2f} to {unforeseen[2]:.2f}). "
        f"Attention of each text's second half on its first, sinks aside; 95 % intervals, n = {len(tenth)} documents."
    )


def retained(table, labels, cap, length, seed=0):
    """How much of the attention each policy keeps, and what it loses."""
    order = list(stats.intervals(table, "policy", "retained").sort_values("mean", ascending=False).policy)
    fig, (left, right) = plt.subplots(1, 2, figsize=(figures.FULL[0], 4.6), sharey=True)
    held = dots(left, table, "policy", order, seed, "retained", lambda share: 100 * share)
    cost = dots(right, table, "policy", order, seed)
    left.set_yticks(range(len(order)), [labels.get(name, name) for name in order])
    ceiling = 100 * table.bound.mean()
    left.axvline(ceiling, color="0.4", linestyle="--", linewidth=1)
    left.set(xlabel="attention retained, % (right is better)")
    right.set(xlabel=LOSS, xlim=(min(0, cost.low.min()), 1.1 * cost.high.max()))
    wide = table.pivot(index="document", columns="policy", values="retained")
    gap = stats.paired_interval(100 * (wide["sketch"] - wide["decayed"]).to_numpy(copy=True), seed)
    verdict = "more than" if gap[1] > 0 else "less than" if gap[2] < 0 else "as much as"
    return fig, (
        f"The sketch retains {held['mean']['sketch']:.0f} % of the attention, {verdict} the exact scores it estimates. Paired difference "
        f"{gap[0]:+.2f} points ({gap[1]:+.2f} to {gap[2]:+.2f}). The oracle knows the future and retains {held['mean']['oracle']:.0f} %; no "
        f"choice retains more than {ceiling:.0f} % (dashed). {cap} of {length} tokens, queries after the first eviction. Dots: documents "
        f"(n = {len(wide)}). {BARS}."
    )


def ladder(table, worth, length):
    """The loss of a small cache taken apart, step by step."""
    slots = sorted(worth.slots.unique())
    fig, axes = plt.subplots(1, len(slots), figsize=(figures.FULL[0], 4.0), sharey=True, squeeze=False)
    rungs = list(why.LABELS)
    words = [
        "random",
        "sketch",
        "→ exact scores",
        "→ choice by an oracle",
        "→ + mean of the rest",
        "→ full cache",
    ]
    colours = (PALETTE[7], PALETTE[1], PALETTE[0], "0.75")
    for axis, count in zip(axes[0], slots):
        mean = table[table.slots == count].groupby("method").loss.mean()
        level = [percent(mean.get(name, 0.0)) for name in rungs]
        steps = worth[worth.slots == count].set_index("foot")
        for row, name in enumerate(rungs):
            if name in steps.index:
                low, high = sorted(level[row - 1 : row + 1])
                axis.barh(row, high - low, left=low, color=colours[row - 2], height=0.62)
                text = f"{level[row] - level[row - 1]:+.0f}  ({steps.share[name]:z.0%} of the sketch's loss)"
            else:
                high, text = level[row], f"{level[row]:.0f} %"
                axis.barh(row, high, color="0.45", height=0.62)
            if row:
                axis.plot(
                    [level[row - 1]] * 2, [row - 1.3, row + 0.3], color="0.5", linewidth=0.8
                ) if row > 1 else None
            axis.text(high + 0.015 * level[0], row, text, va="center", fontsize="small")
        axis.set(
            xlim=(0, 1.45 * level[0]), ylim=(len(rungs) - 0.5, -0.6), title=f"{count} of {length} tokens"
        )
        axis.set_xlabel("perplexity above the full cache, %")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(rungs)), words)
    first = worth[worth.slots == slots[0]].set_index("step")
    most = first.share.idxmax()
    said = {
        "lost tail": "Most of a small cache's loss comes back with the mean of what was evicted",
        "wrong eviction": "Most of a small cache's loss comes from evicting the wrong tokens",
        "sketch error": "Most of a small cache's loss is the sketch's own error",
        "rest": "Most of a small cache's loss comes back neither by choice nor by a mean",
    }
    shares = (
        f"{row.label} {row.share:z.0%} ({row.share_low:z.0%} to {row.share_high:z.0%})"
        for row in first.itertuples()
    )
    return fig, (
        f"{said[most]}. Shares of the sketch's loss with {slots[0]} slots: {'; '.join(shares)}. Each arrow makes one thing better: exact "
        "scores for the sketch, the attention that the future will give (an oracle, greedy and so no bound) for the past's, then one slot "
        f"for the mean of what is evicted. 95 % intervals, n = {table.document.nunique()} documents."
    )


def sketch_regimes(found, length):
    """The sketch beside exact scores in every regime, at equal slots and at equal bytes."""
    order = list(found.regime.unique())
    fig, axis = plt.subplots(figsize=(9.0, 1.4 + 0.62 * len(order)))
    looks = {"equal slots": (PALETTE[9], "o", -0.16), "equal bytes": (PALETTE[0], "s", 0.16)}
    for name, (colour, marker, shift) in looks.items():
        part = found[found.method == name].set_index("regime").loc[order]
        for row, line in enumerate(part.itertuples()):
            mean, low, high = (
                percent(-x) for x in (line.mean, line.high, line.low)
            )  # how much more it loses
            axis.plot([low, high], [row + shift] * 2, color=colour, linewidth=2)
            axis.plot(mean, row + shift, marker, color=colour)
            if not row:
                where = {"textcoords": "offset points", "va": "center", "fontsize": "small", "color": colour}
                axis.annotate(name, (high, row + shift), (8, 0), **where)
    axis.axvline(0, color="0.2", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(order)), order)
    axis.set(
        ylim=(len(order) - 0.5, -0.6),
        xlabel="perplexity of the sketch above that of exact scores, % (left is better)",
    )
    axis.grid(axis="y", visible=False)
    bytes_, slots = (found[found.method == f"equal {kind}"].verdict for kind in ("bytes", "slots"))
    better, worse = int((bytes_ == "better than").sum()), int((bytes_ == "worse than").sum())
    said = (
        f"better in {better} of {len(bytes_)} regimes"
        if better
        else "never better, " * (worse < len(bytes_))
        + (f"worse in {'all' if worse == len(bytes_) else worse} of {len(bytes_)} regimes")
    )
    return fig, (
        f"At equal bytes a sketch is {said} than exact scores. At equal slots, a wide sketch whose bytes are not counted: better in "
        f"{int((slots == 'better than').sum())}, worse in {int((slots == 'worse than').sum())} of {len(slots)}. Rows: tokens that exact scores keep "
        f"per head, of texts of {length} tokens; in the last one a document is read, then another, then the first again, which alone is scored. "
        f"Paired differences with bootstrap 95 % intervals, n = {found.n.min()} documents; of {len(found)} intervals {0.05 * len(found):.1f} miss "
        "their truth by chance."
    )


# -- the model


def model_context(table, seed=0):
    """Perplexity of the same tokens from contexts of growing length."""
    wide = table.pivot(index="document", columns="context", values="nll")
    perplexity, last = np.exp(wide.mean()), wide.columns[-1]
    fig, axis = plt.subplots(figsize=figures.HALF)
    axis.plot(perplexity.index, perplexity, marker="o", color=PALETTE[0])
    ticks(axis, list(perplexity.index))
    axis.set(xlabel="tokens of context", ylabel="perplexity of the same tokens", ylim=(0, None))
    base = 128
    gain = stats.paired_interval((wide[last] - wide[base]).to_numpy(copy=True), seed)
    mean, low, high = (percent(x) for x in gain)
    helps = "Longer contexts help" if gain[2] < 0 else "Longer contexts hardly help"
    return fig, (
        f"{helps}: perplexity {perplexity[base]:.1f} with {base} tokens, {perplexity[last]:.1f} with {last}. That is "
        f"{mean:+.0f} % (95 % interval {low:+.0f} to {high:+.0f} %, paired, n = {len(wide)} documents). The best is "
        f"{perplexity.min():.1f}, with {perplexity.idxmin()} tokens."
    )


def model_collapse(table, cap, seed=0):
    """A window with and without the first tokens."""
    fig, axis = plt.subplots(figsize=(7.4, 2.8))
    order = ["4 sinks", "1 sinks", "0 sinks"]
    shown = dots(axis, table, "cache", order, seed)
    axis.set_yticks(range(3), ["4 sinks", "1 sink", "no sink"])
    axis.set(xlabel=LOSS, xlim=(0, 1.2 * shown.high.max()))
    none, one, four = (shown.loc[name] for name in reversed(order))
    fails = "collapses" if none.low > four.high else "loses more"
    return fig, (
        f"A window without its first tokens {fails}: {none['mean']:.0f} % above full, {four['mean']:.0f} % with four. With one "
        f"of them {one['mean']:.0f} % ({one.low:.0f} to {one.high:.0f}). Windows of {cap} tokens, the sinks among them. Dots: documents "
        f"(n = {shown.n.min()}), some beyond the axis. {BARS}."
    )
