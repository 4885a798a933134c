"""The same decode steps in less time: fused operations on a GPU, C on a CPU, steps recorded as CUDA graphs, and torch.compile.

Nothing outside imports this folder but `sketchkv.devices`, `generate(graph=True)` and `generate(compile=True)`.
"""

from typing import Any

from sketchkv.cache import SketchCache


def step(model, cache, padded=False, graph=False, compile=False):
    """What runs one decode step: a function of (token, mask, positions) that returns logits `[batch, 1, vocabulary]`.

    Raises ValueError for a cache or padding that recorded or compiled steps can't take.
    """
    if compile and not isinstance(cache, SketchCache):
        raise ValueError(
            "compile=True takes a SketchCache: other caches grow, and the compiled step with them"
        )
    if graph and (padded or not isinstance(cache, SketchCache)):
        raise ValueError("graph=True takes a SketchCache and texts without padding")
    compiled: Any = None
    if compile:
        from sketchkv.fast.compiled import compiled_step

        compiled = compiled_step(model)
    if not graph:
        return lambda token, mask, positions: compiled(token, cache, positions)
    from sketchkv.fast.graphs import StepGraphs

    recordings = cache.recordings
    if recordings is None or recordings.model is not model or recordings.compiled is not compiled:
        recordings = cache.recordings = StepGraphs(model, cache, compiled)
    return lambda token, mask, positions: recordings(token)[:, None]
