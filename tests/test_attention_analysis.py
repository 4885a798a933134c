"""Attention statistics against maps whose answer is known, and against the masked full attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, Random, SketchCache, Window
from sketchkv.oracle import decode_and_watch
from sketchkv.study import attention_analysis as analysis

CAP, EVERY = 24, 8


def uniform(tokens):
    """Each query attends to everything before it alike."""
    return (torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None])[None, None]


def random_maps(tokens, seed, sharp=3.0):
    scores = torch.randn(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(seed)) * sharp
    return scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


# -- distributions


def test_mass_curves_of_uniform_attention_are_the_diagonal():
    for curve in analysis.mass_curves(uniform(132), [0.25, 0.5, 1.0], sinks=2).values():
        torch.testing.assert_close(curve[0, 0], torch.tensor([0.25, 0.5, 1.0]), atol=1e-3, rtol=0)


@given(st.integers(0, 10**6), st.floats(0.1, 6))
@settings(max_examples=25, deadline=None)
def test_knowing_more_never_holds_less(seed, sharp):
    each, hindsight, foresight = analysis.mass_curves(
        random_maps(64, seed, sharp), [0.05, 0.2, 0.5, 1.0]
    ).values()
    assert (each >= hindsight - 1e-5).all() and (hindsight >= foresight - 1e-5).all()
    torch.testing.assert_close(each[..., -1], torch.ones(2, 3))


def test_maps_are_attention(model, ids):
    maps = analysis.attention_maps(model, ids)
    assert (
        maps.shape[:2] == (model.config.num_hidden_layers, len(ids))
        and model.config._attn_implementation == "sketchkv_sdpa"
    )
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert maps.triu(1).abs().max() == 0


def test_compare_is_the_masked_full_attention(model, ids):
    """In the first layer queries and keys do not depend on the cache: there the compressed attention is the full one over
    the tokens still held, which an independent run writes down token by token."""
    maps = analysis.attention_maps(model, ids)
    found = analysis.compare(model, ids, maps, AttentionMass(), CAP, EVERY, num_sinks=2, recent_window=4)
    cache = SketchCache(
        model.config, CAP, policy=AttentionMass(), evict_every=EVERY, num_sinks=2, recent_window=4
    )
    logits, visible = decode_and_watch(model, ids, cache)
    retained = torch.stack(
        [(maps[i] * seen).sum(-1)[:, :, CAP + EVERY :].mean((1, 2)) for i, seen in enumerate(visible)]
    )
    torch.testing.assert_close(found["retained"], retained, atol=1e-5, rtol=0)

    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(found["nll"], nll[:, CAP + EVERY :].mean(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("tokens", [97, 100, 104])
def test_no_policy_exceeds_the_bound(gpt2, tokens):
    ids = torch.randint(1, 97, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    maps = analysis.attention_maps(gpt2, ids)
    protection = dict(num_sinks=2, recent_window=4, evict_every=EVERY)
    best = analysis.bound(maps, CAP, **protection).mean(-1)
    assert (best < 1).all()
    oracle = [analysis.Oracle(layer) for layer in analysis.future_mass(maps, CAP, EVERY)]
    held = {
        name: analysis.compare(gpt2, ids, maps, policy, CAP, **protection)["retained"]
        for name, policy in {
            "random": Random(),
            "window": Window(),
            "exact": AttentionMass(),
            "oracle": oracle,
        }.items()
    }
    assert all((retained <= best + 1e-5).all() for retained in held.values())
    assert all((held["oracle"] > held[name]).all() for name in ("random", "window", "exact"))


def test_bound_without_pressure_is_everything():
    """All that could be evicted gets no attention."""
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., :2] = 0.5
    torch.testing.assert_close(analysis.bound(maps, 24, 2, 4, 8), torch.ones(1, 1))


def test_future_mass():
    maps = random_maps(40, 1)
    future = analysis.future_mass(maps, 16, 8)
    torch.testing.assert_close(
        future, torch.stack([maps[..., start:, :].sum(-2) for start in (24, 32, 40)], -2)
    )


def test_too_short_a_text_is_refused(gpt2, ids):
    with pytest.raises(ValueError, match="never fill a cache of 128"):
        analysis.compare(gpt2, ids, analysis.attention_maps(gpt2, ids), Window(), 128)
