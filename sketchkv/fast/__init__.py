"""The same decode steps in less time: fused operations on a GPU, C on a CPU, steps recorded as CUDA graphs, and torch.compile.

Nothing outside imports this folder but `sketchkv.devices`, `generate(graph=True)`, `generate(compile=True)` and, for a cache
that is compileable, `model.generate`.
"""

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

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


def compiled_call(model, config=None):
    """In place of `model.get_compiled_call`: a function that `model.generate` calls for each token where its cache is
    compileable. Steps with a `SketchCache` are compiled and, on a GPU, recorded where they can be."""
    own: Any = type(model).get_compiled_call(model, config)
    steps: list = []

    def call(input_ids=None, past_key_values=None, position_ids=None, **given):
        cache = past_key_values
        if not isinstance(cache, SketchCache):
            return own(input_ids=input_ids, past_key_values=cache, position_ids=position_ids, **given)
        if not steps:
            padded = cache.passes.first is not None
            fixed = cache.recordable and all(layer.policy.recordable for layer in cache.layers)
            steps.append(step(model, cache, padded, input_ids.is_cuda and fixed and not padded, True))
        return CausalLMOutputWithPast(logits=steps[0](input_ids, None, position_ids), past_key_values=cache)

    return call
