"""Parameters that `SketchCache` does not have: who takes them, how former versions spelled them, and mistyped ones."""

import difflib
import inspect

from sketchkv.index import KeyIndex
from sketchkv.policies import AttentionMass
from sketchkv.quantize import quantized
from sketchkv.sketch_policy import Sketch
from sketchkv.summary import Summary

FORMER = {
    "summary_slots": "summary=Summary({value}), from sketchkv.summary import Summary",
    "quantizer": "bits= alone; ranges per group are in sketchkv.study.extras",
} | dict.fromkeys(
    ("kind", "counters", "coarse_bits", "fine", "demote", "shared"), "nothing: it was not worth keeping"
)
# What is handed to a cache, by the parameter that takes it.
PARTS = (
    ("policy", Sketch),
    ("policy", AttentionMass),
    ("summary", Summary),
    ("index", KeyIndex),
    ("codec", quantized),
)


def refuse(made, parameters):
    """Raises TypeError for the first of these parameters, {name: value}, none of which the class `made` has."""
    takers = {f"{made.__name__}.{make.__name__}(..., {{}}=...)": make for make in (made.compact, made.recall)}
    for name, part in PARTS:
        takers[f"{name}={part.__name__}({{}}=...), from {part.__module__} import {part.__name__}"] = part
    taken = {how: set(inspect.signature(taker).parameters) for how, taker in takers.items()}
    name, value = next(iter(parameters.items()))
    write = FORMER.get(name, "").format(value=value)
    write = write or ", or ".join(how.format(name) for how, names in taken.items() if name in names)
    known = set(inspect.signature(made).parameters).union(*taken.values())
    near = " or ".join(map(repr, difflib.get_close_matches(name, known, n=2)))
    hint = f": write {write}" if write else f"; did you mean {near}?" if near else ""
    raise TypeError(f"{made.__name__} has no parameter {name!r}{hint}")
