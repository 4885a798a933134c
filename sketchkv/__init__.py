"""sketchkv: a KV cache under a hard cap, with sketches that remember which tokens mattered."""

from sketchkv.attention import disable, enable
from sketchkv.cache import SketchCache
from sketchkv.decode import generate, score
from sketchkv.loading import load
from sketchkv.policies import H2O, LRU, TOVA, AttentionMass, KeyNorm, Policy, Prior, Random, Sketch, SnapKV, Window
from sketchkv.self_tuning import SelfTuned
from sketchkv.sketches import RACE, ConservativeSketch, CountMinSketch, CountSketch

__all__ = [
    "H2O", "LRU", "RACE", "TOVA", "AttentionMass", "ConservativeSketch", "CountMinSketch", "CountSketch", "KeyNorm", "Policy",
    "Prior", "Random", "SelfTuned", "Sketch", "SketchCache", "SnapKV", "Window", "disable", "enable", "generate", "load", "score",
]  # fmt: skip
