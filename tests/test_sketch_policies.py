"""Every kind, key and width of the sketch policy goes through the trials of the cache: oracle, chunks, padding, beams."""

import pytest
import torch
from conftest import build

import sketchkv
from sketchkv import Sketch, SketchCache, Window, generate, score
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.sketch import SimHash
from sketchkv.slots import Plain, Slots
from sketchkv.study.extras.sketch_policies import AnySketch, QuerySketch

VARIANTS = {
    "conservative, 16 bits": dict(kind="conservative", width=16, counters="float16"),
    "Count-Sketch, 8 bits": dict(kind="count_sketch", width=64, depth=3, counters="uint8", key="token"),
    "RACE over keys": dict(kind="race", width=64),
    "RACE over queries": dict(kind="race", query=True, width=64),
    "query codes, 8 bits": dict(query=True, width=64, counters="uint8"),
}
LENGTH = 64


@pytest.fixture(params=VARIANTS)
def fresh(request):
    def make(model, **settings):
        cache = dict(recent_window=6, evict_every=4) | settings
        variant = dict(VARIANTS[request.param])
        policy = QuerySketch if variant.pop("query", False) else AnySketch
        return SketchCache(model.config, 20, policy=policy(**variant), **cache)

    return make


@pytest.fixture(scope="module")
def llama():
    return sketchkv.enable(build("llama"))


@pytest.fixture
def text(ids):
    return ids[:, :LENGTH]


def kept(cache):
    return torch.stack([cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))])


def test_bounded_cache_equals_masked_full_cache_in_any_chunks(llama, text, fresh):
    cache = fresh(llama)
    logits, visible = decode_and_watch(llama, text, cache)
    torch.testing.assert_close(logits, full_cache_logits(llama, text, visible), atol=1e-4, rtol=0)
    window = SketchCache(llama.config, 20, recent_window=6, evict_every=4, policy=Window())
    assert (score(llama, text, window) - score(llama, text, fresh(llama))).abs().max() > 1e-3
    for chunk_size in (LENGTH, 7):
        streamed = fresh(llama)
        _, again = score(llama, text, streamed, chunk_size=chunk_size, return_logits=True)
        torch.testing.assert_close(again, logits, atol=1e-4, rtol=0)
        assert torch.equal(kept(streamed), kept(cache)) and streamed.nbytes() == cache.nbytes()
        for layer, other in zip(streamed.layers, cache.layers):
            for mine, theirs in zip(layer.policy.tensors(), other.policy.tensors()):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_padding_leaves_no_trace_and_rows_are_independent(llama, text, fresh):
    mask = torch.ones_like(text)
    mask[1, :23] = 0
    results = []
    for token in (0, 55):
        padded = text.where(mask == 1, token)
        cache = fresh(llama)
        tokens = generate(llama, padded, cache, 10, attention_mask=mask, chunk_size=13)
        results.append((tokens[:, LENGTH:], kept(cache)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    together = score(llama, text, fresh(llama))
    alone = torch.cat([score(llama, row[None], fresh(llama)) for row in text])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_reset_equals_a_fresh_cache(gpt2, text, fresh):
    cache = fresh(gpt2)
    score(gpt2, text[:1], cache)
    size = cache.nbytes()
    cache.reset()
    assert torch.equal(score(gpt2, text[1:], cache), score(gpt2, text[1:], fresh(gpt2)))
    assert cache.nbytes() == size


def test_beam_search_equals_each_beam_decoded_alone(llama, text, fresh):
    out = llama.generate(
        text[:, :40],
        past_key_values=fresh(llama),
        max_new_tokens=16,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    nll = score(llama, out.sequences, fresh(llama))[:, 39:]
    torch.testing.assert_close(-nll.sum(-1), out.sequences_scores, atol=1e-3, rtol=0)
    assert len(out.beam_indices.unique()) > 2


def test_bytes_are_those_of_the_tensors(llama, text, fresh):
    cache = fresh(llama)
    score(llama, text, cache)
    tensors = {}
    for layer in cache.layers:
        policy = layer.policy
        held = [*layer.slots.arrays.values(), *policy.tensors()]
        for part in [policy.code, *policy.sketches]:
            for thing in [
                part,
                *getattr(part, "__dict__", {}).values(),
                *getattr(getattr(part, "hash", None), "__dict__", {}).values(),
            ]:
                held += [
                    value
                    for value in getattr(thing, "__dict__", {}).values()
                    if isinstance(value, torch.Tensor)
                ]
        tensors |= {id(tensor): tensor for tensor in held}
    assert cache.nbytes()["total"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("kind", ["count_min", "race"])
def test_queries_are_counted_where_they_point(kind):
    """Against a sum over all pairs of a query and a key, with queries in any chunks."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 4, 30, 8, generator=generator)  # four query heads, two KV heads
    keys = keys[:, :2]
    policy = QuerySketch(kind=kind, width=2**10, depth=5, lsh_bits=4, decay=0.9)
    slots = Slots((1, 2), 30, (8, 8), Plain(torch.float32, "cpu"))
    policy.allocate(slots)
    for start, stop in ((0, 11), (11, 12), (12, 30)):
        now = slice(start, stop)
        positions = torch.arange(start, stop)[None].int()
        if start == 0:
            positions[:, :3] = -1  # padding
        policy.enter(slots, slots.append(keys[:, :, now], keys[:, :, now], positions), None)
        policy.query(slots, queries[:, :, now])
    got = policy.score(slots, 30)
    if kind == "race":
        rows = policy.sketches[0].hash.projection.unflatten(1, (5, 4))

        def code(x):
            return torch.stack([(x @ rows[:, r] > 0).float() @ 2.0 ** torch.arange(4) for r in range(5)])

    else:

        def code(x):
            return SimHash(8, 4)(x)[None]

    for head in range(2):
        for token in range(3, 30):
            expected = 0.0
            for query_head in (2 * head, 2 * head + 1):
                for t in range(3, 30):
                    same = code(queries[0, query_head, t]) == code(keys[0, head, token])
                    expected += 0.9 ** (29 - t) * same.float().mean().item()
            assert abs(got[0, head, token] - expected) < 1e-4


def test_query_policy_asks_for_no_attention():
    assert not QuerySketch().uses_attention and Sketch().uses_attention
    assert QuerySketch().lsh_bits == 8 and Sketch().lsh_bits == AnySketch().lsh_bits == 24


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="colour"), "count_min, conservative, count_sketch, race"),
        (dict(counters="int4"), "float32, float16, uint8"),
        (dict(key="colour"), "lsh, token, position"),
        (dict(kind="race", key="token"), "hashes vectors"),
        (dict(kind="race", lsh_bits=31), "lsh_bits"),
        (dict(width=0), "width"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AnySketch(**settings)
