"""Every way of attending and storing goes through the same trials: chunks, padding, beams, two texts in a row."""

import copy

import pytest
import torch

from sketchkv import AttentionMass, SketchCache, Summary, Window, generate, score

VARIANTS = {
    "topk": dict(attend_topk=16),
    "topk by exact mean": dict(attend_topk=16, policy=AttentionMass()),
    "summary": dict(summary=Summary(3)),
    "summary and topk": dict(summary=Summary(3), attend_topk=16, policy=AttentionMass()),
    "int8": dict(bits=8),
    "int4": dict(bits=4, policy=AttentionMass()),
    "int4, summary and topk": dict(bits=4, summary=Summary(3), attend_topk=16),
}


@pytest.fixture(params=VARIANTS)
def fresh(request):
    """Makes an empty cache of a variant for a model."""

    def make(model, cap=24):
        settings = copy.deepcopy(VARIANTS[request.param])
        return SketchCache(model.config, cap, **({"recent_window": 8, "evict_every": 5} | settings))

    make.quantized = "bits" in VARIANTS[request.param]
    return make


def assert_same(got, expected, fresh):
    """Equal up to float32 rounding. Quantized, rounding may take a number on the edge between two codes to either side,
    which moves what follows by a step of one channel; what is wrong moves most of it, and by whole units."""
    if fresh.quantized:
        difference = (got - expected).abs()
        assert difference.median() < 1e-3 and difference.max() < 0.2 * expected.std()
    else:
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def kept(cache):
    return torch.stack([cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))])


def test_chunks_equal_single_tokens(model, ids, fresh):
    cache = fresh(model)
    _, logits = score(model, ids, cache, chunk_size=1, return_logits=True)
    assert cache.evicted_tokens > 0 and set(cache.stored_tokens()) <= set(range(24, 30))
    for chunk_size in (100, 7):
        streamed = fresh(model)
        _, again = score(model, ids, streamed, chunk_size=chunk_size, return_logits=True)
        assert_same(again, logits, fresh)
        same = kept(streamed) == kept(cache)
        assert same.float().mean() > 0.95 if fresh.quantized else same.all()
        assert streamed.nbytes() == cache.nbytes()


def test_variant_changes_what_the_plain_bounded_cache_says(gpt2, ids, fresh):
    plain = SketchCache(gpt2.config, 24, recent_window=8, evict_every=5, policy=Window())
    cache = fresh(gpt2)
    cache.layers[0].policy = cache.layers[1].policy = plain.layers[0].policy.__class__()
    assert (score(gpt2, ids, cache) - score(gpt2, ids, plain)).abs().max() > 1e-3


def test_padded_rows_equal_rows_alone(model, padding, fresh):
    """Until the first eviction, when padding has given way to room that the row alone does not have."""
    padded, mask = padding
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(
        padded[:, :29],
        attention_mask=mask[:, :29],
        position_ids=positions[:, :29],
        past_key_values=fresh(model),
    ).logits
    alone = model(padded[1:, 23:29], past_key_values=fresh(model)).logits
    assert_same(logits[1, 23:], alone[0], fresh)


def test_padding_evicted_leaves_no_trace(model, ids, fresh):
    """Whatever the padding tokens are, what follows is the same."""
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    results = []
    for token in (0, 55):
        padded = ids.where(mask == 1, token)
        cache = fresh(model)
        tokens = generate(model, padded, cache, 30, attention_mask=mask)
        results.append((tokens[:, 100:], kept(cache)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_rows_of_a_batch_are_independent(gpt2, ids, fresh):
    together = score(gpt2, ids, fresh(gpt2))
    alone = torch.cat([score(gpt2, row[None], fresh(gpt2)) for row in ids])
    assert_same(together, alone, fresh)


def test_two_texts_in_a_row_equal_two_fresh_caches(gpt2, ids, fresh):
    cache = fresh(gpt2)
    first = score(gpt2, ids[:1], cache)
    cache.reset()
    second = score(gpt2, ids[1:], cache)
    for text, nll in ((ids[:1], first), (ids[1:], second)):
        assert torch.equal(score(gpt2, text, fresh(gpt2)), nll)


def test_beam_search_equals_each_beam_decoded_alone(model, ids, fresh):
    out = model.generate(
        ids[:, :60],
        past_key_values=fresh(model),
        max_new_tokens=20,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for sequence, reported in zip(out.sequences, out.sequences_scores):
        nll = score(model, sequence[None], fresh(model))[0, 59:]
        assert abs(-nll.sum() - reported) < (0.1 if fresh.quantized else 1e-3)
    assert len(out.beam_indices.unique()) > 2  # beams were really exchanged
