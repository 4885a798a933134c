"""Which models can be bounded, and how their configurations are read."""

import inspect
import sys
from functools import lru_cache

# Models whose attention no attribute tells apart, and what is wrong with it.
REFUSED = {
    "jetmoe": "its keys are repeated for each expert after the cache has returned them",
    "moshi": "its window is that of the cache alone: transformers gives other logits in one pass than token by token",
}


def text_config(config):
    """The configuration of the decoder, of a configuration or a model. Raises TypeError for anything else."""
    config = getattr(config, "config", config)
    if isinstance(config, type) or not hasattr(config, "get_text_config"):
        raise TypeError(
            f"config must be a transformers configuration such as model.config, or a model; got {config!r}"
        )
    return config.get_text_config(decoder=True)


def layer_windows(config):
    """How many tokens the queries of each layer see: a list of int, None for all. Raises ValueError for layers that are no
    attention over the text or a window of it."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:  # as transformers' own caches read a configuration
        sliding = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown or (window is None and "sliding_attention" in kinds):
        raise ValueError(
            f"SketchCache bounds layers with full attention and with sliding windows, not {unknown or kinds}: "
            f"use transformers' own cache for this {type(config).__name__.removesuffix('Config')} model"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def refusal(model, config):
    """Why a model can't be bounded, or None."""
    try:
        layer_windows(config)
    except ValueError as error:
        return str(error)
    attention = [module for module in model.modules() if _is_attention(module)]
    causal = [module for module in attention if module.is_causal]
    reasons = [
        (REFUSED.get(config.model_type), config.model_type in REFUSED),
        (
            "it has cross-attention to an encoder or to pictures",
            getattr(model.config, "is_encoder_decoder", False)
            or getattr(config, "add_cross_attention", False)
            or getattr(config, "cross_attention_layers", None),
        ),
        (
            "its layers do not call transformers' attention interface once each",
            not attention or any(_calls(module.__class__) != 1 for module in attention),
        ),
        (
            "it attends in both directions",
            getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
            or not (causal or getattr(config, "is_decoder", False)),
        ),
        (
            "its layers are not one attention each, numbered from 0",
            {module.layer_idx for module in causal or attention} != set(range(config.num_hidden_layers)),
        ),
        (
            "its keys and values are made of latents after the cache has returned them (MLA)",
            getattr(config, "kv_lora_rank", None) is not None,
        ),
        ("layers share the keys of others", getattr(config, "num_kv_shared_layers", None)),
        (
            "its rotary angles change with the length of the text, and stored keys keep theirs",
            _stretches(config),
        ),
    ]
    return next((reason for reason, holds in reasons if holds), None)


def counts_positions(model):
    """Whether a transformers model counts positions itself, by its tokens or its cache, whatever it is told: then no step is like
    another, and one that was compiled or recorded goes wrong."""
    told = "position_ids" in inspect.signature(type(model).forward).parameters
    return not told or any(hasattr(each, "create_position_ids_from_input_ids") for each in model.modules())


def _is_attention(module):
    """Attention of a decoder knows its layer and whether it is causal; that of an encoder inside knows neither."""
    return isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "is_causal")


@lru_cache
def _calls(kind):
    """How often the forward pass of an attention class calls the attention interface, as its source says."""
    try:
        return inspect.getsource(kind.forward).count("attention_interface(")
    except (OSError, TypeError):  # no source to read: a pass that goes wrong is found out when it ends
        return 1


def _stretches(config):
    """Whether rotary frequencies depend on the length: dynamic NTK, and longrope where the text may pass the length that the
    model was trained with."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope.values() if all(isinstance(each, dict) for each in rope.values()) else [rope]:
        kind, first = part.get("rope_type"), part.get("original_max_position_embeddings")
        longest = getattr(config, "max_position_embeddings", 0)
        if kind == "dynamic" or (kind == "longrope" and longest > (first or longest)):
            return True
    return False


BOTH_WAYS = ("gemma3", "gemma4")  # models in which tokens of a picture see each other both ways


def refuse_pass(module, given):
    """Raises ValueError for gradient checkpointing, and for pictures whose tokens see each other both ways; elsewhere their
    types change positions alone."""
    if module.training and getattr(module, "is_gradient_checkpointing", False):
        raise ValueError(
            "gradient checkpointing leaves the cache out: call model.eval(), or model.gradient_checkpointing_disable()"
        )
    both_ways = module.config.model_type.startswith(BOTH_WAYS)
    for name in ("token_type_ids", "mm_token_type_ids") if both_ways else ():
        if given.get(name) is not None and bool(given[name].any()):
            raise ValueError(
                f"{name} marks pictures, whose tokens see later ones, which a SketchCache can't give: "
                "leave the pictures out, or use another cache"
            )


def made_for(held, values=None):
    """(batch, KV heads), widths, dtype and device of slots, or of new keys and values."""
    if values is None:
        return tuple(held.shape), tuple(held.widths), held.dtype, held.device
    return tuple(held.shape[:2]), (held.shape[-1], values.shape[-1]), held.dtype, held.device


def fits(held, keys, values):
    """Raises ValueError where slots were made for another batch, model, dtype or device."""
    if made_for(held) == made_for(keys, values):
        return
    batch, like = keys.shape[0], (keys.dtype, keys.device)
    if held.shape[0] != batch:
        raise ValueError(
            f"the cache holds a batch of {held.shape[0]}, this call brings {batch}: "
            "finish one batch before the next, with cache.reset() between them or a new cache"
        )
    if (held.dtype, held.device) != like:
        raise ValueError(
            f"the cache holds {held.dtype} on {held.device}, this call brings {like[0]} on {like[1]}: "
            "use a new cache after converting or moving a model"
        )
    raise ValueError(
        f"the cache holds {held.shape[1]} KV heads of {held.widths[0]} and {held.widths[1]} channels, this call brings "
        f"{keys.shape[1]} of {keys.shape[-1]} and {values.shape[-1]}: use a new cache for another model"
    )


def own_attention(module, prefix):
    """The attention function that a model had before `prefix` was put before its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation.removeprefix(prefix)
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    for kind in type(module).__mro__:  # the file that defines the attention defines its eager function, too
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(f"{type(module).__name__} has no eager attention function of its own")
