"""Other sketches than Count-Min: conservative update, Count-Sketch, RACE, and counters of 8 bits."""

import copy

import torch

from sketchkv.checks import whole
from sketchkv.sketch import CarterWegmanHash, CountMinSketch


class SignedHash:
    """`depth` pairs of independent Carter-Wegman functions: place + width * (1 if the sign is minus)."""

    def __init__(self, width, depth, seed=0, device=None):
        self.place = CarterWegmanHash(width, depth, seed, device)
        width, depth, seed = self.place.width, self.place.depth, self.place.seed
        self.width, self.depth, self.seed = 2 * width, depth, seed
        self.sign = CarterWegmanHash(2, depth, -1 - seed, device)

    def __call__(self, items):
        """Indices in [0, 2 width), int64 `[..., depth, n]`, of int32 or int64 `items` `[..., n]`."""
        return self.place(items) + self.place.width * self.sign(items)

    def check(self, items):
        """Raises what a call with these `items` raises."""
        self.place.check(items)

    @property
    def nbytes(self):
        return self.place.nbytes + self.sign.nbytes


class SimHashRows:
    """`depth` independent SimHash codes of `bits` bits, one per row of a table, as indices below `width`.

    Where 2^bits codes are more than a row's `width`, a code is hashed once more (Carter & Wegman), as RACE does.
    """

    def __init__(self, dim, width, depth, bits, seed=0, device=None):
        self.width, self.depth, self.seed, self.bits = width, depth, seed, whole("bits", bits, 1, 30)
        bits = self.bits
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(dim, depth * bits, generator=generator).to(device)
        self.powers = 2 ** torch.arange(bits, device=device, dtype=torch.int32)
        self.again = CarterWegmanHash(width, depth, seed, device) if 2**bits > width else None

    def __call__(self, vectors):
        """Indices in [0, width), int64 `[..., depth, n]`, of `vectors` `[..., n, dim]`."""
        if not vectors.is_floating_point():
            raise TypeError(f"items must be vectors [..., n, dim] of a float type, got {vectors.dtype}")
        if vectors.ndim < 2 or vectors.shape[-1] != len(self.projection):
            raise ValueError(
                f"items must be vectors [..., n, {len(self.projection)}], got shape {list(vectors.shape)}"
            )
        if vectors.device.type == "cpu" and not vectors.isfinite().all():
            raise ValueError("items must be finite: a vector with NaN or infinity has no direction")
        signs = (vectors.float() @ self.projection > 0).unflatten(-1, (self.depth, self.bits))
        codes = (signs * self.powers).sum(-1).transpose(-1, -2)
        return codes if self.again is None else self.again.by_row(codes)

    @property
    def nbytes(self):
        return self.projection.nbytes + self.powers.nbytes + (0 if self.again is None else self.again.nbytes)


class ByteCounters:
    """A table of 8-bit counters that share one float32 scale per row; to a sketch it is like a table of floats.

    A counter is worth code * scale, the code a uint8, or with `signed` an int8 of at most 127. Decay multiplies the
    scales alone, so it is exact. An addition is made in float32 and rounded to a code: up if its fraction passes a
    threshold, down if not. Rounding to the nearest would lose every addition below half a step, however many came; a
    threshold spread evenly over [0, 1) keeps them on average. The thresholds are no random draw but a low-discrepancy
    sequence (Roberts 2018, "R3") in the counter's place and the number of additions made, moved by `seed`: they need no
    memory, are the same on every device and for every sequence and head, and a run repeats exactly.

    Each addition puts a counter less than one step off. A row's scale grows when its largest counter would pass the
    last code, to where that counter takes half the codes: a step is at most 1/127 (signed 1/63) of the largest that a
    row holds then, and shrinks with decay.
    """

    LEVELS = 4096  # of the thresholds; coarse enough that float32 leaves an untouched code as it is

    def __init__(self, shape, signed=False, seed=0, device=None):
        self.codes = torch.zeros(shape, dtype=torch.int8 if signed else torch.uint8, device=device)
        self.scale = torch.zeros(*shape[:-1], 1, device=device)
        self.top = 127 if signed else 255
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

    def scatter_reduce_(self, dim, index, weights, reduce):
        self._round(self.values().scatter_reduce_(dim, index, weights, reduce))

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
        largest = values.abs().amax(-1, keepdim=True)
        # Few bits: weights that differ in their last bit, as sums in another order do, give the same scale and codes.
        scale = (largest * (2 / self.top)).bfloat16().float()
        self.scale.copy_(torch.where(largest > self.top * self.scale, scale, self.scale))
        codes = (
            values.div_(self.scale.clamp(min=torch.finfo(torch.float32).tiny))
            .add_(self._thresholds())
            .floor_()
        )
        self.codes.copy_(codes.clamp_(-self.top if self.codes.dtype == torch.int8 else 0, self.top))
        self.additions += 1

    def _thresholds(self):
        depth, width = self.shape[-2:]
        row, column = (torch.arange(size, device=self.device) for size in (depth, width))
        # Fractions 0.819, 0.671 and 0.550 of 2^32: powers of the inverse of the root of x^4 = x + 1.
        time = (self.seed + self.additions) * 3518319155 % 2**32
        place = (time + column * 2882110345 + row[:, None] * 2360945575) % 2**32
        return (place // (2**32 // self.LEVELS) + 0.5) / self.LEVELS


class AnyCounters(CountMinSketch):
    """A Count-Min Sketch that also takes `dtype=torch.uint8`, for counters of 8 bits with a scale per row
    (`ByteCounters`), which err by less than one step of their row's scale per addition. Parameters as of `CountMinSketch`."""

    def make_table(self, shape, dtype, device):
        if dtype == torch.uint8:
            return ByteCounters(shape, self.signed, self.hash.seed, device)
        try:
            return super().make_table(shape, dtype, device)
        except TypeError as error:
            raise TypeError(f"{error}, or uint8 with a scale per row") from None

    in_bytes = property(lambda self: isinstance(self.table, ByteCounters))
    divisible = property(
        lambda self: not self.in_bytes
    )  # an addition in several parts is rounded several times
    number = property(lambda self: self.table.scale.dtype if self.in_bytes else self.table.dtype)

    @property
    def total(self):
        return self.table.values()[..., 0, :].sum(-1) if self.in_bytes else super().total

    def tensors(self):
        return [self.table.codes, self.table.scale] if self.in_bytes else [self.table]


class ConservativeSketch(AnyCounters):
    """Count-Min with conservative update (Estan & Varghese 2002): an item raises only those of its counters that lie below
    its new estimate. Never below the true weight and never above plain Count-Min; arguments as there.

    One `update` takes its n items at once. Weights of an item that occurs more than once are summed; every item's
    estimate is read before any counter changes; then each counter becomes the largest of itself and, over the items of
    the batch that share it, estimate + weight. That is at most what any order one after the other would give, since
    there later items start from counters that earlier ones raised, and still at least the truth. The result does not
    depend on the order within a batch, but on what is one batch. Items that share the counters of as many rows as fill
    62 bits, all of them as a rule, count as one item: no estimate can tell them apart.

    Decay scales counters and truth alike, so both bounds stay. A merge adds the counters: at least the truth, but no
    longer what one stream would have left. `total` is not known: rows do not sum to it.
    """

    divisible = False

    @property
    def total(self):
        raise AttributeError("a conservative sketch does not know its total weight: use CountMinSketch")

    def add(self, indices, weights):
        bits = max(1, (self.hash.width - 1).bit_length())
        rows = min(self.hash.depth, 62 // bits)
        shift = bits * torch.arange(rows, device=indices.device)
        identity, order = (indices[..., :rows, :] << shift[:, None]).sum(-2).sort(dim=-1, stable=True)
        indices, weights = (
            indices.gather(-1, order.unsqueeze(-2).expand(indices.shape)),
            weights.gather(-1, order),
        )
        item = (identity.diff(dim=-1, prepend=identity[..., :1]) != 0).cumsum(-1)
        weights = torch.zeros_like(weights).scatter_add_(-1, item, weights).gather(-1, item)
        weights = weights.to(self.number)
        raised = self.ask(indices) + weights
        self.table.scatter_reduce_(-1, indices, raised.unsqueeze(-2).expand(indices.shape), "amax")


class CountSketch(AnyCounters):
    """Count-Sketch (Charikar, Chen & Farach-Colton 2002): each row adds an item's weight with a random sign, and the
    estimate is the median over rows (for even `depth`, the mean of the middle two) of counter times sign.

    Of either sign, weights and errors: an estimate from one row has the true weight as its mean over the draw of the
    seed, and a variance of at most F2 / width, F2 being the sum of the squared weights of the other items. It suffers
    less than Count-Min from many light items, and more from a few heavy ones. Arguments as for `CountMinSketch`; uint8
    stands for signed codes, int8 with a float32 scale per row.

    `hash(items)` holds counter and sign in one number. Signs come from functions of their own: taken from the function
    that picks the counter, they would agree for items that collide.
    """

    signed = True

    def make_hash(self, width, depth, seed, device):
        return SignedHash(width, depth, seed, device)

    @property
    def total(self):
        raise AttributeError("a Count-Sketch does not know its total weight: rows hold it with random signs")

    def _sign(self, indices):
        width = self.table.shape[-1]
        return indices % width, 1 - 2 * (indices >= width).to(self.number)

    def add(self, indices, weights):
        indices, sign = self._sign(indices)
        self.table.scatter_add_(-1, indices, sign * weights.to(self.number).unsqueeze(-2))

    def ask(self, indices):
        indices, sign = self._sign(indices)
        rows = (self.table.gather(-1, indices) * sign).sort(-2).values
        depth = rows.shape[-2]
        low, high = rows[..., (depth - 1) // 2, :], rows[..., depth // 2, :]
        return low if depth % 2 else (low + high) / 2


class RACE(AnyCounters):
    """RACE, repeated array of count estimators (Coleman & Shrivastava 2020): weights around a vector.

    An item is a vector of `dim` numbers. Each row has a SimHash of its own (`bits` random projections; Charikar 2002); a
    vector adds its weight to one counter per row, and the estimate for a vector is the mean over its counters. Over the
    draw of the seed its mean is the sum of all weights w_i, each times the chance that x_i shares a counter with the
    vector asked for: (1 - t_i / pi)^bits, t_i being the angle between them, a kernel density. Where 2^bits > width,
    codes are hashed to `width` counters, and at most 1 / width of the rest is added by chance.

    `update` and `query` take `items` `[*batch_shape, n, dim]` of a float type, or `indices` as other sketches do; `topk`
    needs `indices`. bits: 1 to 30, default as many as a row has room for, floor(log2(width)). Other arguments as for
    `CountMinSketch`.
    """

    def __init__(
        self, dim, width, depth, bits=None, batch_shape=(), seed=0, dtype=torch.float32, device=None
    ):
        width = whole("width", width, 1)
        self.dim, self.bits = whole("dim", dim, 1), max(1, width.bit_length() - 1) if bits is None else bits
        super().__init__(width, depth, batch_shape, seed, dtype, device)

    def make_hash(self, width, depth, seed, device):
        return SimHashRows(self.dim, width, whole("depth", depth, 1, 2**16), self.bits, seed, device)

    def ask(self, indices):
        rows = self.table.gather(-1, indices)
        return (
            rows.sum(-2) / rows.shape[-2] if self.number.is_floating_point else rows.sum(-2) // rows.shape[-2]
        )

    def _indices(self, items, indices):
        if items is None or indices is not None:
            return super()._indices(items, indices)
        indices = self.hash(items)
        try:
            return indices.expand(*self.batch_shape, *indices.shape[-2:])
        except RuntimeError:
            shapes = list(items.shape), list(self.batch_shape)
            raise ValueError(
                f"indices of the items {shapes[0]} do not broadcast to batch_shape {shapes[1]}"
            ) from None

    def _chunks(self, items, indices):
        indices = self._indices(items, indices)
        yield indices, indices.shape[-1]
