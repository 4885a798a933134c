"""The explorer's views. What a view shows is plain data that JSON can hold, drawn by a function without a widget; the
site draws views 1 and 3 from the same data."""

import html
import math
from functools import lru_cache, partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import LlamaConfig

from sketchkv import enable, load
from sketchkv.cache import SketchCache
from sketchkv.decode import generate
from sketchkv.index import KeyIndex
from sketchkv.oracle import decode_and_watch
from sketchkv.sketch import CountMinSketch
from sketchkv.study import attention_analysis, figures, pictures, sources
from sketchkv.study.baselines import BOUNDED, LABELS
from sketchkv.study.evaluate import evaluate
from sketchkv.study.methods import full_nbytes, make_cache, nbytes
from sketchkv.tail import Tail
from sketchkv.texts import documents

CACHES = ["compact", "decayed", "sketch", "streaming", "recall"]
STATES = {
    "protected": "sink or recent: never evicted",
    "kept": "kept",
    "recalled": "brought back by the index",
    "evicted": "not seen",
    "coming": "yet to come",
}


def cache_named(name, config, cap):
    """A cache of `CACHES` with `cap` slots; "recall" attends to sinks, the newest 16 and as many as then fit."""
    if name == "recall":
        index = KeyIndex(top=cap - 4 - 16, block=16, exact_prompts=False)
        return SketchCache(config, cap, bits=(5, 4), index=index, summary=Tail())
    return make_cache(config, max_cache_size=cap, **BOUNDED[name])


# 1: what it forgets


@lru_cache(maxsize=4)
def subject(model="embedded", dataset="embedded", length=192):
    """(model, tokenizer, ids `[1, length]`): the first held-out document."""
    lm, tokenizer = load(model, "cpu")
    return enable(lm), tokenizer, documents(dataset, tokenizer, "test", 1, length).input_ids


@lru_cache(maxsize=32)
def watched(name, cap, model="embedded", dataset="embedded", length=192):
    """`watch` of a cache of `CACHES`: for grids, and for sliders that come back."""
    lm, tokenizer, ids = subject(model, dataset, length)
    return watch(lm, tokenizer, ids, cache_named(name, lm.config, cap))


def watch(model, tokenizer, ids, cache):
    """What each query of a text `[1, tokens]` could see: {"tokens", "flips", "scores", ...}.

    flips: of each layer, KV head and token the steps at which it came into sight and went out of it, in turn.
    scores: of each layer, KV head and token its importance at the last eviction that saw it, None for a protected one.
    """
    scores: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(cache.layers):
        layer.on_evict = partial(_note, scores, number, layer, ids.shape[1])
    _, visible = decode_and_watch(model, ids, cache)
    flips, importance = [], []
    for number, seen in enumerate(layer[0].cpu().numpy() for layer in visible):
        changed = np.diff(seen, axis=1, prepend=False)  # [head, query, token]
        flips.append([[np.flatnonzero(each).tolist() for each in head.T] for head in changed])
        last = scores.get(number, torch.full(seen.shape[:2], torch.inf)).tolist()
        known = ((float(f"{x:.3g}") if math.isfinite(x) else None for x in head) for head in last)
        importance.append([list(head) for head in known])
    layer = next((each for each in cache.layers if not each.is_sliding), cache.layers[0])
    text = [tokenizer.decode([token]) for token in ids[0].tolist()]
    told = {"sinks": layer.num_sinks, "recent": layer.recent_window, "recalls": cache.index is not None}
    return told | {"tokens": text, "flips": flips, "scores": importance}


def _note(scores, number, layer, total, now, evicted):
    held = layer.slots["positions"][0].long().cpu()
    known = scores.setdefault(number, torch.full((len(held), total), torch.inf))
    known.scatter_(1, held, now[0].cpu())


def states(record, step, layer, head):
    """What each token is (`STATES`) to the query at `step`, for one layer and KV head."""
    found = []
    for token, flips in enumerate(record["flips"][layer][head]):
        seen = sum(flip <= step for flip in flips) % 2
        guarded = token < record["sinks"] or token > step - record["recent"]
        kind = "protected" if guarded else "recalled" if record["recalls"] else "kept"
        found.append("coming" if token > step else kind if seen else "evicted")
    return found


def forgets(record, step, layer, head):
    """View 1, HTML: the text as coloured tokens, with a title that says how much of it is gone."""
    found, spans = states(record, step, layer, head), []
    for token, (text, kind) in enumerate(zip(record["tokens"], found)):
        score, flips = record["scores"][layer][head][token], record["flips"][layer][head][token]
        told = f"token {token}: {STATES[kind]}"
        told += "" if score is None else f"; score {score:g} at its last eviction"
        told += f"; out of sight from step {flips[1]}" if len(flips) > 1 else ""
        spans.append((text, "now" if token == step else kind, told))
    legend = "".join(f'<span class="{kind}">{STATES[kind]}</span>' for kind in STATES if kind in found)
    return page(forgotten(record, found), f'{marked(spans)}<p class="legend">{legend}</p>')


def forgotten(record, found):
    """The finding of view 1 as a sentence."""
    past, gone = len(found) - found.count("coming"), found.count("evicted")
    if not record["recalls"]:
        return f"{gone} of {past} tokens are forgotten, and no later query can ask for them"
    far, back = past - found.count("protected"), found.count("recalled")
    return f"Nothing is forgotten: of {far} tokens far back, this query asked for {back}"


def marked(spans):
    """A text of (token, class, words on hover) as HTML."""
    parts = ((html.escape(text).replace("\n", "↵\n"), kind, html.escape(told)) for text, kind, told in spans)
    text = "".join(f'<span class="{kind}" title="{told}">{text}</span>' for text, kind, told in parts)
    return f'<p class="text">{text}</p>'


def page(title, body):
    style = (sources.ROOT / "report" / "explore.css").read_text(encoding="utf-8")
    return f'<style>{style}</style><div class="explore"><h3>{html.escape(title)}</h3>{body}</div>'


# 2: two caches, one prompt


def continuations(model, tokenizer, ids, caches, count=60):
    """What each of `caches` {name: cache} makes of a prompt `[1, tokens]`, greedily: {name: {"tokens", "bytes"}}."""
    made = {}
    for name, cache in caches.items():
        new = generate(model, ids, cache, count)[0, ids.shape[1] :].tolist()
        made[name] = {
            "tokens": [tokenizer.decode([token]) for token in new],
            "bytes": cache.nbytes()["total"],
        }
    return made


def compared(made):
    """View 2, HTML: two continuations side by side, their first difference marked."""
    (first, one), (second, other) = made.items()
    pairs, columns = list(zip(one["tokens"], other["tokens"])), ""
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    ends = f"parts from it after {same} tokens" if same < len(pairs) else f"writes the same {same} tokens"
    for name, each in made.items():
        kinds = ["kept"] * same + ["differs"] + ["after"] * len(pairs)
        spans = [(text, kind, kind) for text, kind in zip(each["tokens"], kinds)]
        columns += f"<div><b>{name}</b>, {each['bytes']:,} bytes{marked(spans)}</div>"
    title = f"{second} holds {100 * other['bytes'] / one['bytes']:.0f} % of the bytes of {first} and {ends}"
    return page(title, f'<div class="pair">{columns}</div>')


# 3: loss against bytes


def point(method, label, share, loss):
    """A method at its bytes; growth of perplexity in percent, loss in nats per token."""
    return {"method": method, "label": label, "share": share, "growth": 100 * math.expm1(loss)}


def points(front):
    """All of the table `baseline_front`."""
    rows = front.sort_values(["method", "share"])
    return [point(m, LABELS.get(m, m), *at) for m, *at in zip(rows.method, rows.share, rows.loss)]


def best_at(rows, share):
    """The point with the least growth among those that hold at most `share`, None if there is none."""
    return min((row for row in rows if row["share"] <= share), key=lambda row: row["growth"], default=None)


def measure(config, name, cap, documents=2, length=1024, **settings):
    """The point of a setting, computed; settings: of `evaluate`, the model of `config` among them."""
    method = BOUNDED[name] | {"max_cache_size": cap}
    rows = evaluate(method, documents=documents, length=length, **settings)
    loss = sum(row["nll"] - row["nll_full"] for row in rows) / len(rows)
    label = f"yours: {LABELS[name]}, {cap} slots (n = {len(rows)})"
    return point(name, label, rows[0]["bytes_total"] / full_nbytes(config, length), loss)


def hero(rows, own=None):
    """View 3, a figure: all methods grey, four named, `own` in red."""
    fig, best = pictures.front(rows, own), best_at(rows, 1 / 8)
    words = f"At 1/8 of the bytes, {best['label']} loses least: {best['growth']:.1f} %"
    fig.axes[0].set_title(words, loc="left")
    return fig


# 4: the sketch under the lamp


def counted(items, width, depth, seed=0):
    """A Count-Min Sketch of items `[n]`, each counted once per occurrence: {"table", "truth", "estimate", "bound",
    "collided"}, collided the share of distinct items that share a counter in every row."""
    sketch = CountMinSketch(width, depth, seed=seed, dtype=torch.int64)
    sketch.update(items)
    distinct, truth = items.unique(return_counts=True)
    estimate = sketch.query(distinct)
    drawn = {"table": sketch.table.tolist(), "truth": truth.tolist(), "estimate": estimate.tolist()}
    collided = (estimate > truth).double().mean().item()
    return {**drawn, "bound": math.e / width * len(items), "collided": collided}


@torch.no_grad()
def signs(model, ids, layer=0, head=0, bits=1):
    """Products of the last query of a text `[1, tokens]` with the keys before it, for one layer and KV head:
    {"truth", "estimate"}, of the tokens whose block of 64 is full."""
    queries, keys, _ = attention_analysis.states(model, ids)[layer]
    query = queries[:, head * (queries.shape[1] // keys.shape[1]), None, -1:]
    keys, index = keys[:, head : head + 1], KeyIndex(bits=bits)
    index.add(keys, torch.arange(ids.shape[1])[None])
    full = slice(0, index.coded)
    exact = (query @ keys.transpose(-1, -2)).flatten()[full]
    return {"truth": exact.tolist(), "estimate": index.scores(query).flatten()[full].tolist()}


def lamp(counts, products):
    """View 4, a figure: the counters, their error beside the bound, and the sign index beside the truth."""
    fig, (table, error, index) = plt.subplots(1, 3, figsize=(13, 4.4))
    table.imshow(counts["table"], aspect="auto", interpolation="nearest")
    table.set(xlabel="counter", ylabel="row", yticks=range(len(counts["table"])))
    table.set_title(
        f"{100 * counts['collided']:.0f} % of the items share\na counter in every row", loc="left"
    )
    table.grid(False)
    truth, over = np.array(counts["truth"]), np.array(counts["estimate"]) - counts["truth"]
    error.plot(truth, over, "o", color=figures.PALETTE[0], alpha=0.5)
    error.axhline(counts["bound"], color="#b2182b", label="e / width")
    error.set(xlabel="true count", ylabel="estimate less truth", xscale="log")
    error.legend()
    error.set_title(
        f"{100 * (over > counts['bound']).mean():.1f} % of the errors\nexceed the bound", loc="left"
    )
    index.plot(products["truth"], products["estimate"], "o", color=figures.PALETTE[2], alpha=0.5)
    ends = [min(products["truth"]), max(products["truth"])]
    index.plot(ends, ends, color="0.5", linewidth=1)
    index.set(xlabel="q · k", ylabel="estimate from signs")
    likeness = np.corrcoef(products["truth"], products["estimate"])[0, 1]
    index.set_title(f"Signs of the keys tell q · k:\ncorrelation {likeness:.2f}", loc="left")
    return fig


# 5: bytes for your model


def held(layers, kv_heads, head_dim, length, batch=1, cap=0):
    """Bytes of keys and values for a model of this shape, in half precision: {"full", "compact", "sketch", "recall",
    "host"}, the last the store of recall outside fast memory.

    cap: slots per KV head, 0 for a quarter of the length; recall has 512 whatever the length.
    """
    heads = dict(num_attention_heads=kv_heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    config = LlamaConfig(num_hidden_layers=layers, hidden_size=8 * kv_heads, vocab_size=8, **heads)

    def total(method, slots, **more):
        size = nbytes(config, length, torch.half, method=method, max_cache_size=slots, **more)
        return batch * size["total"]

    layer = SketchCache.recall(config).layers[0]
    empty = torch.zeros(1, kv_heads, 0, head_dim, dtype=torch.half, device="meta")
    layer.lazy_initialization(empty, empty)
    return {
        "full": batch * full_nbytes(config, length),
        "compact": total("compact", cap or length // 4),
        "sketch": total("sketch", cap or length // 4, bits=16),
        "recall": total("recall", 512, top=256, store="device"),
        "host": batch * layers * kv_heads * layer.store.record * length,
    }


BARS = {
    "full": ("full cache", "#333333"),
    "compact": ("compact", figures.method_style("compact")["color"]),
    "sketch": ("sketch 512x4", figures.method_style("sketch")["color"]),
    "recall": ("recall, fast memory", "#ffd166"),
    "host": ("recall, store in host memory", "0.8"),
}


def bars(sizes):
    """View 5, a figure: bytes as bars with numbers."""
    fig, axis = plt.subplots(figsize=(8, 3.4))
    (names, colours), full = zip(*BARS.values()), sizes["full"]
    drawn = axis.barh(names, [sizes[name] / 2**30 for name in BARS], color=colours)
    axis.bar_label(
        drawn, [f"{sizes[n] / 2**30:,.2f} GiB, {100 * sizes[n] / full:.0f} %" for n in BARS], padding=4
    )
    axis.invert_yaxis()
    axis.margins(x=0.3)
    axis.set(xlabel="GiB")
    axis.set_title(
        f"Compact holds {100 * sizes['compact'] / full:.0f} % of the full cache's bytes", loc="left"
    )
    return fig
