"""The figures of the notebooks on the model, the cache, the sketch, attention and loss: tables in, `(figure, caption)` out.

Loss is drawn in percent of perplexity above the full cache, less to the left or below. The first sentence of a caption
is the finding, of at most 90 characters, worded by what the numbers say.
"""

import matplotlib.pyplot as plt
import numpy as np

from sketchkv.study import figures, stats
from sketchkv.study.figures import PALETTE

LOSS = "perplexity above the full cache, % (left is better)"
BARS = "Bars: bootstrap 95 % intervals"


def percent(nats):
    """Increase of perplexity, in percent, of so many nats per token."""
    return 100 * np.expm1(nats)


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
