"""The figures of the notebooks on the model, the cache, the sketch, attention and loss: tables in, `(figure, caption)` out.

Loss is drawn in percent of perplexity above the full cache, less to the left or below. The first sentence of a caption
is the finding, of at most 90 characters, worded by what the numbers say.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sketchkv.study import stats, why
from sketchkv.study.figures import PALETTE, method_style
from sketchkv.study.stats import percent

LOSS = "perplexity above the full cache, % (left is better)"
WIDTH = 7.0  # inches of every figure: its smallest type is then 8 pixels high on a phone
SMALL = 12  # points of what is written beside points and lines
BARS = "Bars: bootstrap 95 % intervals"
NAMED = ("compact", "kivi2", "sketch", "streaming")  # of all methods, at their points


def write(axis, words, at, shift, colour, ha="left"):
    """Writes `words` so many points (`shift`) from the point `at`."""
    beside = {"textcoords": "offset points", "va": "center"}
    axis.annotate(words, at, shift, ha=ha, color=colour, fontsize=SMALL, **beside)


def label_ends(axis, ends, gap=15):
    """Writes each label of `ends`, {label: (x, y, colour)}, right of its point, at least `gap` points from the next."""
    axis.figure.draw_without_rendering()  # places the axes
    points = 72 / axis.figure.dpi
    heights = {label: axis.transData.transform(at[:2])[1] * points for label, at in ends.items()}
    previous = -np.inf
    for label, height in sorted(heights.items(), key=lambda item: item[1]):
        previous = max(height, previous + gap)
        write(axis, label, ends[label][:2], (7, previous - height), ends[label][2])


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


def ticks(axis, values, which="x", words=str):
    """Marks these values, and no others, on an axis that is logarithmic."""
    getattr(axis, f"set_{which}scale")("log")
    getattr(axis, f"set_{which}ticks")(values, [words(value) for value in values])
    axis.minorticks_off()


# -- all methods


def front(points, own=None):
    """Growth of perplexity against bytes. points: dicts as of `explore.point`, four of whose methods are named; own: one more,
    in red."""
    fig, axis = plt.subplots(figsize=(WIDTH, 4.8))
    least, ends = 0.1, {}
    for label, part in pd.DataFrame(points + [own] * bool(own)).groupby("label"):
        x, y, name = part["share"], part.growth.clip(lower=least), part.method.iloc[0]
        mine = bool(own) and label == own["label"]
        if mine or name in NAMED:
            style = method_style(name) | ({"color": "#b2182b", "markersize": 14} if mine else {})
            ends[label] = (x.iloc[-1], y.iloc[-1], style["color"])
        else:
            style = {"color": "0.8", "marker": "o", "markersize": 4, "linewidth": 1}
        axis.plot(x, y, **style, zorder=2 + (label in ends))
    axis.set(xlabel="bytes held, share of a full cache in half precision", xlim=(0.055, 1.5))
    axis.set(ylabel="perplexity above full, %")
    ticks(
        axis, [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], words=lambda share: f"1/{1 / share:.0f}" if share < 1 else "1"
    )
    ticks(axis, [least, 1, 10, 100], "y", lambda loss: f"{loss:g}" if loss > least else "0.1 or less")
    label_ends(axis, ends)
    return fig


# -- the model


def model_context(table, seed=0):
    """Perplexity of the same tokens from contexts of growing length."""
    wide = table.pivot(index="document", columns="context", values="nll")
    perplexity, last = np.exp(wide.mean()), wide.columns[-1]
    fig, axis = plt.subplots(figsize=(WIDTH, 4.0))
    axis.plot(perplexity.index, perplexity, marker="o", color=PALETTE[0])
    ticks(axis, list(perplexity.index))
    axis.set(xlabel="tokens of context", ylabel="perplexity")
    axis.set_ylim(0, 1.1 * perplexity.max())
    base = 128
    gain = stats.paired_interval(wide[last] - wide[base], seed)
    mean, low, high = (percent(x) for x in gain)
    helps = "Longer contexts help" if gain[2] < 0 else "Longer contexts hardly help"
    return fig, (
        f"{helps}: perplexity {perplexity[base]:.1f} with {base} tokens, {perplexity[last]:.1f} with {last}. That is "
        f"{mean:+.0f} % (95 % interval {low:+.0f} to {high:+.0f} %, paired, n = {len(wide)} documents). The best is "
        f"{perplexity.min():.1f}, with {perplexity.idxmin()} tokens."
    )


def model_collapse(table, cap, seed=0):
    """A window with and without the first tokens."""
    fig, axis = plt.subplots(figsize=(WIDTH, 2.8))
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


# -- the cache


def fill(table, cap, evict_every):
    """Tokens and bytes as a text passes."""
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(WIDTH, 6.6), sharex=True)
    colours = dict(zip(table.cache.unique(), ("0.2", PALETTE[0], PALETTE[9], PALETTE[3])))
    last, ends = table.step.max(), [dict[str, tuple]() for _ in range(2)]
    for name, line in table.groupby("cache", sort=False):
        kib = line.total / 1024
        lower.plot(line.step, kib, color=colours[name])
        ends[1][name] = (last, kib.iloc[-1], colours[name])
        if name in ("full", "sketch 512 x 4"):
            upper.plot(line.step, line.stored, color=colours[name])
            ends[0]["full" if name == "full" else "bounded"] = (last, line.stored.iloc[-1], colours[name])
    upper.plot([0, last], [cap, cap], color="0.4", linewidth=1, linestyle=":")
    upper.set(ylabel="tokens per layer and head", ylim=(0, None))
    lower.set(xlabel="tokens fed", ylabel="KiB held, all layers", ylim=(0, None))
    for axis, labels in zip((upper, lower), ends):
        label_ends(axis, labels)
    end = table[table.step == last].set_index("cache")
    share = end.sketch["sketch 512 x 4"] / end.kv["sketch 512 x 4"]
    return fig, (
        f"The cache fills, stops at {cap} tokens, and holds the same bytes ever after. After {last} tokens the full cache "
        f"holds {end.stored['full']} and {end.total['full'] / end.total['window']:.1f} times the bytes of a window; ours "
        f"holds at most {cap + evict_every - 1} after each token, {cap} right after an eviction (dotted). The sketch is no "
        f"gift: 512 x 4 counters per head add {100 * share:.0f} % to the keys and values that they manage. One document, n = 1; all "
        "layers hold the same number."
    )


def quality(table, cap, length, seed=0):
    """What the choice of tokens costs, at equal slots."""
    order = list(stats.intervals(table, "cache", "loss").sort_values("mean").cache)
    fig, axis = plt.subplots(figsize=(WIDTH, 4.2))
    shown = dots(axis, table, "cache", order, seed)
    axis.set(xlabel=LOSS, xlim=(min(0, shown.low.min()), 1.25 * shown.high.max()))
    wide = table.pivot(index="document", columns="cache", values="loss")
    gap = stats.paired_interval(wide["sketch"] - wide["exact"], seed)
    verdict = "better than" if gap[2] < 0 else "worse than" if gap[1] > 0 else "as well as"
    low, mean, high = (percent(gap[i]) for i in (1, 0, 2))
    return fig, (
        f"At equal slots the sketch chooses {verdict} the exact scores that it estimates. With {cap} of {length} tokens: "
        + ", ".join(f"{name} {shown['mean'][name]:.1f} %" for name in order)
        + f". The sketch's loss beside exact scores, paired: {mean:+.1f} % ({low:+.1f} to {high:+.1f}). Equal slots are not equal "
        f"bytes: the sketch's counters come on top. Dots: documents (n = {len(wide)}), some beyond the axis. {BARS}."
    )


# -- attention, and why a cache loses


def heavy_hitters(table, seed=0):
    """How few tokens hold the attention, chosen in three ways."""
    ways = {
        "each query": "anew for each query",
        "hindsight": "best fixed set",
        "foresight": "by past attention",
    }
    fig, axis = plt.subplots(figsize=(WIDTH, 4.2))
    for (way, label), colour in zip(ways.items(), (PALETTE[2], PALETTE[0], PALETTE[3])):
        mean = 100 * table[table.chosen == way].groupby("tokens").mass.mean()
        axis.plot(mean.index, mean, color=colour, marker="o")
        write(axis, label, (mean.index[0], mean.iloc[0]), (-8, 0), colour, "right")
    axis.plot(mean.index, 100 * mean.index, color="0.5", linestyle="--", linewidth=1)
    write(axis, "all tokens alike", (mean.index[0], 100 * mean.index[0]), (-8, 0), "0.4", "right")
    ticks(axis, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], words=lambda share: f"{100 * share:.0f}")
    axis.set_xlim(0.001, 1.1)
    axis.set(xlabel="share of the tokens, %", ylabel="share of the attention, %", ylim=(-2, 104))
    tenth = 100 * table[table.tokens == 0.1].groupby(["document", "chosen"]).mass.mean().unstack()
    top = tenth.mean()
    lost, unforeseen = (
        stats.paired_interval(tenth[a] - tenth[b], seed)
        for a, b in (("each query", "hindsight"), ("hindsight", "foresight"))
    )
    return fig, (
        f"A tenth of the tokens holds {top['each query']:.0f} % of the attention, or {top['foresight']:.0f} % if the past chooses. Above: the "
        f"tenth is chosen anew for each query. The best fixed tenth holds {top['hindsight']:.0f} %. To fix the set costs {lost[0]:.0f} points "
        f"({lost[1]:.0f} to {lost[2]:.0f}), to choose it beforehand another {unforeseen[0]:.0f} ({unforeseen[1]:.0f} to {unforeseen[2]:.0f}). "
        f"Attention of each text's second half on its first, sinks aside; 95 % intervals, n = {len(tenth)} documents."
    )


def retained(table, labels, cap, length, seed=0):
    """How much of the attention each policy keeps, and what it loses."""
    order = list(stats.intervals(table, "policy", "retained").sort_values("mean", ascending=False).policy)
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 5.0), sharey=True)
    held = dots(left, table, "policy", order, seed, "retained", lambda share: 100 * share)
    cost = dots(right, table, "policy", order, seed)
    left.set_yticks(range(len(order)), [labels.get(name, name) for name in order])
    ceiling = 100 * table.bound.mean()
    left.axvline(ceiling, color="0.4", linestyle="--", linewidth=1)
    left.set_xlabel("attention retained, %\n(right is better)")
    right.set_xlabel("perplexity above full, %\n(left is better)")
    right.set_xlim(min(0, cost.low.min()), 1.1 * cost.high.max())
    wide = table.pivot(index="document", columns="policy", values="retained")
    gap = stats.paired_interval(100 * (wide["sketch"] - wide["decayed"]), seed)
    verdict = f"{abs(gap[0]):.1f} points {'more' if gap[0] > 0 else 'less'} than"
    if gap[1] <= 0 <= gap[2]:
        verdict = "about as much as"
    return fig, (
        f"The sketch retains {held['mean']['sketch']:.0f} % of the attention, {verdict} exact scores. Paired difference "
        f"{gap[0]:+.2f} points ({gap[1]:+.2f} to {gap[2]:+.2f}). The oracle knows the future and retains {held['mean']['oracle']:.0f} %; no "
        f"choice retains more than {ceiling:.0f} % (dashed). {cap} of {length} tokens, queries after the first eviction. Dots: documents "
        f"(n = {len(wide)}). {BARS}."
    )


def ladder(table, worth, length):
    """The loss of a small cache taken apart, step by step."""
    slots = sorted(worth.slots.unique())
    fig, axes = plt.subplots(1, len(slots), figsize=(WIDTH, 3.6), sharey=True, squeeze=False)
    rungs = list(why.LABELS)
    better = ("exact scores", "choice by an oracle", "+ mean of the rest", "full cache")
    words = ["random", "sketch", *(f"→ {step}" for step in better)]
    colours = (PALETTE[7], PALETTE[1], PALETTE[0], "0.75")
    for axis, count in zip(axes[0], slots):
        mean = table[table.slots == count].groupby("method").loss.mean()
        level = [percent(mean.get(name, 0.0)) for name in rungs]
        steps = worth[worth.slots == count].set_index("foot")
        for row, name in enumerate(rungs):
            if name in steps.index:
                low, high = sorted(level[row - 1 : row + 1])
                axis.barh(row, high - low, left=low, color=colours[row - 2], height=0.62)
                text = f"{level[row] - level[row - 1]:+z.0f} ({100 * steps.share[name]:z.0f} %)"
            else:
                high, text = level[row], f"{level[row]:.0f} %"
                axis.barh(row, high, color="0.45", height=0.62)
            if row > 1:
                axis.plot([level[row - 1]] * 2, [row - 1.3, row + 0.3], color="0.5", linewidth=0.8)
            axis.text(high + 0.015 * level[0], row, text, va="center", fontsize=SMALL)
        axis.set(xlim=(0, 1.4 * level[0]), ylim=(len(rungs) - 0.5, -0.6))
        axis.set_title(f"{count} of {length} tokens")
        axis.set_yticks(range(len(rungs)), words)
        axis.grid(axis="y", visible=False)
    fig.supxlabel("perplexity above the full cache, %", fontsize=plt.rcParams["axes.labelsize"])
    first = worth[worth.slots == slots[0]].set_index("step")
    most = first.share.idxmax()
    said = {
        "lost tail": "comes back with the mean of what was evicted",
        "wrong eviction": "comes from evicting the wrong tokens",
        "sketch error": "is the sketch's own error",
        "rest": "comes back neither by choice nor by a mean",
    }
    shares = (
        f"{row.label} {100 * row.share:z.0f} % ({100 * row.share_low:z.0f} to {100 * row.share_high:z.0f})"
        for row in first.itertuples()
    )
    return fig, (
        f"The largest part of the loss {said[most]}. Each arrow makes one thing better: exact scores, then attention that the future "
        "will give (a greedy oracle, no bound), then one slot for the mean of what is evicted. In brackets: shares of the sketch's loss; "
        f"with {slots[0]} slots {', '.join(shares)}. 95 % intervals, n = {table.document.nunique()} documents."
    )
