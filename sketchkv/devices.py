"""Which operations suit a device, and what is compiled for it."""

from importlib.util import find_spec

from sketchkv.ops import unset
from sketchkv.slots import Plain


def suited(ops, device, codec=Plain):
    """The operations of a layer on `device`: the fused ones on a GPU with Triton, those in C on a CPU where a `codec` stores
    keys and values, else the eager rule; `ops` if it is another that was set."""
    if not ops.suits:
        return ops
    if not _fuses(device):
        if device.type != "cpu" or codec is Plain:
            return unset
        from sketchkv.fast.cpu import coded

        return coded
    from sketchkv.fast.ops import fused

    return fused


def _fuses(device):
    return device.type == "cuda" and find_spec("triton") is not None


def records(device):
    """Whether `model.generate` records its steps there."""
    return device.type == "cuda"


def compiled_call(model, config=None):
    """What `model.generate` calls for each token where steps are recorded or compiled (`sketchkv.fast.compiled_call`)."""
    from sketchkv import fast

    return fast.compiled_call(model, config)
