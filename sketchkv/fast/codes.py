"""Slots in `sketchkv.quantize.Normal` codes: an eviction reads codes and scales as they are, and nothing is decoded to memory. A
key is scale * levels[code] + centre, in turned coordinates."""

import math

import torch

from sketchkv.fast.launch import jit, kernel, pieces, power, tl


@jit
def _plane(codes, slot, inside, column, DIM: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr):
    """The part of PART bits of the codes in the slots `slot`, where `sketchkv.quantize.pack` puts it."""
    SHIFT: tl.constexpr = BITS // (2 * PART) * (2 * PART)  # bits of the wider parts, which come first
    STRETCH: tl.constexpr = DIM * PART // 8
    address = codes + slot[:, None] * (DIM * BITS // 8) + SHIFT * DIM // 8 + (column % STRETCH)[None, :]
    byte = tl.load(address, mask=inside[:, None], other=0).to(tl.int32)
    return (byte >> (column // STRETCH * PART)[None, :] & ((1 << PART) - 1)) << SHIFT


@jit
def codes_of(codes, slot, inside, column, DIM: tl.constexpr, BITS: tl.constexpr):
    """Codes [rows, DIM], int32, in the slots `slot` [rows]."""
    code = slot.to(tl.int32)[:, None] * 0 + column[None, :] * 0
    if BITS & 8:
        code += _plane(codes, slot, inside, column, DIM, BITS, 8)
    if BITS & 4:
        code += _plane(codes, slot, inside, column, DIM, BITS, 4)
    if BITS & 2:
        code += _plane(codes, slot, inside, column, DIM, BITS, 2)
    if BITS & 1:
        code += _plane(codes, slot, inside, column, DIM, BITS, 1)
    return code


@jit
def levels_of(codes, levels, slot, inside, column, DIM: tl.constexpr, BITS: tl.constexpr):
    """Levels [rows, DIM], float32, of the codes in the slots `slot` [rows]."""
    return tl.load(levels + codes_of(codes, slot, inside, column, DIM, BITS))


@jit
def line_of(stored, line, rows, DIM: tl.constexpr, BITS: tl.constexpr):
    """Of `stored` keys or values, those of one KV head of one sequence, which has so many `rows`."""
    return (stored[0] + line * rows * (DIM * BITS // 8), stored[1] + line * rows) + stored[2:]


@jit
def vectors(stored, slot, held, DIM: tl.constexpr, BITS: tl.constexpr):
    """Vectors [rows, DIM], float32, of the codes in the slots `slot` that are `held`, zero elsewhere."""
    level = levels_of(stored[0], stored[2], slot, held, tl.arange(0, DIM), DIM, BITS)
    return level * tl.load(stored[1] + slot, mask=held, other=0.0).to(tl.float32)[:, None]


@jit
def ring_row(position, first, end, NEWEST: tl.constexpr, SINKS: tl.constexpr):
    """The row of `sketchkv.ring.Ring` where the tokens at `position` are, and whether they have one."""
    sink = position < first + SINKS
    held = (position >= 0) & (position < end) & (sink | (position >= end - NEWEST))
    return tl.where(sink, position - first, SINKS + position % NEWEST), held


def stored(slots, name, *tables):
    """Codes, scales and levels of keys or values, and what else of their coder is asked for: one argument of a kernel, or three
    and more."""
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
        values = line_of(values, row, capacity, DIM, VALUE_BITS)
        level = levels_of(values[0], values[2], slot, inside, tl.arange(0, DIM), DIM, VALUE_BITS)
        scale = tl.load(values[1] + slot, mask=inside, other=0.0).to(tl.float32)
        score *= tl.abs(scale) * tl.sqrt(tl.sum(level * level, 1))
    tl.store(scores + row * used + slot, score, mask=inside)


def importance(policy, slots, tokens, end):
    """What `AttentionMass.score` gives, norms of values taken from their codes: float32 `[batch, num_kv_heads, used]`."""
    (batch, kv_heads), used = slots.shape, slots.used
    scores = torch.empty(batch, kv_heads, used, dtype=torch.float32, device=slots.device)
    _importance[(batch * kv_heads, pieces(used, 64))](
        slots.arrays["mass"],
        slots.positions,
        stored(slots, "values"),
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
    centre,
    values,
    means,
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
    key = vectors(line_of(keys, row, capacity, DIM, KEY_BITS), slot, inside, DIM, KEY_BITS)
    key += tl.load(centre + row * DIM + column).to(tl.float32)[None, :]
    value = vectors(line_of(values, row, capacity, DIM, VALUE_BITS), slot, inside, DIM, VALUE_BITS)
    finite = (tl.abs(key) < float("inf")) & (tl.abs(value) < float("inf"))
    real = tl.load(positions + row * capacity + slot, mask=inside, other=-1) >= 0
    sound = (tl.min(finite.to(tl.int32), 1) > 0) & inside & real
    of_keys, of_values, counts = means
    before = tl.load(counts + row)
    _fold_in(key, sound, of_keys, row, before, column, DIM)
    _fold_in(value, sound, of_values, row, before, column, DIM)
    tl.debug_barrier()  # all have read the count
    tl.store(counts + row, before + tl.sum(sound.to(tl.float32), 0))


def fold(summary, slots, evicted):
    """`Summary.fold` of the slots `evicted` (int32 `[batch, num_kv_heads, n]`, contiguous), into one summary slot."""
    batch, kv_heads, count = evicted.shape
    _fold[(batch * kv_heads,)](
        evicted,
        slots.positions,
        stored(slots, "keys"),
        slots.codec.centre,
        stored(slots, "values"),
        (summary.keys, summary.values, summary.counts),
        slots.capacity,
        COUNT=count,
        SIZE=power(count),
        DIM=slots.widths[0],
        **bits_of(slots),
        num_warps=4,
    )
