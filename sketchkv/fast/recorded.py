"""Which steps `model.generate` may record: those of an untouched model, in which the host waits for nothing."""

import threading
from contextlib import contextmanager
from itertools import chain

import torch
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode

from sketchkv.fast.launch import usable
from sketchkv.support import text_config

KNOWN = {"torch", "transformers", "peft", "sketchkv"}  # modules of others may do more than compute
# Hooks of `sketchkv.enable`, and those that do nothing unless hidden states are asked for.
HARMLESS = ("sketchkv.attention", "transformers.utils.output_capturing")
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
COPIES = (aten._to_copy, aten.copy_)
DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def records(model, cache):
    """Whether steps of `model` with `cache`, a `SketchCache` with a text, can be recorded."""
    parts = [cache]
    for layer in cache.layers:
        parts += layer, layer.policy, layer.slots.codec
    return (
        # What others wrote may count in Python.
        all(type(part).__module__.startswith("sketchkv.") for part in parts)
        and all(layer.ops.suits and layer.policy.recordable for layer in cache.layers)
        and on_one_gpu(model)
        and untouched(model)
    )


def on_one_gpu(model):
    """Whether all weights lie on the current GPU, and Triton is there."""
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    device = devices.pop()
    return (
        not devices
        and device.type == "cuda"
        and device.index == torch.cuda.current_device()
        and usable(device)
        and not torch.is_autocast_enabled("cuda")  # casts live no longer than it does
    )


def untouched(model):
    """Whether a step runs nothing that wants to be run each time: a hook, a function in place of a module's `forward`, a
    module that others wrote."""
    hooked = bool(modules._has_any_global_hook()) or model.training
    for each in model.modules():
        hooks = chain(each._forward_hooks.values(), each._forward_pre_hooks.values())
        hooked |= any(getattr(hook, "__module__", None) not in HARMLESS for hook in hooks)
        hooked |= "forward" in vars(each) or each._compiled_call_impl is not None
        hooked |= type(each).__module__.partition(".")[0] not in KNOWN
    # Masks of flex attention are compiled in each pass.
    return not (hooked or text_config(model.config)._attn_implementation.endswith("flex_attention"))


def state(model):
    """What a recorded step holds of the model: where its weights lie, which modules it has, and flags and numbers in them and in
    its configuration (which adapter is on, how it is scaled, a softcap)."""
    where = [(tensor.data_ptr(), tensor.dtype) for tensor in chain(model.parameters(), model.buffers())]
    configs = [_plain(vars(config)) for config in (model.config, text_config(model.config))]
    return where, configs, [_plain(vars(module)) for module in model.modules()]


def _plain(thing):
    if isinstance(thing, dict):
        return [(name, _plain(each)) for name, each in thing.items()]
    if isinstance(thing, (list, tuple)):
        return [_plain(each) for each in thing]
    return thing if isinstance(thing, (bool, int, float, str)) else id(thing)


@contextmanager
def pretended():
    """This thread is told that it is recorded: transformers leaves some checks out then."""
    own, here = torch.cuda.is_current_stream_capturing, threading.get_ident()
    torch.cuda.is_current_stream_capturing = lambda: threading.get_ident() == here or own()
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = own


class Waits(TorchDispatchMode):
    """`found`: whether the host waited for a device, or wrote to one, what a recording can't repeat."""

    found = False

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        result, kind = op(*arguments, **(named or {})), op.overloadpacket
        if kind in COPIES:
            self.found |= (
                len({x.device.type for x in (result, *arguments) if isinstance(x, torch.Tensor)}) > 1
            )
        elif kind in INDEXING:  # by a mask, it counts
            self.found |= any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in arguments[1])
        else:
            self.found |= not DEPENDS.isdisjoint(op.tags)
        return result
