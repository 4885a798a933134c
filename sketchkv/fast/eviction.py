"""Evictions in few launches: the sketch is asked, the lowest scores are chosen."""

import math

import torch

from sketchkv.fast.launch import jit, kernel, pieces, power, tl


@jit
def _index(a, b, item, row, WIDTH: tl.constexpr):
    """`CarterWegmanHash` of `item`: (a x + b) mod p mod width, p = 2^31 - 1 by folding the high bits onto the low ones."""
    # Factors known to fit in 32 bits cost one multiplication, not four; so does what is left after the first folding.
    product = tl.load(a + row).to(tl.uint32).to(tl.uint64) * item.to(tl.uint32).to(tl.uint64)
    product += tl.load(b + row).to(tl.uint32).to(tl.uint64)
    value = (product & 0x7FFFFFFF).to(tl.uint32) + (product >> 31).to(tl.uint32)
    value = (value & 0x7FFFFFFF) + (value >> 31)
    value = tl.where(value >= 0x7FFFFFFF, value - 0x7FFFFFFF, value)
    return value.to(tl.int32) % WIDTH


@kernel("elapsed")
def _remember(
    items,
    mass,
    positions,
    tables,
    exposures,
    scores,
    a,
    b,
    seen,
    s_batch,
    s_head,
    kv_heads,
    used,
    elapsed,
    fade,
    decay,
    log_decay,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
):
    """One program: the sketches of one KV head of one sequence. Decay, add, then ask."""
    row = tl.program_id(0).to(tl.int64)
    offset = row // kv_heads * s_batch + row % kv_heads * s_head
    tables += row * DEPTH * WIDTH
    exposures += row * DEPTH * WIDTH
    for begin in range(0, DEPTH * WIDTH, CELLS):
        cell = begin + tl.arange(0, CELLS)
        inside = cell < DEPTH * WIDTH
        tl.store(tables + cell, tl.load(tables + cell, mask=inside, cache_modifier=".cg") * fade, mask=inside)
        if MEAN:
            tl.store(
                exposures + cell,
                tl.load(exposures + cell, mask=inside, cache_modifier=".cg") * fade,
                mask=inside,
            )
    tl.debug_barrier()  # what follows was stored by other threads
    now = tl.load(seen)
    for begin in range(0, used, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < used
        item = tl.load(items + offset + slot, mask=inside, other=0).to(tl.int64)
        item = tl.where(item == 0x7FFFFFFF, 0, item)
        received = tl.load(mass + offset + slot, mask=inside, other=0.0)
        tl.store(mass + offset + slot, tl.zeros([BLOCK], tl.float32), mask=inside)
        position = tl.load(positions + offset + slot, mask=inside, other=-1)
        age = tl.minimum(now - position, elapsed).to(tl.float32)
        if MEAN:
            exposed = age
            if decay != 1.0:
                exposed = (1.0 - tl.exp2(age * log_decay)) / (1.0 - decay)
        for i in tl.static_range(DEPTH):
            index = i * WIDTH + _index(a, b, item, i, WIDTH)
            tl.atomic_add(tables + index, received, mask=inside & (received != 0.0), sem="relaxed")
            if MEAN:
                tl.atomic_add(exposures + index, exposed, mask=inside & (position >= 0), sem="relaxed")
    tl.debug_barrier()
    for begin in range(0, used, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < used
        item = tl.load(items + offset + slot, mask=inside, other=0).to(tl.int64)
        item = tl.where(item == 0x7FFFFFFF, 0, item)
        position = tl.load(positions + offset + slot, mask=inside, other=-1)
        age = (now - position).to(tl.float32)
        estimate = tl.full([BLOCK], float("inf"), tl.float32)
        exposed = tl.full([BLOCK], float("inf"), tl.float32)
        for i in tl.static_range(DEPTH):
            index = i * WIDTH + _index(a, b, item, i, WIDTH)
            estimate = tl.minimum(
                estimate, tl.load(tables + index, mask=inside, other=0.0, cache_modifier=".cg")
            )
            if MEAN:
                exposed = tl.minimum(
                    exposed, tl.load(exposures + index, mask=inside, other=0.0, cache_modifier=".cg")
                )
        if MEAN:
            least = age
            if decay != 1.0:
                least = (1.0 - tl.exp2(age * log_decay)) / (1.0 - decay)
            estimate = estimate / tl.maximum(exposed, least / 2)
        tl.store(scores + row * used + slot, estimate, mask=inside)


@jit
def ranked(score, position, sinks_end, end, recent_window, nan):
    """Integers in the order of (score, position), padding first, sinks and the recent window last; sets `nan` if a score is."""
    empty = position < 0
    protected = (position < sinks_end) | (position >= end - recent_window)
    broken = tl.max(((score != score) & (protected == 0) & (empty == 0)).to(tl.int32), 0)
    tl.store(nan, True, mask=broken > 0)
    score = tl.minimum(tl.maximum(score, -1e30), 1e30) + 0.0
    score = tl.where(empty, -float("inf"), tl.where(protected, float("inf"), score))
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats fall as their bits rise
    return (bits.to(tl.int64) << 32) + position


@kernel("used", "end")
def _lowest(
    scores,
    positions,
    clock,
    first,
    chosen,
    nan,
    c_batch,
    c_head,
    p_batch,
    p_head,
    kv_heads,
    used,
    end,
    num_sinks,
    recent_window,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    CLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program: one KV head of one sequence. COUNT times the least of what is left."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    slot = tl.arange(0, BLOCK)
    inside = slot < used
    score = tl.load(scores + batch * c_batch + head * c_head + slot, mask=inside, other=0.0)
    position = tl.load(positions + batch * p_batch + head * p_head + slot, mask=inside, other=0)
    if CLOCK:
        end = tl.load(clock) + 1
    sinks_end = num_sinks
    if PADDED:
        sinks_end += tl.load(first + batch)
    rank = ranked(score, position, sinks_end, end, recent_window, nan)
    rank = tl.where(inside, rank, 0x7FFFFFFFFFFFFFFF)
    for index in range(COUNT):
        least = tl.min(rank, 0)
        lowest = tl.max(tl.where(rank == least, slot, -1), 0)  # padding is equal: one at a time
        tl.store(chosen + row * COUNT + index, lowest)
        rank = tl.where(slot == lowest, 0x7FFFFFFFFFFFFFFF, rank)


MOST_SLOTS, MOST_CHOSEN = 4096, 64  # that one program of `lowest` holds, and goes through one by one


def lowest(importance, positions, tokens, end, count, num_sinks, recent_window, nan):
    """The slots of the `count` lowest (importance, position), padding first, sinks and the recent window last: int32
    `[batch, num_kv_heads, count]`, as `sketchkv.ops.Eager` chooses.

    importance: float32, positions: int32 `[batch, num_kv_heads, used]`, contiguous in the slots, at most `MOST_SLOTS`.
    tokens: `sketchkv.passes.Tokens` of the newest token; end: tokens seen, where they have no clock.
    count: at most `MOST_CHOSEN`.
    nan: bool `[]`, set if an importance is NaN.
    """
    batch, kv_heads, used = importance.shape
    chosen = torch.empty(batch, kv_heads, count, dtype=torch.int32, device=importance.device)
    padded = isinstance(tokens.first, torch.Tensor)
    _lowest[(batch * kv_heads,)](
        importance,
        positions,
        positions if tokens.clock is None else tokens.clock,
        tokens.first if padded else positions,
        chosen,
        nan,
        *importance.stride()[:2],
        *positions.stride()[:2],
        kv_heads,
        used,
        end,
        num_sinks,
        recent_window,
        COUNT=count,
        BLOCK=power(used),
        CLOCK=tokens.clock is not None,
        PADDED=padded,
        num_warps=4,
    )
    return chosen


@kernel("start", "count")
def _codes(
    keys,
    projection,
    items,
    k_batch,
    k_head,
    k_slot,
    i_batch,
    i_head,
    kv_heads,
    start,
    count,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK new keys of one KV head of one sequence. Their signs along BITS directions, as one number."""
    row = tl.program_id(0).to(tl.int64)
    keys += row // kv_heads * k_batch + row % kv_heads * k_head
    items += row // kv_heads * i_batch + row % kv_heads * i_head
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot, column, bit = start + index, tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    inside = index < count
    key = tl.load(
        keys + slot[:, None] * k_slot + column[None, :],
        mask=inside[:, None] & (column[None, :] < HEAD_DIM),
        other=0.0,
    )
    along = (column[:, None] < HEAD_DIM) & (bit[None, :] < BITS)
    directions = tl.load(projection + column[:, None] * BITS + bit[None, :], mask=along, other=0.0)
    signs = tl.dot(key.to(tl.float32), directions, input_precision="ieee") > 0
    tl.store(items + slot, tl.sum(tl.where(signs, 1 << bit[None, :], 0), 1), mask=inside)


def codes(keys, projection, items, start, count):
    """`SimHash` of the keys in the slots `start` to `start + count`, into the same slots of `items`: one launch.

    keys: `[batch, num_kv_heads, capacity, head_dim]`, last dimension contiguous; projection: float32 `[head_dim, bits]`,
    contiguous; items: int32 `[batch, num_kv_heads, capacity]`.
    """
    batch, kv_heads, _, head_dim = keys.shape
    bits = projection.shape[1]
    _codes[(batch * kv_heads, pieces(count, 16))](
        keys,
        projection,
        items,
        *keys.stride()[:3],
        *items.stride()[:2],
        kv_heads,
        start,
        count,
        HEAD_DIM=head_dim,
        WIDTH=max(16, power(head_dim)),
        BITS=bits,
        COLUMNS=max(16, power(bits)),
        BLOCK=16,
    )


def remember(items, mass, positions, sketches, seen, elapsed, decay):
    """What `sketch_policy.Sketch` does at an eviction, in one kernel: the sketches fade by decay^elapsed, take in `mass` (and, in
    the second sketch if there is one, exposure), and are asked; returns importance, float32 `[batch, num_kv_heads, used]`.

    items, positions: int32, mass: float32 `[batch, num_kv_heads, used]`, views of like strides, contiguous in the slots;
    mass is set to zero. sketches: one or two `CountMinSketch` with float32 counters and the same hash functions. seen: a
    number, or int32 `[1]` on the device. NaN in `mass` gives NaN.
    """
    batch, kv_heads, used = items.shape
    first = sketches[0]
    depth, width = first.table.shape[-2:]
    if not isinstance(seen, torch.Tensor):
        seen = torch.full((1,), seen, dtype=torch.int32, device=items.device)
    scores = torch.empty(batch, kv_heads, used, dtype=torch.float32, device=items.device)
    _remember[(batch * kv_heads,)](
        items,
        mass,
        positions,
        first.table,
        sketches[-1].table,
        scores,
        first.hash.a,
        first.hash.b,
        seen,
        *items.stride()[:2],
        kv_heads,
        used,
        elapsed,
        decay**elapsed,
        decay,
        math.log2(decay),
        DEPTH=depth,
        WIDTH=width,
        MEAN=len(sketches) > 1,
        BLOCK=min(128, power(used)),
        CELLS=1024,
    )
    return scores
