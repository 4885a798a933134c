"""Attention of many new tokens over the slots and themselves, in two Triton kernels: no score reaches memory.

The first is FlashAttention-2's forward pass (Dao 2023, arXiv 2307.08691), which also gives each query's normaliser. With that
a second pass over the keys adds up what each slot receives: attention is the exponential of logit minus normaliser.
"""

import torch

from sketchkv.fast.attention import LOG2E, MASKED, _tile
from sketchkv.fast.launch import jit, tl, triton


@jit
def _logits(q, k, hidden, slot, row, before, used, scale, softcap, CAPPED: tl.constexpr, HIDES: tl.constexpr):
    """Logits to base 2 of queries and slots, [queries, slots]: -inf for what came later, MASKED for what is hidden."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:  # tanh(x) = 2 / (1 + exp(-2 x)) - 1
        logits = softcap * (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * logits)) - 1.0)
    if HIDES:
        away = tl.load(hidden + slot, mask=slot < used, other=1) != 0
        logits = tl.where(away[None, :], MASKED, logits)
    seen = (slot[None, :] <= before + row[:, None]) & (slot[None, :] < used)
    return tl.where(seen, logits, -float("inf"))


@jit(do_not_specialize=["count", "used"])
def _attend(
    query,
    keys,
    values,
    hidden,
    beside,
    output,
    normaliser,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    heads,
    count,
    used,
    scale,
    softcap,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
    HIDES: tl.constexpr,
    BESIDE: tl.constexpr,
):
    """One program: ROWS queries of one head of one sequence."""
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest ones first
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    query += batch * q_batch + head * q_head
    keys += batch * k_batch + head // GROUP * k_head
    values += batch * v_batch + head // GROUP * v_head
    hidden += (batch * (heads // GROUP) + head // GROUP) * used
    row = begin + tl.arange(0, ROWS)
    key_column, value_column = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    before = used - count
    q = _tile(query, row, key_column, q_row, 1, count, KEYS, KEY_WIDTH)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if BESIDE:
        first = tl.load(beside + line * count + row, mask=row < count, other=0.0)
        top = tl.maximum(top, first)
        total = tl.exp2(first - top)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    end = tl.minimum(before + begin + ROWS, used)
    for at in tl.range(0, end, BLOCK, num_stages=STAGES):
        slot = at + tl.arange(0, BLOCK)
        k = _tile(keys, slot, key_column, k_slot, 1, end, KEYS, KEY_WIDTH)
        v = _tile(values, slot, value_column, v_slot, 1, end, VALUES, VALUE_WIDTH)
        logits = _logits(q, k, hidden, slot, row, before, used, scale, softcap, CAPPED, HIDES)
        higher = tl.maximum(top, tl.max(logits, 1))
        old, new = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
        total = total * old + tl.sum(new, 1)
        sums = tl.dot(new.to(v.dtype), v, sums * old[:, None], input_precision="ieee")
        top = higher
    inside = (row[:, None] < count) & (value_column[None, :] < VALUES)
    address = output + (line * count + row[:, None]) * VALUES + value_column[None, :]
    tl.store(address, (sums / total[:, None]).to(output.dtype.element_ty), mask=inside)
    tl.store(normaliser + line * count + row, top + tl.log2(total), mask=row < count)


@jit(do_not_specialize=["count", "used"])
def _receive(
    query,
    keys,
    hidden,
    normaliser,
    weights,
    received,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_slot,
    w_batch,
    heads,
    count,
    used,
    scale,
    softcap,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
    HIDES: tl.constexpr,
):
    """One program: what BLOCK slots receive from one head of one sequence."""
    begin = tl.program_id(0) * BLOCK  # the longest ones first: all queries see the first slots
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    query += batch * q_batch + head * q_head
    keys += batch * k_batch + head // GROUP * k_head
    hidden += (batch * (heads // GROUP) + head // GROUP) * used
    normaliser += line * count
    weights += batch * w_batch
    slot, column = begin + tl.arange(0, BLOCK), tl.arange(0, KEY_WIDTH)
    k = _tile(keys, slot, column, k_slot, 1, used, KEYS, KEY_WIDTH)
    sums = tl.zeros([BLOCK], tl.float32)
    before = used - count
    start = tl.maximum(begin - before, 0) // ROWS * ROWS  # queries before see none of these slots
    for at in tl.range(start, count, ROWS, num_stages=STAGES):
        row = at + tl.arange(0, ROWS)
        q = _tile(query, row, column, q_row, 1, count, KEYS, KEY_WIDTH)
        weight = tl.load(weights + row, mask=row < count, other=0.0)
        total = tl.load(normaliser + row, mask=row < count, other=0.0)
        logits = _logits(q, k, hidden, slot, row, before, used, scale, softcap, CAPPED, HIDES)
        sums += tl.sum(tl.exp2(logits - total[:, None]) * weight[:, None], 0)
    tl.store(received + line * used + slot, sums, mask=slot < used)


def attend(query, keys, values, scaling, softcap=None, hidden=None, beside=None):
    """Attention of n new queries over the slots, the last n of which are their own tokens: `(output, normaliser)`.

    query: `[batch, num_heads, n, width]`.
    keys, values: `[batch, num_kv_heads, used, width of each]`, of the query's dtype; views with any strides but the last.
    scaling, softcap: as of `sketchkv.logits.Form`.
    hidden: uint8 `[batch, num_kv_heads, used]`, contiguous, 1 for slots that are not looked at; None: none.
    beside: float32 `[batch, num_heads, n]`, the log-sum-exp of each query's logits of what is no slot; None: nothing.

    output: `[batch, num_heads, n, width of values]`, the query's dtype, of slots alone.
    normaliser: float32 `[batch, num_heads, n]`, the log-sum-exp of all logits, to base 2.
    """
    (batch, heads, count, _), used = query.shape, keys.shape[2]
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    output = torch.empty(batch, heads, count, values.shape[-1], dtype=query.dtype, device=query.device)
    normaliser = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
    rows, block, stages, warps = _tiles(query, values)
    _attend[(triton.cdiv(count, rows), batch * heads)](
        query,
        keys,
        values,
        normaliser if hidden is None else hidden,
        normaliser if beside is None else (beside * LOG2E).contiguous(),
        output,
        normaliser,
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        heads,
        count,
        used,
        *_factors(scaling, softcap),
        GROUP=heads // keys.shape[1],
        KEYS=keys.shape[-1],
        KEY_WIDTH=_width(keys),
        VALUES=values.shape[-1],
        VALUE_WIDTH=_width(values),
        ROWS=rows,
        BLOCK=block,
        STAGES=stages,
        CAPPED=softcap is not None,
        HIDES=hidden is not None,
        BESIDE=beside is not None,
        num_warps=warps,
    )
    return output, normaliser


def receive(query, keys, normaliser, weights, scaling, softcap=None, hidden=None):
    """What each slot receives from n queries: the sum of their attention, float32 `[batch, num_kv_heads, used]`.

    weights: float32 `[batch or 1, n]`, how much each query counts; other parameters as of `attend`.
    """
    (batch, heads, count, _), (kv_heads, used) = query.shape, keys.shape[1:3]
    query, keys, weights = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, weights))
    received = torch.empty(batch, heads, used, dtype=torch.float32, device=query.device)
    rows, block, stages, warps = _tiles(query, keys)
    _receive[(triton.cdiv(used, block), batch * heads)](
        query,
        keys,
        normaliser if hidden is None else hidden,
        normaliser,
        weights,
        received,
        *query.stride()[:3],
        *keys.stride()[:3],
        weights.stride(0) if weights.shape[0] > 1 else 0,
        heads,
        count,
        used,
        *_factors(scaling, softcap),
        GROUP=heads // kv_heads,
        KEYS=keys.shape[-1],
        KEY_WIDTH=_width(keys),
        ROWS=rows,
        BLOCK=block,
        STAGES=stages,
        CAPPED=softcap is not None,
        HIDES=hidden is not None,
        num_warps=warps,
    )
    return received.view(batch, kv_heads, -1, used).sum(2)


def _factors(scaling, softcap):
    """Of products, and of what is capped: either way logits come out to base 2."""
    return (scaling * LOG2E, 1.0) if softcap is None else (scaling / softcap, softcap * LOG2E)


def _width(vectors):
    return max(16, triton.next_power_of_2(vectors.shape[-1]))


def _tiles(query, other):
    """Queries and slots of a tile, stages and warps: what fits in the memory of a multiprocessor."""
    row = max(_width(query), _width(other)) * query.element_size()  # bytes of a vector
    if row <= 128:
        return 128, 64, 3, 4
    if row <= 256:
        return 128, 64, 2, 8
    return (64, 64, 1, 4) if row <= 512 else (32, 32, 1, 4)
