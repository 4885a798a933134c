"""Why a cache loses: the ladder's ends, its steps, and layers bounded alone."""

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, Random, SketchCache, Window, score
from sketchkv.oracle import decode_and_watch
from sketchkv.study import stats, why
from sketchkv.study.attention_analysis import Oracle, attention_maps, states

CAP, EVERY = 32, why.EVERY


def test_states_are_those_of_the_attention(model, ids):
    """Maps from the recorded queries and keys are the model's own."""
    maps = attention_maps(model, ids)
    for own, (query, key, value) in zip(maps, states(model, ids)):
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


def ladder_table():
    generator = torch.Generator().manual_seed(0)
    names = [*why.LABELS][:-1]
    return pd.DataFrame(
        (name, slots, document, torch.rand(1, generator=generator).item())
        for name in names
        for slots in (24, 32)
        for document in range(8)
    ).set_axis([*why.COLUMNS], axis=1)


def test_steps_add_up_to_the_whole():
    table = ladder_table()
    worth = why.steps(table)
    assert set(worth) == set(why.STEP_COLUMNS)
    for slots, part in worth.groupby("slots"):
        whole = table[(table.slots == slots) & (table.method == "sketch")].loss.mean()
        assert part.share.sum() == pytest.approx(1) and part["mean"].sum() == pytest.approx(whole)
        assert (part.low <= part["mean"]).all() and (part["mean"] <= part.high).all()


def test_ratio_interval():
    whole = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert stats.ratio_interval(whole / 2, whole) == (0.5, 0.5, 0.5)
    ratio, low, high = stats.ratio_interval(torch.tensor([1.0, 0.0, 2.0, 1.0]), whole)
    assert ratio == 0.4 and low < ratio < high
