"""How the benchmarks measure: samples taken in turn, medians with their spread, and the floor of the hardware.

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

COLUMNS = {
    "row": "what was measured",
    "quantity": "which quantity",
    "unit": "its unit",
    "median": "median of the repetitions",
    "low": "their 10th percentile",
    "high": "their 90th percentile",
    "n": "repetitions",
}
TIMINGS = ("median", "low", "high", "n")


class Table:
    """Rows of the long table (`COLUMNS`); `samples` {row: array} are kept for ratios."""

    def __init__(self, quiet=False):
        self.rows, self.samples, self.quiet = [], {}, quiet

    def add(self, row, quantity, unit, samples):
        """Adds a row of its repetitions and returns their median."""
        samples = np.asarray(samples, dtype=float)
        self.samples[row] = samples
        low, median, high = np.percentile(samples, [10, 50, 90])
        self.rows.append([row, quantity, unit, median, low, high, len(samples)])
        if not self.quiet:
            print(f"{row:70} {median:10.4g} [{low:.4g}, {high:.4g}] {unit} (n={len(samples)})", flush=True)
        return float(median)

    def ratio(self, row, top, bottom):
        """Adds the ratios of two rows' samples, in their order; nothing where one is missing."""
        if top in self.samples and bottom in self.samples:
            count = min(len(self.samples[top]), len(self.samples[bottom]))
            return self.add(row, "ratio", "1", self.samples[top][:count] / self.samples[bottom][:count])

    def floor(self, row, microseconds, measured):
        """Adds what the hardware needs at least, and how often `measured`, a row of times, takes as long."""
        self.add(
            f"floor, {row}", "bytes over copy bandwidth, or operations over matmul rate", "us", [microseconds]
        )
        self.add(f"{row} / floor", "ratio to floor", "1", self.samples[measured] / microseconds)

    def frame(self):
        return pd.DataFrame(self.rows, columns=list(COLUMNS))


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed(run):
    """Microseconds of `run()` on the current device, synchronised at both ends."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6


def in_turn(
    table, candidates, per=1, repetitions=30, warmup=3, quantity="time per step, called", seconds=math.inf
):
    """Times the functions of `candidates` {row: run} alternately, at most for `seconds`; `per`: steps that one run holds."""
    samples: dict[str, list] = {row: [] for row in candidates}
    begin = time.monotonic()
    for repetition in range(warmup + repetitions):
        if repetition > warmup and time.monotonic() - begin > seconds:
            break
        for row, run in candidates.items():
            took = elapsed(run) / per
            if repetition >= warmup:
                samples[row].append(took)
    for row, values in samples.items():
        table.add(row, quantity, "us", values)


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


def copy_bandwidth(table, device="cuda", nbytes=2**31, repetitions=20):
    """Bytes per second, read and written together, of copying a tensor far larger than the caches."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source)) for _ in range(repetitions + 5)][5:]
    rates = [2 * source.nbytes / t * 1e-6 for t in times]
    return table.add("copy bandwidth", "bytes read and written per second", "TB/s", rates) * 1e12


def matmul_rate(table, device="cuda", dtype=torch.bfloat16, size=8192, repetitions=20):
    """Operations per second (a multiplication and an addition are two) of a large square matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    times = [elapsed(lambda: a @ b) for _ in range(repetitions + 3)][3:]
    rates = [2 * size**3 / t * 1e-6 for t in times]
    return table.add("matmul rate", "operations per second", "TFLOP/s", rates) * 1e12
