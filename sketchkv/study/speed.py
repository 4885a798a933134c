"""What `13_speed` tells: the questions that a user would ask, with verdicts, and a step's time against the context."""

import numpy as np
import pandas as pd

from sketchkv.study import figures, sources, timing
from sketchkv.study.bench import FOLDER
from sketchkv.study.pictures import label_ends

_FULL = "DynamicCache"
# What a user would ask: the row of a benchmark that answers it, and at most how much; no goal: the interval covers 0.
GOALS = sources.ROOT / "data" / "speed_goals.csv"
COLUMNS = {
    "question": "what is compared: times, less is better",
    "device": "where it was measured",
    "goal": "at most; empty: the interval covers 0",
    "median": timing.COLUMNS["median"],
    "low": timing.COLUMNS["low"],
    "high": timing.COLUMNS["high"],
    "n": timing.COLUMNS["n"],
    "verdict": "met, missed, or not measured here",
    "settings": timing.COLUMNS["settings"],
}
STEP_COLUMNS = {
    "device": "where it was measured",
    "cache": "which cache",
    "context": "tokens seen",
    **{name: timing.COLUMNS[name] for name in timing.TIMINGS},
    "kind": "measured, or predicted: weights and cache read once at the bandwidth of a copy",
}
LABELS = {_FULL: "full cache", "sketch": "sketch", "compact": "compact", "recall": "recall"}
STYLES = {_FULL: "full", "sketch": "sketch", "compact": "compact", "recall": "recall"}


def committed(run, folder=FOLDER):
    """What `make bench` measured: {device: rows}, the card's name or "CPU, make bench"; each file is registered with the run."""
    found = {}
    for path in sorted(folder.glob("speed_*.csv")):
        facts = sources.read_json(run.read(path.with_suffix(".json")))
        found[facts.get("gpu", f"CPU, {facts['threads']} threads, make bench")] = pd.read_csv(run.read(path))
    return found


def verdicts(frames):
    """One row (`COLUMNS`) per question: of the first device of its kind that has the row."""
    rows: list = []
    for question, kind, name, goal in pd.read_csv(GOALS).itertuples(index=False):
        for device, frame in frames.items():
            found = frame[frame.row == name]
            if len(found) and device.startswith("CPU") == (kind == "cpu"):
                row = found.iloc[0]
                met = row.low <= 0 <= row.high if np.isnan(goal) else row["median"] <= goal
                verdict = "met" if met else "missed"
                break
        else:
            device, row, verdict = kind, {"settings": ""}, "not measured here"
        rows.append({**row, "question": question, "device": device, "goal": goal, "verdict": verdict})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def steps(frames):
    """Times of steps against the context, from groups of rows "CACHE, N seen": a DataFrame (`STEP_COLUMNS`)."""
    parts = []
    for device, frame in frames.items():
        if "group" in frame:
            frame = frame[frame.group.isin(["cpu_steps", "gpu_steps"])]
        at = frame.row.str.extract(r"^(?P<predicted>predicted, )?(?P<cache>\w+), (?P<context>\d+) seen$")
        part = pd.concat([at, frame[list(timing.TIMINGS)]], axis=1).dropna(subset="cache")
        kind = part.predicted.map(lambda said: "predicted" if isinstance(said, str) else "measured")
        parts.append(part.assign(device=device, kind=kind, context=part.context.astype(int)))
    return pd.concat(parts, ignore_index=True)[list(STEP_COLUMNS)]


def picture(axis, rows):
    """Milliseconds per token against the context on one device; predictions dashed."""
    ends, top = {}, 1.05 * rows.high.max()
    for (cache, kind), part in rows.groupby(["cache", "kind"], sort=False):
        style = figures.method_style(STYLES[cache])
        if kind == "predicted":
            axis.plot(part.context, part["median"], color=style["color"], linewidth=1, linestyle="--")
            # Below the line, unless the axis lies there; two lines that low would share a place but for their other ends.
            low, full = part["median"].max() < 0.08 * top, cache == _FULL
            end = part.iloc[-1 if low and full else 0]
            axis.annotate(
                f"predicted, {LABELS[cache]}",
                (end.context, end["median"]),
                (0, 4 if low or full else -9),
                textcoords="offset points",
                color=style["color"],
                fontsize=11.5,
                ha="right" if low and full else "left",
            )
            continue
        axis.errorbar(
            part.context,
            part["median"],
            yerr=[part["median"] - part.low, part.high - part["median"]],
            **style,
        )
        ends[LABELS[cache]] = part.context.iloc[-1], part["median"].iloc[-1], style["color"]
    contexts = sorted(rows.context.unique())
    axis.set(
        xscale="log",
        xlabel="tokens seen",
        ylim=(0, top),
        xlim=(0.9 * contexts[0], 1.7 * contexts[-1]),
    )
    axis.set_xticks(contexts, [str(each) for each in contexts])
    axis.minorticks_off()
    label_ends(axis, ends)


def caption(found, cap):
    """What the picture of `steps` says: of the first device, at its longest text."""
    cards = [device for device in found.device.unique() if not device.startswith("CPU")]
    recorded = " On a GPU steps of bounded caches are recorded, as `model.generate` does." if cards else ""
    first = found[(found.device == found.device.iloc[0]) & (found.kind == "measured")]
    last = first[first.context == first.context.max()].set_index("cache")["median"]
    ratio = {name: last[name] / last[_FULL] for name in ("sketch", "compact", "recall")}
    finding = f"After {first.context.max()} tokens a step with compact takes {ratio['compact']:.2f} times the full cache's"
    return (
        f"{finding}. With the sketch {ratio['sketch']:.2f}, with recall {ratio['recall']:.2f} times. Milliseconds per token, "
        f"cap {cap}, one sequence, a model of random weights. Dashed: predicted, not measured; the least time that reading "
        f"weights and the full cache (grey) or compact takes at the bandwidth of a copy. Bars: 10th to 90th percentile of "
        f"{int(first.n.min())} cycles or more.{recorded} Measured on: {', '.join(found.device.unique())}."
    )
