"""Keys and values in few bits: a codec for `Slots`, in randomly rotated coordinates.

Every token has a scale of its own, since that is all that a cache that evicts can have: KIVI (Liu et al. 2024, arXiv
2402.02750) lets neighbouring tokens share a range per channel, and after an eviction neighbours are no longer together.
"""

import math
from functools import lru_cache, partial
from typing import Any

import torch

from sketchkv.checks import whole
from sketchkv.ring import Ring
from sketchkv.slots import MOST_TOKENS, Plain

BITS = (16, 8, 6, 5, 4, 3, 2)
TINY = 2.0**-24  # the smallest positive float16
# Tokens after which keys are centred: early enough for most of a text, late enough for a mean.
CENTRE_AFTER = 32
MOST_NEAR = 2**20  # tokens
# Of a cap, one token in so many is held more finely, so many at most, and none of a cap below the least.
FINE_SHARE, MOST_FINE, LEAST_FINE = 32, 64, 128


def quantized(bits, newest=0, sinks=0, finer=4):
    """The codec that holds keys and values in so many bits: a function of (dtype, device).

    bits: one of `BITS`, or a pair of them for keys and values.
    newest: of so many tokens, and of the first `sinks`, what rounding took is held as well (`sketchkv.ring`); 0, or where 16
        bits round nothing: of none.
    finer: in so many bits, one of `BITS`.
    Raises ValueError for another number.
    """
    pair = bits if isinstance(bits, (tuple, list)) else (bits, bits)
    try:
        pair = tuple(whole("bits", each, min(BITS), max(BITS)) for each in pair)
    except ValueError:
        pair = ()
    if len(pair) != 2 or not set(pair) <= set(BITS):
        raise ValueError(f"bits must be one of {BITS}, or a pair of them for keys and values; got {bits!r}")
    if not whole("newest", newest, 0, MOST_NEAR) or min(pair) == 16:
        return partial(Quantized, pair)
    if finer not in BITS:
        raise ValueError(f"finer must be one of {BITS}, got {finer!r}")
    return partial(Quantized, pair, near=(newest, whole("sinks", sinks, 0, MOST_NEAR), finer))


def finely(settings, given, window, max_cache_size):
    """`settings` of a cache with a codec, in place of their bits, that holds sinks and the newest `window` tokens more finely.

    given: those of the settings that a user asked for. A codec among them is taken as it is.
    window: None: a share of the smallest cap, and none where that is small: there each token more counts for more than its
        rounding.
    Raises ValueError for a value out of range, TypeError for a codec beside bits or a window.
    """
    settings = dict(settings)
    bits = settings.pop("bits")
    if settings.get("codec") is not None:
        if "bits" in given or window is not None:
            raise TypeError(
                "give either codec= or bits= and fine_window=: quantized(bits, newest=...) is a codec"
            )
        return settings
    if bits is None:
        if window:
            raise ValueError("fine_window needs bits: without them nothing is rounded")
        return settings
    caps = max_cache_size if isinstance(max_cache_size, (list, tuple)) else [max_cache_size]
    # Of an empty list of caps the cache says what is wrong.
    cap = min((whole("max_cache_size", each, 1, MOST_TOKENS) for each in caps), default=LEAST_FINE)
    # With an index, a token that is held finely must be one that is always in a slot.
    recent = whole("recent_window", settings.get("recent_window", 16), 0, MOST_TOKENS)
    most = recent if settings.get("index") else cap
    if window is None:
        window = 0 if cap < LEAST_FINE else min(MOST_FINE, cap // FINE_SHARE, most)
    window = whole("fine_window", window, 0, most)
    sinks = whole("num_sinks", settings.get("num_sinks", 4), 0, MOST_NEAR)
    return settings | {"codec": quantized(bits, window, sinks)}


class Quantized(Plain):
    """Vectors are turned by one random rotation (queries too, so that no product changes) and coded one by one, and of keys
    it is the distance from their mean that is coded: the keys of a head lie around a common point, far from zero, and the
    same in every slot it could change no attention.

    bits: of keys and values, a pair.
    dtype, device: of the model's keys and values.
    near: (newest, sinks, bits) of tokens that are held more finely, or None.
    """

    def __init__(self, bits, dtype, device, near=None):
        super().__init__(dtype, device)
        self.ring = Ring(*near[:2]) if near else None
        self.finer = near[2] if near else None
        self.bits = dict(zip(("keys", "values"), bits, strict=True))
        self.coders, self.rotations = {}, {}
        self.centre: Any = None
        self.settles_after = CENTRE_AFTER if self.rotates else 0

    rotates = property(lambda self: min(self.bits.values()) < 16)

    def make_coder(self, name, width):
        """What codes "keys" or "values" of so many channels."""
        return self._coder(self.bits[name], width)

    def _coder(self, bits, width):
        if bits < 16 and width % 8:
            raise ValueError(
                f"vectors of {width} channels can't be packed in {bits} bits, which takes a multiple of 8: give the cache "
                "bits=16, or bits=None"
            )
        return coder(bits, self.device)

    def all_coders(self):
        """What codes keys, values and what their codes lack."""
        return [*self.coders.values(), *(self.ring.coders.values() if self.ring else ())]

    def arrays(self, name, shape, width):
        self.coders[name] = self.make_coder(name, width)
        if self.rotates:
            self.rotations[name] = rotation(width, self.device)
            if name == "keys" and self.centre is None:  # wider slots for a prompt share it
                self.centre = torch.zeros(*shape[:2], 1, width, dtype=torch.float16, device=self.device)
        if self.ring:
            fine = self._coder(self.finer, width)
            self.ring.allocate(name, shape[:2], fine, blank(fine, width, self.device))
        stored = zip((name, f"{name}_scale"), blank(self.coders[name], width, self.device), strict=True)
        return {part: like.new_zeros(*shape, like.shape[-1]) for part, like in stored}

    def encode(self, name, vectors):
        vectors = vectors - self.centre if self.centre is not None and name == "keys" else vectors
        return dict(zip((name, f"{name}_scale"), self.coders[name].encode(vectors), strict=True))

    def decode(self, name, arrays):
        vectors = self.coders[name].decode(arrays[name], arrays[f"{name}_scale"], self.dtype)
        # Not in place: float16 numbers are decoded to a view of the slots.
        return (
            (vectors + self.centre).to(self.dtype) if self.centre is not None and name == "keys" else vectors
        )

    def keep(self, coded, positions, first):
        if self.ring:
            rests = {name: vectors - self.decode(name, arrays) for name, (vectors, arrays) in coded.items()}
            self.ring.keep(rests, positions, first)

    def near(self, slots, positions):
        return self.ring.near(slots, positions) if self.ring else None

    def turn(self, query, key, value):
        if not self.rotations:
            return query, key, value
        of_keys, of_values = (matrix(self.rotations[name], query.dtype) for name in ("keys", "values"))
        return query @ of_keys, key @ of_keys, value @ of_values

    def turn_back(self, output):
        return output @ matrix(self.rotations["values"], output.dtype).T if self.rotations else output

    def settle(self, slots, first, rows=None):
        """Codes stored keys of these rows anew, as distances from the mean of the finite ones from position `first` on."""
        keys, rows = slots["keys"], True if rows is None else rows[..., None]
        if self.ring:
            keys = self.ring.added(slots, keys)
        member = (slots["positions"] >= first)[..., None] & keys.isfinite().all(-1, keepdim=True)
        total = keys.where(member, 0).sum(2, keepdim=True)
        mean = total / member.sum(2, keepdim=True).clamp(min=1)
        self.centre.copy_(mean if rows is True else mean.where(rows, self.centre))
        arrays = self.encode("keys", keys)
        for name, coded in arrays.items():
            held = slots.arrays[name][:, :, : slots.used]
            held.copy_(coded if rows is True else coded.where(rows, held))
        if self.ring:
            self.ring.renew(slots, keys - self.decode("keys", arrays), rows)

    def tensors(self):
        return ([] if self.centre is None else [self.centre]) + (self.ring.tensors() if self.ring else [])

    def shared(self):
        return list(self.rotations.values())


@lru_cache
def coder(bits, device):
    """One for all layers: what comes from the host takes a GPU longer than all else that a layer allocates."""
    return Half() if bits == 16 else Normal(bits, device)


@lru_cache
def blank(coder, width, device):
    """What a coder makes of one vector of so many channels, to be allocated alike."""
    return coder.encode(torch.zeros(1, 1, 1, width, device=device))


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
    for width, part in zip(widths, packed.split([count * width // 8 for width in widths], -1), strict=True):
        if width < 8:  # the i-th part of each byte lies in the i-th stretch of channels
            part = (part.unsqueeze(-2) >> _shifts(width, part.device)).flatten(-2) & (1 << width) - 1
        codes = codes + (part << shift) if shift else part
        shift += width
    return codes


@lru_cache
def _shifts(width, device):
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]


def _widths(bits):
    return [width for width in (8, 4, 2, 1) if bits & width]


class Half:
    """float16: codes are the numbers, and there are no scales. Values beyond 65504 become infinite."""

    def encode(self, x):
        return x.half(), x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)

    def decode(self, codes, scales, dtype):
        return codes.to(dtype)


class Normal:
    """For vectors in randomly rotated coordinates (`rotation`), whose channels are then nearly normal and of equal spread:
    each is rounded to the levels that are best for a normal distribution (Lloyd 1982, Max 1960), and the vector keeps one
    scale, float16 `[..., 1]`, the one of least squares. After QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and TurboQuant
    (Zandieh et al. 2025, arXiv 2504.19874). Where a range per group spends its levels on the largest channel, this does not.
    """

    def __init__(self, bits, device):
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
        return self.levels.index_select(0, codes.flatten()).view(codes.shape)


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
