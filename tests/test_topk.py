"""Attention over the highest-ranked stored tokens, against a full cache masked by a ranking done the slow way."""

import copy

import pytest
import torch

from sketchkv import H2O, AttentionMass, Random, SketchCache, Window, score
from sketchkv.oracle import decode_and_watch, full_cache_logits

SINKS, RECENT, CAP, TOPK, EVERY = 4, 8, 32, 18, 5
POLICIES = {
    "default": None,
    "H2O": H2O(),
    "decayed mean": AttentionMass(),
    "random": Random(),
    "window": Window(),
}


def topk_cache(model, policy="default", topk=TOPK):
    return SketchCache(
        model.config,
        CAP,
        num_sinks=SINKS,
        recent_window=RECENT,
        evict_every=EVERY,
        attend_topk=topk,
        policy=copy.deepcopy(POLICIES[policy]),
    )


def record_scores(cache):
    """Writes down what each layer's policy says at each eviction: per layer, a list of (seen, positions, scores)."""
    records = []
    for layer in cache.layers:
        records.append([])

        def watched(slots, seen, score=layer.policy.score, record=records[-1]):
            # Keys that share a sketch entry share a score: the newer token wins, so that the ranking is one.
            scores = score(slots, seen).double() + 1e-9 * slots["positions"]
            record.append((seen, slots["positions"].tolist(), scores.tolist()))
            return scores

        layer.policy.score = watched
    return records


def hide_low_ranks(visible, records, first=(0, 0)):
    """Takes from `visible` what is not among the `TOPK` highest of its row and head; `first`: position of each row's
    first real token. Returns how many entries that changed."""
    before = sum(int(layer.sum()) for layer in visible)
    for layer, record in zip(visible, records):
        ends = [seen for seen, _, _ in record[1:]] + [layer.shape[-1]]
        for (seen, positions, scores), end in zip(record, ends):
            for row, begin in enumerate(first):
                for head in range(layer.shape[1]):
                    ranked = []
                    for position, value in zip(positions[row][head], scores[row][head]):
                        if position >= 0:
                            protected = position < begin + SINKS or position >= seen - RECENT
                            ranked.append((protected, value, position))
                    for _, _, position in sorted(ranked, reverse=True)[TOPK:]:
                        layer[row, head, seen:end, position] = False
    return before - sum(int(layer.sum()) for layer in visible)


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_full_cache_masked_to_the_highest_ranks(model, ids, policy):
    cache = topk_cache(model, policy)
    records = record_scores(cache)
    logits, visible = decode_and_watch(model, ids, cache)
    assert hide_low_ranks(visible, records) > 0
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-4, rtol=0)
    # Just after an eviction a query sees exactly k stored tokens and itself, the newest of the window among them.
    evictions = [seen for seen, _, _ in records[0]]
    for seen in evictions[:-1]:
        assert (visible[0][:, :, seen].sum(-1) == TOPK + 1).all()
        assert visible[0][:, :, seen, :SINKS].all() and visible[0][:, :, seen, seen - RECENT : seen + 1].all()


def test_padding_is_no_stored_token(model, padding):
    padded, mask = padding
    cache = topk_cache(model)
    records = record_scores(cache)
    logits, visible = decode_and_watch(model, padded, cache, mask)
    assert hide_low_ranks(visible, records, first=(0, 23)) > 0
    expected = full_cache_logits(model, padded, visible, mask)
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, 23:], expected[1, 23:], atol=1e-4, rtol=0)


def test_leaving_tokens_out_changes_something_and_costs_one_byte_per_slot(gpt2, ids):
    caches = [topk_cache(gpt2, "window", topk) for topk in (None, CAP, TOPK)]
    everything, cap, fewer = (score(gpt2, ids, cache) for cache in caches)
    assert torch.equal(everything, cap)
    assert (everything - fewer)[:, CAP + EVERY :].abs().max() > 1e-2
    assert torch.equal(
        everything[:, : CAP + EVERY - 1], fewer[:, : CAP + EVERY - 1]
    )  # before the first eviction
    assert caches[2].nbytes()["policy"] - caches[0].nbytes()["policy"] == 2 * 2 * 4 * (CAP + EVERY)
    assert caches[0].nbytes() == caches[1].nbytes()


@pytest.mark.parametrize(
    "topk, message",
    [
        (SINKS + RECENT, "raise it above 12"),
        (0, "attend_topk"),
        (20.0, "whole number"),
        (CAP + 1, "more than max_cache_size=32, all that an eviction leaves: lower it, or leave it out"),
    ],
)
def test_bad_settings(gpt2, topk, message):
    with pytest.raises(ValueError, match=message):
        topk_cache(gpt2, topk=topk)


def test_with_one_cap_per_layer_the_largest_binds(gpt2):
    cache = SketchCache(gpt2.config, [24, 40], attend_topk=30)
    assert [layer.selective for layer in cache.layers] == [False, True]
    with pytest.raises(ValueError, match="more than max_cache_size=40"):
        SketchCache(gpt2.config, [24, 40], attend_topk=41)
