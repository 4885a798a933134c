"""What speed was aimed at, as one list, and what was measured of it."""

import re

import pandas as pd

# What is compared; the device; the row of a benchmark that says it (a pattern); at most, at least or an interval that covers;
# the figure aimed at; where there is one, the row that says how far from the floor of the hardware it is.
AIMS = [
    *(
        (
            f"step of SketchCache{compiled} / {other}, {model}, batch {batch}",
            "cpu",
            rf"{model}, batch {batch}, \d+ seen, SketchCache{compiled} / {other}",
            "at most",
            limit,
            rf"{model}, batch {batch}, \d+ seen, SketchCache{compiled} / floor",
        )
        for compiled in ("", ", compiled")
        for model, batch, full in (
            ("embedded", 1, 1.0),
            ("embedded", 8, 1.0),
            ("GPT-2 small", 1, 1.0),
            ("GPT-2 small", 8, 1.0),
            ("rotary", 1, 0.6),
        )
        for other, limit in (("DynamicCache", full), (f"window{compiled}", 1.1), (f"H2O{compiled}", 1.05))
    ),
    (
        "manual loop with SketchCache / generate with DynamicCache",
        "cpu",
        r".*, manual loop / generate",
        "at most",
        0.8,
        None,
    ),
    (
        "manual loop with SketchCache, compiled / generate with DynamicCache",
        "cpu",
        r".*, manual loop, compiled / generate",
        "at most",
        0.8,
        None,
    ),
    (
        "time of a token per doubling of the text",
        "cpu",
        r".*, slope of time per doubling",
        "covers",
        0.0,
        None,
    ),
    ("peak bytes, longest / shortest text", "cpu", r".*, peak bytes at .*", "at most", 1.0, None),
    ("prompt in chunks / plain", "cpu", r".*, chunks / plain", "at most", 1.3, None),
    ("slots held / cap + chunk", "cpu", r".*, slots held at most / cap \+ chunk", "at most", 1.0, None),
    ("token by token / streaming score", "cpu", r".*, token by token / score", "at least", 10.0, None),
    (
        "counting, pure Python / ours",
        "cpu",
        r"\d+ items, pure Python / CountMinSketch",
        "at least",
        20.0,
        None,
    ),
    (
        "counting, bounter / ours of the same error",
        "cpu",
        r"\d+ items, bounter / CountMinSketch.*",
        "at least",
        5.0,
        None,
    ),
    (
        "counting, datasketches / ours of the same error",
        "cpu",
        r"\d+ items, datasketches / CountMinSketch.*",
        "at least",
        5.0,
        None,
    ),
    (
        "generate with DynamicCache / recorded steps, batch 1",
        "gpu",
        r"decoding, generate, DynamicCache / recorded, sketch, batch 1, .*",
        "at least",
        10.0,
        None,
    ),
    (
        "generate with DynamicCache / recorded and compiled steps, batch 1",
        "gpu",
        r"decoding, generate, DynamicCache / recorded and compiled, sketch, batch 1, .*",
        "at least",
        10.0,
        None,
    ),
    (
        "compiled StaticCache / recorded steps, batch 1",
        "gpu",
        r"decoding, StaticCache, compiled / recorded again, sketch, batch 1, .*",
        "at least",
        1.0,
        None,
    ),
    (
        "compiled StaticCache / recorded and compiled steps, batch 1",
        "gpu",
        r"decoding, StaticCache, compiled / recorded and compiled again, sketch, batch 1, .*",
        "at least",
        1.0,
        None,
    ),
    (
        "fused attention / floor, batch 64",
        "gpu",
        r"fused, batch 64, 1024 slots(, default)? / floor",
        "at most",
        1.3,
        None,
    ),
    (
        "eager attention / fused, batch 64",
        "gpu",
        r"eager / fused, batch 64, 1024 slots",
        "at least",
        5.0,
        None,
    ),
    (
        "SDPA over 16k tokens / fused over 1024 slots, batch 64",
        "gpu",
        r"SDPA over 16384 tokens / fused over 1024 slots.*",
        "at least",
        8.0,
        None,
    ),
    (
        "recorded layer, sketch / window, batch 64",
        "gpu",
        r"recorded layer, sketch / window, batch 64",
        "at most",
        1.1,
        None,
    ),
]
COLUMNS = {
    "quantity": "what is compared: times unless it says otherwise",
    "device": "where it was measured",
    "sense": "whether at most or at least the target is aimed at, or an interval that covers it",
    "target": "the figure aimed at",
    "median": "median of the ratios of samples taken in turn (of a slope, the mean)",
    "low": "their 10th percentile (of a slope, the lower end of its 95 % interval)",
    "high": "their 90th percentile (of a slope, the upper end)",
    "n": "repetitions",
    "floor": "how often the time that the hardware needs at least it takes, where that was measured",
    "verdict": "met, missed, or not measured here",
}
TIMINGS = ("device", "median", "low", "high", "n", "floor", "verdict")


def _find(frame, pattern):
    return frame[frame.row.map(lambda row: bool(pattern) and re.fullmatch(pattern, row) is not None)]


def verdicts(frames):
    """One row (`COLUMNS`) per aim and device. frames: {"cpu...": rows, GPU's name: rows, ...}
    (`timing.Table.frame`)."""
    found = []
    for quantity, kind, pattern, sense, target, floor in AIMS:
        measured = [
            (name, _find(frame, pattern), _find(frame, floor))
            for name, frame in frames.items()
            if name.startswith("cpu") == (kind == "cpu")
        ]
        measured = [(name, rows.iloc[0], floors) for name, rows, floors in measured if len(rows)]
        for name, row, floors in measured:
            met = {
                "at most": row["median"] <= target,
                "at least": row["median"] >= target,
                "covers": row["low"] <= target <= row["high"],
            }[sense]
            found.append(
                [
                    quantity,
                    name,
                    sense,
                    target,
                    row["median"],
                    row["low"],
                    row["high"],
                    int(row["n"]),
                    floors["median"].iloc[0] if len(floors) else None,
                    "met" if met else "missed",
                ]
            )
        if not measured:
            found.append([quantity, kind, sense, target, None, None, None, None, None, "not measured here"])
    return pd.DataFrame(found, columns=list(COLUMNS))
