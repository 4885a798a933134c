"""What the study must know about a model before it compresses its cache: use of context, sinks, heavy hitters."""

import torch

from sketchkv.study.evaluate import TOKENS
from sketchkv.switch import enable


@torch.no_grad()
def nll_by_context(model, input_ids, lengths, targets=64):
    """How much a longer context helps: the same tokens predicted from contexts of different length.

    input_ids: `[documents, tokens]`, tokens >= max(lengths). The last `targets` tokens of each document are predicted
    from a window that ends with it and holds `length` tokens, the document's first token (its BOS) moved to the front.
    Returns {length: nll}, nll float32 `[documents, targets]` in nats. Raises ValueError unless targets < every length.
    """
    if min(lengths) <= targets or max(lengths) > input_ids.shape[1]:
        raise ValueError(
            f"contexts must be longer than the {targets} targets and fit {input_ids.shape[1]} tokens: {lengths}"
        )
    found = {}
    for length in lengths:
        rows = []
        for ids in input_ids.split(max(1, TOKENS // length)):
            window = torch.cat([ids[:, :1], ids[:, -(length - 1) :]], 1).to(model.device)
            logits = model(window, use_cache=False, logits_to_keep=targets + 1).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), window[:, -targets:], reduction="none"
            )
            rows.append(nll.cpu())
        found[length] = torch.cat(rows)
    return found


@torch.no_grad()
def attention_maps(model, ids):
    """Attention of every layer for one document, `[layers, heads, tokens, tokens]`; the model stays enabled."""
    model.set_attn_implementation("eager")
    try:
        maps = model(ids[None].to(model.device), use_cache=False, output_attentions=True).attentions
    finally:
        enable(model)
    return torch.cat(maps).float().cpu()


def sink_mass(maps, sinks=4, skip=64):
    """Share of attention that later queries (from token `skip` on) give to the first `sinks` tokens: `[layers, heads]`."""
    return maps[:, :, skip:, :sinks].sum(-1).mean(-1)


def heavy_hitter_mass(maps, shares, sinks=4):
    """Share of all attention mass, sinks aside, that falls on the tokens that receive the most.

    maps: `[layers, heads, tokens, tokens]`; shares: fractions of tokens. A token's mass is averaged over the queries that
    could see it, so that early tokens do not win by age. Returns `[layers, heads, len(shares)]`.
    """
    tokens = maps.shape[-1]
    exposed = torch.arange(tokens, 0, -1)
    mass = (maps.sum(-2) / exposed)[
        ..., sinks : tokens * 7 // 8
    ]  # the last tokens were seen by too few queries
    ranked = mass.sort(-1, descending=True).values.cumsum(-1)
    ranks = [max(1, round(share * ranked.shape[-1])) - 1 for share in shares]
    return ranked[..., ranks] / ranked[..., -1:]
