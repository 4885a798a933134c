"""How parameters of former versions are spelled now, and mistyped ones."""

import difflib
import inspect

from sketchkv import cache

FORMER = (
    dict.fromkeys(
        ("width", "depth", "key", "decay", "mean", "lsh_bits", "seed"),
        "policy=Sketch({name}=...), from sketchkv import Sketch",
    )
    | {
        "summary_slots": "summary=Summary({value}), from sketchkv.summary import Summary",
        "quantizer": "bits= alone; ranges per group are in sketchkv.study.extras",
        "store": "index=KeyIndex(store={value!r}), from sketchkv.index import KeyIndex",
    }
    | dict.fromkeys(
        ("kind", "counters", "coarse_bits", "fine", "demote", "shared"), "nothing: it was not worth keeping"
    )
)


def refuse(parameters):
    """Raises TypeError for the first of these parameters, {name: value}, that `SketchCache` does not have."""
    made = cache.SketchCache
    known = {
        name for make in (made, made.compact, made.recall) for name in inspect.signature(make).parameters
    }
    for name, value in parameters.items():
        near = difflib.get_close_matches(name, known, n=1)
        instead = f"; did you mean {near[0]!r}?" if near else ""
        instead = f": write {FORMER[name].format(name=name, value=value)}" if name in FORMER else instead
        raise TypeError(f"SketchCache has no parameter {name!r}{instead}")
