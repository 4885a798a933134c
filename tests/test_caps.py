"""Caps per layer, against the masked full cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import SketchCache, generate, score
from sketchkv.budgets import pyramid
from sketchkv.oracle import decode_and_watch, full_cache_logits


def kept(cache):
    return [cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))]


def equals_masked_full_cache(model, ids, cache):
    logits, visible = decode_and_watch(model, ids, cache)
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-4, rtol=0)
    assert cache.evicted_tokens > 0
    return logits


# Caps per layer


@settings(deadline=None)
@given(st.integers(21, 500), st.integers(1, 40), st.floats(-0.99, 0.99))
def test_pyramid_keeps_the_total(cap, layers, steepness):
    caps = pyramid(cap, layers, steepness)
    assert len(caps) == layers and sum(caps) == cap * layers
    assert all((b - a) * steepness <= 1 for a, b in zip(caps, caps[1:]))  # up to rounding


def test_pyramid_by_hand():
    assert (
        pyramid(100, 5) == [150, 125, 100, 75, 50]
        and pyramid(100, 3, 0) == [100] * 3
        and pyramid(9, 1) == [9]
    )
    with pytest.raises(ValueError, match="steepness"):
        pyramid(100, 5, 1)


@pytest.mark.parametrize("caps", [[40, 24], [23, 37], (24, 29)])
def test_caps_of_layers_equal_masked_full_cache(model, ids, caps):
    def fresh():
        return SketchCache(model.config, caps, recent_window=8, evict_every=5)

    cache = fresh()
    logits = equals_masked_full_cache(model, ids, cache)
    streamed = fresh()
    _, again = score(model, ids, streamed, chunk_size=33, return_logits=True)
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=0)
    assert cache.seen_tokens == 100 and all(cap <= n < cap + 5 for cap, n in zip(caps, cache.stored_tokens()))


def test_same_total_same_bytes(gpt2, ids):
    sizes = []
    for caps in (32, [40, 24], [23, 41]):
        cache = SketchCache(gpt2.config, caps, recent_window=8)
        score(gpt2, ids, cache)
        sizes.append(cache.nbytes())
    assert sizes[0] == sizes[1] == sizes[2]


def test_recorded_steps_with_a_cap_for_each_layer(gpt2, ids):
    caches = [SketchCache(gpt2.config, [43, 30], evict_every=4) for _ in range(2)]
    for length in (50, 28):
        tokens = [
            generate(gpt2, ids[:, :length], cache, 24, graph=graph)
            for cache, graph in zip(caches, (False, True))
        ]
        assert torch.equal(*tokens)
        for cache in caches:
            cache.reset()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_cache_size=[64]), "one per layer"),
        (dict(max_cache_size=[64, 64.0]), "whole number"),
        (dict(max_cache_size=[64, 20]), "max_cache_size=20 leaves nothing"),
    ],
)
def test_bad_caps(gpt2, settings, message):
    with pytest.raises(ValueError, match=message):
        SketchCache(gpt2.config, **settings)
