"""Many tokens at once: attention in blocks, or by kernels that hold no scores, gives what the rule of one block gives.

On a CPU the kernels run in Triton's interpreter, in a process of its own.
"""

from unittest import mock

import pytest
import torch
from conftest import build, interpreted, named
from test_fast import FEATURES, POLICIES, decode, some, state
from test_kernels import DEVICE, HAS_TRITON, INTERPRET, assert_near, poisoned, runs
from torch.utils._python_dispatch import TorchDispatchMode

import sketchkv
from sketchkv import SketchCache, Window, prompts
from sketchkv.fast import chunk, columns, prompt
from sketchkv.fast.ops import Fused
from sketchkv.passes import Tokens

TOTAL, CHUNK, WIDTH = 47, 17, 16  # of the first text, and what comes between two evictions
unwritten = pytest.mark.usefixtures(poisoned.__name__)  # memory that no kernel has written is NaN


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it exists for Linux)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="the tests below run in this very process")
def test_with_the_interpreter():
    interpreted(__file__, "-k", "kernel")


def passes(dtype=torch.float32, group=2, padded=False, **_):
    """A fresh random text of two rows in two passes of many tokens, [(query, key, value, Tokens)]."""
    ids = torch.randint(50, (2, TOTAL), device=DEVICE)
    first = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)[:, None, None] if padded else 0
    query = torch.randn(2, 2 * group, TOTAL, WIDTH, device=DEVICE) * 2
    key, value = torch.randn(2, 2, 2, WIDTH, TOTAL, device=DEVICE).mT + 0.5
    positions = torch.arange(TOTAL, dtype=torch.int32, device=DEVICE)[None]
    if padded:
        positions = positions.expand(2, TOTAL).masked_fill(first[:, 0] > positions, -1)
    tokens = Tokens(ids, positions, first, padded)
    parts = slice(TOTAL - 12), slice(TOTAL - 12, TOTAL)
    return [(*(x[:, :, part].to(dtype) for x in (query, key, value)), tokens.part(part)) for part in parts]


def agree(policy, feature, ops_, most):
    """Raises AssertionError unless `ops_`, with at most so many scores at once, gives what one block gives. Queries of padding
    attend to nothing that is told: they are left out."""
    settings = dict(FEATURES[feature])
    steps = passes(**settings)
    for name in ("dtype", "group", "padded"):
        settings.pop(name, None)
    if "form" in settings:
        settings["form"] = settings["form"]._replace(sinks=torch.randn(steps[0][0].shape[1], device=DEVICE))
    run = dict(settles=8, prefill_chunk=CHUNK) | settings
    with (
        mock.patch.dict(prompts.SCORES, {DEVICE: 2**40}),
        mock.patch.object(prompts, "needs_no_scores", lambda *_: False),
    ):
        expected, eager = decode(POLICIES[policy], steps, None, **run)
    with mock.patch.dict(prompts.SCORES, {DEVICE: most}):
        got, layer = decode(POLICIES[policy], steps, ops_, **run)
    assert eager.evicted == layer.evicted > 0 and eager.seen == layer.seen
    real = torch.cat([tokens.positions for *_, tokens in steps], 1)[:, None, :, None] >= 0
    tolerance = 2e-5 if expected.dtype == torch.float32 else 1e-2
    close = dict(atol=tolerance, rtol=tolerance)
    assert got.isfinite().all()
    torch.testing.assert_close(got * real, expected * real, **close)
    one, other = state(eager), state(layer)
    assert torch.equal(one["positions"], other["positions"])
    for name in one:
        torch.testing.assert_close(other[name], one[name], **close, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("policy, feature", some(POLICIES, FEATURES, 1 if not INTERPRET else 4))
def test_blocks_equal_the_rule_of_one_block(policy, feature):
    if policy == "random" and "padding" in feature:
        pytest.skip("draws one number per slot, and padding goes in any order: the slots may differ")
    agree(policy, feature, None, most=8 * 5 * TOTAL)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return result


@pytest.mark.parametrize(
    "settings", [{}, {"bits": (5, 4), "summary": sketchkv.Summary()}, {"policy": Window()}], ids=named
)
def test_no_score_matrix_in_memory(settings):
    model, tokens = sketchkv.enable(build("llama", positions=2048)), 1500
    ids = torch.randint(1, 97, (1, tokens))
    cache = SketchCache(model.config, 64, prefill_chunk=1024, **settings)
    with mock.patch.dict(prompts.SCORES, cpu=2**16), Largest() as largest:
        model(ids, past_key_values=cache, logits_to_keep=1)
    # Of a layer's own tensors, the widest is that of the feed-forward part: 96 channels.
    assert cache.evicted_tokens > 0 and largest.numel <= max(2**16 * 1.1, 96 * tokens * 1.5) < 4 * 1088 * 256


@runs
@pytest.mark.parametrize("policy, feature", some(POLICIES, FEATURES, 12))
def test_kernels_equal_the_rule_of_one_block(policy, feature):
    if policy == "random" and "padding" in feature:
        pytest.skip("draws one number per slot, and padding goes in any order: the slots may differ")
    for _ in range(3):  # as in `test_fast`: now and then a rounding falls on an edge, in one text of many
        try:
            return agree(policy, feature, Fused(), most=2**20)
        except AssertionError as error:
            differ = error
            if "codec" not in FEATURES[feature]:
                break
    raise differ


@runs
@pytest.mark.parametrize(
    "fault",
    [
        lambda fine: fine._replace(newest=fine.newest - 1),
        lambda fine: fine._replace(newest=fine.newest + 1),
        lambda fine: fine._replace(sinks=fine.sinks - 1),
    ],
    ids=["newest less", "newest more", "sinks"],
)
def test_kernels_with_a_fault_in_the_ring_are_seen(fault):
    right = chunk.Fine
    with mock.patch.object(chunk, "Fine", lambda *parts: fault(right(*parts))), pytest.raises(AssertionError):
        agree("decayed mean", "ring", Fused(), most=2**20)


# batch, kv_heads, group, new tokens, stored before them, width of keys, of values
SIZES = [
    (1, 1, 1, 2, 0, 16, 16),
    (2, 2, 3, 130, 77, 64, 64),
    (1, 3, 2, 40, 300, 48, 80),
    (2, 1, 4, 150, 0, 128, 128),
    (1, 2, 1, 33, 1, 256, 256),
]


def reference(query, keys, values, scaling, softcap, hidden, beside, weights):
    """(output, normaliser to base 2, received) in float64."""
    batch, heads, count, width = query.shape
    query = query.double().view(batch, keys.shape[1], -1, count, width)
    logits = query @ keys.double().transpose(-1, -2)[:, :, None] * scaling
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, :, None, None] > 0, -torch.inf)
    later = torch.ones(count, keys.shape[2], dtype=torch.bool, device=DEVICE).triu(keys.shape[2] - count + 1)
    logits = logits.masked_fill(later, -torch.inf)
    total = logits.logsumexp(-1)
    if beside is not None:
        total = torch.logaddexp(total, beside.double().view(total.shape))
    attention = (logits - total[..., None]).exp()
    output = (attention @ values.double()[:, :, None]).flatten(1, 2)
    received = (attention * weights.double()[:, None, None, :, None]).sum((2, 3))
    return output, total.flatten(1, 2) / 0.6931471805599453, received


@runs
@unwritten
@pytest.mark.parametrize("kind", ["plain", "capped", "hidden", "beside", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_equal_float64(size, dtype, kind):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip(
            "the interpreter multiplies matrices of bfloat16 by their bits; float16 and GPUs check this"
        )
    batch, kv_heads, group, count, before, width, other = size
    if INTERPRET and SIZES.index(size) % 2 and kind != "all":
        pytest.skip("slow here: a GPU runs every pair")
    normal, used = dict(dtype=torch.float32, device=DEVICE), before + count
    query = (torch.randn(batch, count, kv_heads * group, width, **normal) * 2).to(dtype).transpose(1, 2)
    keys, values = (torch.randn(batch, kv_heads, used + 9, w, **normal).to(dtype) for w in (width, other))
    keys[:, :, used:] = values[:, :, used:] = torch.nan  # beyond the occupied slots lies nothing of use
    keys, values, hidden, beside = keys[:, :, :used], values[:, :, :used], None, None
    if kind in ("hidden", "all"):  # every query sees its own token
        hidden = (torch.rand(batch, kv_heads, used, device=DEVICE) < 0.4).to(torch.uint8)
        hidden[:, :, before:] = 0
    if kind in ("beside", "all"):
        beside = torch.randn(batch, kv_heads * group, count, **normal)
        beside[:, 0] = -torch.inf  # a summary of nothing
    softcap = 3.0 if kind in ("capped", "all") else None
    weights = torch.rand(1 if kind == "plain" else batch, count, device=DEVICE)
    form = width**-0.5, softcap, hidden
    output, normaliser = prompt.attend(query, keys, values, *form, beside)
    received = columns.receive(query, keys, normaliser, weights, *form)
    expected = reference(query, keys, values, *form, beside, weights)
    assert output.dtype == dtype and normaliser.dtype == received.dtype == torch.float32
    assert_near(output, expected[0], dtype)
    assert_near(normaliser, expected[1], torch.float32)
    assert_near(received, expected[2], torch.float32)


@runs
@unwritten
def test_kernels_attend_evenly_where_all_is_hidden():
    query, keys, values = torch.randn(3, 1, 1, 20, 16, device=DEVICE)
    hidden = torch.ones(1, 1, 20, dtype=torch.uint8, device=DEVICE)
    output, normaliser = prompt.attend(query, keys, values, 1.0, hidden=hidden)
    expected = values.cumsum(2) / torch.arange(1, 21, device=DEVICE)[:, None]
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    received = columns.receive(query, keys, normaliser, torch.zeros(1, 20, device=DEVICE), 1.0, None, hidden)
    assert received.eq(0).all()
