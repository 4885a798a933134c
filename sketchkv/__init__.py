"""sketchkv: a KV cache under a hard cap, and sketches that remember which tokens mattered."""

from importlib import import_module

from sketchkv.attention import disable, enable
from sketchkv.cache import SketchCache
from sketchkv.policies import H2O, AttentionMass, Policy, Random, Sketch, Window
from sketchkv.sketch import CountMinSketch

# Loaded when asked for: what a bounded cache does without.
_LATER = {"generate": "decode", "score": "decode", "load": "loading", "Summary": "summary", "pyramid": "budgets"} | dict.fromkeys(
    ("LRU", "TOVA", "KeyNorm", "SnapKV"), "peers"
)


def __getattr__(name):
    if name in _LATER:
        return getattr(import_module(f"sketchkv.{_LATER[name]}"), name)
    raise AttributeError(f"module 'sketchkv' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LATER])
