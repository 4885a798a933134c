"""Where the attention of a trained model goes, and how much of it each eviction policy keeps.

Maps are attention probabilities `[..., queries, tokens]` of the full cache, each query's row summing to 1.
"""

import re

import torch

from sketchkv.policies import Policy
from sketchkv.study.methods import make_cache

# -- distributions ----------------------------------------------------------------------------------------------------


def spread(maps, sinks=4, recent=16, skip=128):
    """How each head spreads the attention of its queries from token `skip` on, `[..., heads]` each.

    "sinks": share on the first `sinks` tokens; "recent": share on the newest `recent` tokens, the query's own included;
    "rest": the share in between, which is all that an eviction policy decides about; "effective": tokens that hold the
    attention, e to the power of its entropy.
    """
    late = maps[..., skip:, :]
    first = late[..., :sinks].sum(-1).mean(-1)
    newest = late.triu(skip - recent + 1).sum(-1).mean(-1)
    entropy = -torch.xlogy(late, late).sum(-1)
    return {"sinks": first, "recent": newest, "rest": 1 - first - newest, "effective": entropy.exp().mean(-1)}


def mass_curves(maps, shares, sinks=4, every=8):
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


def persistence(maps, share=0.1, block=64, sinks=4, first=4):
    """How long heavy hitters stay heavy: {lag in tokens: overlap `[..., heads]`}.

    The overlap is the share of the `share` most attended tokens of a block of `block` queries that are among the most
    attended of the block `lag` tokens later too, both chosen among the tokens before the earlier block, `sinks` aside;
    mean over the blocks from number `first` on. Sets that have nothing to do with each other overlap by `share`.
    """
    blocks = maps.shape[-2] // block
    mass = maps[..., : blocks * block, :].unflatten(-2, (blocks, block)).sum(-2)
    overlaps: dict[int, list] = {}
    for earlier in range(first, blocks - 1):
        old = mass[..., earlier:, sinks : earlier * block]
        top = old.topk(max(1, round(share * old.shape[-1])), sorted=False).indices
        member = torch.zeros_like(old).scatter_(-1, top, 1.0)
        common = (member[..., 1:, :] * member[..., :1, :]).sum(-1) / top.shape[-1]
        for lag in range(common.shape[-1]):
            overlaps.setdefault((lag + 1) * block, []).append(common[..., lag])
    return {lag: torch.stack(values).mean(0) for lag, values in sorted(overlaps.items())}


def reach(maps, ages, sinks=4):
    """Share of the attention beyond the sinks that the second half's queries give to tokens of at most each age (the
    query's own token has age 1): `[..., heads, len(ages)]`."""
    tokens = maps.shape[-1]
    query = torch.arange(tokens // 2, tokens, device=maps.device)
    late = maps[..., tokens // 2 :, :].clone()
    late[..., :sinks] = 0
    summed = torch.nn.functional.pad(late.cumsum(-1), (1, 0))  # mass before each position
    within = []
    for age in ages:
        before = (query + 1 - age).clamp(min=0)[:, None].expand(*late.shape[:-1], 1)
        within.append(summed[..., -1] - summed.gather(-1, before).squeeze(-1))
    return torch.stack(within, -1).sum(-2) / summed[..., -1].sum(-1)[..., None]


# -- token classes ----------------------------------------------------------------------------------------------------

# The first pattern that a token's text matches whole names its class.
_PATTERNS = {
    "line break": r"[\s\S]*\n[\s\S]*",
    "blank": r"\s*",
    "number": r"\s*\d[\d.,_]*",
    "word": r"\s+\w+",
    "piece": r"\w*[^\W_]\w*",
    "quote": r"""[^\w]*["'`][^\w]*""",
    "bracket": r"[^\w]*[()\[\]{}][^\w]*",
    "punctuation": r"[\W_]+",
    "other": r"[\s\S]*",
}
CLASSES = ("special", "keyword", *_PATTERNS)


def token_classes(tokenizer, keywords=()):
    """Class of every token id by its text, int64 `[vocabulary]`, an index into `CLASSES`.

    keywords: words that are a class of their own (`keyword.kwlist` for Python source; none for prose, where "in" and "is"
    mean something else). A "word" has a blank before it; a "piece" has none: it goes on with a word, or follows
    punctuation. A token with a line break counts as that, then quotes before brackets before other punctuation; bytes that
    are no text alone are "other".
    """
    texts = tokenizer.batch_decode(
        [[index] for index in range(len(tokenizer))], clean_up_tokenization_spaces=False
    )
    special, keywords = set(tokenizer.all_special_ids), set(keywords)

    def name(index, text):
        if index in special:
            return "special"
        if text.strip() in keywords:
            return "keyword"
        if "\ufffd" in text:
            return "other"
        return next(name for name, pattern in _PATTERNS.items() if re.fullmatch(pattern, text))

    return torch.tensor([CLASSES.index(name(index, text)) for index, text in enumerate(texts)])


def class_shares(maps, classes, sinks=4, recent=16, skip=128):
    """What each class of token gets of the attention that a policy decides about: older than `recent`, no sink.

    classes: int64 `[tokens]`, class of each token of the text. Returns (attention `[..., heads, len(CLASSES)]`, tokens
    `[len(CLASSES)]`): shares of the attention, and of the tokens that it could have gone to; both sum to 1.
    """
    count = maps.shape[-1]
    position = torch.arange(count, device=maps.device)
    mass = maps[..., skip:, :].tril(skip - recent).sum(-2)
    exposed = (count - (position + recent).clamp(min=skip)).clamp(min=0).to(maps.dtype)
    mass[..., :sinks], exposed[:sinks] = 0, 0
    member = (classes[:, None] == torch.arange(len(CLASSES), device=classes.device)).to(maps)
    return mass @ member / mass.sum(-1, keepdim=True), exposed @ member / exposed.sum()


# -- what policies keep -----------------------------------------------------------------------------------------------


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
        queries = maps[..., start : start + evict_every, :]
        mass = queries.sum(-2)
        chosen = mass[..., num_sinks : start - recent_window].topk(
            max_cache_size - num_sinks - recent_window, sorted=False
        )
        held = (
            held
            + mass[..., :num_sinks].sum(-1)
            + chosen.values.sum(-1)
            + mass[..., start - recent_window :].sum(-1)
        )
    return held / (tokens - starts[0])


class _Watched(Policy):
    """A policy that also notes the attention of the newest queries and the tokens it fell on."""

    uses_attention = True

    def __init__(self, policy):
        self.policy = policy

    def allocate(self, slots):
        self.policy.layer = self.layer
        self.policy.allocate(slots)

    def enter(self, slots, new, token_ids):
        self.policy.enter(slots, new, token_ids)

    def observe(self, slots, attention):
        self.positions, self.attention = slots["positions"].long(), attention
        if self.policy.uses_attention:
            self.policy.observe(slots, attention)

    def score(self, slots, seen):
        return self.policy.score(slots, seen)

    def tensors(self):
        return self.policy.tensors()


@torch.no_grad()
def compare(model, input_ids, maps, policies, max_cache_size, evict_every=16, **protection):
    """Feeds texts to a model whose cache evicts, and compares its attention with the full cache's, query by query.

    input_ids: `[batch, tokens]`, no padding; maps: their `attention_maps`; policies: a policy, or one per layer.
    Returns means over KV heads and over the queries from the first eviction on, `[layers, batch]` each: "retained", share
    of the full cache's attention that falls on tokens still held; "kl", of the compressed attention from the full one,
    nats (the other way it is infinite as soon as anything was evicted); "cosine" of the two; and "nll" `[batch]`, nats per
    token predicted by those queries.

    Raises ValueError for a text that is too short for an eviction.
    """
    tokens, layers = input_ids.shape[1], len(maps)
    starts = _evictions(tokens, max_cache_size, evict_every)
    if not starts or starts[0] >= tokens - 1:
        raise ValueError(
            f"{tokens} tokens never fill a cache of {max_cache_size} that evicts every {evict_every}: take longer texts "
            "or a smaller max_cache_size"
        )
    policies = policies if isinstance(policies, (list, tuple)) else [policies] * layers
    watched = [_Watched(policy) for policy in policies]
    cache = make_cache(
        model.config, watched, max_cache_size=max_cache_size, evict_every=evict_every, **protection
    )
    model(input_ids[:, : starts[0]], past_key_values=cache, use_cache=True, logits_to_keep=1)
    sums = torch.zeros(3, layers, len(input_ids), device=input_ids.device)
    nll = torch.zeros(len(input_ids), device=input_ids.device)
    for start in starts:  # the text of one step arrives at once: it ends where the cache evicts
        now = slice(start, min(start + evict_every, tokens))
        if now.start == now.stop:
            break
        logits = model(input_ids[:, now], past_key_values=cache, use_cache=True).logits
        targets = input_ids[:, now.start + 1 : now.stop + 1]
        predicted = logits[:, : targets.shape[1]].float().transpose(1, 2)
        nll += torch.nn.functional.cross_entropy(predicted, targets, reduction="none").sum(1)
        for index, layer in enumerate(cache.layers):
            full = maps[index][:, :, now]
            ours = (
                layer.policy.attention / layer.policy.attention[0, 0, 0].sum()
            )  # summed over the group's heads
            same = full.gather(-1, layer.policy.positions[:, :, None].expand_as(ours))
            kl = (torch.xlogy(ours, ours) - torch.xlogy(ours, same.clamp(min=1e-30))).sum(-1)
            cosine = (ours * same).sum(-1) / (ours.norm(dim=-1) * full.norm(dim=-1))
            sums[:, index] += torch.stack([x.mean(1).sum(-1) for x in (same.sum(-1), kl, cosine)])
    assert cache.evicted_tokens > 0
    retained, kl, cosine = (sums / (tokens - starts[0])).cpu()
    return {"retained": retained, "kl": kl, "cosine": cosine, "nll": (nll / (tokens - starts[0] - 1)).cpu()}
