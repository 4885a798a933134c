"""Slots in `sketchkv.quantize.Normal` codes: a token is turned, coded and stored in one launch, and an eviction reads codes
and scales as they are. A key is scale * levels[code] + centre, in turned coordinates."""

import math

import torch

from sketchkv.fast.launch import jit, kernel, pieces, power, tl
from sketchkv.quantize import TINY


@jit
def _plane(codes, slot, inside, column, DIM: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr):
    """The part of PART bits of the codes in the slots `slot`, where `sketchkv.quantize.pack` puts it."""
    SHIFT: tl.constexpr = BITS // (2 * PART) * (2 * PART)  # bits of the wider parts, which come first
    STRETCH: tl.constexpr = DIM * PART // 8
    address = codes + slot[:, None] * (DIM * BITS // 8) + SHIFT * DIM // 8 + (column % STRETCH)[None, :]
    byte = tl.load(address, mask=inside[:, None], other=0).to(tl.int32)
    return (byte >> (column // STRETCH * PART)[None, :] & ((1 << PART) - 1)) << SHIFT


@jit
def levels_of(codes, levels, slot, inside, column, DIM: tl.constexpr, BITS: tl.constexpr):
    """Levels [rows, DIM], float32, of the codes in the slots `slot` [rows]."""
    code = slot.to(tl.int32)[:, None] * 0 + column[None, :] * 0
    if BITS & 8:
        code += _plane(codes, slot, inside, column, DIM, BITS, 8)
    if BITS & 4:
        code += _plane(codes, slot, inside, column, DIM, BITS, 4)
    if BITS & 2:
        code += _plane(codes, slot, inside, column, DIM, BITS, 2)
    if BITS & 1:
        code += _plane(codes, slot, inside, column, DIM, BITS, 1)
    return tl.load(levels + code)


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
def _encode(
    x, levels, bounds, codes, scales, target, DIM: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr
):
    """Stores a vector x [DIM], float32, in the slot `target`; returns what its code lacks."""
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
def ring_row(position, first, end, NEWEST: tl.constexpr, SINKS: tl.constexpr):
    """The row of `sketchkv.ring.Ring` where the tokens at `position` are, and whether they have one."""
    sink = position < first + SINKS
    held = (position >= 0) & (position < end) & (sink | (position >= end - NEWEST))
    return tl.where(sink, position - first, SINKS + position % NEWEST), held


@kernel("slot")
def _append(
    key,
    value,
    turn,
    position,
    filled,
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
    """One program: the new token of one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    if GROWS:
        slot = tl.load(filled)
    target = row * capacity + slot
    column = tl.arange(0, DIM)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(tl.float32) * factor
    new = tl.load(key + batch * k_batch + head * k_head + column)
    x = tl.sum(new.to(tl.float32)[:, None] * rotation, 0).to(new.dtype).to(tl.float32)
    x -= tl.load(centre + row * DIM + column).to(tl.float32)
    rest_key = _encode(x, key_levels, key_bounds, keys, key_scales, target, DIM, KEY_BITS, LEAST)
    new = tl.load(value + batch * v_batch + head * v_head + column)
    x = tl.sum(new.to(tl.float32)[:, None] * rotation, 0).to(new.dtype).to(tl.float32)
    rest_value = _encode(x, value_levels, value_bounds, values, value_scales, target, DIM, VALUE_BITS, LEAST)
    at = tl.load(position + batch * p_batch)
    tl.store(positions + target, at)
    if NEWEST:
        begins = 0
        if PADDED:
            begins = tl.load(first + batch)
        near, held = ring_row(at, begins, at + 1, NEWEST, SINKS)
        near = row * (NEWEST + SINKS) + tl.where(held, near, 0)  # padding comes before all that is held
        _encode(
            rest_key,
            rest_key_levels,
            rest_key_bounds,
            rest_keys,
            rest_key_scales,
            near,
            DIM,
            REST_BITS,
            LEAST,
        )
        _encode(
            rest_value,
            rest_value_levels,
            rest_value_bounds,
            rest_values,
            rest_value_scales,
            near,
            DIM,
            REST_BITS,
            LEAST,
        )
        tl.store(span + 2 * batch, begins)
        tl.store(span + 2 * batch + 1, at + 1)


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
    _append[(batch * kv_heads,)](
        key,
        value,
        slots.codec.rotations["keys"],
        position,
        position if filled is None else filled,
        *stored(slots, "keys", "bounds"),
        slots.codec.centre,
        *stored(slots, "values", "bounds"),
        slots.positions,
        *rests,
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


def stored(slots, name, *tables):
    """Codes, scales and levels of keys or values, and what else of their coder is asked for."""
    coder = slots.codec.coders[name]
    return (
        slots.arrays[name],
        slots.arrays[f"{name}_scale"],
        coder.levels,
        *(getattr(coder, each) for each in tables),
    )


def rests_of(slots, *tables):
    """What `stored` gives, of the ring's keys and values, and its span; NEWEST, SINKS, REST_BITS. Without a ring, any tensors
    and a NEWEST of 0."""
    ring = slots.codec.ring
    if ring is None:
        unused = [slots.positions] * (2 * (3 + len(tables)) + 1)
        return unused, {"NEWEST": 0, "SINKS": 0, "REST_BITS": 0}
    found = []
    for name in ("keys", "values"):
        coder = ring.coders[name]
        found += [*ring.parts[name], coder.levels, *(getattr(coder, each) for each in tables)]
    return [*found, ring.span], {"NEWEST": ring.newest, "SINKS": ring.sinks, "REST_BITS": slots.codec.finer}


def bits_of(slots):
    return {"KEY_BITS": slots.codec.bits["keys"], "VALUE_BITS": slots.codec.bits["values"]}


@kernel("used", "end")
def _importance(
    mass,
    positions,
    values,
    value_scales,
    value_levels,
    clock,
    scores,
    capacity,
    used,
    end,
    decay,
    log_decay,
    DIM: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    MEAN: tl.constexpr,
    NORM: tl.constexpr,
    FADES: tl.constexpr,
    CLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK slots of one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < used
    score = tl.load(mass + row * capacity + slot, mask=inside, other=0.0)
    if MEAN:
        if CLOCK:
            end = tl.load(clock) + 1
        exposed = (end - tl.load(positions + row * capacity + slot, mask=inside, other=-1)).to(tl.float32)
        if FADES:
            exposed = (1.0 - tl.exp2(exposed * log_decay)) / (1.0 - decay)
        score /= exposed
    if NORM:
        codes = values + row * capacity * (DIM * VALUE_BITS // 8)
        level = levels_of(codes, value_levels, slot, inside, tl.arange(0, DIM), DIM, VALUE_BITS)
        scale = tl.load(value_scales + row * capacity + slot, mask=inside, other=0.0).to(tl.float32)
        score *= tl.abs(scale) * tl.sqrt(tl.sum(level * level, 1))
    tl.store(scores + row * used + slot, score, mask=inside)


def importance(policy, slots, tokens, end):
    """What `AttentionMass.score` gives, norms of values taken from their codes: float32 `[batch, num_kv_heads, used]`."""
    (batch, kv_heads), used = slots.shape, slots.used
    scores = torch.empty(batch, kv_heads, used, dtype=torch.float32, device=slots.device)
    _importance[(batch * kv_heads, pieces(used, 64))](
        slots.arrays["mass"],
        slots.positions,
        *stored(slots, "values"),
        slots.positions if tokens.clock is None else tokens.clock,
        scores,
        slots.capacity,
        used,
        end,
        policy.decay,
        math.log2(policy.decay),
        DIM=slots.widths[1],
        VALUE_BITS=slots.codec.bits["values"],
        MEAN=policy.mean,
        NORM=policy.value_norm,
        FADES=policy.decay != 1,
        CLOCK=tokens.clock is not None,
        BLOCK=64,
        num_warps=4,
    )
    return scores


@jit
def _fold_in(vector, sound, means, row, before, column, DIM: tl.constexpr):
    """The running mean of one KV head takes in the rows of `vector` that are `sound`."""
    added = tl.sum(sound.to(tl.float32), 0)
    mean = tl.load(means + row * DIM + column)
    step = tl.sum(tl.where(sound[:, None], vector, 0.0), 0) - added * mean
    tl.store(means + row * DIM + column, mean + step / tl.maximum(before + added, 1.0))


@kernel()
def _fold(
    evicted,
    positions,
    keys,
    key_scales,
    key_levels,
    centre,
    values,
    value_scales,
    value_levels,
    means,
    value_means,
    counts,
    capacity,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
):
    """One program: one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    index, column = tl.arange(0, SIZE), tl.arange(0, DIM)
    inside = index < COUNT
    slot = tl.load(evicted + row * COUNT + index, mask=inside, other=0)
    at = row * capacity + slot
    key = levels_of(
        keys + row * capacity * (DIM * KEY_BITS // 8), key_levels, slot, inside, column, DIM, KEY_BITS
    )
    key = key * tl.load(key_scales + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    key += tl.load(centre + row * DIM + column).to(tl.float32)[None, :]
    codes = values + row * capacity * (DIM * VALUE_BITS // 8)
    value = levels_of(codes, value_levels, slot, inside, column, DIM, VALUE_BITS)
    value = value * tl.load(value_scales + at, mask=inside, other=0.0).to(tl.float32)[:, None]
    finite = (tl.abs(key) < float("inf")) & (tl.abs(value) < float("inf"))
    real = tl.load(positions + at, mask=inside, other=-1) >= 0
    sound = (tl.min(finite.to(tl.int32), 1) > 0) & inside & real
    before = tl.load(counts + row)
    _fold_in(key, sound, means, row, before, column, DIM)
    _fold_in(value, sound, value_means, row, before, column, DIM)
    tl.debug_barrier()  # all have read the count
    tl.store(counts + row, before + tl.sum(sound.to(tl.float32), 0))


def fold(summary, slots, evicted):
    """`Summary.fold` of the slots `evicted` (int32 `[batch, num_kv_heads, n]`, contiguous), into one summary slot."""
    batch, kv_heads, count = evicted.shape
    _fold[(batch * kv_heads,)](
        evicted,
        slots.positions,
        *stored(slots, "keys"),
        slots.codec.centre,
        *stored(slots, "values"),
        summary.keys,
        summary.values,
        summary.counts,
        slots.capacity,
        COUNT=count,
        SIZE=power(count),
        DIM=slots.widths[0],
        **bits_of(slots),
        num_warps=4,
    )
