"""The operations of a layer on a CPU: prompts and steps over coded slots in C (`cpu.c`), where there is a compiler.

Each method falls back on the eager rule where the C does not serve: half precision, other codecs, summaries or layers.
"""

import ctypes
import math
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sketchkv.checks import checked_scores
from sketchkv.fast.native import library
from sketchkv.layer import BoundedLayer
from sketchkv.ops import Eager
from sketchkv.policies import AttentionMass, Policy
from sketchkv.quantize import Normal, Quantized, matrix
from sketchkv.summary import Summary
from sketchkv.tail import Tail

SOURCE = Path(__file__).with_name("cpu.c")
POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_CODED = ("keys", "values", "rest_keys", "rest_values")
TOGETHER = 256  # tokens of a prompt for which the slots are read once


class _Slots(ctypes.Structure):
    """`Slots` of cpu.c."""

    _fields_ = [
        *((f"{name}_{part}", POINTER) for name in _CODED for part in ("codes", "scales", "levels", "bounds")),
        *((name, POINTER) for name in ("positions", "centre", "turn", "back", "span")),
        *((name, POINTER) for name in ("means", "value_means", "counts", "mass")),
        *((name, NUMBER) for name in ("batch", "kv_heads", "capacity", "newest", "sinks")),
    ]


class _New(ctypes.Structure):
    """`New` of cpu.c."""

    _fields_ = [
        *((name, POINTER) for name in ("key", "value", "query", "position", "first")),
        *((f"{name}_{of}", NUMBER) for name in "kvq" for of in ("batch", "head", "token")),
        *((name, NUMBER) for name in ("p_batch", "count", "several")),
    ]


class _Form(ctypes.Structure):
    """`Form` of cpu.c."""

    _fields_ = [("scaling", REAL), ("softcap", REAL), ("sinks", POINTER)]


class _Array(ctypes.Structure):
    """`Array` of leave.c."""

    _fields_ = [("data", POINTER), ("size", NUMBER), ("empty", NUMBER)]


class Coded(Eager):
    """One call to code and store new tokens, one to attend and accumulate, one to evict."""

    def turn(self, layer, query, key, value):
        """What the C takes, it turns itself."""
        return (query, key, value) if _view(layer, query) else super().turn(layer, query, key, value)

    def turn_back(self, layer, output):
        return output if _view(layer, output) else super().turn_back(layer, output)

    def append(self, layer, keys, values, tokens):
        view, slots = _view(layer, keys), layer.slots
        if view is None:
            return super().append(layer, keys, values, tokens)
        slots.coming = flat(keys), flat(values), *places(tokens)
        view.append(_new(None, *slots.coming, several=keys.shape[2] > 1), slots.used)
        if slots.codec.ring:
            slots.codec.ring.passing = None
        slots.used += keys.shape[2]
        return slice(slots.used - keys.shape[2], slots.used)

    def recalled(self, layer, query, key, value, tokens, form):
        """A whole step of a `RecallLayer`, parameters as of its `attend`; None: C does not serve."""
        from sketchkv.fast.recall import step

        return step(layer, query, key, value, tokens, form)

    def attend(self, layer, query, tokens, form):
        view, slots, policy = _view(layer, query), layer.slots, layer.policy
        if view is None:
            return super().attend(layer, query, tokens, form)
        # A subclass that observes in its own way is asked to.
        accumulates = type(policy).observe is AttentionMass.observe and view.tensors["mass"] is not None
        sinks = None if form.sinks is None else form.sinks.float().contiguous()
        form = _Form(form.scaling, form.softcap or 0, None if sinks is None else sinks.data_ptr())
        (key, value, positions, first), slots.coming = slots.coming, None
        query, outputs, before = flat(query), [], slots.used - query.shape[2]
        for start in range(0, query.shape[2], TOGETHER):
            part = slice(start, start + TOGETHER)
            new = *(x[:, :, part] for x in (query, key, value)), positions[:, part], first
            output, received = query.new_empty(new[0].shape), None
            slots.used = before + start + output.shape[2]
            if policy.uses_attention and not accumulates:
                received = query.new_empty(*slots.shape, output.shape[2], slots.used)
            done = view.attend(
                _new(*new, several=query.shape[2] > 1),
                ctypes.byref(form),
                slots.used,
                query.shape[1] // slots.shape[1],
                tokens.padded,
                policy.decay if accumulates else -1.0,
                None if received is None else received.data_ptr(),
                output.data_ptr(),
            )
            if not done:
                raise MemoryError(f"no memory for the scores of {slots.used} slots: lower max_cache_size")
            if received is not None:
                policy.observe(slots, received)
            outputs.append(output)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def evict(self, layer, tokens):
        slots, summary = layer.slots, layer.summary
        view = view_of(layer, SOURCE) if not layer.selective and tokens.clock is None else None
        hooked = getattr(layer.on_evict, "__func__", None) is not BoundedLayer.on_evict
        if view is None or hooked or (summary and (summary.protects or type(summary) is not Summary)):
            return super().evict(layer, tokens)
        importance = (
            checked_scores(self.score(layer, tokens), layer).to(slots.device, torch.float32).contiguous()
        )
        first = places(tokens)[1]
        failed = view.evict(
            importance.data_ptr(),
            slots.used,
            slots.used - layer.max_cache_size,
            None if first is None else first.data_ptr(),
            layer.num_sinks,
            layer.seen - layer.recent_window,
        )
        if failed == 2:
            raise MemoryError(f"no memory for the ranks of {slots.used} slots: lower max_cache_size")
        layer.nan.logical_or_(torch.tensor(failed == 1))
        self.look(layer, tokens)
        slots.used = slots.kept = layer.max_cache_size

    def score(self, layer, tokens):
        policy, slots = layer.policy, layer.slots
        weighted = type(policy).score is AttentionMass.score and policy.value_norm
        view = view_of(layer, SOURCE) if weighted and not layer.selective else None
        if view is None:
            return super().score(layer, tokens)
        norms = torch.empty(*slots.shape, slots.used)
        view.norms(slots.used, norms.data_ptr())
        return policy.received(slots, tokens.end(layer)) * norms


coded = Coded()
coded.suits = True


class View:
    """The slots of a layer as C sees them. It holds the tensors whose memory it knows, and nothing of what they belong to."""

    def __init__(self, layer, compiled):
        slots, codec, summary, ring = layer.slots, layer.slots.codec, layer.summary, layer.slots.codec.ring
        tensors: dict[str, Any] = {}
        for name in ("keys", "values"):
            coder = codec.coders[name]
            parts = slots.arrays[name], slots.arrays[f"{name}_scale"], coder.levels, coder.bounds
            rests: tuple = (None,) * 4
            if ring:
                rests = *ring.parts[name], ring.coders[name].levels, ring.coders[name].bounds
            for prefix, found in (name, parts), (f"rest_{name}", rests):
                tensors |= zip(
                    (f"{prefix}_{p}" for p in ("codes", "scales", "levels", "bounds")), found, strict=True
                )
        turn, back = _rotation(codec.rotations["keys"])
        tensors |= {"positions": slots.positions, "centre": codec.centre, "turn": turn, "back": back}
        mass = slots.arrays.get("mass")
        mass = mass if mass is not None and mass.dtype == torch.float32 else None
        tensors |= {"span": ring.span if ring else None, "mass": mass}
        if summary:
            tensors |= {"means": summary.keys, "value_means": summary.values, "counts": summary.counts}
        self.tensors, self.arrays = tensors, dict(slots.arrays)
        self.summary, self.policy = summary and summary.keys, type(layer.policy)
        sizes = dict(batch=slots.shape[0], kv_heads=slots.shape[1], capacity=slots.capacity)
        sizes |= dict(newest=ring.newest if ring else 0, sinks=ring.sinks if ring else 0)
        self.slots = _Slots(**{name: x.data_ptr() for name, x in tensors.items() if x is not None}, **sizes)
        self.address, self.library = ctypes.addressof(self.slots), compiled
        filled = {name: -1 if name in slots.kv else 255 if name == "positions" else 0 for name in self.arrays}
        moved = [
            _Array(array.data_ptr(), math.prod(array.shape[3:]) * array.element_size(), filled[name])
            for name, array in self.arrays.items()
        ]
        self.moved = (_Array * len(moved))(*moved)
        self._evict = compiled.evict
        self._evict.argtypes = POINTER, POINTER, NUMBER, NUMBER, POINTER, NUMBER, NUMBER, POINTER, NUMBER
        self._append, self._attend, self._norms = compiled.append, compiled.attend, compiled.norms
        self._norms.argtypes, self._norms.restype = (POINTER, NUMBER, POINTER), None
        self._append.argtypes, self._append.restype = (POINTER, POINTER, NUMBER), None
        numbers = NUMBER, NUMBER, ctypes.c_int, REAL
        self._attend.argtypes = (POINTER, POINTER, POINTER, *numbers, POINTER, POINTER)

    def append(self, *given):
        self._append(self.address, *given)

    def attend(self, *given):
        return self._attend(self.address, *given)

    def evict(self, *given):
        return self._evict(self.address, *given, self.moved, len(self.moved))

    def norms(self, *given):
        self._norms(self.address, *given)

    def holds(self, layer):
        """Whether the layer still has these tensors, and such a policy."""
        own, summary = layer.slots.arrays, layer.summary
        same = all(own.get(name) is array for name, array in self.arrays.items())
        return same and (summary and summary.keys) is self.summary and type(layer.policy) is self.policy


# Of slots: a copy of them gets its own.
_views: weakref.WeakKeyDictionary[Any, View] = weakref.WeakKeyDictionary()


def _view(layer, vectors):
    """The `View` of a layer, for new tokens of which `vectors` `[batch, heads, n, width]` are; None: C does not serve."""
    if vectors.dtype != torch.float32 or layer.selective:
        return None
    return view_of(layer, SOURCE)


def view_of(layer, source, **constants):
    """The `View` of a layer for C of the file `source`, with more `constants`; None: C does not serve."""
    slots = layer.slots
    view = _views.get(slots)
    if view is None or not view.holds(layer):
        compiled = _compiled(source, slots, **constants) if _is_coded(layer) else None
        if compiled is None:
            return None
        view = View(layer, compiled)
        if not all(array.is_contiguous() for array in view.arrays.values()):  # someone put others there
            return None
        _views[slots] = view
    return view


def _is_coded(layer):
    """Whether the rule of cpu.c is the layer's, but for slots that are left out: one summary slot at most."""
    slots, codec, summary = layer.slots, layer.slots.codec, layer.summary
    return (
        type(codec) is Quantized
        and all(type(coder) is Normal for coder in codec.all_coders())
        and slots.dtype == torch.float32
        and slots.device.type == "cpu"
        and slots.widths[0] == slots.widths[1]
        and (
            summary is None
            or (type(summary) in (Summary, Tail) and summary.count == 1 and not summary.spread)
        )
        and type(layer).hide is BoundedLayer.hide
        and type(layer.policy).query is Policy.query
    )


def _compiled(source, slots, **constants):
    """The library of a C file for such slots, or None."""
    codec = slots.codec
    bits = {"KEY_BITS": codec.bits["keys"], "VALUE_BITS": codec.bits["values"], "REST_BITS": codec.finer or 4}
    return library(source, DIM=slots.widths[0], **bits, **constants)


@lru_cache
def _rotation(rotation):
    turn = matrix(rotation, torch.float32).contiguous()
    return turn, turn.T.contiguous()


def places(tokens):
    """Positions of new tokens, int32 `[batch or 1, n]`, and of the first real ones, int32, None for 0 in all rows."""
    first = tokens.first
    return flat(tokens.positions.int()), first.int().contiguous() if isinstance(first, torch.Tensor) else None


def _new(query, key, value, positions, first, *, several):
    """`New` of vectors `[batch, heads, n, width]`, query or None; it knows where the tensors lie, and does not hold them.
    several: whether the n tokens, or more of which they are a part, came at once."""
    vectors = [x for x in (key, value, query) if x is not None]
    new = _New(
        *(x.data_ptr() for x in vectors), position=positions.data_ptr(), count=key.shape[2], several=several
    )
    for name, x in zip("kvq", vectors):
        for dim, of in enumerate(("batch", "head", "token")):
            setattr(new, f"{name}_{of}", x.stride(dim))
    new.first = None if first is None else first.data_ptr()
    new.p_batch = positions.stride(0) if positions.shape[0] > 1 else 0
    return ctypes.byref(new)


def flat(x):
    """The same, its numbers side by side along the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
