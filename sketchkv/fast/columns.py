"""What each slot receives from many new queries: the sum of their attention, in one Triton kernel.

A second pass over the keys (`sketchkv.fast.prompt` is the first): attention is the exponential of logit minus normaliser.
"""

import torch

from sketchkv.fast.attention import _tile
from sketchkv.fast.codes import ring_row
from sketchkv.fast.launch import kernel, pieces, tl
from sketchkv.fast.prompt import capped, close_to, factors, logits_of, parts_of, since, tiles, width_of

PROGRAMS = 264  # two for each multiprocessor of a large chip


@kernel("count", "used", "seen", "rows")
def _receive(
    query,
    keys,
    hidden,
    fine,
    positions,
    first,
    normaliser,
    weights,
    received,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_slot,
    w_batch,
    p_head,
    r_head,
    kv_heads,
    count,
    used,
    seen,
    rows,
    scale,
    softcap,
    fade,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
    HIDES: tl.constexpr,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    PADDED: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program: what BLOCK slots of one KV head of one sequence receive."""
    begin = tl.program_id(0) * BLOCK  # the longest ones first: all queries see the first slots
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // kv_heads, line % kv_heads
    query += batch * q_batch + head * GROUP * q_head
    keys += batch * k_batch + head * k_head
    hidden += line * used
    normaliser += line * GROUP * count
    weights += batch * w_batch
    sinks_end = SINKS
    if PADDED:
        sinks_end += tl.load(first + batch)
    slot, column = begin + tl.arange(0, BLOCK), tl.arange(0, KEY_WIDTH)
    k = _tile(keys, slot, column, k_slot, 1, used, KEYS, KEY_WIDTH)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    before = used - count
    start = tl.maximum(begin - before, 0) // ROWS * ROWS  # queries before see none of these slots
    positions += line * p_head
    first_row = since(slot, positions, before, used, seen, sinks_end, NEWEST)
    if NEWEST:
        place = tl.load(positions + slot, mask=slot < used, other=-1)
        which, held = ring_row(place, sinks_end - SINKS, seen, NEWEST, SINKS)
        own = slot >= before
        which = tl.where(own, rows + slot - before, which)
        held = (held | own) & (place >= 0)
        fine_keys = fine[0] + line * (rows + count) * KEYS
        which = tl.where(held, which, rows + count)
        near = _tile(fine_keys, which, column, KEYS, 1, rows + count, KEYS, KEY_WIDTH)
        sink = held & (place < sinks_end)  # near to all queries
        k = tl.where(sink[:, None], near, k)
        first_row = tl.where(sink, slot - before, first_row)
        place = tl.where(held & (place >= sinks_end), place, -1)
    passes = (count - start + ROWS - 1) // ROWS
    for number in tl.range(0, GROUP * passes, num_stages=STAGES):
        each, row = number // passes, start + number % passes * ROWS + tl.arange(0, ROWS)
        q = _tile(query + each * q_head, row, column, q_row, 1, count, KEYS, KEY_WIDTH)
        weight = tl.load(weights + row, mask=row < count, other=0.0)
        total = tl.load(normaliser + each * count + row, mask=row < count, other=0.0)
        logits = logits_of(q, k, hidden, slot, used, first_row, row, scale, softcap, CAPPED, HIDES)
        sums += tl.exp2(logits - total[:, None]) * weight[:, None]
    if NEWEST:  # up to the last query that a token is near to
        last = tl.minimum(tl.max(place, 0) + NEWEST - seen, count)
        passes = (tl.maximum(last - start, 0) + ROWS - 1) // ROWS
        for number in tl.range(0, GROUP * passes, num_stages=STAGES):
            each, row = number // passes, start + number % passes * ROWS + tl.arange(0, ROWS)
            q = _tile(query + each * q_head, row, column, q_row, 1, count, KEYS, KEY_WIDTH)
            weight = tl.load(weights + row, mask=row < count, other=0.0)
            total = tl.load(normaliser + each * count + row, mask=row < count, other=0.0)
            logits = capped(tl.dot(q, tl.trans(near), input_precision="ieee") * scale, softcap, CAPPED)
            close = close_to(place, slot - before, row, seen, sinks_end, NEWEST)
            sums += tl.exp2(tl.where(close, logits, -float("inf")) - total[:, None]) * weight[:, None]
    sums = tl.sum(sums, 0)
    address = received + line * r_head + slot
    if ADD:
        sums += fade * tl.load(address, mask=slot < used, other=0.0)
    tl.store(address, sums, mask=slot < used)


def receive(
    query, keys, normaliser, weights, scaling, softcap=None, hidden=None, fine=None, received=None, fade=1.0
):
    """What each slot receives from n queries: the sum of their attention, float32 `[batch, num_kv_heads, used]`.

    weights: float32 `[batch or 1, n]`, how much each query counts; other parameters as of `attend`.
    received: if given, it becomes `fade * received` and the sum, in place, and is returned; contiguous in the slots.
    """
    (batch, heads, count, _), (kv_heads, used) = query.shape, keys.shape[1:3]
    query, keys, weights = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, weights))
    add = received is not None
    if not add:
        received = torch.empty(batch, kv_heads, used, dtype=torch.float32, device=query.device)
    rows, block, stages, warps = tiles(query, keys, 128)
    if pieces(used, block) * batch * kv_heads < PROGRAMS:
        block = 32
    near, (seen, before), sizes = parts_of(fine, normaliser)
    _receive[(pieces(used, block), batch * kv_heads)](
        query,
        keys,
        normaliser if hidden is None else hidden,
        *near,
        normaliser,
        weights,
        received,
        *query.stride()[:3],
        *keys.stride()[:3],
        weights.stride(0) if weights.shape[0] > 1 else 0,
        near[1].stride(1),
        received.stride(1),
        kv_heads,
        count,
        used,
        seen,
        before,
        *factors(scaling, softcap),
        fade,
        GROUP=heads // kv_heads,
        KEYS=keys.shape[-1],
        KEY_WIDTH=width_of(keys),
        ROWS=rows,
        BLOCK=block,
        STAGES=stages,
        CAPPED=softcap is not None,
        HIDES=hidden is not None,
        ADD=add,
        num_warps=warps,
        **sizes,
    )
    return received
