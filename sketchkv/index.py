"""A sketch of every key that was ever seen, asked by the query itself: which stored tokens matter now?

A key, minus the mean of its block and turned by a random rotation, keeps the sign of each coordinate and one factor. The
rotated query times the signs, times the factor, estimates the product of query and key without bias: RaBitQ (Gao & Long
2024, arXiv 2405.12497). As an index of a KV cache: FIER (Wang et al. 2025, arXiv 2508.08256), with bounds of pages instead
Quest (Tang et al. 2024, arXiv 2406.10774). A score of past attention decides before the question is known; this one after.
"""

import torch
from torch.nn.functional import embedding_bag

from sketchkv.quantize import TINY, Normal, matrix, rotation

LARGEST = torch.finfo(torch.float16).max
GROWTH = 1024  # tokens for which memory is taken at a time
POOLINGS = ("softmax", "max", "sum")


class KeyIndex:
    """Estimates of query times key for every token seen, and the `top` tokens by them.

    Tokens are coded once, a block at a time: a block has one centre, the mean of its keys (sinks and padding left out),
    whose product with the query is exact. Until its block is full, a token's key is held as it is.

    top: tokens that `choose` returns for each query and KV head.
    bits: of a rotated coordinate, 1 (its sign), 2 or 4 (levels of a normal distribution).
    pooling: what ranks tokens for the query heads that share a KV head: "softmax" (sum of their attention), or of their
        logits the "max" or the "sum".
    block: tokens that share a centre, a multiple of 16.
    num_sinks: tokens at the start of a text that no centre counts: their keys lie far from all others.
    Raises ValueError for a value that does not exist.
    """

    def __init__(self, top=256, bits=1, pooling="softmax", block=64, num_sinks=4):
        if top < 1 or bits not in (1, 2, 4) or pooling not in POOLINGS or block < 16 or block % 16:
            raise ValueError(
                f"top={top}, bits={bits}, pooling={pooling!r}, block={block}: top must be at least 1, bits 1, 2 or 4, "
                f"pooling one of {POOLINGS}, block a multiple of 16"
            )
        self.top, self.bits, self.pooling, self.block, self.num_sinks = top, bits, pooling, block, num_sinks
        self.shape, self.coded, self.seen, self.capacity = None, 0, 0, 0
        self.arrays = {}

    # Writing

    def add(self, keys, positions):
        """Takes in n new tokens.

        keys: `[batch, kv_heads, n, head_dim]`, as queries are multiplied with them (after the rotary embedding).
        positions: integers `[batch, n]`, or `[1, n]` if all rows are alike; -1 for padding.
        Raises ValueError for another batch, number of heads or head_dim than before.
        """
        batch, heads, count, head_dim = keys.shape
        if self.shape is None:
            self._allocate(keys)
        if self.shape != (batch, heads, head_dim):
            raise ValueError(
                f"the index holds (batch, kv_heads, head_dim) = {self.shape}, these keys have {(batch, heads, head_dim)}: "
                "call reset() and make a new index, or finish one batch before the next"
            )
        self._grow(self.seen + count)
        self.positions[:, self.seen : self.seen + count] = positions
        held = self.seen - self.coded
        keys = torch.cat([self.pending[:, :, :held], keys], 2) if held else keys
        self.seen += count
        full = keys.shape[2] // self.block * self.block
        if full:
            self._code(keys[:, :, :full].float().unflatten(2, (-1, self.block)))
        self.pending[:, :, : self.seen - self.coded] = keys[:, :, full:]

    def _allocate(self, keys):
        batch, heads, _, head_dim = self.shape = keys.shape
        if head_dim % 8:
            raise ValueError(
                f"vectors of {head_dim} channels can't be packed: head_dim must be a multiple of 8"
            )
        self.shape = (batch, heads, head_dim)
        self.pending = keys.new_zeros(batch, heads, self.block, head_dim)
        self.positions = torch.full((batch, 0), -1, dtype=torch.int32, device=keys.device)
        self.rotation = rotation(head_dim, keys.device)
        self.coder = Normal(self.bits, head_dim, keys.device)
        # Worth of the coordinates in a byte, for each byte that there is: `[256, coordinates]`, in the order of `pack`.
        shifts = torch.arange(0, 8, self.bits, device=keys.device)
        every = torch.arange(256, device=keys.device)[:, None] >> shifts & 2**self.bits - 1
        self.worth = self.coder.levels[every]

    def _grow(self, needed):
        more = max(0, -(-(needed - self.capacity) // GROWTH) * GROWTH)
        if more:
            self.positions = torch.cat(
                [self.positions, self.positions.new_full((len(self.positions), more), -1)], 1
            )
            for name, array in self.arrays.items():
                rows = array.shape[2] * more // self.capacity
                self.arrays[name] = torch.cat(
                    [array, array.new_zeros(*array.shape[:2], rows, *array.shape[3:])], 2
                )
            self.capacity += more

    def _code(self, blocks):
        member = self.positions[:, self.coded : self.coded + blocks.shape[2] * self.block] >= self.num_sinks
        rate = blocks.shape[2] * self.block
        for name, rows in self.encode(
            blocks, member.unflatten(1, (-1, self.block))[:, None, ..., None]
        ).items():
            if name not in self.arrays:
                shape = (*rows.shape[:2], self.capacity * rows.shape[2] // rate, *rows.shape[3:])
                self.arrays[name] = rows.new_zeros(shape)
            self.arrays[name].narrow(2, self.coded * rows.shape[2] // rate, rows.shape[2]).copy_(rows)
        self.coded += rate

    def encode(self, blocks, member):
        """What is kept of the keys of full blocks: {name: `[batch, kv_heads, rows, ...]`}, as many rows per block each time.

        blocks: float32 `[batch, kv_heads, n, block, head_dim]`; member: bool `[batch, 1, n, block, 1]`, what centres count.
        """
        finite = blocks.isfinite() & member
        centre = blocks.where(finite, 0).sum(3) / finite.sum(3).clamp(min=1)
        centre = centre.clamp(-LARGEST, LARGEST).half()
        keys = (blocks - centre.float()[..., None, :]).flatten(2, 3) @ matrix(self.rotation, torch.float32)
        codes, scale = self.coder.encode(keys)
        levels = self.coder.decode(codes, torch.ones_like(scale), torch.float32)
        factor = keys.square().sum(-1) / (keys * levels).sum(-1).clamp(min=TINY)
        return {"signature": codes, "factor": factor.clamp(max=LARGEST).half(), "centre": centre}

    # Asking

    def scores(self, query):
        """Estimates of query times key, not scaled: float32 `[batch, kv_heads, group, n, tokens]`, exact in a block that is
        not full.

        query: `[batch, num_heads, n, head_dim]`, num_heads a multiple (group) of kv_heads.
        """
        query = query.float().unflatten(1, (self.shape[1], -1))
        group, flat = query.shape[2:4], query.flatten(2, 3)
        held = flat @ self.pending[:, :, : self.seen - self.coded].float().transpose(-1, -2)
        parts = [self.estimate(flat), held] if self.coded else [held]
        return torch.cat(parts, -1).unflatten(2, group)

    def estimate(self, query):
        """The same for the tokens of full blocks: `[batch, kv_heads, m, coded]` of float32 `[batch, kv_heads, m, head_dim]`."""
        estimate = self.likeness(query @ matrix(self.rotation, torch.float32))
        base = query @ self.used("centre", self.block).float().transpose(-1, -2)
        return estimate.unflatten(-1, (-1, self.block)).add_(base[..., None]).flatten(-2)

    def likeness(self, query):
        """Rotated query times centred key, `[batch, kv_heads, m, coded]`."""
        return self.lookup(query) * self.used("factor").float()[:, :, None]

    def lookup(self, query):
        """Rotated query times the levels of each signature, one lookup per byte and not one product per coordinate: the sum
        that each of the 256 bytes stands for is worked out once per query, as in product quantization (Jegou et al. 2011)."""
        signature, count = self.used("signature"), query.shape[2]
        sums = (
            query.unflatten(-1, (8 // self.bits, -1)).transpose(-1, -2) @ self.worth.T
        )  # [batch, heads, m, bytes, 256]
        sums = sums.permute(0, 1, 3, 4, 2).reshape(-1, count)
        first = torch.arange(0, len(sums), 256, dtype=torch.int32, device=sums.device)
        places = signature.int() + first.view(*signature.shape[:2], 1, -1)
        found = embedding_bag(places.flatten(0, 2), sums, mode="sum")
        return found.view(*signature.shape[:3], count).transpose(-1, -2)

    def used(self, name, tokens=1):
        """The rows of an array that are filled, one per so many `tokens`."""
        return self.arrays[name][:, :, : self.coded // tokens]

    def rank(self, query, scaling, start=0, end=None, resident=None):
        """What tokens are ranked by, float32 `[batch, kv_heads, n, tokens]`: -inf for padding and outside [start, end).

        scaling: of the logits.
        start: position of the first token that may be chosen, an integer or `[batch, 1]`.
        end: position after the last one, `[batch or 1, n]`, for each query its own; None: no limit.
        resident: log-sum-exp of the exact, scaled logits of the tokens that a query attends to anyway, `[batch, num_heads,
            n]`; a query head that looks at these alone then counts for little. None: there are none.
        """
        estimate = self.scores(query) * scaling
        positions = self.positions[:, None, : self.seen]
        start = torch.as_tensor(start, device=positions.device).clamp(min=0)
        outside = positions < (start[..., None] if start.ndim else start)  # padding, at -1, among them
        outside = (outside if end is None else outside | (positions >= end[..., None]))[:, None]
        if self.pooling == "softmax":
            estimate = estimate.masked_fill(outside[:, :, None], torch.finfo(estimate.dtype).min)
            total = estimate.logsumexp(-1, keepdim=True)
            if resident is not None:
                total = torch.logaddexp(total, resident.float().unflatten(1, estimate.shape[1:3])[..., None])
            pooled = (estimate - total).exp_().sum(2)
        else:
            pooled = estimate.amax(2) if self.pooling == "max" else estimate.sum(2)
        return pooled.masked_fill_(outside, -torch.inf)

    def choose(self, query, scaling, start=0, end=None, resident=None):
        """The `top` tokens of highest rank, by their number in the order of `add`: int64 `[batch, kv_heads, n, top]`, highest
        first, -1 where there are fewer. Parameters as in `rank`."""
        ranks, tokens = self.rank(query, scaling, start, end, resident).topk(min(self.top, self.seen), -1)
        return tokens.masked_fill_(ranks == -torch.inf, -1)

    # Upkeep

    def nbytes(self):
        """Bytes of all that is held per token, room for tokens to come and the keys of the open block included."""
        tensors = [] if self.shape is None else [self.pending, self.positions, *self.arrays.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def reorder(self, index):
        """Row i becomes what row `index[i]` was, in place (beam search)."""
        for tensor in (self.pending, self.positions, *self.arrays.values()) if self.shape else ():
            tensor.copy_(tensor.index_select(0, index.to(tensor.device)))

    def reset(self):
        """Forgets every token and keeps the memory."""
        self.coded = self.seen = 0
        if self.shape:
            self.positions.fill_(-1)


class BothSigns(KeyIndex):
    """The signs of the query, too, and not its coordinates (SimHash, Charikar 2002): the angle alone, in all but lengths."""

    def likeness(self, query):
        alike = self.lookup(query.sign()) / (query.shape[-1] * self.coder.levels[-1])
        length = self.used("factor").float()[:, :, None] * (2 / torch.pi * query.shape[-1] ** 0.5)
        return (alike * (torch.pi / 2)).sin_() * length * query.norm(dim=-1, keepdim=True)


class PageBounds(KeyIndex):
    """The largest product that a key between the least and the greatest coordinates of its page could have (Quest)."""

    page = 16

    def encode(self, blocks, member):
        pages = blocks.flatten(2, 3).unflatten(2, (-1, self.page))
        return {"least": pages.amin(3).half(), "greatest": pages.amax(3).half()}

    def estimate(self, query):
        least, greatest = (
            self.used(name, self.page).float().transpose(-1, -2) for name in ("least", "greatest")
        )
        return (query.clamp(min=0) @ greatest + query.clamp(max=0) @ least).repeat_interleave(self.page, -1)


class ExactKeys(KeyIndex):
    """The keys themselves: what an index could reach at best, at the bytes of the keys."""

    def encode(self, blocks, member):
        return {"keys": blocks.flatten(2, 3)}

    def estimate(self, query):
        return query @ self.used("keys").transpose(-1, -2)
