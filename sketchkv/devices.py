"""Which operations suit a device, and what is compiled for it."""

from importlib.util import find_spec

from sketchkv.ops import eager
from sketchkv.slots import Plain


def suited(ops, device, codec=Plain):
    """The operations of a layer on `device`: the fused ones on a GPU with Triton, those in C on a CPU where a `codec` stores
    keys and values, else the eager rule; `ops` if it is another that was set."""
    if not ops.suits:
        return ops
    if not _fuses(device):
        if device.type != "cpu" or codec is Plain:
            return eager
        from sketchkv.fast.cpu import coded

        return coded
    from sketchkv.fast.ops import fused

    return fused


def _fuses(device):
    return device.type == "cuda" and find_spec("triton") is not None


class Compileable:
    """`cache.is_compileable`, False unless it is set: that `model.generate` is to ask `compiled_call` for its steps. Within a pass
    the answer is no, or transformers would build a mask."""

    def __get__(self, cache, kind=None):
        return cache is not None and vars(cache).get("compileable", False) and not cache.is_open

    def __set__(self, cache, value):
        cache.compileable = value


def compiled_call(model, config=None):
    """What `model.generate` calls for each token where the cache is compileable (`sketchkv.fast.compiled_call`)."""
    from sketchkv import fast

    return fast.compiled_call(model, config)
