"""Checks of what users hand in, so that one kind of fault has one wording."""

import numbers
import operator
import os
from typing import TypeGuard

import torch


def whole(name, value, least, most=None):
    """`value` as an int: whole numbers of numpy and torch count, booleans of either don't.

    Raises ValueError that names `name` and what it may be.
    """
    try:
        number = None if _boolean(value) else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name} must be a whole number, {limits}; got {value!r}")
    return number


def real(value) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or numpy."""
    return isinstance(value, numbers.Real)


def share(name, value, hint=""):
    """`value` as a float in (0, 1]. Raises ValueError that names `name`; `hint` is added to the message."""
    least = torch.finfo(torch.float32).tiny  # what is below is 0 on some devices
    if _boolean(value) or not real(value) or not least <= value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], not below {least:.1e}; got {value!r}{hint}")
    return float(value)


def flag(name, value):
    """`value` as a bool if it is one, of numpy or torch too, else a ValueError that names `name`: a string "false" would
    count as true."""
    if not _boolean(value) or getattr(value, "ndim", 0) > 0:
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def seed(value):
    """A seed as an int that random generators take."""
    return whole("seed", value, -(2**63), 2**63 - 1)


def device(value):
    """A torch device; None is the CPU."""
    try:
        return torch.device("cpu" if value is None else value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be one of torch's, such as 'cpu' or 'cuda', got {value!r}") from None


def memory(needed, device, remedy):
    """Raises ValueError, with the remedy, if `needed` bytes are more than all memory of the device: allocators' own messages
    name neither, and a CPU's process may be killed without one."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > total:
        raise ValueError(
            f"{needed / 2**30:.3g} GiB are needed, {device} has {total / 2**30:.3g} GiB of memory: {remedy}"
        )


def _boolean(value):
    return "bool" in str(getattr(value, "dtype", type(value)))


def rows(index, count):
    """Raises ValueError unless `index` is a tensor of whole numbers in [0, count): rows of a batch to go on with."""
    sound = isinstance(index, torch.Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    if not sound or (
        index.device.type == "cpu" and index.numel() and not 0 <= index.min() <= index.max() < count
    ):
        raise ValueError(f"rows must be an int64 tensor [n] of numbers from 0 to {count - 1}, got {index!r}")
