"""Which slots a step attends to, once candidates are known: what is asked for and is not there takes the place of what was asked for
longest ago, in one launch, and is read from the store in another. The host learns nothing of it."""

import torch

from sketchkv.fast.launch import jit, kernel, pieces, power, tl
from sketchkv.fast.scan import threshold
from sketchkv.store import PAGE

PAIRS = 16384  # of a slot and a token that one program compares at a time
READS = 16  # tokens that one program reads


@kernel("used", "seen", "record")
def _choose(
    candidates,
    positions,
    asked,
    unattended,
    shown,
    first,
    clock,
    chosen,
    missing,
    places,
    absent,
    all_chosen,
    all_missing,
    all_fetched,
    kv_heads,
    capacity,
    used,
    seen,
    record,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    TOP: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    SHIFT: tl.constexpr,
    SINKS: tl.constexpr,
    RECENT: tl.constexpr,
    PADDED: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """One program: one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    if CLOCK:
        seen = tl.load(clock) + 1
    begins = 0
    if PADDED:
        begins = tl.load(first + row // kv_heads)
    chosen += row * TOP
    missing += row * TOP
    index = tl.arange(0, SIZE)
    key = tl.load(candidates + row * COUNT + index, mask=index < COUNT, other=-1)
    picked = (key >= threshold(key, TOP, 31 + SHIFT)) & (key >= 0)
    place = tl.cumsum(picked.to(tl.int32), 0) - 1
    tl.store(chosen + place, (key & ((1 << SHIFT) - 1)).to(tl.int32), mask=picked)
    total = tl.sum(picked.to(tl.int32), 0)
    tl.debug_barrier()  # what follows was stored by other threads
    slot = tl.arange(0, SLOTS)
    inside = slot < used
    address = row * capacity + slot
    at = tl.load(positions + address, mask=inside, other=-1)
    needed = (at >= 0) & ((at >= seen - RECENT) | (at < begins + SINKS))
    here = tl.zeros([SLOTS], tl.int32)
    gone = total * 0
    for begin in range(0, total, TOKENS):
        number = begin + tl.arange(0, TOKENS)
        token = tl.load(chosen + number, mask=number < total, other=-2)
        same = (at[:, None] == token[None, :]).to(tl.int32)
        here |= tl.max(same, 1)
        away = (tl.max(same, 0) == 0) & (number < total)
        tl.store(missing + gone + tl.cumsum(away.to(tl.int32), 0) - 1, token, mask=away)
        gone += tl.sum(away.to(tl.int32), 0)
    needed |= here > 0
    tl.debug_barrier()
    # Empty slots are overwritten first, then those that were asked for longest ago, of these the oldest token's.
    when = tl.load(asked + address, mask=inside, other=0).to(tl.int64)
    idle = (tl.full([SLOTS], 1, tl.int64) << (2 * SHIFT)) - 1 - ((when << SHIFT) | at)
    idle = tl.where(at < 0, (tl.full([SLOTS], 1, tl.int64) << (2 * SHIFT)) + slot, idle)
    idle = tl.where(inside & (needed == 0), idle, -1)
    taken = (idle >= threshold(idle, gone, 2 * SHIFT + 1)) & (idle >= 0)
    order = tl.cumsum(taken.to(tl.int32), 0) - 1
    token = tl.load(missing + order, mask=taken, other=-1)
    at = tl.where(taken, token, at)
    needed |= taken
    tl.store(positions + address, at, mask=taken)
    tl.store(places + row * TOP + order, slot, mask=taken)
    tl.store(asked + address, slot * 0 + seen, mask=needed & inside)
    tl.store(unattended + address, (needed == 0).to(tl.uint8), mask=inside)
    tl.store(shown + address, tl.where(needed, at, -1), mask=slot < capacity)
    tl.store(absent + row, gone)
    tl.atomic_add(all_chosen, total.to(tl.int64))
    tl.atomic_add(all_missing, gone.to(tl.int64))
    tl.atomic_add(all_fetched, gone.to(tl.int64) * record)


@jit
def copied(source, target, held, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """SIZE bytes of each of the addresses `source` [rows] to `target`, for the rows that are `held`."""
    column = tl.arange(0, WIDTH)
    inside = held[:, None] & (column[None, :] < SIZE)
    byte = tl.load(source[:, None] + column[None, :], mask=inside, other=0)
    tl.store(target[:, None] + column[None, :], byte, mask=inside)


@jit
def record_of(
    pages, table, batch, batches, head, kv_heads, token, held, RECORD: tl.constexpr, PAGE: tl.constexpr
):
    """Addresses of the records of tokens [rows] in a store."""
    page = tl.load(table + token // PAGE * batches + batch, mask=held, other=0).to(tl.int64)
    return pages + ((page * kv_heads + head) * PAGE + token % PAGE) * RECORD


@kernel()
def _fetch(
    pages,
    table,
    missing,
    places,
    absent,
    keys,
    key_scales,
    values,
    value_scales,
    batches,
    kv_heads,
    capacity,
    TOP: tl.constexpr,
    READS: tl.constexpr,
    PAGE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: READS of the missing tokens of one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * READS + tl.arange(0, READS)
    held = number < tl.load(absent + row)
    token = tl.load(missing + row * TOP + number, mask=held, other=0)
    slot = row * capacity + tl.load(places + row * TOP + number, mask=held, other=0)
    RECORD: tl.constexpr = KEY + VALUE + 4
    batch, head = row // kv_heads, row % kv_heads
    source = record_of(pages, table, batch, batches, head, kv_heads, token, held, RECORD, PAGE)
    copied(source, keys + slot * KEY, held, KEY, WIDTH)
    copied(source + KEY, key_scales + slot * 2, held, 2, 2)
    copied(source + KEY + 2, values + slot * VALUE, held, VALUE, WIDTH)
    copied(source + KEY + 2 + VALUE, value_scales + slot * 2, held, 2, 2)


def choose(found, slots, index, store, moved, place, **sizes):
    """Slots hold what `found` (as of `scan.candidates`) asks for, and `unattended` the rest. Returns positions, int32
    `[batch, num_kv_heads, capacity]`, -1 in slots that are not attended to.

    moved: int64 tensors that count tokens chosen, tokens missing and bytes fetched. place, sizes: as of `scan.candidates`.
    """
    (batch, kv_heads), capacity, (first, clock, seen) = slots.shape, slots.capacity, place
    (found, shift), rows, top, device = found, batch * kv_heads, index.top, slots.device
    shown = torch.empty_like(slots.positions)
    chosen, missing, places = torch.empty(3, rows, top, dtype=torch.int32, device=device)
    absent = torch.empty(rows, dtype=torch.int32, device=device)
    size = power(capacity)
    _choose[(rows,)](
        found,
        slots.positions,
        slots.arrays["asked"],
        slots.arrays["unattended"].view(torch.uint8),
        shown,
        first,
        clock,
        chosen,
        missing,
        places,
        absent,
        *moved,
        kv_heads,
        capacity,
        slots.used,
        seen,
        store.record,
        COUNT=found.shape[2],
        SIZE=power(found.shape[2]),
        TOP=top,
        TOKENS=max(2, min(power(top), PAIRS // size)),
        SLOTS=size,
        SHIFT=shift,
        **sizes,
        num_warps=8,
    )
    arrays = [slots.arrays[name].view(torch.uint8) for name, *_ in store.layout]
    key, value = arrays[0].shape[-1], arrays[2].shape[-1]
    _fetch[(rows, pieces(top, READS))](
        store.bytes,
        store.mirror,
        missing,
        places,
        absent,
        *arrays,
        batch,
        kv_heads,
        capacity,
        TOP=top,
        READS=READS,
        PAGE=PAGE,
        KEY=key,
        VALUE=value,
        WIDTH=power(max(key, value)),
        num_warps=4,
    )
    return shown
