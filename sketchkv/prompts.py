"""Attention of many tokens at once, with few scores in memory."""

import torch
from torch.nn.functional import scaled_dot_product_attention

# Scores that are in memory at once while many tokens come, of all heads and sequences: what a CPU's cache holds, and on a GPU
# what is small beside the model. One query's scores always are.
SCORES = {"cpu": 2**20}
ON_OTHERS = 2**26


def attend(ops, layer, query, near, tokens, form):
    """What `sketchkv.ops.Eager.attend` gives for the last n slots, n above 1; near: what their codes lack (`sketchkv.ring`)."""
    slots, count = layer.slots, query.shape[2]
    keys, values = slots["keys"], slots["values"]
    flash = near is None and needs_no_scores(layer, tokens, form)
    if flash and count == slots.used:
        layer.policy.query(slots, query)
        return _flash(query, keys, values, form.scaling)
    # Blocks of queries, each of which finds the slots as they were when its tokens came: no query sees what lies beyond.
    scores = SCORES.get(query.device.type, ON_OTHERS)
    most, outputs = max(1, scores // (query.shape[:2].numel() * slots.used)), []
    before = slots.used - count
    for start in range(0, count, most):
        part = slice(start, min(start + most, count))
        slots.used = before + part.stop
        block = query[:, :, part], keys[:, :, : slots.used], values[:, :, : slots.used]
        if flash:
            layer.policy.query(slots, block[0])
            seen = torch.ones(part.stop - start, slots.used, dtype=torch.bool, device=query.device)
            outputs.append(_flash(*block, form.scaling, seen.tril_(before + start)))
        else:
            fine = near and near.part(part, slots.used)
            outputs.append(ops.weigh(layer, *block, tokens.part(part), form, fine))
    return torch.cat(outputs, 2)


def needs_no_scores(layer, tokens, form):
    """Whether the output is all that is asked for, and all heads and rows see the same slots."""
    asked = layer.policy.uses_attention or layer.summary or form.softcap is not None or form.sinks is not None
    return not (asked or tokens.padded or layer.is_sliding or (layer.selective and layer.evicted))


def _flash(query, keys, values, scaling, mask=None):
    """Attention by torch's kernels, which hold no scores; without a mask, queries and keys are of the same tokens."""
    if query.is_cuda:  # there the kernels that take a mask or float32 want a key for each query head
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    return scaled_dot_product_attention(
        query, keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=not query.is_cuda
    )
