"""sketchkv: a KV cache under a hard cap, with sketches that remember which tokens mattered."""

from sketchkv.attention import disable, enable
from sketchkv.cache import SketchCache
from sketchkv.decode import generate, score
from sketchkv.policies import AttentionMass, Policy, Random, Sketch, Window
from sketchkv.sketches import CountMinSketch

__all__ = [
    "AttentionMass", "CountMinSketch", "Policy", "Random", "Sketch", "SketchCache", "Window",
    "disable", "enable", "generate", "score",
]  # fmt: skip
