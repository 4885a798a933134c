"""What notebook 11 shows of the tables that `sketchkv.study.pretrained` measured on a GPU."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sketchkv.study import figures, sweep
from sketchkv.study.measured import ATTENTION, BENCHMARKS, COUNTS, LABELS, LENGTH, LONG
from sketchkv.study.pictures import label_ends, write
from sketchkv.study.stats import intervals, paired_interval

AT = 1 / 8  # the share of the bytes at which methods are compared
# Of the hero figure: its own name for a method, and by how many points the name is above the method's point.
NAMED = {
    "compact": ("compact", -9),
    "recall": ("recall", -9),
    "exact scores": ("exact", 4),
    "sketch 512x4": ("sketch", 5),
}
GREY = "#8c8c8c"  # of methods that are not named
COLOURS = {label: figures.method_style(name)["color"] for name, label in LABELS.items() if name != "near"}
LOSSES = {
    "text": "prose (documentation of Django) or code (Python of held-out packages)",
    "method": "eviction rule and codec",
    "share": "bytes held in all, as a share of the full cache's in float16",
    "max_cache_size": "tokens kept per layer and KV head",
    "percent": "perplexity above the full cache's, in percent, mean over documents",
    "low": "lower end of its 95 % interval, documents resampled",
    "high": "upper end",
    "gain_kept": "share of what the context beyond 256 tokens gains that is kept",
    "kl": "mean KL divergence of the next token's distribution from the full cache's, nats",
    "top1": "share of tokens whose most probable successor is the full cache's",
    "n": "documents",
}
PAIRS = (
    ("sketch", "decayed"),
    ("sketch_small", "decayed"),
    ("recall", "decayed"),
    ("recall", "compact"),
    ("recall_alone", "recall"),
)
ASKED = {"needle": "a number", "four_keys": "one of four keys"}
LONGER = {name: words for name, words in LOSSES.items() if name not in ("gain_kept", "kl", "top1")}
ANSWERS = {
    "task": "what was asked for",
    "method": "cache",
    "depth": "where in the text the fact stood, 0 its start",
    "right": "answers that were right in full",
    "n": "instances",
    "low": "lower end of the exact binomial 95 % interval of the share",
    "high": "upper end",
    "counts": f"whether the full cache answers {COUNTS} of 30 or more, so that the cell says something",
}


def _quality(folder, tokens=LENGTH):
    """What was measured of texts of one length."""
    table = pd.read_csv(folder / "pretrained_quality.csv")
    return table[table.tokens == tokens]


def losses(folder=BENCHMARKS, tokens=LENGTH):
    """Loss of each method at each size, on texts of so many tokens: a DataFrame with the columns `LOSSES`, and `budget`."""
    table = _quality(folder, tokens)
    near = table[table.name == "near"].groupby("text").nll.mean()
    rows = []
    for (text, name, share), part in table[table.name != "near"].groupby(
        ["text", "name", "share"], dropna=False, sort=False
    ):
        loss = part.nll - part.nll_full
        mean, low, high = (100 * np.expm1(x) for x in paired_interval(loss.to_numpy(copy=True)))
        rows.append(
            {
                "text": text,
                "method": LABELS[name],
                "share": part.bytes_total.mean() / part.bytes_full.mean(),
                "max_cache_size": int(part.max_cache_size.iloc[0]),
                "percent": mean,
                "low": low,
                "high": high,
                "gain_kept": 1 - loss.mean() / (near.get(text, np.nan) - part.nll_full.mean()),
                "kl": part.kl.mean(),
                "top1": part.top1.mean(),
                "n": len(part),
                "budget": share,
            }
        )
    return pd.DataFrame(rows).sort_values(["text", "budget", "percent"], ignore_index=True)


def answers(folder=BENCHMARKS):
    """Right answers by task, method and depth: a DataFrame with the columns `ANSWERS`."""
    table = pd.read_csv(folder / "pretrained_recall.csv")
    table = table[table.tokens == LENGTH]
    full = table[table.name == "full"].groupby(["task", "depth"]).exact.sum()
    rows = []
    for (task, name, depth), part in table.groupby(["task", "name", "depth"], sort=False):
        right, n = int(part.exact.sum()), len(part)
        bounds = binomtest(right, n).proportion_ci()
        counts = bool(full[task, depth] >= COUNTS)
        rows.append((task, LABELS[name], depth, right, n, bounds.low, bounds.high, counts))
    return pd.DataFrame(rows, columns=list(ANSWERS))


def swept(folder=BENCHMARKS):
    """Loss of the sweep's configurations that were measured, the least first: a DataFrame (`SWEPT`)."""
    table = pd.read_csv(folder / "pretrained_sweep.csv").drop(columns="max_cache_size")
    shapes = pd.DataFrame(sweep.configurations())[list(sweep.COLUMNS)]
    table = table.assign(loss=table.nll - table.nll_full).merge(
        shapes, left_on="name", right_on="configuration"
    )
    found = intervals(table, list(sweep.COLUMNS), "loss").sort_values("mean", ignore_index=True)
    return found.merge(table.groupby("configuration", as_index=False).bytes_total.first())


SWEPT = {name: words for name, words in sweep.SUMMARY.items() if name != "bytes_sketch"}


def attended(folder=BENCHMARKS):
    """Who holds how much of the attention: a DataFrame (`ATTENDED`)."""
    table = pd.read_csv(folder / "pretrained_attention.csv")
    rows = []
    for (chosen, of), part in table.groupby(["chosen", "of"], sort=False):
        ends = paired_interval(part.mass.to_numpy(copy=True))
        rows.append((chosen, of, *ends, part.bound.mean(), part.loss.mean(), len(part)))
    return pd.DataFrame(rows, columns=list(ATTENDED))


ATTENDED = {
    "chosen": ATTENTION["chosen"],
    "of": ATTENTION["of"],
    "mass": ATTENTION["mass"] + "; mean over documents",
    "low": "lower end of its 95 % interval, documents resampled",
    "high": "upper end",
    "bound": ATTENTION["bound"],
    "loss": ATTENTION["loss"],
    "n": "documents",
}


def compared(text, one, other, folder=BENCHMARKS, share=AT):
    """How much more perplexity `one` has than `other` at the same bytes on the same documents, in percent: (mean, low, high)."""
    table = _quality(folder)
    table = table[(table.text == text) & (table.share == share)].set_index("document")
    nll = [table.nll[table.name == name] for name in (one, other)]
    return tuple(100 * np.expm1(paired_interval((nll[0] - nll[1]).to_numpy(copy=True))))


def facts(losses):
    """What the report says beside the tables, {name: number}: paired differences at an eighth of the bytes."""
    found: dict = {"pretrained_documents": int(losses.n.min())}
    found |= {
        "pretrained_tokens": LENGTH,
        "pretrained_longer_tokens": LONG,
        "pretrained_second_tokens": LENGTH,
    }
    measured = set(_quality(BENCHMARKS).query("share == @AT").name)
    for one, other in PAIRS:
        if {one, other} <= measured:
            for text in losses.text.unique():
                ends = zip(("mean", "low", "high"), compared(text, one, other))
                found |= {f"pretrained_{text}_{one}_over_{other}_{end}": value for end, value in ends}
    return found


def hero(losses, front):
    """Loss against bytes: prose and code of the pretrained model, and the embedded model; all methods grey, some named.

    front: the table `baseline_front`. Returns (figure, caption).
    """
    embedded = pd.DataFrame(
        {
            "text": "embedded",
            "method": front.method.map(LABELS),
            "share": front["share"],
            "percent": 100 * np.expm1(front.loss),
        }
    )
    fig, axes = plt.subplots(1, 3, sharey=True)
    for axis, (title, rows) in zip(
        axes, ((t, d[d.text == t]) for d, t in ((losses, "prose"), (losses, "code"), (embedded, "embedded")))
    ):
        _crowd(axis, rows)
        axis.set_title(title if title == "embedded" else f"SmolLM2, {title}")
        axis.set(xscale="log", yscale="log", xlim=(0.011, 1.3), ylim=(0.09, 200))
        axis.set_xticks([1 / 16, 1 / 4], ["1/16", "1/4"])
        axis.set_yticks([0.1, 1, 10, 100], ["≤ 0.1", "1", "10", "100"])
        axis.minorticks_off()
    axes[0].set_ylabel("perplexity above the full cache, %")
    axes[1].set_xlabel("bytes held, share of the full cache's")
    at = losses[losses.budget == AT].set_index(["text", "method"])
    prose, code = (at.percent[text].idxmin() for text in ("prose", "code"))
    words = (
        f"{prose} loses least on prose and on code"
        if prose == code
        else f"{prose} loses least on prose, {code} on code"
    )
    return fig, (
        f"At an eighth of the bytes, {words}. Down and to the left is better. exact: exact scores of past attention; sketch: a "
        "Count-Min Sketch of them; grey: all others. SmolLM2-135M-Instruct with Q4_1 weights, "
        f"n = {int(at.n.min())} documents of {LENGTH:,} tokens each of prose and of code; "
        "right: the embedded model of 13 million parameters on 16 documents of 1,024 tokens of Python. "
        "Values below 0.1 % are drawn at 0.1 %."
    )


def _crowd(axis, rows):
    for method, part in rows.groupby("method", sort=False):
        part = part.sort_values("share")
        label, above = NAMED.get(method, ("", 0))
        color = COLOURS[method] if label else "#c4c4c4"
        percent = part.percent.clip(lower=0.1)
        axis.plot(part["share"], percent, marker="o", color=color, markersize=5, zorder=3 if label else 1)
        if label:
            last = label in ("sketch", "compact")  # where there is room
            end, shift, side = (-1, 7, "left") if last else (0, -7, "right")
            write(axis, label, (part["share"].iloc[end], percent.iloc[end]), (shift, above), color, side)


def at_equal_bytes(losses):
    """Loss of every method at an eighth of the bytes, with intervals, on prose and on code. Returns (figure, caption)."""
    at = losses[losses.budget == AT]
    order = at[at.text == "code"].sort_values("percent", ascending=False).method.tolist()
    fig, axes = plt.subplots(1, 2, sharey=True)
    for axis, text in zip(axes, ("prose", "code")):
        rows = at[at.text == text].set_index("method").reindex(order)
        rows = rows[["percent", "low", "high"]].clip(lower=0.1)
        for place, (method, row) in enumerate(rows.iterrows()):
            color = COLOURS[method] if method in NAMED else GREY
            axis.errorbar(
                row.percent,
                place,
                xerr=[[row.percent - row.low], [row.high - row.percent]],
                fmt="o",
                color=color,
                capsize=2,
            )
        axis.set(title=text, xscale="log", xlim=(0.08, 90))
        axis.set_xticks([0.1, 1, 10], ["≤ 0.1", "1", "10"])
        axis.minorticks_off()
    axes[0].set_yticks(range(len(order)), order)
    fig.supxlabel("perplexity above the full cache, %", fontsize=plt.rcParams["axes.labelsize"])
    code = at[at.text == "code"].set_index("method")
    ahead = "far less than" if code.high["recall"] < code.low["exact scores"] / 2 else "about as much as"
    return fig, (
        f"On code an index of the keys loses {ahead} exact scores of past attention do. Every method holds an eighth of the "
        "bytes of the full cache, all it needs included; recall keeps what it brings back in host memory, which is not counted. "
        "int4: in 4 bits, so with more tokens; plain sums: exact scores without decay. "
        f"SmolLM2-135M-Instruct, n = {int(at.n.min())} documents of each kind, 95 % intervals over documents."
    )


def found_again(answers):
    """Right answers by where the fact stood, of the cells that count: a panel for each task, a line for each cache but an
    ablation of recall, which would lie on it. Returns (figure, caption)."""
    counted = answers[answers.counts & (answers.method != LABELS["recall_alone"])]
    asked = [task for task in ASKED if task in set(counted.task)]
    fig, axes = plt.subplots(1, len(asked), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], asked):
        ends = {}
        for method, rows in counted[counted.task == task].groupby("method", sort=False):
            rows = rows.sort_values("depth")
            share, color = 100 * rows.right / rows.n, COLOURS.get(method, GREY)
            error = [share - 100 * rows.low, 100 * rows.high - share]
            axis.errorbar(rows.depth, share, error, marker="o", color=color, elinewidth=1, linewidth=1.5)
            ends[method] = rows.depth.iloc[-1] + 0.01, share.iloc[-1], color
        axis.set(title=ASKED[task], xticks=sorted(answers.depth.unique()), xlim=(0.03, 0.97))
        axis.set(ylim=(-4, 104), yticks=range(0, 101, 20))
    label_ends(axes[0, -1], ends)
    axes[0, 0].set_ylabel("right answers, %")
    fig.supxlabel("where the fact stood: 0 start, 1 end", fontsize=plt.rcParams["axes.labelsize"])
    needle = counted[counted.task == "needle"].groupby("method")[["right", "n"]].sum()
    right, n = needle.right, needle.n["full cache"]
    best = "recall" if "recall" in right else "full cache"
    finding = f"Asked for a number in the text, {best} is right {right[best]} times of {n}, compact {right['compact']}"
    return fig, (
        f"{finding}. A fact stands once in a text of {LENGTH:,} tokens and is asked for at its end: a number, or one of four keys. "
        "Every cache holds an eighth of the bytes, KIVI a fifth. Depths at which the full cache answers fewer than "
        f"{COUNTS} of 30 are left out. SmolLM2-135M-Instruct, n = {int(counted.n.min())} questions a depth and task, exact "
        "binomial 95 % intervals."
    )
