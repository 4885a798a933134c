"""A policy written in a notebook, scored in the grid: its source is part of the grid point, so that a change of it computes its
own points again and no others."""

import ast
import linecache
from functools import lru_cache

from sketchkv.policies import Policy
from sketchkv.study.evaluate import evaluate
from sketchkv.study.sources import KnobError


def source(policy):
    """The text of the cell that defines the class `policy`, without comments: what `build` makes the class of again.

    Raises KnobError where no text can be found, or where the cell does not stand alone.
    """
    methods = [value for value in vars(policy).values() if hasattr(value, "__code__")]
    text = "".join(linecache.getlines(methods[0].__code__.co_filename)) if methods else ""
    if not text:
        raise KnobError(
            f"{policy.__name__} has no method of its own, or its cell can't be found: run the cell again"
        )
    text = ast.unparse(ast.parse(text))
    try:
        build(policy.__name__, text)
    except Exception as error:
        raise KnobError(
            f"the cell of {policy.__name__} must hold its imports and the class alone, for other processes run it too: "
            f"{type(error).__name__}: {error}"
        ) from None
    return text


@lru_cache
def build(name, text):
    """The class `name` that the text of a cell defines."""
    names: dict = {"__name__": __name__}
    exec(text, names)
    if not (isinstance(names.get(name), type) and issubclass(names[name], Policy)):
        raise KnobError(f"the cell defines no sketchkv Policy named {name}")
    return names[name]


def point(method, text, own="", **texts):
    """A grid point: `evaluate`, or with `own`, the text of a cell, of the policy that `method["method"]` names in it. `text`
    is the revision of the documents, which belongs to what names the point."""
    if own:
        method = method | {"method": build(method["method"], own)()}
    return evaluate(method, text=text, **texts)
