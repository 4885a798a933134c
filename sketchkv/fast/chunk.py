"""Many new tokens in codes: they are turned, coded and stored in one launch, which leaves them decoded for the attention that
follows; what was stored before them is decoded in another.

Attention reads a token from its code, or where it is near to the query (`sketchkv.ring`) from code and ring together. `Fine`
holds the second kind of vectors, ready to be multiplied: first a row for each row of the ring as it was before, then one for
each new token.
"""

import torch

from sketchkv.fast.codes import bits_of, rests_of, ring_row, stored
from sketchkv.fast.coding import code_of, put, vectors
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
    target,
    codes,
    scales,
    levels,
    bounds,
    rest_codes,
    rest_scales,
    rest_levels,
    rest_bounds,
    near,
    held,
    coarse,
    fine,
    coarse_row,
    fine_row,
    NEWEST: tl.constexpr,
    REST_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Keys or values of ROWS new tokens: coded, stored, and decoded again, with the ring's part and without."""
    column = tl.arange(0, DIM)
    x = tl.load(new + index[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0)
    kind = x.dtype
    x = (tl.dot(x, rotation, input_precision="ieee") * factor).to(kind).to(tl.float32) - middle[None, :]
    code, level, scale = code_of(x, levels, bounds, LEAST, DIM, BITS)
    put(codes, scales, code, scale, target, inside, ROWS, DIM, BITS)
    told = level * scale.to(tl.float32)[:, None]
    whole = told + middle[None, :]
    back = tl.trans(rotation)
    vector = (tl.dot(whole.to(kind), back, input_precision="ieee") * factor).to(kind)
    tl.store(coarse + coarse_row[:, None] * DIM + column[None, :], vector, mask=inside[:, None])
    if NEWEST:
        code, level, scale = code_of(x - told, rest_levels, rest_bounds, LEAST, DIM, REST_BITS)
        put(rest_codes, rest_scales, code, scale, near, held & inside, ROWS, DIM, REST_BITS)
        whole += level * scale.to(tl.float32)[:, None]
        vector = (tl.dot(whole.to(kind), back, input_precision="ieee") * factor).to(kind)
        tl.store(fine + fine_row[:, None] * DIM + column[None, :], vector, mask=inside[:, None])


@kernel("count", "before", "end", "rows")
def _store(
    key,
    value,
    turn,
    position,
    first,
    keys,
    key_scales,
    key_levels,
    key_bounds,
    centre,
    values,
    value_scales,
    value_levels,
    value_bounds,
    positions,
    rest_keys,
    rest_key_scales,
    rest_key_levels,
    rest_key_bounds,
    rest_values,
    rest_value_scales,
    rest_value_levels,
    rest_value_bounds,
    span,
    coarse_keys,
    coarse_values,
    fine_keys,
    fine_values,
    places,
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
        tl.store(places + fine_row, at, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(span + 2 * batch, begins)
            tl.store(span + 2 * batch + 1, end)
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
        target,
        keys,
        key_scales,
        key_levels,
        key_bounds,
        rest_keys,
        rest_key_scales,
        rest_key_levels,
        rest_key_bounds,
        near,
        held,
        coarse_keys,
        fine_keys,
        coarse_row,
        fine_row,
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
        target,
        values,
        value_scales,
        value_levels,
        value_bounds,
        rest_values,
        rest_value_scales,
        rest_value_levels,
        rest_value_bounds,
        near,
        held,
        coarse_values,
        fine_values,
        coarse_row,
        fine_row,
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
    key_scales,
    key_levels,
    centre,
    values,
    value_scales,
    value_levels,
    positions,
    rest_keys,
    rest_key_scales,
    rest_key_levels,
    rest_values,
    rest_value_scales,
    rest_value_levels,
    span,
    coarse_keys,
    coarse_values,
    fine_keys,
    fine_values,
    places,
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
    target = keys + line * capacity * (DIM * KEY_BITS // 8)
    key = (
        vectors(target, key_scales + line * capacity, key_levels, slot, held, DIM, KEY_BITS) + middle[None, :]
    )
    target = values + line * capacity * (DIM * VALUE_BITS // 8)
    value = vectors(target, value_scales + line * capacity, value_levels, slot, held, DIM, VALUE_BITS)
    kind = coarse_keys.dtype.element_ty
    back = tl.load(turn + column[None, :] * DIM + column[:, None]).to(kind)
    target = line * (before + count) + row
    inside = held
    if NEWEST:
        if tile >= tiles:
            its = line * (NEWEST + SINKS) + row
            inside = row < NEWEST + SINKS
            key += vectors(rest_keys, rest_key_scales, rest_key_levels, its, held, DIM, REST_BITS)
            value += vectors(rest_values, rest_value_scales, rest_value_levels, its, held, DIM, REST_BITS)
            target = line * (NEWEST + SINKS + count) + row
            tl.store(places + target, tl.load(positions + slot, mask=held, other=-1), mask=inside)
            coarse_keys, coarse_values = fine_keys, fine_values
    target = target[:, None] * DIM + column[None, :]
    key = tl.dot(key.to(kind), back, input_precision="ieee") * factor
    tl.store(coarse_keys + target, key.to(kind), mask=inside[:, None])
    value = tl.dot(value.to(kind), back, input_precision="ieee") * factor
    tl.store(coarse_values + target, value.to(kind), mask=inside[:, None])


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
    rests, sizes = rests_of(slots)
    padded = isinstance(tokens.first, torch.Tensor)
    first = tokens.first if padded else slots.positions
    kind = dict(dtype=key.dtype, device=key.device)
    coarse = torch.empty(2, batch, kv_heads, before + count, dim, **kind)
    rows, fine = 0, None
    if sizes["NEWEST"]:
        rows = sizes["NEWEST"] + sizes["SINKS"] if before else 0
        vectors = torch.empty(2, batch, kv_heads, rows + count, dim, **kind)
        places = torch.empty(batch, kv_heads, rows + count, dtype=torch.int32, device=key.device)
        span = seen, sizes["NEWEST"], sizes["SINKS"], rows
        fine = Fine(vectors[0], vectors[1], places, slots.positions, tokens.first, *span)
        left = vectors[0], vectors[1], places
    else:
        left = coarse[0], coarse[1], slots.positions
    sizes |= bits_of(slots) | dict(PADDED=padded, DIM=dim, num_warps=4)
    if before:  # before the ring takes in new tokens
        tile = 16
        tiles = pieces(before, tile)
        _read[(batch * kv_heads, tiles + pieces(rows, tile))](
            slots.codec.rotations["keys"],
            dim**-0.5,
            first,
            *stored(slots, "keys"),
            slots.codec.centre,
            *stored(slots, "values"),
            slots.positions,
            *rests,
            coarse[0],
            coarse[1],
            *left,
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
    rests, _ = rests_of(slots, "bounds")
    position = tokens.positions
    _store[(batch * kv_heads, pieces(count, 16))](
        key,
        value,
        slots.codec.rotations["keys"],
        position,
        first,
        *stored(slots, "keys", "bounds"),
        slots.codec.centre,
        *stored(slots, "values", "bounds"),
        slots.positions,
        *rests,
        coarse[0],
        coarse[1],
        *left,
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
    return coarse[0], coarse[1], fine
