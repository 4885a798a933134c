"""What is measured of a pretrained model, and how: groups of a method at one size, on all texts of a kind."""

import hashlib
import itertools
import json
from functools import lru_cache

import numpy as np
import torch

from sketchkv.corpus import DATA
from sketchkv.study import methods
from sketchkv.study.methods import fit, full_nbytes
from sketchkv.study.questions import DEPTHS, FORMS, TASKS, instances
from sketchkv.study.sweep import configurations
from sketchkv.study.sweep import method as sweep_method

FORMAT = 1  # raise it when what is measured changes
BENCHMARKS = DATA / "benchmarks"
GEMMA = BENCHMARKS / "gemma3"
TEXTS = {"prose": "django-docs", "code": "embedded"}
DOCUMENTS, LENGTH = 16, 4096
LONG_DOCUMENTS, LONG = 8, 8192
INSTANCES, DEVELOPMENT = 30, 12  # of a cell of recall; to choose how a question is asked
SHARES = (1 / 8, 1 / 4, 1 / 16, 1 / 32)  # of the bytes of the full cache in float16
NEAR, STRIDE = 256, 16  # tokens that the model without memory sees, and how many of them it may lack
TOKENS, VOCABULARY = (
    2048,
    49152,
)  # of a pass, over all documents; fewer of a larger vocabulary: bounds the logits
ROWS = {"full": 30}  # texts of a batch of recall, by method
MOST_ROWS = 150
COUNTS = 20  # right answers of the full cache, of 30, from which a cell counts

NAMES = (
    *("compact", "recall", "decayed", "sketch", "streaming", "h2o", "snapkv", "tova", "expected"),
    *("decayed_int4", "streaming_int4", "plain_sums", "sketch_small", "recall_alone"),
)
BOUNDED = {name: methods.BOUNDED[name] for name in NAMES}
WHOLE = {name: methods.WHOLE[name] for name in ("kivi4", "kivi2")}
FIRST = ("compact", "recall", "decayed", "sketch", "streaming")
ASKED = ("full", "compact", "recall", "decayed", "streaming", "kivi2", "sketch")
LONGER = ("recall", "compact", "decayed", "streaming")
ASKED_LONGER = ("full", "recall", "compact", "streaming")
LONG_TASKS = ("needle", "four_keys")
SHORT, SHORT_DOCUMENTS = 1024, 8  # texts in which the sweep's caps of 64 to 256 tokens are caps
WATCHED = ("streaming", "plain_sums", "decayed", "sketch", "tova")  # what their rules keep of the attention
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
SWEEP = {
    "tokens": "tokens of the document",
    **_COMMON,
    "document": "held-out file of Python",
    "nll": QUALITY["nll"],
    "nll_full": QUALITY["nll_full"],
    "evicted": QUALITY["evicted"],
    **_ORIGIN,
}
ATTENTION = {
    "tokens": QUALITY["tokens"],
    **_COMMON,
    "document": "held-out file of Python",
    "chosen": "each query: anew for every query; hindsight: best fixed set; foresight: by the first half's attention; sinks: the "
    "first tokens of the text; else a rule",
    "of": "share of the first half's tokens, sinks aside; of sinks and of a rule: of the whole text",
    "mass": "share of the attention that they hold, mean over layers and heads; of all but a rule: of the second half's queries",
    "bound": "of a rule: the largest share that any choice of as many tokens could hold",
    "loss": "of a rule: nats per token over the full cache",
    **_ORIGIN,
}
TABLES = {
    "pretrained_quality": QUALITY,
    "pretrained_recall": RECALL,
    "pretrained_sweep": SWEEP,
    "pretrained_attention": ATTENTION,
}
# Tables of the study, and of which of these each is made.
SOURCES = {
    "pretrained_losses": "pretrained_quality",
    "pretrained_longer": "pretrained_quality",
    "pretrained_second": "gemma3/pretrained_quality",
    "pretrained_answers": "pretrained_recall",
    "pretrained_swept": "pretrained_sweep",
    "pretrained_attended": "pretrained_attention",
}


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
        order = [("near", None), *((name, share) for share in SHARES[:2] for name in LONGER)]
    elif piece in ("recall-4096", "recall-8192"):
        tokens, tasks, asked = (
            (LENGTH, TASKS, ASKED) if piece == "recall-4096" else (LONG, LONG_TASKS, ASKED_LONGER)
        )
        common = {"table": "pretrained_recall", "tokens": tokens}
        return [
            common | {"task": task, "name": name, "share": SHARES[0] if name in BOUNDED else None}
            for name in asked
            for task in tasks
        ]
    elif piece == "sweep":
        common = {"table": "pretrained_sweep", "tokens": SHORT, "ids": f"code_{LENGTH}", "share": None}
        return [common | {"name": c["configuration"], "method": sweep_method(c)} for c in configurations()]
    elif piece == "attention":
        common = {"table": "pretrained_attention", "tokens": SHORT, "ids": f"code_{LENGTH}", "documents": 4}
        order = [("survey", None), ("sinks", None)]
    else:
        raise SystemExit(f"Unknown piece {piece}: allowed are {', '.join(PIECES)}.")
    return [common | {"name": name, "share": share} for name, share in order]


PIECES = (
    *("quality", "quality-prose", "quality-code", "quality-8192"),
    *("recall-4096", "recall-8192"),
    *("sweep", "attention"),
)


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


def prepare(path, tokenizer):
    """Writes the token ids of all documents and instances to `path` (npz). Held-out and development documents are apart."""
    from sketchkv.texts import documents as read

    held, names = {}, {}
    for text, dataset in TEXTS.items():
        for number, tokens in ((DOCUMENTS, LENGTH), (LONG_DOCUMENTS, LONG)):
            found = read(dataset, tokenizer, "test", number, tokens)
            held[f"{text}_{tokens}"], names[f"{text}_{tokens}"] = found.input_ids, found.names

    def ask(split, fillers, tasks, depths):
        for task, form in itertools.product(tasks, FORMS):
            made = [instances(task, tokenizer, fillers, depth, form) for depth in depths]
            name = f"{split}_{fillers.shape[1]}_{task}_{form}"
            held[name] = torch.stack([ids for ids, _, _ in made], 1)
            names[name] = [made[0][1], max(tail for _, _, tail in made)]

    if tokenizer.chat_template:  # without one, texts are scored and nothing is asked
        for split, number, depths in (("test", INSTANCES, DEPTHS), ("development", DEVELOPMENT, (0.5,))):
            fillers = read(TEXTS["prose"], tokenizer, split, number, LENGTH)
            names[f"{split}_{LENGTH}"] = fillers.names
            ask(split, fillers.input_ids, TASKS, depths)
        fillers = read(TEXTS["prose"], tokenizer, "test", None, LONG)  # as many facts in fewer texts
        names[f"test_{LONG}"] = fillers.names[:INSTANCES]
        ask("test", fillers.input_ids[torch.arange(INSTANCES) % len(fillers.names)], LONG_TASKS, DEPTHS)
        shared = set(names[f"test_{LENGTH}"]) & set(names[f"development_{LENGTH}"])
        assert not shared, f"development documents among held-out ones: {shared}"
    dtype = np.min_scalar_type(max(int(ids.max()) for ids in held.values()))
    arrays = {name: ids.numpy().astype(dtype) for name, ids in held.items()}
    np.savez_compressed(path, names=np.array(json.dumps(names)), **arrays)


@lru_cache(maxsize=1)
def prepared(path):
    """({name: int64 ids}, {name: names of documents, or tokens of answer and tail}) of a prepared file."""
    with np.load(path) as file:
        ids = {name: torch.from_numpy(file[name].astype(np.int64)) for name in file.files if name != "names"}
        return ids, json.loads(str(file["names"]))
