"""What all kernels share: Triton where it is installed, its interpreter, whether kernels can run, and launches that cost little."""

import inspect
import os
from functools import partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the CPU builds of torch come without: importing works, only use is refused
    triton = None

    class tl:  # type: ignore[no-redef]
        constexpr = float

    def jit(function=None, **_):
        return function or jit


INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # kernels run on the CPU, slowly, to check their arithmetic


def usable(device):
    """Whether the kernels can run on `device`: a GPU with triton, or Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


class Kernel:
    """A Triton kernel: `kernel[grid](*tensors and numbers, **constants)`.

    Triton looks at each argument of each launch anew, which takes the host longer than most of these kernels take the device.
    Here what it compiled is found by all that it depends on: dtypes, whether addresses are multiples of 16, numbers, constants.

    loose: names of numbers that the compiled code does not depend on.
    """

    def __init__(self, function, loose=()):
        self.slow: Any = jit(function, do_not_specialize=list(loose))
        self.compiled: dict[tuple, tuple] = {}
        self.names = list(inspect.signature(function).parameters)
        self.loose = [self.names.index(name) for name in loose]

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *arguments, **constants):
        if INTERPRETED:
            return self.slow[grid](*arguments, **constants)
        device, values, kinds = torch._C._cuda_getDevice(), [], []
        for each in arguments:
            if each.__class__ is torch.Tensor:
                each = each.data_ptr()
                kinds.append(each & 15)
            else:
                kinds.append(each if each.__class__ is int else each.__class__)
            values.append(each)
        for place in self.loose:
            kinds[place] = values[place] >= 2**31
        dtypes = [each.dtype for each in arguments if each.__class__ is torch.Tensor]
        key = device, *kinds, *dtypes, *constants, *constants.values()
        found = self.compiled.get(key)
        if found is None:
            new = self.slow[grid](*arguments, **constants)
            rest = [constants[name] for name in self.names[len(arguments) :]]
            self.compiled[key] = new.run, new.function, new.packed_metadata, rest
            return
        run, function, metadata, rest = found
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*grid, *(1,) * (3 - len(grid)), stream, function, metadata, None, None, None, *values, *rest)


def kernel(*loose):
    """Decorator of a function that is launched; `jit` is for those that are called in it."""
    return partial(Kernel, loose=loose)
