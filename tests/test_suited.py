"""Which operations a layer takes by itself: fused ones on a GPU, in the plain `model(...)` of transformers."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from conftest import build, interpreted, named
from test_kernels import DEVICE, HAS_TRITON, INTERPRET, runs

import sketchkv
from sketchkv import SketchCache, Summary, Window, devices, ops
from sketchkv.fast.ops import Fused, fused

CACHES = [
    dict(),
    dict(policy=Window(), attend_topk=18),
    dict(summary=Summary(2)),
    dict(bits=(5, 4), summary=Summary()),
    dict(prefill_chunk=12, bits=(5, 4)),
]


@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it exists for Linux)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="the tests below run in this very process")
def test_with_the_interpreter():
    interpreted(__file__)


def logits(model, ids, cache):
    parts = [ids[:, :30], *ids[:, 30:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@runs
@pytest.mark.parametrize("settings", CACHES, ids=named)
def test_a_gpu_takes_fused_operations_by_itself(settings):
    model = sketchkv.enable(build("llama")).to(DEVICE)
    ids = torch.randint(1, 97, (1, 36) if INTERPRET else (2, 42), device=DEVICE)
    caches = [
        SketchCache(model.config, 24, num_sinks=2, recent_window=4, evict_every=4, **settings) for _ in "ab"
    ]
    for layer in caches[1].layers:
        layer.ops = ops.Eager()
    with mock.patch.object(devices, "_fuses", lambda device: True):
        found, expected = (logits(model, ids, cache) for cache in caches)
    assert all(layer.ops is fused for layer in caches[0].layers)
    assert not any(isinstance(layer.ops, Fused) for layer in caches[1].layers)
    assert caches[0].evicted_tokens == caches[1].evicted_tokens > 0
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: shared memory is what wide heads lack")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("preset", ["compact", "recall"])
def test_wide_heads_on_a_gpu(preset, head_dim, dtype):
    """Gemma's heads have 256 numbers: what is multiplied by a rotation must fit, or the eager rule serves."""
    model = sketchkv.enable(build("llama", head_dim=head_dim)).to(DEVICE, dtype)
    ids = torch.randint(1, 97, (2, 260), device=DEVICE)
    own = dict(top=40) if preset == "recall" else {}
    caches = [getattr(SketchCache, preset)(model.config, 128, **own) for _ in "ab"]
    for layer in caches[1].layers:
        layer.ops = ops.Eager()
    parts = [ids[:, :200], *ids[:, 200:].split(1, 1)]
    with mock.patch.object(devices, "_fuses", lambda device: True):
        found, expected = (
            torch.cat([model(part, past_key_values=cache).logits for part in parts], 1) for cache in caches
        )
    assert all(layer.ops is fused for layer in caches[0].layers)
    assert caches[0].evicted_tokens == caches[1].evicted_tokens > 0
    # What rounds otherwise may choose otherwise: in 16 bits these sharpened weights leave a likeness.
    if dtype == torch.float32:
        assert ((found - expected).abs().amax(-1) > 1e-2).float().mean() < 0.05
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]).float())[0, 1] > 0.8


@runs
def test_a_policy_that_scores_nonsense_is_refused():
    class Wrong(Window):
        def score(self, slots, seen):
            return super().score(slots, seen)[..., :-1]

    model = sketchkv.enable(build("llama")).to(DEVICE)
    with (
        mock.patch.object(devices, "_fuses", lambda device: True),
        pytest.raises(ValueError, match="one number per"),
    ):
        cache = SketchCache(model.config, 24, num_sinks=2, recent_window=4, evict_every=4, policy=Wrong())
        logits(model, torch.randint(1, 97, (2, 42), device=DEVICE), cache)


def test_the_right_one_is_chosen_again_for_another_device():
    with mock.patch.object(devices, "_fuses", lambda device: device.type == "cuda"):
        assert devices.suited(fused, torch.device("cpu")) is ops.unset
        assert devices.suited(ops.unset, torch.device("cuda")) is fused
        assert devices.suited(ops.eager, torch.device("cuda")) is ops.eager
        own = ops.Eager()
        assert devices.suited(own, torch.device("cuda")) is own


def test_a_cpu_loads_no_fused_operations():
    code = (
        "import sys, torch, sketchkv; from conftest import build; model = sketchkv.enable(build('llama'));"
        "model(torch.ones(1, 40, dtype=torch.int64), past_key_values=sketchkv.SketchCache(model.config, 24, "
        "recent_window=4)); assert not [name for name in sys.modules if name.startswith('sketchkv.fast')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rsplit("/", 1)[0])
