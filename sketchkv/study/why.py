"""Why a bounded cache loses: its loss taken apart, with what an oracle and the exact mean of the tail would change."""

import pandas as pd
import torch

from sketchkv import score
from sketchkv.oracle import full_cache_logits
from sketchkv.study import stats
from sketchkv.study.attention_analysis import Oracle, attention_maps, future_mass
from sketchkv.study.evaluate import _model, evaluate
from sketchkv.study.methods import make_cache
from sketchkv.texts import documents as read_documents

# -- the ladder: one cap, one thing better at each rung -----------------------------------------------------------------

EVERY = 16  # tokens between evictions

LABELS = {
    "random": "random",
    "streaming": "StreamingLLM",
    "sketch": "sketch",
    "decayed": "exact scores",
    "decayed_summary": "exact scores + mean of tail",
    "oracle": "oracle",
    "oracle_summary": "oracle + mean of tail",
    "full": "full cache",
}
STEPS = {
    "sketch error": ("sketch", "decayed", "the sketch's own error"),
    "wrong eviction": ("decayed", "oracle", "wrong eviction"),
    "lost tail": ("oracle", "oracle_summary", "the tail, as far as its mean tells"),
    "rest": ("oracle_summary", "full", "what neither brings back"),
}
# The same two steps the other way round: the tail first, then the choice.
OTHER_WAY = {
    "lost tail first": ("decayed", "decayed_summary", "the tail, before the choice"),
    "wrong eviction after": ("decayed_summary", "oracle_summary", "wrong eviction, beside the tail's mean"),
}
COLUMNS = {
    "method": "rung of the ladder: "
    + ", ".join(LABELS)
    + "; query: a set of tokens of its own for each query",
    "slots": "slots per layer and KV head, the summary's among them",
    "document": "held-out file",
    "nll": "mean negative log-likelihood of its tokens, nats per token",
    "nll_full": "the same with the full cache",
    "loss": "nll - nll_full",
}


def blind(slots, seed=0):
    """The rungs that know no future, as methods: `slots` per KV head in the model's dtype, the summary's among them."""
    return {
        "random": {"method": "random", "max_cache_size": slots, "seed": seed},
        "streaming": {"method": "streaming", "max_cache_size": slots},
        "sketch": {"method": "sketch", "max_cache_size": slots, "seed": seed},
        "decayed": {"method": "decayed", "max_cache_size": slots},
        "decayed_summary": {"method": "decayed", "max_cache_size": slots - 1, "summary_slots": 1},
    }


def method(method, text, **texts):
    """A grid point: `evaluate`, with the revision of the text (`text`) among what names it."""
    return evaluate(method, **texts)


def _texts(model, dataset, device, split, first, documents, length):
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, split, first + documents, length)
    return lm, texts.input_ids[first:].to(lm.device), texts.names[first:]


def foresight(model, input_ids, maps, slots):
    """A cache whose policy knows what the full cache's attention maps (`attention_maps`) say of the future."""
    knows_all, knows_less = (
        [Oracle(layer) for layer in future_mass(maps, cap, EVERY)] for cap in (slots, slots - 1)
    )
    return {
        "oracle": make_cache(model.config, knows_all, max_cache_size=slots),
        "oracle_summary": make_cache(model.config, knows_less, max_cache_size=slots - 1, summary_slots=1),
    }


def chosen_anew(maps, slots):
    """The `slots` tokens that each query of the full cache attends to most: per layer, bool like `maps`."""
    best = [layer.topk(min(slots, layer.shape[-1]), sorted=False).indices for layer in maps]
    causal = torch.ones(maps.shape[-2:], dtype=torch.bool, device=maps.device).tril()
    return [
        torch.zeros_like(layer, dtype=torch.bool).scatter_(-1, top, True) & causal
        for layer, top in zip(maps, best)
    ]


def _nll(logits, input_ids):
    """Nats per token `[batch]` of texts `[batch, tokens]`, each token predicted from the logits of the one before."""
    predicted, targets = logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:]
    return torch.nn.functional.cross_entropy(predicted, targets, reduction="none").mean(1)


@torch.no_grad()
def oracles(
    slots, *, text, first, documents, length, model="embedded", dataset="embedded", device="cpu", split="test"
):
    """A grid point: rows (`COLUMNS`) of the rungs that know the future, for each number of `slots` (a list), on the
    `documents` documents from number `first` on. Two passes: the full cache's attention first."""
    lm, ids, names = _texts(model, dataset, device, split, first, documents, length)
    maps, full, rows = attention_maps(lm, ids), score(lm, ids).mean(1), []
    for count in slots:
        found = {}
        for name, cache in foresight(lm, ids, maps, count).items():
            found[name] = score(lm, ids, cache).mean(1)
            assert cache.evicted_tokens > 0, "texts are too short for an eviction"
        found["query"] = _nll(full_cache_logits(lm, ids, chosen_anew(maps, count)), ids)
        rows += [
            {"method": name, "slots": count, "document": document, "nll": nll, "nll_full": whole}
            for name, each in found.items()
            for document, nll, whole in zip(names, each.tolist(), full.tolist())
        ]
    return rows


def ladder(run, slots, *, documents, batch=4, seed=0, **texts):
    """All rungs, computed through `run.grid`: a DataFrame (`COLUMNS`), one row per method, number of slots and document."""
    asked = [(name, count, point) for count in slots for name, point in blind(count, seed).items()]
    texts |= {"text": run.data_revision}
    points = [{"method": point, "documents": documents, **texts} for *_, point in asked]
    rows = [
        {"method": name, "slots": count, **{key: row[key] for key in ("document", "nll", "nll_full")}}
        for (name, count, _), found in zip(asked, run.grid("why_method", method, points))
        for row in found
        if row["evicted"] > 0
    ]
    assert len(rows) == len(asked) * documents, "texts are too short for an eviction"
    points = [
        {"slots": list(slots), "first": first, "documents": min(batch, documents - first), **texts}
        for first in range(0, documents, batch)
    ]
    rows += [row for found in run.grid("why_oracles", oracles, points) for row in found]
    table = pd.DataFrame(rows)
    return table.assign(loss=table.nll - table.nll_full)


def steps(losses, which=STEPS, whole="sketch", seed=0):
    """What each step of the ladder is worth: a DataFrame, one row a step.

    losses: one row a document, one column a method, "full" being 0 where it is missing. "mean", "low", "high": nats per
    token by which the method at its head loses more than the one at its foot; "share" and its interval: of the loss of
    the method `whole`.
    """
    losses = losses.assign(full=0.0)
    rows = []
    for name, (head, foot, label) in which.items():
        difference = (losses[head] - losses[foot]).to_numpy(copy=True)
        shares = stats.ratio_interval(difference, losses[whole].to_numpy(copy=True), seed)
        rows.append((name, label, head, foot, *stats.paired_interval(difference, seed), *shares))
    return pd.DataFrame(rows, columns=list(STEP_COLUMNS)[:10])


STEP_COLUMNS = {
    "step": "name of the step",
    "label": "what it stands for",
    "head": "method that it leads from",
    "foot": "method that it leads to, which loses less",
    "mean": "nats per token that the step is worth, mean of paired differences",
    "low": "its 95 % interval, low",
    "high": "its 95 % interval, high",
    "share": "the same as a share of the whole loss",
    "share_low": "its 95 % interval, low",
    "share_high": "its 95 % interval, high",
}

# -- the noise of few bits ----------------------------------------------------------------------------------------------


def noise(run, bits, slots, **texts):
    """What few bits add, computed through `run.grid`: a DataFrame, one row per number of bits (None: the setting's own),
    place and document.

    "evicted": `SketchCache.compact` with `slots` per KV head, its summary's among them, against itself in float16;
    "whole": the whole text in as many bits against float16.
    """
    texts |= {"text": run.data_revision}
    asked = [("evicted", b, compact(slots, b)) for b in (16, *bits)]
    asked += [("whole", b, {"method": "full", "evict_every": 1, "bits": b}) for b in (16, *bits) if b]
    found = run.grid("why_method", method, [{"method": point, **texts} for *_, point in asked])
    table = pd.DataFrame(
        [
            {
                "place": place,
                "bits": b or 0,
                "document": row["document"],
                "loss": row["nll"] - row["nll_full"],
            }
            for (place, b, _), rows in zip(asked, found)
            for row in rows
        ]
    )
    half = table[table.bits == 16].set_index(["place", "document"]).loss
    base = half.loc[list(zip(table.place, table.document))].to_numpy()
    return table.assign(noise=table.loss - base)


NOISE_COLUMNS = {
    "place": "evicted: the compact setting at its cap; whole: the whole text held",
    "bits": "bits of a coordinate; 0: the compact setting's own",
    "document": "held-out file",
    "loss": "nats per token worse than the full cache",
    "noise": "the same less that of float16 in the same place",
}


def compact(slots, bits=None):
    """The compact setting as a method with `slots` per KV head, its one summary slot among them; bits: None, its own."""
    return {"method": "compact", "max_cache_size": slots - 1} | ({"bits": bits} if bits else {})
