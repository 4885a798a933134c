"""The same decode steps in less time: fused operations on a GPU, C on a CPU, steps recorded as CUDA graphs, and torch.compile.

Nothing outside imports this folder but `sketchkv.devices`, `generate(graph=True)` and `generate(compile=True)`.
"""

from functools import lru_cache
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from sketchkv.cache import SketchCache
from sketchkv.support import counts_positions
from sketchkv.switch import inner_models

LOOK = 256  # tokens between two looks for NaN importance


def step(model, cache, padded=False, graph=False, compile=False):
    """What runs one decode step: a function of (token, mask, positions) that returns logits `[batch, 1, vocabulary]`.

    Raises ValueError for a cache, a model or padding that recorded or compiled steps can't take.
    """
    if compile and not isinstance(cache, SketchCache):
        raise ValueError(
            "compile=True takes a SketchCache: other caches grow, and the compiled step with them"
        )
    if graph and (padded or not isinstance(cache, SketchCache)):
        raise ValueError(
            "graph=True takes a SketchCache and texts without padding: leave it out"
            + (", or give texts of equal length" if padded else "")
        )
    top = inner_models(model)[0]
    if counts_positions(top):
        raise ValueError(
            f"steps of a {type(top).__name__}, which counts positions itself, can be neither compiled nor recorded: decode "
            "with compile=False and graph=False"
        )
    compiled: Any = None
    if compile:
        from sketchkv.fast.compiled import compiled_step

        compiled = compiled_step(model)
    if not graph:
        return lambda token, mask, positions: compiled(token, cache, positions)
    from sketchkv.fast.graphs import StepGraphs

    recordings = cache.recordings
    if recordings is None or not recordings.serves(model, compiled):
        recordings = cache.recordings = StepGraphs(model, cache, compiled)
    return lambda token, mask, positions: recordings(token, positions)[:, None]


def compiled_call(model, config=None):
    """In place of `model.get_compiled_call`: a function that `model.generate` calls for each token where steps are recorded or
    compiled. Steps with a `SketchCache` are recorded on a GPU where they can be, and compiled where a `CompileConfig` is given; all
    others run as they are, with caches of transformers as transformers has it."""
    theirs = lru_cache(lambda: type(model).get_compiled_call(model, config))

    @lru_cache(1)
    def ours(cache):
        from sketchkv.fast.recorded import records

        padded = cache.passes.first is not None
        recorded = not padded and records(model, cache)
        if not (recorded or config) or counts_positions(model):
            return None
        return step(model, cache, padded, recorded, config is not None)

    def call(**given):
        cache = given.get("past_key_values")
        if not isinstance(cache, SketchCache):
            return theirs()(**given)
        run = ours(cache) if _is_step(cache, **given) else None
        if run is None:
            return model(**given)
        if cache.seen_tokens % LOOK == 0:  # nothing that is recorded looks
            cache.check()
        logits = run(given["input_ids"], None, given["position_ids"])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return call


def _is_step(cache, input_ids=None, position_ids=None, past_key_values=None, attention_mask=None, **given):
    """Whether a pass brings one token to a text, and is asked for nothing but logits."""
    asked = {name for name, value in given.items() if value is not None and value is not False}
    return (
        cache.seen_tokens > 0
        and input_ids is not None
        and input_ids.shape[1] == 1
        and position_ids is not None
        and position_ids.shape == input_ids.shape
        and asked <= {"use_cache", "return_dict", "logits_to_keep"}
    )
