"""What is measured of SmolLM2-135M-Instruct, and how: groups of a method at one size, on all texts of a kind."""

import hashlib
import json
import time
from functools import lru_cache

import numpy as np
import torch
from transformers import DynamicCache

from sketchkv import enable, load
from sketchkv.corpus import DATA
from sketchkv.decode import stream
from sketchkv.study import methods
from sketchkv.study.evaluate import compare
from sketchkv.study.methods import fit, full_nbytes, make_cache
from sketchkv.study.questions import DEPTHS, FORMS, TASKS, instances

FORMAT = 1  # raise it when what is measured changes
BENCHMARKS = DATA / "benchmarks"
TEXTS = {"prose": "django-docs", "code": "embedded"}
DOCUMENTS, LENGTH = 16, 4096
LONG_DOCUMENTS, LONG = 8, 8192
INSTANCES, DEVELOPMENT = 30, 12  # of a cell of recall; to choose how a question is asked
SHARES = (1 / 8, 1 / 4, 1 / 16, 1 / 32)  # of the bytes of the full cache in float16
NEAR, STRIDE = 256, 16  # tokens that the model without memory sees, and how many of them it may lack
TOKENS = 2048  # of a pass, over all documents: bounds the logits
ROWS = {"full": 30}  # texts of a batch of recall, by method
MOST_ROWS = 150
COUNTS = 20  # right answers of the full cache, of 30, from which a cell counts

NAMES = (
    *("compact", "recall", "decayed", "sketch", "streaming", "h2o", "snapkv", "tova", "expected"),
    *("decayed_int4", "streaming_int4", "plain_sums", "sketch_small"),
)
BOUNDED = {name: methods.BOUNDED[name] for name in NAMES}
WHOLE = {name: methods.WHOLE[name] for name in ("kivi4", "kivi2")}
FIRST = ("compact", "recall", "decayed", "sketch", "streaming")
ASKED = ("full", "compact", "recall", "decayed", "streaming", "kivi2", "sketch")
LONGER = ("compact", "recall", "decayed", "streaming")
LABELS = methods.LABELS | {"near": f"no cache, the newest {NEAR} tokens"}

_COMMON = {
    "name": "method",
    "share": "bytes allowed, as a share of the full cache's in float16; empty: the method has one size",
    "max_cache_size": "tokens kept per layer and KV head",
    "bytes_total": "bytes held for one sequence, an index of the whole text included, a host store not",
    "bytes_held": "the same as found after the measurement, total over sequences",
    "bytes_host": "bytes of a store outside of fast memory, total over sequences",
    "bytes_full": "bytes of keys and values of the full cache in float16",
}
_ORIGIN = {
    "seconds": "seconds that the group took, all its texts together",
    "card": "device",
    "torch": "version",
    "transformers": "version",
    "commit": "of the sources",
    "settings": "hash of all settings, of the cache as made, of the model and of the token ids",
}
QUALITY = {
    "text": "prose (documentation of Django) or code (Python of held-out packages)",
    "tokens": "tokens of the document",
    **_COMMON,
    "document": "held-out file",
    "nll": "mean negative log-likelihood, nats per token",
    "nll_full": "the same with the full cache",
    "nll_late": "as nll, over the second half of the document alone",
    "nll_late_full": "the same with the full cache",
    "kl": "mean KL divergence of the next token's distribution from the full cache's, nats per token",
    "kl_late": "the same over the second half",
    "top1": "share of tokens at which the most probable next token is the full cache's",
    "top1_late": "the same over the second half",
    "evicted": "tokens evicted per layer and KV head",
    **_ORIGIN,
}
RECALL = {
    "task": ", ".join(TASKS),
    "form": "how the question was asked, chosen on development documents with the full cache: "
    + ", ".join(FORMS),
    "depth": "where the fact was to begin, as a share of the text",
    "tokens": "tokens of the text, question and answer included",
    **_COMMON,
    "instance": "number of the instance",
    "exact": "whether greedy decoding gives the whole answer, 0 or 1",
    "loglik": "mean log-likelihood of the answer, nats per token",
    **_ORIGIN,
}
TABLES = {"pretrained_quality": QUALITY, "pretrained_recall": RECALL}


# What is measured, in order


def groups(piece):
    """The groups of a piece, most important first: dicts {"table", "name", "share", ...}."""
    kind, _, which = piece.partition("-")
    if piece in ("quality", "quality-prose", "quality-code"):
        texts = [which] if which else list(TEXTS)
        common = {"table": "pretrained_quality", "texts": texts, "tokens": LENGTH}
        rest = [name for name in BOUNDED if name not in FIRST]
        order = [
            ("near", None),
            *((name, SHARES[0]) for name in (*FIRST, *rest)),
            *((w, None) for w in WHOLE),
        ]
        order += [(name, share) for share in SHARES[1:] for name in FIRST]
        order += [(name, share) for share in SHARES[1:] for name in rest]
    elif piece == "quality-8192":
        common = {"table": "pretrained_quality", "texts": list(TEXTS), "tokens": LONG}
        order = [("near", None), *((name, SHARES[0]) for name in LONGER)]
    elif piece == "recall-4096":
        asked = [(name, SHARES[0] if name in BOUNDED else None) for name in ASKED]
        return [
            {"table": "pretrained_recall", "task": task, "tokens": LENGTH, "name": name, "share": share}
            for name, share in asked
            for task in TASKS
        ]
    else:
        raise SystemExit(f"Unknown piece {piece}: allowed are {', '.join(PIECES)}.")
    return [common | {"name": name, "share": share} for name, share in order]


PIECES = ("quality", "quality-prose", "quality-code", "quality-8192", "recall-4096")


def settled(config, name, share, tokens):
    """The method as `make_cache` takes it, its cap solved; None for what needs no cache of ours. Raises `DoesNotFit` where
    not even the smallest cap does."""
    if name in WHOLE:
        return WHOLE[name]
    if name not in BOUNDED:
        return None
    budget = int(share * full_nbytes(config, tokens))
    method = BOUNDED[name] | methods.FROZEN.get((name, share), {})
    return method | {"max_cache_size": fit(config, budget, torch.float32, length=tokens, **method)}


def described(value, depth=6):
    """What a cache is made of, as plain data: a change of a preset changes it."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [described(each, depth - 1) for each in value]
    if isinstance(value, dict):
        return {str(key): described(each, depth - 1) for key, each in sorted(value.items())}
    if hasattr(value, "func"):  # a partial
        return [described(each, depth - 1) for each in (value.func, value.args, value.keywords)]
    if isinstance(value, type) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    own = getattr(value, "__dict__", {}) if depth else {}
    return {"kind": type(value).__qualname__} | {
        key: described(each, depth - 1) for key, each in sorted(own.items())
    }


def digest(*parts):
    """12 hex digits of a sha256 over what JSON holds."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


# Token ids, prepared where texts and tokenizer are


def prepare(
    path, tokenizer, *, documents=DOCUMENTS, length=LENGTH, longer=(LONG_DOCUMENTS, LONG), count=INSTANCES
):
    """Writes the token ids of all documents and instances to `path` (npz). Held-out and development documents are apart."""
    from sketchkv.texts import documents as read

    held, names = {}, {}
    for text, dataset in TEXTS.items():
        for number, tokens in filter(None, [(documents, length), longer]):
            found = read(dataset, tokenizer, "test", number, tokens)
            held[f"{text}_{tokens}"], names[f"{text}_{tokens}"] = found.input_ids, found.names
    for split, number in (("test", count), ("development", min(count, DEVELOPMENT))):
        fillers = read(TEXTS["prose"], tokenizer, split, number, length)
        depths = DEPTHS if split == "test" else (0.5,)
        names[f"{split}_{length}"] = fillers.names
        for task in TASKS:
            for form in FORMS:
                made = [instances(task, tokenizer, fillers.input_ids, depth, form) for depth in depths]
                held[f"{split}_{length}_{task}_{form}"] = torch.stack([ids for ids, _, _ in made], 1)
                names[f"{split}_{length}_{task}_{form}"] = [made[0][1], max(tail for _, _, tail in made)]
    shared = set(names[f"test_{length}"]) & set(names[f"development_{length}"])
    assert not shared, f"development documents among held-out ones: {shared}"
    assert max(int(ids.max()) for ids in held.values()) < 2**16
    arrays = {name: ids.numpy().astype(np.uint16) for name, ids in held.items()}
    np.savez_compressed(path, names=np.array(json.dumps(names)), **arrays)


@lru_cache(maxsize=1)
def prepared(path):
    """({name: int64 ids}, {name: names of documents, or tokens of answer and tail}) of a prepared file."""
    with np.load(path) as file:
        ids = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files if name != "names"}
        return ids, json.loads(str(file["names"]))


@lru_cache(maxsize=1)
def model_of(weights, device):
    return enable(load(weights, device)[0])


# Measuring


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
    cache, full, scores = (
        make_cache(lm.config, length=ids.shape[1], **method),
        DynamicCache(config=lm.config),
        [],
    )
    for start, logits in stream(lm, ids, cache, max(1, TOKENS // len(ids))):
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
    if group["table"] == "pretrained_quality":
        rows = _quality_rows(lm, held, names, group, method)
    else:
        rows = _recall_rows(lm, held, names, group, method)
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
    for part in flat.split(ROWS.get(group["name"], MOST_ROWS)):
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
    return (
        max(FORMS, key=lambda form: found[form]),
        {form: right for form, (right, _) in found.items()},
        len(exact),
    )
