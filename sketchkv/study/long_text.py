"""Along a text: loss, bytes and time of a cache while the text grows past its cap."""

import time

import torch
from transformers import DynamicCache

from sketchkv.study.evaluate import BATCH, _model, _synchronize
from sketchkv.study.methods import full_nbytes, make_cache, nbytes
from sketchkv.texts import documents as read_documents

COLUMNS = {
    "document": "held-out file",
    "tokens": "tokens seen at the end of this stretch of the document",
    "predicted": "tokens predicted in it, each from those before",
    "nll": "mean negative log-likelihood of the tokens of this stretch, nats per token",
    "evicted": "tokens evicted so far, per layer and KV head",
    "stored": "tokens stored, per layer and KV head",
}
LATENCY = {
    "tokens": "tokens seen",
    "bytes": "bytes held for one sequence, in float16 (accumulators and sketches as they are)",
    "seconds": "seconds per token, mean over single steps of one sequence",
}


def _cache(method, config, length):
    return (
        DynamicCache(config=config)
        if method["method"] == "full"
        else make_cache(config, length=length, **method)
    )


@torch.no_grad()
def along(
    method,
    *,
    model="embedded",
    dataset="embedded",
    device="cpu",
    split="test",
    documents=8,
    length=2048,
    stretch=128,
):
    """Rows (list of dict, `COLUMNS`), one per document and `stretch` tokens, for one method.

    Every token is predicted from the cache as decoding would find it. A cache knows nothing of what is to come, so the
    first n tokens of a long document are scored as a document of n tokens would be: one pass serves all lengths. Raises
    RuntimeError if the bytes of a bounded cache change.
    """
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, split, documents, length)
    rows = []
    for batch, ids in enumerate(texts.input_ids.split(BATCH)):
        ids, cache = ids.to(lm.device), _cache(method, lm.config, length)
        bounded, held = not isinstance(cache, DynamicCache), None
        for start in range(0, length - 1, stretch):
            end = min(start + stretch, length)
            logits = lm(ids[:, start:end], past_key_values=cache, use_cache=True).logits
            targets = ids[:, start + 1 : end + 1]
            nll = torch.nn.functional.cross_entropy(
                logits[:, : targets.shape[1]].float().transpose(1, 2), targets, reduction="none"
            ).mean(1)
            if bounded:
                held = held or cache.nbytes()["total"]
                if cache.nbytes()["total"] != held:
                    raise RuntimeError(
                        f"{method}: {held} bytes at first, {cache.nbytes()['total']} after {end} tokens"
                    )
            for i, loss in enumerate(nll.tolist()):
                rows.append(
                    {
                        "document": texts.names[batch * BATCH + i],
                        "tokens": end,
                        "predicted": targets.shape[1],
                        "nll": loss,
                        "evicted": cache.evicted_tokens // len(cache.layers) if bounded else 0,
                        "stored": cache.stored_tokens()[0] if bounded else end,
                    }
                )
    return rows


@torch.no_grad()
def latency(method, *, lengths, model="embedded", dataset="embedded", device="cpu", split="test", steps=16):
    """Rows (list of dict, `LATENCY`), one per length: bytes held, and the time of a decoding step there.

    One document streams through the cache; the last `steps` tokens before each length go one at a time. `steps` should be
    a multiple of `evict_every`, so that each eviction is paid for by the tokens that it serves: then the mean over the
    steps is taken over whole cycles. Times are the machine's, and of no meaning but beside each other.
    """
    lm, tokenizer = _model(model, device)
    ids = read_documents(dataset, tokenizer, split, 1, max(lengths)).input_ids.to(lm.device)
    cache, seen, rows = _cache(method, lm.config, max(lengths)), 0, []
    held = (
        None if method["method"] == "full" else nbytes(lm.config, max(lengths), lm.dtype, **method)["total"]
    )
    for length in sorted(lengths):
        for chunk in ids[:, seen : length - steps].split(512, 1):
            lm(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times = []
        for token in ids[:, length - steps : length].split(1, 1):
            _synchronize(lm.device)
            began = time.perf_counter()
            lm(token, past_key_values=cache, use_cache=True)
            _synchronize(lm.device)
            times.append(time.perf_counter() - began)
        seen = length
        rows.append(
            {
                "tokens": length,
                "bytes": held or full_nbytes(lm.config, length),
                "seconds": sum(times) / len(times),
            }
        )
    return rows
