"""One total of slots, split over layers and heads in different ways: what each way loses."""

from functools import lru_cache

import torch

from sketchkv.controller import AdaptiveCache, HeadPoolCache, pyramid
from sketchkv.decode import score
from sketchkv.policies import AttentionMass
from sketchkv.study.evaluate import BATCH, _model
from sketchkv.study.methods import make_cache
from sketchkv.texts import documents as read_documents

# On eight development documents at 128 tokens 0.5 loses less than 0.25 and 0.75 do, and a `least` of 1/8, 1/4 or 1/2 makes no
# difference. `AdaptiveCache`'s margin of 1.2 loses less than 1.5 there; its `memory` was a first guess.
STEEPNESS = 0.5
LEAST = 0.25

SPLITS = ("uniform", "pyramid", "inverted", "ada_kv", "adaptive")
LABELS = {
    "uniform": "uniform", "pyramid": "pyramid", "inverted": "inverted pyramid", "ada_kv": "heads compete (Ada-KV)",
    "adaptive": "layers lend (ours)",
}  # fmt: skip
DEFAULT = 0.99  # the decay of `AttentionMass`
FIXED = f"decay_{DEFAULT}"
# How decay and recent window are set: (label, method).
TUNINGS = {
    **{f"decay_{decay}": (f"decay {decay}", {"method": "decayed", "decay": decay}) for decay in (DEFAULT, 0.95, 0.998)},
    "self_tuned": ("set by each head (ours)", {"method": "self_tuned"}),
}
COLUMNS = {
    "document": "held-out file",
    "nll": "mean negative log-likelihood of its tokens, nats per token",
    "nll_full": "the same with the full cache",
    "bytes_total": "bytes held for one sequence, in the model's dtype",
    "caps": "tokens kept per KV head, one number per layer, at the end of the document",
    "history": "[tokens seen, caps of all layers] after each change of the split",
    "heads": "[layer, KV head, tokens kept, attention per query on the sinks] at the end, where heads compete; "
    "[layer, KV head, decay, recent window], where each head sets them",
}


def make(config, split, max_cache_size):
    """An empty cache with `max_cache_size` slots per layer and KV head on average, scored by decayed mean attention."""
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if split == "adaptive":
        return AdaptiveCache(config, max_cache_size, least=LEAST)
    if split == "ada_kv":
        return HeadPoolCache(config, max_cache_size)
    steepness = {"uniform": 0.0, "pyramid": STEEPNESS, "inverted": -STEEPNESS}[split]
    return make_cache(config, "decayed", max_cache_size=pyramid(max_cache_size, layers, steepness))


@lru_cache(maxsize=2)
def _reference(model, dataset, device, part, documents, length):
    """Ids `[documents, length]`, names, and what the full cache loses: nats per token, one number per document."""
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, part, documents, length)
    full = [score(lm, ids.to(lm.device)).mean(1) for ids in texts.input_ids.split(BATCH)]
    return texts.input_ids, texts.names, torch.cat(full).tolist()


@torch.no_grad()
def losses(
    split, max_cache_size, *, model="embedded", dataset="embedded", device="cpu", documents=16, length=1024, text=None, part="test"
):  # fmt: skip
    """Rows (list of dict, `COLUMNS`), one per document. A split that moves is one for all rows of a batch: it gets each
    document alone. text: revision of the text, among what names a grid point; part: of the held-out text."""
    lm, _ = _model(model, device)
    texts, names, full = _reference(model, dataset, device, part, documents, length)
    rows = []
    for ids in texts.split(1 if split == "adaptive" else BATCH):
        cache = make(lm.config, split, max_cache_size)
        nll = score(lm, ids.to(lm.device), cache, chunk_size=64).mean(1).tolist()
        assert cache.evicted_tokens > 0
        caps = getattr(cache, "caps", None) or [layer.max_cache_size // (getattr(layer, "heads", 1)) for layer in cache.layers]
        for row in range(len(ids)):
            rows.append({
                "document": names[len(rows)], "nll": nll[row], "nll_full": full[len(rows)],
                "bytes_total": cache.nbytes()["total"] // len(ids), "caps": caps,
                "history": [[seen, caps] for seen, caps in getattr(cache, "history", [])],
                "heads": _heads(cache, row) if split == "ada_kv" else [],
            })  # fmt: skip
    return rows


def _heads(cache, row):
    """Of one sequence: `[layer, KV head, tokens kept, attention per query on the sinks]`."""
    found = []
    for index, layer in enumerate(cache.layers):
        slots, mass = layer.slots, AttentionMass.score(layer.policy, layer.slots, layer.seen)[row, 0]
        sinks = slots["positions"][row, 0] < layer.num_sinks
        for head in range(layer.heads):
            own = slots["head"][row, 0] == head
            found.append([index, head, int(own.sum()), float(mass[own & sinks].sum())])
    return found


@torch.no_grad()
def tuned(
    method, max_cache_size, *, model="embedded", dataset="embedded", device="cpu", documents=16, length=1024, text=None, part="test"
):  # fmt: skip
    """Rows as of `losses`, for a name in `TUNINGS`: equal slots everywhere, and decay and recent window fixed or not."""
    lm, _ = _model(model, device)
    texts, names, full = _reference(model, dataset, device, part, documents, length)
    rows = []
    for ids in texts.split(BATCH):
        cache = make_cache(lm.config, **TUNINGS[method][1], max_cache_size=max_cache_size)
        nll = score(lm, ids.to(lm.device), cache, chunk_size=64).mean(1).tolist()
        for row in range(len(ids)):
            rows.append({
                "document": names[len(rows)], "nll": nll[row], "nll_full": full[len(rows)],
                "bytes_total": cache.nbytes()["total"] // len(ids), "heads": _tunings(cache, row) if method == "self_tuned" else [],
            })  # fmt: skip
    return rows


def _tunings(cache, row):
    """Of one sequence: `[layer, KV head, decay, recent window]`."""
    found = []
    for index, layer in enumerate(cache.layers):
        choice, window = layer.policy.choice()[row], layer.policy.window(layer.slots)[row, :, 0]
        found += [[index, head, layer.policy.decays[choice[head]], int(window[head])] for head in range(len(choice))]
    return found
