"""Checks of what users hand in, so that one kind of fault has one wording."""

import numbers
import operator


def whole(name, value, least, most=None):
    """`value` as an int: whole numbers of numpy and torch count, booleans don't.

    Raises ValueError that names `name` and what it may be.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name} must be a whole number, {limits}; got {value!r}")
    return number


def share(name, value, hint=""):
    """`value` as a float in (0, 1]. Raises ValueError that names `name`; `hint` is added to the message."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}{hint}")
    return float(value)


def flag(name, value):
    """`value` if it is True or False, else a ValueError that names `name`: a string "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def seed(value):
    """A seed as an int that random generators take."""
    return whole("seed", value, -(2**63), 2**63 - 1)
