"""Decode steps recorded as CUDA graphs: what Python and hundreds of launches cost is paid once, not per token.

A bounded cache makes it possible: its tensors keep their addresses, and a step depends on the text's length through numbers
that the device counts itself: the position, and how many slots are occupied. So one recording serves every step without an
eviction, from the first one after a prompt, and one more the steps that evict. A layer whose policy watches attention in a way
of its own runs operations whose shapes are the number of slots: its steps are recorded once it evicts, one recording for each
of the `evict_every` phases between two evictions.
"""

from typing import Any

import torch

from sketchkv.fast.launch import usable
from sketchkv.fast.ops import Fused, grows
from sketchkv.fast.recalled import ready
from sketchkv.passes import Tokens
from sketchkv.recall import RecallLayer


class StepGraphs:
    """Decode steps of `model` with `cache`, a `SketchCache`: `graphs(token)` returns the logits.

    A kind of step runs as it is when it first comes, is recorded when it comes again, and replayed from then on. Recordings
    stay valid after `cache.reset()`, for texts without padding. On a CPU nothing is recorded: the same steps run one by one.
    compiled: the model's `CompiledStep`, to be recorded instead of the model as it is. Raises ValueError for a policy or cache
    that is not `recordable`.
    """

    # Tensors of the device and what they were made for; None until the first step.
    clock: Any
    filled: Any
    expected: Any
    slots: Any

    def __init__(self, model, cache, compiled=None):
        refused = [type(layer.policy).__name__ for layer in cache.layers if not layer.policy.recordable]
        if refused:
            raise ValueError(
                f"steps with this {refused[0]} cannot be recorded, since it draws or counts outside the device (random scores, "
                "8-bit counters): decode with graph=False"
            )
        if not getattr(cache, "recordable", True):
            raise ValueError(
                f"a {type(cache).__name__} decides on the host while it decodes: decode with graph=False"
            )
        self.model, self.cache, self.compiled = model, cache, compiled
        self.warm, self.graphs = set(), {}
        self.clock = self.filled = self.expected = self.slots = None

    @torch.no_grad()
    def __call__(self, token):
        """Logits `[batch, vocabulary]` after `token` (int64 `[batch, 1]`), valid until the next call."""
        layers = self.cache.layers
        if not layers[0].is_initialized:
            return self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1]
        if self.slots != [id(layer.slots) for layer in layers]:  # another batch size: other memory
            self.slots = [id(layer.slots) for layer in layers]
            self.warm, self.graphs, self.expected = set(), {}, None
            self.clock, self.token = torch.empty(1, dtype=torch.int32, device=token.device), token.clone()
            self.filled = torch.empty(len(layers), dtype=torch.int32, device=token.device)
            self.growing = [usable(token.device) and grows(layer) for layer in layers]
        seen = self.cache.seen_tokens
        if self.expected != seen:  # the device counts for itself, except after other calls
            if self.cache.passes.first is not None:
                raise ValueError(
                    "recorded steps take texts without padding: decode this batch with graph=False"
                )
            self.clock.fill_(seen)
            self.filled.copy_(torch.tensor([layer.slots.used for layer in layers]))
        self.expected = seen + 1
        self.token.copy_(token)
        kind = self._kind()
        if kind is None or kind not in self.warm or not token.is_cuda:
            self.warm.add(kind)
            return self._step()
        if kind in self.graphs:
            with self.cache.passes.announced(Tokens(self.token, self.clock[None]), self):
                for layer in layers:
                    layer.advance()
        else:
            self.graphs[kind] = self._record()
        graph, logits = self.graphs[kind]
        graph.replay()
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
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._step()
        torch._C._cuda_clearCublasWorkspaces()
        return graph, logits

    def _step(self):
        layers, positions = self.cache.layers, self.clock.long().expand(len(self.token), 1)
        with self.cache.passes.announced(Tokens(self.token, self.clock[None], clock=self.clock), self):
            evicting, own = [layer.slots.room == 1 for layer in layers], [layer.ops for layer in layers]
            if usable(self.token.device):
                for layer, filled, growing, evicts in zip(
                    layers, self.filled.split(1), self.growing, evicting, strict=True
                ):
                    layer.ops = Fused(filled if growing and not evicts else None)
            try:
                if self.compiled:
                    logits = self.compiled(self.token, self.cache, positions)
                else:
                    logits = self.model(
                        self.token, past_key_values=self.cache, use_cache=True, position_ids=positions
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
