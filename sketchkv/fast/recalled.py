"""A step of a layer with an index (`sketchkv.recall`), in launches alone: the host counts tokens and learns nothing of what is chosen.

Kernels read and write the store where it is, be it in pinned memory of the host. What comes once in many tokens, a block of the index
that is full and memory that grows, is left to torch operations before a step.
"""

import weakref
from typing import Any

import torch

from sketchkv.fast import coded, coding
from sketchkv.fast.attention import LOG2E
from sketchkv.fast.choice import choose, copied, record_of
from sketchkv.fast.codes import bits_of, rests_of, stored
from sketchkv.fast.launch import has_room, kernel, power, tl
from sketchkv.fast.scan import TILE, candidates
from sketchkv.fast.tail import take
from sketchkv.fast.token import ring_place, store_vector
from sketchkv.index import KeyIndex, hold, reserve
from sketchkv.layer import BoundedLayer
from sketchkv.quantize import TINY, Normal, Quantized
from sketchkv.recall import RecallLayer
from sketchkv.slots import MOST_TOKENS
from sketchkv.store import PAGE
from sketchkv.tail import Tail

MOST_SLOTS = 4096
COUNTED = ("chosen", "missing", "fetched")


@kernel("slot", "seen")
def _enter(
    query,
    turned,
    key,
    value,
    turn,
    position,
    clock,
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
    rest_keys,
    rest_key_scales,
    rest_key_levels,
    rest_key_bounds,
    rest_values,
    rest_value_scales,
    rest_value_levels,
    rest_value_bounds,
    span,
    positions,
    asked,
    pending,
    pages,
    table,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    p_batch,
    batches,
    kv_heads,
    capacity,
    slot,
    seen,
    factor,
    scale,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    REST_BITS: tl.constexpr,
    RECENT: tl.constexpr,
    ALWAYS: tl.constexpr,
    PADDED: tl.constexpr,
    CLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    LEAST: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One program: the new token of one KV head of one sequence goes to a slot, to the store and to the index's open block."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    if CLOCK:
        seen = tl.load(clock) + 1
    begins = 0
    if PADDED:
        begins = tl.load(first + batch)
    number = seen - 1
    column = tl.arange(0, DIM)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(tl.float32) * (factor * scale)
    query += batch * q_batch + head * GROUP * q_head
    for each in range(GROUP):
        q = tl.load(query + each * q_head + column).to(tl.float32)
        tl.store(turned + (row * GROUP + each) * DIM + column, tl.sum(q[:, None] * rotation, 0))
    if slot < 0:  # what was asked for longest ago is overwritten, an empty slot before all others
        index = tl.arange(0, SLOTS)
        at = tl.load(positions + row * capacity + index, mask=index < capacity, other=0)
        age = tl.load(asked + row * capacity + index, mask=index < capacity, other=0).to(tl.int64)
        age = tl.where(at < 0, -1, (age << 32) | at)
        needed = (at >= 0) & ((at >= number - RECENT) | (at < begins + ALWAYS))
        age = tl.where(needed | (index >= capacity), 0x7FFFFFFFFFFFFFFF, age)
        slot = tl.min(tl.where(age == tl.min(age, 0), index, SLOTS), 0)
    target = row * capacity + slot
    at = tl.load(position + batch * p_batch)
    near = ring_place(span, at, begins, batch, row, NEWEST, SINKS)
    vector = key + batch * k_batch + head * k_head
    middle = tl.load(centre + row * DIM + column).to(tl.float32)
    coder = keys, key_scales, key_levels, key_bounds
    rest = rest_keys, rest_key_scales, rest_key_levels, rest_key_bounds
    raw = store_vector(
        vector, turn, factor, middle, coder, rest, target, near, NEWEST, REST_BITS, DIM, KEY_BITS, LEAST
    )
    vector = value + batch * v_batch + head * v_head
    coder = values, value_scales, value_levels, value_bounds
    rest = rest_values, rest_value_scales, rest_value_levels, rest_value_bounds
    store_vector(
        vector, turn, factor, 0.0, coder, rest, target, near, NEWEST, REST_BITS, DIM, VALUE_BITS, LEAST
    )
    open_block = pending + (row * BLOCK + number % BLOCK) * DIM
    tl.store(open_block + column, raw.to(pending.dtype.element_ty))
    tl.debug_barrier()  # codes were stored by other threads, and positions read
    tl.store(positions + target, at)
    tl.store(asked + target, 0)
    KEY: tl.constexpr = DIM * KEY_BITS // 8
    VALUE: tl.constexpr = DIM * VALUE_BITS // 8
    RECORD: tl.constexpr = KEY + VALUE + 4
    one = number + tl.arange(0, 1)
    record = record_of(pages, table, batch, batches, head, kv_heads, one, one >= 0, RECORD, PAGE)
    source = target + tl.arange(0, 1)
    byte = tl.pointer_type(tl.uint8)
    copied(keys + source * KEY, record, one >= 0, KEY, DIM)
    copied(key_scales.to(byte, bitcast=True) + source * 2, record + KEY, one >= 0, 2, 2)
    copied(values + source * VALUE, record + KEY + 2, one >= 0, VALUE, DIM)
    copied(value_scales.to(byte, bitcast=True) + source * 2, record + KEY + 2 + VALUE, one >= 0, 2, 2)


def enter(layer, query, key, value, scaling, tokens, clock, seen):
    """The new token of all heads, key and value `[batch, num_kv_heads, 1, width]`, in one launch. Returns its query, turned and
    scaled, float32 `[batch, num_heads, width]`, for powers of two; given is `[batch, num_heads, width]`."""
    slots, index, store, at = layer.slots, layer.index, layer.store, tokens.positions
    (batch, kv_heads), dim = slots.shape, slots.widths[0]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    rests, sizes = rests_of(slots, "bounds")
    turned, slot = torch.empty(query.shape, dtype=torch.float32, device=query.device), -1
    if slots.room:
        slot, slots.used = slots.used, slots.used + 1
    _enter[(batch * kv_heads,)](
        query,
        turned,
        key,
        value,
        slots.codec.rotations["keys"],
        at,
        clock,
        tokens.first if tokens.padded else at,
        *stored(slots, "keys", "bounds"),
        slots.codec.centre,
        *stored(slots, "values", "bounds"),
        *rests,
        slots.positions,
        slots.arrays["asked"],
        index.pending,
        store.bytes,
        store.mirror,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        at.stride(0) if at.shape[0] > 1 else 0,
        batch,
        kv_heads,
        slots.capacity,
        slot,
        seen,
        dim**-0.5,
        scaling * LOG2E,
        **sizes,
        RECENT=layer.recent_window,
        ALWAYS=layer.num_sinks,
        PADDED=tokens.padded,
        CLOCK=tokens.clock is not None,
        GROUP=query.shape[1] // kv_heads,
        DIM=dim,
        **bits_of(slots),
        BLOCK=index.block,
        SLOTS=power(slots.capacity),
        LEAST=TINY,
        PAGE=PAGE,
        num_warps=4,
    )
    return turned


class _Side:
    """What a layer has on the device beside its tensors: counters, and whether kernels serve it."""

    def __init__(self, layer):
        self.serves = _serves(layer)
        with torch.inference_mode(False):  # tensors that may be written to inside of it and outside
            self.counters = [torch.zeros((), dtype=torch.int64, device=layer.slots.device) for _ in COUNTED]

    def count(self, moved):
        """`moved` counts with these tensors from now on, which keep their addresses."""
        for name, counter in zip(COUNTED, self.counters, strict=True):
            if moved[name] is not counter:
                counter.fill_(moved[name])
                moved[name] = counter


# Of slots: a copy of them gets its own.
_sides: weakref.WeakKeyDictionary[Any, _Side] = weakref.WeakKeyDictionary()


def _serves(layer):
    slots, codec, index = layer.slots, layer.slots.codec, layer.index
    dim = slots.widths[0]
    return (
        type(layer) is RecallLayer
        and type(layer.summary) in (type(None), Tail)
        and type(layer).hide is BoundedLayer.hide
        and type(codec) is Quantized
        and all(type(coder) is Normal for coder in codec.all_coders())
        and dim == slots.widths[1]
        and 16 <= dim <= 256
        and not dim & (dim - 1)
        and has_room(dim, torch.float32, slots.device)  # the index codes a block in single precision
        and slots.capacity <= MOST_SLOTS
        and type(index) is KeyIndex
        and index.pooling == "softmax"
        and not index.block & (index.block - 1)
        and index.block <= 256
        and index.top <= TILE
        and layer.store.in_place
    )


def _side(layer):
    """What is beside a layer that kernels serve as it is now, else None."""
    slots, index = layer.slots, layer.index
    side = _sides.get(slots)
    if side is None:
        side = _sides[slots] = _Side(layer)
    served = side.serves and index.seen >= index.block and layer.seen >= slots.codec.settles_after
    return side if served else None


def ready(layer):
    """Room for one more token in the index and the store, and a full block is coded; what must not be recorded. Returns what a
    recording depends on, or None if kernels do not serve the layer."""
    index, store, side = layer.index, layer.store, _side(layer)
    if side is None:
        return None
    side.count(layer.moved)
    store.reserve(layer.seen + 1)
    store.mirrored(layer.slots.device)
    reserve(index, layer.seen + 1)
    if index.seen - index.coded == index.block:
        if index.coded and "positions" not in index.arrays:
            coding.block(index)
        else:
            index.code(index.pending)
    return layer.slots.used, index.capacity, store.bytes.data_ptr(), store.mirror.data_ptr()


def step(layer, query, key, value, tokens, form):
    """Attention of one new token, which enters: `[batch, num_heads, 1, width]`, or None if kernels do not serve the layer. Parameters
    as of `BoundedLayer.attend`."""
    slots, index, side = layer.slots, layer.index, _side(layer)
    if side is None or tokens.until(slots.codec, layer.seen) < MOST_TOKENS:
        return None
    if form.softcap is not None or form.sinks is not None:
        side.serves = False
        return None
    if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        ready(layer)
    seen, clock = layer.seen + 1, tokens.positions if tokens.clock is None else tokens.clock
    hold(index, tokens.positions if tokens.padded else None, 1)
    query = query[:, :, 0]
    query = query if query.stride(-1) == 1 else query.contiguous()
    turned = enter(layer, query, key, value, form.scaling, tokens, clock, seen)
    layer.advance()
    place = tokens.first if tokens.padded else clock, clock, seen
    sizes = dict(SINKS=layer.num_sinks, RECENT=layer.recent_window, PADDED=tokens.padded)
    sizes |= dict(CLOCK=tokens.clock is not None)
    found = candidates(turned, slots, index, place, **sizes)
    shown = choose(found, slots, index, layer.store, side.counters, place, **sizes)
    if layer.summary:
        take(layer.summary, key, value, slots, tokens, shown, layer.num_sinks)
    seen = _Seen(slots, shown)
    return coded.attend(query, seen, form.scaling, layer.summary, masked=True)[0][:, :, None]


class _Seen:
    """Slots of which all that are left out of attention are empty."""

    def __init__(self, slots, positions):
        self.slots, self.positions = slots, positions

    def __getattr__(self, name):
        return getattr(self.slots, name)
