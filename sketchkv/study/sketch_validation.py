"""What `01_sketch_validation` measures on the Count-Min Sketch: error, top-k, hash uniformity, memory, update rate.

Each function returns a long table, one row per measurement; the seed, of stream and hash functions, is the unit of
repetition. A sketch is linear, so a stream is added as its ids with their counts: the same table, much sooner.
"""

import math
import sys
import time

import numpy as np
import pandas as pd
import torch
from scipy import stats

from sketchkv.sketch import PRIME, CarterWegmanHash, CountMinSketch

STREAMS = ("zipf", "uniform", "worst case")


class ReferenceCountMin:
    """A Count-Min Sketch in plain Python, with the hash functions of `sketch`: the oracle, and the slow way."""

    def __init__(self, sketch):
        self.functions = list(zip(sketch.hash.a.tolist(), sketch.hash.b.tolist()))
        self.width = sketch.hash.width
        self.rows = [[0] * self.width for _ in self.functions]

    def update(self, items, weights):
        for item, weight in zip(items, weights):
            for (a, b), row in zip(self.functions, self.rows):
                row[(a * item + b) % PRIME % self.width] += weight

    def query(self, items):
        return [
            min(row[(a * item + b) % PRIME % self.width] for (a, b), row in zip(self.functions, self.rows))
            for item in items
        ]


def draw_counts(kind, length, vocabulary, seed, exponent=1.0):
    """How often each id of [0, vocabulary) occurs in a stream of `length`, int64 `[vocabulary]`.

    "zipf": the id of rank r has probability ~ r^-exponent, and which id has which rank is drawn; "uniform": all alike.
    """
    generator = np.random.default_rng([seed, STREAMS.index(kind)])
    weight = np.arange(1, vocabulary + 1, dtype=np.float64) ** (-exponent if kind == "zipf" else 0)
    return generator.permutation(generator.multinomial(length, weight / weight.sum()))


def draw_stream(kind, length, vocabulary, seed, width):
    """`(ids, weights)` of a stream of total weight `length`; ids of weight 0 are ids that never came.

    "worst case" comes near the bound: floor(width / e) ids share all the weight, so that one collision in every row
    takes an id that never came beyond e / width of the total.
    """
    if kind != "worst case":
        return np.arange(vocabulary), draw_counts(kind, length, vocabulary, seed).astype(np.float64)
    heavy = max(1, int(width / math.e))
    generator = np.random.default_rng([seed, STREAMS.index(kind)])
    ids = np.unique(generator.integers(0, PRIME, 2 * (heavy + vocabulary)))
    ids = generator.permutation(ids)[: heavy + vocabulary]
    return ids, np.repeat([length / heavy, 0.0], [heavy, vocabulary])


def error_points(streams, widths, depths, seeds, length, vocabulary, device="cpu"):
    """Over-estimates, as shares of the total weight, of all ids of each stream.

    Columns: stream, width, depth, seed, bound (e / width), mean, p95 (over ids), misses (share of the ids beyond the
    bound), shortfall (the most that an estimate lies below the truth: 0 if the guarantee holds).
    """
    rows = []
    for kind in streams:
        for seed in seeds:
            for width in widths:
                ids, weights = draw_stream(kind, length, vocabulary, seed, width)
                items, truth = torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device)
                asked = truth == 0 if kind == "worst case" else slice(None)
                for depth in depths:
                    sketch = CountMinSketch(width, depth, seed=seed, dtype=torch.float64, device=device)
                    sketch.update(items, truth)
                    error = ((sketch.query(items) - truth) / length)[asked].cpu().numpy()
                    rows.append(
                        {
                            "stream": kind,
                            "width": width,
                            "depth": depth,
                            "seed": seed,
                            "bound": math.e / width,
                            "mean": error.mean(),
                            "p95": np.quantile(error, 0.95),
                            "misses": (error > math.e / width).mean(),
                            "shortfall": max(0.0, -error.min()),
                        }
                    )
    return pd.DataFrame(rows)


def topk_points(exponents, shapes, seeds, length, vocabulary, k, device="cpu"):
    """Share of the true top k among the k ids with the largest estimates, all ids of the vocabulary being candidates.

    `exponents` are Zipf's; 0 is a uniform stream. An id as frequent as the k-th counts as one of the top k. Columns:
    exponent, width, depth, bytes (of the sketch), seed, recall.
    """
    rows = []
    candidates = torch.arange(vocabulary, device=device)
    for exponent in exponents:
        for seed in seeds:
            counts = draw_counts("zipf", length, vocabulary, seed, exponent)
            truth = torch.from_numpy(counts).to(device)
            threshold = np.sort(counts)[-k]
            for width, depth in shapes:
                sketch = CountMinSketch(width, depth, seed=seed, device=device)
                sketch.update(candidates, truth)
                found = sketch.topk(candidates, k)[1].cpu().numpy()
                recall = (counts[found] >= threshold).mean()
                rows.append(
                    {
                        "exponent": exponent,
                        "width": width,
                        "depth": depth,
                        "bytes": sketch.nbytes,
                        "seed": seed,
                        "recall": recall,
                    }
                )
    return pd.DataFrame(rows)


def hash_points(widths, draws, seed, ids_per_stream=4096, device="cpu"):
    """How evenly a hash function spreads random ids and consecutive ids (token ids, positions), for many draws of a, b.

    Columns: ids, width, draw, spread (chi-square over its degrees of freedom: 1 is what throwing dice gives), p_value
    (of chi-square), collisions (share of the pairs of ids that share a counter, times width: 1 is what the bound
    allows on average over draws).
    """
    generator = np.random.default_rng(seed)
    ids = {
        "random ids": np.unique(generator.integers(0, PRIME, 2 * ids_per_stream))[::2][:ids_per_stream],
        "consecutive ids": np.arange(ids_per_stream),
    }
    frames = []
    for width in widths:
        hash_functions = CarterWegmanHash(width, draws, seed, device)
        for name, values in ids.items():
            index = hash_functions(torch.from_numpy(values).to(device))
            zeros = torch.zeros(draws, width, dtype=torch.int64, device=device)
            counts = zeros.scatter_add_(1, index, zeros.new_ones(()).expand_as(index)).cpu().numpy()
            n, mean = len(values), len(values) / width
            chi_square = ((counts - mean) ** 2 / mean).sum(1)
            frames.append(
                pd.DataFrame(
                    {
                        "ids": name,
                        "width": width,
                        "draw": np.arange(draws),
                        "spread": chi_square / (width - 1),
                        "p_value": stats.chi2.sf(chi_square, width - 1),
                        "collisions": (counts * (counts - 1)).sum(1) / (n * (n - 1)) * width,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def memory_points(shapes, distinct, cap, head_dim, device="cpu"):
    """Bytes per KV head of what could remember importance, against the number of distinct ids it has seen.

    Columns: store, distinct, bytes. Sketches have float32 counters; "exact, packed" is an int32 id and a float32 score
    for each id, without any index to find it by; "exact, Python dict" is the dict with its int keys and float values;
    "exact, stored slots only" is a float32 score for each of the `cap` slots, which forgets what is evicted; "fp16 keys
    and values" are those of the `cap` slots, the size of what is managed.
    """
    rows = []
    for n in distinct:
        for width, depth in shapes:
            sketch = CountMinSketch(width, depth, device=device)
            rows.append((f"sketch {width} x {depth}", n, sketch.nbytes))
        scores = {10**6 + i: 0.5 + i for i in range(n)}
        in_dict = sys.getsizeof(scores) + sum(sys.getsizeof(k) + sys.getsizeof(v) for k, v in scores.items())
        packed = torch.empty(n, dtype=torch.int32).nbytes + torch.empty(n, dtype=torch.float32).nbytes
        rows += [
            ("exact, packed", n, packed),
            ("exact, Python dict", n, in_dict),
            ("exact, stored slots only", n, torch.empty(cap, dtype=torch.float32).nbytes),
            ("fp16 keys and values", n, torch.empty(2, cap, head_dim, dtype=torch.float16).nbytes),
        ]
    return pd.DataFrame(rows, columns=["store", "distinct", "bytes"])


def rate_points(width, depth, heads, sizes, repeats, seed, device="cpu"):
    """Weighted updates per second of one thread, counted in items, against the number of items per call; warm-up calls
    discarded.

    Columns: method, items (per call and head), repeat, seconds, rate (items of all heads per second).
    """
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for n in sizes:
        one = CountMinSketch(width, depth, seed=seed, device=device)
        many = CountMinSketch(width, depth, batch_shape=(heads,), seed=seed, device=device)
        reference = ReferenceCountMin(one)
        items = torch.randint(0, 50_000, (heads, n), generator=generator)
        weights = torch.rand(heads, n, generator=generator)
        as_lists = items[0].tolist(), weights[0].tolist()
        items, weights = items.to(device), weights.to(device)
        indices = many.hash(items)
        methods = {
            "plain Python": (1, lambda: reference.update(*as_lists)),
            "one head": (1, lambda: one.update(items[0], weights[0])),
            f"{heads} heads": (heads, lambda: many.update(items, weights)),
            f"{heads} heads, hashed before": (heads, lambda: many.update(indices=indices, weights=weights)),
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(
            1
        )  # two would wait for each other where the machine is busy, plain Python has one
        seconds = _time([call for _, call in methods.values()], repeats, device)
        torch.set_num_threads(threads)
        for (name, (lanes, _)), measured in zip(methods.items(), seconds):
            rows += [(name, n, repeat, s, lanes * n / s) for repeat, s in enumerate(measured)]
    return pd.DataFrame(rows, columns=["method", "items", "repeat", "seconds", "rate"])


def _time(functions, repeats, device, at_least=2e-3):
    """Seconds per call, `[functions][repeats]`. The functions take turns, so that a busy machine slows all of them.

    A call too short for the clock is timed in a group that takes about `at_least` seconds.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None

    def group(function, calls):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    for function in functions:
        group(function, 3)  # warm-up
    calls = [max(1, math.ceil(at_least / group(function, 3))) for function in functions]
    turns = [[group(function, n) for function, n in zip(functions, calls)] for _ in range(repeats)]
    return [list(measured) for measured in zip(*turns)]
