"""A sketch of every key that was ever seen, asked by the query itself: which stored tokens matter now?

A key, minus the mean of its block and turned by a random rotation, keeps the sign of each coordinate and one
factor. The rotated query times the signs, times the factor, estimates the product of query and key without
bias: RaBitQ (Gao & Long 2024, arXiv 2405.12497). As an index of a KV cache: FIER (arXiv 2508.08256); with
bounds of pages instead: Quest (Tang et al. 2024, arXiv 2406.10774). A score of past attention decides before
the question is known; this one decides after.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import embedding_bag

from sketchkv.checks import flag, whole
from sketchkv.ops import order
from sketchkv.quantize import TINY, Normal, matrix, normal_levels, rotation
from sketchkv.store import as_store, pinned_if

LARGEST = torch.finfo(torch.float16).max
GROWTH = 1024  # tokens for which memory is taken at a time
# Bits of a coordinate of a centre. Rounding a centre adds no bias: keys are coded around the rounded one.
CENTRE_BITS = 4
POOLINGS = ("softmax", "max", "sum")


class KeyIndex:
    """Estimates of query times key for every token seen, and the `top` tokens by them.

    Tokens are coded once, a block at a time: a block has one centre, the mean of its keys. The product of the
    query and the centre is exact. Until a block is full, the keys of its tokens are held in half precision, where the
    store is: they are written once a token and read once a block.

    top: tokens that `choose` returns for each query and KV head.
    bits: of a rotated coordinate, 1 (its sign), 2 or 4 (levels of a normal distribution).
    pooling: what ranks tokens for the query heads of a KV head: "softmax" (the sum of their attention), or
        the "max" or the "sum" of their logits.
    block: tokens that share a centre, a multiple of 16.
    num_sinks: tokens at the start of a text that no centre counts: their keys lie far from all others.
    store: where a cache holds all tokens (`sketchkv.store`): "host", the path of an existing folder, or a
        `HostStore`, of which each layer takes a copy.
    exact_prompts: whether a pass of several tokens attends to all before them, or as steps would.
    Raises ValueError for a value that does not exist.
    """

    shape: Any  # (batch, kv_heads, head_dim); None before the first token
    arrays: dict[str, Any]
    pending: Any  # keys of the open block

    def __init__(
        self, top=256, bits=1, pooling="softmax", block=64, num_sinks=4, store="host", exact_prompts=True
    ):
        top, bits, block = whole("top", top, 1), whole("bits", bits, 1), whole("block", block, 16)
        num_sinks = whole("num_sinks", num_sinks, 0)
        if bits not in (1, 2, 4) or pooling not in POOLINGS or block % 16:
            raise ValueError(
                f"bits={bits}, pooling={pooling!r}, block={block}: must be bits 1, 2 or 4, pooling one of {POOLINGS}, "
                "block a multiple of 16"
            )
        self.top, self.bits, self.pooling, self.block, self.num_sinks = top, bits, pooling, block, num_sinks
        self.store, self.exact_prompts = as_store(store), flag("exact_prompts", exact_prompts)
        self.growth = -(-GROWTH // block) * block
        self.shape, self.coded, self.seen = None, 0, 0

    # Writing

    def add(self, keys, positions=None):
        """Takes in n new tokens.

        keys: `[batch, kv_heads, n, head_dim]`, as queries meet them (after the rotary embedding).
        positions: integers `[batch, n]`, or `[1, n]` if all rows are alike; -1 for padding. None: they follow those before,
            and as long as all do, none is held.
        Raises ValueError for another batch, number of heads or head_dim than before, but right after `reset`.
        """
        shape, count = (*keys.shape[:2], keys.shape[3]), keys.shape[2]
        if self.seen == 0 and self.shape != shape:
            self._allocate(keys, shape)
        _same(self.shape, shape)
        reserve(self, self.seen + count)
        hold(self, positions, count)
        # Rounded at once, so that codes do not depend on the chunks in which a text comes.
        held, self.seen = self.seen - self.coded, self.seen + count
        if held + count >= self.block:
            keys = torch.cat([self.open(held, keys.device), keys.to(self.pending.dtype)], 2)
            full = keys.shape[2] // self.block * self.block
            self.code(keys[:, :, :full])
            keys, held = keys[:, :, full:], 0
        self.pending[:, :, held : self.seen - self.coded] = keys

    @torch.inference_mode(False)  # tensors that may be written to inside of it and outside
    def _allocate(self, keys, shape):
        batch, heads, head_dim = shape
        _packable(head_dim)
        device, self.shape, self.capacity, self.arrays = keys.device, shape, 0, {}
        dtype = torch.float16 if keys.dtype.itemsize > 2 else keys.dtype
        self.pending = self.store.zeros(batch, heads, self.block, head_dim, dtype=dtype, device=device)
        self.rotation = rotation(head_dim, device)
        self.coder, self.centres = (Normal(bits, device) for bits in (self.bits, CENTRE_BITS))
        self.levels = levels_of_bytes(self.bits, device)

    def open(self, count, device):
        """The first `count` keys of the open block. All are copied at once, behind the kernels that write them."""
        return self.pending.to(device)[:, :, :count]

    def positions(self, count):
        """Of the first `count` tokens, int32 `[batch or 1, 1, count]`, -1 for padding."""
        held = self.arrays.get("positions")
        return numbers(self.rotation.device, count) if held is None else held[:, :, :count]

    def code(self, keys):
        """Codes the keys of full blocks, `[batch, kv_heads, n * block, head_dim]`."""
        blocks, tokens = keys.to(self.rotation.device).float().unflatten(2, (-1, self.block)), keys.shape[2]
        positions = self.positions(self.coded + tokens)
        first = (positions < 0).sum(-1, keepdim=True)  # padding comes before all else
        member = positions[:, :, self.coded :] >= first + self.num_sinks
        for name, rows in self.encode(blocks, member.unflatten(2, (-1, self.block))[..., None]).items():
            rate = tokens // rows.shape[2]
            if name not in self.arrays:
                shape = (*rows.shape[:2], self.capacity // rate, *rows.shape[3:])
                with torch.inference_mode(False):
                    self.arrays[name] = rows.new_zeros(shape)
            self.arrays[name].narrow(2, self.coded // rate, rows.shape[2]).copy_(rows)
        self.coded += tokens

    def encode(self, blocks, member):
        """What is kept of the keys of full blocks: {name: `[batch, kv_heads, rows, ...]`}.

        blocks: float32 `[batch, kv_heads, n, block, head_dim]`.
        member: bool `[batch, 1, n, block, 1]`, the tokens that count in a centre.
        """
        blocks = blocks @ matrix(self.rotation, torch.float32)
        finite = blocks.isfinite() & member
        mean = blocks.where(finite, 0).sum(3) / finite.sum(3).clamp(min=1)
        centre, step = self.centres.encode(mean.clamp(-LARGEST, LARGEST))
        keys = (blocks - self.centres.decode(centre, step, torch.float32)[..., None, :]).flatten(2, 3)
        codes, scale = self.coder.encode(keys)
        levels = self.coder.decode(codes, torch.ones_like(scale), torch.float32)
        factor = keys.square().sum(-1) / (keys * levels).sum(-1).clamp(min=TINY)
        factor = factor.clamp(max=LARGEST).half()
        return {"signature": codes, "factor": factor, "centre": centre, "centre_scale": step}

    # Asking

    def scores(self, query):
        """Estimates of query times key, not scaled, exact in the open block: float32
        `[batch, kv_heads, group, n, tokens]`.

        query: `[batch, num_heads, n, head_dim]`, num_heads a multiple (group) of kv_heads.
        """
        query = query.float().unflatten(1, (self.shape[1], -1))
        group, flat = query.shape[2:4], query.flatten(2, 3)
        found = flat @ self.open(self.seen - self.coded, query.device).float().transpose(-1, -2)
        return (torch.cat([self.estimate(flat), found], -1) if self.coded else found).unflatten(2, group)

    def estimate(self, query):
        """The same for the tokens of full blocks, `[batch, kv_heads, m, coded]`.

        query: float32 `[batch, kv_heads, m, head_dim]`.
        """
        query = query @ matrix(self.rotation, torch.float32)
        base = query @ self.centre().transpose(-1, -2)
        centred = lookup(self, query) * self.used("factor").float()[:, :, None]
        return centred.unflatten(-1, (-1, self.block)).add_(base[..., None]).flatten(-2)

    def centre(self):
        """Centres of the full blocks, rotated, float32 `[batch, kv_heads, blocks, head_dim]`."""
        codes, scale = (self.used(name, self.block) for name in ("centre", "centre_scale"))
        return self.centres.decode(codes, scale, torch.float32)

    def used(self, name, tokens=1):
        """The rows of an array that are filled, one per so many `tokens`."""
        return self.arrays[name][:, :, : self.coded // tokens]

    def rank(self, query, scaling, start=0, end=None, resident=None):
        """What ranks the tokens, float32 `[batch, kv_heads, n, tokens]`: -inf for padding and out of range.

        scaling: of the logits.
        start: position of the first token that may be chosen, an integer or `[batch, 1]`.
        end: position after the last one, `[batch or 1, n]`, for each query its own; None: no limit.
        resident: log-sum-exp of the exact, scaled logits of the tokens that a query attends to anyway,
            `[batch, num_heads, n]`. "softmax" then weights a query head by the attention left for others.
        """
        estimate = self.scores(query) * scaling
        positions = self.positions(self.seen)
        start = torch.as_tensor(start, device=positions.device).clamp(min=0)
        outside = positions < (start[..., None] if start.ndim else start)  # padding, at -1, among them
        outside = (outside if end is None else outside | (positions >= end[..., None]))[:, None]
        return pool(estimate, outside, self.pooling, resident).masked_fill_(outside, -torch.inf)

    def choose(self, query, scaling, start=0, end=None, resident=None):
        """The `top` tokens of highest rank, highest first and of equal ones the newer, -1 where there are
        fewer: int64 `[batch, kv_heads, n, min(top, tokens)]`, numbers in the order of `add`. Parameters as in
        `rank`."""
        ranks = self.rank(query, scaling, start, end, resident)
        number = torch.arange(self.seen, device=ranks.device)
        tokens = order(ranks, number).topk(min(self.top, self.seen), -1).indices
        return tokens.masked_fill_(ranks.gather(-1, tokens) == -torch.inf, -1)

    # Upkeep

    def nbytes(self):
        """Bytes held, room for tokens to come included. The open block's keys (`pending`) lie with the store."""
        return sum(tensor.nbytes for tensor in self._tensors() if tensor is not self.pending)

    def shared(self):
        """Tensors that all indexes of a device share."""
        return [self.rotation, self.levels] if self.shape else []

    def reorder(self, index):
        """Row i becomes what row `index[i]` was, in place (beam search)."""
        for tensor in self._tensors():
            tensor.copy_(tensor.index_select(0, index.to(tensor.device)))

    def reset(self):
        """Forgets every token and keeps the memory."""
        self.coded = self.seen = 0

    def _tensors(self):
        return [self.pending, *self.arrays.values()] if self.shape else []

    def __setstate__(self, state):
        vars(self).update(state)
        if self.shape:  # of a copy
            self.pending = pinned_if(
                self.rotation.is_cuda and self.pending.device.type == "cpu", self.pending
            )


def _packable(head_dim):
    if head_dim % 8:
        raise ValueError(
            f"keys of {head_dim} channels can't be indexed, which takes a multiple of 8: use a cache without an index, such as "
            "SketchCache.compact(config, max_cache_size, bits=16)"
        )


@torch.inference_mode(False)
def reserve(index, tokens):
    """Room for so many tokens in all."""
    more = -(-(tokens - index.capacity) // index.growth) * index.growth
    if more > 0:
        index.arrays = {name: longer(x, more, index.capacity) for name, x in index.arrays.items()}
        index.capacity += more


def hold(index, positions, count):
    """Takes note of the positions of n new tokens, as of `KeyIndex.add`."""
    held, end = index.arrays.get("positions"), index.seen + count
    if positions is None and held is None:
        return
    follow = numbers(index.rotation.device, index.capacity)
    if held is None:
        with torch.inference_mode(False):
            held = index.arrays["positions"] = follow.repeat(index.shape[0], 1, 1)
    held[:, 0, index.seen : end] = follow[0, :, index.seen : end] if positions is None else positions


def numbers(device, count):
    return torch.arange(count, dtype=torch.int32, device=device)[None, None]


def _same(held, shape):
    if held != shape:
        raise ValueError(
            f"the index holds (batch, kv_heads, head_dim) = {held}, these keys have {shape}: "
            "finish one batch before the next, with reset() between them"
        )


def lookup(index, query):
    """Rotated query times the levels of each signature, `[batch, kv_heads, m, coded]`.

    One lookup per byte, not one product per coordinate: what each of the 256 bytes adds is worked out
    once per query, as in product quantization (Jegou et al. 2011).
    """
    signature, count = index.used("signature"), query.shape[2]
    sums = query.unflatten(-1, (8 // index.bits, -1)).transpose(-1, -2) @ index.levels.T
    sums = sums.permute(0, 1, 3, 4, 2).reshape(-1, count)  # rows: batch, kv_heads, bytes, 256
    first = torch.arange(0, len(sums), 256, dtype=torch.int32, device=sums.device)
    places = signature.int() + first.view(*signature.shape[:2], 1, -1)
    found = embedding_bag(places.flatten(0, 2), sums, mode="sum")
    return found.view(*signature.shape[:3], count).transpose(-1, -2)


def longer(array, more, capacity):
    """`array`, whose rows serve `capacity` tokens, with room for so many `more`."""
    rows = array.shape[2] * more // capacity if capacity else more
    return torch.cat([array, array.new_zeros(*array.shape[:2], rows, *array.shape[3:])], 2)


def pool(estimate, outside, pooling, resident):
    """What ranks the tokens for all query heads of a KV head; parameters as of `KeyIndex.rank`."""
    if pooling != "softmax":
        return estimate.amax(2) if pooling == "max" else estimate.sum(2)
    estimate = estimate.masked_fill(outside[:, :, None], torch.finfo(estimate.dtype).min)
    total = estimate.logsumexp(-1, keepdim=True)
    if resident is not None:
        total = torch.logaddexp(total, resident.float().unflatten(1, estimate.shape[1:3])[..., None])
    return (estimate - total).exp_().sum(2)


@lru_cache
def levels_of_bytes(bits, device):
    """The levels that each of the 256 bytes stands for, `[256, 8 / bits]`, in the order of `pack`."""
    codes = torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, bits, device=device) & 2**bits - 1
    return normal_levels(bits).float().to(device)[codes]
