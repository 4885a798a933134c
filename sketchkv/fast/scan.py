"""The index asked by kernels: estimates for all its tokens in one launch, and what ranks them in another, which keeps the highest of
each tile. A token of the open block is never a candidate: the recent window is no smaller than a block."""

import torch

from sketchkv.fast.attention import MASKED
from sketchkv.fast.codes import codes_of, levels_of, stored
from sketchkv.fast.launch import jit, kernel, pieces, power, tl

EACH = 256  # tokens that one program estimates
TILE = 4096  # tokens of which one program keeps the highest


@jit
def _weigh(logits, top, total):
    """Online softmax, in powers of two."""
    higher = tl.maximum(top, tl.max(logits, 1))
    return higher, total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)


@kernel("used", "seen", "room", "parts")
def _scan(
    query,
    positions,
    keys,
    key_scales,
    key_levels,
    centre,
    signatures,
    levels,
    factors,
    centres,
    centre_scales,
    centre_levels,
    first,
    clock,
    scores,
    tops,
    totals,
    kv_heads,
    capacity,
    used,
    room,
    seen,
    parts,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    PADDED: tl.constexpr,
    CLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: BLOCKS blocks of the tokens of one KV head of one sequence; the first weighs the slots that are always seen."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if CLOCK:
        seen = tl.load(clock) + 1
    begins = 0
    if PADDED:
        begins = tl.load(first + row // kv_heads)
    group, column = tl.arange(0, GROUPS), tl.arange(0, DIM)
    inside = group[:, None] < GROUP
    q = tl.load(query + (row * GROUP + group[:, None]) * DIM + column[None, :], mask=inside, other=0.0)
    top = tl.full([GROUPS], MASKED, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    if part == 0:
        keys += row * capacity * (DIM * KEY_BITS // 8)
        shift = tl.sum(q * tl.load(centre + row * DIM + column).to(tl.float32)[None, :], 1)
        for begin in range(0, used, SLOTS):
            slot = begin + tl.arange(0, SLOTS)
            held = slot < used
            at = tl.load(positions + row * capacity + slot, mask=held, other=-1)
            always = (at >= 0) & ((at >= seen - RECENT) | (at < begins + SINKS))
            key = levels_of(keys, key_levels, slot, held, column, DIM, KEY_BITS)
            key_scale = tl.load(key_scales + row * capacity + slot, mask=held, other=0.0).to(tl.float32)
            logits = tl.dot(q, tl.trans(key), input_precision="ieee") * key_scale[None, :] + shift[:, None]
            top, total = _weigh(tl.where(always[None, :], logits, -float("inf")), top, total)
    else:
        signatures += row * room * (DIM * INDEX_BITS // 8)
        centres += row * (room // BLOCK) * (DIM // 2)
        scores += row * GROUP * room
        start, coded = (part - 1) * BLOCKS, (seen - 1) // BLOCK
        # The matrix unit multiplies signs without an error, and a query that is the sum of two halves with one of 2^-24.
        length = tl.maximum(tl.max(tl.abs(q), 1), 1e-30)[:, None]
        coarse = (q / length).to(tl.float16)
        rest = (q / length - coarse.to(tl.float32)).to(tl.float16)
        for number in range(start, tl.minimum(start + BLOCKS, coded)):
            token = number * BLOCK + tl.arange(0, BLOCK)
            held = token >= 0
            one = number + tl.arange(0, 1)
            middle = levels_of(centres, centre_levels, one, one >= 0, column, DIM, 4)
            middle *= tl.load(centre_scales + row * (room // BLOCK) + number).to(tl.float32)
            size = tl.load(factors + row * room + token).to(tl.float32)[None, :]
            if INDEX_BITS == 1:
                sign = codes_of(signatures, token, held, column, DIM, 1) * 2 - 1
                sign = tl.trans(sign.to(tl.float16))
                logits = tl.dot(rest, sign, tl.dot(coarse, sign)) * (length * tl.load(levels + 1)) * size
            else:
                key = levels_of(signatures, levels, token, held, column, DIM, INDEX_BITS)
                logits = tl.dot(q, tl.trans(key), input_precision="ieee") * size
            logits += tl.sum(q * middle, 1)[:, None]
            asked = (token >= begins + SINKS) & (token < seen - RECENT) & (begins >= 0)
            logits = tl.where(asked[None, :], logits, -float("inf"))
            tl.store(scores + group[:, None] * room + token[None, :], logits, mask=inside)
            top, total = _weigh(logits, top, total)
    target = (row * GROUP + group) * parts + part
    tl.store(tops + target, top, mask=group < GROUP)
    tl.store(totals + target, total, mask=group < GROUP)


@jit
def threshold(key, count, BITS: tl.constexpr):
    """A number of BITS bits that `count` of `key` (int64 [n], distinct, -1 for none) reach; 0 if there are no more."""
    least = tl.sum(key * 0, 0)
    step = tl.where(tl.sum((key >= 0).to(tl.int32), 0) <= count, -1, BITS - 1)
    while step >= 0:
        further = least | ((least == least).to(tl.int64) << step)
        reach = tl.sum((key >= further).to(tl.int32), 0)
        least = tl.where(reach >= count, further, least)
        step = tl.where(reach == count, -1, step - 1)
    return least


@kernel("seen", "room", "parts", "tiles")
def _pool(
    scores,
    tops,
    totals,
    first,
    clock,
    candidates,
    kv_heads,
    room,
    seen,
    parts,
    tiles,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    PADDED: tl.constexpr,
    CLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    TOP: tl.constexpr,
    TOPS: tl.constexpr,
):
    """One program: what ranks TILE tokens of one KV head of one sequence. The TOP highest are candidates: rank and number in one."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if CLOCK:
        seen = tl.load(clock) + 1
    begins = 0
    if PADDED:
        begins = tl.load(first + row // kv_heads)
    candidates += (row * tiles + tile) * TOP
    count = 0
    if tile * TILE < seen - RECENT:
        token = tile * TILE + tl.arange(0, TILE)
        asked = (token >= begins + SINKS) & (token < seen - RECENT) & (begins >= 0)
        part = tl.arange(0, PARTS)
        rank = tl.zeros([TILE], tl.float32)
        for head in range(GROUP):
            of_head = row * GROUP + head
            top = tl.load(tops + of_head * parts + part, mask=part < parts, other=MASKED)
            total = tl.load(totals + of_head * parts + part, mask=part < parts, other=0.0)
            most = tl.max(top, 0)
            all_of_it = most + tl.log2(tl.sum(total * tl.exp2(top - most), 0))
            logits = tl.load(scores + of_head * room + token, mask=asked, other=-float("inf"))
            rank += tl.exp2(logits - all_of_it)
        key = (rank.to(tl.int32, bitcast=True).to(tl.int64) << SHIFT) | token
        key = tl.where(asked, key, -1)
        kept = (key >= threshold(key, TOP, 31 + SHIFT)) & (key >= 0)
        tl.store(candidates + tl.cumsum(kept.to(tl.int32), 0) - 1, key, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    index = tl.arange(0, TOPS)
    tl.store(candidates + index, tl.full([TOPS], -1, tl.int64), mask=(index >= count) & (index < TOP))


def candidates(query, slots, index, place, **sizes):
    """Tokens among which the `index.top` of highest rank are: int64 `[batch, num_kv_heads, n]`, rank << shift | number, -1 for none;
    and `shift`.

    query: float32 `[batch, num_heads, width]`, turned and scaled by the factor of the logits and LOG2E.
    place: (first, clock, seen) as of `recalled`. sizes: SINKS, RECENT, PADDED and CLOCK.
    """
    (batch, kv_heads), dim, room, block = slots.shape, slots.widths[0], index.capacity, index.block
    rows, group, (first, clock, seen) = batch * kv_heads, query.shape[1] // kv_heads, place
    blocks = max(1, EACH // block)
    parts, tiles = 1 + pieces(room // block, blocks), pieces(room, TILE)
    device, top, arrays = query.device, min(index.top, TILE), index.arrays
    scores = torch.empty(rows, group, room, dtype=torch.float32, device=device)
    tops, totals = torch.empty(2, rows * group, parts, dtype=torch.float32, device=device)
    found = torch.empty(batch, kv_heads, tiles * top, dtype=torch.int64, device=device)
    _scan[(rows, parts)](
        query,
        slots.positions,
        *stored(slots, "keys"),
        slots.codec.centre,
        arrays["signature"],
        index.coder.levels,
        arrays["factor"],
        arrays["centre"],
        arrays["centre_scale"],
        index.centres.levels,
        first,
        clock,
        scores,
        tops,
        totals,
        kv_heads,
        slots.capacity,
        slots.used,
        room,
        seen,
        parts,
        **sizes,
        GROUP=group,
        GROUPS=max(16, power(group)),
        DIM=dim,
        KEY_BITS=slots.codec.bits["keys"],
        INDEX_BITS=index.bits,
        BLOCK=block,
        BLOCKS=blocks,
        SLOTS=64,
        num_warps=4,
        num_stages=1,
    )
    shift = room.bit_length()
    _pool[(rows, tiles)](
        scores,
        tops,
        totals,
        first,
        clock,
        found,
        kv_heads,
        room,
        seen,
        parts,
        tiles,
        **sizes,
        GROUP=group,
        PARTS=power(parts),
        TILE=TILE,
        SHIFT=shift,
        TOP=top,
        TOPS=power(top),
        num_warps=8,
    )
    return found, shift
