"""Switches a transformers model to attention that knows `SketchCache`: `enable(model)`."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sketchkv.attention import PREFIX, attention, begin, end
from sketchkv.checks import told
from sketchkv.continued import unwatch, watch
from sketchkv.support import refusal, text_config


def enable(model):
    """Switches a decoder-only transformers model to attention that knows `SketchCache`; returns the model.

    Afterwards `model(...)` and `model.generate(...)` bound the cache when `past_key_values` is a `SketchCache`, and compute
    what they did before, with the model's own attention implementation, when it is not. Calling it twice does no harm;
    `disable` takes it back. A model may be wrapped (PEFT) before or after.

    Raises ValueError for a model that can't be bounded, with the reason, and TypeError for what is no model.
    """
    models = inner_models(model)
    top = models[0]
    config = text_config(top.config)
    reason = refusal(top, config)
    if reason:
        raise ValueError(f"enable() can't bound a {type(top).__name__}: {reason}")
    own = config._attn_implementation.removeprefix(PREFIX)
    name = PREFIX + own
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    _set_attention(top, config, name)
    if config._attn_implementation != name:
        raise ValueError(
            f"enable() can't bound a {type(top).__name__}: its attention function can't be replaced"
        )
    watch(top)
    for each in models:
        if begin not in each._forward_pre_hooks.values():
            each.register_forward_pre_hook(begin, with_kwargs=True)
            each.register_forward_hook(end, with_kwargs=True)
    return model


def disable(model):
    """Takes `enable` back: hooks removed, the former attention restored; returns the model."""
    models = inner_models(model)
    unwatch(models[0])
    for each in models:
        for hooks, ours, marks in (
            (each._forward_pre_hooks, begin, each._forward_pre_hooks_with_kwargs),
            (each._forward_hooks, end, each._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                marks.pop(key, None)
    config = text_config(models[0].config)
    if config._attn_implementation.startswith(PREFIX):
        _set_attention(models[0], config, config._attn_implementation.removeprefix(PREFIX))
    return model


def is_enabled(model):
    """Whether `enable` was called for the model and not taken back."""
    return text_config(inner_models(model)[0].config)._attn_implementation.startswith(PREFIX)


def inner_models(model):
    """The transformers model in `model`, which may be wrapped, and the models inside of it, from the outside in."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    models = [module for module in modules if isinstance(module, PreTrainedModel)]
    if not models:
        raise TypeError(
            f"enable() takes a transformers model, such as AutoModelForCausalLM gives; got {told(model)}"
        )
    return models


def _set_attention(model, config, name):
    names = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
    model.set_attn_implementation({names[0]: name} if names else name)
