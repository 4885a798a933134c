"""What the sketch alone costs, beside pure Python and the peers installed."""

import importlib
import math
from collections import Counter

import numpy as np
import torch

from sketchkv.sketch import PRIME, CarterWegmanHash, CountMinSketch
from sketchkv.study.timing import in_turn


def python_count_min(items, hash):
    """Count-Min by the book: update with every item, then the estimate of each. Returns the estimates (list)."""
    rows = list(zip(hash.a.tolist(), hash.b.tolist()))
    table = [[0] * hash.width for _ in rows]
    for item in items:
        for row, (a, b) in zip(table, rows):
            row[(a * item + b) % PRIME % hash.width] += 1
    return [
        min(row[(a * item + b) % PRIME % hash.width] for row, (a, b) in zip(table, rows)) for item in items
    ]


def _bounter(items, width, depth):
    sketch, names = (
        importlib.import_module("bounter").CountMinSketch(width=width, depth=depth),
        list(map(str, items)),
    )

    def run():
        sketch.update(names)
        return [sketch[name] for name in names]

    return run


def _datasketches(items, width, depth):
    kind = importlib.import_module("datasketches").count_min_sketch

    def run():
        sketch = kind(depth, width)
        update, estimate = sketch.update, sketch.get_estimate
        for item in items:
            update(item, 1)
        return [estimate(item) for item in items]

    return run


# bounter (C) is the fastest of those tried (cmsketch and madoka are slower than either), but must be compiled where it is
# installed: it is measured where it is there; datasketches (C++) comes as a wheel and is among the pins.
PEERS = {"bounter": _bounter, "datasketches": _datasketches}


def counting_rows(
    table, count=1_000_000, width=2048, depth=4, repetitions=20, reference=3, warmup=1, seconds=60
):
    """Update with a skewed stream, then an estimate of each of its items: ours, pure Python, and the peers installed.

    The pure-Python reference is timed `reference` times. Errors of all on the same stream stand beside, in items. Where a peer
    errs less (bounter updates conservatively), ours is given the width that makes it err no more."""
    items = np.random.default_rng(0).zipf(1.2, count) % 50_000
    stream, plain = torch.from_numpy(items), items.tolist()
    counts = Counter(plain)
    true = np.array([counts[item] for item in plain])
    name = f"{count} items"

    def ours(width):
        sketch = CountMinSketch(width, depth)

        def run():
            sketch.reset()
            sketch.update(stream)
            return sketch.query(stream)

        return f"{name}, CountMinSketch {width} x {depth}", run

    def error(run):
        return float(np.mean(np.asarray(run(), dtype=float) - true))

    def wide_enough(most):
        """The narrowest of ours that errs by at most `most` items on average, or the widest: its row and function."""
        for size in (width << i for i in range(8)):
            row, run = ours(size)
            errors[row] = errors.get(row) or error(run)
            if errors[row] <= most:
                break
        return row, run

    errors, pairs = {}, {}
    first, run = wide_enough(math.inf)
    runs = {first: run}
    for peer, make in PEERS.items():
        try:
            run = make(plain, width, depth)
        except ImportError:
            continue
        row = f"{name}, {peer}"
        runs[row], errors[row] = run, error(run)
        pairs[row], own = wide_enough(errors[row])
        runs.setdefault(pairs[row], own)
    slow = {
        f"{name}, pure Python": lambda: python_count_min(plain, CarterWegmanHash(width, depth)),
        f"{first}, beside it": runs[first],
    }
    settings = dict(quantity="time of update and query", seconds=seconds)
    in_turn(table, runs, repetitions=repetitions, warmup=warmup, **settings)
    in_turn(table, slow, repetitions=reference, warmup=0, **settings)
    table.ratio(f"{name}, pure Python / CountMinSketch", *slow)
    for row, own in pairs.items():
        table.ratio(f"{row} / CountMinSketch that errs no more", row, own)
    for row in runs:
        table.add(f"{row}, mean error", "error", "items", [errors[row]])
