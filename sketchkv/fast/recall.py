"""A decode step with an index in C (`recall.c`): one call stores the new token, ranks, fetches and attends."""

import ctypes
from pathlib import Path

import torch

from sketchkv.fast.cpu import NUMBER, POINTER, REAL, flat, places, view_of
from sketchkv.index import CENTRE_BITS, POOLINGS, KeyIndex
from sketchkv.slots import MOST_TOKENS
from sketchkv.store import PAGE, FolderStore, HostStore

SOURCE = Path(__file__).with_name("recall.c")
_VECTORS = POINTER, NUMBER, NUMBER  # and their strides
_TAKEN = (POINTER, POINTER, *[NUMBER] * 4, *_VECTORS * 3, REAL, POINTER, NUMBER, *[POINTER] * 3)


class _Index(ctypes.Structure):
    """`Index` of recall.c."""

    _fields_ = [
        *((f"centre_{part}", POINTER) for part in ("codes", "scales", "levels", "bounds")),
        *((name, POINTER) for name in ("signature", "factor", "levels")),
        *((name, POINTER) for name in ("pages", "table", "asked", "unattended", "taken")),
        *((name, NUMBER) for name in ("room", "block", "width", "top", "window", "sinks", "pooling")),
    ]


def step(layer, query, key, value, tokens, form):
    """Attention of one new token, which is stored: parameters as of `RecallLayer.attend`. None, with nothing done, where C does
    not serve: half precision, other codecs, indexes or stores, logits that are capped, tokens before the codec settles."""
    slots, store, index = layer.slots, layer.store, layer.index
    if (
        query.dtype != torch.float32
        or tokens.until(slots.codec, layer.seen) < MOST_TOKENS
        or (form.softcap, form.sinks) != (None, None)
        or type(index) is not KeyIndex
        or type(store) not in (HostStore, FolderStore)
    ):
        return None
    view = view_of(layer, SOURCE, INDEX_BITS=index.bits, CENTRE_BITS=CENTRE_BITS, PAGE=PAGE)
    if view is None:
        return None
    store.reserve(layer.seen + 1)
    index.add(key, tokens.positions if tokens.padded else None)
    output, counted, (positions, first) = torch.empty(query.shape), (NUMBER * 2)(), places(tokens)
    vectors = [flat(x) for x in (query, key, value)]
    run = view.library.step
    run.argtypes = _TAKEN
    done = run(
        view.address,
        ctypes.byref(_known(layer)),
        *(layer.seen + 1, slots.used, index.coded, query.shape[1] // slots.shape[1]),
        *(number for x in vectors for number in (x.data_ptr(), x.stride(0), x.stride(1))),
        form.scaling,
        *(positions.data_ptr(), positions.stride(0) if positions.shape[0] > 1 else 0),
        None if first is None else first.data_ptr(),
        output.data_ptr(),
        counted,
    )
    if not done:
        raise MemoryError(
            f"no memory to rank {layer.seen} tokens: reset the cache, and give it shorter texts"
        )
    if slots.codec.ring:
        slots.codec.ring.passing = None
    slots.used = min(slots.used + 1, slots.capacity)
    layer.seen = store.tokens = layer.seen + 1
    chosen, missing = counted
    now = dict(written=slots.shape[0] * slots.shape[1] * layer.row, fetched=missing * store.record)
    now |= dict(chosen=chosen, missing=missing)
    layer.moved = {name: count + now.get(name, 0) for name, count in layer.moved.items()}
    return output


def _known(layer):
    """Index, store and what slots hold for both, where they are now."""
    index, store, arrays = layer.index, layer.store, layer.slots.arrays
    tensors = {name: index.arrays.get(name) for name in ("signature", "factor")}
    tensors |= {"centre_codes": index.arrays.get("centre"), "centre_scales": index.arrays.get("centre_scale")}
    tensors |= {"centre_levels": index.centres.levels, "levels": index.coder.levels}
    tensors |= {"pages": store.bytes, "table": store.table}
    tensors |= {name: arrays[name] for name in ("asked", "unattended")}
    tensors |= {"taken": layer.summary.taken} if layer.summary else {}
    return _Index(
        **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
        **dict(room=index.capacity, block=index.block, width=store.table.shape[1], top=index.top),
        **dict(window=layer.recent_window, sinks=layer.num_sinks, pooling=POOLINGS.index(index.pooling)),
    )
