"""Attention of many new tokens over the slots and themselves, in one Triton kernel: no score reaches memory.

FlashAttention-2's forward pass (Dao 2023, arXiv 2307.08691), which also gives each query's normaliser, for
`sketchkv.fast.columns`. Tokens that are near to a query are left out where codes are read and read in a pass of their own.
"""

from typing import Any, NamedTuple

import torch

from sketchkv.fast.attention import LOG2E, MASKED, _tile
from sketchkv.fast.launch import jit, kernel, pieces, power, tl

NEVER = tl.constexpr(2**31 - 1)  # of no query


class Fine(NamedTuple):
    """What the queries of a pass read of tokens that are near to them.

    keys, values: `[batch, num_kv_heads, rows + n, width]`.
    places: positions of these tokens, -1 where there is none, int32 `[batch, num_kv_heads, rows + n]`.
    positions: of all slots, int32 `[batch, num_kv_heads, capacity]`.
    first: position of each row's first real token, int32 `[batch, 1, 1]`, or 0 for all.
    seen: position of the first new token.
    newest, sinks: of the ring. rows: those that stand before the new tokens'.
    """

    keys: Any
    values: Any
    places: Any
    positions: Any
    first: Any
    seen: int
    newest: int
    sinks: int
    rows: int


@jit
def capped(logits, softcap, CAPPED: tl.constexpr):
    if CAPPED:  # tanh(x) = 2 / (1 + exp(-2 x)) - 1
        logits = softcap * (2.0 / (1.0 + tl.exp2(-2.8853900817779268 * logits)) - 1.0)
    return logits


@jit
def since(slot, positions, before, used, seen, sinks_end, NEWEST: tl.constexpr):
    """The first of the queries that reads a slot, from its code where there is a ring."""
    first = slot - before
    if NEWEST:
        place = tl.load(positions + slot, mask=slot < used, other=-1)
        later = tl.where(place < sinks_end, NEVER, place + NEWEST - seen)
        first = tl.where(place < 0, first, later)
    return tl.where(slot < used, first, NEVER)


@jit
def logits_of(
    q,
    k,
    hidden,
    slot,
    used,
    first,
    row,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    HIDES: tl.constexpr,
    ALL: tl.constexpr = False,
):
    """Logits to base 2 of queries and slots, [queries, slots]: MASKED for what is hidden and, unless it is known that all read
    ALL, -inf before the `first` query that reads a slot."""
    logits = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, CAPPED)
    if HIDES:
        away = tl.load(hidden + slot, mask=slot < used, other=1) != 0
        logits = tl.where(away[None, :], MASKED, logits)
    if not ALL:
        logits = tl.where(first[None, :] <= row[:, None], logits, -float("inf"))
    return logits


@jit
def close_to(place, first, row, seen, sinks_end, NEWEST: tl.constexpr):
    """Whether tokens at `place`, which come with the query `first`, are near to queries (`sketchkv.ring.Near`)."""
    last = tl.where(place < sinks_end, NEVER, place + NEWEST - seen)
    first = tl.where(place >= 0, first, NEVER)
    return (first[None, :] <= row[:, None]) & (row[:, None] < last[None, :])


@jit
def _add(logits, v, top, total, sums):
    """The online softmax takes in a tile."""
    higher = tl.maximum(top, tl.max(logits, 1))
    old, new = tl.exp2(top - higher), tl.exp2(logits - higher[:, None])
    total = total * old + tl.sum(new, 1)
    return higher, total, tl.dot(new.to(v.dtype), v, sums * old[:, None], input_precision="ieee")


@jit
def _mean(means, turn, column, COLUMNS: tl.constexpr, TURN: tl.constexpr):
    """A mean, turned back if need be: then it has as many channels as a power of two."""
    mean = tl.load(means + column, mask=column < COLUMNS, other=0.0)
    if TURN:
        rotation = tl.load(turn + column[:, None] * COLUMNS + column[None, :]).to(tl.float32)
        mean = tl.sum(rotation * mean[None, :], 1) / tl.sqrt(tl.full([1], COLUMNS, tl.float32))
    return mean


@kernel("count", "used", "seen", "rows")
def _attend(
    query,
    keys,
    values,
    hidden,
    beside,
    turn,
    means,
    fine,
    positions,
    first,
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
    p_head,
    heads,
    count,
    used,
    seen,
    rows,
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
    SUMMARY: tl.constexpr,
    TURN: tl.constexpr,
    NEWEST: tl.constexpr,
    SINKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One program: ROWS queries of one head of one sequence."""
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest ones first
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    kv = batch * (heads // GROUP) + head // GROUP
    query += batch * q_batch + head * q_head
    keys += batch * k_batch + head // GROUP * k_head
    values += batch * v_batch + head // GROUP * v_head
    hidden += kv * used
    positions += kv * p_head
    row = begin + tl.arange(0, ROWS)
    key_column, value_column = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    before = used - count
    sinks_end = SINKS
    if PADDED:
        sinks_end += tl.load(first + batch)
    q = _tile(query, row, key_column, q_row, 1, count, KEYS, KEY_WIDTH)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    if BESIDE:
        other = tl.load(beside + line * count + row, mask=row < count, other=0.0)
        top = tl.maximum(top, other)
        total = tl.exp2(other - top)
    if SUMMARY:  # one slot that stands for all that was evicted
        mean = _mean(means[0] + kv * KEYS, turn, key_column, KEYS, TURN)
        other = tl.sum(q.to(tl.float32) * mean[None, :], 1) * scale
        other = capped(other, softcap, CAPPED) + tl.log2(tl.load(means[2] + kv))
        higher = tl.maximum(top, other)
        share = tl.exp2(other - higher)
        total = total * tl.exp2(top - higher) + share
        mean = _mean(means[1] + kv * VALUES, turn, value_column, VALUES, TURN)
        sums = share[:, None] * mean[None, :]
        top = higher
    end = tl.minimum(before + begin + ROWS, used)
    edge, whole = 0, (before + begin) // BLOCK * BLOCK
    if NEWEST:
        edge = end
        if (
            not PADDED
        ):  # of the newest nothing is read here; which slots older tokens and sinks have, their positions say
            end = before + tl.minimum(tl.maximum(begin + ROWS - NEWEST, 0), count)
            edge = (before + tl.maximum(sinks_end - seen, 0) + BLOCK - 1) // BLOCK * BLOCK
            whole = tl.maximum(before + begin - NEWEST + 1, 0) // BLOCK * BLOCK
    for PART in tl.static_range(0 if NEWEST else 1, 3):  # the second: slots that all of these queries read
        start = 0 if PART == 0 else edge if PART == 1 else tl.maximum(edge, whole)
        stop = tl.minimum(edge, end) if PART == 0 else whole if PART == 1 else end
        for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
            slot = at + tl.arange(0, BLOCK)
            k = _tile(keys, slot, key_column, k_slot, 1, end, KEYS, KEY_WIDTH)
            v = _tile(values, slot, value_column, v_slot, 1, end, VALUES, VALUE_WIDTH)
            starts = since(slot, positions, before, end, seen, sinks_end, NEWEST)
            logits = logits_of(q, k, hidden, slot, end, starts, row, scale, softcap, CAPPED, HIDES, PART == 1)
            top, total, sums = _add(logits, v, top, total, sums)
    if NEWEST:
        # What the ring held before, sinks among the new tokens, and those that came just before the queries.
        fine_keys = fine[0] + kv * (rows + count) * KEYS
        fine_values = fine[1] + kv * (rows + count) * VALUES
        places = fine[2] + kv * (rows + count)
        band = tl.maximum(begin - NEWEST + 1, 0) // BLOCK * BLOCK
        least = tl.maximum(sinks_end - SINKS - seen, 0) // BLOCK * BLOCK
        sunk = (tl.maximum(tl.minimum(sinks_end - seen, band) - least, 0) + BLOCK - 1) // BLOCK
        held = (rows + BLOCK - 1) // BLOCK
        close = (tl.minimum(begin + ROWS, count) - band + BLOCK - 1) // BLOCK
        for number in tl.range(0, held + sunk + close, num_stages=STAGES):
            own = number >= held
            at = (number - held) * BLOCK + least
            at = tl.where(number < held + sunk, at, (number - held - sunk) * BLOCK + band)
            index = tl.where(own, at, number * BLOCK) + tl.arange(0, BLOCK)
            inside = index < tl.where(own, count, rows)
            which = index + tl.where(own, rows, 0)
            which = tl.where(inside, which, rows + count)
            place = tl.load(places + which, mask=inside, other=-1)
            k = _tile(fine_keys, which, key_column, KEYS, 1, rows + count, KEYS, KEY_WIDTH)
            v = _tile(fine_values, which, value_column, VALUES, 1, rows + count, VALUES, VALUE_WIDTH)
            logits = capped(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap, CAPPED)
            near = close_to(place, tl.where(own, index, 0), row, seen, sinks_end, NEWEST)
            top, total, sums = _add(tl.where(near, logits, -float("inf")), v, top, total, sums)
    inside = (row[:, None] < count) & (value_column[None, :] < VALUES)
    address = output + ((batch * count + row[:, None]) * heads + head) * VALUES + value_column[None, :]
    tl.store(address, (sums / total[:, None]).to(output.dtype.element_ty), mask=inside)
    tl.store(normaliser + line * count + row, top + tl.log2(total), mask=row < count)


def attend(
    query, keys, values, scaling, softcap=None, hidden=None, beside=None, summary=None, turn=None, fine=None
):
    """Attention of n new queries over the slots, the last n of which are their own tokens: `(output, normaliser)`.

    query: `[batch, num_heads, n, width]`.
    keys, values: `[batch, num_kv_heads, used, width of each]`, of the query's dtype; views with any strides but the last.
    scaling, softcap: as of `sketchkv.logits.Form`.
    hidden: uint8 `[batch, num_kv_heads, used]`, contiguous, 1 for slots that are not looked at; None: none.
    beside: float32 `[batch, num_heads, n]`, the log-sum-exp of each query's logits of what gives nothing; None: nothing.
    summary: `sketchkv.summary.Summary` with one slot; None: none.
    turn: int8 rotation (`sketchkv.quantize.rotation`) of what the summary holds, and nothing else here; None: none.
    fine: `Fine`, read in place of `keys` and `values` where they are near to a query; None: none are.

    output: `[batch, num_heads, n, width of values]`, the query's dtype, heads side by side in memory.
    normaliser: float32 `[batch, num_heads, n]`, the log-sum-exp of all logits, to base 2.
    """
    (batch, heads, count, _), used = query.shape, keys.shape[2]
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    output = torch.empty(batch, count, heads, values.shape[-1], dtype=query.dtype, device=query.device)
    normaliser = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
    rows, block, stages, warps = tiles(query, values)
    near, (seen, before), sizes = parts_of(fine, normaliser)
    _attend[(pieces(count, rows), batch * heads)](
        query,
        keys,
        values,
        normaliser if hidden is None else hidden,
        normaliser if beside is None else (beside * LOG2E).contiguous(),
        normaliser if turn is None else turn,
        (normaliser,) * 3 if summary is None else (summary.keys, summary.values, summary.counts),
        *near,
        output,
        normaliser,
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        near[1].stride(1),
        heads,
        count,
        used,
        seen,
        before,
        *factors(scaling, softcap),
        GROUP=heads // keys.shape[1],
        KEYS=keys.shape[-1],
        KEY_WIDTH=width_of(keys),
        VALUES=values.shape[-1],
        VALUE_WIDTH=width_of(values),
        ROWS=rows,
        BLOCK=block,
        STAGES=stages,
        CAPPED=softcap is not None,
        HIDES=hidden is not None,
        BESIDE=beside is not None,
        SUMMARY=summary is not None,
        TURN=turn is not None,
        num_warps=warps,
        **sizes,
    )
    return output.transpose(1, 2), normaliser


def parts_of(fine, unused):
    """Tensors (vectors and places in one), numbers and sizes that kernels take of `Fine`; of None, any tensor."""
    if fine is None:
        return ((unused,) * 3, unused, unused), (0, 0), dict(NEWEST=0, SINKS=0, PADDED=False)
    padded = isinstance(fine.first, torch.Tensor)
    tensors = fine.keys, fine.values, fine.places
    return (
        (tensors, fine.positions, fine.first if padded else fine.places),
        (fine.seen, fine.rows),
        dict(NEWEST=fine.newest, SINKS=fine.sinks, PADDED=padded),
    )


def factors(scaling, softcap):
    """Of products, and of what is capped: either way logits come out to base 2."""
    return (scaling * LOG2E, 1.0) if softcap is None else (scaling / softcap, softcap * LOG2E)


def width_of(vectors):
    return max(16, power(vectors.shape[-1]))


def tiles(query, other, rows=64):
    """Queries and slots of a tile, stages and warps: what fits in the memory of a multiprocessor; rows: queries, of narrow
    vectors."""
    row = max(width_of(query), width_of(other)) * query.element_size()  # bytes of a vector
    if row <= 128:
        return rows, 64, 3, 4
    if row <= 256:
        return 128, 64, 2, 8
    return (64, 64, 1, 4) if row <= 512 else (32, 32, 1, 4)
