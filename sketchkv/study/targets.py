"""How far `SketchCache.compact` comes, on more documents than a notebook has time for: `python -m sketchkv.study.targets`.

Every method holds the same share of a full cache's bytes; texts of 1024 tokens on both embedded models, and on the rotary
one texts of 4096, 16 times what a sixteenth holds. Held-out documents alone, each scored once, with the setting that was
frozen on development documents. The tables go to `data/benchmarks`, like all that wants a GPU; a CPU takes hours.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sketchkv.study import baselines, evaluate, recall, results, stats
from sketchkv.study.bench import machine
from sketchkv.study.methods import full_nbytes

BUDGETS = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
PEERS = ("streaming", "h2o", "decayed", "tova", "decayed_int8", "decayed_int4", "streaming_int4")
WHOLE = ("kivi4", "kivi2")  # of one size: they count where they fit
TEXTS = {
    ("gpt2", 1024): "embedded",
    ("rotary", 1024): "data/model-rotary",
    ("rotary", 4096): "data/model-rotary",
}
NAMES = {"gpt2": "GPT-2 class", "rotary": "rotary"}
DIAGNOSES = ("evicting", "rounding")
LIMITS = {1 / 4: 0.005, 1 / 8: 0.01, 1 / 16: 0.02, 1 / 32: 0.04}  # of perplexity, upper end of the interval
RECALL = ("compact", "streaming", "decayed_int4")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TASKS = ("needle", "key_value")

COLUMNS = {
    "model": "gpt2 or rotary: the embedded models",
    "length": "tokens of each document",
    "budget": "bytes allowed / bytes of a full cache in half precision",
    "share": "bytes held / bytes of a full cache in half precision",
    "method": "name of the method; evicting: compact's slots without rounding, rounding: its bits without eviction",
    "max_cache_size": "tokens kept per layer and KV head; empty where the whole text is held",
    "increase": "growth of perplexity over the full cache",
    "low": "its 95 % interval over documents, low",
    "high": "its 95 % interval, high",
    "kl": "KL divergence from the full cache, nats per token",
    "gain": "nats per token that compact loses less, mean of paired differences; 0 for itself",
    "gain_low": "95 % interval of the gain, low",
    "gain_high": "95 % interval of the gain, high",
    "n": "documents",
}
RECALL_COLUMNS = {
    "model": COLUMNS["model"],
    "task": "needle or key_value",
    "depth": "where in the text the answer stands, from 0 (beginning) to 1",
    "method": "name of the method, at an eighth of the full cache's bytes; full: the full cache",
    "exact": "share of answers found, every token right",
    "low": "its 95 % interval over instances, low",
    "high": "its 95 % interval, high",
    "n": "instances",
}
VERDICT_COLUMNS = {
    **{
        name: COLUMNS[name]
        for name in ("model", "length", "budget", "share", "increase", "low", "high", "kl")
    },
    "limit": "what was hoped for: the most that the upper end of the interval may be",
    "met": "whether it is no more",
    "peer": "the other method of no more bytes with the least mean loss",
    "peer_increase": "its growth of perplexity",
    "gain": "nats per token that compact loses less than it, mean of paired differences",
    "gain_low": COLUMNS["gain_low"],
    "gain_high": COLUMNS["gain_high"],
    "less": "share of the peer's loss in nats that compact avoids",
    "n": COLUMNS["n"],
}


def measured(folder=results.ROOT / "data" / "benchmarks"):
    """(quality, recall, facts): the tables that `main` wrote, and on what it ran. Raises FileNotFoundError if it never did."""
    quality, recalled = (pd.read_csv(folder / f"{name}.csv") for name in ("targets", "targets_recall"))
    return quality.astype({"max_cache_size": "Int64"}), recalled, results.read_json(folder / "targets.json")


def verdicts(quality):
    """`compact` against its limit and the best peer, one row per model, length and budget: a DataFrame, `VERDICT_COLUMNS`."""
    rows = []
    for _, at in quality.groupby(["model", "length", "budget"], sort=False):
        own = at[at.method == "compact"].iloc[0]
        peer = at[at.method.isin((*PEERS, *WHOLE))].sort_values("increase").iloc[0]
        rows.append(
            own[["model", "length", "budget", "share", "increase", "low", "high", "kl"]].to_dict()
            | {
                "limit": LIMITS[own.budget],
                "met": bool(own.high <= LIMITS[own.budget]),
                "peer": peer.method,
                "peer_increase": peer.increase,
                "gain": peer.gain,
                "gain_low": peer.gain_low,
                "gain_high": peer.gain_high,
                "less": peer.gain / np.log1p(peer.increase),
                "n": own.n,
            }
        )
    return pd.DataFrame(rows)[list(VERDICT_COLUMNS)]


def kept(recalled):
    """For each method, answers found as a share of those that the full cache finds, over models, tasks and depths."""
    found = recalled.groupby("method").exact.mean()
    return found / found["full"]


def score(model, length, documents, device, dataset, budgets=BUDGETS):
    """One row (dict, `COLUMNS` but "model") per budget and method."""
    lm, tokenizer = evaluate._model(model, device)
    settings = dict(
        model=model, dataset=dataset, device=device, split="test", documents=documents, length=length
    )
    points, _ = baselines.equal_bytes(lm.config, budgets, length, lm.dtype, ("compact", *PEERS), seldom=())
    points = [point for point in points if point[0] in ("compact", *PEERS, *WHOLE)]
    # What compact loses by evicting and by rounding alone: not of equal bytes, but of the same slots and the same bits.
    points += [
        ("evicting", budget, method | {"bits": 16}) for name, budget, method in points if name == "compact"
    ]
    points += [
        ("rounding", None, {"method": "full", "evict_every": 1, "bits": baselines.BOUNDED["compact"]["bits"]})
    ]
    found = [evaluate.evaluate(method, **settings) for *_, method in points]
    table = baselines.table(points, found, lm.config, length)
    rows = []
    for budget in budgets:
        fits = (table.share <= budget) | (table.method == "rounding")
        at = table[(table.budget == budget) | (table.budget.isna() & fits)]
        for name, part in at.groupby("method", sort=False):
            assert name in (*WHOLE, "rounding") or (part.evicted > 0).all(), (
                f"{name} evicted nothing at {budget}"
            )
            growth = np.expm1(stats.paired_interval(part.loss.to_numpy(copy=True)))
            gain = baselines.compare(at, "compact", name) if name != "compact" else (0.0, 0.0, 0.0)
            rows.append(
                {
                    "length": length,
                    "budget": budget,
                    "share": part.share.iloc[0],
                    "method": name,
                    "max_cache_size": part.max_cache_size.iloc[0],
                    **dict(zip(("increase", "low", "high"), growth)),
                    "kl": part.kl.mean(),
                    **dict(zip(("gain", "gain_low", "gain_high"), gain)),
                    "n": len(part),
                }
            )
    return rows


def remember(model, instances, device, dataset, budget=1 / 8, length=1024):
    """One row (dict, `RECALL_COLUMNS` but "model") per task, depth and method."""
    lm, _ = evaluate._model(model, device)
    rows = []
    for task in TASKS:
        for depth in DEPTHS:
            asked = dict(
                task=task, depth=depth, instances=instances, length=length, model=model, device=device
            )
            for name in RECALL:
                method = baselines.at_budget(lm.config, name, budget, length, lm.dtype)
                found = recall.recall(method, dataset=dataset, **asked)
                assert all(row["bytes_total"] <= budget * full_nbytes(lm.config, length) for row in found)
                if name == RECALL[0]:
                    rows.append((task, depth, "full", [row["exact_full"] for row in found]))
                rows.append((task, depth, name, [row["exact"] for row in found]))
    return [
        dict(zip(list(RECALL_COLUMNS)[1:], (task, depth, name, *_share(exact))))
        for task, depth, name, exact in rows
    ]


def _share(exact):
    return *stats.paired_interval(exact), len(exact)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sketchkv.study.targets", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--output", default="data/benchmarks", help="folder of the tables")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--long-dataset", help="for texts of 4096 tokens; default: the same")
    parser.add_argument("--commit", help="commit of the code, where git cannot tell")
    options = parser.parse_args(arguments)
    folder = Path(options.output)
    if (
        options.device == "cuda"
    ):  # a GPU waits for Python, not for memory: all documents together, in long passes
        evaluate.BATCH = recall.BATCH = options.documents
        evaluate.TOKENS = 256 * options.documents
    quality, recalled = [], []
    facts = machine(options.commit) | {"documents": options.documents, "dataset": options.dataset}
    for (label, length), model in TEXTS.items():
        long = length > 1024
        dataset = options.long_dataset if long and options.long_dataset else options.dataset
        rows = score(
            model, length, options.documents, options.device, dataset, BUDGETS[2:] if long else BUDGETS
        )
        quality += [{"model": label} | row for row in rows]
        if not long:
            recalled += [
                {"model": label} | row for row in remember(model, options.documents, options.device, dataset)
            ]
        results.atomic_write(folder / "targets.csv", pd.DataFrame(quality)[list(COLUMNS)].to_csv(index=False))
        results.atomic_write(
            folder / "targets_recall.csv", pd.DataFrame(recalled)[list(RECALL_COLUMNS)].to_csv(index=False)
        )
        results.atomic_write(folder / "targets.json", json.dumps(facts, indent=1) + "\n")
        print(pd.DataFrame(rows).to_string(), flush=True)


if __name__ == "__main__":
    main()
