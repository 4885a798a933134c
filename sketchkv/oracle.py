"""The oracle: a bounded cache must equal a full one in which exactly the evicted tokens are masked out."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface

NAME = "sketchkv_oracle"


@torch.no_grad()
def decode_and_watch(model, input_ids, cache, attention_mask=None):
    """Feeds `input_ids` `[batch, tokens]` (padded on the left where `attention_mask` is 0) token by token and writes
    down what each token could see.

    Returns logits `[batch, tokens, vocabulary]` and, per layer, visible: bool `[batch, num_kv_heads, tokens, tokens]`,
    from `cache.kept_positions` between the steps: query t sees the tokens kept before step t, and itself.
    """
    logits, visible, total = [], [], input_ids.shape[1]
    for step in range(total):
        for layer in range(len(cache.layers)) if step else ():
            kept = cache.kept_positions(layer)
            seen = torch.zeros(*kept.shape[:2], total + 1, dtype=torch.bool, device=kept.device)
            seen.scatter_(-1, kept.where(kept >= 0, total), True)  # empty slots mark a column that is dropped
            visible[layer][:, :, step] |= seen[..., :total]
        now = slice(step, step + 1)
        padding = _padding(attention_mask, now)
        logits.append(model(input_ids[:, now], past_key_values=cache, use_cache=True, **padding).logits)
        if not step:
            for layer in range(len(cache.layers)):
                shape = cache.kept_positions(layer).shape[:2]
                own = torch.eye(total, dtype=torch.bool, device=input_ids.device)
                visible.append(own.expand(*shape, total, total).clone())
    return torch.cat(logits, 1), visible


def _padding(attention_mask, now):
    """Mask and positions of the tokens `now` in a batch padded on the left."""
    if attention_mask is None:
        return {}
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask[:, : now.stop], "position_ids": positions[:, now]}


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    visible = module._sketchkv_visible[module.layer_idx]
    group = query.shape[1] // key.shape[1]
    key, value, visible = (x.repeat_interleave(group, 1) for x in (key, value, visible))
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.float().masked_fill(~visible, -torch.inf).softmax(-1).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, _attention)


@contextmanager
def _masked(model, visible):
    previous = model.config._attn_implementation
    modules = [module for module in model.base_model.modules() if hasattr(module, "layer_idx")]
    try:
        model.set_attn_implementation(NAME)
        for module in modules:
            module._sketchkv_visible = visible
        yield
    finally:
        for module in modules:
            del module._sketchkv_visible
        model.set_attn_implementation(previous)


@torch.no_grad()
def full_cache_logits(model, input_ids, visible, attention_mask=None):
    """Logits `[batch, tokens, vocabulary]` of the plain model without any cache, each layer and KV head masked by
    `visible` (as `decode_and_watch` returns it)."""
    padding = _padding(attention_mask, slice(0, input_ids.shape[1]))
    with _masked(model, visible):
        return model(input_ids, use_cache=False, **padding).logits
