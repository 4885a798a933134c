"""Sketches: counters of fixed size that estimate how much weight each of many items has received."""

import math

import torch

PRIME = 2**31 - 1  # a * x + b stays below 2**62, so int64 arithmetic is exact


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
        if items.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"items must be int32 or int64 ids, got {items.dtype}: convert with items.long()")
        if items.dim() == 0:
            raise ValueError("items must have shape [..., n], got a single number: use items[None]")
        if items.device.type == "cpu" and (items < 0).any():
            raise ValueError("items must not be negative: give an empty slot any id with weight 0")
        items = items.long().remainder(PRIME).unsqueeze(-2)
        return (self.a[:, None] * items + self.b[:, None]).remainder_(PRIME).remainder_(self.width)

    @property
    def nbytes(self):
        """Bytes of the parameters a and b."""
        return self.a.nbytes + self.b.nbytes


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


class CountMinSketch:
    """Count-Min Sketch (Cormode & Muthukrishnan 2005): weights of many items in `depth` rows of `width` counters.

    An item adds its weight to one counter of each row; its estimate is the least of them. Weights must not be negative.
    Then an estimate is never below the true weight, and over the draw of the seed it exceeds it by at most e / width of
    the total weight with probability at least 1 - exp(-depth). Both hold up to the rounding of `dtype`: float32
    counters ignore additions below about 6e-8 of their value (+1 at 2^24), float16 ones below 5e-4 (+1 at 2048).
    Weights may have any unit; estimates and `total` have the same.

    The table is `[*batch_shape, depth, width]`: one independent sketch per layer, sequence or head, all with the same
    hash functions. Float counters on CUDA are summed in no fixed order, so their last bit may differ between runs.

    Args:
        width: counters per row; the error falls as e / width.
        depth: rows; the risk of a larger error falls as exp(-depth).
        batch_shape: leading dimensions, such as `(batch, num_kv_heads)`.
        seed: of the hash functions.
        dtype: of the counters: a float type, int32 or int64.
        device: where table and hash parameters live.

    Raises:
        ValueError: width, depth or a batch dimension below 1.
        TypeError: a dtype that can't count.
    """

    def __init__(self, width, depth, batch_shape=(), seed=0, dtype=torch.float32, device=None):
        if not dtype.is_floating_point and dtype not in (torch.int32, torch.int64):
            raise TypeError(f"counters must be a float type, int32 or int64, got {dtype}")
        if any(size < 1 for size in batch_shape):
            raise ValueError(f"every dimension of batch_shape must be at least 1, got {tuple(batch_shape)}")
        self.hash = CarterWegmanHash(width, depth, seed, device)
        self.table = torch.zeros(*batch_shape, depth, width, dtype=dtype, device=device)

    @property
    def batch_shape(self):
        return tuple(self.table.shape[:-2])

    @property
    def total(self):
        """Total weight, `[*batch_shape]`. Every row sums to it, so it needs no counter of its own."""
        row = self.table[..., 0, :]
        return row.sum(-1, dtype=torch.promote_types(row.dtype, torch.float32) if row.is_floating_point() else None)

    @property
    def nbytes(self):
        """Bytes of the tensors held: counters and hash parameters."""
        return self.table.nbytes + self.hash.nbytes

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
        indices = self._indices(items, indices)
        if isinstance(weights, torch.Tensor):
            self._check_weights(weights)
        else:  # filled on the device: copying a number there would stall it
            number = 1 if weights is None else weights
            self._check_weights(torch.tensor(number))
            weights = torch.full((), number, dtype=self.table.dtype, device=self.table.device)
        weights = _expand(weights, (*self.batch_shape, indices.shape[-1]), "weights")
        weights = weights.detach().to(self.table.dtype).unsqueeze(-2).expand(indices.shape)
        self.table.scatter_add_(-1, indices, weights)

    def query(self, items=None, *, indices=None):
        """Estimated weights of `items`, `[*batch_shape, n]` in the counters' dtype; arguments as for `update`."""
        return self.table.gather(-1, self._indices(items, indices)).amin(-2)

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
        if not self.table.is_floating_point():
            raise TypeError(f"{self.table.dtype} counters can't decay: make the sketch with dtype=torch.float32")
        self.table.mul_(factor)

    def merge(self, other):
        """Add the counters of `other`, as if its stream had followed this one's.

        Raises ValueError unless both have the same width, depth, seed and batch_shape; TypeError if dtypes differ.
        """
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
        if weights.is_floating_point() and not self.table.is_floating_point():
            raise TypeError(f"{self.table.dtype} counters can't take {weights.dtype} weights: use a float dtype")
        if weights.device.type == "cpu" and not ((weights >= 0) & (weights < math.inf)).all():
            raise ValueError("weights must be finite and not negative, or the estimates mean nothing")


def _expand(tensor, shape, name):
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {list(tensor.shape)} do not broadcast to {list(shape)}") from None
