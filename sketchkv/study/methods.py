"""Every method of the study by name: a dict that JSON can hold -> a cache.

`{"method": "h2o", "max_cache_size": 128, "bits": 16}`; all further entries are parameters of `SketchCache`, or of the
policy where it has them. "full" keeps every token of the text, in `bits` if given, "kivi" in 8, 4 or 2 bits (`KiviCache`).
"""

import inspect

import torch

from sketchkv.cache import SketchCache
from sketchkv.kivi import KiviCache
from sketchkv.policies import H2O, LRU, TOVA, AttentionMass, KeyNorm, Prior, Random, Sketch, SnapKV, Window
from sketchkv.self_tuning import SelfTuned

POLICIES = {
    "window": Window,
    "streaming": Window,
    "random": Random,
    "lru": LRU,
    "key_norm": KeyNorm,
    "h2o": H2O,
    "decayed": AttentionMass,
    "self_tuned": SelfTuned,
    "tova": TOVA,
    "snapkv": SnapKV,
    "sketch": Sketch,
    "prior": Prior,
}


def make_cache(config, method, length=None, **settings):
    """A new cache of one method for a model of this configuration.

    method: "full", "kivi", "compact" (`SketchCache.compact`), or a name in `POLICIES`; "window" has no sinks, "streaming"
    is the same with them. length: tokens of the text, which "full" and "kivi" need. Raises ValueError for an unknown
    method and TypeError for an unknown parameter.
    """
    if method == "compact":
        return SketchCache.compact(config, **settings)
    if method == "full":
        return SketchCache(config, length, policy=Window(), **settings)
    if method == "kivi":
        return KiviCache(config, length, **settings)
    if method not in POLICIES:
        raise ValueError(f"unknown method {method!r}; choose one of full, kivi, compact, {', '.join(POLICIES)}")
    if method == "window":
        settings = {"num_sinks": 0} | settings
    own = inspect.signature(POLICIES[method].__init__).parameters
    policy = POLICIES[method](**{name: settings.pop(name) for name in list(settings) if name in own})
    return SketchCache(config, policy=policy, **settings)


def nbytes(config, length=None, dtype=torch.float32, **method):
    """Bytes that a method holds for one sequence, by kind (`SketchCache.nbytes`); its tensors are allocated, no model runs."""
    cache = make_cache(config, length=length, **method)
    text = getattr(config, "config", config).get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    empty = torch.zeros(1, heads, 0, head_dim, dtype=dtype)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
    return cache.nbytes()


def full_nbytes(config, length, dtype=torch.float16):
    """Bytes of the keys and values of `length` tokens in a full cache: what every method is compared with."""
    text = getattr(config, "config", config).get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim * length * dtype.itemsize


def fit(config, budget, dtype=torch.float32, multiple=1, **method):
    """The largest `max_cache_size` (a multiple of `multiple`) at which the method holds at most `budget` bytes in all.

    Bytes grow linearly with the cap, so two caps tell. Raises ValueError if not even the smallest possible cap fits.
    """
    least = method.get("num_sinks", 4) + method.get("recent_window", 16) + 1
    small, large = (nbytes(config, dtype=dtype, **method, max_cache_size=cap)["total"] for cap in (least, least + 64))
    cap = least + (budget - small) * 64 // (large - small)
    cap -= cap % multiple
    if cap < least:
        raise ValueError(f"{method} holds {small} bytes at its smallest cap ({least}), more than the budget of {budget}")
    # Where slots are of two kinds, how many are of each is rounded, and the line is only nearly straight.
    while method.get("coarse_bits") and nbytes(config, dtype=dtype, **method, max_cache_size=cap)["total"] > budget:
        cap -= multiple
    return cap
