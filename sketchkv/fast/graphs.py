"""Decode steps recorded as CUDA graphs: what Python and hundreds of launches cost is paid once, not per token.

A bounded cache makes it possible: once it evicts, its tensors keep their addresses and a step depends on the text's length
through one number alone, the position, which the device counts itself. A step differs from the next by how many slots are
occupied, so there is one graph for each of the `evict_every` phases between two evictions, and no mask.
"""

import torch

from sketchkv.fast import kernels
from sketchkv.fast.ops import fused
from sketchkv.passes import Tokens


class StepGraphs:
    """Decode steps of `model` with `cache`, a `SketchCache`: `graphs(token)` returns the logits.

    The first steps run as they are, until the cache has evicted and each phase has run once; a phase is recorded when it
    comes round again, and replayed from then on. Recordings stay valid after `cache.reset()`, for texts without padding.
    On a CPU nothing is recorded: the same steps run one by one. compiled: the model's `CompiledStep`, to be recorded instead of
    the model as it is. Raises ValueError for a policy or cache that is not `recordable`.
    """

    def __init__(self, model, cache, compiled=None):
        refused = [type(layer.policy).__name__ for layer in cache.layers if not layer.policy.recordable]
        if refused:
            raise ValueError(
                f"steps with this {refused[0]} cannot be recorded, since it draws or counts outside the device (random scores, "
                "8-bit counters): decode with graph=False"
            )
        if not getattr(cache, "recordable", True):
            raise ValueError(f"a {type(cache).__name__} decides on the host while it decodes: decode with graph=False")
        self.model, self.cache, self.compiled = model, cache, compiled
        self.warm, self.graphs = set(), {}
        self.clock = self.expected = self.slots = None

    @torch.no_grad()
    def __call__(self, token):
        """Logits `[batch, vocabulary]` after `token` (int64 `[batch, 1]`), valid until the next call."""
        layers = self.cache.layers
        if self.slots != [id(layer.slots) for layer in layers]:  # another batch size: other memory
            self.slots = [id(layer.slots) for layer in layers]
            self.warm, self.graphs, self.expected = set(), {}, None
            self.clock, self.token = torch.empty(1, dtype=torch.int32, device=token.device), token.clone()
        seen = self.cache.seen_tokens
        if self.expected != seen:  # the device counts for itself, except after other calls
            if self.cache.passes.first is not None:
                raise ValueError("recorded steps take texts without padding: decode this batch with graph=False")
            self.clock.fill_(seen)
        self.expected = seen + 1
        self.token.copy_(token)
        # Layers go in step: all have seen the same tokens and, each at its own cap, evict equally often.
        settled = all(layer.evicted and seen >= layer.slots.codec.settles_after for layer in layers)
        phase = layers[0].slots.used - layers[0].max_cache_size if settled else None
        if phase is None or phase not in self.warm or not token.is_cuda:
            self.warm.add(phase)
            return self._step()
        if phase in self.graphs:
            with self.cache.passes.announced(Tokens(self.token, self.clock[None]), self):
                for layer in layers:
                    layer.advance()
        else:
            self.graphs[phase] = self._record()
        graph, logits = self.graphs[phase]
        graph.replay()
        return logits

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
            if kernels.usable(self.token.device):
                for layer in layers:
                    layer.ops = fused
            try:
                if self.compiled:
                    logits = self.compiled(self.token, self.cache, positions)
                else:
                    logits = self.model(self.token, past_key_values=self.cache, use_cache=True, position_ids=positions).logits
            finally:
                for layer in layers:
                    vars(layer).pop("ops", None)
        self.clock += 1
        return logits[:, -1]
