"""Why a bounded cache loses: its loss taken apart, with what an oracle and the exact mean of the tail would change."""

import pandas as pd
import torch

from sketchkv import score
from sketchkv.study import stats
from sketchkv.study.attention_analysis import Oracle, attention_maps, future_mass
from sketchkv.study.evaluate import _model, evaluate
from sketchkv.study.methods import make_cache
from sketchkv.texts import documents as read_documents

EVERY = 16  # tokens between evictions

# The rungs, from the worst to the best; each step down is one thing better.
LABELS = {
    "random": "random",
    "sketch": "sketch",
    "decayed": "exact scores",
    "oracle": "oracle",
    "oracle_summary": "oracle + mean",
    "full": "full cache",
}
STEPS = {
    "sketch error": ("sketch", "decayed", "the sketch's own error"),
    "wrong eviction": ("decayed", "oracle", "wrong eviction"),
    "lost tail": ("oracle", "oracle_summary", "the tail, as far as its mean tells"),
    "rest": ("oracle_summary", "full", "what neither brings back"),
}
COLUMNS = {
    "method": f"rung of the ladder: {', '.join(LABELS)}",
    "slots": "slots per layer and KV head, the summary's among them",
    "document": "held-out file",
    "loss": "nats per token over the full cache",
}
STEP_COLUMNS = {
    "step": "name of the step",
    "label": "what it stands for",
    "head": "method that it leads from",
    "foot": "method that it leads to, which loses less",
    "mean": "nats per token that the step is worth, mean of paired differences",
    "low": "its 95 % interval, low",
    "high": "its 95 % interval, high",
    "share": "the same as a share of the sketch's loss",
    "share_low": "its 95 % interval, low",
    "share_high": "its 95 % interval, high",
    "slots": COLUMNS["slots"],
}


def foresight(model, input_ids, maps, slots):
    """A cache whose policy knows what the full cache's attention maps (`attention_maps`) say of the future."""
    knows_all, knows_less = (
        [Oracle(layer) for layer in future_mass(maps, cap, EVERY)] for cap in (slots, slots - 1)
    )
    return {
        "oracle": make_cache(model.config, knows_all, max_cache_size=slots),
        "oracle_summary": make_cache(model.config, knows_less, max_cache_size=slots - 1, summary_slots=1),
    }


@torch.no_grad()
def oracles(
    slots, *, text, first, documents, length, model="embedded", dataset="embedded", device="cpu", split="test"
):
    """A grid point: rows (`COLUMNS`) of the rungs that know the future, for each number of `slots` (a list), on the `documents`
    documents from number `first` on."""
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, split, first + documents, length)
    ids, names = texts.input_ids[first:].to(lm.device), texts.names[first:]
    maps, full, rows = attention_maps(lm, ids), score(lm, ids).mean(1), []
    for count in slots:
        for name, cache in foresight(lm, ids, maps, count).items():
            own = {"method": name, "slots": count}
            lost = (score(lm, ids, cache).mean(1) - full).tolist()
            assert cache.evicted_tokens > 0, "texts are too short for an eviction"
            rows += [own | {"document": document, "loss": loss} for document, loss in zip(names, lost)]
    return rows


def ladder(run, slots, *, documents, batch=2, seed=0, **texts):
    """All rungs, computed through `run.grid`: a DataFrame (`COLUMNS`), one row per method, number of slots and document."""
    seeded = {"random": {"seed": seed}, "sketch": {"seed": seed}, "decayed": {}}
    asked = [(name, count) for count in slots for name in seeded]
    texts |= {"text": run.data_revision}
    methods = [{"method": name, "max_cache_size": n} | seeded[name] for name, n in asked]
    found = run.grid("losses", evaluate, [{"method": m, "documents": documents, **texts} for m in methods])
    assert all(row["evicted"] > 0 for part in found for row in part), "texts are too short for an eviction"
    rows = [
        {"method": name, "slots": n, "document": row["document"], "loss": row["nll"] - row["nll_full"]}
        for (name, n), part in zip(asked, found)
        for row in part
    ]
    starts = range(0, documents, batch)
    points = [
        {"slots": list(slots), "first": i, "documents": min(batch, documents - i), **texts} for i in starts
    ]
    rows += [row for part in run.grid("why_oracles", oracles, points) for row in part]
    return pd.DataFrame(rows)[list(COLUMNS)]


def steps(table, seed=0):
    """What each step of `ladder` is worth, for each number of slots: a DataFrame (`STEP_COLUMNS`)."""
    rows = []
    for slots, part in table.groupby("slots"):
        losses = part.pivot(index="document", columns="method", values="loss").assign(full=0.0)
        for name, (head, foot, label) in STEPS.items():
            worth = losses[head] - losses[foot]
            shares = stats.ratio_interval(worth, losses["sketch"], seed)
            rows.append((name, label, head, foot, *stats.paired_interval(worth, seed), *shares, slots))
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS))
