"""Sketches: counters of fixed size that estimate how much weight each of many items has received."""

import copy
import math

import torch

PRIME = 2**31 - 1  # a * x + b stays below 2**62, so int64 arithmetic is exact
# Items counted at a time on a CPU: few enough that what one operation leaves is in the core's cache for the next.
CHUNK = 2**15


def _modulo_prime(x):
    """x mod p in place, for int64 0 <= x < p (p + 1): since 2^31 = 1 mod p, high and low bits add up, and no division is
    needed, which takes several times as long."""
    high = x >> 31
    x.bitwise_and_(PRIME).add_(high)  # at most 2 p - 1
    torch.add(x, 1, out=high)  # what passes p loses p: one more in bit 31, one more below
    return x.add_(high.bitwise_right_shift_(31)).bitwise_and_(PRIME)


class CarterWegmanHash:
    """`depth` independent hash functions `((a x + b) mod p) mod width`, p = 2^31 - 1 (Carter & Wegman 1979).

    Universal: two items that differ mod p share an index of one row with probability at most 1 / width over the draw of
    a in [1, p) and b in [0, p). The draw comes from a CPU generator: a seed means the same functions on every device.
    Items are reduced mod p first, so any id may be used; ids that differ by a multiple of p are one item.
    """

    def __init__(self, width, depth, seed=0, device=None):
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got width={width}, depth={depth}")
        if width > PRIME:
            raise ValueError(f"width must be at most p = {PRIME}, got {width}: the hash has no more values than that")
        self.width, self.depth, self.seed = width, depth, seed
        generator = torch.Generator().manual_seed(seed)
        self.a = torch.randint(1, PRIME, (depth,), generator=generator).to(device)
        self.b = torch.randint(0, PRIME, (depth,), generator=generator).to(device)

    def __call__(self, items):
        """Indices in [0, width), int64 `[..., depth, n]`, of int32 or int64 `items` `[..., n]`.

        Raises TypeError for another dtype, and ValueError for negative items on CPU. On CUDA values are not looked at,
        since that would stall the device: there a negative item counts as its remainder mod p.
        """
        self.check(items)
        reduced = items.dtype == torch.int32 and items.device.type == "cpu"  # within [0, p]
        return self.by_row((items.long() if reduced else items.long().remainder(PRIME)).unsqueeze(-2))

    def check(self, items):
        """Raises what a call with these `items` raises."""
        if items.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"items must be int32 or int64 ids, got {items.dtype}: convert with items.long()")
        if items.dim() == 0:
            raise ValueError("items must have shape [..., n], got a single number: use items[None]")
        if items.device.type == "cpu" and items.numel() and items.min() < 0:
            raise ValueError("items must not be negative: give an empty slot any id with weight 0")

    def by_row(self, items):
        """The same of items that differ from row to row: int64 `[..., depth, n]` in [0, p], not checked."""
        hashed = _modulo_prime(torch.addcmul(self.b[:, None], self.a[:, None], items))
        return hashed.remainder_(self.width) if self.width & self.width - 1 else hashed.bitwise_and_(self.width - 1)

    @property
    def nbytes(self):
        """Bytes of the parameters a and b."""
        return self.a.nbytes + self.b.nbytes


class SignedHash:
    """`depth` pairs of independent Carter-Wegman functions: place + width * (1 if the sign is minus)."""

    def __init__(self, width, depth, seed=0, device=None):
        self.width, self.depth, self.seed = 2 * width, depth, seed
        self.place = CarterWegmanHash(width, depth, seed, device)
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


class SimHash:
    """Codes of vectors by direction: signs of `bits` random projections (Charikar 2002), as an integer below 2^bits.

    Two vectors at angle t agree in a bit with probability 1 - t / pi over the draw of the seed. The draw comes from a
    CPU generator: a seed means the same projections on every device.
    """

    def __init__(self, dim, bits, seed=0, device=None):
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(dim, bits, generator=generator).to(device)
        self.powers = 2 ** torch.arange(bits, device=device, dtype=torch.int32)

    def __call__(self, vectors):
        """Codes, int64 `[...]`, of `vectors` `[..., dim]`."""
        return ((vectors.float() @ self.projection > 0) * self.powers).sum(-1)

    @property
    def nbytes(self):
        return self.projection.nbytes + self.powers.nbytes


class SimHashRows:
    """`depth` independent SimHash codes of `bits` bits, one per row of a table, as indices below `width`.

    Where 2^bits codes are more than a row's `width`, a code is hashed once more (Carter & Wegman), as RACE does.
    """

    def __init__(self, dim, width, depth, bits, seed=0, device=None):
        if not 1 <= bits <= 30:
            raise ValueError(f"bits must be between 1 and 30, got {bits}")
        self.width, self.depth, self.seed, self.bits = width, depth, seed, bits
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(dim, depth * bits, generator=generator).to(device)
        self.powers = 2 ** torch.arange(bits, device=device, dtype=torch.int32)
        self.again = CarterWegmanHash(width, depth, seed, device) if 2**bits > width else None

    def __call__(self, vectors):
        """Indices in [0, width), int64 `[..., depth, n]`, of `vectors` `[..., n, dim]`."""
        if not vectors.is_floating_point():
            raise TypeError(f"items must be vectors [..., n, dim] of a float type, got {vectors.dtype}")
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
        codes = values.div_(self.scale.clamp(min=torch.finfo(torch.float32).tiny)).add_(self._thresholds()).floor_()
        self.codes.copy_(codes.clamp_(-self.top if self.codes.dtype == torch.int8 else 0, self.top))
        self.additions += 1

    def _thresholds(self):
        depth, width = self.shape[-2:]
        row, column = (torch.arange(size, device=self.device) for size in (depth, width))
        # Fractions 0.819, 0.671 and 0.550 of 2^32: powers of the inverse of the root of x^4 = x + 1.
        time = (self.seed + self.additions) * 3518319155 % 2**32
        place = (time + column * 2882110345 + row[:, None] * 2360945575) % 2**32
        return (place // (2**32 // self.LEVELS) + 0.5) / self.LEVELS


class CounterSketch:
    """Base of the sketches: a table `[*batch_shape, depth, width]` of counters, one independent sketch per layer, sequence
    or head, all with the same `hash`, which gives every item one counter in each row. A subclass says how weights are
    added (`_add`) and how an estimate is made from the counters of an item (`_estimate`).

    Float counters on CUDA are summed in no fixed order, so their last bit may differ between runs. `dtype`: a float
    type, int32, int64, or uint8 (`ByteCounters`). Counters that pass the largest float16 stay there.
    """

    signed = False  # whether counters and weights may be negative
    divisible = False  # whether the items of one call may as well come in several, as far as float counters go

    def __init__(self, hash, width, batch_shape, dtype, device):
        if not dtype.is_floating_point and dtype not in (torch.int32, torch.int64, torch.uint8):
            raise TypeError(f"counters must be a float type, int32 or int64, or uint8 with a scale per row, got {dtype}")
        if any(size < 1 for size in batch_shape):
            raise ValueError(f"every dimension of batch_shape must be at least 1, got {tuple(batch_shape)}")
        self.hash = hash
        shape = (*batch_shape, hash.depth, width)
        if dtype == torch.uint8:
            self.table = ByteCounters(shape, self.signed, hash.seed, device)
        else:
            self.table = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def batch_shape(self):
        return tuple(self.table.shape[:-2])

    @property
    def number(self):
        """The dtype that weights and estimates have: the counters', float32 for uint8."""
        return self.table.scale.dtype if isinstance(self.table, ByteCounters) else self.table.dtype

    @property
    def total(self):
        """Total weight, `[*batch_shape]`. Every row sums to it, so it needs no counter of its own."""
        table = self.table.values() if isinstance(self.table, ByteCounters) else self.table
        row = table[..., 0, :]
        return row.sum(-1, dtype=torch.promote_types(row.dtype, torch.float32) if row.is_floating_point() else None)

    @property
    def nbytes(self):
        """Bytes of the tensors held: counters and hash parameters."""
        return self.table.nbytes + self.hash.nbytes

    def tensors(self):
        """The tensors of the counters, the batch first."""
        return [self.table.codes, self.table.scale] if isinstance(self.table, ByteCounters) else [self.table]

    def update(self, items=None, weights=None, *, indices=None):
        """Add `weights` to the counters of `items`; an item may occur more than once.

        Args:
            items: int32 or int64 `[*batch_shape, n]`, or a shape that broadcasts to it.
            weights: `[*batch_shape, n]` or a shape that broadcasts to it, or one number; None counts 1 each.
            indices: `hash(items)` computed before, `[*batch_shape, depth, n]` or broadcastable, in place of `items`;
                any integer dtype. Their range is left to the device to check.

        Raises:
            ValueError: shapes that don't fit; weights negative, infinite or NaN (looked at on CPU only, since on CUDA
                looking would stall the device).
            TypeError: float items, or float weights for integer counters.
        """
        if isinstance(weights, torch.Tensor):
            self._check_weights(weights)
        else:  # filled on the device: copying a number there would stall it
            number = 1 if weights is None else weights
            self._check_weights(torch.tensor(number))
            weights = torch.full((), number, dtype=self.number, device=self.table.device)
        weights, start = weights.detach().to(self.number), 0
        divisible = self.divisible and isinstance(self.table, torch.Tensor)
        for indices, count in self._chunks(items, indices, divisible):
            expanded = _expand(weights, (*self.batch_shape, count), "weights")
            self._add(indices, expanded[..., start : start + indices.shape[-1]])
            start += indices.shape[-1]
        if self.number == torch.float16:
            largest = torch.finfo(torch.float16).max
            self.table.clamp_(-largest, largest)

    def query(self, items=None, *, indices=None):
        """Estimated weights of `items`, `[*batch_shape, n]` in the counters' dtype; arguments as for `update`."""
        estimates = [self._estimate(chunk) for chunk, _ in self._chunks(items, indices, self.divisible)]
        return estimates[0] if len(estimates) == 1 else torch.cat(estimates, -1)

    def topk(self, candidates, k, *, indices=None):
        """The `k` candidates with the largest estimates, largest first; among equals the earlier candidate wins.

        A sketch keeps no list of the items it has seen, so the caller names the `candidates` `[*batch_shape, n]`
        (broadcastable, each once). Returns `(estimates, items)`, both `[*batch_shape, k]`. Raises ValueError unless
        1 <= k <= n.
        """
        if not 1 <= k <= candidates.shape[-1]:
            raise ValueError(f"k must be between 1 and the {candidates.shape[-1]} candidates, got {k}")
        estimates = self.query(None if indices is not None else candidates, indices=indices)
        estimates, order = estimates.sort(dim=-1, descending=True, stable=True)
        items = _expand(candidates, order.shape, "candidates")
        return estimates[..., :k], items.gather(-1, order[..., :k])

    def decay(self, factor):
        """Multiply all counters by `factor` in (0, 1]: a weight that is m calls old counts factor^m."""
        if not 0 < factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {factor}")
        if not self.number.is_floating_point:
            raise TypeError(f"{self.table.dtype} counters can't decay: make the sketch with dtype=torch.float32")
        self.table.mul_(factor)

    def merge(self, other):
        """Add the counters of `other`, as if its stream had followed this one's.

        Raises ValueError unless both have the same width, depth, seed and batch_shape; TypeError if kinds or dtypes differ.
        """
        if type(self) is not type(other):
            raise TypeError(f"only sketches of one kind can be merged, got {type(self).__name__} and {type(other).__name__}")
        for name, mine, theirs in (
            ("width", self.hash.width, other.hash.width),
            ("depth", self.hash.depth, other.hash.depth),
            ("seed", self.hash.seed, other.hash.seed),
            ("batch_shape", self.batch_shape, other.batch_shape),
        ):
            if mine != theirs:
                raise ValueError(f"only sketches of the same {name} can be merged, got {mine} and {theirs}")
        if self.table.dtype != other.table.dtype:
            raise TypeError(f"only sketches of one dtype can be merged, got {self.table.dtype} and {other.table.dtype}")
        self.table.add_(other.table)

    def reorder(self, index):
        """Keep the sketches `index` (int64 `[m]`) of the first batch dimension, in that order: beam search's choice."""
        if not self.batch_shape:
            raise ValueError("a sketch without a batch dimension can't be reordered: give batch_shape")
        self.table = self.table.index_select(0, index)

    def reset(self):
        """Set all counters to zero; the hash functions stay."""
        self.table.zero_()

    def _add(self, indices, weights):
        """Adds `weights` `[*batch_shape, n]` at `indices` `[*batch_shape, depth, n]`."""
        self.table.scatter_add_(-1, indices, weights.unsqueeze(-2).expand(indices.shape))

    def _estimate(self, indices):
        """Estimates `[*batch_shape, n]` from the counters at `indices` `[*batch_shape, depth, n]`."""
        raise NotImplementedError(f"{type(self).__name__} must define _estimate()")

    def _chunks(self, items, indices, divisible):
        """Table indices of n items, and n: at once, or if `divisible` in turn, `CHUNK` of them at a time."""
        if not divisible or indices is not None or items is None or items.dim() == 0 or items.shape[-1] <= CHUNK or items.is_cuda:
            indices = self._indices(items, indices)
            yield indices, indices.shape[-1]
            return
        self.hash.check(items)  # all, before the first is counted
        for chunk in items.split(CHUNK, -1):
            yield self._indices(chunk, None), items.shape[-1]

    def _indices(self, items, indices):
        """Table indices, int64 `[*batch_shape, depth, n]`, from the one argument that is given."""
        if (items is None) == (indices is None):
            raise ValueError("give either items or indices")
        if indices is None:
            indices = self.hash(items)
            _expand(items, (*self.batch_shape, items.shape[-1]), "items")
        elif indices.is_floating_point():
            raise TypeError(f"indices must be integers as hash() returns them, got {indices.dtype}")
        return _expand(indices.long(), (*self.batch_shape, self.hash.depth, indices.shape[-1]), "indices")

    def _check_weights(self, weights):
        if weights.is_floating_point() and not self.number.is_floating_point:
            raise TypeError(f"{self.table.dtype} counters can't take {weights.dtype} weights: use a float dtype")
        if weights.device.type != "cpu":
            return
        if not weights.numel():
            return
        low, high = weights.aminmax()  # NaN, if there is one
        if not (low >= 0 or self.signed and low > -math.inf) or not high < math.inf:
            raise ValueError("weights must be finite and not negative, or the estimates mean nothing")


class CountMinSketch(CounterSketch):
    """Count-Min Sketch (Cormode & Muthukrishnan 2005): weights of many items in `depth` rows of `width` counters.

    An item adds its weight to one counter of each row; its estimate is the least of them. Weights must not be negative.
    Then an estimate is never below the true weight, and over the draw of the seed it exceeds it by at most e / width of
    the total weight with probability at least 1 - exp(-depth). Both hold up to the rounding of `dtype`: float32
    counters ignore additions below about 6e-8 of their value (+1 at 2^24), float16 ones below 5e-4 (+1 at 2048), and
    8-bit ones err by less than one step of their row's scale per addition (`ByteCounters`).
    Weights may have any unit; estimates and `total` have the same.

    Args:
        width: counters per row; the error falls as e / width.
        depth: rows; the risk of a larger error falls as exp(-depth).
        batch_shape: leading dimensions, such as `(batch, num_kv_heads)`.
        seed: of the hash functions.
        dtype: of the counters: a float type, int32, int64, or uint8 (with a float32 scale per row).
        device: where table and hash parameters live.

    Raises:
        ValueError: width, depth or a batch dimension below 1.
        TypeError: a dtype that can't count.
    """

    divisible = True

    def __init__(self, width, depth, batch_shape=(), seed=0, dtype=torch.float32, device=None):
        super().__init__(CarterWegmanHash(width, depth, seed, device), width, batch_shape, dtype, device)

    def _estimate(self, indices):
        return self.table.gather(-1, indices).amin(-2)


class ConservativeSketch(CountMinSketch):
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

    def _add(self, indices, weights):
        bits = max(1, (self.hash.width - 1).bit_length())
        rows = min(self.hash.depth, 62 // bits)
        shift = bits * torch.arange(rows, device=indices.device)
        identity, order = (indices[..., :rows, :] << shift[:, None]).sum(-2).sort(dim=-1, stable=True)
        indices, weights = indices.gather(-1, order.unsqueeze(-2).expand(indices.shape)), weights.gather(-1, order)
        item = (identity.diff(dim=-1, prepend=identity[..., :1]) != 0).cumsum(-1)
        weights = torch.zeros_like(weights).scatter_add_(-1, item, weights).gather(-1, item)
        raised = self._estimate(indices) + weights
        self.table.scatter_reduce_(-1, indices, raised.unsqueeze(-2).expand(indices.shape), "amax")


class CountSketch(CounterSketch):
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

    divisible = True

    def __init__(self, width, depth, batch_shape=(), seed=0, dtype=torch.float32, device=None):
        super().__init__(SignedHash(width, depth, seed, device), width, batch_shape, dtype, device)

    @property
    def total(self):
        raise AttributeError("a Count-Sketch does not know its total weight: rows hold it with random signs")

    def _sign(self, indices):
        width = self.table.shape[-1]
        return indices % width, 1 - 2 * (indices >= width).to(self.number)

    def _add(self, indices, weights):
        indices, sign = self._sign(indices)
        self.table.scatter_add_(-1, indices, sign * weights.unsqueeze(-2))

    def _estimate(self, indices):
        indices, sign = self._sign(indices)
        rows = (self.table.gather(-1, indices) * sign).sort(-2).values
        depth = rows.shape[-2]
        low, high = rows[..., (depth - 1) // 2, :], rows[..., depth // 2, :]
        return low if depth % 2 else (low + high) / 2


class RACE(CounterSketch):
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

    def __init__(self, dim, width, depth, bits=None, batch_shape=(), seed=0, dtype=torch.float32, device=None):
        if width < 1 or depth < 1:
            raise ValueError(f"width and depth must be at least 1, got width={width}, depth={depth}")
        bits = max(1, width.bit_length() - 1) if bits is None else bits
        super().__init__(SimHashRows(dim, width, depth, bits, seed, device), width, batch_shape, dtype, device)

    def _estimate(self, indices):
        rows = self.table.gather(-1, indices)
        return rows.sum(-2) / rows.shape[-2] if self.number.is_floating_point else rows.sum(-2) // rows.shape[-2]

    def _indices(self, items, indices):
        if items is None or indices is not None:
            return super()._indices(items, indices)
        indices = self.hash(items)
        return _expand(indices, (*self.batch_shape, *indices.shape[-2:]), "indices of the items")


def _expand(tensor, shape, name):
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {list(tensor.shape)} do not broadcast to {list(shape)}") from None
