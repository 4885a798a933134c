"""What a query leaves out (`sketchkv.tail.Tail`), in one launch a step."""

from sketchkv.fast.launch import kernel, power, tl


@kernel()
def _take(
    key,
    value,
    turn,
    position,
    first,
    shown,
    means,
    value_means,
    taken,
    counts,
    k_batch,
    k_head,
    v_batch,
    v_head,
    p_batch,
    kv_heads,
    capacity,
    factor,
    SINKS: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: the new token of one KV head of one sequence enters the means, which weigh as what its query leaves out."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    begins = 0
    if PADDED:
        begins = tl.load(first + batch)
    at = tl.load(position + batch * p_batch)
    column = tl.arange(0, DIM)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(tl.float32) * factor
    key = tl.load(key + batch * k_batch + head * k_head + column).to(tl.float32)
    value = tl.load(value + batch * v_batch + head * v_head + column).to(tl.float32)
    key, value = tl.sum(key[:, None] * rotation, 0), tl.sum(value[:, None] * rotation, 0)
    large = 3.4e38
    wild = tl.sum((~(tl.abs(key) <= large)).to(tl.int32) + (~(tl.abs(value) <= large)).to(tl.int32), 0)
    sound = (at >= 0) & (at >= begins + SINKS) & (wild == 0)
    before = tl.load(taken + row)
    total = tl.where(sound, before + 1, before)
    mean = tl.load(means + row * DIM + column)
    tl.store(means + row * DIM + column, tl.where(sound, mean + (key - mean) / tl.maximum(total, 1), mean))
    mean = tl.load(value_means + row * DIM + column)
    mean = tl.where(sound, mean + (value - mean) / tl.maximum(total, 1), mean)
    tl.store(value_means + row * DIM + column, mean)
    tl.store(taken + row, total)
    slot = tl.arange(0, SLOTS)
    attended = tl.load(shown + row * capacity + slot, mask=slot < capacity, other=-1) >= 0
    left_out = tl.where(at >= 0, at - begins + 1, 0) - tl.sum(attended.to(tl.int32), 0)
    left_out = tl.where(total > 0, tl.maximum(left_out, 0), 0)
    tl.store(counts + row, left_out.to(tl.float32))


def take(tail, key, value, slots, tokens, shown, num_sinks):
    """The new token of all heads, key and value `[batch, num_kv_heads, 1, width]`, not turned.

    shown: positions of the slots that its query attends to, -1 for all others, int32 `[batch, num_kv_heads, capacity]`.
    """
    (batch, kv_heads), dim, at = slots.shape, slots.widths[0], tokens.positions
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    _take[(batch * kv_heads,)](
        key,
        value,
        slots.codec.rotations["keys"],
        at,
        tokens.first if tokens.padded else at,
        shown,
        tail.keys,
        tail.values,
        tail.taken,
        tail.counts,
        *key.stride()[:2],
        *value.stride()[:2],
        at.stride(0) if at.shape[0] > 1 else 0,
        kv_heads,
        slots.capacity,
        dim**-0.5,
        SINKS=num_sinks,
        PADDED=tokens.padded,
        DIM=dim,
        SLOTS=power(slots.capacity),
        num_warps=4,
    )
