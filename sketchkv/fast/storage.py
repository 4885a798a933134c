"""How slots are written: new tokens in one launch, holes closed in one launch for each array."""

import torch

from sketchkv.fast.launch import kernel, pieces, power, tl


@kernel("slot", "count")
def _append(
    key,
    value,
    position,
    filled,
    keys,
    values,
    positions,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    p_batch,
    p_row,
    slot,
    count,
    kv_heads,
    capacity,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    GROWS: tl.constexpr,
):
    """One program: ROWS new tokens of one KV head of one sequence."""
    line = tl.program_id(0).to(tl.int64)
    batch, head = line // kv_heads, line % kv_heads
    if GROWS:
        slot = tl.load(filled)
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    target, held = line * capacity + slot + row, row < count
    inside = held[:, None] & (column < KEYS)
    new = tl.load(key + batch * k_batch + head * k_head + row[:, None] * k_row + column, mask=inside)
    tl.store(keys + target[:, None] * KEYS + column, new, mask=inside)
    inside = held[:, None] & (column < VALUES)
    new = tl.load(value + batch * v_batch + head * v_head + row[:, None] * v_row + column, mask=inside)
    tl.store(values + target[:, None] * VALUES + column, new, mask=inside)
    tl.store(positions + target, tl.load(position + batch * p_batch + row * p_row, mask=held), mask=held)


def append(key, value, position, slots, filled=None):
    """Stores n new tokens in the next slots of all heads, in one launch; Python's count of the slots is left as it is.

    key, value: `[batch, num_kv_heads, n, width]`, of the dtypes that `slots` holds; position: int32 `[batch or 1, n]`.
    slots: `sketchkv.slots.Slots` with plain keys and values.
    filled: int32 `[1]`, how many slots are occupied, where the device counts; None: `slots.used`.
    """
    (batch, kv_heads), widths, count = slots.shape, slots.widths, key.shape[2]
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    rows = 1 if count == 1 else 32
    _append[(batch * kv_heads, pieces(count, rows))](
        key,
        value,
        position,
        position if filled is None else filled,
        slots.arrays["keys"],
        slots.arrays["values"],
        slots.positions,
        *key.stride()[:3],
        *value.stride()[:3],
        position.stride(0) if position.shape[0] > 1 else 0,
        position.stride(1),
        slots.used,
        count,
        kv_heads,
        slots.capacity,
        KEYS=widths[0],
        VALUES=widths[1],
        WIDTH=power(max(widths)),
        ROWS=rows,
        GROWS=filled is not None,
        num_warps=1 if count == 1 else 4,
    )


@kernel("kept")
def _compact(
    array,
    evicted,
    a_batch,
    a_head,
    a_slot,
    kv_heads,
    kept,
    blank,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """One program: one KV head of one sequence. The j-th survivor of the tail moves into the j-th hole below it."""
    row = tl.program_id(0).to(tl.int64)
    array += row // kv_heads * a_batch + row % kv_heads * a_head
    index = tl.arange(0, SIZE)
    gone = tl.load(evicted + row * COUNT + index, mask=index < COUNT, other=0x7FFFFFFF)
    tail = kept + index
    dead = tl.max((tail[:, None] == gone[None, :]).to(tl.int32), 1)
    alive = (dead == 0) & (index < COUNT)
    # How many survivors, or holes, come before each: equal numbers belong together.
    order = tl.cumsum(alive.to(tl.int32), 0) - 1
    hole = gone < kept
    before = tl.sum((hole[None, :] & (gone[None, :] < gone[:, None])).to(tl.int32), 1)
    pair = hole[None, :] & (before[None, :] == order[:, None])
    target = tl.sum(tl.where(pair, gone[None, :], 0), 1)
    column = tl.arange(0, WIDTH)
    moved = alive[:, None] & (column[None, :] < INNER)
    vectors = tl.load(array + tail[:, None] * a_slot + column[None, :], mask=moved, other=0)
    tl.store(array + target[:, None] * a_slot + column[None, :], vectors, mask=moved)
    if CLEAR:
        tl.debug_barrier()  # what is cleared was read by other threads
        cleared = (index[:, None] < COUNT) & (column[None, :] < INNER)
        empty = tl.zeros([SIZE, WIDTH], array.dtype.element_ty) + blank.to(array.dtype.element_ty)
        tl.store(array + tail[:, None] * a_slot + column[None, :], empty, mask=cleared)


def compact(slots, evicted):
    """`Slots.evict`: survivors of the last n slots move into the holes that the slots `evicted` (int32
    `[batch, num_kv_heads, n]`, contiguous) leave below, in one launch for each array."""
    batch, kv_heads, count = evicted.shape
    kept = slots.used - count
    for name, array in slots.arrays.items():
        inner = array.shape[3:].numel()
        if inner == 0:
            continue
        array = array.view(torch.uint8) if array.dtype == torch.bool else array
        _compact[(batch * kv_heads,)](
            array,
            evicted,
            *array.stride()[:3],
            kv_heads,
            kept,
            -1 if name == "positions" else 0,
            COUNT=count,
            SIZE=power(count),
            INNER=inner,
            WIDTH=power(inner),
            CLEAR=name not in slots.kv,
            num_warps=1 if inner == 1 else 4,
        )
    slots.used = slots.kept = kept
