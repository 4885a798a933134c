"""Every kind, key and width of the sketch policy goes through the trials of the cache: oracle, chunks, padding, beams."""

import copy

import pytest
import torch
from conftest import build

import sketchkv
from sketchkv import Prior, Sketch, SketchCache, Window, generate, score
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.policies import QuerySketch
from sketchkv.sketches import PRIME, SimHash
from sketchkv.slots import Slots

VARIANTS = {
    "bigram": dict(key="bigram", width=64, depth=2),
    "conservative, 16 bits": dict(kind="conservative", width=16, counters="float16"),
    "Count-Sketch, 8 bits": dict(kind="count_sketch", width=64, depth=3, counters="uint8", key="token"),
    "RACE over keys": dict(kind="race", width=64),
    "RACE over queries": dict(kind="race", key="query", width=64),
    "query codes, 8 bits": dict(key="query", width=64, counters="uint8"),
    "shared by heads": dict(shared="heads", lsh_bits=8),
    "queries shared by heads": dict(shared="heads", key="query", kind="race", width=64),
    "prior": dict(policy=Prior(64, 2)),
    "prior shared by layers": dict(policy=Prior(64, 2, shared="layers", counters="uint8")),
    "shared by layers": dict(shared="layers", width=64, key="token", counters="uint8"),
}
LENGTH = 64


@pytest.fixture(params=VARIANTS)
def fresh(request):
    def make(model, **settings):
        cache = dict(recent_window=6, evict_every=4) | settings
        return SketchCache(model.config, 20, **cache, **VARIANTS[request.param])

    make.settings = VARIANTS[request.param]
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
        text[:, :40], past_key_values=fresh(llama), max_new_tokens=16, num_beams=3, num_return_sequences=3,
        prefill_chunk_size=fresh(llama).max_chunk_size,
        do_sample=False, eos_token_id=None, length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
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
        for part in [policy.items, *policy.sketches]:
            for thing in [part, *vars(part).values(), *getattr(getattr(part, "hash", None), "__dict__", {}).values()]:
                held += [value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, torch.Tensor)]
        tensors |= {id(tensor): tensor for tensor in held}
    assert cache.nbytes()["total"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_pass_over_many_evictions_is_refused_where_layers_share(llama, text):
    cache = SketchCache(llama.config, 20, recent_window=6, evict_every=4, shared="layers")
    with pytest.raises(ValueError, match="prefill_chunk_size=evict_every"):
        llama(text, past_key_values=cache)
    assert cache.max_chunk_size == 4 and SketchCache(llama.config, 32).max_chunk_size is None
    cache.reset()
    assert score(llama, text, cache).isfinite().all()
    mixed = SketchCache(llama.config, 32, policy=[Sketch(shared="layers"), Window()])
    with pytest.raises(ValueError, match="one policy for all layers"):
        llama(text, past_key_values=mixed)


@pytest.mark.parametrize("shared, tables", [(None, 2 * 2), ("heads", 2), ("layers", 1)])
def test_shared_counters_are_one_table_and_counted_once(llama, text, shared, tables):
    cache = SketchCache(llama.config, 24, shared=shared, key="token", width=32, depth=3, mean=False, recent_window=6)
    score(llama, text[:1], cache)
    assert len({id(layer.policy.sketches[0]) for layer in cache.layers}) == (1 if shared == "layers" else 2)
    layers, heads, slots, hashes = 2, 2, 40, 3 * 2 * 8
    expected = tables * 3 * 32 * 4 + hashes * (1 if shared == "layers" else layers) + layers * heads * slots * 4
    assert cache.nbytes()["sketch"] == expected
    # Nothing of the mass is lost: each query head gives 1 per query, at a decay of 0.99.
    leads = {id(layer.policy.lead): layer.policy.lead for layer in cache.layers}
    total = sum(lead.sketches[0].total.sum() for lead in leads.values())
    seen = cache.seen_tokens - (cache.layers[0].slots.used - cache.layers[0].slots.kept)
    torch.testing.assert_close(total, torch.tensor(layers * 4 * (1 - 0.99**seen) / 0.01), rtol=1e-4, atol=0)


@pytest.mark.parametrize("key", ["token", "bigram"])
def test_sharing_heads_adds_up_what_heads_know_apart(gpt2, text, key):
    """While nothing is evicted yet, the shared table is the sum of the separate ones."""
    tables = []
    for shared in (None, "heads"):
        cache = SketchCache(gpt2.config, 48, key=key, shared=shared, width=2**14, evict_every=8)
        score(gpt2, text[:, :56], cache)
        tables.append([sketch.table for sketch in cache.layers[0].policy.sketches])
    for apart, together in zip(*tables):
        torch.testing.assert_close(apart.sum(1), together)


def test_bigrams_across_chunks_and_padding():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2**18, (3, 40), generator=generator)
    real = torch.rand(3, 40, generator=generator) > 0.3
    real[0] = True
    real[1, :15] = False
    expected, last = [], [-1, -1, -1]
    for t in range(40):
        for row in range(3):
            if real[row, t]:
                expected.append(((last[row] + 1) * 1103515245 + int(ids[row, t]) + 1) % PRIME)
                last[row] = int(ids[row, t])
    for chunk in (40, 1, 7):
        slots, policy = Slots(3, 2, 40, 8, torch.float32, "cpu"), Sketch(key="bigram", width=8, depth=1)
        policy.allocate(slots)
        for start in range(0, 40, chunk):
            part = slice(start, start + chunk)
            positions = torch.arange(40)[None, part].expand(3, -1).masked_fill(~real[:, part], -1).int()
            vectors = torch.zeros(3, 2, positions.shape[1], 8)
            policy.enter(slots, slots.append(vectors, vectors, positions), ids[:, part])
        assert torch.equal(slots["item"][:, 0], slots["item"][:, 1])
        assert slots["item"][:, 0].T[real.T].tolist() == expected
        assert (slots["item"] >= 0).all()


@pytest.mark.parametrize("kind", ["count_min", "race"])
def test_queries_are_counted_where_they_point(kind):
    """Against a sum over all pairs of a query and a key, with queries in any chunks."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 1, 4, 30, 8, generator=generator)  # four query heads, two KV heads
    keys = keys[:, :2]
    policy = Sketch(key="query", kind=kind, width=2**10, depth=5, lsh_bits=4, decay=0.9)
    assert type(policy) is QuerySketch and type(Sketch(64, 2, "query")) is QuerySketch
    slots = Slots(1, 2, 30, 8, torch.float32, "cpu")
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
        code = lambda x: torch.stack([(x @ rows[:, r] > 0).float() @ 2.0 ** torch.arange(4) for r in range(5)])  # noqa: E731
    else:
        code = lambda x: SimHash(8, 4)(x)[None]  # noqa: E731
    for head in range(2):
        for token in range(3, 30):
            expected = 0.0
            for query_head in (2 * head, 2 * head + 1):
                for t in range(3, 30):
                    same = code(queries[0, query_head, t]) == code(keys[0, head, token])
                    expected += 0.9 ** (29 - t) * same.float().mean().item()
            assert abs(got[0, head, token] - expected) < 1e-4


def test_query_policy_asks_for_no_attention():
    policy = Sketch(key="query")
    assert policy.uses_queries and not policy.uses_attention
    assert Sketch().uses_attention and not Sketch().uses_queries
    assert type(copy.deepcopy(policy)) is QuerySketch and policy.lsh_bits == 8 and Sketch().lsh_bits == 24


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="colour"), "count_min, conservative, count_sketch, race"),
        (dict(counters="int4"), "float32, float16, uint8"),
        (dict(shared="rows"), "None, heads, layers"),
        (dict(key="colour"), "lsh, token, position, bigram, query"),
        (dict(kind="race", key="token"), "hashes vectors"),
        (dict(kind="race", lsh_bits=31), "lsh_bits"),
        (dict(key="query", width=0), "width"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Sketch(**settings)


def test_bigrams_need_token_ids(gpt2, ids):
    with pytest.raises(ValueError, match='key="lsh"'):
        gpt2(inputs_embeds=gpt2.transformer.wte(ids), past_key_values=SketchCache(gpt2.config, 64, key="bigram"))
