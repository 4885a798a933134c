"""Every kind of summary against plain lists of what was evicted, in float64, and through the trials of a cache."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import attended

import sketchkv
from sketchkv import AttentionMass, SketchCache, Window, generate, score
from sketchkv.cache import SketchLayer
from sketchkv.loading import EMBEDDED
from sketchkv.study.methods import make_cache, nbytes
from sketchkv.summaries import KINDS, WEIGHTS, CountSketchSummary, Segments, SlidingMerge
from sketchkv.summary import FADE, LEAST, Summary

MEANS = [kind for kind in KINDS if kind != "count_sketch"]
VARIANTS = {
    "nearest": dict(summary_slots=3, summary="nearest"),
    "sliding": dict(summary_slots=3, summary="sliding"),
    "segments": dict(summary_slots=3, summary="segments"),
    "count sketch": dict(summary_slots=6, summary="count_sketch"),
    "mass": dict(summary_slots=2, summary={"weight": "mass"}),
    "decay": dict(summary_slots=1, summary={"weight": "decay"}),
    "second order": dict(summary_slots=1, summary={"second_order": True}),
    "protected": dict(summary_slots=1, summary={"protect": True}),
    "all": dict(summary_slots=3, summary={"kind": "sliding", "weight": "mass", "second_order": True, "protect": True}),
    "coded": dict(summary_slots=2, summary={"kind": "nearest", "second_order": True, "protect": True}, bits=(5, 4)),
}


@pytest.fixture(params=VARIANTS)
def fresh(request):
    def make(model, cap=24):
        return SketchCache(
            model.config, cap, recent_window=8, evict_every=5, policy=AttentionMass(), **copy.deepcopy(VARIANTS[request.param])
        )

    make.quantized = "bits" in VARIANTS[request.param]
    return make


# -- buckets, against lists ---------------------------------------------------------------------------------------------


class Plain:
    """One sequence and head: buckets are lists of (key, value, weight)."""

    def __init__(self, kind, weight, slots):
        self.kind, self.weight, self.buckets, self.length = kind, weight, [[] for _ in range(slots)], 1

    def mean(self, bucket, part=0):
        return sum(w * t[part] for *t, w, _ in bucket) / sum(w for *_, w, _ in bucket)

    def count(self, bucket):
        return sum(n for *_, n in bucket)

    def cost(self, pair):
        (a, b), total = (self.count(x) for x in pair), self.count(pair[0] + pair[1])
        return a * b / total * (self.mean(pair[0]) - self.mean(pair[1])).square().sum()

    def choose(self, keys, positions):
        slots = len(self.buckets)
        if self.kind == "sliding":
            if self.buckets[-1] and slots > 1:
                i = min(range(slots - 1), key=lambda i: self.cost(self.buckets[i : i + 2]))
                self.buckets[i : i + 2] = [self.buckets[i] + self.buckets[i + 1]]
                self.buckets.append([])
            return [next((i for i, bucket in enumerate(self.buckets) if not bucket), slots - 1)] * len(keys)
        if self.kind == "segments":
            while max(positions) >= self.length * slots:
                self.length *= 2
                whole = [sum(self.buckets[i : i + 2], []) for i in range(0, slots, 2)]
                self.buckets = whole + [[] for _ in range(slots - len(whole))]
            return [p // self.length for p in positions]
        means = [self.mean(bucket) if bucket else None for bucket in self.buckets]
        chosen = []
        for key in keys:  # the first found empty buckets, the others go to the nearest of them all
            if None in means:
                chosen.append(means.index(None))
                means[chosen[-1]] = key
            else:
                chosen.append(min(range(slots), key=lambda i: (key - means[i]).square().sum().item()))
        return chosen

    def fold(self, block, elapsed):
        if self.weight == "decay":
            self.buckets = [[(k, v, w * FADE**elapsed, n * FADE**elapsed) for k, v, w, n in b] for b in self.buckets]
        if block:
            keys, values, positions, scores = zip(*block)
            for i, bucket in enumerate(self.choose(keys, positions)):
                weight = max(scores[i], LEAST) if self.weight == "mass" else 1.0
                self.buckets[bucket].append((keys[i], values[i], weight, 1.0))


def stream(blocks=14, n=5, batch=2, heads=2, dim=6, seed=0, padding=0):
    """Blocks of tokens as evictions bring them: (keys, values, positions, scores); the first `padding` of row 1 are none."""
    g = torch.Generator().manual_seed(seed)
    total = blocks * n
    keys, values = torch.randn(2, batch, heads, total, dim, generator=g) + 2 * torch.randn(dim, generator=g)
    scores = torch.rand(batch, heads, total, generator=g) - 0.1  # some are negative
    # Positions rise on the whole, differently in each head.
    positions = (torch.arange(total) + 9 * torch.rand(batch, heads, total, generator=g)).int()
    positions[-1, :, :padding] = -1
    cut = [slice(i, i + n) for i in range(0, total, n)]
    return [(keys[:, :, c], values[:, :, c], positions[..., c], scores[..., c]) for c in cut]


@pytest.mark.parametrize("kind, weight, slots", [
    *itertools.product(("nearest", "sliding", "segments"), WEIGHTS, (4,)),
    ("sliding", "count", 1), ("segments", "count", 5), ("nearest", "count", 1),
])  # fmt: skip
@pytest.mark.parametrize("padding", [0, 13])
def test_buckets_equal_lists_of_their_members(kind, weight, slots, padding):
    blocks = stream(padding=padding)
    summary = KINDS[kind](*torch.zeros(2, 2, 2, slots, 6), weight=weight, second_order=True)
    plain = {(b, h): Plain(kind, weight, slots) for b in range(2) for h in range(2)}
    for done, block in enumerate(blocks, 1):
        summary.fold(*block)
        for (b, h), own in plain.items():
            keys, values, positions, scores = (x[b, h] for x in block)
            real = [i for i in range(5) if positions[i] >= 0]
            own.fold([(keys[i].double(), values[i].double(), int(positions[i]), float(scores[i])) for i in real], 5)
            for i, bucket in enumerate(own.buckets):
                torch.testing.assert_close(summary.counts[b, h, i].item(), float(own.count(bucket)), atol=1e-3, rtol=0)
                if bucket:
                    for part in range(2):
                        got = summary.entries()[part][b, h, i].double()
                        torch.testing.assert_close(got, own.mean(bucket, part), atol=1e-4, rtol=0)
                    total, mean = sum(w for *_, w, _ in bucket), own.mean(bucket)
                    variance = sum(w * (k - mean).square() for k, _, w, _ in bucket) / total
                    torch.testing.assert_close(summary.variance[b, h, i].double(), variance, atol=1e-3, rtol=0)
        if weight != "decay":
            real = torch.stack([(block[2] >= 0).sum(-1) for block in blocks[:done]]).sum(0)
            assert torch.equal(summary.counts.sum(-1), real.float())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**31), st.integers(1, 3000))
def test_segments_hold_any_text(slots, seed, longest):
    g = torch.Generator().manual_seed(seed)
    summary = Segments(*torch.zeros(2, 1, 2, slots, 3))
    seen = []
    for _ in range(4):
        positions = torch.randint(0, longest, (1, 2, 6), generator=g, dtype=torch.int32)
        keys = positions[..., None].float().expand(1, 2, 6, 3)
        summary.fold(keys, -keys, positions)
        seen.append(positions)
    seen = torch.cat(seen, -1)
    length = 2 ** summary.doublings
    newest = seen.amax(-1, keepdim=True)
    assert (newest < length * slots).all() and (newest >= length * slots // 2)[length > 1].all()
    for h in range(2):
        for i in range(slots):
            members = seen[0, h][seen[0, h] // int(length[0, h]) == i].double()
            assert summary.counts[0, h, i] == len(members)
            if len(members):
                torch.testing.assert_close(summary.means[0][0, h, i, 0].item(), members.mean().item(), rtol=1e-4, atol=1e-3)


def test_sliding_keeps_the_order_of_eviction():
    """Means of a stream that drifts one way stay sorted, whatever was merged."""
    summary = SlidingMerge(*torch.zeros(2, 1, 1, 5, 2))
    for step in range(40):
        keys = torch.full((1, 1, 3, 2), float(step)) + torch.rand(1, 1, 3, 2, generator=torch.Generator().manual_seed(step)) / 2
        summary.fold(keys, keys, torch.arange(3).expand(1, 1, 3))
        means = summary.means[0][0, 0, summary.counts[0, 0] > 0, 0]
        assert len(means) == min(step + 1, 5) and (means.diff() > 0).all() and means[-1] >= step


def test_one_code_is_exact_in_a_count_sketch_and_many_are_as_charikar_says():
    """Against estimates made cell by cell."""
    blocks = stream(padding=13)
    summary = CountSketchSummary(*torch.zeros(2, 2, 2, 0, 6), cells=12, bits=4)
    for block in blocks:
        summary.fold(*block)
    keys, values, positions, _ = (torch.cat(x, 2) for x in zip(*blocks))
    codes = summary.code(keys)
    place, sign = summary.signs.abs().argmax(1), summary.signs.sum(1)  # [depth, codes]
    found = summary.entries()
    for b, h, code in itertools.product(range(2), range(2), range(16)):
        rows = []
        for r in range(3):
            inside = [i for i in range(70) if positions[b, h, i] >= 0 and place[r, codes[b, h, i]] == place[r, code]]
            signs = [float(sign[r, codes[b, h, i]] * sign[r, code]) for i in inside]
            tokens = (torch.cat([keys[b, h, i], values[b, h, i], torch.ones(1)]) for i in inside)
            rows.append(sum((s * token for s, token in zip(signs, tokens)), torch.zeros(13)))
        median = torch.stack(rows).median(0).values
        if median[-1] < 0.5:
            assert found[2][b, h, code] == 0
            continue
        torch.testing.assert_close(found[2][b, h, code], median[-1], atol=1e-3, rtol=0)
        for part, x, estimate in ((0, keys, median[:6]), (1, values, median[6:12])):
            mean, most = estimate / median[-1], x[b, h][positions[b, h] >= 0].norm(dim=-1).max()
            torch.testing.assert_close(found[part][b, h, code], mean * (most / mean.norm()).clamp(max=1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_rounding_leaves_over(kind, dtype):
    exact, half = (KINDS[kind](*torch.zeros(2, 1, 1, 3, 6, dtype=d), second_order=True) for d in (torch.float32, dtype))
    for keys, values, positions, _ in stream(40, batch=1, heads=1):
        keys, values = keys.to(dtype), values.to(dtype)
        exact.fold(keys.float(), values.float(), positions)
        half.fold(keys, values, positions)
    torch.testing.assert_close(half.counts, exact.counts)
    for got, expected in zip((*half.entries(), half.variance), (*exact.entries(), exact.variance)):
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)


# -- attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MEANS)
@pytest.mark.parametrize("second_order", [False, True])
def test_equal_keys_merge_without_loss(kind, second_order):
    """One key, any values: attention with whatever was evicted in a summary is that of the full cache."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 1, 8, generator=g).expand(1, 1, 90, 8).contiguous()
    values, query = torch.randn(1, 1, 90, 8, generator=g), torch.randn(1, 3, 90, 8, generator=g)
    layer = SketchLayer(Window(), 20, 2, 4, 3, summary_slots=6, summary={"kind": kind, "second_order": second_order})
    torch.testing.assert_close(*attended(layer, query, keys, values), atol=1e-5, rtol=0)
    assert layer.summary.entries()[2].sum() == 90 - layer.slots.used >= 60


def test_nearest_keeps_unlike_keys_apart():
    """Three keys far from each other, three slots: nothing is lost, in whatever order they come."""
    g = torch.Generator().manual_seed(1)
    kinds = 5 * torch.eye(3, 8)
    order = torch.cat([torch.tensor([0, 0, 1, 2]), torch.randint(0, 3, (86,), generator=g)])
    keys, values, query = kinds[order][None, None], torch.randn(1, 1, 90, 8, generator=g), torch.randn(1, 1, 90, 8, generator=g)
    # The sinks take the first two tokens, so that the first block brings all three kinds.
    layer = SketchLayer(Window(), 20, 1, 4, 3, summary_slots=3, summary="nearest")
    layer.update(keys, values)
    output = layer.attend(query, keys, values, None, None, 0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=0.5)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_second_order_gives_gaussian_keys_their_mass():
    """The mass of many keys with a diagonal covariance: exact in the limit, where the mean key alone gives too little."""
    g = torch.Generator().manual_seed(0)
    spread = torch.rand(8, generator=g) + 0.5
    keys = torch.randn(1, 2, 200_000, 8, generator=g) * spread + torch.randn(8, generator=g)
    query, scaling = torch.randn(1, 2, 4, 8, generator=g), 0.4
    gaps = []
    for second_order in (False, True):
        summary = Summary(*torch.zeros(2, 1, 2, 1, 8), second_order=second_order)
        for part in keys.split(20_000, 2):
            summary.fold(part, part, torch.arange(20_000).expand(1, 2, -1))
        logit = query @ summary.means[0].transpose(-1, -2) * scaling + summary.bias(query, scaling)
        gaps.append((query @ keys.transpose(-1, -2) * scaling).logsumexp(-1) - logit[..., 0])
    torch.testing.assert_close(gaps[0], ((query * scaling).square() * spread.square()).sum(-1) / 2, atol=0.03, rtol=0)
    assert gaps[1].abs().max() < 0.03 and gaps[0].min() > 0.05


def test_protection_keeps_what_the_summary_would_not_say():
    """One token with a value like no other stays; without protection, or once the mean says nothing else, it goes."""
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 1, 80, 8, generator=g) * 0.1
    values[:, :, 30] = 5.0

    class Even(Window):
        def score(self, slots, seen):
            return torch.ones(slots["positions"].shape)

    kept = {}
    for protect in (False, True):
        layer = SketchLayer(Even(), 20, 2, 4, 3, summary_slots=1, summary={"protect": protect})
        layer.update(keys, values)
        layer.attend(keys, keys, values, None, None, 0.5)
        kept[protect] = layer.slots["positions"].flatten().tolist()
    assert 30 in kept[True] and 30 not in kept[False]


# -- the cache ----------------------------------------------------------------------------------------------------------


def kept(cache):
    return torch.stack([cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))])


def test_single_tokens_chunks_and_the_whole_are_one(gpt2, ids, fresh):
    cache = fresh(gpt2)
    expected = score(gpt2, ids, cache, chunk_size=1)
    assert cache.evicted_tokens > 0
    for chunk_size in (7, 100):
        streamed = fresh(gpt2)
        got = score(gpt2, ids, streamed, chunk_size=chunk_size)
        if fresh.quantized:
            assert (got - expected).abs().median() < 1e-3
        else:
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
            assert torch.equal(kept(streamed), kept(cache))
        assert streamed.nbytes() == cache.nbytes()
    alone = fresh(gpt2)
    score(gpt2, ids[:1], alone)
    assert alone.nbytes() == nbytes(gpt2.config, **_method(alone))


def _method(cache):
    layer = cache.layers[0]
    return dict(method="decayed", max_cache_size=24, recent_window=8, evict_every=5, summary_slots=layer.summary_slots,
                summary=layer.folding, bits=layer.bits)  # fmt: skip


def test_padding_leaves_no_trace(gpt2, ids, fresh):
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    found = []
    for token in (0, 55):
        cache = fresh(gpt2)
        found.append((generate(gpt2, ids.where(mask == 1, token), cache, 20, attention_mask=mask)[:, 100:], kept(cache)))
        if cache.layers[0].folding["kind"] != "count_sketch" and cache.layers[0].folding["weight"] != "decay":
            for layer in cache.layers:
                stored = (layer.slots.positions >= 0).sum(-1)
                assert torch.equal(stored + layer.summary.counts.sum(-1), (mask.sum(-1)[:, None] + 19).expand_as(stored).float())
    for first, second in zip(*found):
        assert torch.equal(first, second)


def test_next_text_finds_an_empty_cache(gpt2, ids, fresh):
    cache = fresh(gpt2)
    score(gpt2, ids[:1], cache)
    cache.reset()
    assert all(not tensor.any() for layer in cache.layers for tensor in layer.summary.tensors())
    assert torch.equal(score(gpt2, ids[1:], cache), score(gpt2, ids[1:], fresh(gpt2)))


def test_beams_take_their_summaries_along(gpt2, ids, fresh):
    out = gpt2.generate(
        ids[:, :60], past_key_values=fresh(gpt2), max_new_tokens=15, num_beams=3, num_return_sequences=3, do_sample=False,
        eos_token_id=None, length_penalty=0.0, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for sequence, reported in zip(out.sequences, out.sequences_scores):
        nll = score(gpt2, sequence[None], fresh(gpt2))[0, 59:]
        assert abs(-nll.sum() - reported) < (0.1 if fresh.quantized else 1e-3)


def test_steps_can_be_recorded(gpt2, ids, fresh):
    """Every kind does all on the device and leaves its tensors where they are."""
    caches = [fresh(gpt2) for _ in range(2)]
    places = []
    for length in (50, 28):
        tokens = [generate(gpt2, ids[:, :length], cache, 16, graph=graph) for cache, graph in zip(caches, (False, True))]
        assert torch.equal(*tokens)
        places.append([t.data_ptr() for layer in caches[1].layers for t in layer.summary.tensors()])
        for cache in caches:
            cache.reset()
    assert places[0] == places[1]


@pytest.mark.parametrize("name", ["all", "count sketch"])
def test_group_of_queries_and_rotary_keys(name):
    """The embedded rotary model, trained: each query of a group has its own second order, in chunks and token by token."""
    model, tokenizer = sketchkv.load(EMBEDDED.parent / "model-rotary", device="cpu")
    sketchkv.enable(model)
    text = tokenizer(Path(sketchkv.cache.__file__).read_text(encoding="utf-8")[:600], return_tensors="pt")["input_ids"][:, :90]
    cache, again = (SketchCache(model.config, 32, policy=AttentionMass(), **VARIANTS[name]) for _ in range(2))
    expected = score(model, text, cache, chunk_size=1)
    torch.testing.assert_close(score(model, text, again, chunk_size=90), expected, atol=1e-3, rtol=0)
    layer, query = cache.layers[0], torch.randn(1, 6, 1, 64, generator=torch.Generator().manual_seed(0))
    got = layer._attend_block(query, None, 0.125)
    *means, counts = (x.double() for x in layer.summary.entries())
    for head, q in enumerate(query[0, :, 0].double() / 8):
        own, few = head // 2, counts.shape[-1]
        keys, values = (torch.cat([m[0, own], layer.slots[n][0, own].double()]) for m, n in zip(means, ("keys", "values")))
        logits = keys @ q
        logits[:few] += counts[0, own].log()
        if layer.folding["second_order"]:
            logits[:few] += layer.summary.variance[0, own].double() @ q.square() / 2
        torch.testing.assert_close(got[0, head, 0].double(), logits.softmax(-1) @ values, atol=1e-5, rtol=0)


def test_bytes(gpt2):
    held = {
        name: nbytes(gpt2.config, method="decayed", max_cache_size=40, summary_slots=6, summary=summary)
        for name, summary in [
            *zip(KINDS, KINDS), ("mass", {"weight": "mass"}), ("second", {"second_order": True}), ("protect", {"protect": True})
        ]
    }  # fmt: skip
    layers, heads, dim, slots, number = 2, 4, 16, 6, 4
    more = {
        name: {part: (own[part] - held["hash"][part]) // (layers * number) for part in ("kv", "policy")}
        for name, own in held.items()
    }  # fmt: skip
    hashing = dim * 12 + 12 + 2 * 2
    assert more["nearest"] == more["sliding"] == {"kv": 0, "policy": -hashing}
    assert more["segments"] == {"kv": 0, "policy": heads - hashing}
    assert more["mass"] == {"kv": 0, "policy": heads * slots} and more["protect"] == {"kv": 0, "policy": 0}
    assert more["second"] == {"kv": heads * slots * dim, "policy": 0}
    signs, code = 3 * 2 * 16, dim * 4 + 4
    assert more["count_sketch"] == {"kv": heads * slots, "policy": heads * 2 + signs + code - heads * slots - hashing}


def test_default_is_one_mean_per_hash(gpt2, ids):
    plain = score(gpt2, ids, SketchCache(gpt2.config, 24, recent_window=8, summary_slots=3))
    for summary in ("hash", {}, {"kind": "hash", "weight": "count", "second_order": False, "protect": False}):
        assert torch.equal(score(gpt2, ids, SketchCache(gpt2.config, 24, recent_window=8, summary_slots=3, summary=summary)), plain)
    assert SketchCache.compact(gpt2.config, 64, summary={"second_order": True}).layers[0].folding["second_order"]


@pytest.mark.parametrize("summary, slots, message", [
    ("centroid", 4, "unknown kind of a summary 'centroid'; choose one of hash, nearest"),
    ({"weight": "sum"}, 4, "unknown weight"),
    ({"second_order": 2}, 4, "unknown second_order"),
    ({"depth": 3}, 4, "unknown setting of a summary: depth"),
    ("nearest", 0, "needs slots"),
    ("count_sketch", 4, "multiple of 3"),
    ({"kind": "count_sketch", "second_order": True}, 6, "plain sums"),
    (3, 4, "a summary is the name of a kind or a dict"),
])  # fmt: skip
def test_bad_settings(gpt2, summary, slots, message):
    with pytest.raises(ValueError, match=message):
        make_cache(gpt2.config, "decayed", max_cache_size=64, summary_slots=slots, summary=summary)
