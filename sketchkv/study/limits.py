"""Limits of a notebook's own parameters: a wrong value is one line, before anything is computed."""

from sketchkv import checks
from sketchkv.study.sources import KnobError


def whole(name, value, least, most):
    """`value`, a whole number from `least` to `most`; KnobError, which names `name` and the limits, for any other."""
    try:
        return checks.whole(name, value, least, most)
    except ValueError as error:
        raise KnobError(str(error)) from None


def several(name, values, least, most, longest):
    """`values`, a list of 1 to `longest` different whole numbers from `least` to `most`; KnobError for any other."""
    if (
        not isinstance(values, (list, tuple))
        or not 1 <= len(values) <= longest
        or len(set(values)) < len(values)
    ):
        raise KnobError(f"{name} must be a list of 1 to {longest} different whole numbers; got {values!r}")
    return [whole(f"each of {name}", value, least, most) for value in values]
