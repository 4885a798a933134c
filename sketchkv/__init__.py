"""A bounded KV cache for transformers: few bits, exact scores, one summary slot, or an index of the keys that each query asks."""

from importlib import import_module
from typing import TYPE_CHECKING

from sketchkv.cache import SketchCache
from sketchkv.policies import AttentionMass, Policy, Window

if TYPE_CHECKING:
    from sketchkv.budgets import pyramid
    from sketchkv.decode import generate, score
    from sketchkv.loading import load
    from sketchkv.peers import H2O, LRU, TOVA, KeyNorm, Random, SnapKV
    from sketchkv.sketch import CountMinSketch
    from sketchkv.sketch_policy import Sketch
    from sketchkv.summary import Summary
    from sketchkv.switch import disable, enable

__all__ = [
    "H2O",
    "LRU",
    "TOVA",
    "AttentionMass",
    "CountMinSketch",
    "KeyNorm",
    "Policy",
    "Random",
    "Sketch",
    "SketchCache",
    "SnapKV",
    "Summary",
    "Window",
    "disable",
    "enable",
    "generate",
    "load",
    "pyramid",
    "score",
]

# Loaded when asked for: `import sketchkv` takes no longer than the cache needs.
_LATER = {
    "disable": "switch",
    "enable": "switch",
    "pyramid": "budgets",
    "generate": "decode",
    "score": "decode",
    "load": "loading",
    "H2O": "peers",
    "LRU": "peers",
    "Random": "peers",
    "TOVA": "peers",
    "KeyNorm": "peers",
    "SnapKV": "peers",
    "CountMinSketch": "sketch",
    "Sketch": "sketch_policy",
    "Summary": "summary",
}


def __getattr__(name):
    if name in _LATER:
        return getattr(import_module(f"sketchkv.{_LATER[name]}"), name)
    raise AttributeError(f"module 'sketchkv' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LATER])
