"""The fused kernel against float64: on the GPU where there is one, else through Triton's interpreter."""

import copy
import importlib.util
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from conftest import build

import sketchkv
from sketchkv import LRU, TOVA, AttentionMass, H2O, Sketch, SketchCache, Window, kernels
from sketchkv.cache import SketchLayer
from sketchkv.sketches import SimHash

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not (INTERPRET and HAS_TRITON),
    reason="needs a GPU with triton; on a CPU test_with_the_interpreter runs these with TRITON_INTERPRET=1",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it exists for Linux)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="the tests below run in this very process")
def test_with_the_interpreter():
    # The interpreter must be chosen before triton is first imported, hence another process.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture(autouse=True, scope="module")
def interpreter_takes_numpy():
    """Triton's interpreter makes loop bounds of arrays with one element, which numpy 2.4 no longer converts."""
    if not (INTERPRET and HAS_TRITON):
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with mock.patch.object(interpreter, "_patch_lang_tensor", patched):
        yield


@pytest.fixture
def poisoned():
    """Memory that a kernel forgets to write is NaN."""

    def empty(*args, **kwargs):
        return torch.full(*_shape(args), float("nan"), **kwargs)

    with mock.patch.object(kernels.torch, "empty", empty):
        yield


def _shape(args):
    return [tuple(args[0]) if isinstance(args[0], (tuple, list)) else args]


def reference(query, keys, values, scaling, positions):
    """(output, attention received) in float64."""
    batch, kv_heads, used, head_dim = keys.shape
    query = query.double().view(batch, kv_heads, -1, head_dim)
    logits = query @ keys.double().transpose(-1, -2) * scaling
    if positions is not None:
        logits = logits.masked_fill(positions[:, :, None] < 0, torch.finfo(torch.float32).min)
    attention = logits.softmax(-1)
    return (attention @ values.double()).reshape(batch, -1, head_dim), attention.sum(2)


def assert_near(result, expected, dtype):
    assert result.isfinite().all()
    assert (result.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


def draw(batch, kv_heads, group, used, head_dim, dtype, capacity=None, holes=0.0):
    """Fresh random (query, keys, values, positions); keys and values are views of larger arrays, sharply attended."""
    normal = dict(dtype=torch.float32, device=DEVICE)
    capacity = capacity or used + 13
    query = torch.randn(batch, kv_heads * group, head_dim, **normal) * 2
    keys, values = torch.randn(2, batch, kv_heads, capacity, head_dim, **normal)
    keys[:, :, used:] = values[:, :, used:] = float("nan")  # beyond the occupied slots lies nothing of use
    positions = torch.arange(capacity, device=DEVICE, dtype=torch.int32).expand(batch, kv_heads, capacity).contiguous()
    positions[torch.rand(positions.shape, device=DEVICE) < holes] = -1
    query, keys, values = query.to(dtype), keys.to(dtype)[:, :, :used], values.to(dtype)[:, :, :used]
    return query, keys, values, positions[:, :, :used]


# batch, kv_heads, group, used, head_dim, splits (None: as many as the kernel likes)
SIZES = [
    (1, 1, 1, 1, 16, None),
    (1, 3, 1, 257, 64, None),
    (2, 2, 1, 100, 64, 1),
    (2, 2, 1, 333, 128, 3),
    (3, 1, 1, 129, 80, 2),
    (1, 2, 2, 257, 64, None),
    (2, 2, 2, 100, 16, 1),
    (2, 1, 4, 333, 64, 3),
    (1, 1, 4, 200, 128, 1),
    (1, 2, 3, 70, 48, None),
]


@runs
@pytest.mark.parametrize("dtype,holes", [(torch.float32, 0.4), (torch.float16, 0.4), (torch.bfloat16, 0.0)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attend_equals_float64(poisoned, size, dtype, holes):
    *shape, splits = size
    if INTERPRET and dtype == torch.bfloat16 and shape[2] > 1:
        pytest.skip("Triton 3.6's interpreter multiplies matrices of bfloat16 by their bits; float16 and GPUs check this")
    query, keys, values, positions = draw(*shape, dtype, holes=holes)
    positions = positions if holes else None
    scaling = query.shape[-1] ** -0.5
    output, received = kernels.attend(query, keys, values, scaling, positions, splits=splits)
    expected, attention = reference(query, keys, values, scaling, positions)
    assert output.dtype == dtype and received.dtype == torch.float32
    assert_near(output, expected, dtype)
    assert_near(received, attention, torch.float32)
    if holes and shape[3] > 1:
        assert (received[positions < 0] == 0).all()


@runs
@pytest.mark.parametrize("group,splits", [(1, 1), (1, 4), (2, 1), (4, 3)])
def test_received_is_updated_in_place(poisoned, group, splits):
    query, keys, values, positions = draw(2, 2, group, 190, 64, torch.float32, holes=0.2)
    held = torch.rand(2, 2, 224, device=DEVICE)
    before = held.clone()
    _, received = kernels.attend(query, keys, values, 0.1, positions, held[:, :, :190], decay=0.9, splits=splits)
    assert received.data_ptr() == held.data_ptr()
    _, attention = reference(query, keys, values, 0.1, positions)
    assert_near(received, 0.9 * before[:, :, :190] + attention, torch.float32)
    assert torch.equal(held[:, :, 190:], before[:, :, 190:])


@runs
@pytest.mark.parametrize("group,splits", [(1, 1), (1, 3), (2, 2)])
def test_a_row_of_padding_attends_evenly_and_extremes_stay_finite(poisoned, group, splits):
    query, keys, values, positions = draw(3, 1, group, 150, 32, torch.float32)
    positions[1] = -1
    query[2] *= 1e4  # all but one-hot
    output, received = kernels.attend(query, keys, values, 0.2, positions, splits=splits)
    expected, attention = reference(query, keys, values, 0.2, positions)
    torch.testing.assert_close(received[1], torch.full_like(received[1], group / 150))
    for row in range(2):
        assert_near(output[row], expected[row], torch.float32)
    assert output.isfinite().all() and received.isfinite().all()
    torch.testing.assert_close(received.sum(-1), torch.full_like(received[..., 0], group))


@runs
@pytest.mark.parametrize("group", [1, 2])
def test_nan_in_a_key_shows(group):
    query, keys, values, _ = draw(1, 1, group, 100, 32, torch.float32)
    keys[0, 0, 40, 3] = float("nan")
    output, received = kernels.attend(query, keys, values, 0.2)
    assert output.isnan().any() and received.isnan().any()


@runs
def test_any_strides(poisoned):
    query, keys, values, _ = draw(2, 3, 2, 70, 32, torch.float32)
    expected, attention = reference(query, keys, values, 0.2, None)
    layouts = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (query, keys, values)]
    layouts[2] = values.transpose(0, 1).contiguous().transpose(0, 1)
    output, received = kernels.attend(*layouts, 0.2)
    assert_near(output, expected, torch.float32)
    assert_near(received, attention, torch.float32)


@runs
def test_shapes_that_do_not_fit_are_refused():
    query, keys, values, positions = draw(2, 2, 1, 20, 32, torch.float32)
    for arguments in (
        (query[:, :, :16], keys, values, 1.0),
        (query[:1], keys, values, 1.0),
        (query, keys, values[:, :, :7], 1.0),
        (query, keys, values, 1.0, positions[:, :1]),
    ):
        with pytest.raises(ValueError, match="query .*, keys"):
            kernels.attend(*arguments)


class Squared(AttentionMass):
    """A policy with a memory of its own kind: the kernel must not update its mass behind its back."""

    def observe(self, slots, attention):
        super().observe(slots, attention**2)


class Turned(Window):
    """Scores whose slots do not lie side by side in memory."""

    def score(self, slots, seen):
        return super().score(slots, seen).neg().transpose(1, 2).contiguous().transpose(1, 2)


POLICIES = [Sketch(width=64, depth=2), AttentionMass(), H2O(), Squared(), LRU(), TOVA(), Window()]


@runs
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_cache_is_the_same_with_and_without_the_kernel(monkeypatch, policy, padded):
    group = 2 if isinstance(policy, Sketch) else 1
    tokens = torch.randn(20, 3, 2, group, 1, 16, device=DEVICE) * 2  # step, query key value, batch, heads, 1, head_dim
    valid = torch.ones(20, 2, 1, dtype=torch.bool, device=DEVICE)
    valid[:6, 1] = not padded
    attend, calls, results = kernels.attend, [], []
    monkeypatch.setattr(kernels, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "ENABLED", enabled)
        layer = SketchLayer(copy.deepcopy(policy), 10, 2, 3, 3)
        outputs = []
        for (query, key, value), real in zip(tokens, valid):
            key, value = layer.update(key[:, :1], value[:, :1])
            outputs.append(layer.attend(query, key, value, real if padded else None, None, 0.25))
        results.append((torch.cat(outputs, 2), layer.slots["positions"].sort(-1).values))
        assert len(calls) == 20 and layer.evicted > 0  # one call per token, and none when switched off
    (output, kept), (expected, expected_kept) = results
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert torch.equal(kept, expected_kept)


@runs
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_model_decodes_the_same_with_and_without_the_kernel(monkeypatch, architecture):
    model = sketchkv.enable(build(architecture)).to(DEVICE)
    ids = torch.randint(1, 97, (1, 12), device=DEVICE)
    tokens = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "ENABLED", enabled)
        cache = SketchCache(model.config, 10, num_sinks=1, recent_window=2, evict_every=3, width=64)
        tokens.append(sketchkv.generate(model, ids, cache, max_new_tokens=8))
        assert cache.evicted_tokens > 0
    assert torch.equal(*tokens)


def test_without_triton_use_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels, "triton", None)
    query = torch.randn(1, 2, 16)
    assert not kernels.usable(query)
    with pytest.raises(RuntimeError, match="package triton"):
        kernels.attend(query, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 1.0)


@runs
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("fresh", [4, 40])
def test_remembering_equals_the_torch_path(mean, decay, fresh):
    """Fading, adding and asking in one kernel, twice in a row, against what `Sketch.score` does on any device."""
    policies = [Sketch(width=48, depth=3, key="token", decay=decay, mean=mean) for _ in range(2)]
    slots = [sketchkv.slots.Slots(2, 3, 40, 16, torch.float32, DEVICE) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for policy, own in zip(policies, slots):
        policy.allocate(own)
        own.used, own.kept = 40, 40 - fresh
    for seen in (60, 60 + fresh):
        item, mass = torch.randint(2**30, (2, 3, 40), generator=generator), torch.rand(2, 3, 40, generator=generator)
        positions = torch.randint(-1, 60, (2, 3, 40), generator=generator)
        for own in slots:
            for name, new in (("item", item), ("mass", mass), ("positions", positions)):
                own.arrays[name].copy_(new)
        slots[0].arrays["item"][:, :, 0] = slots[1].arrays["item"][:, :, 0] = 2**31 - 1  # p itself counts as 0
        expected = policies[0].score(slots[0], seen)
        with mock.patch.object(kernels, "ENABLED", True):
            got = policies[1].score(slots[1], torch.tensor([seen], dtype=torch.int32, device=DEVICE))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for one, other in zip(*(policy.tensors() for policy in policies)):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        assert not slots[1].arrays["mass"].any()


@runs
@pytest.mark.parametrize("used,count", [(7, 2), (40, 16), (272, 16), (300, 5)])
def test_choosing_and_closing_equal_the_torch_path(used, count):
    """The slots that are chosen, and what each array holds once they are freed, as on any device; twice in a row."""
    layers = [SketchLayer(AttentionMass(), used - count, 2, 2, count) for _ in range(2)]
    generator = torch.Generator().manual_seed(used)
    key, value = torch.randn(2, 2, 3, 1, 24, generator=generator).to(DEVICE)
    for layer in layers:
        layer.update(key, value)
        layer.slots.add("wide", torch.float16, 3)
        layer.slots.used = layer.slots.kept = 0
    for start in (0, used - count):
        fresh = used if start == 0 else count
        order = torch.rand(2, 3, fresh, generator=generator).argsort(-1).int() + layers[0].seen
        new = {"keys": torch.randn(2, 3, fresh, 24, generator=generator), "values": torch.randn(2, 3, fresh, 24, generator=generator),
               "mass": torch.randint(-2, 3, (2, 3, fresh), generator=generator) / 2.0, "positions": order,
               "wide": torch.rand(2, 3, fresh, 3, generator=generator)}  # fmt: skip
        new["mass"][0, 0, 1] = -0.0
        clock = torch.full((1,), layers[0].seen + fresh - 1, dtype=torch.int32, device=DEVICE)
        for layer in layers:
            for name, array in new.items():
                layer.slots.arrays[name][:, :, start:used] = array.to(DEVICE)
            layer.seen += fresh
            layer.slots.used = used
        layers[0]._evict()
        assert layers[1]._simple()
        layers[1]._evict(clock)
        for one, other in zip(*(layer.slots.arrays.items() for layer in layers)):
            part = slice(used - count) if one[0] in ("keys", "values") else slice(None)
            assert torch.equal(one[1][:, :, part], other[1][:, :, part]), one[0]
        assert layers[0].slots.used == layers[1].slots.used == layers[1].slots.kept == used - count
    layers[1].slots.arrays["mass"][0, 0, :4] = torch.nan
    layers[1].slots.used = used
    with pytest.raises(ValueError, match="NaN"):
        layers[1]._evict(clock)
        layers[1].check()


@runs
@pytest.mark.parametrize("policy", [*POLICIES, Turned()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_steps_that_will_be_recorded_keep_the_same_tokens(policy, dtype):
    """Append, attention, choice and closing in kernels, driven by a clock, against the same steps without."""
    tokens = (torch.randn(20, 3, 2, 2, 16, 1, device=DEVICE) * 2).to(dtype).mT  # not contiguous either
    tokens = tokens if isinstance(policy, Turned) else tokens.contiguous()
    results = []
    for clock in (torch.zeros(1, dtype=torch.int32, device=DEVICE), None):
        layer, outputs = SketchLayer(copy.deepcopy(policy), 10, 2, 3, 3), []
        for query, key, value in tokens:
            key, value = layer.update(key, value)
            outputs.append(layer.attend(query, key, value, None, None, 0.25, clock))
            if clock is not None:
                clock += 1
        results.append((torch.cat(outputs, 2), layer.slots["positions"].sort(-1).values, layer.evicted))
    (output, kept, evicted), (expected, expected_kept, expected_evicted) = results
    torch.testing.assert_close(output, expected, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)
    assert torch.equal(kept, expected_kept) and evicted == expected_evicted > 0


@runs
@pytest.mark.parametrize("dim,bits,start,count", [(64, 24, 5, 16), (24, 3, 0, 37), (128, 30, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codes_equal_simhash(dim, bits, start, count, dtype):
    keys = torch.randn(2, 3, 40, dim, device=DEVICE).to(dtype)
    items, code = torch.full((2, 3, 40), -7, dtype=torch.int32, device=DEVICE), SimHash(dim, bits, 1, DEVICE)
    kernels.codes(keys, code.projection, items, start, count)
    expected = code(keys)
    inside = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    inside[start : start + count] = True
    assert (items[..., ~inside] == -7).all()
    # A projection that is all but zero may have either sign.
    clear = ((keys.float() @ code.projection).abs() > 1e-4).all(-1)
    assert torch.equal(items.long()[clear & inside], expected[clear & inside].long()) and clear.float().mean() > 0.9
