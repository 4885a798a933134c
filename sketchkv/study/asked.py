"""What a cache forgets and a query asks for: losses at equal fast bytes, and one fact's way through a text."""

import matplotlib.pyplot as plt
import pandas as pd
import torch

from sketchkv import AttentionMass, SketchCache, score
from sketchkv.index import KeyIndex
from sketchkv.oracle import decode_and_watch
from sketchkv.study import figures, stats
from sketchkv.study.attention_analysis import attention_maps, states
from sketchkv.study.baselines import at_budget
from sketchkv.study.figures import PALETTE
from sketchkv.study.methods import BOUNDED, LABELS, full_nbytes, make_cache
from sketchkv.study.pictures import WIDTH, label_ends, ticks, write
from sketchkv.study.recall import make_instances
from sketchkv.study.sketch_validation import received
from sketchkv.texts import documents

NAMES = ("sketch_small", "decayed", "compact", "recall_alone", "recall")
PAIRS = (("recall_alone", "decayed"), ("recall", "recall_alone"), ("recall", "compact"))
JOURNEY = {
    "step": "tokens read",
    "past": "rank of the fact's token by decayed mean attention, exact, 1 is the highest",
    "index": "rank by the index, for the query of this step; empty as long as the token is recent",
    "attention": "attention that this query gives the token in the full cache, heads of a group averaged",
    "held": "whether a cache of exact scores still holds it",
    "tokens": "tokens that are ranked",
}
TRAFFIC = {
    "budget": "bytes of fast memory, as a share of the full cache's in half precision",
    "document": "held-out file",
    "bytes_fast": "bytes of fast memory that the cache holds at the end, the index among them",
    "bytes_index": "bytes of the index at the end",
    "bytes_host": "bytes of the store at the end",
    "fetched": "bytes that a step reads from the store, mean over the text's tokens, all layers together",
    "read_full": "bytes of keys and values in half precision that a step with the full cache reads, mean over the text's tokens",
    "resident": "share of the tokens asked for that were in a slot already",
}


def points(config, budgets, length, dtype):
    """[(name, budget, method)] at equal fast bytes; recall decodes every token as a step would."""
    found = []
    for budget in budgets:
        for name in NAMES:
            method = BOUNDED[name] | ({"exact_prompts": False} if name.startswith("recall") else {})
            found.append((name, budget, at_budget(config, method, budget, length, dtype)))
    return found


@torch.no_grad()
def traffic(lm, points, documents):
    """What `recall` holds and reads, token by token over each document: a DataFrame (`TRAFFIC`)."""
    rows = []
    for budget, method in (
        (size, method | {"store": "host"}) for name, size, method in points if name == "recall"
    ):
        for name, ids in zip(documents.names, documents.input_ids.to(lm.device).split(1), strict=True):
            cache, tokens = make_cache(lm.config, length=ids.shape[1], **method), ids.shape[1]
            score(lm, ids, cache, chunk_size=1)
            held, moved = cache.nbytes(), cache.traffic()
            full = full_nbytes(lm.config, 1) * (tokens + 1) / 2
            resident = 1 - moved["missing"] / max(1, moved["chosen"])
            sizes = held["total"], held["index"], held["host"]
            rows.append((budget, name, *sizes, moved["fetched"] / tokens, full, resident))
    return pd.DataFrame(rows, columns=list(TRAFFIC))


def picture_of_losses(table, gained, seed=0):
    """Loss at each budget, a line a method."""
    found = stats.intervals(table, ["method", "budget"], "loss", seed)
    fig, axis = plt.subplots(figsize=(WIDTH, 4.0))
    ends = {}
    for name, line in found.groupby("method", sort=False):
        style, end = figures.method_style(name), line.iloc[-1]
        mean, low, high = (stats.percent(line[part]) for part in ("mean", "low", "high"))
        axis.errorbar(line.budget, mean, [mean - low, high - mean], capsize=3, **style)
        ends[LABELS[name]] = end.budget, stats.percent(end["mean"]), style["color"]
    budgets = sorted(table.budget.unique())
    ticks(axis, budgets, words=lambda share: f"1/{1 / share:.0f}")
    axis.set(xlabel="bytes of fast memory, share of the full cache", ylabel="perplexity above full, %")
    axis.set(xlim=(budgets[-1] * 1.2, budgets[0] / 1.9), ylim=(-3, None))
    label_ends(axis, ends)
    past, tail = (gained[gained.method == name] for name in ("recall_alone", "recall"))
    wins, n = int((past.verdict == "better than").sum()), gained.n.min()
    return fig, (
        f"Asking the keys beats exact scores of the past at {wins} of {len(past)} sizes, even without a tail. By how much, "
        f"paired: {_each(past)}. Recall attends to one token more, its tail: the mean of all tokens, weighted as so many as a "
        f"query leaves out. What the tail gains: {_each(tail[tail.other == 'recall_alone'])}; beside compact: "
        f"{_each(tail[tail.other == 'compact'])}. The store that recall reads from lies outside of fast memory. Bars: bootstrap "
        f"95 % intervals (n = {n} documents)."
    )


def _each(gained):
    """Gains in words, size by size."""
    return ", ".join(
        f"{stats.percent(row.mean):.1f} % ({stats.percent(row.low):.1f} to {stats.percent(row.high):.1f}) at 1/{1 / row.budget:.0f}"
        for row in gained.itertuples()
    )


def instance(tokenizer, dataset, task, depth, number, length):
    """One development text with a fact in it, and what asks for it: (ids `[1, length]` up to the answer, number of the fact's
    first token, of the token after its last)."""
    fillers = documents(dataset, tokenizer, "development", number + 1, length).input_ids
    ids, starts, answers = make_instances(task, tokenizer, fillers, depth)
    row, filler, first = ids[number], fillers[number], starts[number]
    behind = filler[first : first + 12]  # what follows the fact
    last = next(i for i in range(first + 1, len(row)) if torch.equal(row[i : i + len(behind)], behind))
    return ids[number : number + 1, : ids.shape[1] - answers[number]], first, last


@torch.no_grad()
def journey(lm, ids, first, last, cap, sinks=4, recent=16):
    """One token of a fact, in the head whose last query looks for it most: (DataFrame (`JOURNEY`), layer, head, token).

    ids: `[1, tokens]`, the last of which asks. first, last: numbers of the fact's tokens. cap: of the cache that forgets.
    """
    maps, at = attention_maps(lm, ids)[:, 0], torch.arange(ids.shape[1], device=ids.device)
    looked = maps[:, :, -1, first:last]
    layer, head, token = (int(number) for number in torch.unravel_index(looked.argmax(), looked.shape))
    token += first
    mass, seen = received(maps[layer, head], at)
    past = (mass / seen).masked_fill(at >= at[:, None], -torch.inf)
    (query, key, _), index = states(lm, ids)[layer], KeyIndex(block=16)
    index.add(key, at[None])
    asked = index.rank(query, query.shape[-1] ** -0.5, start=sinks, end=at[None] - recent + 1)[0, head]
    ranks = [(scores > scores[:, token, None]).sum(-1) + 1 for scores in (past, asked)]
    _, visible = decode_and_watch(lm, ids, SketchCache(lm.config, cap, policy=AttentionMass()))
    table = {
        "step": at + 1,
        "past": ranks[0],
        "index": ranks[1],
        "attention": maps[layer, head, :, token],
        "held": visible[layer][0, head, :, token],
        "tokens": at + 1,
    }
    table = pd.DataFrame({name: column.cpu() for name, column in table.items()}).astype({"index": "Int64"})
    table.loc[asked[:, token].isneginf().cpu().numpy(), "index"] = pd.NA
    return table[token + 1 :], layer, head, token


def picture_of_journey(table, cap, top, where):
    """Ranks of one token while the text goes on; where: (layer, head)."""
    fig, axis = plt.subplots(figsize=(WIDTH, 4.2))
    gone = table[~table.held]
    first, last = table.step.iloc[0], table.iloc[-1]
    looks: dict[str, tuple] = {
        "past": ("by past attention", PALETTE[2], {"linewidth": 2}),
        "index": ("by the index, for this query", PALETTE[3], {"linewidth": 1, "alpha": 0.6}),
    }
    for name, (words, colour, style) in looks.items():
        line = table.dropna(subset=[name])
        axis.plot(line.step, line[name].astype(float), color=colour, **style)
        axis.plot(last.step, last[name], "o", color=colour)
        write(axis, f"{words}: {last[name]}", (last.step, last[name]), (8, 0), colour)
    axis.axhline(cap, color="0.4", linestyle=":", linewidth=1)
    write(axis, f"a cache of {cap} keeps what is above", (last.step, cap), (8, 8), "0.3")
    if len(gone):
        axis.axvline(gone.step.iloc[0], color="0.6", linewidth=1)
        write(axis, "evicted", (gone.step.iloc[0], 1.1), (4, 4), "0.3")
    axis.set(
        xlabel="tokens read; the last one asks for the fact",
        ylabel="rank (1 is kept first)",
    )
    ticks(axis, [1, 10, 100], "y")
    axis.set_xticks([each for each in axis.get_xticks() if first <= each <= last.step])
    axis.invert_yaxis()
    axis.set_xlim(first, last.step + 0.55 * (last.step - first))
    went = f"evicted after {gone.step.iloc[0]} tokens" if len(gone) else "still held"
    return fig, (
        f"Asked by the query, the index ranks the fact {last['index']} of {last.tokens}, past attention {last.past}. One token of it, in "
        f"layer {where[0]}, head {where[1]}, the head that looks for it most: {went} by exact scores, and asked for by the last "
        f"query, which gives it {100 * last.attention:.0f} % of its attention. An index that brings back the top {top} "
        f"{'finds' if last['index'] <= top else 'misses'} it. One text of the development documents, an example and no measurement."
    )
