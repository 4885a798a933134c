"""Prompts that pass in large chunks: few evictions, slots for one layer at a time, and the same oracle as everywhere."""

import pytest
import torch
from conftest import build
from test_cache import kept

import sketchkv
from sketchkv import H2O, AttentionMass, SketchCache, SnapKV, Summary, Window, generate, score
from sketchkv.oracle import decode_and_watch, full_cache_logits

POLICIES = {
    "default": None,
    "H2O": H2O(),
    "decayed mean": AttentionMass(),
    "window": Window(),
    "SnapKV": SnapKV(kernel=3),
}


def bounded(model, cap=24, chunk=20, **settings):
    settings = {"num_sinks": 2, "recent_window": 6, "evict_every": 4, "prefill_chunk": chunk} | settings
    return SketchCache(model.config, cap, **settings)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", ["gpt2", "llama"], indirect=True)
def test_equals_the_masked_full_cache(model, ids, policy):
    cache = bounded(model, policy=POLICIES[policy])
    logits, visible = decode_and_watch(model, ids, cache, chunk_size=20)
    assert cache.evicted_tokens == 2 * 76 and cache.stored_tokens() == [24, 24]
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-4, rtol=0)
    assert (
        logits[:, 60:] - model(ids).logits[:, 60:]
    ).abs().max() > 1e-2  # evicting must have changed something


@pytest.mark.parametrize(
    "settings", [{}, {"summary": Summary(2)}, {"bits": (5, 4), "summary": Summary()}, {"attend_topk": 16}]
)
def test_equals_a_cache_that_always_evicts_as_seldom(ids, settings):
    """cap + chunk tokens at once: both evict at the end, and decode alike up to the next eviction."""
    model = sketchkv.enable(build("llama"))
    cache, seldom = bounded(model, **settings), bounded(model, chunk=None, evict_every=20, **settings)
    for part in (ids[:, :44], ids[:, 44:45], ids[:, 45:46]):
        found, expected = (model(part, past_key_values=c).logits for c in (cache, seldom))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        stored = cache.stored_tokens()[0]
        assert (
            torch.equal(kept(cache)[..., -stored:], kept(seldom)[..., -stored:])
            and seldom.stored_tokens()[0] == stored
        )
    assert cache.evicted_tokens > 0


def test_holds_cap_and_chunk_in_one_layer_and_the_cap_after(ids):
    model, most = sketchkv.enable(build("gpt2")), []
    cache = bounded(model, chunk=32)

    class Watch(Window):
        def score(self, slots, seen):
            most.append([layer.slots.capacity if layer.slots else 0 for layer in cache.layers])
            return super().score(slots, seen)

    for layer in cache.layers:
        layer.policy = Watch()
    model(ids, past_key_values=cache)
    # The first 56 tokens fill cap + chunk, the next 32 do again, the last 12 end with the call.
    assert most[:3] == [[56, 0], [56, 0], [36, 0]] and most[3:] == [[28, 56], [28, 56], [28, 36]]
    assert [layer.slots.capacity for layer in cache.layers] == [28, 28] and cache.stored_tokens() == [24, 24]
    model(ids[:, :4], past_key_values=cache)  # as many as lie between two evictions: decoded, not a prompt
    assert len(most) == 8 and most[6] == [28, 28]


def test_addresses_and_bytes_stay(ids):
    model = sketchkv.enable(build("llama"))
    cache = bounded(model, summary=Summary(2))
    model(ids[:, :3], past_key_values=cache)
    at, held = [a.data_ptr() for a in cache.layers[0].slots.arrays.values()], cache.nbytes()
    for _ in range(2):
        model(ids, past_key_values=cache)
        assert [a.data_ptr() for a in cache.layers[0].slots.arrays.values()] == at and cache.nbytes() == held
        assert cache.layers[0].summary.counts.sum() > 0
        cache.reset()


def test_padding_goes_first(model, padding):
    padded, mask = padding
    cache = bounded(model, cap=40, chunk=40)
    tokens = generate(model, padded, cache, 8, attention_mask=mask)
    positions = kept(cache)
    assert not ((positions[:, 1] >= 0) & (positions[:, 1] < 23)).any() and tokens.shape == (2, 108)
    alone = generate(model, padded[:1], bounded(model, cap=40, chunk=40), 8)
    assert torch.equal(tokens[:1], alone)


def test_scores_are_those_of_decoding(gpt2, ids):
    cache, expected = bounded(gpt2), bounded(gpt2, chunk=None)
    torch.testing.assert_close(score(gpt2, ids, cache), score(gpt2, ids, expected))
    assert torch.equal(kept(cache), kept(expected)) and cache.evicted_tokens > 0


def test_model_generate_and_the_loop_agree(gpt2, ids):
    again = gpt2.generate(
        ids, past_key_values=bounded(gpt2), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generate(gpt2, ids, bounded(gpt2), 12), again)


def test_reset_after_an_error_amid_a_prompt(gpt2, ids):
    cache, fresh = bounded(gpt2), bounded(gpt2)

    def breaks(slots, seen):
        raise KeyboardInterrupt

    cache.layers[1].policy.score = breaks
    with pytest.raises(KeyboardInterrupt):
        gpt2(ids, past_key_values=cache)
    del cache.layers[1].policy.score
    cache.reset()
    for _ in range(2):
        expected = gpt2(ids, past_key_values=fresh).logits
        torch.testing.assert_close(gpt2(ids, past_key_values=cache).logits, expected)
        fresh.reset(), cache.reset()


def test_refusals(gpt2):
    for wrong in (0, 3, -1, True, 2.5):
        with pytest.raises(ValueError, match="prefill_chunk must be a whole number, at least 4"):
            bounded(gpt2, chunk=wrong)
