"""Whether a prompt goes on with the text that a cache holds.

`model.generate` with a used cache cuts off as many tokens as the cache has seen, whatever they are: a prompt that is longer
and begins otherwise would be continued from another text without a word.
"""

import inspect
from functools import partial
from typing import Any

import torch

from sketchkv.cache import SketchCache
from sketchkv.checks import digest
from sketchkv.devices import compiled_call, records

NAME = "prepare_inputs_for_generation"


class Prepare:
    """Takes the place of a model's `prepare_inputs_for_generation`, which sees the prompt whole, and looks at it first."""

    def __init__(self, model):
        self.model = model

    @property
    def own(self):
        return getattr(type(self.model), NAME).__get__(self.model)

    @property
    def __signature__(self):
        return inspect.signature(self.own)

    def __call__(self, input_ids, *args, **kwargs):
        cache = kwargs.get("past_key_values")
        # A pass that broke off is told when the next one begins.
        if isinstance(cache, SketchCache) and kwargs.get("is_first_iteration") and not cache.passes.torn():
            held: Any = cache.passes.digest()
            seen = cache.seen_tokens
            whole = input_ids is not None and kwargs.get("inputs_embeds") is None
            mask = kwargs.get("attention_mask")  # of new tokens alone, it covers those that were seen, too
            covers = mask.shape[-1] if isinstance(mask, torch.Tensor) else 0
            if whole and seen >= max(input_ids.shape[1], covers) > 0:
                raise ValueError(
                    f"the cache holds {seen} tokens, and this prompt of {input_ids.shape[1]} has nothing new: "
                    "call cache.reset() before a new text, or use a new cache"
                )
            if whole and held is not None and 0 < seen < input_ids.shape[1]:
                told = digest(input_ids[:, :seen])
                if told.shape != held.shape:
                    raise ValueError(
                        f"the cache holds {held.shape[0]} rows, and this prompt with its beams has {told.shape[0]}: "
                        "call cache.reset() and begin with all rows, or use a new cache"
                    )
                if not torch.equal(told, held.to(told.device)):
                    raise ValueError(
                        f"the cache holds {seen} tokens of another text than this prompt begins with: "
                        "call cache.reset() before a new text, or use a new cache"
                    )
        return self.own(input_ids, *args, **kwargs)


def in_less_time(model, given, config):
    """In place of `model._valid_auto_compile_criteria`: whether steps with these arguments, `given`, are to be recorded or
    compiled. The cache itself does not say that it can be compiled: transformers would make masks as for a static one."""
    if not isinstance(given.get("past_key_values"), SketchCache):
        return type(model)._valid_auto_compile_criteria(model, given, config)
    asked, weights = config.compile_config, getattr(model, "hf_quantizer", None)
    everywhere = asked is not None and asked._compile_all_devices
    can_be = not config.disable_compile and getattr(weights, "is_compileable", True)
    return can_be and (records(model.device) or everywhere)


def watch(model):
    """Puts `Prepare` in its place, and how `model.generate` comes to faster steps, once."""
    if hasattr(model, NAME) and NAME not in vars(model):
        setattr(model, NAME, Prepare(model))
        model._valid_auto_compile_criteria = partial(in_less_time, model)
        model.get_compiled_call = partial(compiled_call, model)


def unwatch(model):
    """Takes `watch` back."""
    if isinstance(vars(model).get(NAME), Prepare):
        delattr(model, NAME)
        del model.get_compiled_call, model._valid_auto_compile_criteria
