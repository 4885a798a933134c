"""Caps per layer, slots that move between layers: both against the masked full cache."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

import sketchkv
from sketchkv import AttentionMass, Sketch, SketchCache, Summary, Window, generate, score
from sketchkv.budgets import pyramid
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.study.extras.lending import AdaptiveCache


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


# Slots that move between layers

KINDS = {
    "exact": {},
    "sketch": dict(policy=Sketch(width=64, depth=2)),
    "window": dict(policy=Window()),
    "summary": dict(summary=Summary(2)),
    "wide summary": dict(summary=Summary(7)),
    "coded": dict(bits=8, summary=Summary(1)),
    "summary with spread": dict(summary=Summary(3, spread=True, protects=True)),
}


def adaptive(model, **settings):
    settings = {"recent_window": 4, "evict_every": 4, "margin": 1.0} | copy.deepcopy(settings)
    return AdaptiveCache(model.config, 32, **settings)


def wandering(model, **settings):
    """An adaptive cache with prices of our own, after which slots wander: lenders and takers at every distance."""
    cache = adaptive(model, **settings)
    for index, layer in enumerate(cache.layers):

        def part(scores, evicted, layer=layer, index=index):
            layer.prices.fill_((layer.seen // 24 + index) % len(cache.layers) + 1)
            layer.known = True

        layer.on_evict = part
    return cache


@pytest.mark.parametrize("kind", ["exact", "sketch", "window"])
def test_adaptive_equals_masked_full_cache(model, ids, kind):
    cache = adaptive(model, **KINDS[kind])
    logits = equals_masked_full_cache(model, ids, cache)
    for chunk_size in (100, 3):
        streamed = adaptive(model, **KINDS[kind])
        _, again = score(model, ids, streamed, chunk_size=chunk_size, return_logits=True)
        torch.testing.assert_close(again, logits, atol=1e-4, rtol=0)
        assert all(map(torch.equal, kept(streamed), kept(cache)))
        assert streamed.history == cache.history


def plain(model, kind):
    """The same cache with a fixed uniform split."""
    settings = {"policy": AttentionMass()} | copy.deepcopy(KINDS[kind])
    return SketchCache(model.config, 32, recent_window=4, evict_every=4, **settings)


def deep(layers):
    """A model with room for slots to wander."""
    torch.manual_seed(0)
    shape = dict(vocab_size=97, n_positions=512, n_embd=32, n_layer=layers, n_head=2)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return sketchkv.enable(model.eval().requires_grad_(False))


def test_slots_wander_through_all_layers(ids):
    model = deep(4)
    cache = wandering(model)
    equals_masked_full_cache(model, torch.cat([ids, ids.flip(1), ids], 1), cache)
    moves = [
        [b - a for a, b in zip(before, after)]
        for (_, before), (_, after) in zip(cache.history, cache.history[1:])
    ]
    ways = {(move.index(-4), move.index(4)) for move in moves if 4 in move}
    assert any(a < b - 1 for a, b in ways) and any(a > b + 1 for a, b in ways), ways
    assert all(sum(caps) == 4 * 32 and min(caps) >= 16 for _, caps in cache.history)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_does_not_see_that_its_slots_grew_and_shrank(ids, kind):
    """What moved to other memory and back is what it would be had it stayed."""
    model = deep(3)
    text = torch.cat([ids, ids.flip(1)], 1)
    cache = adaptive(model, **KINDS[kind])
    still = plain(model, kind)
    cache._move = lambda: None
    score(model, text[:, :150], cache, chunk_size=4)
    score(model, text[:, :150], still, chunk_size=4)
    for layer in cache.layers:
        cap = layer.max_cache_size
        for size in (cap + 8, cap):
            layer.resize(size)
            layer.fit()
    now = slice(150, None)
    logits = [model(text[:, now], past_key_values=each).logits for each in (cache, still)]
    torch.testing.assert_close(*logits)
    assert all(map(torch.equal, kept(cache), kept(still)))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_the_uniform_split_at_most(ids, kind):
    """A block that was promised is nobody's from its lender's eviction until its taker grows: for one step."""
    model = deep(4)
    still = plain(model, kind)
    score(model, ids, still)
    cache, whole = wandering(model, **KINDS[kind]), 0
    for chunk in ids.split(4, 1):
        model(chunk, past_key_values=cache)
        own = sum(layer.prices.nbytes for layer in cache.layers)
        slots = sum(layer.slots.capacity for layer in cache.layers)
        assert slots <= 4 * 36 and cache.nbytes()["total"] <= still.nbytes()["total"] + own
        whole += slots == 4 * 36
    assert cache.history and whole > 10


def test_two_texts_in_a_row_equal_two_fresh_caches(ids):
    model = deep(4)
    cache = wandering(model)
    first = score(model, ids[:1], cache)
    assert cache.history
    cache.reset()
    assert not cache.history and cache.caps == [32] * 4
    second = score(model, ids[1:], cache)
    for text, nll in ((ids[:1], first), (ids[1:], second)):
        assert torch.equal(score(model, text, wandering(model)), nll)


def test_long_passes_padding_and_beams(model, padding):
    padded, mask = padding
    cache = adaptive(model)
    out = model.generate(
        padded,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=20,
        num_beams=2,
        do_sample=False,
        eos_token_id=None,
    )
    assert out.shape == (2, 120) and sum(cache.caps) == 64
    assert all(cap <= n < cap + 8 for cap, n in zip(cache.caps, cache.stored_tokens()))
    cache = adaptive(model)
    logits, visible = decode_and_watch(model, padded, cache, mask)
    torch.testing.assert_close(
        logits[1, 23:], full_cache_logits(model, padded, visible, mask)[1, 23:], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(margin=0.9), "margin"),
        (dict(least=0), "least"),
        (dict(memory=1.0), "memory"),
        (dict(attend_topk=30), "attend_topk"),
        (dict(max_cache_size=[32, 37]), "modulo evict_every=16"),
        (dict(evict_every=40), "at least evict_every=40"),
    ],
)
def test_bad_settings(gpt2, settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCache(gpt2.config, **{"max_cache_size": 32} | settings)


def test_adaptive_steps_are_not_recorded(gpt2, ids):
    with pytest.raises(ValueError, match="AdaptiveCache decides on the host"):
        generate(gpt2, ids, adaptive(gpt2), 5, graph=True)
