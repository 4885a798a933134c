"""What the policies remember, against arithmetic done the slow way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import (
    LRU,
    TOVA,
    AttentionMass,
    CountMinSketch,
    KeyNorm,
    Random,
    Sketch,
    SketchCache,
    SnapKV,
    Window,
    score,
)
from sketchkv.policies import exposure
from sketchkv.slots import Plain, Slots


def drive(policy, blocks, seed=0, tokens=24, heads=2):
    """Feeds random attention for `tokens` tokens in blocks of the given sizes; returns slots, and attention by token."""
    slots = Slots((1, heads), tokens, (8, 8), Plain(torch.float32, "cpu"))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, heads, tokens, 8, generator=generator)
    attention = torch.rand(1, heads, tokens, tokens, generator=generator).tril()
    policy.allocate(slots)
    start = 0
    for block in blocks:
        now = slice(start, start + block)
        new = slots.append(keys[:, :, now], keys[:, :, now], torch.arange(tokens)[None, now].int())
        policy.enter(slots, new, torch.arange(tokens)[None, now] % 5)
        policy.observe(slots, attention[:, :, now, : now.stop])
        start = now.stop
    return slots, attention


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("mean", [False, True])
def test_attention_mass_is_the_discounted_sum(decay, mean):
    slots, attention = drive(AttentionMass(decay, mean), [24])
    policy = AttentionMass(decay, mean)
    got = policy.score(slots, 24)[0]
    for head in range(2):
        for token in range(24):
            queries = range(token, 24)
            weights = [decay ** (23 - q) for q in queries]
            expected = sum(w * attention[0, head, q, token] for w, q in zip(weights, queries))
            expected = expected / sum(weights) if mean else expected
            assert abs(got[head, token] - expected) < 1e-4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.sampled_from([1.0, 0.95]))
def test_blocks_equal_single_steps(blocks, decay):
    total = sum(blocks)
    for policy in (AttentionMass(decay), Sketch(64, 3, key="token", decay=decay)):
        at_once, _ = drive(policy, [total], tokens=total)
        expected = policy.score(at_once, total)
        in_blocks, _ = drive(policy, blocks, tokens=total)
        torch.testing.assert_close(policy.score(in_blocks, total), expected)


def test_exposure():
    age = torch.arange(1, 50)
    assert torch.equal(exposure(age, 1), age.float())
    slow = torch.stack([sum(torch.tensor(0.9) ** i for i in range(int(a))) for a in age])
    torch.testing.assert_close(exposure(age, 0.9), slow)


@pytest.mark.parametrize("key", Sketch.KEYS)
def test_wide_sketch_equals_exact_sums_per_key(key):
    policy = Sketch(width=2**16, depth=4, key=key, decay=0.9, mean=False)
    slots, _ = drive(policy, [24])
    items, mass = policy.signatures(slots).clone(), slots["mass"].clone()
    expected = ((items[..., None] == items[..., None, :]) * mass[..., None, :]).sum(-1)
    torch.testing.assert_close(policy.score(slots, 24), expected)
    assert not slots["mass"].any()  # moved, not copied: nothing is counted twice
    distinct = {"token": 5, "position": 24}.get(key)
    assert distinct is None or len(items.unique()) == distinct


def test_evicted_tokens_are_remembered():
    """A key that comes back after its token was evicted finds its history; an exact accumulator starts from zero."""
    sketch, exact = Sketch(key="token", decay=1.0, mean=False), AttentionMass(decay=1.0, mean=False)
    for policy, remembers in ((sketch, True), (exact, False)):
        slots, _ = drive(policy, [24])
        policy.score(slots, 24)
        slots.evict(torch.arange(20)[None, None].expand(1, 2, 20))
        zeros = torch.zeros(1, 2, 1, 8)
        slots.append(zeros, zeros, torch.tensor([[24]]).int())
        policy.enter(slots, slice(4, 5), torch.tensor([[2]]))
        newcomer = policy.score(slots, 25)[..., 4]
        assert (newcomer > 1).all() if remembers else (newcomer == 0).all()


def test_lsh_key_depends_on_direction_only():
    policy = Sketch(key="lsh", lsh_bits=16)
    slots = Slots((1, 1), 4, (8, 8), Plain(torch.float32, "cpu"))
    policy.allocate(slots)
    vector = torch.randn(8, generator=torch.Generator().manual_seed(0))
    keys = torch.stack(
        [vector, 3 * vector, -vector, torch.randn(8, generator=torch.Generator().manual_seed(1))]
    )
    policy.enter(slots, slots.append(keys[None, None], keys[None, None], torch.arange(4)[None].int()), None)
    same, longer, opposite, other = policy.signatures(slots)[0, 0].tolist()
    assert same == longer and opposite == 2**16 - 1 - same and other not in (same, opposite)


def test_token_key_needs_token_ids(gpt2, ids):
    with pytest.raises(ValueError, match='key="lsh"'):
        gpt2(
            inputs_embeds=gpt2.transformer.wte(ids),
            past_key_values=SketchCache(gpt2.config, 64, policy=Sketch(key="token")),
        )


def test_window_keeps_the_newest_and_the_sinks(gpt2, ids):
    cache = SketchCache(gpt2.config, 32, policy=Window(), evict_every=1, recent_window=8)
    score(gpt2, ids, cache)
    kept = cache.kept_positions(0)[..., :32].sort(-1).values
    expected = torch.cat([torch.arange(4), torch.arange(72, 100)])
    assert torch.equal(kept, expected.expand_as(kept))


def test_protection_is_the_same_for_all_policies(gpt2, ids):
    for policy in (Window(), Random(), AttentionMass(), Sketch(), Sketch(key="token")):
        cache = SketchCache(gpt2.config, 40, policy=policy, evict_every=4, num_sinks=6, recent_window=10)
        score(gpt2, ids, cache)
        for layer in range(2):
            kept = cache.kept_positions(layer)
            for position in [*range(6), *range(90, 100)]:
                assert (kept == position).any(-1).all()


def test_random_is_seeded_and_differs_between_layers_and_seeds(gpt2, ids):
    def kept(seed):
        cache = SketchCache(gpt2.config, 40, policy=Random(seed))
        score(gpt2, ids, cache)
        return [cache.kept_positions(layer) for layer in range(2)]

    first, again, other = kept(0), kept(0), kept(1)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0]) and not torch.equal(*first)


def test_sketch_shares_hash_functions_but_not_counters(gpt2, ids):
    cache = SketchCache(gpt2.config, 40, policy=Sketch(width=64, depth=2))
    score(gpt2, ids, cache)
    table = cache.layers[0].policy.sketches[0].table
    assert table.shape == (2, 4, 2, 64) and not torch.equal(table[0], table[1])
    # Every row of a sketch holds the same total: what all queries since the start gave away, discounted.
    torch.testing.assert_close(table.sum(-1)[..., 0], table.sum(-1)[..., 1])
    assert isinstance(cache.layers[0].policy.sketches[0], CountMinSketch)


def test_lru_is_the_last_query_that_cared():
    policy = LRU()
    slots, attention = drive(policy, [5, 1, 7, 11])
    share = 1 / torch.arange(1, 25)
    for head in range(2):
        for token in range(24):
            cared = [q for q in range(token, 24) if attention[0, head, q, token] > share[q]]
            assert slots["last_used"][0, head, token] == max([token, *cared])


def test_tova_scores_are_the_last_query_mean_over_heads():
    policy = TOVA()
    slots, attention = drive(policy, [20, 4])
    expected = attention[0, :, 23].mean(0)
    torch.testing.assert_close(policy.score(slots, 24)[0], expected.expand(2, 24))


def test_snapkv_smooths_over_neighbours_in_the_text_not_in_the_slots():
    policy = SnapKV(kernel=3, observation_window=5)
    slots, attention = drive(policy, [24])
    mass = attention[0, :, 19:].sum(1)
    expected = torch.stack([mass[:, max(0, i - 1) : i + 2].mean(1) for i in range(24)], 1)
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    for name in ("positions", "mass"):
        slots.arrays[name] = slots.arrays[name][..., shuffle]
    torch.testing.assert_close(policy.score(slots, 24)[0], expected[:, shuffle])
    assert not slots["mass"].any()


@pytest.mark.parametrize("blocks", [[24], [10, 14], [20, 1, 3], [21, 3]])
def test_snapkv_listens_to_the_last_queries_however_they_arrive(blocks):
    slots, attention = drive(SnapKV(observation_window=5), blocks)
    torch.testing.assert_close(slots["mass"][0], attention[0, :, 19:].sum(1))


def test_key_norm_prefers_short_keys():
    slots, _ = drive(KeyNorm(), [24])
    order = KeyNorm().score(slots, 24).argsort(-1, descending=True)
    norms = slots.arrays["keys"].norm(dim=-1).gather(-1, order)
    assert (norms.diff() >= 0).all()
