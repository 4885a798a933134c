"""How an enabled model attends: what stands between a transformers model and a `SketchCache`.

Nothing of a pass is kept on the model, so passes may run side by side: hooks announce a pass to the cache that it was given,
the cache marks the keys that it returns, and the attention function that sees the mark asks the layer behind it.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch

from sketchkv.cache import SketchCache
from sketchkv.logits import Form
from sketchkv.support import layer_windows, own_attention, refuse_pass, text_config

PREFIX = "sketchkv_"  # before the name of a model's own attention implementation, where it is enabled
HARMLESS = {"position_ids", "use_cache", "cache_position"}  # arguments that change no attention
USED = object()  # the mark of keys that a layer has attended to


def attention(module, query, key, value, attention_mask, *, scaling=None, softcap=None, s_aux=None, **kwargs):
    """The attention function of an enabled model: the bounded one for keys that come from a `SketchCache`, the model's own
    for all others."""
    instead: Any = kwargs.pop("sketchkv_attend", None)
    visit: Any = getattr(key, "_sketchkv", None)
    if visit is None and instead is None:
        given = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        given = {name: each for name, each in given.items() if each is not None}
        return own_attention(module, PREFIX)(module, query, key, value, attention_mask, **given, **kwargs)
    unknown = [name for name, given in kwargs.items() if name not in HARMLESS and _matters(given)]
    if unknown:
        hint = ": call model.eval()" if unknown == ["dropout"] else ""
        raise ValueError(
            f"{type(module).__name__} asks its attention for {unknown}, which a SketchCache can't give{hint}"
        )
    if visit is USED:
        raise ValueError(
            f"{type(module).__name__} attends twice with the same keys: a SketchCache can't tell the two apart"
        )
    value = value.to(key.dtype)  # which autocast may have cast alone
    form = Form(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    if instead is not None:
        return instead(query, key, value, form, module.layer_idx), None
    key._sketchkv = USED
    layer, tokens = visit
    told, brought = tokens.positions.shape[1], key.shape[2]
    if told != brought:
        raise ValueError(f"the pass was announced with {told} tokens and brings {brought}")
    with torch.no_grad(), torch.autocast(key.device.type, enabled=False):
        output = layer.ops.through(layer, query, key, value, tokens, form)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        output = _NoGradient.apply(output, query, key, value)
    return output.transpose(1, 2).contiguous(), None


class _NoGradient(torch.autograd.Function):
    """Passes attention's output on, and refuses to be differentiated: what was stored is overwritten by then."""

    @staticmethod
    def forward(ctx, output, *inputs):
        return output.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(
            "a SketchCache can't be trained through: train without past_key_values, or with another cache"
        )


def _matters(given):
    """Whether an argument of an attention function may change what is seen or how logits are formed: flags and sizes, such
    as the window that the layer knows, do not."""
    return isinstance(given, torch.Tensor) or (isinstance(given, float) and given != 0)


@lru_cache
def _names(kind):
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _given(module, args, kwargs):
    """The `SketchCache` that a forward pass is given, or None, and all that it is given, by name."""
    if torch.compiler.is_compiling():  # a compiled step announces itself
        return None, {}
    given = dict(zip(_names(module.__class__), args, strict=False)) | kwargs if args else kwargs
    cache = given.get("past_key_values")
    return cache if isinstance(cache, SketchCache) else None, given


def begin(module, args, kwargs):
    """Before the forward pass of a model: announces it to the `SketchCache` that it is given, if it is."""
    cache, given = _given(module, args, kwargs)
    if cache is None:
        return
    owners = [name for name, _ in cache.passes.owners]
    if not owners or id(module) in owners:  # not within another's pass: none is under way, or one broke off
        if given.get("use_cache") is False:
            raise ValueError("use_cache=False and a SketchCache exclude each other: leave one of them out")
        if given.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise ValueError(
                "a SketchCache can't give attention maps, since layers hold other tokens: leave output_attentions out, "
                "or leave out the cache on a model with attn_implementation='eager'"
            )
        refuse_pass(module, given)
        _check_model(module.config, cache)
    ids = given.get("input_ids")
    inputs = given.get("inputs_embeds") if ids is None else ids
    if inputs is not None:  # without either, the model says so itself
        cache.passes.begin(inputs, ids, given.get("attention_mask"), given.get("position_ids"), module)


def _check_model(config, cache):
    if cache.passes.model is not config:  # looked at once: reading a configuration is slow
        text = text_config(config)
        both = cache.passes.windows, layer_windows(text)
        if both[0] != both[1]:
            told = [f"{len(each)} layers, windows {sorted(set(filter(None, each)))}" for each in both]
            raise ValueError(
                f"the cache is for {told[0]}, the model has {told[1]}: SketchCache(model.config, ...)"
            )
        cache.passes.model, cache.passes.text = config, text
    own = cache.passes.text._attn_implementation
    if not own.startswith(PREFIX):
        raise RuntimeError(
            f"the model's attention was set to {own!r} after enable(): call sketchkv.enable(model) again"
        )


def end(module, args, kwargs, output):
    """After a forward pass that went well."""
    cache, _ = _given(module, args, kwargs)
    if cache is not None and cache.passes.owners:
        cache.passes.end(module)
