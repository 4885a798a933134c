"""What a prompt leaves: it passes through slots as wide as itself, of which many are evicted at once. Here the others are
chosen, by one selection of the highest ranks, and moved into the steady slots in one launch."""

import torch

from sketchkv.fast.codes import bits_of, line_of, stored, vectors
from sketchkv.fast.eviction import ranked
from sketchkv.fast.launch import jit, kernel, pieces, power, tl
from sketchkv.slots import Slots

SHARE = 128  # slots that one program folds


@jit
def _copy(source, target, at, to, moved, fresh, blank, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of SIZE numbers: those that are `moved`, and `blank` ones where nothing is."""
    if SIZE == 1:
        tl.store(target + to, tl.load(source + at, mask=moved, other=blank), mask=fresh)
    elif SIZE > 1:
        column = tl.arange(0, WIDTH)
        inside = column[None, :] < SIZE
        row = tl.load(source + at[:, None] * SIZE + column[None, :], mask=moved[:, None] & inside, other=0)
        tl.store(target + to[:, None] * SIZE + column[None, :], row, mask=fresh[:, None] & inside)


@kernel("capacity", "room", "count")
def _move(
    index,
    sources,
    targets,
    capacity,
    room,
    count,
    CHOSEN: tl.constexpr,
    COUNT: tl.constexpr,
    SIZES: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK slots of one KV head of one sequence, the first `count` of which are moved."""
    line = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    moved, fresh = slot < count, slot < room
    at = slot.to(tl.int64)
    if CHOSEN:
        at = tl.load(index + line * count + slot, mask=moved, other=0)
    at, to = line * capacity + at, line * room + slot
    for each in tl.static_range(COUNT):  # positions come first
        empty = 0 if each else -1
        _copy(sources[each], targets[each], at, to, moved, fresh, empty, SIZES[each], WIDTHS[each])


def _bytes(array):
    return array.view(torch.uint8) if array.dtype == torch.bool else array


def move(slots, target, count, index=None):
    """Copies the slots `index` (int64 `[batch, num_kv_heads, count]`, contiguous), or the first `count`, to the first ones of
    `target`, other `Slots`, and empties the rest of these."""
    (batch, kv_heads), room = slots.shape, target.capacity
    names = sorted(target.arrays, key=lambda name: name != "positions")
    sources, targets = (tuple([_bytes(held.arrays[name]) for name in names]) for held in (slots, target))
    sizes = tuple([x.shape[3] if x.ndim == 4 else 1 for x in sources])
    _move[(batch * kv_heads, pieces(room, 32))](
        sources[0] if index is None else index,
        sources,
        targets,
        slots.capacity,
        room,
        count,
        CHOSEN=index is not None,
        COUNT=len(sizes),
        SIZES=sizes,
        WIDTHS=tuple([power(max(size, 1)) for size in sizes]),
        BLOCK=32,
        num_warps=4,
    )
    target.used = target.kept = count


def widened(slots, capacity):
    """`Slots.widened`, in one launch."""
    wide = Slots.__new__(Slots)
    wide.__dict__.update(slots.__dict__)
    wide.arrays = {
        name: x.new_empty(*slots.shape, capacity, *x.shape[3:]) for name, x in slots.arrays.items()
    }
    kept = slots.kept
    move(slots, wide, slots.used)
    wide.kept = kept
    return wide


@kernel("used", "end")
def _rank(
    scores,
    positions,
    first,
    nan,
    ranks,
    c_batch,
    c_head,
    p_head,
    kv_heads,
    used,
    end,
    num_sinks,
    recent_window,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK slots of one KV head of one sequence."""
    line = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < used
    score = tl.load(
        scores + line // kv_heads * c_batch + line % kv_heads * c_head + slot, mask=inside, other=0.0
    )
    position = tl.load(positions + line * p_head + slot, mask=inside, other=0)
    sinks_end = num_sinks
    if PADDED:
        sinks_end += tl.load(first + line // kv_heads)
    rank = ranked(score, position, sinks_end, end, recent_window, nan)
    tl.store(ranks + line * used + slot, rank, mask=inside)


def chosen(importance, slots, tokens, layer):
    """(ranks, indices) of the `max_cache_size` slots that stay, int64 `[batch, num_kv_heads, max_cache_size]`, as
    `sketchkv.ops.Eager` chooses.

    importance: float32 `[batch, num_kv_heads, used]`, contiguous in the slots; tokens: of the newest token.
    """
    batch, kv_heads, used = importance.shape
    ranks = torch.empty(batch, kv_heads, used, dtype=torch.int64, device=importance.device)
    padded = isinstance(tokens.first, torch.Tensor)
    _rank[(batch * kv_heads, pieces(used, 128))](
        importance,
        slots.positions,
        tokens.first if padded else slots.positions,
        layer.nan,
        ranks,
        *importance.stride()[:2],
        slots.capacity,
        kv_heads,
        used,
        layer.seen,
        layer.num_sinks,
        layer.recent_window,
        PADDED=padded,
        BLOCK=128,
        num_warps=4,
    )
    best = ranks.topk(layer.max_cache_size, sorted=False)
    return ranks, best.values, best.indices


@kernel("used", "kept")
def _fold(
    ranks,
    best,
    positions,
    keys,
    centre,
    values,
    sums,
    added,
    capacity,
    used,
    kept,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """One program: what SHARE slots of one KV head of one sequence add to the sums of what is evicted."""
    line = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column, many = tl.arange(0, DIM), tl.arange(0, 128)
    least = tl.full([128], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for at in range(0, kept, 128):
        least = tl.minimum(
            least, tl.load(best + line * kept + at + many, mask=at + many < kept, other=0x7FFFFFFFFFFFFFFF)
        )
    least = tl.min(least, 0)
    middle = tl.load(centre + line * DIM + column).to(tl.float32)
    keys = line_of(keys, line, capacity, DIM, KEY_BITS)
    values = line_of(values, line, capacity, DIM, VALUE_BITS)
    key_sum, value_sum = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    count = 0.0
    for begin in range(part * SHARE, tl.minimum(part * SHARE + SHARE, used), 32):
        slot = begin + tl.arange(0, 32)
        inside = slot < used
        rank = tl.load(ranks + line * used + slot, mask=inside, other=0x7FFFFFFFFFFFFFFF)
        gone = (rank < least) & (tl.load(positions + line * capacity + slot, mask=inside, other=-1) >= 0)
        key = vectors(keys, slot, gone, DIM, KEY_BITS) + middle[None, :]
        value = vectors(values, slot, gone, DIM, VALUE_BITS)
        finite = (tl.abs(key) < float("inf")) & (tl.abs(value) < float("inf"))
        gone = gone & (tl.min(finite.to(tl.int32), 1) > 0)
        key_sum += tl.sum(tl.where(gone[:, None], key, 0.0), 0)
        value_sum += tl.sum(tl.where(gone[:, None], value, 0.0), 0)
        count += tl.sum(gone.to(tl.float32), 0)
    part += line * tl.num_programs(1)
    tl.store(sums + part * 2 * DIM + column, key_sum)
    tl.store(sums + part * 2 * DIM + DIM + column, value_sum)
    tl.store(added + part, count)


@kernel("parts")
def _mean(sums, added, means, value_means, counts, parts, DIM: tl.constexpr):
    """One program: the running means of one KV head of one sequence take in the sums."""
    line = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DIM)
    key, value = tl.zeros([DIM], tl.float32), tl.zeros([DIM], tl.float32)
    more = 0.0
    for part in range(parts):
        at = line * parts + part
        key += tl.load(sums + at * 2 * DIM + column)
        value += tl.load(sums + at * 2 * DIM + DIM + column)
        more += tl.load(added + at)
    count = tl.load(counts + line) + more
    mean = tl.load(means + line * DIM + column)
    tl.store(means + line * DIM + column, mean + (key - more * mean) / tl.maximum(count, 1.0))
    mean = tl.load(value_means + line * DIM + column)
    tl.store(value_means + line * DIM + column, mean + (value - more * mean) / tl.maximum(count, 1.0))
    tl.debug_barrier()  # all have read the count
    tl.store(counts + line, count)


def fold(summary, slots, ranks, best):
    """`Summary.fold`, into one slot, of all coded slots whose rank is below the best ones."""
    (batch, kv_heads), used, dim = slots.shape, slots.used, slots.widths[0]
    parts = pieces(used, SHARE)
    sums = torch.empty(batch, kv_heads, parts, 2 * dim, dtype=torch.float32, device=slots.device)
    added = torch.empty(batch, kv_heads, parts, dtype=torch.float32, device=slots.device)
    _fold[(batch * kv_heads, parts)](
        ranks,
        best,
        slots.positions,
        stored(slots, "keys"),
        slots.codec.centre,
        stored(slots, "values"),
        sums,
        added,
        slots.capacity,
        used,
        best.shape[-1],
        DIM=dim,
        **bits_of(slots),
        SHARE=SHARE,
        num_warps=4,
    )
    means = summary.keys, summary.values, summary.counts
    _mean[(batch * kv_heads,)](sums, added, *means, parts, DIM=dim, num_warps=2)
