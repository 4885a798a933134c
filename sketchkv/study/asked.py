"""What a cache forgets and a query asks for: losses at equal fast bytes, and one fact's way through a text."""

import matplotlib.pyplot as plt
import pandas as pd
import torch

from sketchkv import AttentionMass, SketchCache, score
from sketchkv.index import KeyIndex
from sketchkv.oracle import decode_and_watch
from sketchkv.study import figures, stats
from sketchkv.study.baselines import at_budget
from sketchkv.study.figures import PALETTE
from sketchkv.study.methods import BOUNDED, LABELS
from sketchkv.study.pictures import WIDTH, ticks, write
from sketchkv.study.recall import make_instances
from sketchkv.texts import documents

NAMES = ("sketch_small", "decayed", "compact", "recall")
JOURNEY = {
    "step": "tokens read",
    "past": "rank of the fact's token by decayed mean attention, exact, 1 is the highest",
    "index": "rank by the index, for the query of this step; empty as long as the token is recent",
    "attention": "attention that this query gives the token in the full cache, heads of a group summed",
    "held": "whether a cache of exact scores still holds it",
    "tokens": "tokens that are ranked",
}


def points(config, budgets, length, dtype):
    """[(name, budget, method)] at equal fast bytes; recall decodes every token as a step would."""
    found = []
    for budget in budgets:
        for name in NAMES:
            method = BOUNDED[name] | ({"exact_prompts": False} if name == "recall" else {})
            found.append((name, budget, at_budget(config, method, budget, length, dtype)))
    return found


def picture_of_losses(table, gained, seed=0):
    """Loss at each budget, a line a method."""
    found = stats.intervals(table, ["method", "budget"], "loss", seed)
    fig, axis = plt.subplots(figsize=(WIDTH, 4.0))
    for name, line in found.groupby("method", sort=False):
        style, end = figures.method_style(name), line.iloc[-1]
        mean, low, high = (stats.percent(line[part]) for part in ("mean", "low", "high"))
        axis.errorbar(line.budget, mean, [mean - low, high - mean], capsize=3, **style)
        write(axis, LABELS[name], (end.budget, stats.percent(end["mean"])), (8, 0), style["color"])
    budgets = sorted(table.budget.unique())
    ticks(axis, budgets, words=lambda share: f"1/{1 / share:.0f}")
    axis.set(xlabel="bytes of fast memory, share of the full cache", ylabel="perplexity above full, %")
    axis.set(xlim=(budgets[-1] * 1.2, budgets[0] / 1.9), ylim=(0, None))
    wins, n = int((gained.verdict == "better than").sum()), gained.n.min()
    each = "; ".join(
        f"1/{1 / row.budget:.0f}: {stats.percent(row.mean):.1f} % ({stats.percent(row.low):.1f} to {stats.percent(row.high):.1f})"
        for row in gained.itertuples()
    )
    return fig, (
        f"Asking the keys beats exact scores of the past at {wins} of {len(gained)} sizes. By how much, paired: {each}. The "
        f"store that recall reads from lies outside of fast memory. Bars: bootstrap 95 % intervals (n = {n} documents)."
    )


class Watched(KeyIndex):
    """Writes down how many tokens rank above number `watched` for each query: `above`, int64 `[kv_heads]` each."""

    watched = 0

    def reset(self):
        super().reset()
        self.above = []

    def rank(self, *args, **kwargs):
        ranks = super().rank(*args, **kwargs)
        if self.watched >= ranks.shape[-1]:
            return ranks
        own = ranks[..., self.watched, None]
        above = (ranks > own).sum(-1).masked_fill(own[..., 0].isneginf(), -1)
        self.above += above[0].unbind(-1)
        return ranks


class Watching(AttentionMass):
    """Writes down, at each step, the attention that token number `watched` gets and how many rank above it by past
    attention; the cache must evict nothing."""

    watched = 0

    def allocate(self, slots):
        super().allocate(slots)
        self.seen, self.above, self.latest = [], [], None

    def observe(self, slots, attention):
        self.latest = attention[0, :, -1]
        if slots.used > self.watched + 1:  # what was known before this query came
            scores = self.score(slots, slots.used - 1)[0]
            self.above.append((scores > scores[:, self.watched, None]).sum(-1))
            self.seen.append(self.latest[:, self.watched])
        super().observe(slots, attention)


def instance(tokenizer, dataset, task, depth, number, length):
    """One development text with a fact in it, and what asks for it: (ids `[1, length]` up to the answer, number of the fact's
    first token, of the token after its last)."""
    fillers = documents(dataset, tokenizer, "development", number + 1, length).input_ids
    ids, starts, answers = make_instances(task, tokenizer, fillers, depth)
    row, filler, first = ids[number], fillers[number], starts[number]
    behind = filler[first : first + 12]  # what follows the fact
    last = next(i for i in range(first + 1, len(row)) if torch.equal(row[i : i + len(behind)], behind))
    return ids[number : number + 1, : ids.shape[1] - answers[number]], first, last


def journey(lm, ids, first, last, cap):
    """One token of a fact, in the head whose last query looks for it most: (DataFrame (`JOURNEY`), layer, head, token).

    ids: `[1, tokens]`, the last of which asks. first, last: numbers of the fact's tokens. cap: of the cache that forgets.
    """
    roomy = ids.shape[1] + 16
    cache = SketchCache(lm.config, roomy, policy=Watching())
    score(lm, ids, cache, chunk_size=1)
    found = [layer.policy.latest[:, first:last] for layer in cache.layers]
    layer = max(range(len(found)), key=lambda i: found[i].max())
    head, token = divmod(int(found[layer].argmax()), last - first)
    token += first
    policy, asked = Watching(), Watched(top=roomy - 20, block=16, exact_prompts=False)
    policy.watched = asked.watched = token
    cache = SketchCache(lm.config, roomy, policy=policy)
    index = SketchCache.recall(lm.config, roomy, index=asked, recent_window=16)
    for each in (cache, index):
        score(lm, ids, each, chunk_size=1)
    bounded = SketchCache(lm.config, cap, policy=AttentionMass())
    _, visible = decode_and_watch(lm, ids, bounded)
    policy, above = cache.layers[layer].policy, index.layers[layer].index.above
    steps = range(token + 2, ids.shape[1] + 1)
    ranked = [int(each[head]) + 1 or None for each in above[-len(steps) :]]
    table = {
        "step": list(steps),
        "past": [int(each[head]) + 1 for each in policy.above],
        "index": ranked,
        "attention": [float(each[head]) for each in policy.seen],
        "held": visible[layer][0, head, token + 1 :, token].tolist(),
        "tokens": list(steps),
    }
    return pd.DataFrame(table).astype({"index": "Int64"}), layer, head, token


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
        f"The query's index ranks the fact {last['index']} of {last.tokens}, past attention {last.past}. One token of it, in "
        f"layer {where[0]}, head {where[1]}, the head that looks for it most: {went} by exact scores, and asked for by the last "
        f"query, which gives it {last.attention:.0%} of its attention. An index that brings back the top {top} finds it: "
        f"{'yes' if last['index'] <= top else 'no'}. One text of the development documents, an example and no measurement."
    )
