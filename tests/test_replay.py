"""Layers through which a pass is replayed give what they give when each runs as it is.

On a GPU it is replayed from CUDA graphs; on a CPU, what would be recorded runs again.
"""

import gc
from unittest import mock

import pytest
import torch
from test_kernels import DEVICE
from transformers import LlamaConfig, LlamaForCausalLM

import sketchkv
from sketchkv import AttentionMass, Sketch, SketchCache, Summary, Window
from sketchkv.fast import replay
from sketchkv.ops import Eager
from sketchkv.quantize import quantized

LENGTHS = 150, 70, 1
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
SETTINGS = {
    "sketch": {},
    "sketch of tokens": {"policy": Sketch(key="token")},
    "mass": {"policy": AttentionMass()},
    "window": {"policy": Window()},
    "codes": {"bits": (5, 4), "summary": Summary(), "policy": AttentionMass(value_norm=True)},
    "ring": {"codec": quantized((5, 4), 8, 4), "summary": Summary(), "policy": AttentionMass()},
    "last tokens at home": {"prefill_chunk": 43},  # of 75 slots, 64 after the first eviction
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=5, vocab_size=97)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval().requires_grad_(False).to(DEVICE)
    for parameter in model.parameters():
        parameter.mul_(3)
    return sketchkv.enable(model)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """No test profits from another's passes."""
    monkeypatch.setattr(replay, "_several", set())


def again(run):
    """`replay.captured` where there are no graphs."""
    output = run()
    return mock.Mock(replay=lambda: output.copy_(run())), output


def through(self, layer, query, *given):
    """`Eager.through` where layers are replayed."""
    way = replay.attend if query.shape[2] > 1 else type(layer).attend
    return way(layer, query, *given)


def read(model, cache, replayed, mask=None, lengths=LENGTHS):
    """[logits of a random text, what each layer hands on, state of each layer], and how many recordings were made."""
    ids = torch.randint(1, 97, (2, sum(lengths)), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found, projections, stop = [], [layer.self_attn.o_proj for layer in model.model.layers], 0
    hooks = [each.register_forward_pre_hook(lambda _, given: found.append(given[0])) for each in projections]
    captured = mock.Mock(side_effect=again if DEVICE == "cpu" else replay.captured)
    with (
        mock.patch.object(replay, "captured", captured),
        mock.patch.object(replay, "suits", replay.suits if replayed else lambda *_: False),
        mock.patch.object(Eager, "through", through if replayed and DEVICE == "cpu" else Eager.through),
        mock.patch.object(torch, "empty_like", torch.clone if DEVICE == "cpu" else torch.empty_like),
    ):
        for length in lengths:
            part, stop = slice(stop, stop + length), stop + length
            padding = {} if mask is None else {"attention_mask": mask[:, :stop]}
            found.append(model(ids[:, part], past_key_values=cache, **padding).logits)
    for hook in hooks:
        hook.remove()
    for layer in cache.layers:
        assert not layer.waiting and layer.slots is layer.home
        found += [torch.tensor(replay._counts(layer)), *replay._tensors(layer)]
    return [x.clone() for x in found], captured.call_count


def agree(model, make, **given):
    """The number of recordings."""
    expected, none = read(model, make(), False, **given)
    got, made = read(model, make(), True, **given)
    assert none == 0 and len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        # Sums of the sketch come in any order on a GPU.
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    return made


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_layers_replayed_equal_layers_run(model, setting, padded):
    mask = torch.ones(2, sum(LENGTHS), dtype=torch.int64, device=DEVICE)
    mask[1, :23] = 0
    settings = {"prefill_chunk": 60, **SETTINGS[setting]}
    made = agree(model, lambda: SketchCache(model.config, 64, **settings), mask=mask if padded else None)
    assert made == 2  # for each of the two passes of many tokens


def test_each_kind_of_layer_is_recorded_for_itself(model):
    caps, policies = [64, 64, 48, 48, 64], [Sketch(), Sketch(), Sketch(), Sketch(), AttentionMass()]
    made = agree(model, lambda: SketchCache(model.config, caps, policy=policies, prefill_chunk=60))
    assert made == 4


def test_a_cache_that_was_reset_reads_again(model):
    cache = SketchCache(model.config, 64, prefill_chunk=60)
    first, _ = read(model, cache, True)
    cache.reset()
    second, _ = read(model, cache, True)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@on_gpu
def test_recordings_end_with_their_pass(model):
    cache, made = SketchCache(model.config, 64, prefill_chunk=60), []
    captured = replay.captured
    with mock.patch.object(replay, "captured", lambda run: made.append(1) or captured(run)):
        model(torch.ones(1, 150, dtype=torch.int64, device=DEVICE), past_key_values=cache)
    gc.collect()
    assert made and not len(replay._passes)


@on_gpu
def test_generated_tokens_are_the_same(model):
    ids = torch.randint(1, 97, (2, 200), device=DEVICE)
    told = []
    for replayed in (True, False):
        cache = SketchCache.compact(model.config, 64, prefill_chunk=60)
        with mock.patch.object(replay, "suits", replay.suits if replayed else lambda *_: False):
            told.append(model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False))
    assert torch.equal(*told)


@on_gpu
def test_an_error_while_a_pass_is_recorded(model):
    cache = SketchCache(model.config, 64, prefill_chunk=60)
    expected, _ = read(model, SketchCache(model.config, 64, prefill_chunk=60), True)
    with mock.patch.object(replay.BoundedLayer, "reset", side_effect=MemoryError), pytest.raises(MemoryError):
        read(model, cache, True)
    cache.reset()
    for one, other in zip(read(model, cache, True)[0], expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
