"""A decode step over the slots as one fused Triton kernel: each key and value is read once.

The plan is FlashDecoding's (Dao et al. 2023): online softmax, and slots split over several programs where the batch alone
would not fill the chip. Beyond it, the kernel gives what eviction needs: the attention each slot received. That takes the
final normaliser, so logits (1/64 of the bytes of keys and values at head_dim 64 in 16 bits) wait in a scratch buffer.
"""

import math
import os

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the CPU builds of torch come without: importing works, only use is refused
    triton = None

    class tl:
        constexpr = float

    def jit(function=None, **_):
        return function or jit


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on the CPU, slowly, to check their arithmetic
LOG2E = 1.4426950408889634
MASKED = tl.constexpr(-3e38)  # finite, so that a row with every slot masked attends evenly, as torch's softmax does
PROGRAMS = 512  # enough to fill the chip: about 4 per multiprocessor
FEW_SLOTS, FEW_PROGRAMS = 2048, 160  # with few slots more programs gain less than they cost


def usable(device):
    """Whether the kernels can run on `device`: a GPU with triton, or Triton's interpreter."""
    return triton is not None and (device.type == "cuda" or INTERPRETED)


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
def _receive(scratch, received, slot, slot_stride, used, scratch_stride, group, top, total, decay,
             GROUP: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """received = decay * received + attention of the group's query heads, for `slot` [n]; top, total: [heads]."""
    inside = (group[:, None] < GROUP) & (slot[None, :] < used)
    logits = tl.load(
        scratch + group[:, None] * scratch_stride + slot[None, :], mask=inside, other=-float("inf"), cache_modifier=".cg"
    )  # fmt: skip
    attention = tl.sum(tl.exp2(logits - top[:, None]) / total[:, None], 0)
    address = received + slot * slot_stride
    if ADD:
        attention += decay * tl.load(address, mask=slot < used, other=0.0)
    tl.store(address, attention, mask=slot < used)


@jit(do_not_specialize=["used", "per_split"])
def _attend(
    query, keys, values, positions, received, output, scratch, partial, tops, totals,
    q_batch, q_head, q_dim, k_batch, k_head, k_slot, k_dim, v_batch, v_head, v_slot, v_dim,
    p_batch, p_head, p_slot, r_batch, r_head, r_slot, scratch_stride,
    kv_heads, used, per_split, scale, decay,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, MASK: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """One program: one KV head of one sequence, slots [split * per_split, (split + 1) * per_split)."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    batch, head = row // kv_heads, row % kv_heads
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
            _receive(scratch, received, slot, r_slot, used, scratch_stride, group, top, total, decay, GROUP, ADD)
    else:
        part = (row * GROUP + group) * SPLITS + split
        tl.store(partial + part[:, None] * HEAD_DIM + column[None, :], sums, mask=inside)
        tl.store(tops + part, top, mask=group < GROUP)
        tl.store(totals + part, total, mask=group < GROUP)


@jit(do_not_specialize=["used"])
def _combine(
    received, output, scratch, partial, tops, totals, r_batch, r_head, r_slot, scratch_stride, kv_heads, used, decay,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, PARTS: tl.constexpr, ADD: tl.constexpr, FINISH: tl.constexpr,
):  # fmt: skip
    """Second pass over split slots. One program: FINISH slots of one KV head; the first adds up the output instead."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    received += row // kv_heads * r_batch + row % kv_heads * r_head
    group = tl.arange(0, GROUPS)
    split = tl.arange(0, PARTS)
    part = (row * GROUP + group[:, None]) * SPLITS + split[None, :]
    inside = (group[:, None] < GROUP) & (split[None, :] < SPLITS)
    part_top = tl.load(tops + part, mask=inside, other=MASKED)
    part_total = tl.load(totals + part, mask=inside, other=0.0)
    top = tl.max(part_top, 1)
    total = tl.sum(part_total * tl.exp2(part_top - top[:, None]), 1)
    total = tl.where(group < GROUP, total, 1.0)
    scratch += row * GROUP * scratch_stride
    if block > 0:  # the output waits for nothing that these do
        slot = (block - 1) * FINISH + tl.arange(0, FINISH)
        _receive(scratch, received, slot, r_slot, used, scratch_stride, group, top, total, decay, GROUP, ADD)
    else:
        column = tl.arange(0, WIDTH)
        written = (group[:, None] < GROUP) & (column[None, :] < HEAD_DIM)
        sums = tl.zeros([GROUPS, WIDTH], tl.float32)
        for index in range(SPLITS):
            of_split = (row * GROUP + group) * SPLITS + index
            share = tl.exp2(tl.load(tops + of_split, mask=group < GROUP, other=MASKED) - top)
            address = partial + of_split[:, None] * HEAD_DIM + column[None, :]
            sums += share[:, None] * tl.load(address, mask=written, other=0.0)
        target = output + (row * GROUP + group[:, None]) * HEAD_DIM + column[None, :]
        tl.store(target, (sums / total[:, None]).to(output.dtype.element_ty), mask=written)


@jit
def _index(a, b, item, row, WIDTH: tl.constexpr):
    """`CarterWegmanHash` of `item`: (a x + b) mod p mod width, p = 2^31 - 1 by folding the high bits onto the low ones."""
    # Factors known to fit in 32 bits cost one multiplication, not four; so does what is left after the first folding.
    product = tl.load(a + row).to(tl.uint32).to(tl.uint64) * item.to(tl.uint32).to(tl.uint64)
    product += tl.load(b + row).to(tl.uint32).to(tl.uint64)
    value = (product & 0x7FFFFFFF).to(tl.uint32) + (product >> 31).to(tl.uint32)
    value = (value & 0x7FFFFFFF) + (value >> 31)
    value = tl.where(value >= 0x7FFFFFFF, value - 0x7FFFFFFF, value)
    return value.to(tl.int32) % WIDTH


@jit(do_not_specialize=["elapsed"])
def _remember(
    items, mass, positions, tables, exposures, scores, a, b, seen,
    s_batch, s_head, kv_heads, used, elapsed, fade, decay, log_decay,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """One program: the sketches of one KV head of one sequence. Decay, add, then ask."""
    row = tl.program_id(0).to(tl.int64)
    offset = row // kv_heads * s_batch + row % kv_heads * s_head
    tables += row * DEPTH * WIDTH
    exposures += row * DEPTH * WIDTH
    for begin in range(0, DEPTH * WIDTH, CELLS):
        cell = begin + tl.arange(0, CELLS)
        inside = cell < DEPTH * WIDTH
        tl.store(tables + cell, tl.load(tables + cell, mask=inside, cache_modifier=".cg") * fade, mask=inside)
        if MEAN:
            tl.store(exposures + cell, tl.load(exposures + cell, mask=inside, cache_modifier=".cg") * fade, mask=inside)
    tl.debug_barrier()  # what follows was stored by other threads
    now = tl.load(seen)
    for begin in range(0, used, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < used
        item = tl.load(items + offset + slot, mask=inside, other=0).to(tl.int64)
        item = tl.where(item == 0x7FFFFFFF, 0, item)
        received = tl.load(mass + offset + slot, mask=inside, other=0.0)
        tl.store(mass + offset + slot, tl.zeros([BLOCK], tl.float32), mask=inside)
        position = tl.load(positions + offset + slot, mask=inside, other=-1)
        age = tl.minimum(now - position, elapsed).to(tl.float32)
        if MEAN:
            exposed = age
            if decay != 1.0:
                exposed = (1.0 - tl.exp2(age * log_decay)) / (1.0 - decay)
        for i in tl.static_range(DEPTH):
            index = i * WIDTH + _index(a, b, item, i, WIDTH)
            tl.atomic_add(tables + index, received, mask=inside & (received != 0.0), sem="relaxed")
            if MEAN:
                tl.atomic_add(exposures + index, exposed, mask=inside & (position >= 0), sem="relaxed")
    tl.debug_barrier()
    for begin in range(0, used, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        inside = slot < used
        item = tl.load(items + offset + slot, mask=inside, other=0).to(tl.int64)
        item = tl.where(item == 0x7FFFFFFF, 0, item)
        position = tl.load(positions + offset + slot, mask=inside, other=-1)
        age = (now - position).to(tl.float32)
        estimate = tl.full([BLOCK], float("inf"), tl.float32)
        exposed = tl.full([BLOCK], float("inf"), tl.float32)
        for i in tl.static_range(DEPTH):
            index = i * WIDTH + _index(a, b, item, i, WIDTH)
            estimate = tl.minimum(estimate, tl.load(tables + index, mask=inside, other=0.0, cache_modifier=".cg"))
            if MEAN:
                exposed = tl.minimum(exposed, tl.load(exposures + index, mask=inside, other=0.0, cache_modifier=".cg"))
        if MEAN:
            least = age
            if decay != 1.0:
                least = (1.0 - tl.exp2(age * log_decay)) / (1.0 - decay)
            estimate = estimate / tl.maximum(exposed, least / 2)
        tl.store(scores + row * used + slot, estimate, mask=inside)


@jit(do_not_specialize=["slot"])
def _append(
    key, value, position, keys, values, positions, n_batch, n_head, v_batch, v_head, s_batch, s_head, s_slot, w_batch, w_head,
    w_slot, p_batch, p_head, slot, kv_heads, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: the new token of one KV head of one sequence."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    column = tl.arange(0, WIDTH)
    inside = column < HEAD_DIM
    new_key = tl.load(key + batch * n_batch + head * n_head + column, mask=inside)
    new_value = tl.load(value + batch * v_batch + head * v_head + column, mask=inside)
    tl.store(keys + batch * s_batch + head * s_head + slot * s_slot + column, new_key, mask=inside)
    tl.store(values + batch * w_batch + head * w_head + slot * w_slot + column, new_value, mask=inside)
    tl.store(positions + batch * p_batch + head * p_head + slot, tl.load(position))


def append(key, value, position, keys, values, positions, slot):
    """Stores one new token in slot `slot` (int) of all heads, in one launch.

    key, value: `[batch, num_kv_heads, 1, head_dim]`; position: int32 `[1]`; keys, values: `[batch, num_kv_heads, capacity,
    head_dim]` of the same dtypes; positions: int32 `[batch, num_kv_heads, capacity]`.
    """
    batch, kv_heads, _, head_dim = key.shape
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    _append[(batch * kv_heads,)](
        key, value, position, keys, values, positions, *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3],
        *values.stride()[:3], *positions.stride()[:2], slot, kv_heads,
        HEAD_DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip


@jit(do_not_specialize=["used"])
def _lowest(
    scores, positions, seen, chosen, nan, c_batch, c_head, p_batch, p_head, kv_heads, used, num_sinks, recent_window,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one KV head of one sequence. COUNT times the least of what is left."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // kv_heads, row % kv_heads
    slot = tl.arange(0, BLOCK)
    inside = slot < used
    score = tl.load(scores + batch * c_batch + head * c_head + slot, mask=inside, other=0.0)
    position = tl.load(positions + batch * p_batch + head * p_head + slot, mask=inside, other=0)
    now = tl.load(seen) + 1
    protected = (position < num_sinks) | (position >= now - recent_window)
    broken = tl.max(((score != score) & (protected == 0)).to(tl.int32), 0)
    tl.store(nan, True, mask=broken > 0)
    score = tl.minimum(tl.maximum(score, -1e30), 1e30) + 0.0
    score = tl.where(protected, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats fall as their bits rise
    rank = (bits.to(tl.int64) << 32) + position
    rank = tl.where(inside, rank, 0x7FFFFFFFFFFFFFFF)
    for index in range(COUNT):
        least = tl.min(rank, 0)
        found = rank == least
        tl.store(chosen + row * COUNT + index, tl.max(tl.where(found, slot, -1), 0))
        rank = tl.where(found, 0x7FFFFFFFFFFFFFFF, rank)


MOST_SLOTS, MOST_CHOSEN = 4096, 64  # that one program of `lowest` holds, and goes through one by one


def lowest(importance, positions, seen, count, num_sinks, recent_window, nan):
    """The slots of the `count` lowest (importance, position) but sinks and recent window: int32
    `[batch, num_kv_heads, count]`, as `sketchkv.ops.Eager` chooses where no token is padding.

    importance: float32, positions: int32 `[batch, num_kv_heads, used]`, contiguous in the slots, at most `MOST_SLOTS`; seen:
    int32 `[1]`, the newest token's position; count: at most `MOST_CHOSEN`. nan: bool `[]`, set if an importance is NaN.
    """
    batch, kv_heads, used = importance.shape
    chosen = torch.empty(batch, kv_heads, count, dtype=torch.int32, device=importance.device)
    _lowest[(batch * kv_heads,)](
        importance, positions, seen, chosen, nan, *importance.stride()[:2], *positions.stride()[:2], kv_heads, used, num_sinks,
        recent_window, COUNT=count, BLOCK=triton.next_power_of_2(used), num_warps=4,
    )  # fmt: skip
    return chosen


@jit(do_not_specialize=["kept"])
def _compact(
    array, evicted, a_batch, a_head, a_slot, kv_heads, kept, blank,
    COUNT: tl.constexpr, SIZE: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
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


def compact_slots(array, evicted, kept, blank=None):
    """`Slots.evict` for one array, `[batch, num_kv_heads, capacity, ...]` with contiguous last dimensions: survivors of the slots
    from `kept` on move into the holes that the slots `evicted` (int32, `[batch, num_kv_heads, n]`, contiguous) leave below;
    those n last slots then hold `blank`, or what they held if it is None."""
    batch, kv_heads, count = evicted.shape
    inner = array.shape[3:].numel()
    _compact[(batch * kv_heads,)](
        array, evicted, *array.stride()[:3], kv_heads, kept, blank or 0, COUNT=count, SIZE=triton.next_power_of_2(count),
        INNER=inner, WIDTH=triton.next_power_of_2(inner), CLEAR=blank is not None, num_warps=1 if inner == 1 else 4,
    )  # fmt: skip


@jit(do_not_specialize=["start", "count"])
def _codes(
    keys, projection, items, k_batch, k_head, k_slot, i_batch, i_head, kv_heads, start, count,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK new keys of one KV head of one sequence. Their signs along BITS directions, as one number."""
    row = tl.program_id(0).to(tl.int64)
    keys += row // kv_heads * k_batch + row % kv_heads * k_head
    items += row // kv_heads * i_batch + row % kv_heads * i_head
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot, column, bit = start + index, tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    inside = index < count
    key = tl.load(keys + slot[:, None] * k_slot + column[None, :], mask=inside[:, None] & (column[None, :] < HEAD_DIM), other=0.0)
    along = (column[:, None] < HEAD_DIM) & (bit[None, :] < BITS)
    directions = tl.load(projection + column[:, None] * BITS + bit[None, :], mask=along, other=0.0)
    signs = tl.dot(key.to(tl.float32), directions, input_precision="ieee") > 0
    tl.store(items + slot, tl.sum(tl.where(signs, 1 << bit[None, :], 0), 1), mask=inside)


def codes(keys, projection, items, start, count):
    """`SimHash` of the keys in the slots `start` to `start + count`, into the same slots of `items`: one launch.

    keys: `[batch, num_kv_heads, capacity, head_dim]`, last dimension contiguous; projection: float32 `[head_dim, bits]`,
    contiguous; items: int32 `[batch, num_kv_heads, capacity]`.
    """
    batch, kv_heads, _, head_dim = keys.shape
    bits = projection.shape[1]
    _codes[(batch * kv_heads, triton.cdiv(count, 16))](
        keys, projection, items, *keys.stride()[:3], *items.stride()[:2], kv_heads, start, count, HEAD_DIM=head_dim,
        WIDTH=max(16, triton.next_power_of_2(head_dim)), BITS=bits, COLUMNS=max(16, triton.next_power_of_2(bits)), BLOCK=16,
    )  # fmt: skip


def remember(items, mass, positions, sketches, seen, elapsed, decay):
    """What `policies.Sketch` does at an eviction, in one kernel: the sketches fade by decay^elapsed, take in `mass` (and, in
    the second sketch if there is one, exposure), and are asked; returns importance, float32 `[batch, num_kv_heads, used]`.

    items, positions: int32, mass: float32 `[batch, num_kv_heads, used]`, views of like strides, contiguous in the slots;
    mass is set to zero. sketches: one or two `CountMinSketch` with float32 counters and the same hash functions. seen: a
    number, or int32 `[1]` on the device. NaN in `mass` gives NaN.
    """
    batch, kv_heads, used = items.shape
    first = sketches[0]
    depth, width = first.table.shape[-2:]
    if not isinstance(seen, torch.Tensor):
        seen = torch.full((1,), seen, dtype=torch.int32, device=items.device)
    scores = torch.empty(batch, kv_heads, used, dtype=torch.float32, device=items.device)
    _remember[(batch * kv_heads,)](
        items, mass, positions, first.table, sketches[-1].table, scores, first.hash.a, first.hash.b, seen,
        *items.stride()[:2], kv_heads, used, elapsed, decay**elapsed, decay, math.log2(decay),
        DEPTH=depth, WIDTH=width, MEAN=len(sketches) > 1, BLOCK=min(128, triton.next_power_of_2(used)), CELLS=1024,
    )  # fmt: skip
    return scores


def attend(query, keys, values, scaling, positions=None, received=None, decay=1.0, **tuning):
    """Attention of one new query per sequence over the slots: `(output, received)`.

    query: `[batch, num_heads, head_dim]`; keys, values: `[batch, num_kv_heads, used, head_dim]`, views with any strides,
    float16, bfloat16 or float32; num_heads a multiple of num_kv_heads. scaling: factor of the logits. positions: integer
    `[batch, num_kv_heads, used]`, slots below 0 are not looked at; None: look at all.

    output: `[batch, num_heads, head_dim]`, the query's dtype. received: float32 `[batch, num_kv_heads, used]`, the
    attention of each KV head's query heads summed. If a tensor `received` is given, it becomes
    `decay * received + attention` in place and is returned. tuning: `block`, `splits`, `num_warps`, `num_stages`.

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
    groups = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    width = max(16, triton.next_power_of_2(head_dim))
    rows = batch * kv_heads
    block = tuning.get("block", 32 if width > 64 or group == 1 and rows > 128 else 64)
    # Putting splits together costs as much as 300 slots do. A power of two: what is a constant of the compiled kernel must
    # take few values while the slots fill.
    wanted = PROGRAMS // rows if used > FEW_SLOTS else FEW_PROGRAMS // rows if used >= 512 else 1
    splits = tuning.get("splits") or 1 << max(1, min(wanted, used // 64)).bit_length() - 1
    per_split = triton.cdiv(triton.cdiv(used, splits), block) * block
    device = query.device
    output = torch.empty(batch, heads, head_dim, dtype=query.dtype, device=device)
    add = received is not None
    if not add:
        received = torch.empty(slots, dtype=torch.float32, device=device)
    stride = triton.cdiv(used, 16) * 16  # rows that begin at a multiple of 64 bytes
    scratch = torch.empty(rows * group, stride, dtype=torch.float32, device=device)
    partial = tops = totals = scratch
    if splits > 1:
        partial = torch.empty(rows * group, splits, head_dim, dtype=torch.float32, device=device)
        tops, totals = torch.empty(2, rows * group, splits, dtype=torch.float32, device=device)
    mask = positions is not None
    positions = positions if mask else received
    finish = 1024 if group == 1 else 128
    shape = dict(GROUP=group, GROUPS=groups, HEAD_DIM=head_dim, WIDTH=width, SPLITS=splits, ADD=add, FINISH=finish)
    _attend[(rows, splits)](
        query, keys, values, positions, received, output, scratch, partial, tops, totals,
        *query.stride(), *keys.stride(), *values.stride(), *positions.stride(), *received.stride(), stride,
        kv_heads, used, per_split, scaling * LOG2E, decay, **shape,
        BLOCK=block, STAGES=tuning.get("num_stages", 3), MASK=mask, num_warps=tuning.get("num_warps", 4),
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, 1 + triton.cdiv(used, finish))](
            received, output, scratch, partial, tops, totals, *received.stride(), stride, kv_heads, used, decay,
            **shape, PARTS=triton.next_power_of_2(splits), num_warps=4,
        )  # fmt: skip
    return output, received
