"""A transformers cache that never holds more than `max_cache_size` tokens per KV head."""

import copy
from collections import Counter
from typing import Any

from transformers.cache_utils import Cache

from sketchkv.checks import Settings, codec_of, fitting, per_layer, policies_of, rows, whole
from sketchkv.layer import BoundedLayer
from sketchkv.passes import Passes
from sketchkv.policies import AttentionMass
from sketchkv.support import layer_windows, text_config


class SketchCache(Cache):
    """A bounded KV cache for `model.generate(..., past_key_values=cache)` on a model switched by `sketchkv.enable`.

    Layers that attend to the whole text keep `max_cache_size` tokens. Layers with a sliding window hold their window, or
    the cap where that is smaller; policy, evictions, summary and index are not for them.

    config: the model's configuration (or the model).
    max_cache_size: tokens kept per sequence, layer and KV head after an eviction; a list is one cap per layer.
    policy: an eviction policy, or a list, one per layer; default `Sketch()`, a Count-Min Sketch of the attention each token
        received.
    num_sinks: first tokens of a text, which are never evicted.
    recent_window: newest tokens, which are never evicted.
    evict_every: tokens between evictions; as many slots are held beyond the cap, and count as memory. An index has none.
    prefill_chunk: tokens between evictions while a prompt passes; None: as while decoding.
    attend_topk: attention runs over this many of the stored tokens alone, those ranked highest at the last eviction, and
        over all that came since; a token left out stays stored, and the next eviction ranks it again. None, or the cap: over all.
    summary: a `sketchkv.summary.Summary`, into which evicted tokens are folded; with an index, a `sketchkv.tail.Tail`.
    bits: 8, 6, 5, 4, 3 or 2 holds keys and values quantized, 16 in float16; a pair is for keys and values; None: the model's
        dtype. Attention decodes one layer at a time: that working memory is not part of `nbytes`.
    codec: another way to store keys and values, a function of (dtype, device) that gives a `sketchkv.slots.Plain`.
    index: a `sketchkv.index.KeyIndex`: what is evicted is not forgotten, and each query asks for it (`sketchkv.recall`).
    Raises ValueError for a value out of range or a cap that leaves no room beside sinks and recent window, TypeError for parts
    that do not fit each other and for a parameter that does not exist (the error names who has it, or how it is spelled now).
    """

    layers: Any

    def __init__(
        self,
        config,
        max_cache_size,
        *,
        policy=None,
        num_sinks=4,
        recent_window=16,
        evict_every=16,
        prefill_chunk=None,
        attend_topk=None,
        summary=None,
        bits=None,
        codec=None,
        index=None,
        **former,
    ):
        if former:
            from sketchkv.former import refuse

            refuse(SketchCache, former)
        config = text_config(config)
        windows = layer_windows(config)
        fitting(index, summary, windows, policy=policy, prefill_chunk=prefill_chunk, attend_topk=attend_topk)
        settings = Settings(
            num_sinks, recent_window, evict_every, prefill_chunk, attend_topk, codec_of(bits, codec)
        )
        self.max_cache_size, self.index = max_cache_size, index
        self.prefill_chunk, self.evict_every = settings.prefill_chunk, settings.evict_every
        self.recordings = None  # of `sketchkv.fast.graphs`
        self.passes = Passes(config)
        caps = settings.leave_room(per_layer("max_cache_size", max_cache_size, len(windows)))
        policies = policies_of(policy, len(windows))
        layers = []
        for number, (cap, window, own) in enumerate(zip(caps, windows, policies, strict=True)):
            layers.append(self.make_layer(cap, window, copy.deepcopy(own), settings, copy.deepcopy(summary)))
            layers[-1].policy.layer = number
        all_slots = sum(layer.capacity for layer in layers)
        for layer in layers:
            layer.all_slots = all_slots
        super().__init__(layers=layers)
        self.passes.layers = self.layers

    max_chunk_size = property(
        lambda self: 1 if self.index is not None and self.index.exact_prompts else None,
        doc="Tokens of a text to be scored that may pass at once: with an index, prompts may pass otherwise than steps.",
    )

    def make_layer(self, cap, window, policy, settings, summary):
        """A layer of `cap` tokens; window: how many tokens its queries see, None: all."""
        if window is not None:
            from sketchkv.window import WindowLayer

            return WindowLayer(min(window, cap), settings, capped=cap < window)
        if self.index is not None:
            from sketchkv.recall import RecallLayer

            return RecallLayer(cap, settings, copy.copy(self.index), summary)
        return BoundedLayer(policy, cap, settings, summary)

    @classmethod
    def compact(cls, config, max_cache_size, *, fine_window=None, **changes):
        """The setting with the best quality for its bytes that the study found, chosen on the development documents and
        frozen: 5-bit keys and 4-bit values, 4 bits more for sinks and newest tokens, exact decayed mean attention weighted by
        the norm of the value, and one summary slot for all that was evicted. `changes` replace single parameters.

        fine_window: newest tokens of which, and of the sinks, what rounding took is held as well (`sketchkv.ring`); 0: of none;
            None: a 32nd of the smallest cap, 64 at most, none below a cap of 128.
        """
        from sketchkv.quantize import finely
        from sketchkv.summary import Summary

        settings = dict(bits=(5, 4), summary=Summary(), policy=AttentionMass(value_norm=True))
        return cls(config, max_cache_size, **finely(settings | changes, changes, fine_window, max_cache_size))

    @classmethod
    def recall(cls, config, max_cache_size=512, top=256, store="host", *, fine_window=None, **changes):
        """Fast memory holds an index of all tokens and `max_cache_size` of them; each step attends to sinks, the newest 64, the
        `top` that the index ranks highest for its queries, read from `store` if need be (`sketchkv.recall`), and one token for
        all others (`sketchkv.tail`). 6-bit keys and 5-bit values; `fine_window`, `changes` as of `compact`."""
        from sketchkv.index import KeyIndex
        from sketchkv.quantize import finely
        from sketchkv.tail import Tail

        if "index" in changes and (top, store) != (256, "host"):
            raise TypeError("give either index= or top=, store=: KeyIndex(top=..., store=...) takes both")
        own = dict(bits=(6, 5), recent_window=64, index=KeyIndex(top=top, store=store), summary=Tail())
        return cls(config, max_cache_size, **finely(own | changes, changes, fine_window, max_cache_size))

    def get_seq_length(self: Any = None, layer_idx=0):
        """`seen_tokens`. Without a cache to ask, what was handed to a model is the class: transformers asks this first."""
        if self is None:
            raise TypeError("past_key_values is the class: hand in a cache, SketchCache(model.config, 512)")
        return super().get_seq_length(layer_idx)

    @property
    def seen_tokens(self):
        """Tokens that passed through the cache, padding included; the next token's position."""
        return self.layers[0].seen

    @property
    def evicted_tokens(self):
        """Tokens evicted so far, per sequence and KV head, summed over layers."""
        return sum(layer.evicted for layer in self.layers)

    def stored_tokens(self):
        """Occupied slots per layer: a list of int, the same for every sequence and KV head of a layer."""
        return [0 if layer.slots is None else layer.slots.used for layer in self.layers]

    def kept_positions(self, layer):
        """Positions of the tokens that layer `layer` holds: int64 `[batch, num_kv_heads, slots]`, -1 for an empty slot or
        padding; slots are in no particular order."""
        layer = whole("layer", layer, -len(self.layers), len(self.layers) - 1)
        if self.layers[layer].slots is None:
            raise RuntimeError("the cache is empty: no text has passed through it yet")
        return self.layers[layer].slots.positions.long()

    def nbytes(self):
        """Bytes of the tensors really held: {"kv", "sketch", "policy", "total"}, with an index also {"index", "host"}.

        "kv": key and value slots, with the `evict_every` extra ones, scales, centre and rotation (one for all layers) of
        quantized ones, and the means of the summary. "sketch": counters, hash parameters, projections and a signature per
        slot. "policy": positions and everything else that choosing needs. "host": the store, the one that "total" leaves out.
        """
        held: Counter[str] = Counter()
        shared: dict[int, tuple[str, int]] = {}
        for layer in self.layers:
            held.update(layer.nbytes())
            shared |= layer.shared()
        for kind, count in shared.values():
            held[kind] += count
        held["policy"] += 0 if self.passes.first is None else self.passes.first.nbytes
        return dict(held, total=held.total() - held["host"])

    def traffic(self):
        """Of a cache with an index, since the last reset: bytes "written" to the store, "fetched" into slots by steps and
        "streamed" while passes of several tokens came, and tokens that steps have "chosen", of which "missing" in slots."""
        moved = [layer.moved for layer in self.layers if hasattr(layer, "moved")]
        return {name: int(sum(each[name] for each in moved)) for name in (moved[0] if moved else ())}

    def check(self):
        """Raises ValueError if an importance was NaN or a mask hid stored tokens: on CUDA, where looking makes the host wait,
        the error may otherwise come late."""
        for layer in self.layers:
            layer.check()
        self.passes.check()

    def reset(self):
        """Forgets the text and keeps the memory: for the next text, or after a pass that broke off."""
        super().reset()
        self.passes.forget()

    def reorder_cache(self, beam_idx):
        """Row i becomes what row `beam_idx[i]` was, int64 `[batch]` (beam search)."""
        if self.layers[0].slots is not None:
            batch = self.layers[0].slots.shape[0]
            rows(beam_idx, batch, batch)
        super().reorder_cache(beam_idx)
        self.passes.reorder(beam_idx)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.passes.tokens is None:
            raise RuntimeError(
                "SketchCache needs a model whose attention knows it: call sketchkv.enable(model) once before using the cache. "
                "One under torch.compile can't announce its passes: call the model as it is; "
                "sketchkv.generate(..., compile=True) compiles steps"
            )
        key_states, value_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        key_states._sketchkv = self.layers[layer_idx], self.passes.tokens
        return key_states, value_states
