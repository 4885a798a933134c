"""Slots in two precisions: against plain Python lists, and the cache against one whose slots are all alike."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, Sketch, SketchCache, Window, generate, score
from sketchkv.controller import AdaptiveCache, HeadPoolCache
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.quantize import coder
from sketchkv.study.methods import fit, make_cache
from sketchkv.tiers import TieredSlots, Tiers

SETTINGS = dict(bits=16, coarse_bits=4, recent_window=8, evict_every=5)
BATCH, HEADS, DIM = 2, 3, 16


def kept(cache):
    return [cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))]


# The slots


def by_hand(tokens, cap, extra, few, demote, importance):
    """Positions of the tokens that are fine and coarse, and events, after tokens 0, 1, ... entered one by one. few: how many
    may stay fine; importance: ranks by event and position."""
    fine, coarse, event = set(), set(), 0
    for token in range(tokens):
        fine.add(token)
        if len(fine) < few + extra:
            continue
        if len(fine | coarse) == cap + extra:
            gone = sorted(fine | coarse, key=lambda p: importance[event][p])[:extra]
            fine, coarse = fine - set(gone), coarse - set(gone)
        least = sorted(fine, key=lambda p: p if demote == "age" else importance[event][p])
        moved = set(least[: min(len(fine) - few, cap - few - len(coarse))])
        fine, coarse, event = fine - moved, coarse | moved, event + 1
    return fine, coarse, event


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.floats(0.1, 0.9), st.sampled_from(["age", "importance"]), st.integers(0, 40),
       st.integers(0, 2**31))  # fmt: skip
def test_who_is_demoted_and_who_leaves(cap, extra, fine, demote, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    tiers = Tiers((2, 2), fine, demote)
    slots = TieredSlots(BATCH, HEADS, cap + extra, DIM, torch.float32, "cpu", 1, (16, 16), "range", tiers, cap)
    slots.add("mass", torch.float32, 2)
    importance = torch.stack([torch.randperm(BATCH * HEADS * 41, generator=generator) for _ in range(41)])
    importance = importance.view(41, BATCH, HEADS, 41)
    keys = torch.randn(BATCH, HEADS, 41, DIM, generator=generator).half().float()
    event = seen = 0
    while seen < tokens:
        now = slice(seen, min(seen + slots.room, tokens))
        new = slots.append(keys[:, :, now], -keys[:, :, now], torch.arange(now.start, now.stop, dtype=torch.int32))
        slots.arrays["mass"][:, :, new] = torch.arange(now.start, now.stop)[:, None].float()
        seen = now.stop
        if slots.room:
            continue
        ranks = importance[event].gather(-1, slots["positions"].long())
        if slots.used == slots.capacity:
            slots.evict(ranks.topk(extra, largest=False).indices, ranks)
            assert slots.used == slots.kept == cap
        else:
            slots.demote(ranks)
        event += 1
    border, coder_ = slots.coarse.used, coder(2, DIM, "range", "cpu")
    for b in range(BATCH):
        for h in range(HEADS):
            expected = by_hand(tokens, cap, extra, cap - slots.most, demote, importance[:, b, h].tolist())
            found = slots["positions"][b, h].tolist()
            assert len(found) == len(set(found)) == slots.used
            assert (set(found[border:]), set(found[:border]), event) == expected
    # What belongs to a token moved with it: fine ones as they came, coarse ones rounded once.
    positions = slots["positions"].long()
    assert torch.equal(slots["mass"], positions[..., None].expand(*positions.shape, 2).float())
    true = keys.gather(2, positions[..., None].expand(*positions.shape, DIM))
    rounded = coder_.decode(*coder_.encode(true), torch.float32)
    assert torch.equal(slots["keys"][:, :, border:], true[:, :, border:])
    assert torch.equal(slots["keys"][:, :, :border], rounded[:, :, :border])
    index = torch.randint(max(slots.used, 1), (BATCH, HEADS, 7), generator=generator)
    for name in ("keys", "values") if slots.used else ():
        assert torch.equal(slots.take(name, index), slots[name].gather(2, index[..., None].expand(*index.shape, DIM)))
        for part in (slice(0, 1), slice(slots.used - 1, slots.used), slice(1, slots.used)):
            assert torch.equal(slots.read(name, part), slots[name][:, :, part])
        assert torch.equal(slots.context(name)[:, :, 1:], slots[name])
    assert (slots.positions[:, :, slots.used :] == -1).all()


def test_memory_stays_where_it_is_and_is_counted():
    slots = TieredSlots(1, 2, 40, 32, torch.float32, "cpu", 0, (5, 4), "normal", Tiers((3, 2), 0.25, "age"), 36)
    slots.add("mass", torch.float32)
    addresses = {name: array.data_ptr() for name, array in slots.arrays.items()}
    x = torch.randn(1, 2, 40, 32)
    while slots.used < 40 and not slots.kept == 36:
        now = slice(slots.used, slots.used + slots.room)
        slots.append(x[:, :, now], x[:, :, now], torch.arange(now.start, now.stop, dtype=torch.int32))
        if slots.used == slots.capacity:
            slots.evict(torch.tensor([[[0, 3, 7, 39], [36, 37, 38, 39]]]), torch.zeros(1, 2, 40, dtype=torch.int64))
        elif not slots.room:
            slots.demote(slots["positions"].long())
    slots.recentre(0)
    assert slots.centre.abs().max() > 0 and slots.centre is slots.coarse.centre
    slots.reorder(torch.tensor([0]))
    slots.clear()
    assert {name: array.data_ptr() for name, array in slots.arrays.items()} == addresses
    assert slots.used == slots.coarse.used == 0 and (slots.positions == -1).all() and not slots.centre.any()
    fine, coarse = 36 // 4 + 4, 27 + 1
    assert slots.nbytes(*slots.kv) == 2 * (fine * (20 + 16 + 2 * 2) + coarse * (12 + 8 + 2 * 2))


# The cache


@pytest.mark.parametrize("policy", [AttentionMass(), Window(), Sketch(width=64, depth=2)])
@pytest.mark.parametrize("demote", ["age", "importance"])
def test_equal_bits_are_plain_slots(gpt2, ids, demote, policy):
    plain, tiers = (
        SketchCache(gpt2.config, 32, policy=copy.deepcopy(policy), **SETTINGS | dict(coarse_bits=coarse, demote=demote, summary_slots=1))
        for coarse in (None, 16)
    )  # fmt: skip
    expected, got = (score(gpt2, ids, cache, return_logits=True)[1] for cache in (plain, tiers))
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=0)
    assert all(map(torch.equal, kept(tiers), kept(plain))) and tiers.evicted_tokens == plain.evicted_tokens > 0


@pytest.mark.parametrize("settings", [
    dict(), dict(demote="age", fine=0.5), dict(bits=(5, 4), coarse_bits=(3, 2), summary_slots=2), dict(attend_topk=24),
    dict(bits=8, quantizer="range", policy=Sketch(width=64, depth=2)),
], ids=str)  # fmt: skip
def test_token_by_token_equals_chunks_equals_at_once(gpt2, ids, settings):
    settings = SETTINGS | {"policy": AttentionMass()} | settings

    def run(chunk):
        cache = SketchCache(gpt2.config, 32, **copy.deepcopy(settings))
        return score(gpt2, ids, cache, chunk_size=chunk), cache

    expected, cache = run(1)
    assert cache.evicted_tokens > 0
    for chunk in (7, 100):
        nll, again = run(chunk)
        assert (nll - expected).abs().median() < 1e-3
        assert torch.cat(kept(again)).eq(torch.cat(kept(cache))).float().mean() > 0.95
        assert again.nbytes() == cache.nbytes()


def test_importance_keeps_sinks_and_the_recent_window_fine(gpt2, ids):
    cache = SketchCache(gpt2.config, 40, fine=0.5, policy=AttentionMass(), **SETTINGS)
    score(gpt2, ids, cache)
    slots = cache.layers[0].slots
    positions = slots["positions"]
    at_eviction = positions[:, :, : slots.kept].amax()
    for p in (*range(4), *range(at_eviction - 7, at_eviction + 1)):
        assert (positions[:, :, slots.coarse.used :] == p).any(-1).all()


def test_bounded_equals_masked_full_cache_where_rounding_does_not_show(model, ids):
    cache = SketchCache(model.config, 32, policy=AttentionMass(), **SETTINGS | dict(coarse_bits=16))
    logits, visible = decode_and_watch(model, ids, cache)
    difference = (logits - full_cache_logits(model, ids, visible)).abs()
    assert difference.median() < 5e-3 and difference.max() < 0.5 * logits.std()


def test_coarser_bits_lose_more_than_fine_ones(gpt2, ids):
    def far(**settings):
        cache = SketchCache(gpt2.config, 32, policy=Window(), **SETTINGS | settings)
        return (score(gpt2, ids, cache) - exact).abs().mean()

    exact = score(gpt2, ids, SketchCache(gpt2.config, 32, policy=Window(), **SETTINGS | dict(coarse_bits=None)))
    some, more, all_ = far(coarse_bits=2, fine=0.75), far(coarse_bits=2, fine=0.25), far(bits=2, coarse_bits=None)
    assert 0 < some < more < all_


def test_two_texts_padding_and_beams(model, ids, padding):
    padded, mask = padding

    def fresh():
        return SketchCache(model.config, 32, policy=AttentionMass(), **SETTINGS)

    cache = fresh()
    first = score(model, ids[:1], cache)
    cache.reset()
    second = score(model, ids[1:], cache)
    for text, nll in ((ids[:1], first), (ids[1:], second)):
        assert torch.equal(score(model, text, fresh()), nll)
    results = []
    for token in (0, 55):  # whatever the padding tokens are
        cache = fresh()
        results.append((generate(model, padded.where(mask == 1, token), cache, 20, attention_mask=mask)[:, 100:], *kept(cache)))
    assert all(map(torch.equal, *results))
    cache = fresh()
    generate(model, ids, cache, 3)
    before = [cache.kept_positions(layer) for layer in range(2)]
    cache.reorder_cache(torch.tensor([1, 1]))
    for layer, positions in enumerate(before):
        slots = cache.layers[layer].slots
        assert torch.equal(slots["positions"], positions[[1, 1], :, : slots.used])
        assert torch.equal(slots["keys"][0], slots["keys"][1])


@pytest.mark.parametrize("changes, message", [
    (dict(bits=None), "bits=None"), (dict(bits=3), "no more than bits"), (dict(coarse_bits=6), "bits=6"),
    (dict(coarse_bits=(3, 3, 3)), "pair"), (dict(fine=1.0), "fine"), (dict(fine=0), "fine"), (dict(fine="most"), "fine"),
    (dict(demote="size"), "age, importance"),
])  # fmt: skip
def test_bad_settings(gpt2, changes, message):
    with pytest.raises(ValueError, match=message):
        SketchCache(gpt2.config, 64, **SETTINGS | changes)


def test_what_it_cannot_be_combined_with(gpt2):
    with pytest.raises(ValueError, match="coarse_bits"):
        AdaptiveCache(gpt2.config, 64, bits=8, coarse_bits=4)
    with pytest.raises(TypeError, match="coarse_bits"):
        HeadPoolCache(gpt2.config, 64, coarse_bits=4)


def test_from_a_dict_that_json_can_hold(gpt2):
    method = dict(method="compact", bits=[5, 4], coarse_bits=[3, 2], fine=0.3, demote="age")
    sizes = {}
    for budget in (30_000, 50_000):
        cap = fit(gpt2.config, budget, **method)
        for more in (0, 1):
            cache = make_cache(gpt2.config, max_cache_size=cap + more, **method)
            score(gpt2, torch.ones(1, 200, dtype=torch.long), cache)
            sizes[more] = cache.nbytes()["total"]
        assert sizes[0] <= budget < sizes[1]
