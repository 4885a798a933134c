"""What `03_the_sketch` measures: error, heavy hitters and bytes of the Count-Min Sketch, and the estimator of `KeyIndex`.

A Count-Min Sketch is linear, so a stream is added as its ids with their counts: the same table, much sooner. The seed, of
stream and hash functions, is the unit of repetition; on a model's text it is the document.
"""

import math

import numpy as np
import pandas as pd
import torch

from sketchkv.index import KeyIndex
from sketchkv.policies import exposure
from sketchkv.sketch import CountMinSketch
from sketchkv.study import stats
from sketchkv.study.attention_analysis import attention_maps, states

STREAMS = {"Zipf": 1.0, "uniform": 0.0}  # exponents
ERRORS = {
    "stream": "Zipf with exponent 1, or uniform",
    "width": "counters per row",
    "depth": "rows",
    "bound": "e / width, share of the total weight",
    "low": "2.5 % quantile over seeds of p95",
    "p95": "over-estimate that 95 % of the ids stay below, share of the total weight, median over seeds",
    "high": "97.5 % quantile over seeds of p95",
    "misses": "share of ids over-estimated by more than the bound, mean over seeds",
    "allowed": "exp(-depth), the share of misses that the theory allows",
    "seeds": "number of seeds (n)",
}
TOPK = {
    "exponent": "Zipf exponent of the stream, 0 for a uniform one",
    "width": "counters per row, of four rows",
    "bytes": "bytes of the sketch: float32 counters and hash parameters",
    "mean": "share of the heaviest ids among as many with the largest estimates, mean over seeds",
    **stats.ENDS,
    "n": "seeds",
}
KEYS = {
    "dim": "coordinates of a key",
    "bits": "bits of a coordinate in the index",
    "seed": "of keys and queries",
    "error": "root mean square of (estimate - product), over |q| |k|",
    "slope": "of the estimates on the products, through 0: 1 is without bias",
}
RECALL = {
    "document": "held-out file",
    "how": "what ranks the tokens",
    "bits": "bits per token and KV head that it holds; empty for exact scores of the past",
    "recall": "share of the true top k of a query that it ranks among the top k, mean over layers, heads and queries",
}


def draw_counts(exponent, length, vocabulary, seed):
    """How often each id of [0, vocabulary) occurs in a stream of `length`, int64 `[vocabulary]`: the id of rank r has
    probability ~ r^-exponent, and which id has which rank is drawn."""
    generator = np.random.default_rng([seed, 0])
    weight = np.arange(1, vocabulary + 1, dtype=np.float64) ** -exponent
    return generator.permutation(generator.multinomial(length, weight / weight.sum()))


def error(widths, depths, seeds, length, vocabulary, device="cpu"):
    """Over-estimates of all ids, as shares of the total weight: a DataFrame (`ERRORS`)."""
    rows, ids = [], torch.arange(vocabulary, device=device)
    for stream, exponent in STREAMS.items():
        for seed in seeds:
            truth = torch.from_numpy(draw_counts(exponent, length, vocabulary, seed)).to(device).double()
            for width in widths:
                for depth in depths:
                    sketch = CountMinSketch(width, depth, seed=seed, dtype=torch.float64, device=device)
                    sketch.update(ids, truth)
                    over = (sketch.query(ids) - truth) / length
                    assert over.min() >= 0, "an estimate lies below the truth"
                    misses = (over > math.e / width).double().mean().item()
                    rows.append((stream, width, depth, over.quantile(0.95).item(), misses))
    groups = pd.DataFrame(rows, columns=["stream", "width", "depth", "p95", "misses"]).groupby(
        ["stream", "width", "depth"], sort=False
    )
    found = groups.p95.quantile([0.025, 0.5, 0.975]).unstack().set_axis(["low", "p95", "high"], axis=1)
    found = found.assign(misses=groups.misses.mean(), seeds=groups.size()).reset_index()
    return found.assign(bound=math.e / found.width, allowed=np.exp(-found.depth))[list(ERRORS)]


def topk(exponents, widths, seeds, length, vocabulary, k, device="cpu"):
    """Share of the true top k among the k ids with the largest estimates of four rows: a DataFrame (`TOPK`). An id as
    frequent as the k-th counts as one of the top k."""
    rows, ids = [], torch.arange(vocabulary, device=device)
    for exponent in exponents:
        for seed in seeds:
            counts = draw_counts(exponent, length, vocabulary, seed)
            for width in widths:
                sketch = CountMinSketch(width, 4, seed=seed, device=device)
                sketch.update(ids, torch.from_numpy(counts).to(device))
                found = sketch.topk(ids, k)[1].cpu().numpy()
                recall = (counts[found] >= np.sort(counts)[-k]).mean()
                rows.append((exponent, width, sketch.nbytes, recall))
    table = pd.DataFrame(rows, columns=["exponent", "width", "bytes", "recall"])
    return stats.intervals(table, ["exponent", "width", "bytes"], "recall")


# -- a sketch of keys


def keys_error(dims, bits, seeds, tokens=1024, queries=16):
    """Error and bias of the index on random keys and queries: a DataFrame (`KEYS`)."""
    rows = []
    for dim in dims:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            keys = torch.randn(1, 1, tokens, dim, generator=generator)
            query = torch.randn(1, 1, queries, dim, generator=generator)
            truth = query @ keys.transpose(-1, -2)
            size = query.norm(dim=-1, keepdim=True) * keys.norm(dim=-1)[:, :, None]
            for each in bits:
                found = indexed(keys, each).scores(query)[:, :, 0]
                off = ((found - truth) / size).square().mean().sqrt().item()
                rows.append((dim, each, seed, off, ((found * truth).sum() / truth.square().sum()).item()))
    return pd.DataFrame(rows, columns=list(KEYS))


def indexed(keys, bits):
    """A `KeyIndex` of keys `[batch, kv_heads, tokens, head_dim]`, full blocks alone, in so many bits."""
    index = KeyIndex(bits=bits, num_sinks=0)
    index.add(keys, torch.arange(keys.shape[2], device=keys.device)[None])
    return index


def index_bits(index):
    """Bits per token and KV head that an index holds for its full blocks."""
    parts = {"signature": 1, "factor": 1, "centre": index.block, "centre_scale": index.block}
    held = sum(index.used(name, rate).nbytes for name, rate in parts.items())
    return 8 * held / (index.shape[0] * index.shape[1] * index.coded)


@torch.no_grad()
def keys_recall(model, docs, k, bits, widths, asked=16, decay=0.99, protected=(4, 16)):
    """Who finds the `k` tokens that a query of a model attends to most: a DataFrame (`RECALL`).

    Beside the index in `bits`: Count-Min Sketches of four rows of `widths`, which hold the decayed attention that each
    token received before the query came, and that attention itself. Sinks and recent window (`protected`) are no
    candidates. `asked` queries of the last half of each text are looked at.
    """
    tokens, rows = docs.input_ids.shape[1], []
    device, (sinks, recent) = model.device, protected
    at = torch.linspace(tokens // 2, tokens - 1, asked, device=device).long()
    position = torch.arange(tokens, device=device)
    outside = (position < sinks) | (at[:, None] - position < recent)
    for name, ids in zip(docs.names, docs.input_ids.to(device)):
        found: dict[tuple, list] = {}
        for (query, key, _), maps in zip(states(model, ids[None]), attention_maps(model, ids[None])):
            query, group = query[:, :, at], query.shape[1] // key.shape[1]
            true = _top((query.unflatten(1, (-1, group)) @ key[:, :, None].transpose(-1, -2))[0], outside, k)
            mass, seen = received(maps[0], at, decay)
            ranks = {("exact scores of the past", None): mass}
            for each in bits:
                index = indexed(key, each)
                label = f"index, {each} bit{'s' * (each > 1)}"
                ranks[label, index_bits(index)] = index.scores(query)[0]
            for width in widths:
                sketch = CountMinSketch(width, 4, mass.shape[:2], device=device)
                sketch.update(position, mass)
                held = 8 * sketch.nbytes / (mass.shape[0] * asked * tokens)
                ranks["Count-Min Sketch", held] = sketch.query(position)
            for how, rank in ranks.items():
                if rank.ndim == 3:  # the same for all queries of a group
                    rank = (rank / seen)[:, None].expand(*true.shape[:2], *rank.shape[1:])
                hit = _top(rank, outside, k).gather(-1, true.nonzero()[:, -1].view(*true.shape[:-1], k))
                found.setdefault(how, []).append(hit.float().mean().item())
        rows += [(name, how, held, np.mean(each)) for (how, held), each in found.items()]
    return pd.DataFrame(rows, columns=list(RECALL))


def received(maps, at, decay=0.99):
    """What each token received before the queries of numbers `at` `[n]` came: the decayed sum of its attention `[..., n,
    tokens]`, and of how many queries, as much decayed, `[n, tokens]`. maps: `[..., tokens, tokens]`, a row a query."""
    age = at[:, None] - torch.arange(maps.shape[-1], device=at.device)
    faded = torch.where(age > 0, decay ** (age - 1).clamp(min=0).float(), 0.0)
    return faded @ maps, exposure(age.clamp(min=1), decay)


def _top(rank, outside, k):
    """The `k` largest of `rank` `[..., tokens]` that are not `outside`, as a mask."""
    rank = rank.masked_fill(outside, -torch.inf)
    return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, rank.topk(k).indices, True)
