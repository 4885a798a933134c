"""The self-tuned policy on made-up attention, where the right decay and window are known."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, SketchCache, generate, score
from sketchkv.self_tuning import SelfTuned
from sketchkv.slots import Slots
from sketchkv.study.methods import make_cache

EVERY = 16


def kept(cache):
    return [cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))]


def watch(policy, weigh, tokens=2000, cap=256, batch=1, heads=4):
    """The policy after `tokens` tokens, and its slots: the attention of query t on the tokens at `positions` (`[batch, heads,
    used]`) is in proportion to `weigh(t, positions)`."""
    slots = Slots(batch, heads, cap + EVERY, 8, torch.float32, "cpu")
    policy.allocate(slots)
    empty = torch.zeros(batch, heads, 1, 8)
    for t in range(tokens):
        new = slots.append(empty, empty, torch.full((batch, 1), t, dtype=torch.int32))
        policy.enter(slots, new, None)
        weights = weigh(t, slots["positions"].long())
        policy.observe(slots, (weights / weights.sum(-1, keepdim=True))[:, :, None])
        if slots.used == slots.capacity:
            slots.evict(policy.score(slots, t + 1).topk(EVERY, largest=False).indices)
    return policy, slots


def test_attention_that_lasts_wants_a_long_memory_and_attention_that_drifts_a_short_one():
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(2000, generator=generator).exp()
    phase = torch.rand(2000, generator=generator) * 6.28

    def lasting(t, positions):  # the same for ever, but each query looks at few
        return worth[positions] * (torch.rand(positions.shape, generator=generator) < 0.03) + 1e-4

    def drifting(t, positions):  # everyone has its turn, for some forty queries in two hundred
        return (6 * torch.sin(t / 32 + phase[positions])).exp()

    for weigh, right in ((lasting, 0.998), (drifting, 0.9)):
        policy, _ = watch(SelfTuned((0.97, 0.9, 0.998), least=0, most=0), weigh)
        assert (policy.rates[policy.choice()] == right).float().mean() >= 0.75, (right, policy.losses)


@pytest.mark.parametrize("reach, low, high", [(4, 0, 16), (40, 32, 64)])
def test_the_window_reaches_as_far_as_local_attention(reach, low, high):
    """Tokens wait unseen until an age at which they are looked at: no score of the past can know that, the window must."""
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(2000, generator=generator).exp()

    def weigh(t, positions):
        age = t - positions
        late = (age >= reach - 4) & (age <= reach)
        return 0.1 * worth[positions] * (age > 64) + 1e-4 + 5.0 * late

    policy, slots = watch(SelfTuned(least=0, most=64), weigh)
    window = policy.window(slots)
    assert (window >= low).all() and (window <= high).all(), window


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1.0, 0.99, 0.9]), st.booleans(), st.integers(1, 7), st.integers(0, 2**31))
def test_one_decay_is_attention_mass(decay, value_norm, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = [Slots(2, heads, 40, 8, torch.float32, "cpu") for _ in range(2)]
    policies = SelfTuned((decay,), least=0, most=0, value_norm=value_norm), AttentionMass(decay, True, value_norm)
    for policy, each in zip(policies, slots):
        policy.allocate(each)
    for start in range(0, 100, 10):
        values = torch.randn(2, heads, 10, 8, generator=generator)
        attention = torch.rand(2, heads, 10, slots[0].used + 10, generator=generator)
        scores = []
        for policy, each in zip(policies, slots):
            policy.enter(each, each.append(values, values, torch.arange(start, start + 10, dtype=torch.int32)), None)
            policy.observe(each, attention)
            scores.append(policy.score(each, start + 10))
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
        if slots[0].used == 40:
            for each in slots:
                each.evict(scores[1].topk(10, largest=False).indices)


def test_one_decay_keeps_what_attention_mass_keeps(model, ids):
    caches = [SketchCache(model.config, 32, policy=policy) for policy in (SelfTuned((0.99,), least=0, most=0), AttentionMass())]
    for cache in caches:
        score(model, ids, cache)
    assert all(map(torch.equal, *map(kept, caches))) and caches[0].evicted_tokens > 0


CACHE = dict(num_sinks=2, recent_window=4, evict_every=4)


def fresh(model, **settings):
    return SketchCache(model.config, 70, policy=SelfTuned((0.9, 0.99), least=0, most=16, **settings), **CACHE)


@pytest.mark.parametrize("chunk", [7, 100])
def test_token_by_token_equals_chunks(model, ids, chunk):
    one, many = fresh(model), fresh(model)
    expected, nll = score(model, ids, one, chunk_size=1), score(model, ids, many, chunk_size=chunk)
    torch.testing.assert_close(nll, expected, atol=1e-4, rtol=0)
    assert all(map(torch.equal, kept(one), kept(many))) and one.evicted_tokens > 0
    for a, b in zip(one.layers, many.layers):
        torch.testing.assert_close(a.policy.losses, b.policy.losses, atol=1e-4, rtol=1e-3)
        assert a.policy.losses.amax() > 0


def test_two_texts_in_a_row_beams_and_padding(gpt2, ids, padding):
    cache = fresh(gpt2, value_norm=True)
    first = score(gpt2, ids[:1], cache)
    state = [tensor.data_ptr() for tensor in cache.layers[0].policy.tensors()]
    cache.reset()
    assert not cache.layers[0].policy.losses.any() and [t.data_ptr() for t in cache.layers[0].policy.tensors()] == state
    second = score(gpt2, ids[1:], cache)
    for text, nll in ((ids[:1], first), (ids[1:], second)):
        assert torch.equal(score(gpt2, text, fresh(gpt2, value_norm=True)), nll)
    both = fresh(gpt2)
    torch.testing.assert_close(score(gpt2, ids, both), torch.cat([score(gpt2, row[None], fresh(gpt2)) for row in ids]), atol=1e-4, rtol=0)
    before = copy.deepcopy(both.layers[0].policy.losses)
    both.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(both.layers[0].policy.losses, before[[1, 1]])
    padded, mask = padding
    out = [generate(gpt2, padded.where(mask == 1, token), fresh(gpt2), 20, attention_mask=mask)[:, 100:] for token in (0, 55)]
    assert torch.equal(*out)


def test_bytes(gpt2, ids):
    tuned, plain = (SketchCache(gpt2.config, 70, policy=policy, **CACHE) for policy in (SelfTuned((0.9, 0.99), most=32), AttentionMass()))
    for cache in (tuned, plain):
        score(gpt2, ids, cache)
    slots, heads = 2 * 4 * 74, 2 * 4  # batch, heads
    own = slots * (2 * 4 + 4 + 4) + heads * (2 + 2 * 3) * 4 + 2 * 4
    assert tuned.nbytes()["policy"] - plain.nbytes()["policy"] == 2 * (own - 4 * slots)


def test_bad_settings(gpt2):
    for settings in (dict(decays=()), dict(decays=(0.9, 1.1)), dict(least=8), dict(most=20), dict(least=32, most=16)):
        with pytest.raises(ValueError, match="decay|least"):
            SelfTuned(**settings)
    cache = make_cache(gpt2.config, "self_tuned", max_cache_size=64, decays=[0.9, 0.99], most=32)
    assert isinstance(cache.layers[0].policy, SelfTuned)
