"""A sketch with counters of 8 bits, and the eviction policy on it: what a sketch costs least."""

import copy

import torch

from sketchkv.sketch import CountMinSketch
from sketchkv.sketch_policy import Sketch

TOP = 255  # the largest code


class ByteCounters:
    """A table of 8-bit counters that share one float32 scale per row; to a sketch it is like a table of floats.

    A counter is worth code * scale, the code a uint8. Decay multiplies the scales alone, so it is exact. An addition is made in float32 and rounded to a code: up if its fraction passes a
    threshold, down if not. Rounding to the nearest would lose every addition below half a step, however many came; a
    threshold spread evenly over [0, 1) keeps them on average. The thresholds are no random draw but a low-discrepancy
    sequence (Roberts 2018, "R3") in the counter's place and the number of additions made, moved by `seed`: they need no
    memory, are the same on every device and for every sequence and head, and a run repeats exactly.

    Each addition puts a counter less than one step off. A row's scale grows when its largest counter would pass the
    last code, to where that counter takes half the codes: a step is at most 1/127 of the largest that a row holds then,
    and shrinks with decay.
    """

    LEVELS = 4096  # of the thresholds; coarse enough that float32 leaves an untouched code as it is

    def __init__(self, shape, seed=0, device=None):
        self.codes = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(*shape[:-1], 1, device=device)
        self.seed, self.additions = seed, 0

    shape = property(lambda self: self.codes.shape)
    dtype = property(lambda self: self.codes.dtype)
    device = property(lambda self: self.codes.device)
    nbytes = property(lambda self: self.codes.nbytes + self.scale.nbytes)

    def max(self):
        return self.values().max()

    def min(self):
        return self.values().min()

    def values(self):
        """What the counters are worth, float32 of the table's shape."""
        return self.codes * self.scale

    def scatter_add_(self, dim, index, weights):
        self._round(self.values().scatter_add_(dim, index, weights))

    def gather(self, dim, index):
        return self.values().gather(dim, index)

    def add_(self, other):
        self._round(self.values() + other.values())

    def mul_(self, factor):
        self.scale.mul_(factor)

    def zero_(self):
        self.codes.zero_()
        self.scale.zero_()
        self.additions = 0

    def index_select(self, dim, index):
        chosen = copy.copy(self)
        chosen.codes, chosen.scale = self.codes.index_select(dim, index), self.scale.index_select(dim, index)
        return chosen

    def _round(self, values):
        largest = values.amax(-1, keepdim=True)
        # Few bits: weights that differ in their last bit, as sums in another order do, give the same scale and codes.
        scale = (largest * (2 / TOP)).bfloat16().float()
        self.scale.copy_(torch.where(largest > TOP * self.scale, scale, self.scale))
        codes = (
            values.div_(self.scale.clamp(min=torch.finfo(torch.float32).tiny))
            .add_(self._thresholds())
            .floor_()
        )
        self.codes.copy_(codes.clamp_(0, TOP))
        self.additions += 1

    def _thresholds(self):
        depth, width = self.shape[-2:]
        row, column = (torch.arange(size, device=self.device) for size in (depth, width))
        # Fractions 0.819, 0.671 and 0.550 of 2^32: powers of the inverse of the root of x^4 = x + 1.
        time = (self.seed + self.additions) * 3518319155 % 2**32
        place = (time + column * 2882110345 + row[:, None] * 2360945575) % 2**32
        return (place // (2**32 // self.LEVELS) + 0.5) / self.LEVELS


class ByteSketch(CountMinSketch):
    """A Count-Min Sketch with counters of 8 bits and a scale per row (`ByteCounters`): an estimate errs by less than one step
    of its row's scale per addition. Parameters as of `CountMinSketch`, but for the dtype."""

    divisible = False  # an addition in several parts is rounded several times
    number = property(lambda self: self.table.scale.dtype)

    def make_table(self, shape, dtype, device):
        return ByteCounters(shape, self.hash.seed, device)

    @property
    def total(self):
        return self.table.values()[..., 0, :].sum(-1)

    def tensors(self):
        return [self.table.codes, self.table.scale]


class SmallSketch(Sketch):
    """`sketchkv.Sketch` on counters of 8 bits. Parameters as there."""

    recordable = False  # counters are rounded by a sequence that Python counts

    def make_sketch(self, slots):
        return ByteSketch(self.width, self.depth, slots.shape, self.seed, device=slots.device)
