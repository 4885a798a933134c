"""How the benchmarks measure: samples taken in turn, medians with their spread.

A ratio is the median of ratios of neighbouring samples of one run, so that what slows the machine for a while slows both
sides of it. Warm-up is discarded, and a device is waited for at both ends of a sample.
"""

import contextlib
import math
import signal
import time

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

COLUMNS = {
    "row": "what was measured",
    "unit": "its unit; 1: a ratio",
    "median": "median of the repetitions (of a slope: the mean)",
    "low": "their 10th percentile (of a slope: the lower end of its 95 % interval)",
    "high": "their 90th percentile (of a slope: the upper end)",
    "n": "repetitions",
    "settings": "hash of all settings of model and caches",
}
TIMINGS = ("median", "low", "high", "n")


class Table:
    """Rows of the long table (`COLUMNS`); `samples` {row: array} are kept for ratios. until: the moment (`time.monotonic`)
    from which on no further repetition begins, so that what was measured can be told."""

    def __init__(self, quiet=False, until=math.inf):
        self.rows, self.samples, self.quiet, self.until, self.settings = [], {}, quiet, until, ""

    def add(self, row, unit, samples):
        """Adds a row of its repetitions and returns their median."""
        samples = np.asarray(samples, dtype=float)
        self.samples[row] = samples
        low, median, high = np.percentile(samples, [10, 50, 90])
        return self._told(row, unit, median, low, high, len(samples))

    def _told(self, row, unit, median, low, high, n):
        self.rows.append([row, unit, median, low, high, n, self.settings])
        if not self.quiet:
            print(f"{row:70} {median:10.4g} [{low:.4g}, {high:.4g}] {unit} (n={n})", flush=True)
        return float(median)

    def ratio(self, top, bottom):
        """Adds the ratios of two rows' samples, in their order; nothing where one is missing."""
        if top in self.samples and bottom in self.samples:
            count = min(len(self.samples[top]), len(self.samples[bottom]))
            return self.add(
                f"{top} / {bottom}", "1", self.samples[top][:count] / self.samples[bottom][:count]
            )

    def slope(self, row, sizes, rows):
        """Adds how much the time of `rows`, measured in turn, grows with each doubling of `sizes`, relative to their mean; the
        interval is Student's, over repetitions."""
        times = np.stack([self.samples[each] for each in rows], 1)
        x = np.log2(sizes) - np.mean(np.log2(sizes))
        slopes = (times / times.mean(1, keepdims=True)) @ x / (x @ x)
        half = student.ppf(0.975, len(slopes) - 1) * slopes.std(ddof=1) / len(slopes) ** 0.5
        mean = slopes.mean()
        return self._told(row, "1", mean, mean - half, mean + half, len(slopes))

    def frame(self):
        return pd.DataFrame(self.rows, columns=list(COLUMNS))


def elapsed(run):
    """Milliseconds of `run()` on the current device, synchronised at both ends."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def in_turn(table, candidates, per=1, repetitions=20, warmup=2, seconds=math.inf):
    """Times the functions of `candidates` {row: run} alternately, at most for `seconds`; `per`: steps that one run holds."""
    samples: dict[str, list] = {row: [] for row in candidates}
    end = min(time.monotonic() + seconds, table.until)
    try:
        for repetition in range(warmup + repetitions):
            if repetition > warmup + 1 and time.monotonic() > end:
                break
            for row, run in candidates.items():
                took = elapsed(run) / per
                if repetition >= warmup:
                    samples[row].append(took)
    finally:  # what was measured can be told, whatever ended it
        for row, values in samples.items():
            if values:
                table.add(row, "ms", values)


@contextlib.contextmanager
def limited(seconds):
    """Raises TimeoutError in the block once it has taken `seconds`; for the main thread of a system with alarms."""

    def stop(*_):
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def copy_bandwidth(device, nbytes, repetitions=10):
    """Bytes per second, read and written together, of copying a tensor far larger than the caches."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source)) for _ in range(repetitions + 3)][3:]
    return 2 * source.nbytes / np.median(times) * 1e3
