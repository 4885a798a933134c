"""How it is measured: rows of one group of `sketchkv.study.measured`, on the device at hand."""

import time
from functools import lru_cache

import torch
from transformers import DynamicCache

from sketchkv import enable, load
from sketchkv.decode import stream
from sketchkv.study.attention_analysis import attention_maps, survey
from sketchkv.study.evaluate import compare
from sketchkv.study.measured import (
    BOUNDED,
    DEPTHS,
    FORMS,
    LENGTH,
    MOST_ROWS,
    NEAR,
    ROWS,
    SHORT_DOCUMENTS,
    STRIDE,
    TOKENS,
    VOCABULARY,
    WATCHED,
    prepared,
)
from sketchkv.study.methods import make_cache
from sketchkv.texts import Documents

SINKS = 4  # tokens that a cache protects at the start of a text


@lru_cache(maxsize=1)
def model_of(weights, device):
    return enable(load(weights, device)[0])


@torch.no_grad()
def near_losses(lm, ids, seen=NEAR, stride=STRIDE):
    """What a model loses that sees the newest tokens alone, read anew for every token: nats `[documents, tokens - 1]`.

    A token is predicted from `seen - stride + 1` to `seen` tokens, or all before it where there are fewer.
    """
    length, losses = ids.shape[1], []
    for start in (0, *range(seen, length, stride)):  # of the tokens that are predicted from
        stop = min(start + stride, length) if start else min(seen, length)
        begin = max(0, start + stride - seen) if start else 0
        logits = lm(ids[:, begin:stop], use_cache=False, logits_to_keep=stop - start).logits
        targets = ids[:, start + 1 : stop + 1]
        logits = logits[:, : targets.shape[1]].float().transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses, 1)


@torch.no_grad()
def quality(lm, ids, method):
    """Scores of one method beside the full cache, chunk by chunk: ({name: `[documents, tokens]`}, cache)."""
    cache, full = make_cache(lm.config, length=ids.shape[1], **method), DynamicCache(config=lm.config)
    scores, tokens = [], TOKENS * VOCABULARY // max(VOCABULARY, lm.get_output_embeddings().out_features)
    for start, logits in stream(lm, ids, cache, max(1, tokens // len(ids))):
        stop = start + logits.shape[1]
        found = logits.float().log_softmax(-1)
        del logits
        reference = (
            lm(ids[:, start:stop], past_key_values=full, use_cache=True).logits.float().log_softmax(-1)
        )
        beside = reference, reference.exp(), reference.argmax(-1)
        scores.append(compare(beside, found, ids[:, start + 1 : stop + 1]))
    nll, nll_full, kl, top1 = (torch.cat(each, 1).cpu() for each in zip(*scores, strict=True))
    return {"nll": nll, "nll_full": nll_full, "kl": kl, "top1": top1}, cache


@torch.no_grad()
def answers(lm, ids, answer, tail, cache):
    """(exact, loglik) of the last `answer` tokens of each row: two lists.

    The text up to the last `tail` tokens passes as a prompt; the question comes as decoding would bring it.
    """
    before, chunk = ids.shape[1] - tail, max(1, 8 * TOKENS // len(ids))
    for part in ids[:, :before].split(chunk, 1):
        lm(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = getattr(cache, "max_chunk_size", None) or tail
    logits = [
        lm(part, past_key_values=cache, use_cache=True).logits for part in ids[:, before:].split(step, 1)
    ]
    logprobs = torch.cat(logits, 1)[:, -answer - 1 : -1].float().log_softmax(-1)
    if hasattr(cache, "check"):
        cache.check()
    expected = ids[:, -answer:]
    right = (logprobs.argmax(-1) == expected).all(-1)
    return right.int().tolist(), logprobs.gather(-1, expected[..., None]).mean((1, 2)).tolist()


def measure(group, ids_path, weights, device):
    """Rows (list of dict) of one group, without what is alike in all: run in a process of its own."""
    began, lm = time.perf_counter(), model_of(weights, device)
    held, names = prepared(ids_path)
    method = group["method"]
    rows = ROWS_OF[group["table"]](lm, held, names, group, method)
    seconds = round(time.perf_counter() - began, 1)
    if lm.device.type == "cuda":
        torch.cuda.empty_cache()
    return [row | {"seconds": seconds} for row in rows]


def _quality_rows(lm, held, names, group, method):
    texts, tokens, rows = group["texts"], group["tokens"], []
    extra: dict = {}
    ids = torch.cat([held[f"{text}_{tokens}"] for text in texts]).to(lm.device)
    documents = [(text, name) for text in texts for name in names[f"{text}_{tokens}"]]
    half = tokens // 2
    if method is None:
        found = {"nll": near_losses(lm, ids).cpu()}
    else:
        found, cache = quality(lm, ids, method)
        extra = _bytes_held(cache, len(ids)) | {"evicted": cache.evicted_tokens / len(cache.layers)}
    for i, (text, document) in enumerate(documents):
        row = {"text": text, "document": document} | extra
        for name, values in found.items():
            late = name.replace("nll", "nll_late") if "nll" in name else f"{name}_late"
            row |= {name: values[i].mean().item(), late: values[i, half:].mean().item()}
        rows.append(row)
    return rows


def _recall_rows(lm, held, names, group, method):
    key = f"test_{group['tokens']}_{group['task']}_{group['form']}"
    (answer, tail), found = names[key], held[key]
    wanted = [DEPTHS.index(depth) for depth in group["depths"]]
    flat = found[:, wanted].transpose(0, 1).flatten(0, 1).to(lm.device)  # depth by depth
    places = [(depth, i) for depth in group["depths"] for i in range(len(found))]
    rows: list = []
    # Longer texts take more memory each.
    most = ROWS.get(group["name"], MOST_ROWS) * LENGTH // group["tokens"]
    for part in flat.split(max(1, most)):
        cache = (
            make_cache(lm.config, length=group["tokens"], **method)
            if method
            else DynamicCache(config=lm.config)
        )
        extra: dict = {}
        for exact, loglik in zip(*answers(lm, part, answer, tail, cache), strict=True):
            if method and not extra:
                extra = _bytes_held(cache, len(part))
            depth, i = places[len(rows)]
            rows.append({"depth": depth, "instance": i, "exact": exact, "loglik": loglik} | extra)
    return rows


def _short(lm, held, names, group):
    """The beginnings of a few texts."""
    count = group.get("documents", SHORT_DOCUMENTS)
    ids = held[group["ids"]][:count, : group["tokens"]].to(lm.device)
    return Documents(ids, names[group["ids"]][:count])


def _sweep_rows(lm, held, names, group, method):
    docs = _short(lm, held, names, group)
    found, cache = quality(lm, docs.input_ids, method)
    extra = _bytes_held(cache, len(docs.names)) | {"evicted": cache.evicted_tokens / len(cache.layers)}
    assert extra["evicted"] > 0
    means = zip(docs.names, found["nll"].mean(1).tolist(), found["nll_full"].mean(1).tolist())
    return [extra | dict(zip(("document", "nll", "nll_full"), each)) for each in means]


def sink_mass(lm, ids, sinks=SINKS):
    """Share of the attention of the second half's queries that falls on the first tokens of `ids` `[1, tokens]`."""
    maps = attention_maps(lm, ids)
    return maps[..., ids.shape[1] // 2 :, :sinks].sum(-1).mean().item()


def _attention_rows(lm, held, names, group, method, cap=128):
    docs = _short(lm, held, names, group)
    if group["name"] == "sinks":
        own = {"chosen": "sinks", "of": SINKS / group["tokens"]}
        named = zip(docs.names, docs.input_ids)
        return [own | {"document": name, "mass": sink_mass(lm, ids[None])} for name, ids in named]
    policies = {
        name: make_cache(lm.config, max_cache_size=cap, **BOUNDED[name]).layers[0].policy for name in WATCHED
    }
    curves, kept = survey(lm, docs, policies, cap, 16, batch=2)
    curves = curves.groupby(["document", "chosen", "tokens"], sort=False, as_index=False).mass.mean()
    kept = kept.rename(columns={"policy": "chosen", "retained": "mass"})
    curves = curves.rename(columns={"tokens": "of"})
    return [*curves.to_dict("records"), *kept.assign(of=cap / group["tokens"]).to_dict("records")]


ROWS_OF = {
    "pretrained_quality": _quality_rows,
    "pretrained_recall": _recall_rows,
    "pretrained_sweep": _sweep_rows,
    "pretrained_attention": _attention_rows,
}


def _bytes_held(cache, sequences):
    held = cache.nbytes()
    return {"bytes_held": held["total"] / sequences, "bytes_host": held.get("host", 0) / sequences}


def choose_form(lm, held, names, tokens, task):
    """How the full cache answers a task better on development documents: (form, {form: right answers}, n)."""
    found = {}
    for form in FORMS:
        key = f"development_{tokens}_{task}_{form}"
        answer, tail = names[key]
        ids = held[key].flatten(0, 1).to(lm.device)
        parts = [
            answers(lm, part, answer, tail, DynamicCache(config=lm.config))
            for part in ids.split(ROWS["full"])
        ]
        exact = [each for part, _ in parts for each in part]
        found[form] = sum(exact), sum(sum(part) for _, part in parts) / len(exact)
    return max(FORMS, key=found.__getitem__), {form: right for form, (right, _) in found.items()}, len(exact)
