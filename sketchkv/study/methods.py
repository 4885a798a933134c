"""Every method of the study by name: its settings (`BOUNDED`, `WHOLE`), its label, its cache, its bytes.

Settings are a dict that JSON can hold: `{"method": "tova", "max_cache_size": 128, "bits": 16}`. All further entries are
options (`make_cache`), parameters of `SketchCache`, or of the policy where it has them.
"""

import inspect
from bisect import bisect_right

import torch

from sketchkv.cache import SketchCache
from sketchkv.index import KeyIndex
from sketchkv.peers import H2O, LRU, TOVA, KeyNorm, Random, SnapKV
from sketchkv.policies import AttentionMass, Window
from sketchkv.sketch_policy import Sketch
from sketchkv.study.extras.device_store import DeviceStore
from sketchkv.study.extras.expected import ExpectedAttention
from sketchkv.study.extras.kivi import KiviCache
from sketchkv.study.extras.ranges import ranges
from sketchkv.summary import Summary
from sketchkv.support import layer_windows, text_config

POLICIES = {
    "window": Window,
    "streaming": Window,
    "random": Random,
    "lru": LRU,
    "key_norm": KeyNorm,
    "h2o": H2O,  # plain sums; the published method is `BOUNDED["h2o"]`
    "decayed": AttentionMass,
    "tova": TOVA,
    "snapkv": SnapKV,
    "expected": ExpectedAttention,
    "sketch": Sketch,
}
CACHES = ("full", "kivi", "compact", "recall")


_INT8, _INT4 = ({"bits": bits, "rounding": "range"} for bits in (8, 4))  # rounding as the peers do it
_SMALL = {"method": "sketch", "width": 128, "depth": 2}

# Methods with a cap, as every notebook has them; 16 bits: bytes are counted as of a half-precision cache.
BOUNDED: dict[str, dict] = {
    "compact": {"method": "compact"},
    "recall": {"method": "recall", "store": "device"},  # in 6 and 5 bits, the preset's
    "recall_alone": {"method": "recall", "store": "device", "tail": False},
    "decayed": {"method": "decayed", "bits": 16},
    "sketch": {"method": "sketch", "width": 512, "depth": 4, "bits": 16},
    "streaming": {"method": "streaming", "bits": 16},
    "h2o": {"method": "h2o", "recent_share": 0.5, "bits": 16},
    "snapkv": {
        "method": "snapkv",
        "kernel": 5,
        "observation_window": 64,
        "recent_window": 64,
        "evict_every": 64,
        "bits": 16,
    },
    "tova": {"method": "tova", "bits": 16},
    "expected": {"method": "expected", "bits": 16},
    "decayed_int4": {"method": "decayed"} | _INT4,
    "streaming_int4": {"method": "streaming"} | _INT4,
    "plain_sums": {"method": "h2o", "bits": 16},
    "sketch_small": _SMALL | {"bits": 16},
    "sketch_summary": _SMALL | {"bits": 16, "summary_slots": 4},
    "sketch_int4": _SMALL | _INT4,
    "decayed_summary": {"method": "decayed", "bits": 16, "summary_slots": 4},
    "decayed_int8": {"method": "decayed"} | _INT8,
    "random": {"method": "random", "bits": 16},
    "window": {"method": "window", "bits": 16},
    "lru": {"method": "lru", "bits": 16},
    "key_norm": {"method": "key_norm", "bits": 16},
}

# Chosen on 8 + 8 development documents of SmolLM2, where another share of the bytes asks for another setting.
FROZEN: dict[tuple, dict] = {(name, 1 / 16): {"bits": (5, 4)} for name in ("recall", "recall_alone")}

# Methods that hold the whole text: one size each.
WHOLE: dict[str, dict] = {
    "full": {"method": "full", "bits": 16, "evict_every": 1},
    "int8": {"method": "full", "evict_every": 1} | _INT8,
    "int4": {"method": "full", "evict_every": 1} | _INT4,
    "kivi8": {"method": "kivi", "bits": 8},
    "kivi4": {"method": "kivi", "bits": 4},
    "kivi2": {"method": "kivi", "bits": 2},
}

# A peer is a published method with the settings of its paper; all others are the study's own, its ablations and controls.
PEERS = ("streaming", "h2o", "snapkv", "tova", "expected", "key_norm", "kivi8", "kivi4", "kivi2")

LABELS = {
    "compact": "compact",
    "recall": "recall",
    "recall_alone": "recall without its tail",
    "decayed": "exact scores",
    "sketch": "sketch 512x4",
    "streaming": "StreamingLLM",
    "h2o": "H2O",
    "snapkv": "SnapKV",
    "tova": "TOVA",
    "expected": "expected attention",
    "decayed_int4": "exact scores + int4",
    "streaming_int4": "StreamingLLM + int4",
    "plain_sums": "plain sums",
    "sketch_small": "sketch 128x2",
    "sketch_summary": "sketch 128x2 + summary",
    "sketch_int4": "sketch 128x2 + int4",
    "decayed_summary": "exact scores + summary",
    "decayed_int8": "exact scores + int8",
    "random": "random",
    "window": "window without sinks",
    "lru": "LRU",
    "key_norm": "key norm",
    "full": "full cache",
    "int8": "int8 whole text",
    "int4": "int4 whole text",
    "kivi8": "KIVI 8 bits",
    "kivi4": "KIVI 4 bits",
    "kivi2": "KIVI 2 bits",
}


class DoesNotFit(ValueError):
    """A method at its smallest cap holds more than it may."""


def make_cache(config, method, length=None, **options):
    """A new cache of one method for a model of this configuration.

    method: a name in `POLICIES` or `CACHES`, or a policy (or a list, one per layer). "window" has no sinks, "streaming" is
        the same with them; "full" keeps every token of the text, in `bits` if given; "kivi" does so in 8, 4 or 2 bits
        (`KiviCache`); "compact" is `SketchCache.compact`; "recall" is `SketchCache.recall`, whose `top`, if not given, is all
        slots that sinks and recent window leave.
    length: tokens of the text, which "full" and "kivi" need.
    max_cache_size: of the layers that attend to the whole text; those with a sliding window hold their window.
    options: parameters of the policy and of the cache, and those that `_spelled` knows.

    Raises ValueError for an unknown method and TypeError for an unknown parameter.
    """
    options = _spelled(config, **options)
    if method == "recall":
        options = {"top": _top(config, **options)} | options
    if isinstance(cap := options.get("max_cache_size"), int):
        options["max_cache_size"] = _with_windows(config, cap)
    if method == "compact":
        return SketchCache.compact(config, **options)
    if method == "recall":
        return _recall(config, **options)
    if method == "full":
        return SketchCache(config, length, policy=Window(), **options)
    if method == "kivi":
        return KiviCache(config, length, **options)
    if not isinstance(method, str):
        return SketchCache(config, policy=method, **options)
    if method not in POLICIES:
        raise ValueError(f"unknown method {method!r}; choose one of {', '.join((*CACHES, *POLICIES))}")
    if method == "window":
        options = {"num_sinks": 0} | options
    kind = POLICIES[method]
    own = inspect.signature(kind).parameters
    if "config" in own:
        options["config"] = config
    policy = kind(**{name: options.pop(name) for name in list(options) if name in own})
    return SketchCache(config, policy=policy, **options)


def _with_windows(config, cap):
    """The cap, or of a hybrid model one per layer: those with a sliding window keep it, however small the cap is."""
    windows = layer_windows(text_config(config))
    return [max(cap, window or 0) for window in windows] if any(windows) else cap


def _recall(config, max_cache_size, top, store="host", exact_prompts=True, **options):
    index = KeyIndex(top, store=store, exact_prompts=exact_prompts)
    return SketchCache.recall(config, max_cache_size, index=index, **options)


def _top(config, max_cache_size, **options):
    """How many tokens `SketchCache.recall` may choose with so many slots."""
    roomy = _recall(config, 2**30, **options | {"top": 1})
    layer = next(layer for layer in roomy.layers if hasattr(layer, "index"))
    return max_cache_size - layer.num_sinks - layer.recent_window


def _spelled(
    config,
    *,
    summary_slots=0,
    spread=False,
    protects=False,
    rounding=None,
    recent_share=0,
    tail=True,
    **options,
):
    """The study's options, which JSON can hold, as objects.

    summary_slots: slots that remember what was evicted, by hash of the key.
    spread: whether the spread of the merged keys raises their logit.
    protects: whether a token that a summary would swallow stays longer.
    rounding: "range" for minimum and step of a group, as the peers round.
    recent_share: share of the cap that belongs to the newest tokens: half of it in the published H2O.
    tail: of "recall", whether one token stands for what a query leaves out (`sketchkv.tail`).
    store: "device" is a `DeviceStore`; exact_prompts: of the index.
    """
    if summary_slots:
        options["summary"] = Summary(summary_slots, spread, protects)
    if not tail:
        options["summary"] = None
    if rounding:
        options["codec"] = ranges(options.pop("bits"))
    if options.get("store") == "device":
        options["store"] = DeviceStore()
    if recent_share:
        options["recent_window"] = int(options["max_cache_size"] * recent_share)
    return options


def nbytes(config, length=None, dtype=torch.float32, **method):
    """Bytes that a method holds for one sequence, by kind (`SketchCache.nbytes`), of tensors without memory. An index, which
    grows, is one of `length` tokens. Of a hybrid model only the layers count that attend to the whole text: its windows can't
    shrink below themselves."""
    cache = make_cache(config, length=length, **method)
    cache.layers = [layer for layer in cache.layers if not layer.is_sliding]
    _, heads, head_dim = _shape(config)
    keys = torch.zeros(1, heads, length or 0, head_dim, dtype=dtype, device="meta")
    index = None
    for layer in cache.layers:
        layer.lazy_initialization(keys[:, :, :0], keys[:, :, :0])
        if hasattr(layer, "index") and length:  # an index grows with the text, in all layers alike
            if index is None:
                index = layer.index
                index.add(keys)
            layer.index = index
    return cache.nbytes()


def full_nbytes(config, length, dtype=torch.float16):
    """Bytes of the keys and values of `length` tokens in a full cache: what every method is compared with. Counted as `nbytes`
    counts: layers with a sliding window are left out."""
    layers, heads, head_dim = _shape(config)
    return 2 * layers * heads * head_dim * length * dtype.itemsize


def _shape(config):
    """Layers that attend to the whole text, KV heads and numbers a head."""
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return layer_windows(text).count(None), heads, head_dim


def fit(config, budget, dtype=torch.float32, multiple=1, length=None, **method):
    """The largest `max_cache_size` (a multiple of `multiple`) at which the method holds at most `budget` bytes in all.

    length: tokens of the text, of which an index holds all. Raises `DoesNotFit` if not even the smallest possible cap fits.
    """
    least = method.get("num_sinks", 4) + method.get("recent_window", 16) + 1
    if method["method"] == "recall":
        own = {name: value for name, value in method.items() if name != "method"}
        least += 1 - _top(config, least, **_spelled(config, **own))

    def held(cap):
        return nbytes(config, length, dtype, **method, max_cache_size=cap)["total"]

    small = held(least)
    top = least + 1 + max(0, budget - small) * 64 // (held(least + 64) - small)
    while held(top) <= budget:  # what is held finely grows with the cap: bytes are not quite linear in it
        top *= 2
    cap = least - 1 + bisect_right(range(least, top), budget, key=held)
    cap -= cap % multiple
    if cap < least:
        raise DoesNotFit(
            f"{method} holds {small} bytes at its smallest cap ({least}), more than the budget of {budget}"
        )
    return cap
