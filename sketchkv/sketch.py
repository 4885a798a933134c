"""The Count-Min Sketch, and the hash functions it stands on."""

import math
from functools import lru_cache

import torch

from sketchkv.checks import device as checked_device
from sketchkv.checks import memory, real, rows, share, whole
from sketchkv.checks import seed as checked_seed

PRIME = 2**31 - 1  # a * x + b stays below 2**62, so int64 arithmetic is exact
# Items counted at a time on a CPU: few enough that what one operation leaves is in the core's cache for the next.
CHUNK = 2**15
MOST_ROWS = 2**16  # a depth beyond is a slip: the risk of an error falls as exp(-depth)


def _modulo_prime(x):
    """x mod p in place, for int64 0 <= x < p (p + 1): since 2^31 = 1 mod p, high and low bits add up, and no division is
    needed, which takes several times as long."""
    high = x >> 31
    x.bitwise_and_(PRIME).add_(high)  # at most 2 p - 1
    torch.add(x, 1, out=high)  # what passes p loses p: one more in bit 31, one more below
    return x.add_(high.bitwise_right_shift_(31)).bitwise_and_(PRIME)


@lru_cache(16)
def _factors(depth, seed, device):
    """What `CarterWegmanHash` draws. Once: what comes from the host takes a GPU longer than all else that a layer allocates."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(least, PRIME, (depth,), generator=generator) for least in (1, 0)]
    return torch.stack(drawn).to(device, non_blocking=True)


@lru_cache(16)
def _directions(dim, bits, seed, device):
    """What `SimHash` draws, and powers of two."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dim, bits, generator=generator).to(device, non_blocking=True)
    return drawn, 2 ** torch.arange(bits, device=device, dtype=torch.int32)


class CarterWegmanHash:
    """`depth` independent hash functions `((a x + b) mod p) mod width`, p = 2^31 - 1 (Carter & Wegman 1979).

    Universal: two items that differ mod p share an index of one row with probability at most 1 / width over the draw of a
    in [1, p) and b in [0, p). The draw comes from a CPU generator: a seed means the same functions on every device.

    width: values of a function, 1 to p.
    depth: functions, at most 65536.
    seed: of the draw.
    device: where a and b live.
    Raises ValueError for a size out of range.
    """

    def __init__(self, width, depth, seed=0, device=None):
        self.width, self.depth = whole("width", width, 1, PRIME), whole("depth", depth, 1, MOST_ROWS)
        self.seed = checked_seed(seed)
        self.a, self.b = _factors(self.depth, self.seed, device).clone()

    def __call__(self, items):
        """Indices in [0, width), int64 `[..., depth, n]`, of int32 or int64 `items` `[..., n]`.

        Items are reduced mod p, so ids that differ by a multiple of p are one item. Raises TypeError for another dtype, and
        ValueError for negative items on a CPU. On CUDA values are not looked at, since that would stall the device.
        """
        self.check(items)
        reduced = items.dtype == torch.int32 and items.device.type == "cpu"  # within [0, p]
        items = (items.long() if reduced else items.long().remainder(PRIME)).unsqueeze(-2)
        hashed = _modulo_prime(torch.addcmul(self.b[:, None], self.a[:, None], items))
        if self.width & self.width - 1:
            return hashed.remainder_(self.width)
        return hashed.bitwise_and_(self.width - 1)

    def check(self, items):
        """Raises what a call with these `items` raises."""
        if not isinstance(items, torch.Tensor) or items.dtype not in (torch.int32, torch.int64):
            kind = items.dtype if isinstance(items, torch.Tensor) else type(items).__name__
            raise TypeError(
                f"items must be a tensor of int32 or int64 ids, got {kind}: use items.long() or torch.tensor(items)"
            )
        if items.dim() == 0:
            raise ValueError("items must have shape [..., n], got a single number: use items[None]")
        if items.device.type == "cpu" and items.numel() and items.min() < 0:
            raise ValueError("items must not be negative: give an empty slot any id with weight 0")

    @property
    def nbytes(self):
        return self.a.nbytes + self.b.nbytes


class SimHash:
    """Codes of vectors by direction: signs of `bits` random projections (Charikar 2002), as an integer below 2^bits.

    Two vectors at angle t agree in a bit with probability 1 - t / pi over the draw of the seed.
    """

    def __init__(self, dim, bits, seed=0, device=None):
        self.projection, self.powers = (drawn.clone() for drawn in _directions(dim, bits, seed, device))

    def __call__(self, vectors):
        """Codes, int64 `[...]`, of `vectors` `[..., dim]`."""
        return ((vectors.float() @ self.projection > 0) * self.powers).sum(-1)

    @property
    def nbytes(self):
        return self.projection.nbytes + self.powers.nbytes


class CountMinSketch:
    """Count-Min Sketch (Cormode & Muthukrishnan 2005): weights of many items in `depth` rows of `width` counters.

    An item adds its weight to one counter of each row; its estimate is the least of them. Weights must not be negative.
    Then an estimate is never below the true weight, and over the draw of the seed it exceeds it by at most e / width of
    the total weight with probability at least 1 - exp(-depth). Both hold up to the rounding of `dtype`: float32 counters
    ignore additions below about 6e-8 of their value, float16 ones below 5e-4, and integer counters must not overflow,
    which a CPU checks.

    width: counters per row; the error falls as e / width.
    depth: rows; the risk of a larger error falls as exp(-depth).
    batch_shape: leading dimensions, such as `(batch, num_kv_heads)`, one sketch each, all with the same hash functions.
    seed: of the hash functions.
    dtype: of the counters, a float type, int32 or int64.
    device: where table and hash parameters live.
    Raises ValueError for a size out of range, TypeError for a dtype that can't count.
    """

    def __init__(self, width, depth, batch_shape=(), seed=0, dtype=torch.float32, device=None):
        device = checked_device(device)
        self.hash = CarterWegmanHash(width, depth, seed, device)
        if not isinstance(batch_shape, (tuple, list, torch.Size)):
            raise ValueError(
                f"batch_shape must be a tuple such as (batch, num_kv_heads), got {batch_shape!r}"
            )
        shape = [whole("every dimension of batch_shape", size, 1) for size in batch_shape]
        shape += [self.hash.depth, self.hash.width]
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if not floating and dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"counters must be a float type, int32 or int64, such as torch.float32; got {dtype!r}"
            )
        memory(math.prod(shape) * dtype.itemsize, device, "lower width, depth or batch_shape")
        self.table = torch.zeros(shape, dtype=dtype, device=device)

    batch_shape = property(lambda self: tuple(self.table.shape[:-2]))
    nbytes = property(lambda self: self.table.nbytes + self.hash.nbytes)

    @property
    def total(self):
        """Total weight, `[*batch_shape]`: every row sums to it."""
        row = self.table[..., 0, :]
        return row.sum(
            -1, dtype=torch.promote_types(row.dtype, torch.float32) if row.is_floating_point() else None
        )

    def tensors(self):
        """The counters, the batch first."""
        return [self.table]

    def update(self, items=None, weights=None, *, indices=None):
        """Adds weights to the counters of items; an item may occur more than once.

        items: int32 or int64 `[*batch_shape, n]`, or a shape that broadcasts to it.
        weights: `[*batch_shape, n]` or a shape that broadcasts to it, or one number; None counts 1 each.
        indices: `hash(items)` computed before, in place of `items`.
        Raises ValueError for shapes that don't fit and for weights that are negative, not finite or too large for the
        counters (looked at on a CPU only, since on CUDA looking would stall the device), TypeError for float items, or
        float weights of integer counters.
        """
        if not isinstance(
            weights, torch.Tensor
        ):  # filled on the device: copying a number there would stall it
            number = 1 if weights is None else weights
            if isinstance(number, bool) or not real(number):
                raise TypeError(
                    f"weights must be a tensor or one number, got {number!r}: use torch.tensor(weights)"
                )
            large = isinstance(number, float) or abs(number) >= 2**63
            one = torch.as_tensor([number], dtype=torch.float64 if large else None)
            check_weights(self, one)
            check_room(self, one)
            wide = torch.int64 if not self.table.dtype.is_floating_point else self.table.dtype
            weights = torch.full((), number, dtype=wide, device=self.table.device)
        else:
            check_weights(self, weights)
        weights, start = weights.detach(), 0
        for chunk, count in self._chunks(items, indices):
            part = _expand(weights, (*self.batch_shape, count), "weights")[
                ..., start : start + chunk.shape[-1]
            ]
            check_room(self, part)
            self.add(chunk, part)
            start += chunk.shape[-1]

    def query(self, items=None, *, indices=None):
        """Estimated weights of `items`, `[*batch_shape, n]` in the counters' dtype; parameters as of `update`."""
        estimates = [self.ask(chunk) for chunk, _ in self._chunks(items, indices)]
        return estimates[0] if len(estimates) == 1 else torch.cat(estimates, -1)

    def topk(self, candidates, k, *, indices=None):
        """`(estimates, items)` of the `k` candidates with the largest estimates, each `[*batch_shape, k]`, largest first;
        among equals the earlier candidate wins.

        candidates: `[*batch_shape, n]` or broadcastable, each once: a sketch keeps no list of the items it has seen.
        Raises ValueError unless 1 <= k <= n.
        """
        if not isinstance(candidates, torch.Tensor) or not candidates.dim():
            raise TypeError(
                f"candidates must be a tensor of ids [..., n], got {candidates!r}: use torch.tensor([...])"
            )
        k = whole("k, the number of candidates asked for,", k, 1, candidates.shape[-1])
        estimates = self.query(None if indices is not None else candidates, indices=indices)
        estimates, order = estimates.sort(dim=-1, descending=True, stable=True)
        items = _expand(candidates, order.shape, "candidates")
        return estimates[..., :k], items.gather(-1, order[..., :k])

    def decay(self, factor):
        """Multiplies all counters by `factor` in (0, 1]: a weight that is m calls old counts factor^m."""
        factor = share("factor", factor)
        if not self.table.dtype.is_floating_point:
            raise TypeError(
                f"{self.table.dtype} counters can't decay: make the sketch with dtype=torch.float32"
            )
        self.table.mul_(factor)

    def merge(self, other):
        """Adds the counters of `other`, as if its stream had followed this one's.

        Raises ValueError unless both have the same width, depth, seed and batch_shape, TypeError if kinds or dtypes differ.
        """
        if type(self) is not type(other):
            raise TypeError(
                f"only sketches of one kind can be merged, got {type(self).__name__} and {type(other).__name__}"
            )
        for name, mine, theirs in (
            ("width", self.hash.width, other.hash.width),
            ("depth", self.hash.depth, other.hash.depth),
            ("seed", self.hash.seed, other.hash.seed),
            ("batch_shape", self.batch_shape, other.batch_shape),
        ):
            if mine != theirs:
                raise ValueError(f"only sketches of the same {name} can be merged, got {mine} and {theirs}")
        if self.table.dtype != other.table.dtype:
            raise TypeError(
                f"only sketches of one dtype can be merged, got {self.table.dtype} and {other.table.dtype}"
            )
        self.table.add_(other.table)

    def reorder(self, index):
        """Keeps the sketches `index` (int64 `[m]`) of the first batch dimension, in that order: beam search's choice."""
        if not self.batch_shape:
            raise ValueError("a sketch without a batch dimension can't be reordered: give batch_shape")
        rows(index, self.batch_shape[0])
        self.table = self.table.index_select(0, index)

    def reset(self):
        """Sets all counters to zero; the hash functions stay."""
        self.table.zero_()

    def add(self, indices, weights):
        """Adds `weights` `[*batch_shape, n]` at `indices` `[*batch_shape, depth, n]`."""
        self.table.scatter_add_(-1, indices, weights.to(self.table.dtype).unsqueeze(-2).expand(indices.shape))
        if self.table.dtype == torch.float16:  # counters that pass the largest number stay there
            largest = torch.finfo(torch.float16).max
            self.table.clamp_(-largest, largest)

    def ask(self, indices):
        """Estimates `[*batch_shape, n]` from the counters at `indices` `[*batch_shape, depth, n]`."""
        return self.table.gather(-1, indices).amin(-2)

    def _chunks(self, items, indices):
        """Table indices of n items, and n: at once, or on a CPU `CHUNK` of many items at a time."""
        many = (
            isinstance(items, torch.Tensor)
            and items.dim() > 0
            and items.shape[-1] > CHUNK
            and not items.is_cuda
        )
        if not many or indices is not None:
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
        elif not isinstance(indices, torch.Tensor) or indices.is_floating_point():
            raise TypeError("indices must be integers as hash() returns them")
        elif indices.device.type == "cpu" and indices.numel():
            low, high = indices.aminmax()
            if low < 0 or high >= self.hash.width:
                raise ValueError(f"indices must be in [0, {self.hash.width}), as hash() returns them")
        return _expand(indices.long(), (*self.batch_shape, self.hash.depth, indices.shape[-1]), "indices")


def check_weights(sketch, weights):
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(
            f"weights must be real numbers, got {weights.dtype}: use weights.int() or weights.abs()"
        )
    if weights.is_floating_point() and not sketch.table.dtype.is_floating_point:
        raise TypeError(
            f"{sketch.table.dtype} counters can't take {weights.dtype} weights: use a float dtype"
        )
    if weights.device.type != "cpu" or not weights.numel():
        return
    low, high = weights.aminmax()  # NaN, if there is one
    if not 0 <= low <= high < math.inf:
        raise ValueError("weights must be finite and not negative, or the estimates mean nothing")


def check_room(sketch, weights):
    """Raises ValueError where the counters of a CPU could overflow: integers would wrap round, floats become inf."""
    if sketch.table.device.type != "cpu" or sketch.table.dtype == torch.float16 or not weights.numel():
        return
    if sketch.table.dtype.is_floating_point:
        largest = torch.finfo(sketch.table.dtype).max
        if float(weights.abs().max()) < 1e-3 * largest / max(weights.shape[-1], 1):
            return
    else:
        largest = torch.iinfo(sketch.table.dtype).max
    held = max(float(sketch.table.max()), -float(sketch.table.min()))
    if held + float(weights.double().abs().sum(-1).max()) > largest:
        raise ValueError(
            f"these weights would overflow {sketch.table.dtype} counters: use torch.float64 or torch.int64"
        )


def _expand(tensor, shape, name):
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {list(tensor.shape)} do not broadcast to {list(shape)}") from None
