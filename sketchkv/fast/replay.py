"""A prompt passes through many layers that are alike: what the device does in one of them is recorded as a CUDA graph, and replayed
in the others.

While texts are few and not long, Python and a dozen launches for each eviction cost the host several times what the kernels cost
the device. A graph writes where it was recorded, in a copy of a layer: what comes is copied there, and the layer's new state back.
Recordings last as long as the pass, so that a prompt needs none of its length before.
"""

from copy import deepcopy
from functools import lru_cache

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sketchkv.fast.launch import recording
from sketchkv.layer import BoundedLayer
from sketchkv.policies import AttentionMass, Window
from sketchkv.sketch_policy import Sketch

# Numbers in the queries of a pass: with more, it is the device that takes long, and copies would take memory.
MOST = 2**23
POLICIES = AttentionMass, Sketch, Window  # all state of which is in their tensors

_passes = WeakIdKeyDictionary()  # {positions of a pass: {kind of layer: its recording, None before}}
_several: set = set()  # kinds, but for the text, of which a pass brought several layers


def attend(layer, query, key, value, tokens, form):
    """`BoundedLayer.attend` of a layer that can be recorded. The second of a kind is, and the first if others will come; before
    that it runs as it is, which compiles kernels and fills tables."""
    recordings, like = _passes.setdefault(tokens.positions, {}), _kind(layer, query, form)
    kind = like, query.shape, _counts(layer)
    if kind not in recordings and like not in _several:
        recordings[kind] = None
        return layer.attend(query, key, value, tokens, form)
    if recordings.get(kind) is None:
        _several.add(like)
        recordings[kind] = Recording(layer, (query, key, value), tokens, form)
    return recordings[kind].replay(layer, query, key, value)


def suits(layer, query, form):
    """Whether such a pass through the layer can be recorded, and is worth it."""
    return (
        query.is_cuda
        and query.device.index == torch.cuda.current_device()
        and query.shape[2] > layer.evict_every
        and query.numel() <= MOST
        and layer.prefill_chunk is not None
        and type(layer) is BoundedLayer
        and type(layer.policy) in POLICIES
        and form.sinks is None
        and not torch.cuda.is_current_stream_capturing()
    )


def _kind(layer, query, form):
    """Layers of one kind do the same on the device, for the same text."""
    slots, codec = layer.slots, layer.slots.codec
    caps = layer.max_cache_size, layer.num_sinks, layer.recent_window, layer.evict_every, layer.prefill_chunk
    sizes = query.shape[1], query.dtype, query.device, slots.shape[1], slots.widths
    parts = layer.policy, layer.summary, codec, getattr(codec, "ring", None)
    return form, caps, sizes, str(getattr(codec, "bits", "")), *map(_numbers, parts)


def _numbers(thing):
    """What was asked for, of a policy and the like."""
    given = getattr(thing, "__dict__", {}).items()
    return type(thing), *((n, x) for n, x in given if isinstance(x, (int, float, str)) and n != "layer")


def _counts(layer):
    return layer.seen, layer.evicted, layer.slots.used, layer.slots.kept


def _count(layer, counts):
    layer.seen, layer.evicted, layer.slots.used, layer.slots.kept = counts


def _tensors(layer):
    """All that a pass changes on the device."""
    own = layer.summary.tensors() if layer.summary else ()
    return [x for x in (layer.nan, *layer.slots.tensors(), *layer.policy.tensors(), *own) if x.numel()]


def _bytes(tensors):
    """Alike in kind, so that one launch copies them."""
    return [x.view(torch.uint8) for x in tensors]


class Recording:
    """A pass through a copy of a layer, which has memory of its own."""

    def __init__(self, layer, given, tokens, form):
        self.given, begun = [torch.empty_like(x) for x in given], _counts(layer)
        memory = {id(x): torch.empty_like(x) for x in _tensors(layer)}
        self.layer = deepcopy(layer, memory | {id(layer.ops): layer.ops})

        def run():
            if begun[0] == 0:
                self.layer.reset()
            _count(self.layer, begun)
            return self.layer.attend(*self.given, tokens, form)

        self.graph, self.output = captured(run)
        self.counts, self.state = _counts(self.layer), _bytes(_tensors(self.layer))

    def replay(self, layer, *given):
        """What `layer.attend` gives and does."""
        state = _bytes(_tensors(layer))
        torch._foreach_copy_(self.given, given)
        if layer.seen:
            torch._foreach_copy_(self.state, state)
        self.graph.replay()
        torch._foreach_copy_(state, self.state)
        _count(layer, self.counts)
        layer.waiting = False
        # Side by side in memory, as the model wants the heads.
        return self.output.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def captured(run):
    """(a graph of what `run` does on the device, what `run` returned); nothing is done there yet."""
    with recording:
        keeper, side = _memory(torch.cuda.current_stream())
        return _captured(run, side, keeper.pool())


def _captured(run, side, pool=None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        graph.capture_begin(pool, "relaxed")
        try:
            output = run()
        finally:
            graph.capture_end()
    return graph, output


@lru_cache(None)
def _memory(stream):
    """Where recordings that are replayed on a stream, one after the other, keep what they need in between: a graph that does
    nothing of use keeps the memory from one pass to the next."""
    side = torch.cuda.Stream(stream.device)
    return _captured(lambda: torch.zeros(1, device=stream.device), side)[0], side
