"""Why a cache loses: the ladder's ends, and errors against their bounds."""

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, Random, SketchCache, Window, score
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.study import stats, tail, why
from sketchkv.study.attention_analysis import Oracle, attention_maps

CAP, EVERY = 32, why.EVERY


def problem(seed, sharp=1.0, tokens=40, head_dim=8, keep=0.5):
    """Queries, keys, values, and a random set of tokens that each query still sees, itself always."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, tokens, head_dim, generator=generator) for heads in (4, 2, 2))
    visible = torch.rand(1, 2, tokens, tokens, generator=generator) < keep
    return query * sharp, key, value + 3, (visible | torch.eye(tokens, dtype=torch.bool)).tril()


def within(found, tolerance=1e-4):
    room = tolerance * found["norm"]
    return all((found[key] <= found[f"bound_{key}"] + room).all() for key in ("dropped", "folded"))


# -- error and bound


@given(st.integers(0, 10**6), st.floats(0.0, 8.0), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_no_error_exceeds_its_bound(seed, sharp, keep):
    query, key, value, visible = problem(seed, sharp, keep=keep)
    found = tail.tail_error(query, key, value, visible)
    assert within(found) and (found["bound_folded"] <= found["bound_dropped"] + 1e-6).all()


@given(st.integers(0, 10**6), st.floats(0.0, 4.0))
@settings(max_examples=25, deadline=None)
def test_the_range_of_logits_bounds_their_spread(seed, sharp):
    """c <= sinh(r / 2) and J <= r^2 / 8, of which the bounds are made."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * sharp
    weights, extent = logits.exp(), logits.max() - logits.min()
    assert weights.std(correction=0) / weights.mean() <= (extent / 2).sinh() + 1e-9
    assert 0 - 1e-9 <= weights.mean().log() - logits.mean() <= extent**2 / 8 + 1e-9


def test_errors_are_those_of_the_attention_that_they_describe():
    query, key, value, visible = (x.double() if x.is_floating_point() else x for x in problem(3))
    found = tail.tail_error(query, key, value, visible)
    keys, values, seen = (x.repeat_interleave(2, 1) for x in (key, value, visible))
    causal = torch.ones_like(seen[0, 0]).tril()
    for head, t in ((0, 39), (1, 20), (3, 7)):
        logits = (keys[0, head] @ query[0, head, t]) * 8**-0.5
        own, lost = seen[0, head, t], (causal & ~seen[0, head])[t]
        full = logits[: t + 1].softmax(0) @ values[0, head, : t + 1]
        dropped = logits[own].softmax(0) @ values[0, head, own]
        slot = keys[0, head, lost].mean(0) @ query[0, head, t] * 8**-0.5 + lost.sum().log()
        weights = torch.cat([logits[own], slot[None]]).softmax(0)
        folded = weights @ torch.cat([values[0, head, own], values[0, head, lost].mean(0, keepdim=True)])
        for key_, other in (("dropped", dropped), ("folded", folded)):
            torch.testing.assert_close(found[key_][0, head, t], (full - other).norm())


def test_folding_equal_keys_is_exact_and_dropping_is_not():
    query, key, value, visible = problem(0)
    found = tail.tail_error(query, key[:, :, :1].expand_as(key), value, visible)
    assert (
        found["folded"].max() < 1e-5 and found["bound_folded"].max() < 1e-2 and found["dropped"].max() > 0.1
    )


def test_equal_values_have_no_error_but_bounds_of_zero_stay_bounds():
    query, key, value, visible = problem(1, sharp=3.0)
    found = tail.tail_error(query, key, value[:, :, :1].expand_as(value), visible)
    assert within(found) and max(found[key].max() for key in ("dropped", "folded", "weighed")) < 1e-4


def test_nothing_lost_is_no_error():
    query, key, value, visible = problem(2)
    found = tail.tail_error(query, key, value, torch.ones_like(visible).tril())
    assert found["norm"].min() > 0 and all(found[key].abs().max() < 1e-5 for key in found if key != "norm")


# -- the ladder


def test_states_are_those_of_the_attention(model, ids):
    """Maps from the recorded queries and keys are the model's own."""
    maps = attention_maps(model, ids)
    for own, (query, key, value) in zip(maps, tail.states(model, ids)):
        assert value.shape == key.shape
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query @ keys.transpose(-1, -2)) * query.shape[-1] ** -0.5
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        found = logits.masked_fill(~causal, -torch.inf).softmax(-1).unflatten(1, (key.shape[1], -1)).mean(2)
        torch.testing.assert_close(found, own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["oracle", "oracle_summary"])
def test_an_oracle_with_room_for_all_is_the_full_cache(gpt2, ids, name):
    long = torch.cat([ids] * 2, 1)  # of maps that end where the cache would first evict
    cap = long.shape[1] + 1
    maps = torch.ones(2, 2, 4, cap + EVERY, cap + EVERY).tril()
    cache = why.foresight(gpt2, long, maps, cap)[name]
    torch.testing.assert_close(score(gpt2, long, cache), score(gpt2, long), atol=1e-4, rtol=1e-4)
    assert cache.evicted_tokens == 0


def test_all_tokens_chosen_anew_are_the_full_cache(gpt2, ids):
    maps = attention_maps(gpt2, ids)
    full = full_cache_logits(gpt2, ids, [None] * len(maps))
    torch.testing.assert_close(
        full_cache_logits(gpt2, ids, why.chosen_anew(maps, 1000)), full, atol=1e-3, rtol=1e-3
    )
    assert all((seen.sum(-1) <= 5).all() for seen in why.chosen_anew(maps, 5))


@given(st.integers(0, 10**6))
@settings(max_examples=10, deadline=None)
def test_at_one_eviction_no_policy_keeps_more_of_the_future_than_the_oracle(seed):
    from conftest import build

    import sketchkv

    gpt2 = sketchkv.enable(build("gpt2", 128))
    ids = torch.randint(1, 97, (1, CAP + EVERY), generator=torch.Generator().manual_seed(seed))
    future = torch.rand(2, 1, 4, 1, CAP + EVERY, generator=torch.Generator().manual_seed(seed))
    held = {}
    policies = {
        "oracle": [Oracle(layer) for layer in future],
        "random": Random(seed),
        "window": Window(),
        "mass": AttentionMass(),
    }
    for name, policy in policies.items():
        cache = SketchCache(gpt2.config, CAP, policy=policy)
        gpt2(ids, past_key_values=cache, use_cache=True)
        assert cache.stored_tokens() == [CAP, CAP]
        kept = [cache.kept_positions(layer)[..., :CAP] for layer in range(2)]
        held[name] = torch.stack([future[i][:, :, 0].gather(-1, at).sum(-1) for i, at in enumerate(kept)])
    assert all((held["oracle"] >= held[name] - 1e-5).all() for name in held)


def test_watched_in_chunks_is_watched_token_by_token(model, ids):
    caches = [SketchCache(model.config, CAP, policy=AttentionMass()) for _ in range(2)]
    (one, seen), (many, same) = (
        decode_and_watch(model, ids, c, chunk_size=n) for c, n in zip(caches, (1, EVERY))
    )
    torch.testing.assert_close(one, many, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(seen, same))


def test_what_is_bounded_alone(gpt2, ids):
    cache = SketchCache(gpt2.config, CAP, policy=AttentionMass())
    logits, visible = decode_and_watch(gpt2, ids, cache, chunk_size=EVERY)
    found = {(layer, head): nll for layer, head, nll in tail.alone(gpt2, ids, visible)}
    assert len(found) == 1 + 2 * 5
    torch.testing.assert_close(found[-1, -1], why._nll(logits, ids), atol=1e-3, rtol=1e-3)
    causal = [torch.ones_like(seen).tril() for seen in visible]
    full = score(gpt2, ids).mean(1)
    assert all(torch.allclose(nll, full, atol=1e-3) for *_, nll in tail.alone(gpt2, ids, causal))
    assert not torch.allclose(found[0, 1], full, atol=1e-3)


def test_steps_add_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    losses = pd.DataFrame(
        torch.rand(8, 5, generator=generator).double().numpy(), columns=list(why.LABELS)[2:7]
    )
    table = why.steps(losses)
    assert table.share.sum() == pytest.approx(1) and table["mean"].sum() == pytest.approx(
        losses.sketch.mean()
    )
    assert (table.low <= table["mean"]).all() and (table["mean"] <= table.high).all()
    other = why.steps(losses, why.OTHER_WAY)["mean"].sum()
    assert other == pytest.approx(
        table["mean"][1:3].sum()
    )  # both ways lead from the same place to the same place


def test_ratio_interval():
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert stats.ratio_interval(whole / 2, whole) == (0.5, 0.5, 0.5)
    ratio, low, high = stats.ratio_interval(torch.tensor([1.0, 0.0, 2.0, 1.0]), whole)
    assert ratio == 0.4 and low < ratio < high


def test_kinds_of_heads():
    assert [
        tail.head_kind(*x, 64) for x in ((0.6, 0.2, 3), (0.1, 0.7, 3), (0.2, 0.3, 20), (0.0, 0.1, 300))
    ] == list(tail.KINDS)
