"""What a head loses with the tail: the error of its attention output, against its bound.

Attention of one query over the tokens before it is a mean of their values, weighted by p. Let the cache hold the tokens S
and have lost the tail D, n tokens of mass m = p(D). Let a, b be the means of the values of S and D weighted by p, and v, k
the plain means of the values and keys of D. The full output is

    o = (1 - m) a + m b.

**Dropping** the tail gives a, so the error is m (b - a), of which b - v is due to the tail's own spread:

    |o - a| = m |b - a| <= m (|b - v| + |v - a|).

**Folding** it into one slot with key k, value v and weight n gives (1 - m') a + m' v. The logit of the mean key is the mean
logit, so m' is the mass that the tail would have if all its logits were equal: too little, by Jensen's inequality. With
J >= 0 the logarithm of (mean of the exponentials of the tail's logits / exponential of their mean), e^-J m (1 - m') =
m' (1 - m), hence m - m' = m (1 - m') (1 - e^-J), and

    |o - folded| = |m (b - v) + (m - m') (v - a)| <= m (|b - v| + (1 - m') (1 - e^-J) |v - a|).

**The tail's own spread.** b - v is the covariance, over the tail, of its values with its weights x = exp(logit) / their
mean: by Cauchy and Schwarz |b - v| <= c s, c the standard deviation of x and s the root mean square distance of the tail's
values from v. And b is a mean of these values: |b - v| <= R, the largest such distance. So, with w = min(c s, R),

    dropping: m (w + |v - a|)        folding: m (w + (1 - m') (1 - e^-J) |v - a|)

Folding is exact for a tail of equal keys (c = J = 0); it never has the larger bound; and what the right mass
alone would not mend is w: that some of the lost tokens were the ones that mattered. A range r of the tail's logits bounds
both: c <= sinh(r / 2) (Bhatia & Davis 2000) and J <= r^2 / 8 (Hoeffding 1963).
"""

import torch

from sketchkv import AttentionMass, Policy, Sketch, score
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.study.attention_analysis import Oracle, attention_maps, future_mass, spread
from sketchkv.study.methods import make_cache
from sketchkv.study.why import EVERY, _nll, _texts


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


def tail_error(query, key, value, visible):
    """What losing the tail does to the attention output, measured and bounded as this file's docstring has it.

    query: `[batch, num_heads, tokens, head_dim]`; key, value: `[batch, num_kv_heads, tokens, head_dim]`; visible: bool
    `[batch, num_kv_heads, tokens, tokens]`, tokens that each query still sees, itself among them. Returns a dict of
    `[batch, num_heads, tokens]`: "norm" of the full output; "mass" and "range" (of the logits) of the tail; the errors
    "dropped", "folded" and "weighed", which is folded into a slot that gets the tail's true mass; and the bounds
    "bound_dropped" and "bound_folded". All are zero for a query that lost nothing, but "norm".
    """
    group = query.shape[1] // key.shape[1]
    key, value, visible = (x.repeat_interleave(group, 1) for x in (key, value, visible))
    causal = torch.ones(visible.shape[-2:], dtype=torch.bool, device=visible.device).tril()
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    total = logits.masked_fill(~causal, -torch.inf).logsumexp(-1, keepdim=True)
    tail = causal & ~visible
    count = tail.sum(-1, keepdim=True).clamp(min=1)
    p = (logits - total).exp()
    held, lost = p * (causal & visible), p * tail
    kept, mass = held.sum(-1, keepdim=True), lost.sum(-1, keepdim=True)
    tiny = torch.finfo(p.dtype).tiny
    a, b = held @ value / kept.clamp(min=tiny), lost @ value / mass.clamp(min=tiny)
    plain = tail.to(p.dtype) / count
    v = plain @ value
    folded = (
        ((logits * plain).sum(-1, keepdim=True) - total).exp() * count * (mass > 0)
    )  # its weight beside `kept`
    share = folded / (kept + folded)
    output = kept * a + mass * b

    deviation = (
        (plain @ value.square().sum(-1, keepdim=True) - v.square().sum(-1, keepdim=True)).clamp(min=0).sqrt()
    )
    uneven = (count * (lost / mass.clamp(min=tiny)).square().sum(-1, keepdim=True) - 1).clamp(min=0).sqrt()
    apart, jensen = (v - a).norm(dim=-1, keepdim=True), (1 - folded / mass.clamp(min=tiny)).clamp(min=0)
    squares = (
        value.square().sum(-1)[:, :, None]
        - 2 * v @ value.transpose(-1, -2)
        + v.square().sum(-1, keepdim=True)
    )
    furthest = (squares * tail).amax(-1, keepdim=True).clamp(min=0).sqrt()
    within, error = torch.minimum(uneven * deviation, furthest), lambda found: (output - found).norm(dim=-1)
    extent = logits.masked_fill(~tail, -torch.inf).amax(-1) - logits.masked_fill(~tail, torch.inf).amin(-1)
    return {
        "norm": output.norm(dim=-1),
        "mass": mass[..., 0],
        "range": extent.clamp(min=0),
        "dropped": error(a),
        "folded": error((1 - share) * a + share * v),
        "weighed": error(kept * a + mass * v),
        "bound_dropped": (mass * (within + apart))[..., 0],
        "bound_folded": (mass * (within + (1 - share) * jensen * apart))[..., 0],
    }


ERRORS = ("dropped", "folded", "weighed", "bound_dropped", "bound_folded")
ERROR_COLUMNS = {
    "document": "held-out file",
    "policy": "who chose what to evict",
    "layer": "index of the layer",
    "head": "index of the query head",
    "mass": "share of the attention that fell on evicted tokens, mean over queries",
    "dropped": "error of the attention output if the tail is dropped, relative to its norm (root mean squares over queries)",
    "folded": "the same if the tail is folded into its mean, with log count in the logit",
    "weighed": "the same if that mean gets the tail's true mass",
    "bound_dropped": "bound of dropped, relative to the same norm",
    "bound_folded": "bound of folded, relative to the same norm",
    "slack": "the largest (error - bound) / norm of the output over all queries, dropped and folded: not above 0 but for rounding",
}
ALONE_COLUMNS = {
    "document": "held-out file",
    "layer": "index of the layer that is bounded, -1: all of them",
    "head": "index of the KV head that is bounded, -1: all of the layer",
    "nll": "nats per token with everything else full",
    "nll_full": "the same with the full cache",
    "loss": "nll - nll_full",
}
LOOKS = ("sinks", "recent", "effective")
LOOK_COLUMNS = {
    "document": "held-out file",
    "layer": "index of the layer",
    "head": "index of the KV head",
    "sinks": "share of its attention on the first 4 tokens",
    "recent": "share on the newest 16",
    "effective": "tokens that hold its attention, e to the power of its entropy",
}


def alone(model, input_ids, visible):
    """Nats per token when a single part of the cache is bounded and all else is full: rows of (layer, head, nll `[batch]`),
    layer and head -1 standing for all. visible: what each query sees in each layer (`decode_and_watch`)."""
    causal = torch.ones(visible[0].shape[-2:], dtype=torch.bool, device=input_ids.device).tril()
    rows = [(-1, -1, _nll(full_cache_logits(model, input_ids, visible), input_ids))]
    for layer, seen in enumerate(visible):
        for head in range(-1, seen.shape[1]):
            one = seen if head < 0 else causal.expand_as(seen).clone()
            if head >= 0:
                one[:, head] = seen[:, head]
            masks = [one if i == layer else None for i in range(len(visible))]
            rows.append((layer, head, _nll(full_cache_logits(model, input_ids, masks), input_ids)))
    return rows


@torch.no_grad()
def heads(
    slots,
    *,
    text,
    first,
    documents,
    length,
    seed=0,
    model="embedded",
    dataset="embedded",
    device="cpu",
    split="test",
):
    """A grid point: {"errors": rows (`ERROR_COLUMNS`), "alone": rows (`ALONE_COLUMNS`), "looks": rows (`LOOK_COLUMNS`)} on the
    `documents` documents from number `first` on.

    Errors are of the full cache's queries, over what the bounded cache of each policy had kept when they came; queries from
    the first eviction on. What is bounded alone keeps what it kept when all was bounded, by exact scores. `slots` must be a multiple of `EVERY`.
    """
    lm, ids, names = _texts(model, dataset, device, split, first, documents, length)
    assert slots % EVERY == 0 and length > slots + EVERY, (
        "evictions must fall between the steps, and there must be some"
    )
    maps = attention_maps(lm, ids)
    policies = {
        "sketch": Sketch(seed=seed),
        "decayed": AttentionMass(),
        "oracle": [Oracle(layer) for layer in future_mass(maps, slots, EVERY)],
    }
    looks = {key: x.tolist() for key, x in spread(maps, skip=slots + EVERY).items()}
    full, known = score(lm, ids).mean(1).tolist(), states(lm, ids)
    found: dict[str, list] = {"errors": [], "alone": []}
    found["looks"] = [
        {"document": name, "layer": layer, "head": head, **{key: looks[key][layer][i][head] for key in LOOKS}}
        for i, name in enumerate(names)
        for layer in range(len(maps))
        for head in range(maps.shape[2])
    ]
    del maps
    for policy, chosen in policies.items():
        cache = make_cache(lm.config, chosen, max_cache_size=slots)
        logits, visible = decode_and_watch(lm, ids, cache, chunk_size=EVERY)
        for layer, ((query, key, value), seen) in enumerate(zip(known, visible)):
            errors = tail_error(query, key, value, seen)
            part = {name: x[..., slots + EVERY :] for name, x in errors.items()}
            size = part["norm"].square().sum(-1).sqrt()
            relative = {key: (part[key].square().sum(-1).sqrt() / size).tolist() for key in ERRORS}
            over = [(part[key] - part[f"bound_{key}"]) / part["norm"] for key in ("dropped", "folded")]
            slack, mass = torch.maximum(*over).amax(-1).tolist(), part["mass"].mean(-1).tolist()
            found["errors"] += [
                {
                    "document": name,
                    "policy": policy,
                    "layer": layer,
                    "head": head,
                    "mass": mass[i][head],
                    **{key: relative[key][i][head] for key in ERRORS},
                    "slack": slack[i][head],
                }
                for i, name in enumerate(names)
                for head in range(len(mass[i]))
            ]
        if policy == "decayed":
            found["alone"] = [
                {
                    "document": name,
                    "layer": layer,
                    "head": head,
                    "nll": nll,
                    "nll_full": whole,
                    "loss": nll - whole,
                }
                for layer, head, each in alone(lm, ids, visible)
                for name, nll, whole in zip(names, each.tolist(), full)
            ]
            direct = _nll(logits, ids).tolist()
            assert max(abs(row["nll"] - nll) for row, nll in zip(found["alone"], direct)) < 1e-3, (
                "masked is not evicted"
            )
    return found


KINDS = {"sink": "S", "recent": "R", "narrow": "N", "broad": "B"}  # letters in the figure


def head_kind(sinks, recent, effective, slots):
    """What a head looks at, from `attention_analysis.spread`: "sink" or "recent" where these hold more than half of its
    attention; else "narrow" or "broad", by whether its attention is spread over no more tokens than the cache holds."""
    if max(sinks, recent) > 0.5:
        return "sink" if sinks > recent else "recent"
    return "narrow" if effective <= slots else "broad"
