"""What all kernels share: Triton where it is installed, its interpreter, and whether kernels can run at all."""

import os

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
