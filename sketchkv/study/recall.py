"""Recall: a fact placed at a depth of a text, asked for at its end. Perplexity forgives forgetting, this does not.

The models here read Python source and follow no instructions, so a question is the beginning of a line of code that only
the fact completes. Tasks and wording were chosen on development documents with the full cache, which still misses many.
"""

import random
from functools import lru_cache

import pandas as pd
import torch
from scipy.stats import binomtest

from sketchkv.study.evaluate import _model
from sketchkv.study.methods import full_nbytes, make_cache, nbytes
from sketchkv.texts import documents as read_documents

# Names are drawn from these, less those that the tokenizer cuts into more than `PIECES` tokens.
WORDS = """amber anchor apple arrow autumn bamboo barrel basket beacon blanket blossom bottle breeze bridge bronze button
cabin cactus candle canyon carbon castle cedar cherry circle clover cobalt coffee copper coral cotton cradle crystal desert
diamond dolphin dragon eagle ember falcon feather forest fossil galaxy garden ginger glacier granite hammer harbor hazel
hollow honey island ivory jacket jasmine jungle kettle ladder lagoon lantern lemon lily lion lotus magnet maple marble
meadow mirror monkey mosaic mountain needle nickel oasis ocean olive onyx orange orchid oyster paddle panther paper parrot
pebble pepper pilot planet plum pocket prairie pumpkin quartz rabbit raven ribbon river rocket saddle saffron salmon sandal
shadow silver spider spiral sugar summer sunset temple thunder tiger timber tulip tunnel turtle valley velvet violet walnut
whale willow window winter zebra""".split()
PIECES = 2

COLUMNS = {
    "task": "needle, key_value or copy",
    "depth": "where the fact was to begin, as a share of the text",
    "instance": "number of the instance; its filler is the document of that number",
    "document": "held-out file that the fact is hidden in",
    "distance": "tokens from the beginning of the fact to the first token of the answer",
    "answer_tokens": "tokens of the answer",
    "exact": "whether greedy decoding would give the whole answer, 0 or 1",
    "loglik": "mean log-likelihood of the answer, nats per token",
    "evicted": "tokens evicted per layer and KV head",
    "bytes_total": "all bytes held for one sequence",
    "bytes_full": "bytes of keys and values of the full cache in float16",
}

FAR_COLUMNS = {
    "method": "cache; full: the full cache",
    "where": "near: the fact lies within the cap; far: further back",
    "right": "answers given right, token by token",
    "n": "facts",
    "share": "right / n",
    "low": "lower end of its exact binomial 95 % interval",
    "high": "upper end",
}


def needle(words):
    """One line of documentation; (fact, question, answer)."""
    a, b, c, d, e = words[:5]
    line = f':param {a}_{b}: the {c} {d} default is "'
    return f'{line}{e}"', line, e


def key_value(words):
    """Three keys with their values; one pair is given again as an example, then the value of another key is asked for."""
    name, *words = words[:7]
    pairs = list(zip(words[:3], words[3:]))
    (key, value), (asked, answer) = pairs[1], pairs[0] if words[0] < words[1] else pairs[2]
    fact = "\n".join(f"{name}({k}, {v})" for k, v in pairs)
    return fact, f"{name}({key}, {value})\n{name}({asked},", f" {answer}"


def copy(words):
    """An identifier imported early and used late; its first word is given."""
    a, b, c = words[:3]
    return f"from {a} import {b}_{c}", f"result = {b}", f"_{c}"


TASKS = {"needle": needle, "key_value": key_value, "copy": copy}


def make_instances(task, tokenizer, fillers, depth, seed=0):
    """Token ids `[instances, length]`, where each fact begins and how many tokens each answer has (lists of int).

    fillers: `[instances, length]` token ids, cut to make room. A fact begins on a line of its own, at the line break
    nearest to `depth` times the room. Raises ValueError for an unknown task, a depth outside 0 to 1 or a short text.
    """
    if task not in TASKS:
        raise ValueError(f"unknown recall task {task!r}; choose one of {', '.join(TASKS)}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, got {depth}")
    words, breaks = _vocabulary(tokenizer)
    rows, starts, answers = [], [], []
    for index, filler in enumerate(fillers.tolist()):
        drawn = random.Random(f"{seed} {task} {index}").sample(words, 8)  # the same fact at every depth
        fact, question, answer = TASKS[task](drawn)
        fact = tokenizer("\n" + fact, add_special_tokens=False)["input_ids"]
        asked = tokenizer("\n" + question, add_special_tokens=False)["input_ids"]
        tail = tokenizer("\n" + question + answer, add_special_tokens=False)["input_ids"]
        if tail[: len(asked)] != asked:
            raise ValueError(f"the tokenizer joins question and answer of {task!r}: {question + answer!r}")
        room = len(filler) - len(fact) - len(tail)
        if room < 16:
            raise ValueError(
                f"a text of {len(filler)} tokens has no room for the task {task!r}: take a longer one"
            )
        at = min(
            (i for i in range(1, room) if filler[i] in breaks),
            key=lambda i: abs(i - depth * room),
            default=int(depth * room),
        )
        rows.append(filler[:at] + fact + filler[at:room] + tail)
        starts.append(at)
        answers.append(len(tail) - len(asked))
    return torch.tensor(rows), starts, answers


@lru_cache(maxsize=2)
def _vocabulary(tokenizer):
    """Words that are short in tokens, and the tokens that begin with a line break."""
    tokens = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    short = [word for word in WORDS if max(tokens("_" + word), tokens('"' + word)) <= PIECES + 1]
    decoded = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return short, {i for i, text in enumerate(decoded) if text[:1] == "\n"}


@torch.no_grad()
def recall(
    method,
    *,
    task,
    depth,
    model="embedded",
    dataset="embedded",
    device="cpu",
    instances=16,
    length=1024,
    split="test",
    seed=0,
    text=None,
):
    """Rows (list of dict, `COLUMNS`), one per instance, for one method (a dict that `methods.make_cache` understands).

    The text streams through the cache as decoding would meet it. That greedy decoding gives an answer is the same as that
    each of its tokens is the most probable one after those before it, so one pass tells. text: revision of the text, among
    what names a grid point.
    """
    lm, tokenizer = _model(model, device)
    fillers = read_documents(dataset, tokenizer, split, instances, length)
    ids, starts, answers = make_instances(task, tokenizer, fillers.input_ids, depth, seed)
    cache = make_cache(lm.config, length=length, **method)
    found = answer(lm, ids, answers, cache)
    common = {
        "evicted": cache.evicted_tokens // len(cache.layers),
        "bytes_total": nbytes(lm.config, length, lm.dtype, **method)["total"],
        "bytes_full": full_nbytes(lm.config, length),
    }
    rows = [
        (task, depth, i, name, length - count - start, count, *said)
        for i, (name, start, count, said) in enumerate(zip(fillers.names, starts, answers, found))
    ]
    return [dict(zip(COLUMNS, row)) | common for row in rows]


def answer(lm, ids, counts, cache):
    """(exact, loglik) of the last `counts` tokens of each row, which may differ in number: a list."""
    ids, longest = ids.to(lm.device), max(counts)
    before = ids.shape[1] - longest - 1
    for chunk in ids[:, :before].split(512, 1):
        lm(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logprobs = (
        lm(ids[:, before:], past_key_values=cache, use_cache=True).logits[:, :-1].float().log_softmax(-1)
    )
    expected = ids[:, before + 1 :]
    right = (logprobs.argmax(-1) == expected).cpu()
    logprobs = logprobs.gather(-1, expected[..., None]).squeeze(-1).cpu()
    return [
        (int(right[i, longest - n :].all()), logprobs[i, longest - n :].mean().item())
        for i, n in enumerate(counts)
    ]


def shares(answers, cap):
    """Answers near and far, of each method: a DataFrame (`FAR_COLUMNS`). answers: rows of `recall` with the column "method"."""
    rows = []
    for (name, far), part in answers.groupby(["method", answers.distance > cap], sort=False):
        right, n = int(part.exact.sum()), len(part)
        rows.append(
            (name, "far" if far else "near", right, n, right / n, *binomtest(right, n).proportion_ci())
        )
    return pd.DataFrame(rows, columns=list(FAR_COLUMNS))


def caption(found, cap, length, labels):
    """What the picture of `shares` says. A cache with an index ("recall") asks its keys; all others keep what they scored."""
    far = found[found["where"] == "far"].set_index("method")
    scored = far.drop(["full", "recall"], errors="ignore")
    best, n, full = scored.right.idxmax(), far.n["full"], far.right["full"]
    kept = f"scores alone keep {scored.right[best] or 'none'} of {n} facts beyond the cap"
    lost = scored[scored.right == 0]
    return (
        f"{f'An index finds {far.right.recall}, ' if 'recall' in far.index else ''}{kept}. The full cache answers {full}; "
        f"{len(lost)} of {len(scored)} caches without an index answer none"
        f"{f' (upper limit {100 * lost.high.max():.0f} %)' if len(lost) else f', {labels[best]} most'}. Filled: facts more than {cap} "
        f"tokens back; hollow: nearer ones. Bars: exact binomial 95 % intervals; three tasks, texts of {length} tokens."
    )
