"""One grid point: a method scored on documents, against the full cache on the same tokens."""

from functools import lru_cache

import torch

from sketchkv import enable, load
from sketchkv.decode import stream
from sketchkv.study.methods import make_cache, nbytes
from sketchkv.texts import documents as read_documents

BATCH = 16  # documents scored together
TOKENS = 1024  # of a forward pass: more fall out of a processor's cache, fewer are too many passes

COLUMNS = {
    "document": "held-out file",
    "tokens": "tokens of the document",
    "nll": "mean negative log-likelihood of its tokens, nats per token",
    "nll_full": "the same with the full cache",
    "nll_late": "as nll, over the second half of the document alone",
    "nll_late_full": "the same with the full cache",
    "kl": "mean KL divergence of the next-token distribution from the full cache's, nats per token",
    "top1": "share of tokens at which the most probable next token is the full cache's",
    "evicted": "tokens evicted per layer and KV head",
    "stored": "tokens stored at the end, per layer and KV head",
    "bytes_kv": "bytes of key and value slots and summaries, one sequence, all layers",
    "bytes_sketch": "bytes of sketches",
    "bytes_policy": "bytes of positions, accumulators and other state",
    "bytes_total": "all bytes held for one sequence",
}


@lru_cache(maxsize=2)
def _model(name, device):
    """A loaded and enabled model, with its tokenizer: once per process, whatever number of grid points it computes."""
    model, tokenizer = load(name, device)
    return enable(model), tokenizer


@lru_cache(maxsize=2)
def _reference(model, dataset, device, split, documents, length):
    """Documents, and what the full cache says of them: ids `[documents, length]`, names, then per batch of documents
    log-probabilities and probabilities `[batch, length, vocabulary]` and the first choices `[batch, length]`, on the device:
    each point of a grid asks for all three."""
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, split, documents, length)
    batches = [
        torch.cat([logits.float().log_softmax(-1) for _, logits in stream(lm, ids.to(lm.device))], 1)
        for ids in texts.input_ids.split(BATCH)
    ]
    return texts.input_ids, texts.names, [(full, full.exp(), full.argmax(-1)) for full in batches]


@torch.no_grad()
def evaluate(
    method,
    *,
    model="embedded",
    dataset="embedded",
    device="cpu",
    split="test",
    documents=16,
    length=1024,
    text=None,
):
    """Rows (list of dict, `COLUMNS`) for one method, a dict that `methods.make_cache` understands.

    Every token is predicted from the cache as decoding would find it. Bytes are of a cache that holds one sequence.
    text: revision of the text, among what names a grid point.
    """
    lm, _ = _model(model, device)
    ids, names, batches = _reference(model, dataset, device, split, documents, length)
    held = nbytes(lm.config, length, lm.dtype, **method)
    half = length // 2
    rows: list[dict] = []
    for part, reference in zip(ids.split(BATCH), batches):
        cache = make_cache(lm.config, length=length, **method)
        part, scores = part.to(lm.device), []
        for start, logits in stream(lm, part, cache, max(1, TOKENS // len(part))):
            stop = start + logits.shape[1]
            full = tuple(whole[:, start:stop] for whole in reference)
            scores.append(compare(full, logits.float().log_softmax(-1), part[:, start + 1 : stop + 1]))
        nll, nll_full, kl, top1 = (torch.cat(each, 1) for each in zip(*scores))
        means = [x.mean(1).tolist() for x in (nll, nll_full, nll[:, half:], nll_full[:, half:], kl, top1)]
        counts = (n / len(cache.layers) for n in (cache.evicted_tokens, sum(cache.stored_tokens())))
        common = *counts, *(held[kind] for kind in ("kv", "sketch", "policy", "total"))
        for numbers in zip(*means):
            rows.append(dict(zip(COLUMNS, (names[len(rows)], length, *numbers, *common))))
    return rows


def compare(reference, found, targets):
    """Of the full cache's log-probabilities, probabilities and first choices, those found (`[batch, n, vocabulary]`) and the
    tokens that followed: nll and the full cache's nll, for as many tokens as there are, KL divergence from the full cache
    and whether both have the same first choice, `[batch, n]`."""
    (full, probabilities, first), following = reference, targets[..., None]
    nll = [-p[:, : targets.shape[1]].gather(-1, following).squeeze(-1) for p in (found, full)]
    kl = torch.linalg.vecdot(probabilities, full - found)
    return *nll, kl, (found.argmax(-1) == first).float()
