"""An oracle for any causal model that does not share our attention: the model's own eager attention under a mask.

The model runs without a cache. Before each attention module its mask is replaced: where a token may not be seen, the
mask says so; where the model itself hides a token (the future, what lies outside a window), the token stays hidden.
"""

import inspect
from contextlib import contextmanager

import torch

MASK = "attention_mask"


def attention_modules(model):
    """(layer, module) of every attention module: the innermost ones that know their layer and take a mask."""
    takes = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and MASK in inspect.signature(module.forward).parameters
    ]
    inner = [module for module in takes if not any(other in takes for other in list(module.modules())[1:])]
    return [(module.layer_idx, module) for module in inner]


def _hide(mask, visible, heads):
    """`mask` with everything hidden that `visible` does not show.

    mask: additive or bool `[batch, 1 or heads, n, n]`, or None.
    visible: bool `[batch, num_kv_heads, n, n]`.
    heads: query heads.
    """
    if visible.shape[1] < heads:
        visible = visible.repeat_interleave(heads // visible.shape[1], 1)
    if mask is None:
        mask = torch.zeros((), dtype=torch.float32)
    if mask.dtype == torch.bool:
        return mask & visible
    return torch.where(visible, mask, torch.finfo(mask.dtype).min)


@contextmanager
def masked(model, visible):
    """Within it each layer of `model` sees what `visible[layer]` shows (bool `[batch, num_kv_heads, n, n]`) alone."""
    handles, previous = [], model.config._attn_implementation
    touched = set()

    def hook(layer, module):
        signature = inspect.signature(module.forward)
        config = getattr(module, "config", model.config).get_text_config(decoder=True)
        heads = getattr(module, "num_heads", None) or config.num_attention_heads

        def replace(module, args, kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.arguments[MASK] = _hide(bound.arguments.get(MASK), visible[layer], heads)
            touched.add(layer)
            return bound.args, bound.kwargs

        return module.register_forward_pre_hook(replace, with_kwargs=True)

    try:
        model.set_attn_implementation("eager")
        handles = [hook(layer, module) for layer, module in attention_modules(model)]
        yield
        missed = set(range(len(visible))) - touched
        if missed:
            raise AssertionError(f"no attention module of layers {sorted(missed)} took a mask")
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(previous)


@torch.no_grad()
def masked_logits(model, input_ids, visible):
    """Logits `[batch, tokens, vocabulary]` of the model without a cache, each layer masked by `visible`."""
    with masked(model, visible):
        return model(input_ids, use_cache=False).logits


def causal(batch, heads, count):
    """What every token sees of a whole text: bool `[batch, heads, count, count]`."""
    return torch.ones(count, count, dtype=torch.bool).tril().expand(batch, heads, count, count).clone()
