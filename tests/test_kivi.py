"""The KIVI-style store: what it holds, in how many bytes, and attention against keys and values rounded in plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from sketchkv import generate, score
from sketchkv.study.extras.kivi import GROUP, KiviCache, pack, unpack


def rounded(x, bits, axis):
    """Numbers `x` rounded along `axis`, all of which shares a range, as documented."""
    low = x.min(axis, keepdims=True)
    step = (
        np.maximum((x.max(axis, keepdims=True) - low) / (2**bits - 1), 2.0**-24)
        .astype(np.float16)
        .astype(np.float32)
    )
    low = low.astype(np.float16).astype(np.float32)
    return low + np.clip(np.rint((x - low) / step), 0, 2**bits - 1) * step


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([4, 16, 32, 64]), st.integers(0, 2**31), st.floats(-3, 3))
def test_packed_numbers_come_back_rounded(bits, n, seed, magnitude):
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    x[0, 0] = 1.5  # a constant group
    codes, ranges = pack(x, bits)
    groups = max(1, n // GROUP)
    assert codes.dtype == torch.uint8 and codes.shape == (3, 5, n * bits // 8)
    assert ranges.dtype == torch.float16 and ranges.shape == (3, 5, groups, 2)
    expected = rounded(x.unflatten(-1, (groups, -1)).numpy(), bits, -1).reshape(x.shape)
    np.testing.assert_allclose(
        unpack(codes, ranges, bits, torch.float32).numpy(), expected, atol=1e-5 * 10**magnitude
    )


class Oracle(DynamicCache):
    """The full cache in float16, decoded token by token, that rounds in place 32 tokens as soon as `residual` newer ones
    are there."""

    def __init__(self, config, bits, residual):
        super().__init__(config=config)
        self.bits, self.residual, self.packed = bits, residual, 0

    def update(self, keys, values, *args, **kwargs):
        return super().update(keys.half().float(), values.half().float(), *args, **kwargs)

    def round(self):
        if self.get_seq_length() - self.packed < self.residual + GROUP:
            return
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            for tensor, axis in ((layer.keys, 2), (layer.values, 3)):
                group = tensor[:, :, self.packed : self.packed + GROUP]
                group.copy_(torch.from_numpy(rounded(group.numpy(), self.bits, axis)))
        self.packed += GROUP


def step_by_step(model, ids, cache):
    logits = []
    for token in ids.split(1, 1):
        logits.append(model(token, past_key_values=cache, use_cache=True).logits)
        cache.round()
    return torch.cat(logits, 1)


@pytest.mark.parametrize("bits, residual", [(4, 32), (2, 5)])
def test_cache_equals_full_cache_of_rounded_tokens(model, ids, bits, residual):
    ids = ids[:, :75]
    expected = step_by_step(model, ids, Oracle(model.config, bits, residual))
    effect = (score(model, ids, return_logits=True)[1] - expected).abs()[:, residual + GROUP :]
    for chunk_size in (1, 30):
        cache = KiviCache(model.config, 75, bits=bits, residual=residual)
        logits = score(model, ids, cache, chunk_size=chunk_size, return_logits=True)[1]
        # A number on the edge between two codes may fall to either side; then a few logits move by a step of one channel.
        difference = (logits - expected).abs()
        assert difference.median() < 1e-4 and difference.max() < 0.5 * expected.std()
        assert effect.median() > 10 * difference.median()
        assert cache.seen_tokens == 75 and cache.evicted_tokens == 0
        assert (
            cache.layers[0].slots.packed
            == (75 - residual) // GROUP
            == len(cache.layers[0].slots.arrays["keys_codes"][0, 0])
        )


def test_bytes_are_those_of_the_packed_tensors(model, ids):
    cache = KiviCache(model.config, 100, bits=2, residual=16)
    score(model, ids, cache)
    heads, rows, layers, head_dim = cache.layers[0].slots.shape[1], 2, 2, 16
    codes = 2 * 64 * head_dim * 2 // 8  # keys and values of 64 tokens
    ranges = (
        2 * 2 * (2 * head_dim + 64)
    )  # two groups of 32 tokens per channel; one group of 16 channels per token
    newest = 2 * 48 * head_dim * 2
    assert cache.nbytes()["kv"] == layers * rows * heads * (codes + ranges + newest)
    assert (
        cache.nbytes()["total"] == cache.nbytes()["kv"] + layers * rows * 100
    )  # which tokens are no padding


def test_generate_padded_beams_and_reset(gpt2, padding):
    ids, mask = padding
    cache = KiviCache(gpt2.config, 130, bits=8)
    both = generate(gpt2, ids, cache, 30, attention_mask=mask)
    assert torch.equal(both[0], generate(gpt2, ids[:1], KiviCache(gpt2.config, 130, bits=8), 30)[0])
    hidden = gpt2.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert (
        both[1] == hidden[1]
    ).float().mean() > 0.9  # 8 bits change little; padding that is seen changes all
    cache.reset()
    assert torch.equal(generate(gpt2, ids, cache, 30, attention_mask=mask), both)
    out = gpt2.generate(
        ids[:1, :60],
        past_key_values=KiviCache(gpt2.config, 80, bits=8),
        max_new_tokens=20,
        num_beams=4,
        do_sample=False,
        num_return_sequences=4,
        eos_token_id=None,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for sequence, reported in zip(out.sequences, out.sequences_scores):
        nll = score(gpt2, sequence[None], KiviCache(gpt2.config, 80, bits=8))[0, 59:]
        assert abs(-nll.sum() - reported) < 0.1


def test_bad_settings(gpt2, ids):
    for bad in ({"bits": 3}, {"bits": 16}, {"bits": 4.0}, {"residual": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            KiviCache(gpt2.config, 64, **bad)
    with pytest.raises(ValueError, match="larger one"):
        score(gpt2, ids, KiviCache(gpt2.config, 64))
