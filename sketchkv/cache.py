"""A transformers cache that never holds more than `max_cache_size` tokens per KV head."""

import copy

from transformers.cache_utils import Cache

from sketchkv.checks import flag, rows, whole
from sketchkv.layer import BoundedLayer, Settings
from sketchkv.passes import MOST_TOKENS, Passes
from sketchkv.policies import AttentionMass, Policy, Sketch
from sketchkv.slots import Plain

# Of `fine_window=None`: one token in so many of the cap, up to so many, and none where the cap is smaller than the least: there
# each token more counts for more than its rounding.
FINE_SHARE, MOST_FINE, LEAST_FINE = 32, 64, 128
# How parameters of former versions are spelled now.
FORMER = (
    dict.fromkeys(
        ("width", "depth", "key", "decay", "mean", "lsh_bits", "seed"),
        "policy=Sketch({name}=...), from sketchkv import Sketch",
    )
    | {
        "summary_slots": "summary=Summary({value}), from sketchkv.summary import Summary",
        "quantizer": "bits= alone; ranges per group are in sketchkv.study.extras",
        "kind": "a policy of sketchkv.study.extras",
        "counters": "a policy of sketchkv.study.extras",
    }
    | dict.fromkeys(("coarse_bits", "fine", "demote", "shared"), "nothing: it was not worth keeping")
)


class SketchCache(Cache):
    """A bounded KV cache for `model.generate(..., past_key_values=cache)` on a model switched by `sketchkv.enable`.

    Layers that attend to the whole text keep `max_cache_size` tokens. Layers with a sliding window hold their window, or
    the cap where that is smaller.

    config: the model's configuration (or the model).
    max_cache_size: tokens kept per sequence, layer and KV head after an eviction; a list is one cap per layer.
    policy: an eviction policy, or a list, one per layer; default `Sketch()`, a Count-Min Sketch of the attention each token
        received.
    num_sinks: first tokens of a text, which are never evicted.
    recent_window: newest tokens, which are never evicted.
    evict_every: tokens between evictions; as many slots are held beyond the cap, and count as memory.
    prefill_chunk: tokens between evictions while a prompt passes; None: as while decoding.
    attend_topk: attention runs over this many of the stored tokens alone, those ranked highest at the last eviction, and
        over all that came since; a token left out stays stored, and the next eviction ranks it again. None: over all.
    summary: a `sketchkv.summary.Summary`, into which evicted tokens are folded; None: they are dropped.
    bits: 8, 6, 5, 4, 3 or 2 holds keys and values quantized, 16 in float16; a pair is for keys and values; None: the model's
        dtype. Attention decodes one layer at a time: that working memory is not part of `nbytes`.
    fine_window: newest tokens of which, and of the sinks, what rounding took is held as well, in 4 bits more
        (`sketchkv.ring`); 0: of none; None: a 32nd of the smallest cap, 64 at most, none below a cap of 128.
    codec: another way to store keys and values, a function of (dtype, device) that gives a `sketchkv.slots.Plain`.
    index: a `sketchkv.index.KeyIndex`: what is evicted is not forgotten, and each query asks for it (`sketchkv.recall`).
    store: where all tokens are then: "host", an existing folder's path or a `sketchkv.store.HostStore`.
    exact_prompts: with an index, whether a pass of several tokens attends to all before them, or as steps would.
    Raises ValueError for a value out of range or a cap that leaves no room beside sinks and recent window, TypeError for a
    parameter that does not exist (one that did is named with its new spelling).
    """

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
        fine_window=0,
        codec=None,
        index=None,
        store="host",
        exact_prompts=True,
        **former,
    ):
        for name, value in former.items():
            instead = f": write {FORMER[name].format(name=name, value=value)}" if name in FORMER else ""
            raise TypeError(f"SketchCache has no parameter {name!r}{instead}")
        config = text_config(config)
        windows = layer_windows(config)
        count = len(windows)
        caps = [
            whole("max_cache_size", cap, 1, MOST_TOKENS)
            for cap in _per_layer("max_cache_size", max_cache_size, count)
        ]
        self.index, self.store, self.exact_prompts = index, store, flag("exact_prompts", exact_prompts)
        if index is not None:
            others = dict(
                policy=policy,
                prefill_chunk=prefill_chunk,
                attend_topk=attend_topk,
                summary=summary,
                fine_window=fine_window or None,
            )
            self.store = _with_index(index, store, others)
            # Steps choose on the host what they read; what is scored is decoded, not a prompt.
            self.recordable, self.max_chunk_size = False, 1 if exact_prompts else None
        policies = _per_layer("policy", Sketch() if policy is None else policy, count)
        if not all(isinstance(each, Policy) for each in policies):
            raise TypeError(
                f"policy must be a sketchkv Policy, or a list of {count}, one per layer; got {policy!r}"
            )
        evict_every = whole("evict_every", evict_every, 1, MOST_TOKENS)
        settings = Settings(
            num_sinks=whole("num_sinks", num_sinks, 0, MOST_TOKENS),
            recent_window=whole("recent_window", recent_window, 0, MOST_TOKENS),
            evict_every=evict_every,
            prefill_chunk=None
            if prefill_chunk is None
            else whole("prefill_chunk", prefill_chunk, evict_every, MOST_TOKENS),
            attend_topk=None if attend_topk is None else whole("attend_topk", attend_topk, 1, MOST_TOKENS),
            codec=_codec(bits, codec, _fine_window(fine_window, bits, caps), num_sinks),
        )
        _leave_room(settings, caps)
        if summary is not None and (isinstance(summary, type) or not hasattr(summary, "fold")):
            raise TypeError(
                f"summary must be a sketchkv.summary.Summary, such as Summary(1), or None; got {summary!r}"
            )
        self.max_cache_size, self.prefill_chunk, self.evict_every = (
            max_cache_size,
            settings.prefill_chunk,
            evict_every,
        )
        self.recordings = None  # of `sketchkv.fast.graphs`
        self.passes = Passes(config)
        layers = []
        for index, (cap, window, own) in enumerate(zip(caps, windows, policies, strict=True)):
            layers.append(self.make_layer(cap, window, copy.deepcopy(own), settings, copy.deepcopy(summary)))
            layers[-1].policy.layer = index
        super().__init__(layers=layers)
        self.passes.layers = self.layers

    def make_layer(self, cap, window, policy, settings, summary):
        """A layer of `cap` tokens; window: how many tokens its queries see, None: all."""
        if window is None and self.index is not None:
            from sketchkv.recall import RecallLayer

            return RecallLayer(
                cap, settings, copy.copy(self.index), copy.copy(self.store), self.exact_prompts
            )
        if window is None:
            return BoundedLayer(policy, cap, settings, summary)
        from sketchkv.window import WindowLayer

        return WindowLayer(min(window, cap), settings, capped=cap < window)

    @classmethod
    def compact(cls, config, max_cache_size, **changes):
        """The setting with the best quality for its bytes that the study found, chosen on the development documents and
        frozen: 5-bit keys and 4-bit values, 4 bits more for sinks and newest tokens, exact decayed mean attention weighted by
        the norm of the value, and one summary slot for all that was evicted. `changes` replace single parameters."""
        from sketchkv.summary import Summary

        settings = dict(
            bits=(5, 4), fine_window=None, summary=Summary(), policy=AttentionMass(value_norm=True)
        )
        settings |= changes
        return cls(config, max_cache_size, **settings)

    @classmethod
    def recall(cls, config, max_cache_size=512, top=256, store="host", **changes):
        """Fast memory holds an index of all tokens and `max_cache_size` of them; each step attends to sinks, the newest 64 and
        the `top` that the index ranks highest for its queries, read from `store` if need be (`sketchkv.recall`). 5-bit keys and
        4-bit values. `changes` replace single parameters."""
        from sketchkv.index import KeyIndex

        settings = dict(bits=(5, 4), recent_window=64, index=KeyIndex(top=top)) | changes
        return cls(config, max_cache_size, store=store, **settings)

    @property
    def seen_tokens(self):
        """Tokens that passed through the cache, padding included; the next token's position."""
        return self.layers[0].seen

    is_open = property(
        lambda self: self.passes.tokens is not None, doc="Whether a forward pass is under way."
    )

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
        held, shared = {"kv": 0, "sketch": 0, "policy": 0}, {}
        indexed = {}
        for layer in self.layers:
            for kind, count in layer.nbytes().items():
                held[kind] = held.get(kind, 0) + count
            if layer.slots is not None:
                shared |= {id(tensor): tensor.nbytes for tensor in layer.slots.codec.shared()}
            indexed |= (
                {id(tensor): tensor.nbytes for tensor in layer.index.shared()}
                if hasattr(layer, "index")
                else {}
            )
        held["kv"] += sum(shared.values())
        if self.index is not None:  # a rotation that the codec counts is the same
            held["index"] = held.get("index", 0) + sum(indexed[key] for key in indexed.keys() - shared.keys())
        held["policy"] += 0 if self.passes.first is None else self.passes.first.nbytes
        return held | {"total": sum(held.values()) - held.get("host", 0)}

    def traffic(self):
        """Of a cache with an index, since the last reset: bytes "written" to the store, "fetched" into slots by steps and
        "streamed" while passes of several tokens came, and tokens that steps have "chosen", of which "missing" in slots."""
        moved = [layer.moved for layer in self.layers if hasattr(layer, "moved")]
        return {name: sum(each[name] for each in moved) for name in (moved[0] if moved else ())}

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
        if self.layers[0].slots is not None:
            rows(beam_idx, self.layers[0].slots.shape[0])
        super().reorder_cache(beam_idx)
        self.passes.reorder(beam_idx)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.passes.tokens is None:
            raise RuntimeError(
                "SketchCache needs a model whose attention knows it: call sketchkv.enable(model) once before using the cache"
            )
        key_states, value_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        key_states._sketchkv = self.layers[layer_idx], self.passes.tokens
        return key_states, value_states


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


def _fine_window(given, bits, caps):
    """How many of the newest tokens are held more finely."""
    if given is None:
        return 0 if bits is None or min(caps) < LEAST_FINE else min(MOST_FINE, min(caps) // FINE_SHARE)
    if whole("fine_window", given, 0, min(caps)) and bits is None:
        raise ValueError("fine_window needs bits: without them nothing is rounded")
    return given


def _codec(bits, codec, fine_window, num_sinks):
    if bits is None:
        if codec is not None and not callable(codec):
            raise TypeError(
                f"codec must be a function of (dtype, device), such as sketchkv.slots.Plain; got {codec!r}"
            )
        return Plain if codec is None else codec
    if codec is not None:
        raise TypeError("give either bits= or codec=, not both")
    from sketchkv.quantize import quantized

    return quantized(bits, fine_window, num_sinks)


def _with_index(index, store, others):
    """The store of a cache with an index, as an object."""
    from sketchkv.store import FolderStore, HostStore

    if isinstance(index, type) or not hasattr(index, "choose"):
        raise TypeError(
            f"index must be a sketchkv.index.KeyIndex, such as KeyIndex(top=256), or None; got {index!r}"
        )
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"index and {', '.join(given)} exclude each other: with an index nothing is lost that a summary could stand for, the "
            "query decides what is attended to, slots attended to longest ago are overwritten, and prompts pass exactly"
        )
    if hasattr(store, "reorder") and not isinstance(store, type):
        return store
    return HostStore() if store == "host" else FolderStore(store)


def _per_layer(name, value, count):
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        kind = TypeError if name == "policy" else ValueError
        raise kind(
            f"{name} must be one for all layers or a list of {count}, one per layer; got {len(values)}"
        )
    return values


def _leave_room(settings, caps):
    least = settings.num_sinks + settings.recent_window
    if min(caps) <= least:
        raise ValueError(
            f"max_cache_size={min(caps)} leaves nothing to choose beside {settings.num_sinks} sinks and a recent window of "
            f"{settings.recent_window}: raise the cap above {least} or lower num_sinks, recent_window"
        )
    if settings.attend_topk is not None and settings.attend_topk <= least:
        raise ValueError(
            f"attend_topk={settings.attend_topk} leaves nothing to choose beside {settings.num_sinks} sinks and a recent "
            f"window of {settings.recent_window}, which are always attended to: raise it above {least}"
        )
