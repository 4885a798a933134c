"""Where the attention of a trained model goes, and how much of it each eviction policy keeps.

Maps are attention probabilities `[..., queries, tokens]` of the full cache, each query's row summing to 1.
"""

import pandas as pd
import torch

from sketchkv import score
from sketchkv.policies import Policy
from sketchkv.study.methods import make_cache

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
CURVES = {
    "document": "held-out file",
    "layer": "index of the layer",
    "chosen": "each query: anew for every query; hindsight: best fixed set; foresight: by the first half's attention",
    "tokens": "share of the first half's tokens, sinks aside",
    "mass": "share of the second half's attention on the first half that they hold, mean over heads",
}
KEPT = {
    "document": "held-out file",
    "policy": "eviction policy",
    "retained": "share of the full cache's attention on tokens still held, mean over layers, heads and queries",
    "bound": "the largest share that any choice of as many tokens could retain",
    "loss": "nats per token over the full cache, predicted by the queries that see a compressed cache",
}


@torch.no_grad()
def attention_maps(model, input_ids):
    """Attention of the full cache `[layers, batch, num_kv_heads, tokens, tokens]`, float32 on the model's device, the
    query heads of a group averaged. `input_ids`: `[batch, tokens]`. The model keeps the attention it had."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        mask = torch.ones_like(input_ids)  # documents may begin with the token that stands for padding
        maps = model(input_ids, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(previous)
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return torch.stack([layer.float().unflatten(1, (kv_heads, -1)).mean(2) for layer in maps])


class _Recorder(Policy):
    """Keeps the queries of all that passes; nothing is evicted."""

    def allocate(self, slots):
        self.queries = []

    def query(self, slots, query):
        self.queries.append(query)


@torch.no_grad()
def states(model, input_ids):
    """Queries `[batch, num_heads, tokens, head_dim]`, keys and values `[batch, num_kv_heads, tokens, head_dim]` of the full
    cache, float32: one triple per layer."""
    cache = make_cache(model.config, _Recorder(), max_cache_size=max(input_ids.shape[1], 32))
    model(input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [
        tuple(
            x.float()
            for x in (torch.cat(layer.policy.queries, 2), layer.slots["keys"], layer.slots["values"])
        )
        for layer in cache.layers
    ]


def mass_curves(maps, shares=SHARES, sinks=4, every=8):
    """Share of the attention of the text's second half on its first half that x of those tokens hold, `sinks` aside.

    The tokens are chosen in three ways: "each query", anew for every query, as no cache can; "hindsight", the best fixed
    set; "foresight", by the attention that the first half gave, per query that could give it: what a policy can know.
    shares: fractions of the tokens. Returns {way: `[..., heads, len(shares)]`}; each way holds at least what the next does.
    `every`: one query in so many is looked at.
    """
    middle = maps.shape[-1] // 2
    exposed = torch.arange(middle, 0, -1, device=maps.device)
    past = maps[..., :middle, sinks:middle].sum(-2) / exposed[sinks:]
    future = maps[..., middle::every, sinks:middle]
    total = future.sum((-1, -2))[..., None]
    ranks = torch.tensor(
        [max(1, round(share * (middle - sinks))) - 1 for share in shares], device=maps.device
    )
    fixed = future.sum(-2)
    held = {
        "each query": future.sort(-1, descending=True).values.sum(-2),
        "hindsight": fixed.sort(-1, descending=True).values,
        "foresight": fixed.gather(-1, past.argsort(-1, descending=True)),
    }
    return {way: ranked.cumsum(-1)[..., ranks] / total for way, ranked in held.items()}


class Oracle(Policy):
    """Knows the future: keeps the tokens that the remaining queries of the full cache will attend to most.

    future: `[batch, num_kv_heads, evictions, tokens]`, attention mass yet to come at each eviction (`future_mass`). What it
    evicts is gone, as for any policy, and its choice is greedy: a strong reference, not a bound (`bound` is).
    """

    def __init__(self, future):
        self.future = future

    def allocate(self, slots):
        self.evictions = 0

    def score(self, slots, seen):
        mass = self.future[:, :, self.evictions]
        self.evictions += 1
        return mass.gather(-1, slots["positions"].long())


def _evictions(tokens, max_cache_size, evict_every):
    """Numbers of seen tokens at which a cache evicts: the queries from each to the next see the same stored tokens."""
    return range(max_cache_size + evict_every, tokens + 1, evict_every)


def future_mass(maps, max_cache_size, evict_every):
    """Attention that each token will get from all queries after each eviction: `[..., evictions, tokens]`."""
    starts = _evictions(maps.shape[-1], max_cache_size, evict_every)
    between = torch.stack([maps[..., start : start + evict_every, :].sum(-2) for start in starts], -2)
    return between.flip(-2).cumsum(-2).flip(-2)


def bound(maps, max_cache_size, num_sinks=4, recent_window=16, evict_every=16):
    """Share of the full cache's attention that no choice of tokens can exceed: `maps.shape[:-2]`.

    For the queries between two evictions, the best set of `max_cache_size` tokens (sinks and recent window among them) for
    just these queries, as if nothing had been evicted before, and the tokens that arrive. Mean over the queries from the
    first eviction on.
    """
    tokens, held = maps.shape[-1], 0
    starts = _evictions(tokens, max_cache_size, evict_every)
    for start in starts:
        mass = maps[..., start : start + evict_every, :].sum(-2)
        free = max_cache_size - num_sinks - recent_window
        best = mass[..., num_sinks : start - recent_window].topk(free, sorted=False).values.sum(-1)
        held = held + mass[..., :num_sinks].sum(-1) + best + mass[..., start - recent_window :].sum(-1)
    return held / (tokens - starts[0])


@torch.no_grad()
def compare(model, input_ids, maps, policies, max_cache_size, evict_every=16, **protection):
    """Feeds texts to a model whose cache evicts, and says how much of the full cache's attention falls on what it holds.

    input_ids: `[batch, tokens]`, no padding; maps: their `attention_maps`; policies: a policy, or one per layer. Returns,
    over the queries from the first eviction on, "retained" `[layers, batch]`, mean over KV heads, and "nll" `[batch]`,
    nats per token that they predict. Raises ValueError for a text that is too short for an eviction.
    """
    tokens, layers = input_ids.shape[1], len(maps)
    starts = _evictions(tokens, max_cache_size, evict_every)
    if not starts or starts[0] >= tokens - 1:
        raise ValueError(
            f"{tokens} tokens never fill a cache of {max_cache_size} that evicts every {evict_every}: take longer texts "
            "or a smaller max_cache_size"
        )
    protection |= {"max_cache_size": max_cache_size, "evict_every": evict_every}
    cache = make_cache(model.config, policies, **protection)
    model(input_ids[:, : starts[0]], past_key_values=cache, use_cache=True, logits_to_keep=1)
    retained = torch.zeros(layers, len(input_ids), device=input_ids.device)
    nll = torch.zeros(len(input_ids), device=input_ids.device)
    for start in starts:  # the text of one step arrives at once: it ends where the cache evicts
        now = slice(start, min(start + evict_every, tokens))
        if now.start == now.stop:
            break
        before = [layer.slots["positions"].long() for layer in cache.layers]
        logits = model(input_ids[:, now], past_key_values=cache, use_cache=True).logits
        targets = input_ids[:, now.start + 1 : now.stop + 1]
        predicted = logits[:, : targets.shape[1]].float().transpose(1, 2)
        nll += torch.nn.functional.cross_entropy(predicted, targets, reduction="none").sum(1)
        for index, held in enumerate(before):
            full = maps[index][:, :, now]
            old = full.gather(-1, held[:, :, None].expand(*full.shape[:3], -1)).sum(-1)
            retained[index] += (old + full[..., now].sum(-1)).mean(1).sum(-1)
    assert cache.evicted_tokens > 0
    return {
        "retained": (retained / (tokens - starts[0])).cpu(),
        "nll": (nll / (tokens - starts[0] - 1)).cpu(),
    }


def survey(model, docs, policies, max_cache_size, evict_every, sinks=4, recent=16, batch=4):
    """Two DataFrames, `CURVES` and `KEPT`: how few tokens hold the attention, and what each of `policies` (name to policy)
    and the "oracle" keep of it under the same protection."""
    curves: list[tuple] = []
    rows: list[tuple] = []
    first = max_cache_size + evict_every
    for start in range(0, len(docs.names), batch):
        ids, names = docs.input_ids[start : start + batch].to(model.device), docs.names[start : start + batch]
        maps = attention_maps(model, ids)
        for way, mass in mass_curves(maps).items():
            curves += [
                (name, layer, way, share, mass[layer, row, :, i].mean().item())
                for row, name in enumerate(names)
                for layer in range(len(maps))
                for i, share in enumerate(SHARES)
            ]
        best = bound(maps, max_cache_size, sinks, recent, evict_every).mean((0, -1)).tolist()
        full = score(model, ids)[:, first:].mean(1).tolist()
        knowing = [Oracle(layer) for layer in future_mass(maps, max_cache_size, evict_every)]
        for policy, chosen in (policies | {"oracle": knowing}).items():
            protection = dict(num_sinks=sinks, recent_window=recent)
            found = compare(model, ids, maps, chosen, max_cache_size, evict_every, **protection)
            kept = found["retained"].mean(0).tolist()
            losses = [nll - whole for nll, whole in zip(found["nll"].tolist(), full)]
            rows += zip(names, [policy] * len(names), kept, best, losses)
    return pd.DataFrame(curves, columns=list(CURVES)), pd.DataFrame(rows, columns=list(KEPT))
