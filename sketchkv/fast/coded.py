"""A decode step over slots in `sketchkv.quantize.Normal` codes: codes and scales are read once, nothing is decoded to memory.

Scale and centre come after the product with the query: the product of levels is all that a tile computes, and the centre adds
the same to all logits of a query. One summary slot enters as the first token that the softmax sees. Queries arrive as the model
gives them and are turned here; the output is turned back.
"""

import torch

from sketchkv.fast.attention import LOG2E, MASKED, PROGRAMS, _combine, _hide, _receive, scratchpad
from sketchkv.fast.codes import bits_of, levels_of, line_of, rests_of, ring_row, stored
from sketchkv.fast.launch import kernel, pieces, power, tl


@kernel("used", "per_split")
def _attend(
    query,
    turn,
    keys,
    centre,
    values,
    positions,
    rests,
    filled,
    means,
    received,
    output,
    scratch,
    partial,
    tops,
    totals,
    q_batch,
    q_head,
    scratch_stride,
    kv_heads,
    capacity,
    used,
    per_split,
    scale,
    factor,
    decay,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    REST_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SUMMARY: tl.constexpr,
    MASK: tl.constexpr,
    ADD: tl.constexpr,
    FINISH: tl.constexpr,
    GROWS: tl.constexpr,
):
    """One program: one KV head of one sequence, slots [split * per_split, (split + 1) * per_split)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if GROWS:
        used = tl.load(filled) + 1
    query += row // kv_heads * q_batch + row % kv_heads * GROUP * q_head
    keys, key_scales, key_levels = line_of(keys, row, capacity, DIM, KEY_BITS)
    values, value_scales, value_levels = line_of(values, row, capacity, DIM, VALUE_BITS)
    positions += row * capacity
    received += row * capacity
    scratch += row * GROUP * scratch_stride
    output += row * GROUP * DIM
    group, column = tl.arange(0, GROUPS), tl.arange(0, DIM)
    inside = (group[:, None] < GROUP) & (column[None, :] < DIM)
    # The matrix unit takes 16 query heads at once; rows beyond the group are zero.
    q = tl.load(query + group[:, None] * q_head + column[None, :], mask=inside, other=0.0)
    rotation = tl.load(turn + column[:, None] * DIM + column[None, :]).to(q.dtype)
    q = (tl.dot(q, rotation, input_precision="ieee") * factor).to(q.dtype)
    wide = q.to(tl.float32) * scale
    shift = tl.sum(wide * tl.load(centre + row * DIM + column).to(tl.float32)[None, :], 1)
    top = tl.full([GROUPS], MASKED, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    sums = tl.zeros([GROUPS, DIM], tl.float32)
    if SUMMARY:
        if split == 0:
            first = tl.sum(wide * tl.load(means[0] + row * DIM + column)[None, :], 1)
            first += tl.log2(tl.load(means[2] + row))
            top = tl.maximum(top, first)
            total = tl.exp2(first - top)
            sums = total[:, None] * tl.load(means[1] + row * DIM + column)[None, :]
    if NEWEST:
        rest_keys, rest_key_scales, rest_key_levels = line_of(rests[:3], row, NEWEST + SINKS, DIM, REST_BITS)
        rest_values, rest_value_scales, rest_value_levels = line_of(
            rests[3:6], row, NEWEST + SINKS, DIM, REST_BITS
        )
        text_begin = tl.load(rests[6] + row // kv_heads * 2)
        text_end = tl.load(rests[6] + row // kv_heads * 2 + 1)
    start = split * per_split
    end = tl.minimum(start + per_split, used)
    for begin in range(start, end, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        held = slot < end
        key = levels_of(keys, key_levels, slot, held, column, DIM, KEY_BITS).to(q.dtype)
        key_scale = tl.load(key_scales + slot, mask=held, other=0.0).to(tl.float32) * scale
        logits = tl.dot(q, tl.trans(key), input_precision="ieee") * key_scale[None, :] + shift[:, None]
        if NEWEST:  # a tile with none of these tokens only looks at its positions
            at = tl.load(positions + slot, mask=held, other=-1)
            near, near_held = ring_row(at, text_begin, text_end, NEWEST, SINKS)
            some = tl.max(near_held.to(tl.int32), 0) > 0
            if some:
                rest = levels_of(rest_keys, rest_key_levels, near, near_held, column, DIM, REST_BITS).to(
                    q.dtype
                )
                rest_scale = tl.load(rest_key_scales + near, mask=near_held, other=0.0).to(tl.float32) * scale
                logits += tl.dot(q, tl.trans(rest), input_precision="ieee") * rest_scale[None, :]
        logits = _hide(logits, positions, slot[None, :], 1, end, MASK)
        waiting = (group[:, None] < GROUP) & held[None, :]
        tl.store(scratch + group[:, None] * scratch_stride + slot[None, :], logits, mask=waiting)
        higher = tl.maximum(top, tl.max(logits, 1))
        old, new = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
        total = total * old + tl.sum(new, 1)
        value = levels_of(values, value_levels, slot, held, column, DIM, VALUE_BITS).to(q.dtype)
        weight = new * tl.load(value_scales + slot, mask=held, other=0.0).to(tl.float32)[None, :]
        sums = tl.dot(weight.to(q.dtype), value, sums * old[:, None], input_precision="ieee")
        if NEWEST:
            if some:
                rest = levels_of(rest_values, rest_value_levels, near, near_held, column, DIM, REST_BITS)
                rest_scale = tl.load(rest_value_scales + near, mask=near_held, other=0.0).to(tl.float32)
                more = (new * rest_scale[None, :]).to(q.dtype)
                sums = tl.dot(more, rest.to(q.dtype), sums, input_precision="ieee")
        top = higher
    if SPLITS == 1:
        back = tl.load(turn + column[None, :] * DIM + column[:, None]).to(q.dtype)
        result = tl.dot((sums / total[:, None]).to(q.dtype), back, input_precision="ieee") * factor
        tl.store(output + group[:, None] * DIM + column[None, :], result.to(q.dtype), mask=inside)
        tl.debug_barrier()  # the logits below were stored by other threads
        for begin in range(0, used, FINISH):
            slot = begin + tl.arange(0, FINISH)
            _receive(scratch, received, slot, 1, used, scratch_stride, group, top, total, decay, GROUP, ADD)
    else:
        part = (row * GROUP + group) * SPLITS + split
        tl.store(partial + part[:, None] * DIM + column[None, :], sums, mask=inside)
        tl.store(tops + part, top, mask=group < GROUP)
        tl.store(totals + part, total, mask=group < GROUP)


def attend(
    query, slots, scaling, summary=None, received=None, decay=1.0, masked=False, filled=None, **tuning
):
    """Attention of one new query per sequence over coded slots: `(output, received)`.

    query: `[batch, num_heads, width]`, not turned; output is alike.
    slots: `sketchkv.slots.Slots` with a codec that is `served`.
    scaling: factor of the logits.
    summary: `sketchkv.summary.Summary` of one slot, or None.
    received: float32 `[batch, num_kv_heads, capacity]`, becomes `decay * received + attention` in its occupied slots; None: a
        new tensor, whose occupied part is returned.
    masked: whether slots with a position below 0 are not looked at.
    filled: int32 `[1]`, how many slots were occupied before this token, where the device counts; None: `slots.used` with it.
    tuning: `block`, `splits`, `num_warps`, `num_stages`.
    """
    (batch, kv_heads), dim, capacity = slots.shape, slots.widths[0], slots.capacity
    heads, rows, used = query.shape[1], batch * kv_heads, slots.used if filled is None else capacity
    query = query if query.stride(-1) == 1 else query.contiguous()
    group, add = heads // kv_heads, received is not None
    if not add:
        received = torch.empty(batch, kv_heads, capacity, dtype=torch.float32, device=query.device)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    # To look up levels takes a program longer than to put the parts together does.
    splits = tuning.get("splits") or power(max(1, min(PROGRAMS // rows, pieces(used, 32))))
    block = tuning.get("block", 64 if dim <= 64 and used >= 256 * splits else 32)
    splits, per_split, stride, buffers = scratchpad(rows, group, used, dim, block, query.device, splits)
    counter = received if filled is None else filled
    means = [received] * 3 if summary is None else [summary.keys, summary.values, summary.counts]
    groups = max(16, power(group))
    shared = dict(GROUP=group, GROUPS=groups, SPLITS=splits, ADD=add, FINISH=128, GROWS=filled is not None)
    rotation, (rests, sizes) = slots.codec.rotations["keys"], rests_of(slots)
    _attend[(rows, splits)](
        query,
        rotation,
        stored(slots, "keys"),
        slots.codec.centre,
        stored(slots, "values"),
        slots.positions,
        tuple(rests),
        counter,
        tuple(means),
        received,
        output,
        *buffers,
        *query.stride()[:2],
        stride,
        kv_heads,
        capacity,
        used,
        per_split,
        scaling * LOG2E,
        dim**-0.5,
        decay,
        **sizes,
        DIM=dim,
        **bits_of(slots),
        BLOCK=block,
        SUMMARY=summary is not None,
        MASK=masked,
        num_warps=tuning.get("num_warps", 4),
        num_stages=tuning.get(
            "num_stages", 1
        ),  # levels are looked up in the first-level cache: nothing to fetch ahead
        **shared,
    )
    if splits > 1:
        _combine[(rows, group + pieces(used, 128))](
            received,
            counter,
            output,
            *buffers,
            rotation,
            *received.stride(),
            stride,
            kv_heads,
            used,
            decay,
            dim**-0.5,
            HEAD_DIM=dim,
            WIDTH=dim,
            PARTS=power(splits),
            AT_ONCE=min(power(splits), 32),
            TURN=True,
            num_warps=4,
            **shared,
        )
    return output, received[:, :, : slots.used]
