"""A decode step over the slots as one fused Triton kernel: each key and value is read once.

The plan is FlashDecoding's (Dao et al. 2023): online softmax, and slots split over several programs where the batch alone
would not fill the chip. Beyond it, the kernel gives what eviction needs: the attention each slot received. That takes the
final normaliser, so logits (1/64 of the bytes of keys and values at head_dim 64 in 16 bits) wait in a scratch buffer.
"""

import torch

from sketchkv.fast.launch import INTERPRETED, jit, kernel, pieces, power, tl, triton

LOG2E = 1.4426950408889634
MASKED = tl.constexpr(
    -3e38
)  # finite, so that a row with every slot masked attends evenly, as torch's softmax does
PROGRAMS = 512  # enough to fill the chip: about 4 per multiprocessor
FEW_SLOTS, FEW_PROGRAMS = 2048, 160  # with few slots more programs gain less than they cost


@jit
def _tile(pointer, row, column, row_stride, column_stride, end, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of a matrix with COLUMNS columns, zero outside."""
    address = pointer + row[:, None] * row_stride + column[None, :] * column_stride
    if COLUMNS == WIDTH:
        return tl.load(address, mask=row[:, None] < end, other=0.0)
    else:
        return tl.load(address, mask=(row[:, None] < end) & (column[None, :] < COLUMNS), other=0.0)


@jit
def _hide(logits, positions, slot, slot_stride, end, MASK: tl.constexpr):
    """Logits with -inf beyond `end` and MASKED where the slot holds no token; `slot` broadcasts to them."""
    if MASK:
        held = tl.load(positions + slot * slot_stride, mask=slot < end, other=0) >= 0
        logits = tl.where(held, logits, MASKED)
    return tl.where(slot < end, logits, -float("inf"))


@jit
def _receive(
    scratch,
    received,
    slot,
    slot_stride,
    used,
    scratch_stride,
    group,
    top,
    total,
    decay,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
):
    """received = decay * received + attention of the group's query heads, for `slot` [n]; top, total: [heads]."""
    inside = (group[:, None] < GROUP) & (slot[None, :] < used)
    logits = tl.load(
        scratch + group[:, None] * scratch_stride + slot[None, :],
        mask=inside,
        other=-float("inf"),
        cache_modifier=".cg",
    )
    attention = tl.sum(tl.exp2(logits - top[:, None]) / total[:, None], 0)
    address = received + slot * slot_stride
    if ADD:
        attention += decay * tl.load(address, mask=slot < used, other=0.0)
    tl.store(address, attention, mask=slot < used)


@kernel("used", "per_split")
def _attend(
    query,
    keys,
    values,
    positions,
    filled,
    received,
    output,
    scratch,
    partial,
    tops,
    totals,
    q_batch,
    q_head,
    q_dim,
    k_batch,
    k_head,
    k_slot,
    k_dim,
    v_batch,
    v_head,
    v_slot,
    v_dim,
    p_batch,
    p_head,
    p_slot,
    r_batch,
    r_head,
    r_slot,
    scratch_stride,
    kv_heads,
    used,
    per_split,
    scale,
    decay,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    MASK: tl.constexpr,
    ADD: tl.constexpr,
    FINISH: tl.constexpr,
    GROWS: tl.constexpr,
):
    """One program: one KV head of one sequence, slots [split * per_split, (split + 1) * per_split)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = row // kv_heads, row % kv_heads
    if GROWS:
        used = tl.load(filled) + 1
    query += batch * q_batch + head * GROUP * q_head
    keys += batch * k_batch + head * k_head
    values += batch * v_batch + head * v_head
    positions += batch * p_batch + head * p_head
    received += batch * r_batch + head * r_head
    scratch += row * GROUP * scratch_stride
    output += row * GROUP * HEAD_DIM
    start = split * per_split
    end = tl.minimum(start + per_split, used)
    group = tl.arange(0, GROUPS)
    column = tl.arange(0, WIDTH)
    if GROUP == 1:
        # Each row of the tile keeps a softmax of its own until the end: nothing crosses threads' rows in the loop.
        q = tl.load(query + column * q_dim, mask=column < HEAD_DIM, other=0.0).to(tl.float32) * scale
        top = tl.full([BLOCK], MASKED, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sums = tl.zeros([BLOCK, WIDTH], tl.float32)
        for begin in tl.range(start, end, BLOCK, num_stages=STAGES):
            slot = begin + tl.arange(0, BLOCK)
            k = _tile(keys, slot, column, k_slot, k_dim, end, HEAD_DIM, WIDTH)
            v = _tile(values, slot, column, v_slot, v_dim, end, HEAD_DIM, WIDTH)
            logits = _hide(tl.sum(k.to(tl.float32) * q[None, :], 1), positions, slot, p_slot, end, MASK)
            tl.store(scratch + slot, logits, mask=slot < end)
            higher = tl.maximum(top, logits)
            old, new = tl.exp2(top - higher), tl.exp2(logits - higher)
            total = total * old + new
            sums = sums * old[:, None] + new[:, None] * v.to(tl.float32)
            top = higher
        highest = tl.max(top, 0)
        share = tl.exp2(top - highest)
        sums = tl.sum(sums * share[:, None], 0)[None, :]
        total = tl.zeros([1], tl.float32) + tl.sum(total * share, 0)
        top = tl.zeros([1], tl.float32) + highest
    else:
        # The matrix unit takes 16 query heads at once; rows beyond the group are zero.
        q = _tile(query, group, column, q_head, q_dim, GROUP, HEAD_DIM, WIDTH)
        top = tl.full([GROUPS], MASKED, tl.float32)
        total = tl.zeros([GROUPS], tl.float32)
        sums = tl.zeros([GROUPS, WIDTH], tl.float32)
        for begin in tl.range(start, end, BLOCK, num_stages=STAGES):
            slot = begin + tl.arange(0, BLOCK)
            k = _tile(keys, slot, column, k_slot, k_dim, end, HEAD_DIM, WIDTH)
            v = _tile(values, slot, column, v_slot, v_dim, end, HEAD_DIM, WIDTH)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            logits = _hide(logits, positions, slot[None, :], p_slot, end, MASK)
            inside = (group[:, None] < GROUP) & (slot[None, :] < end)
            tl.store(scratch + group[:, None] * scratch_stride + slot[None, :], logits, mask=inside)
            higher = tl.maximum(top, tl.max(logits, 1))
            old, new = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
            total = total * old + tl.sum(new, 1)
            sums = tl.dot(new.to(v.dtype), v, sums * old[:, None], input_precision="ieee")
            top = higher
    inside = (group[:, None] < GROUP) & (column[None, :] < HEAD_DIM)
    if SPLITS == 1:
        address = output + group[:, None] * HEAD_DIM + column[None, :]
        tl.store(address, (sums / total[:, None]).to(output.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the logits below were stored by other threads
        for begin in range(0, used, FINISH):
            slot = begin + tl.arange(0, FINISH)
            _receive(
                scratch, received, slot, r_slot, used, scratch_stride, group, top, total, decay, GROUP, ADD
            )
    else:
        part = (row * GROUP + group) * SPLITS + split
        tl.store(partial + part[:, None] * HEAD_DIM + column[None, :], sums, mask=inside)
        tl.store(tops + part, top, mask=group < GROUP)
        tl.store(totals + part, total, mask=group < GROUP)


@kernel("used")
def _combine(
    received,
    filled,
    output,
    scratch,
    partial,
    tops,
    totals,
    turn,
    r_batch,
    r_head,
    r_slot,
    scratch_stride,
    kv_heads,
    used,
    decay,
    factor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ADD: tl.constexpr,
    FINISH: tl.constexpr,
    GROWS: tl.constexpr,
    TURN: tl.constexpr,
):
    """Second pass over split slots. One program: the output of one query head, or FINISH slots of one KV head."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    if GROWS:
        used = tl.load(filled) + 1
    split = tl.arange(0, PARTS)
    if block >= GROUP:
        group = tl.arange(0, GROUPS)
        part = (row * GROUP + group[:, None]) * SPLITS + split[None, :]
        inside = (group[:, None] < GROUP) & (split[None, :] < SPLITS)
        part_tops = tl.load(tops + part, mask=inside, other=MASKED)
        part_totals = tl.load(totals + part, mask=inside, other=0.0)
        all_tops = tl.max(part_tops, 1)
        all_totals = tl.sum(part_totals * tl.exp2(part_tops - all_tops[:, None]), 1)
        all_totals = tl.where(group < GROUP, all_totals, 1.0)
        received += row // kv_heads * r_batch + row % kv_heads * r_head
        scratch += row * GROUP * scratch_stride
        slot = (block - GROUP) * FINISH + tl.arange(0, FINISH)
        _receive(
            scratch,
            received,
            slot,
            r_slot,
            used,
            scratch_stride,
            group,
            all_tops,
            all_totals,
            decay,
            GROUP,
            ADD,
        )
    else:  # the output waits for nothing that the others do
        head = row * GROUP + block
        part_top = tl.load(tops + head * SPLITS + split, mask=split < SPLITS, other=MASKED)
        part_total = tl.load(totals + head * SPLITS + split, mask=split < SPLITS, other=0.0)
        top = tl.max(part_top, 0)
        total = tl.sum(part_total * tl.exp2(part_top - top), 0)
        column = tl.arange(0, WIDTH)
        written = column < HEAD_DIM
        sums = tl.zeros([WIDTH], tl.float32)
        for begin in range(0, SPLITS, AT_ONCE):
            index = begin + tl.arange(0, AT_ONCE)
            share = tl.load(tops + head * SPLITS + index, mask=index < SPLITS, other=MASKED)
            of_split = (head * SPLITS + index[:, None]) * HEAD_DIM + column[None, :]
            partly = tl.load(partial + of_split, mask=(index[:, None] < SPLITS) & written[None, :], other=0.0)
            sums += tl.sum(tl.exp2(share - top)[:, None] * partly, 0)
        result = (sums / total).to(output.dtype.element_ty)
        if TURN:  # values were turned when they were coded
            back = tl.load(turn + column[None, :] * HEAD_DIM + column[:, None]).to(result.dtype)
            turned = tl.sum(result.to(tl.float32)[:, None] * back.to(tl.float32), 0) * factor
            result = turned.to(result.dtype)
        tl.store(output + head * HEAD_DIM + column, result, mask=written)


def attend(query, keys, values, scaling, positions=None, received=None, decay=1.0, filled=None, **tuning):
    """Attention of one new query per sequence over the slots: `(output, received)`.

    query: `[batch, num_heads, head_dim]`; keys, values: `[batch, num_kv_heads, used, head_dim]`, views with any strides,
    float16, bfloat16 or float32; num_heads a multiple of num_kv_heads. scaling: factor of the logits. positions: integer
    `[batch, num_kv_heads, used]`, slots below 0 are not looked at; None: look at all.

    output: `[batch, num_heads, head_dim]`, the query's dtype. received: float32 `[batch, num_kv_heads, used]`, the
    attention of each KV head's query heads summed. If a tensor `received` is given, it becomes
    `decay * received + attention` in place and is returned. filled: int32 `[1]`, where the device counts: as many slots and
    one more, the new token's, are looked at, and of the others nothing is read or written. tuning: `block`, `splits`, `num_warps`, `num_stages`.

    Raises RuntimeError without triton or a GPU (see `usable`), ValueError for shapes that don't fit.
    """
    if triton is None or not (query.is_cuda or INTERPRETED):
        raise RuntimeError(
            "the fused kernel needs a CUDA device and the package triton, which comes with CUDA builds of torch "
            "(TRITON_INTERPRET=1 runs it on the CPU, for tests): use torch operations instead"
        )
    batch, kv_heads, used, head_dim = keys.shape
    heads = query.shape[1]
    slots = (batch, kv_heads, used)
    if (
        tuple(query.shape) != (batch, heads, head_dim)
        or heads % kv_heads
        or values.shape != keys.shape
        or any(tensor is not None and tuple(tensor.shape) != slots for tensor in (positions, received))
    ):
        raise ValueError(
            f"query {list(query.shape)}, keys {list(keys.shape)}, values {list(values.shape)} must be [batch, heads, dim], "
            f"[batch, kv_heads, used, dim] twice; positions and received [batch, kv_heads, used]"
        )
    group = heads // kv_heads
    groups = 1 if group == 1 else max(16, power(group))
    width = max(16, power(head_dim))
    rows = batch * kv_heads
    block = tuning.get("block", 32 if width > 64 or group == 1 and rows > 128 else 64)
    splits, per_split, stride, buffers = scratchpad(
        rows, group, used, head_dim, block, query.device, tuning.get("splits")
    )
    device = query.device
    output = torch.empty(batch, heads, head_dim, dtype=query.dtype, device=device)
    add = received is not None
    if not add:
        received = torch.empty(slots, dtype=torch.float32, device=device)
    mask = positions is not None
    positions = positions if mask else received
    counter = received if filled is None else filled
    finish = 1024 if group == 1 else 128
    shape = dict(
        GROUP=group, GROUPS=groups, HEAD_DIM=head_dim, WIDTH=width, SPLITS=splits, ADD=add, FINISH=finish
    )
    shape |= dict(GROWS=filled is not None)
    _attend[(rows, splits)](
        query,
        keys,
        values,
        positions,
        counter,
        received,
        output,
        *buffers,
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        *positions.stride(),
        *received.stride(),
        stride,
        kv_heads,
        used,
        per_split,
        scaling * LOG2E,
        decay,
        **shape,
        BLOCK=block,
        STAGES=tuning.get("num_stages", 3),
        MASK=mask,
        num_warps=tuning.get("num_warps", 4),
    )
    if splits > 1:
        _combine[(rows, group + pieces(used, finish))](
            received,
            counter,
            output,
            *buffers,
            received,
            *received.stride(),
            stride,
            kv_heads,
            used,
            decay,
            1.0,
            **shape,
            TURN=False,
            PARTS=power(splits),
            AT_ONCE=min(power(splits), 32),
            num_warps=4,
        )
    return output, received


def scratchpad(rows, group, used, width, block, device, splits=None):
    """How many programs share the slots of a KV head, slots of each, length of a row of logits, and what they write in
    between: logits, and for several programs their parts of the output, maxima and sums.

    rows: KV heads of all sequences; group: query heads of each; used: slots; width: of values; block: slots of one tile.
    """
    # Putting splits together costs as much as 300 slots do. A power of two: what is a constant of the compiled kernel must
    # take few values while the slots fill.
    wanted = PROGRAMS // rows if used > FEW_SLOTS else FEW_PROGRAMS // rows if used >= 512 else 1
    splits = splits or 1 << max(1, min(wanted, used // 64)).bit_length() - 1
    per_split = pieces(pieces(used, splits), block) * block
    stride = pieces(used, 16) * 16  # rows that begin at a multiple of 64 bytes
    scratch = torch.empty(rows * group, stride, dtype=torch.float32, device=device)
    partial = tops = totals = scratch
    if splits > 1:
        partial = torch.empty(rows * group, splits, width, dtype=torch.float32, device=device)
        tops, totals = torch.empty(2, rows * group, splits, dtype=torch.float32, device=device)
    return splits, per_split, stride, (scratch, partial, tops, totals)
