"""A new token in `sketchkv.quantize.Normal` codes: turned, coded and stored in one launch."""

import torch

from sketchkv.fast.codes import bits_of, rests_of, ring_row, stored
from sketchkv.fast.launch import jit, kernel, tl
from sketchkv.quantize import TINY


@jit
def _store_plane(codes, code, target, DIM: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr):
    SHIFT: tl.constexpr = BITS // (2 * PART) * (2 * PART)
    STRETCH: tl.constexpr = DIM * PART // 8
    PARTS: tl.constexpr = 8 // PART
    part = tl.reshape(code >> SHIFT & ((1 << PART) - 1), [PARTS, STRETCH])
    byte = tl.sum(part << (tl.arange(0, PARTS) * PART)[:, None], 0)
    address = codes + target * (DIM * BITS // 8) + SHIFT * DIM // 8 + tl.arange(0, STRETCH)
    tl.store(address, byte.to(tl.uint8))


@jit
def _encode(x, coder, target, DIM: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr):
    """Stores a vector x [DIM], float32, in the slot `target` of `coder`: codes, scales, levels and bounds. Returns what its code
    lacks."""
    codes, scales, levels, bounds = coder
    LEVELS: tl.constexpr = 1 << BITS
    norm = tl.sqrt(tl.sum(x * x, 0) / DIM)
    relative = x / tl.maximum(norm, LEAST)
    index = tl.arange(0, LEVELS)
    bound = tl.load(bounds + index, mask=index < LEVELS - 1, other=float("inf"))
    code = tl.sum((relative[:, None] > bound[None, :]).to(tl.int32), 1)
    level = tl.load(levels + code)
    scale = (tl.sum(x * level, 0) / tl.sum(level * level, 0)).to(tl.float16)
    tl.store(scales + target, scale)
    if BITS & 8:
        _store_plane(codes, code, target, DIM, BITS, 8)
    if BITS & 4:
        _store_plane(codes, code, target, DIM, BITS, 4)
    if BITS & 2:
        _store_plane(codes, code, target, DIM, BITS, 2)
    if BITS & 1:
        _store_plane(codes, code, target, DIM, BITS, 1)
    return x - level * scale.to(tl.float32)


@jit
def store_vector(
    vector,
    turn,
    factor,
    centre,
    coder,
    rest_coder,
    target,
    near,
    NEWEST: tl.constexpr,
    REST_BITS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Codes a vector [DIM] around `centre` into the slot `target`, and its rest into the ring's row `near`. Returns it as it came."""
    column = tl.arange(0, DIM)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(tl.float32) * factor
    raw = tl.load(vector + column)
    x = tl.sum(raw.to(tl.float32)[:, None] * rotation, 0).to(raw.dtype).to(tl.float32)
    rest = _encode(x - centre, coder, target, DIM, BITS, LEAST)
    if NEWEST:
        _encode(rest, rest_coder, near, DIM, REST_BITS, LEAST)
    return raw


@jit
def ring_place(span, at, begins, batch, row, NEWEST: tl.constexpr, SINKS: tl.constexpr):
    """The row of the ring for the token at position `at`, of a text that begins at `begins`; the ring's span, with it, is noted."""
    near = row
    if NEWEST:
        place, held = ring_row(at, begins, at + 1, NEWEST, SINKS)
        near = row * (NEWEST + SINKS) + tl.where(held, place, 0)  # padding comes before all that is held
        tl.store(span + 2 * batch, begins)
        tl.store(span + 2 * batch + 1, at + 1)
    return near


@kernel("slot")
def _append(
    key,
    value,
    turn,
    position,
    filled,
    keys,
    centre,
    values,
    positions,
    rests,
    first,
    k_batch,
    k_head,
    v_batch,
    v_head,
    p_batch,
    slot,
    kv_heads,
    capacity,
    factor,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    REST_BITS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    LEAST: tl.constexpr,
    GROWS: tl.constexpr,
):
    """One program: the key of the new token of one KV head of one sequence, or its value."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    if GROWS:
        slot = tl.load(filled)
    target = row * capacity + slot
    at = tl.load(position + batch * p_batch)
    begins = 0
    if PADDED:
        begins = tl.load(first + batch)
    near = ring_place(rests[8], at, begins, batch, row, NEWEST, SINKS)
    if tl.program_id(1) == 0:
        tl.store(positions + target, at)
        vector = key + batch * k_batch + head * k_head
        middle = tl.load(centre + row * DIM + tl.arange(0, DIM)).to(tl.float32)
        store_vector(
            vector,
            turn,
            factor,
            middle,
            keys,
            rests[:4],
            target,
            near,
            NEWEST,
            REST_BITS,
            DIM,
            KEY_BITS,
            LEAST,
        )
    else:
        vector = value + batch * v_batch + head * v_head
        store_vector(
            vector,
            turn,
            factor,
            0.0,
            values,
            rests[4:8],
            target,
            near,
            NEWEST,
            REST_BITS,
            DIM,
            VALUE_BITS,
            LEAST,
        )


def append(key, value, position, slots, filled=None, first=0):
    """Codes and stores one new token in the next slot of all heads, in one launch; Python's count of the slots is left as it
    is.

    key, value: `[batch, num_kv_heads, 1, width]`, not turned; position: int32 `[batch or 1, 1]`.
    slots: `sketchkv.slots.Slots` with a codec that is `served`.
    filled: int32 `[1]`, how many slots are occupied, where the device counts; None: `slots.used`.
    first: position of each row's first real token, int32 `[batch, 1, 1]`, or 0 for all.
    """
    (batch, kv_heads), dim = slots.shape, slots.widths[0]
    rests, sizes = rests_of(slots, "bounds")
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    _append[(batch * kv_heads, 2)](
        key,
        value,
        slots.codec.rotations["keys"],
        position,
        position if filled is None else filled,
        stored(slots, "keys", "bounds"),
        slots.codec.centre,
        stored(slots, "values", "bounds"),
        slots.positions,
        tuple(rests),
        first if isinstance(first, torch.Tensor) else position,
        *key.stride()[:2],
        *value.stride()[:2],
        position.stride(0) if position.shape[0] > 1 else 0,
        slots.used,
        kv_heads,
        slots.capacity,
        dim**-0.5,
        **sizes,
        PADDED=isinstance(first, torch.Tensor),
        DIM=dim,
        **bits_of(slots),
        LEAST=TINY,
        GROWS=filled is not None,
        num_warps=4,
    )
