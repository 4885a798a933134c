"""Decode steps recorded as CUDA graphs: what Python and hundreds of launches cost is paid once, not per token.

A bounded cache makes it possible: its tensors keep their addresses, and a step depends on the text's length through numbers
that the device counts itself: the position, and how many slots are occupied. So one recording serves every step without an
eviction, from the first one after a prompt, and one more the steps that evict. A layer whose policy watches attention in a way
of its own runs operations whose shapes are the number of slots: its steps are recorded once it evicts, one recording for each
of the `evict_every` phases between two evictions.
"""

import weakref
from typing import Any

import torch

from sketchkv.fast.launch import recording, usable
from sketchkv.fast.ops import Fused, grows
from sketchkv.fast.recalled import ready
from sketchkv.fast.recorded import Waits, pretended, state
from sketchkv.passes import Tokens
from sketchkv.recall import RecallLayer


class StepGraphs:
    """Decode steps of `model` with `cache`, a `SketchCache`: `graphs(token)` returns the logits.

    A kind of step runs as it is when it first comes, is recorded when it comes again, and replayed from then on. Recordings
    stay valid after `cache.reset()`, for texts without padding. On a CPU nothing is recorded: the same steps run one by one;
    so do those of a model that makes the host wait for the device.
    compiled: the model's `CompiledStep`, to be recorded instead of the model as it is. Raises ValueError for a policy that is
    not `recordable`.
    """

    # Tensors of the device, None until the first step.
    clock: Any
    filled: Any
    token: Any
    positions: Any

    def __init__(self, model, cache, compiled=None):
        refused = [type(layer.policy).__name__ for layer in cache.layers if not layer.policy.recordable]
        if refused:
            raise ValueError(
                f"steps with this {refused[0]} cannot be recorded, since it draws or counts outside the device (random scores): "
                "decode with graph=False"
            )
        self._model: Any = weakref.ref(model)  # recordings go with it, and with the cache
        self._cache: Any = weakref.ref(cache)
        self.state, self.compiled = state(model), compiled
        self.warm, self.graphs, self.waits = set(), {}, False
        self.slots: Any = []  # that steps were recorded for
        self.counts: Any = None  # tokens seen and stored, as the device knows them

    cache = property(lambda self: self._cache())

    def __reduce__(self):
        return type(None), ()  # a copy of a cache records for itself

    def serves(self, model, compiled):
        """Whether steps of `model`, as it is now, may be replayed."""
        return self._model() is model and self.compiled is compiled and self.state == state(model)

    @torch.no_grad()
    def __call__(self, token, positions=None):
        """Logits `[batch, vocabulary]` after `token` (int64 `[batch, 1]`), valid until the next call; positions: int64
        `[batch, 1]`, default the number of tokens seen."""
        cache, layers = self.cache, self.cache.layers
        if not layers[0].is_initialized:
            return self._model()(token, past_key_values=cache, use_cache=True).logits[:, -1]
        if len(self.slots) < len(layers) or any(
            held() is not layer.slots for held, layer in zip(self.slots, layers, strict=True)
        ):
            self._allocate(token)
        counts = [cache.seen_tokens, *cache.stored_tokens()]
        if self.counts != counts:  # the device counts for itself, except after other calls
            if cache.passes.first is not None:
                raise ValueError(
                    "recorded steps take texts without padding: decode this batch with graph=False"
                )
            self.clock.fill_(counts[0])
            self.filled.copy_(torch.tensor(counts[1:]))
        self.counts = None  # unknown, should this step break off
        self.token.copy_(token)
        self.positions.copy_(self.clock if positions is None else positions)
        kind = self._kind()
        with cache.passes.announced(Tokens(self.token, self.clock[None], clock=self.clock), self):
            logits = self._run(kind)
        self.counts = [cache.seen_tokens, *cache.stored_tokens()]
        return logits

    @torch.inference_mode(False)  # tensors that may be written to inside of it and outside
    def _allocate(self, token):
        """For other slots, those of another batch size: nothing that was recorded serves them."""
        layers, device = self.cache.layers, token.device
        self.slots = [weakref.ref(layer.slots) for layer in layers]
        self.warm, self.graphs, self.counts = set(), {}, None
        self.clock = torch.empty(1, dtype=torch.int32, device=device)
        self.filled = torch.empty(len(layers), dtype=torch.int32, device=device)
        self.token, self.positions = torch.empty(2, len(token), 1, dtype=torch.int64, device=device)
        self.growing = [usable(device) and layer.ops.suits and grows(layer) for layer in layers]

    def _run(self, kind):
        if kind is None or self.waits or not self.token.is_cuda:
            return self._step()
        if kind not in self.warm:
            self.warm.add(kind)
            return self._watched()
        if kind in self.graphs:
            for layer in self.cache.layers:
                layer.advance()
        else:
            self.graphs[kind] = self._record()
        graph, logits = self.graphs[kind]
        graph.replay()
        return logits

    def _watched(self):
        """A step as it is, which tells whether others like it can be recorded; what is compiled can."""
        if self.compiled:
            return self._step()
        with recording, pretended(), Waits() as waits:
            logits = self._step()
        self.waits |= waits.found
        return logits

    def _kind(self):
        """Steps of one kind are the same operations on the device; None for one that comes once in a text."""
        found = []
        for layer, growing in zip(self.cache.layers, self.growing, strict=True):
            slots, settles = layer.slots, layer.slots.codec.settles_after
            evicts = slots.room == 1
            steady = (not slots.room) if layer.is_sliding else layer.evicted > 0
            if layer.seen + 1 == settles or not (steady or growing and not evicts):
                return None
            own = ready(layer) if isinstance(layer, RecallLayer) else slots.used
            if own is None:
                return None
            found.append(None if growing and not evicts else own)
        return tuple(found)

    def _record(self):
        """Python's side of the step runs, and advances; the device's side is recorded."""
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values()))[0].pool() if self.graphs else None
        # Matrix products write to a workspace that torch keeps per stream. Taken over from an earlier graph, it would lie in
        # memory that is not ours, to be freed when torch.compile clears workspaces; so there is none when recording begins,
        # and none of ours is left for others when it ends.
        with recording:
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    logits = self._step()
            except Exception as error:
                error.add_note(
                    "This step was being recorded. model.generate(..., disable_compile=True), or graph=False of sketchkv.generate, "
                    "decodes without recordings; call cache.reset() first."
                )
                raise
            torch._C._cuda_clearCublasWorkspaces()
        return graph, logits

    def _step(self):
        layers = self.cache.layers
        evicting, own = [layer.slots.room == 1 for layer in layers], [layer.ops for layer in layers]
        if usable(self.token.device):
            for layer, filled, growing, evicts in zip(
                layers, self.filled.split(1), self.growing, evicting, strict=True
            ):
                if layer.ops.suits:
                    layer.ops = Fused(filled if growing and not evicts else None)
        try:
            if self.compiled:
                logits = self.compiled(self.token, self.cache, self.positions)
            else:
                logits = self._model()(
                    self.token, past_key_values=self.cache, use_cache=True, position_ids=self.positions
                ).logits
        finally:
            for layer, ops in zip(layers, own, strict=True):
                layer.ops = ops
        self.clock += 1
        self.filled += 1
        for filled, layer, evicts in zip(self.filled.split(1), layers, evicting, strict=True):
            if evicts:
                filled.fill_(layer.slots.used)
        return logits[:, -1]
