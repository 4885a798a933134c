"""Keys and values in few bits: what `Slots` holds when a cache is given `bits`.

A coder turns vectors `[..., head_dim]`, each on its own, into codes (packed) and scales, and back. Every token has scales
of its own, since that is all that a cache that evicts can have: KIVI (Liu et al. 2024, arXiv 2402.02750) lets neighbouring
tokens share a range per channel of the keys, and after an eviction neighbours are no longer together.
"""

import math
from functools import lru_cache

import torch
from torch.nn.functional import embedding

BITS = (16, 8, 5, 4, 3, 2)
CODERS = ("normal", "range")
GROUP = 32  # channels that share a range, as in KIVI
TINY = 2.0**-24  # the smallest positive float16
ROUND_UP = 1 + 2.0**-10  # more than rounding to float16 can take away


def coder(bits, head_dim, kind, device):
    """The coder of this kind ("normal" or "range") for vectors of `head_dim` channels; 16 bits are float16 for both.

    Raises ValueError for bits or a kind that does not exist, or a `head_dim` that cannot be packed.
    """
    if bits not in BITS or kind not in CODERS or isinstance(bits, bool):
        raise ValueError(f"unknown bits={bits!r} or quantizer={kind!r}: choose of {BITS} and of {CODERS}")
    if bits < 16 and head_dim % 8:
        raise ValueError(f"vectors of {head_dim} channels can't be packed in {bits} bits: head_dim must be a multiple of 8")
    if bits == 16:
        return Half()
    return Normal(bits, head_dim, device) if kind == "normal" else Range(bits, head_dim)


def pack(codes, bits):
    """uint8 codes below 2^bits `[..., n]` (n a multiple of 8) in uint8 `[..., n * bits / 8]`: low bits first in parts of 8,
    4, 2 or 1, of which a byte holds as many as fit."""
    parts, shift = [], 0
    for width in _widths(bits):
        part = (codes >> shift & (1 << width) - 1).unflatten(-1, (8 // width, -1))
        parts.append(sum(part[..., i, :] << width * i for i in range(8 // width)))
        shift += width
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def unpack(packed, bits):
    """What `pack` was given."""
    codes, shift = 0, 0
    widths = _widths(bits)
    count = packed.shape[-1] * 8 // bits
    for width, part in zip(widths, packed.split([count * width // 8 for width in widths], -1)):
        part = torch.cat([part >> width * i & (1 << width) - 1 for i in range(8 // width)], -1) if width < 8 else part
        codes = codes + (part << shift) if shift else part
        shift += width
    return codes


def _widths(bits):
    return [width for width in (8, 4, 2, 1) if bits & width]


class Half:
    """float16: codes are the numbers, and there are no scales. Values beyond 65504 become infinite."""

    def encode(self, x):
        return x.half(), x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)

    def decode(self, codes, scales, dtype):
        return codes.to(dtype)


class Range:
    """Asymmetric, the range of each group of 32 channels (one group if `head_dim` is no multiple of 32) divided evenly.

    Codes are uint8 `[..., head_dim * bits / 8]`; scales, float16 `[..., 2 * groups]`, are the minimum of each group, then
    the step of each. Both are rounded outwards, so that the range covers the group and no value is off by more than half a
    step. Values beyond float16's 65504 have no finite range and come back as NaN.
    """

    def __init__(self, bits, head_dim):
        self.bits, self.group = bits, GROUP if head_dim % GROUP == 0 else head_dim

    def encode(self, x):
        grouped = x.float().unflatten(-1, (-1, self.group))
        low, high = grouped.aminmax(dim=-1)
        low = (low - low.abs() * (ROUND_UP - 1) - TINY).half()
        step = ((high - low.float()) / (2**self.bits - 1) * ROUND_UP + TINY).half()
        codes = (grouped - low.float()[..., None]) / step.float()[..., None]
        codes = codes.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        return pack(codes, self.bits), torch.cat([low, step], -1)

    def decode(self, codes, scales, dtype):
        low, step = scales.float().unsqueeze(-1).chunk(2, -2)
        codes = unpack(codes, self.bits).unflatten(-1, (step.shape[-2], -1)).float()
        return torch.addcmul(low, codes, step).flatten(-2).to(dtype)


class Normal:
    """For vectors in randomly rotated coordinates (`rotation`), whose channels are then nearly normal and of equal spread:
    each is rounded to the levels that are best for a normal distribution (Lloyd 1982, Max 1960), and the vector keeps one
    scale, float16 `[..., 1]`, the one of least squares. After QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and TurboQuant
    (Zandieh et al. 2025, arXiv 2504.19874). Where a range per group spends its levels on the largest channel, this does not.
    """

    def __init__(self, bits, head_dim, device):
        self.bits = bits
        levels = normal_levels(bits)
        self.levels = levels.float().to(device)
        self.bounds = ((levels[1:] + levels[:-1]) / 2).float().to(device)

    def encode(self, x):
        x = x.float()
        norm = x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1])
        codes = torch.bucketize(x / norm.clamp(min=TINY), self.bounds, out_int32=True)
        levels = self._levels(codes)
        scale = (x * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        return pack(codes.to(torch.uint8), self.bits), scale.half()

    def decode(self, codes, scales, dtype):
        return (self._levels(unpack(codes, self.bits).int()) * scales).to(dtype)

    def _levels(self, codes):
        return embedding(codes, self.levels[:, None]).squeeze(-1)


@lru_cache
def normal_levels(bits):
    """The 2^bits levels of least squared error for a standard normal variable, float64, ascending."""
    edge = torch.tensor([math.inf], dtype=torch.float64)
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(2000):  # each level moves to the mean of what is rounded to it
        bounds = torch.cat([-edge, (levels[1:] + levels[:-1]) / 2, edge])
        density, below = torch.exp(-bounds.square() / 2) / math.sqrt(2 * math.pi), torch.special.ndtr(bounds)
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels


@lru_cache
def rotation(head_dim, device):
    """A fixed random rotation `[head_dim, head_dim]`: the same for all layers, heads and sequences, kept once.

    Where `head_dim` is a power of two, a Hadamard matrix whose rows have random signs: int8, each entry 1 or -1, to be
    divided by sqrt(head_dim) (`matrix`), a quarter of the bytes of the float32 that any other size takes.
    """
    generator = torch.Generator().manual_seed(0)
    if head_dim & (head_dim - 1) == 0:
        hadamard = torch.ones(1, 1, dtype=torch.int8)
        while len(hadamard) < head_dim:  # Sylvester's construction
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        signs = 2 * torch.randint(0, 2, (head_dim, 1), dtype=torch.int8, generator=generator) - 1
        return (hadamard * signs).to(device)
    normal = torch.randn(head_dim, head_dim, dtype=torch.float64, generator=generator)
    orthogonal, triangle = torch.linalg.qr(normal)
    return (orthogonal * triangle.diagonal().sign()).float().to(device)


def matrix(rotation, dtype):
    """A rotation as it multiplies vectors, in `dtype`."""
    return rotation.to(dtype) * len(rotation) ** -0.5 if rotation.dtype == torch.int8 else rotation.to(dtype)
