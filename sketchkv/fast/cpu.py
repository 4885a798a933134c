"""The operations of a layer on a CPU: a decode step over coded slots in C (`cpu.c`), where there is a compiler.

Each method falls back on the eager rule where the C does not serve: several tokens at once, half precision, other codecs,
summaries or layers.
"""

import ctypes
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

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


class _Slots(ctypes.Structure):
    """`Slots` of cpu.c."""

    _fields_ = [
        *((f"{name}_{part}", POINTER) for name in _CODED for part in ("codes", "scales", "levels", "bounds")),
        *((name, POINTER) for name in ("positions", "centre", "turn", "back", "span")),
        *((name, POINTER) for name in ("means", "value_means", "counts", "mass")),
        *((name, NUMBER) for name in ("batch", "kv_heads", "capacity", "newest", "sinks")),
    ]


class Coded(Eager):
    """One call to code and store a token, one to attend and accumulate."""

    def turn(self, layer, query, key, value):
        """What the C takes, it turns itself."""
        return (query, key, value) if _view(layer, query) else super().turn(layer, query, key, value)

    def turn_back(self, layer, output):
        return output if _view(layer, output) else super().turn_back(layer, output)

    def append(self, layer, keys, values, tokens):
        view, slots = _view(layer, keys), layer.slots
        if view is None:
            return super().append(layer, keys, values, tokens)
        used, key, value, (positions, first) = slots.used, flat(keys), flat(values), places(tokens)
        view.append(
            used,
            *(key.data_ptr(), key.stride(0), key.stride(1)),
            *(value.data_ptr(), value.stride(0), value.stride(1)),
            *(positions.data_ptr(), positions.stride(0) if positions.shape[0] > 1 else 0),
            None if first is None else first.data_ptr(),
        )
        if slots.codec.ring:
            slots.codec.ring.passing = None
        slots.used = used + 1
        return slice(used, used + 1)

    def recalled(self, layer, query, key, value, tokens, form):
        """A whole step of a `RecallLayer`, parameters as of its `attend`; None: C does not serve."""
        from sketchkv.fast.recall import step

        return step(layer, query, key, value, tokens, form)

    def attend(self, layer, query, tokens, form):
        view, slots, policy = _view(layer, query), layer.slots, layer.policy
        if view is None:
            return super().attend(layer, query, tokens, form)
        if form.softcap is not None or form.sinks is not None:
            codec = slots.codec
            return codec.turn_back(super().attend(layer, codec.turn(query, query, query)[0], tokens, form))
        # A subclass that observes in its own way is asked to.
        accumulates = type(policy).observe is AttentionMass.observe and view.tensors["mass"] is not None
        received = None
        if policy.uses_attention and not accumulates:
            received = query.new_empty(*slots.shape, 1, slots.used)
        given, positions = flat(query), tokens.positions.int().contiguous() if tokens.padded else None
        output = torch.empty(query.shape, dtype=query.dtype)
        done = view.attend(
            slots.used,
            query.shape[1] // slots.shape[1],
            *(given.data_ptr(), given.stride(0), given.stride(1)),
            form.scaling,
            None if positions is None else positions.data_ptr(),
            policy.decay if accumulates else -1.0,
            None if received is None else received.data_ptr(),
            output.data_ptr(),
        )
        if not done:
            raise MemoryError(f"no memory for the scores of {slots.used} slots: lower max_cache_size")
        if received is not None:
            policy.observe(slots, received)
        return output


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
        self._append, self._attend = compiled.append, compiled.attend
        strides = POINTER, NUMBER, NUMBER
        self._append.argtypes = (POINTER, NUMBER, *strides, *strides, POINTER, NUMBER, POINTER)
        self._append.restype = None
        self._attend.argtypes = (POINTER, NUMBER, NUMBER, *strides, REAL, POINTER, REAL, POINTER, POINTER)

    def append(self, *given):
        self._append(self.address, *given)

    def attend(self, *given):
        return self._attend(self.address, *given)

    def holds(self, layer):
        """Whether the layer still has these tensors, and such a policy."""
        own, summary = layer.slots.arrays, layer.summary
        same = all(own.get(name) is array for name, array in self.arrays.items())
        return same and (summary and summary.keys) is self.summary and type(layer.policy) is self.policy


# Of slots: a copy of them gets its own.
_views: weakref.WeakKeyDictionary[Any, View] = weakref.WeakKeyDictionary()


def _view(layer, vectors):
    """The `View` of a layer, for one new token of which `vectors` `[batch, heads, 1, width]` are; None: C does not serve."""
    if vectors.shape[2] != 1 or vectors.dtype != torch.float32 or layer.selective:
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
    return tokens.positions.int(), first.int().contiguous() if isinstance(first, torch.Tensor) else None


def flat(x):
    """Vectors whose numbers lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
