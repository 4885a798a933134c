"""How parameters of former versions are spelled now."""

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
    for name, value in parameters.items():
        instead = f": write {FORMER[name].format(name=name, value=value)}" if name in FORMER else ""
        raise TypeError(f"SketchCache has no parameter {name!r}{instead}")
