"""Which operations suit a device."""

from importlib.util import find_spec

from sketchkv.ops import eager


def suited(ops, device):
    """The operations of a layer on `device`: the fused ones on a GPU with Triton, else the eager rule; `ops` if it is
    another that was set."""
    if not ops.suits:
        return ops
    if not _fuses(device):
        return eager
    from sketchkv.fast.ops import fused

    return fused


def _fuses(device):
    return device.type == "cuda" and find_spec("triton") is not None
