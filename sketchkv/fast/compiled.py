"""The model's own part of a decode step through torch.compile, with the cache's part called from inside it as it is.

Compiled is what never changes: one token through the layers. It is given no cache, so nothing in it depends on how long the
text is or what was evicted, and it is compiled once for a model and a batch size, whatever the cache. Where attention comes,
the operation `sketchkv::attend` hands queries, keys and values to the `SketchCache` of the step under way.
"""

import threading
import types
import weakref
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.config import patch

from sketchkv.logits import Form
from sketchkv.switch import is_enabled

# On a CPU weights are packed into the blocks in which small products read them fastest, and Inductor's own products are
# taken instead of a library's: for one token, twice as fast. On CUDA the tiles of the fused kernels are tuned.
OPTIONS: dict[str, dict] = {
    "cpu": {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP"},
    "cuda": {"coordinate_descent_tuning": True},
}
_step = threading.local()  # .cache: the SketchCache of the compiled step that runs in this thread


@torch.library.custom_op("sketchkv::attend", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float,
    layer: int,
) -> torch.Tensor:
    cache = _step.cache
    with torch.autocast(query.device.type, enabled=False):  # a matter of the model's weights alone
        key, value = cache.update(key, value, layer)
        form = Form(scaling, None if softcap == 0 else softcap, sinks)
        output = cache.layers[layer].attend(query, key, value, cache.passes.tokens, form)
    return output.transpose(1, 2).contiguous()


@_attend.register_fake
def _(query, key, value, sinks, scaling, softcap, layer):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def attend(query, key, value, form, layer):
    """What a compiled step calls for attention: `[batch, 1, num_heads, width]` of `query`, `[batch, num_heads, 1, width]`,
    over the slots of `layer` and the new token."""
    value = value.to(query.dtype)  # under autocast only what was rotated is in float32
    return torch.ops.sketchkv.attend(query, key, value, form.sinks, form.scaling, form.softcap or 0.0, layer)


def _forward(model, token, positions):
    return model(
        token[:, None], position_ids=positions[:, None], use_cache=False, sketchkv_attend=attend
    ).logits


class CompiledStep:
    """A compiled decode step of an enabled `model`: `step(token, cache, positions)`.

    The first call for a batch size compiles, for seconds to a minute. On a CPU the compiled step holds a packed copy of the
    weights: after a change to them, take a new one (`compiled_step` does).
    """

    def __init__(self, model):
        self._model, self.weights = weakref.ref(model), _state(model)
        # A code object of its own: what torch.compile remembers, it remembers by code, and frozen weights are not looked at.
        own = types.FunctionType(_forward.__code__.replace(), _forward.__globals__)
        options = OPTIONS[model.device.type]
        self.freezing = options.get("freezing", False)
        self.run = torch.compile(own, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def __call__(self, token, cache, positions=None):
        """Logits `[batch, 1, vocabulary]` after `token` (int64 `[batch, 1]`), which `cache` takes in; positions: int64
        `[batch, 1]`, default the number of tokens seen. Raises RuntimeError if the step cannot be compiled."""
        positions = torch.full_like(token, cache.seen_tokens) if positions is None else positions
        model, before = self._model(), getattr(_step, "cache", None)
        _step.cache = cache
        try:
            # Flat: a stride that differs would compile the step again. Freezing is looked up globally, too.
            with cache.passes.announced(token, self), patch(freezing=self.freezing):
                return self.run(model, *(x.flatten().contiguous() for x in (token, positions)))
        except TorchDynamoException as error:
            raise RuntimeError(
                f"torch.compile could not compile a step of this {type(model).__name__} (on a CPU it needs a C++ compiler "
                f"such as g++, on CUDA triton): decode with compile=False. It said: {str(error).strip().splitlines()[0]}"
            ) from error
        finally:
            _step.cache = before


def _state(model):
    return [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]


def compiled_step(model):
    """The `CompiledStep` of an enabled model, made when it is first asked for and anew when the weights have changed since."""
    if not is_enabled(model):
        raise ValueError("compile=True needs sketchkv.enable(model) first")
    step = _steps.get(model)
    if step is None or step.weights != _state(model):
        step = _steps[model] = CompiledStep(model)
    return step


# By model, and dropped with it: a step refers to its model weakly.
_steps: weakref.WeakKeyDictionary[Any, CompiledStep] = weakref.WeakKeyDictionary()
