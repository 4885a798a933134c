"""One grid point: a method scored on documents, against the full cache on the same tokens."""

import time
from functools import lru_cache

import torch

from sketchkv import enable, load
from sketchkv.decode import score
from sketchkv.study.methods import make_cache, nbytes
from sketchkv.texts import documents as read_documents

BATCH = 16  # documents scored together

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
    "seconds": "seconds of scoring, per document",
}
TIMINGS = ("seconds",)


@lru_cache(maxsize=2)
def _model(name, device):
    """A loaded and enabled model, with its tokenizer: once per process, whatever number of grid points it computes."""
    model, tokenizer = load(name, device)
    return enable(model), tokenizer


@lru_cache(maxsize=2)
def _reference(model, dataset, device, split, documents, length):
    """Documents, and what the full cache says of them: ids `[documents, length]`, names, then per batch of documents the
    log-probabilities `[batch, length, vocabulary]` and nll `[batch, length - 1]`, on the device."""
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, split, documents, length)
    batches = []
    for ids in texts.input_ids.split(BATCH):
        nll, logits = score(lm, ids.to(lm.device), return_logits=True)
        batches.append((logits.float().log_softmax(-1), nll))
    return texts.input_ids, texts.names, batches


@torch.no_grad()
def evaluate(
    method, *, model="embedded", dataset="embedded", device="cpu", split="test", documents=16, length=1024, prompt=0
):  # fmt: skip
    """Rows (list of dict, `COLUMNS`) for one method, a dict that `methods.make_cache` understands.

    Every token is predicted from the cache as decoding would find it. Bytes are of a cache that holds one sequence. Of a
    `prompt` of that many tokens nothing is scored: only what is predicted after all of it has passed counts.
    """
    lm, _ = _model(model, device)
    ids, names, batches = _reference(model, dataset, device, split, documents, length)
    held = nbytes(lm.config, length, lm.dtype, **method)
    rows, half = [], (prompt + length) // 2
    for part, (full, nll_full) in zip(ids.split(BATCH), batches):
        cache = make_cache(lm.config, length=length, **method)
        _synchronize(lm.device)
        began = time.perf_counter()
        nll, logits = score(lm, part.to(lm.device), cache, return_logits=True)
        _synchronize(lm.device)
        seconds = (time.perf_counter() - began) / len(part)
        kl, top1 = _compare(full[:, prompt:], logits[:, prompt:])
        stored = sum(cache.stored_tokens()) / len(cache.layers)
        for i in range(len(part)):
            rows.append({
                "document": names[len(rows)], "tokens": length,
                "nll": nll[i, prompt:].mean().item(), "nll_full": nll_full[i, prompt:].mean().item(),
                "nll_late": nll[i, half:].mean().item(), "nll_late_full": nll_full[i, half:].mean().item(),
                "kl": kl[i].item(), "top1": top1[i].item(),
                "evicted": cache.evicted_tokens / len(cache.layers), "stored": stored,
                **{f"bytes_{kind}": count for kind, count in held.items()},
                "seconds": seconds,
            })  # fmt: skip
    return rows


def _compare(full, logits):
    """KL divergence of each document from the full cache's log-probabilities, and how often both agree: `[documents]`."""
    kl, top1 = [], []
    for expected, found in zip(full, logits):  # one document at a time bounds the memory
        found = found.float().log_softmax(-1)
        kl.append((expected.exp() * (expected - found)).sum(-1).mean())
        top1.append((expected.argmax(-1) == found.argmax(-1)).float().mean())
    return torch.stack(kl), torch.stack(top1)


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
