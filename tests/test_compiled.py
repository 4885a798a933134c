"""Compiled decode steps against the plain loop."""

import copy
import shutil
from unittest import mock

import pytest
import torch
from conftest import build
from transformers import CompileConfig

from sketchkv import H2O, Sketch, SketchCache, Summary, Window, disable, enable, generate
from sketchkv.fast.compiled import CompiledStep, compiled_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_compiler = pytest.mark.skipif(
    DEVICE == "cpu" and not shutil.which("g++"), reason="needs a C++ compiler"
)


def compilations():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def both(model, ids, new, cap=40, kind=SketchCache, graph=False, mask=None, **settings):
    caches = [kind(model.config, cap, **{"evict_every": 4} | settings) for _ in range(2)]
    expected = generate(model, ids, caches[0], new, attention_mask=mask)
    got = generate(model, ids, caches[1], new, attention_mask=mask, compile=True, graph=graph)
    assert torch.equal(got, expected)
    for layer in range(len(caches[0].layers)):
        kept = [cache.kept_positions(layer).sort(-1).values for cache in caches]
        assert torch.equal(*kept) and caches[0].evicted_tokens == caches[1].evicted_tokens > 0
    # The cache is whole afterwards: it goes on by itself.
    logits = [model(got[:, -1:], past_key_values=cache).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
    return caches[1]


@needs_compiler
def test_compiled_steps_give_the_same_tokens(gpt2, ids):
    """One compilation serves every cache: what is compiled knows none."""
    model, ids, before = gpt2.to(DEVICE), ids.to(DEVICE), compilations()
    for settings in (
        dict(),
        dict(policy=H2O()),
        dict(policy=Window()),
        dict(policy=Sketch(key="token")),
        dict(summary=Summary(2)),
        dict(bits=(5, 4)),
        dict(attend_topk=30),
        dict(cap=60, evict_every=7),
    ):
        both(model, ids[:, :50], 24, **settings)
    both(model, ids[:, :36], 24)  # begins before the first eviction
    both(model, ids[:, :50], 24, graph=True)
    assert compilations() == before + 1


@needs_compiler
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_rotary_positions_and_groups(architecture, ids):
    both(enable(build(architecture)).to(DEVICE), ids[:, :50].to(DEVICE), 24)


@needs_compiler
def test_padded_texts(gpt2, padding):
    ids, mask = (x.to(DEVICE) for x in padding)
    both(gpt2.to(DEVICE), ids[:, :60], 16, mask=mask[:, :60])


@needs_compiler
def test_autocast_is_of_the_models_weights(ids):
    """Their products are in 16 bits, what the cache holds and computes is as without."""
    model, ids = enable(build("llama")).to(DEVICE), ids[:, :50].to(DEVICE)
    logits, caches = [], [SketchCache.compact(model.config, max_cache_size=30) for _ in range(2)]
    for cache, halved in zip(caches, (False, True), strict=True):
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
            with torch.autocast(DEVICE, torch.float16, enabled=halved):
                for token in ids[:, 30:].split(1, 1):
                    found = compiled_step(model)(token, cache)
        logits.append(found.float())
        assert cache.evicted_tokens > 0 and {layer.slots.dtype for layer in cache.layers} == {torch.float32}
    apart = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert 0 < apart < 0.02


@needs_compiler
def test_changed_weights_are_compiled_anew(gpt2, ids):
    """Packed weights are a copy; a stale one would go unnoticed."""
    model, ids = gpt2.to(DEVICE), ids[:, :50].to(DEVICE)
    both(model, ids, 8)
    step = compiled_step(model)
    assert compiled_step(model) is step
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(-1)
    both(model, ids, 8)
    assert compiled_step(model) is not step
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight.mul_(-1)
    both(other, ids, 8)
    both(model, ids, 8)


@needs_compiler
def test_an_error_in_the_cache_comes_through_and_leaves_nothing_behind(gpt2, ids):
    model, ids = gpt2.to(DEVICE), ids.to(DEVICE)
    cache = SketchCache(model.config, 40)
    generate(model, ids[:, :50], cache, 4, compile=True)
    with pytest.raises(ValueError, match="batch of 2"):
        compiled_step(model)(ids[:1, :1], cache)
    cache.reset()
    assert torch.equal(
        generate(model, ids[:, :50], cache, 4, compile=True),
        generate(model, ids[:, :50], SketchCache(model.config, 40), 4),
    )


def test_what_cannot_be_compiled_is_refused(gpt2, ids):
    with pytest.raises(ValueError, match="takes a SketchCache"):
        generate(gpt2, ids, max_new_tokens=4, compile=True)
    with pytest.raises(ValueError, match="enable"):
        compiled_step(build("gpt2"))


def test_without_a_compiler_the_error_says_what_to_do(gpt2, ids, monkeypatch):
    def broken(*_):
        raise torch._dynamo.exc.TorchDynamoException("no working C++ compiler")

    monkeypatch.setattr(compiled_step(gpt2), "run", broken)
    cache = SketchCache(gpt2.config, 40)
    with pytest.raises(RuntimeError, match="compile=False.*no working C"):
        generate(gpt2, ids, cache, 4, compile=True)
    assert torch.equal(
        generate(gpt2, ids, SketchCache(gpt2.config, 40), 4),
        generate(gpt2, ids, SketchCache(gpt2.config, 40), 4),
    )


@needs_compiler
@pytest.mark.parametrize("padded", [False, True])
def test_model_generate_compiles_steps_where_it_is_asked_to(gpt2, ids, padding, padded):
    """The same tokens as without, though transformers compiles by itself only on a GPU; other caches go on as before."""
    ids, mask = padding if padded else (ids, torch.ones_like(ids))
    model, ids, mask = gpt2.to(DEVICE), ids[:, :60].to(DEVICE), mask[:, :60].to(DEVICE)
    config = CompileConfig()
    config._compile_all_devices = True
    own = dict(attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    caches = [SketchCache(model.config, 40, evict_every=4, bits=(5, 4)) for _ in range(2)]
    expected = model.generate(ids, past_key_values=caches[0], **own)
    with mock.patch.object(
        CompiledStep, "__call__", autospec=True, side_effect=CompiledStep.__call__
    ) as steps:
        got = model.generate(ids, past_key_values=caches[1], compile_config=config, **own)
    assert torch.equal(got, expected) and (steps.call_count == 19 or DEVICE == "cuda")
    assert caches[0].evicted_tokens == caches[1].evicted_tokens > 0
    assert not disable(copy.deepcopy(model)).get_compiled_call.__func__.__module__.startswith("sketchkv")
