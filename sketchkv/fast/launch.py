"""What all kernels share: Triton where it is installed, its interpreter, whether kernels can run, and launches that cost little."""

import inspect
import os
import threading
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

# One CUDA graph at a time: to begin one waits for the device, which another would not outlive.
recording = threading.Lock()


def usable(device):
    """Whether the kernels can run on `device`: a GPU with triton, or Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


def has_room(width, dtype, device):
    """Whether one program on `device` can multiply by a matrix `[width, width]` of a dtype and by its transpose: both may lie in
    shared memory at a time."""
    if device.type != "cuda":
        return True
    least = 99 * 1024  # of every GPU since 2020
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", least)
    return 2 * width * width * dtype.itemsize <= room


class Kernel:
    """A Triton kernel: `kernel[grid](*tensors, numbers and tuples of tensors, **constants)`.

    Triton looks at each argument of each launch anew, which takes the host longer than most of these kernels take the device.
    Here what it compiled is found by all that it depends on: dtypes, whether addresses are multiples of 16, numbers, constants.

    loose: names of numbers that the compiled code does not depend on.
    """

    def __init__(self, function, loose=()):
        self.slow: Any = jit(function, do_not_specialize=list(loose))
        self.names, self.loose = list(inspect.signature(function).parameters), loose
        self.layouts: dict[tuple, tuple] = {}
        self.compiled: dict[tuple, tuple] = {}

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def _layout(self, kinds):
        """Places of tensors, of numbers that the compiled code depends on, and of tuples."""
        named = [(place, kind) for place, kind in enumerate(kinds) if self.names[place] not in self.loose]
        self.layouts[kinds] = tuple([p for p, k in named if k is kind] for kind in (torch.Tensor, int, tuple))
        return self.layouts[kinds]

    def launch(self, grid, *arguments, **constants):
        if INTERPRETED:
            return self.slow[grid](*arguments, **constants)
        kinds, device, values = tuple(map(type, arguments)), torch._C._cuda_getDevice(), list(arguments)
        tensors, numbers, tuples = self.layouts.get(kinds) or self._layout(kinds)
        key: Any = [device, kinds, *constants, *constants.values()]
        for place in numbers:  # what Triton looks at
            number = values[place]
            key.append(-1 if number == 1 else (number & 15 == 0) + 2 * (number >= 2**31))
        for place in tensors:
            values[place] = pointer = arguments[place].data_ptr()
            key += arguments[place].dtype, pointer & 15
        for place in tuples:
            values[place] = pointers = tuple([tensor.data_ptr() for tensor in arguments[place]])
            key += [tensor.dtype for tensor in arguments[place]]
            key += [pointer & 15 for pointer in pointers]
        key = tuple(key)
        if key not in self.compiled:
            new = self.slow[grid](*arguments, **constants)
            rest = [constants[name] for name in self.names[len(arguments) :]]
            self.compiled[key] = new.run, new.function, new.packed_metadata, rest
            return
        run, function, metadata, rest = self.compiled[key]
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(*grid, *(1,) * (3 - len(grid)), stream, function, metadata, None, None, None, *values, *rest)


def pieces(count, size):
    """How many parts of a size make up a count."""
    return -(-count // size)


def power(count):
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()


def kernel(*loose):
    """Decorator of a function that is launched; `jit` is for those that are called in it."""
    return partial(Kernel, loose=loose)
