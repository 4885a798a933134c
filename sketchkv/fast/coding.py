"""Vectors to codes and back, many at a time, as `sketchkv.quantize.Normal` does it; and the one time that all keys get new codes."""

from sketchkv.fast.codes import line_of, rests_of, ring_row, stored, vectors
from sketchkv.fast.launch import jit, kernel, tl
from sketchkv.index import CENTRE_BITS, LARGEST
from sketchkv.quantize import CENTRE_AFTER, TINY

MOST_SETTLED = CENTRE_AFTER  # slots that are occupied when keys are centred


@jit
def code_of(x, levels, bounds, LEAST: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr):
    """(codes, levels, scales float16) of vectors x [rows, DIM], float32."""
    norm = tl.sqrt(tl.sum(x * x, 1) / DIM)
    relative = x / tl.maximum(norm, LEAST)[:, None]
    code = (x > x).to(tl.int32)  # zeros
    for step in tl.static_range(BITS):  # halves what is left
        further = code + (1 << (BITS - 1 - step))
        code = tl.where(relative > tl.load(bounds + further - 1), further, code)
    level = tl.load(levels + code)
    scale = (tl.sum(x * level, 1) / tl.sum(level * level, 1)).to(tl.float16)
    return code, level, scale


@jit
def _put_plane(
    codes, code, target, held, ROWS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr
):
    SHIFT: tl.constexpr = BITS // (2 * PART) * (2 * PART)
    STRETCH: tl.constexpr = DIM * PART // 8
    PARTS: tl.constexpr = 8 // PART
    part = tl.reshape((code >> SHIFT) & ((1 << PART) - 1), [ROWS, PARTS, STRETCH])
    byte = tl.sum(part << (tl.arange(0, PARTS) * PART)[None, :, None], 1)
    address = codes + target[:, None] * (DIM * BITS // 8) + SHIFT * DIM // 8 + tl.arange(0, STRETCH)[None, :]
    tl.store(address, byte.to(tl.uint8), mask=held[:, None])


@jit
def put(codes, scales, code, scale, target, held, ROWS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr):
    """Stores codes [ROWS, DIM] and scales in the slots `target` that are `held`."""
    tl.store(scales + target, scale, mask=held)
    if BITS & 8:
        _put_plane(codes, code, target, held, ROWS, DIM, BITS, 8)
    if BITS & 4:
        _put_plane(codes, code, target, held, ROWS, DIM, BITS, 4)
    if BITS & 2:
        _put_plane(codes, code, target, held, ROWS, DIM, BITS, 2)
    if BITS & 1:
        _put_plane(codes, code, target, held, ROWS, DIM, BITS, 1)


@jit
def enter(
    x, stored, target, held, ROWS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr
):
    """Codes vectors x [ROWS, DIM], float32, into the slots `target` that are `held`; returns what their codes tell."""
    codes, scales, levels, bounds = stored
    code, level, scale = code_of(x, levels, bounds, LEAST, DIM, BITS)
    put(codes, scales, code, scale, target, held, ROWS, DIM, BITS)
    return level * scale.to(tl.float32)[:, None]


@kernel("used", "end", "capacity")
def _settle(
    keys,
    centre,
    positions,
    rests,
    capacity,
    used,
    end,
    num_sinks,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    REST_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """One program: one KV head of one sequence."""
    line = tl.program_id(0).to(tl.int64)
    slot, column = tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = slot < used
    keys = line_of(keys, line, capacity, DIM, KEY_BITS)
    at = tl.load(positions + line * capacity + slot, mask=inside, other=-1)
    key = vectors(keys, slot, inside, DIM, KEY_BITS)
    key += tl.load(centre + line * DIM + column).to(tl.float32)[None, :]
    if NEWEST:
        rests = line_of(rests, line, NEWEST + SINKS, DIM, REST_BITS)
        near, held = ring_row(at, 0, end, NEWEST, SINKS)
        key += vectors(rests, near, held, DIM, REST_BITS)
    member = inside & (at >= num_sinks) & (tl.min((tl.abs(key) < float("inf")).to(tl.int32), 1) > 0)
    total = tl.sum(tl.where(member[:, None], key, 0.0), 0)
    middle = (total / tl.maximum(tl.sum(member.to(tl.float32), 0), 1.0)).to(tl.float16)
    tl.debug_barrier()  # all have read what is overwritten
    tl.store(centre + line * DIM + column, middle)
    x = key - middle.to(tl.float32)[None, :]
    told = enter(x, keys, slot, inside, ROWS, DIM, KEY_BITS, LEAST)
    if NEWEST:
        enter(x - told, rests, near, held, ROWS, DIM, REST_BITS, LEAST)


def settle(slots, seen, num_sinks):
    """`sketchkv.quantize.Quantized.settle` for texts without padding, of at most `MOST_SETTLED` slots, in one launch."""
    (batch, kv_heads), dim = slots.shape, slots.widths[0]
    rests, sizes = rests_of(slots, "bounds")
    _settle[(batch * kv_heads,)](
        stored(slots, "keys", "bounds"),
        slots.codec.centre,
        slots.positions,
        tuple(rests[:4]),
        slots.capacity,
        slots.used,
        seen,
        num_sinks,
        **sizes,
        ROWS=MOST_SETTLED,
        DIM=dim,
        KEY_BITS=slots.codec.bits["keys"],
        LEAST=TINY,
        num_warps=4,
    )


@kernel("start", "room")
def _block(
    keys,
    turn,
    signatures,
    levels,
    bounds,
    factors,
    centres,
    centre_levels,
    centre_bounds,
    centre_scales,
    start,
    room,
    factor,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    CENTRE_BITS: tl.constexpr,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """One program: the full block of one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    number, column = tl.arange(0, BLOCK), tl.arange(0, DIM)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(tl.float32)
    x = tl.load(keys + (row * BLOCK + number[:, None]) * DIM + column[None, :]).to(tl.float32)
    x = tl.dot(x, rotation, input_precision="ieee") * factor
    counts = (tl.abs(x) < float("inf")) & (start + number >= SINKS)[:, None]
    mean = tl.sum(tl.where(counts, x, 0.0), 0) / tl.maximum(tl.sum(counts.to(tl.float32), 0), 1.0)
    mean = tl.minimum(tl.maximum(mean, -LARGEST), LARGEST)[None, :]
    code, level, scale = code_of(mean, centre_levels, centre_bounds, LEAST, DIM, CENTRE_BITS)
    one = (row * (room // BLOCK) + start // BLOCK) + tl.arange(0, 1)
    put(centres, centre_scales, code, scale, one, one >= 0, 1, DIM, CENTRE_BITS)
    x -= level * scale.to(tl.float32)[:, None]
    code, level, scale = code_of(x, levels, bounds, LEAST, DIM, BITS)
    size = tl.sum(x * x, 1) / tl.maximum(tl.sum(x * level, 1), LEAST)
    size = tl.minimum(size, LARGEST).to(tl.float16)
    put(signatures, factors, code, size, row * room + start + number, number >= 0, BLOCK, DIM, BITS)


def block(index):
    """Codes the open block of a `sketchkv.index.KeyIndex`, which is full, in one launch; no sequence has padding."""
    (batch, kv_heads, dim), arrays = index.shape, index.arrays
    _block[(batch * kv_heads,)](
        index.pending,
        index.rotation,
        arrays["signature"],
        index.coder.levels,
        index.coder.bounds,
        arrays["factor"],
        arrays["centre"],
        index.centres.levels,
        index.centres.bounds,
        arrays["centre_scale"],
        index.coded,
        index.capacity,
        dim**-0.5,
        SINKS=index.num_sinks,
        BLOCK=index.block,
        DIM=dim,
        BITS=index.bits,
        CENTRE_BITS=CENTRE_BITS,
        LEAST=TINY,
        LARGEST=LARGEST,
        num_warps=4,
    )
    index.coded += index.block
