"""Quantized slots: the error, the bytes, and the model's output against keys and values rounded the slow way."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from sketchkv import AttentionMass, SketchCache, Window, oracle, score
from sketchkv.quantize import dequantize, quantize


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([4, 8]), st.sampled_from([2, 16, 32, 48, 64, 128]), st.integers(0, 2**31),
    st.floats(-6, 4), st.floats(-100, 100),
)  # fmt: skip
def test_no_value_is_off_by_more_than_half_a_step(bits, head_dim, seed, magnitude, offset):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 5, head_dim, generator=generator) * 10**magnitude + offset).clamp(-6e4, 6e4)
    x[0, 0] = offset  # a constant group
    codes, ranges = quantize(x, bits)
    groups = head_dim // 32 if head_dim % 32 == 0 else 1
    assert codes.shape == (3, 5, head_dim * bits // 8) and codes.dtype == torch.uint8
    assert ranges.shape == (3, 5, 2 * groups) and ranges.dtype == torch.float16
    back = dequantize(codes, ranges, bits, torch.float32)
    grouped, error = (t.unflatten(-1, (groups, -1)).double() for t in (x, back - x))
    step = ranges[..., groups:].double()
    float32 = 2**-22 * grouped.abs().amax(-1)  # the arithmetic itself
    assert (error.abs().amax(-1) <= step / 2 + float32).all()
    # Rounding outwards widens the range by little: the step is that of the group, and float16's last places.
    span = grouped.amax(-1) - grouped.amin(-1)
    assert (step <= (span + 2**-9 * grouped.abs().amax(-1)) / (2**bits - 1) * (1 + 2**-9) + 2**-22).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_used_and_comes_back(bits):
    x = torch.arange(2**bits).float().repeat(2).view(-1, 2 ** min(bits, 5))
    x = torch.cat([x, x.flip(-1)], -1) if bits == 4 else torch.arange(256).float().expand(3, 256)
    codes, ranges = quantize(x, bits)
    whole = torch.cat([codes & 15, codes >> 4], -1) if bits == 4 else codes
    assert whole.unique().numel() >= (16 if bits == 4 else 32)
    torch.testing.assert_close(dequantize(codes, ranges, bits, torch.float32), x, atol=0.51 * 1.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_model_comes_back(dtype):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = dequantize(*quantize(x, 8), 8, dtype)
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, atol=0.03, rtol=0)


@pytest.mark.parametrize("head_dim, bits", [(16, 3), (16, 12), (15, 4)])
def test_what_cannot_be_packed_is_refused(head_dim, bits):
    with pytest.raises(ValueError, match="bits=4"):
        quantize(torch.zeros(2, head_dim), bits)


@pytest.mark.parametrize("bits", [3, 0, "4", 4.0, True])
def test_bad_settings(gpt2, bits):
    with pytest.raises(ValueError, match="bits must be 16, 8, 4, or None"):
        SketchCache(gpt2.config, 64, bits=bits)


def rounded(x, bits):
    """The documented rule in numpy: one range per vector (head_dim 16), minimum and step rounded outwards."""
    x = x.double().numpy()
    low = x.min(-1, keepdims=True)
    low = np.float16(low - abs(low) * 2.0**-10 - 2.0**-24).astype(float)
    step = np.float16((x.max(-1, keepdims=True) - low) / (2**bits - 1) * (1 + 2.0**-10) + 2.0**-24).astype(float)
    return torch.from_numpy(low + np.clip(np.rint((x - low) / step), 0, 2**bits - 1) * step).float()


@pytest.fixture
def rounding_oracle():
    """Lets the oracle's attention round keys and values to this many bits."""
    bits = []

    def attention(module, query, key, value, *args, **kwargs):
        return oracle._attention(module, query, rounded(key, bits[0]), rounded(value, bits[0]), *args, **kwargs)

    AttentionInterface.register(oracle.NAME, attention)
    yield bits.append
    AttentionInterface.register(oracle.NAME, oracle._attention)


@pytest.mark.parametrize("policy", [None, AttentionMass(), Window()])
@pytest.mark.parametrize("bits", [4, 8])
def test_bounded_quantized_cache_equals_masked_full_cache_of_rounded_tokens(model, ids, bits, policy, rounding_oracle):
    rounding_oracle(bits)
    cache = SketchCache(model.config, 32, recent_window=8, evict_every=5, bits=bits, policy=copy.deepcopy(policy))
    logits, visible = oracle.decode_and_watch(model, ids, cache)
    expected = oracle.full_cache_logits(model, ids, visible)
    # A number on the edge between two codes may fall to either side; then a few logits move by a step of one channel.
    difference = (logits - expected).abs()
    assert difference.median() < 1e-4 and difference.max() < 0.5 * expected.std()
    assert cache.evicted_tokens > 0
    plain = SketchCache(model.config, 32, recent_window=8, evict_every=5, policy=copy.deepcopy(policy))
    effect = (score(model, ids, plain, return_logits=True)[1] - logits).abs()
    assert effect.median() > 10 * difference.median()


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_the_packed_tensors(model, ids, bits):
    cache = SketchCache(model.config, 32, recent_window=8, evict_every=5, bits=bits, summary_slots=2, policy=Window())
    score(model, ids, cache)
    heads, head_dim, rows, layers = cache.layers[0].slots.positions.shape[1], 16, 2, 2
    slot = 2 * (head_dim * bits // 8 + 2 * 2)  # codes, minimum and step in float16; keys and values
    summary = 2 * 2 * head_dim * 4
    assert cache.nbytes()["kv"] == layers * rows * heads * (37 * slot + summary)
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for layer in cache.layers for t in (
        *layer.slots.arrays.values(), *layer.slots.whole.values(), *layer.summary.tensors(),
        layer.summary.code.projection, layer.summary.code.powers, layer.summary.hash.a, layer.summary.hash.b,
    )}  # fmt: skip
    assert cache.nbytes()["total"] == sum({t: n for t, n in held.items()}.values())
