"""Many new tokens in codes: they are turned, coded and stored in one launch, which leaves them decoded for the attention that
follows; what was stored before them is decoded in another.

Attention reads a token from its code, or where it is near to the query (`sketchkv.ring`) from code and ring together. `Fine`
holds the second kind of vectors, ready to be multiplied: first a row for each row of the ring as it was before, then one for
each new token.
"""

import torch

from sketchkv.fast.codes import bits_of, line_of, rests_of, ring_row, stored, vectors
from sketchkv.fast.coding import enter
from sketchkv.fast.launch import jit, kernel, pieces, tl
from sketchkv.fast.prompt import Fine
from sketchkv.quantize import TINY


@jit
def _enter(
    new,  # of one head, [n, DIM]
    stride,
    index,
    inside,
    rotation,
    factor,
    middle,
    stored,
    target,
    rests,
    near,
    held,
    coarse,
    fine,
    NEWEST: tl.constexpr,
    REST_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Keys or values of ROWS new tokens: coded, stored, and decoded again, with the ring's part and without; coarse, fine: where
    to, (pointer, rows)."""
    column = tl.arange(0, DIM)
    x = tl.load(new + index[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0)
    kind = x.dtype
    x = (tl.dot(x, rotation, input_precision="ieee") * factor).to(kind).to(tl.float32) - middle[None, :]
    told = enter(x, stored, target, inside, ROWS, DIM, BITS, LEAST)
    whole = told + middle[None, :]
    back = tl.trans(rotation)
    vector = (tl.dot(whole.to(kind), back, input_precision="ieee") * factor).to(kind)
    tl.store(coarse[0] + coarse[1][:, None] * DIM + column[None, :], vector, mask=inside[:, None])
    if NEWEST:
        whole += enter(x - told, rests, near, held & inside, ROWS, DIM, REST_BITS, LEAST)
        vector = (tl.dot(whole.to(kind), back, input_precision="ieee") * factor).to(kind)
        tl.store(fine[0] + fine[1][:, None] * DIM + column[None, :], vector, mask=inside[:, None])


@kernel("count", "before", "end", "rows")
def _store(
    key,
    value,
    turn,
    position,
    first,
    keys,
    centre,
    values,
    positions,
    rests,
    coarse,
    fine,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    p_batch,
    kv_heads,
    capacity,
    count,
    before,
    end,
    rows,
    factor,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    REST_BITS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """One program: ROWS new tokens of one KV head of one sequence."""
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // kv_heads, line % kv_heads
    index, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = index < count
    at = tl.load(position + batch * p_batch + index, mask=inside, other=-1)
    target = line * capacity + before + index
    tl.store(positions + target, at, mask=inside)
    coarse_row = line * (before + count) + before + index
    fine_row = line * (rows + count) + rows + index
    begins = 0
    if PADDED:
        begins = tl.load(first + batch)
    near, held = target, inside
    if NEWEST:
        near, held = ring_row(at, begins, end, NEWEST, SINKS)
        near = line * (NEWEST + SINKS) + near
        tl.store(fine[2] + fine_row, at, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(rests[8] + 2 * batch, begins)
            tl.store(rests[8] + 2 * batch + 1, end)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(key.dtype.element_ty)
    middle = tl.load(centre + line * DIM + column).to(tl.float32)
    _enter(
        key + batch * k_batch + head * k_head,
        k_row,
        index,
        inside,
        rotation,
        factor,
        middle,
        keys,
        target,
        rests[:4],
        near,
        held,
        (coarse[0], coarse_row),
        (fine[0], fine_row),
        NEWEST,
        REST_BITS,
        ROWS,
        DIM,
        KEY_BITS,
        LEAST,
    )
    _enter(
        value + batch * v_batch + head * v_head,
        v_row,
        index,
        inside,
        rotation,
        factor,
        middle * 0.0,
        values,
        target,
        rests[4:8],
        near,
        held,
        (coarse[1], coarse_row),
        (fine[1], fine_row),
        NEWEST,
        REST_BITS,
        ROWS,
        DIM,
        VALUE_BITS,
        LEAST,
    )


@kernel("before", "count", "seen", "tiles")
def _read(
    turn,
    factor,
    first,
    keys,
    centre,
    values,
    positions,
    rests,
    coarse,
    fine,
    kv_heads,
    capacity,
    before,
    count,
    seen,
    tiles,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    REST_BITS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """One program: ROWS slots of one KV head of one sequence, or, from the number `tiles` on, ROWS rows of its ring."""
    line = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    index, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    positions += line * capacity
    slot = tile * ROWS + index
    held = slot < before
    row = slot
    if NEWEST:
        if tile >= tiles:  # which slot holds the token of each row?
            row = (tile - tiles) * ROWS + index
            begins = 0
            if PADDED:
                begins = tl.load(first + line // kv_heads)
            slot = tl.full([ROWS], -1, tl.int32)
            for begin in range(0, before, BLOCK):
                each = begin + tl.arange(0, BLOCK)
                at = tl.load(positions + each, mask=each < before, other=-1)
                its, near = ring_row(at, begins, seen, NEWEST, SINKS)
                fits = near[None, :] & (its[None, :] == row[:, None])
                slot = tl.maximum(slot, tl.max(tl.where(fits, each[None, :], -1), 1))
            held = (slot >= 0) & (row < NEWEST + SINKS)
            slot = tl.maximum(slot, 0)
    middle = tl.load(centre + line * DIM + column).to(tl.float32)
    key = vectors(line_of(keys, line, capacity, DIM, KEY_BITS), slot, held, DIM, KEY_BITS) + middle[None, :]
    value = vectors(line_of(values, line, capacity, DIM, VALUE_BITS), slot, held, DIM, VALUE_BITS)
    to_keys, to_values = coarse
    kind = to_keys.dtype.element_ty
    back = tl.load(turn + column[None, :] * DIM + column[:, None]).to(kind)
    target = line * (before + count) + row
    inside = held
    if NEWEST:
        if tile >= tiles:
            its = line * (NEWEST + SINKS) + row
            inside = row < NEWEST + SINKS
            key += vectors(rests[:4], its, held, DIM, REST_BITS)
            value += vectors(rests[4:8], its, held, DIM, REST_BITS)
            target = line * (NEWEST + SINKS + count) + row
            tl.store(fine[2] + target, tl.load(positions + slot, mask=held, other=-1), mask=inside)
            to_keys, to_values = fine[0], fine[1]
    target = target[:, None] * DIM + column[None, :]
    key = tl.dot(key.to(kind), back, input_precision="ieee") * factor
    tl.store(to_keys + target, key.to(kind), mask=inside[:, None])
    value = tl.dot(value.to(kind), back, input_precision="ieee") * factor
    tl.store(to_values + target, value.to(kind), mask=inside[:, None])


def append(key, value, slots, tokens, seen):
    """Codes and stores n new tokens in the next slots of all heads; Python's count of the slots is left as it is.

    key, value: `[batch, num_kv_heads, n, width]`, not turned.
    slots: `sketchkv.slots.Slots` with a codec that is `served`.
    tokens: `sketchkv.passes.Tokens`.
    seen: tokens that passed before them.
    Returns (keys, values, `Fine` or None): what attention reads of all slots, `[batch, num_kv_heads, used + n, width]`, turned
    back.
    """
    (batch, kv_heads), dim, before, count = slots.shape, slots.widths[0], slots.used, key.shape[2]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    rests, sizes = rests_of(slots, "bounds")
    padded = isinstance(tokens.first, torch.Tensor)
    first = tokens.first if padded else slots.positions
    kind = dict(dtype=key.dtype, device=key.device)
    coarse = torch.empty(2, batch, kv_heads, before + count, dim, **kind).unbind()
    rows, fine = 0, None
    if sizes["NEWEST"]:
        rows = sizes["NEWEST"] + sizes["SINKS"] if before else 0
        near = torch.empty(2, batch, kv_heads, rows + count, dim, **kind).unbind()
        places = torch.empty(batch, kv_heads, rows + count, dtype=torch.int32, device=key.device)
        span = seen, sizes["NEWEST"], sizes["SINKS"], rows
        fine = Fine(near[0], near[1], places, slots.positions, tokens.first, *span)
    left = (*coarse, slots.positions) if fine is None else (fine.keys, fine.values, fine.places)
    held = (
        stored(slots, "keys", "bounds"),
        slots.codec.centre,
        stored(slots, "values", "bounds"),
        slots.positions,
        tuple(rests),
        coarse,
        left,
    )
    sizes |= bits_of(slots) | dict(PADDED=padded, DIM=dim, num_warps=4)
    if before:  # before the ring takes in new tokens
        tile = 16
        tiles = pieces(before, tile)
        _read[(batch * kv_heads, tiles + pieces(rows, tile))](
            slots.codec.rotations["keys"],
            dim**-0.5,
            first,
            *held,
            kv_heads,
            slots.capacity,
            before,
            count,
            seen,
            tiles,
            ROWS=tile,
            BLOCK=128,
            **sizes,
        )
    position = tokens.positions
    _store[(batch * kv_heads, pieces(count, 16))](
        key,
        value,
        slots.codec.rotations["keys"],
        position,
        first,
        *held,
        *key.stride()[:3],
        *value.stride()[:3],
        position.stride(0) if position.shape[0] > 1 else 0,
        kv_heads,
        slots.capacity,
        count,
        before,
        seen + count,
        rows,
        dim**-0.5,
        ROWS=16,
        LEAST=TINY,
        **sizes,
    )
    return *coarse, fine
