"""Connects a transformers model with `SketchCache`: `enable(model)`."""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sketchkv import compiled
from sketchkv.cache import SketchCache

NAME = "sketchkv"


class _Switch:
    """Shared by the attention modules of a model: the `SketchCache` of the forward pass under way, if any."""

    cache = None
    masked = False  # whether the caller gave an attention_mask: transformers may build one that says nothing
    compiled = False  # whether a compiled step is under way, which brings its cache by itself
    step = None  # the model's `CompiledStep`
    handles = ()
    previous = None

    def __getstate__(self):  # a copy of the model compiles its own
        return vars(self) | {"step": None}

    def open(self, module, args, kwargs):
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, SketchCache):
            return
        if module.config._attn_implementation != NAME:
            raise RuntimeError(
                f"the model's attention was set to {module.config._attn_implementation!r} after enable(): "
                "call sketchkv.enable(model) again"
            )
        layers = module.config.get_text_config(decoder=True).num_hidden_layers
        if len(cache.layers) != layers:
            raise ValueError(f"the cache has {len(cache.layers)} layers, the model {layers}: SketchCache(model.config, ...)")
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        inputs = token_ids if token_ids is not None else kwargs["inputs_embeds"]
        cache.open(inputs.shape[1], token_ids, kwargs.get("position_ids"))
        self.cache, self.masked = cache, kwargs.get("attention_mask") is not None

    def close(self, *_):
        if self.cache is not None:
            self.cache.close()
            self.cache = None


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention function for `AttentionInterface`: bounded with a `SketchCache`, plain SDPA with anything else."""
    switch = getattr(module, "_sketchkv", None)
    if switch is None or (switch.cache is None and not switch.compiled):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # fmt: skip
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if switch.compiled:
        return compiled.attend(query, key, value, scaling, module.layer_idx), None
    cache = switch.cache
    count = query.shape[2]
    if attention_mask is not None and attention_mask.shape[-2:] != (count, count):
        raise ValueError(
            f"SketchCache takes a 2-D attention_mask [batch, tokens so far] or none, got a mask of shape "
            f"{tuple(attention_mask.shape)}: 4-D masks cannot say which evicted tokens they mean"
        )
    # The mask is causal within the new tokens, so its last row is their padding mask.
    valid = attention_mask[:, 0, -1] if attention_mask is not None and switch.masked else None
    output = cache.layers[module.layer_idx].attend(query, key, value, valid, cache.token_ids, scaling, cache.clock)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enable(model):
    """Switches a decoder-only transformers model to attention that knows `SketchCache`; returns the model.

    Afterwards `model(...)` and `model.generate(...)` bound the cache when `past_key_values` is a `SketchCache`, and work
    as before (SDPA attention) when it is not. Calling it twice does no harm; `disable` takes it back. Raises ValueError
    for models whose layers do not all attend to the whole text (sliding windows, linear attention, encoder-decoders).
    """
    base = model.base_model
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.config.is_encoder_decoder or getattr(config, "add_cross_attention", False) or kinds != {"full_attention"}:
        raise ValueError(f"enable() takes decoder-only models with full attention in every layer, not {sorted(kinds)}")
    switch = getattr(base, "_sketchkv", None)
    if switch is None:
        switch = base._sketchkv = _Switch()
        switch.previous = model.config._attn_implementation
        for module in base.modules():
            if hasattr(module, "layer_idx"):
                module._sketchkv = switch
        switch.handles = (
            base.register_forward_pre_hook(switch.open, with_kwargs=True),
            base.register_forward_hook(switch.close, always_call=True),
        )
    model.set_attn_implementation(NAME)
    return model


def disable(model):
    """Takes `enable` back: hooks removed, the former attention restored; returns the model."""
    base = model.base_model
    switch = getattr(base, "_sketchkv", None)
    if switch is not None:
        for handle in switch.handles:
            handle.remove()
        for module in base.modules():
            if hasattr(module, "_sketchkv"):
                del module._sketchkv
        model.set_attn_implementation(switch.previous)
    return model
