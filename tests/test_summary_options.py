"""Options of a summary: the spread of the merged keys, and protection from being merged; through the trials of a cache."""

import pytest
import torch
from conftest import VOCABULARY, attended, build

import sketchkv
from sketchkv import AttentionMass, SketchCache, Window, generate, score
from sketchkv.checks import Settings
from sketchkv.layer import BoundedLayer
from sketchkv.logits import Form
from sketchkv.passes import Tokens
from sketchkv.slots import Plain, Slots
from sketchkv.study.methods import make_cache, nbytes
from sketchkv.summary import Summary

VARIANTS = {
    "spread": dict(summary_slots=1, spread=True),
    "protected": dict(summary_slots=1, protects=True),
    "both": dict(summary_slots=3, spread=True, protects=True),
    "coded": dict(summary_slots=2, spread=True, protects=True, bits=(5, 4)),
}


def allocated(summary, shape, width, dtype=torch.float32):
    summary.allocate(Slots(shape, 1, (width, width), Plain(dtype, "cpu")))
    return summary


@pytest.fixture(params=VARIANTS)
def fresh(request):
    settings = dict(max_cache_size=24, recent_window=8, evict_every=5) | VARIANTS[request.param]

    def make(model):
        return make_cache(model.config, "decayed", **settings)

    make.settings = settings
    make.quantized = "bits" in settings
    return make


# -- what a slot holds, against lists -----------------------------------------------------------------------------------


def stream(blocks=14, n=5, batch=2, heads=2, dim=6, seed=0, padding=0):
    """Blocks of tokens as evictions bring them: (keys, values, positions); the first `padding` of row 1 are none."""
    g = torch.Generator().manual_seed(seed)
    total = blocks * n
    keys, values = torch.randn(2, batch, heads, total, dim, generator=g) + 2 * torch.randn(dim, generator=g)
    positions = torch.arange(total).expand(batch, heads, total).clone().int()
    positions[-1, :, :padding] = -1
    cut = [slice(i, i + n) for i in range(0, total, n)]
    return [(keys[:, :, c], values[:, :, c], positions[..., c]) for c in cut]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("padding", [0, 13])
def test_slots_equal_lists_of_their_members(slots, padding):
    """Counts, means and variances, in float64."""
    blocks = stream(padding=padding)
    summary = allocated(Summary(slots, spread=True), (2, 2), 6)
    for done, block in enumerate(blocks, 1):
        summary.fold(*block)
        keys, values, positions = (torch.cat(part, 2) for part in zip(*blocks[:done]))
        slot = summary.buckets(keys)
        for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(slots)).tolist():
            members = (slot[b, h] == i) & (positions[b, h] >= 0)
            assert summary.counts[b, h, i] == members.sum()
            if members.any():
                for got, x in zip((summary.keys, summary.values), (keys, values)):
                    torch.testing.assert_close(
                        got[b, h, i].double(), x[b, h, members].double().mean(0), atol=1e-4, rtol=0
                    )
                variance = keys[b, h, members].double().var(0, correction=0)
                torch.testing.assert_close(summary.variance[b, h, i].double(), variance, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_what_rounding_leaves_over(dtype):
    exact, half = (allocated(Summary(3, spread=True), (1, 1), 6, d) for d in (torch.float32, dtype))
    for keys, values, positions in stream(40, batch=1, heads=1):
        keys, values = keys.to(dtype), values.to(dtype)
        exact.fold(keys.float(), values.float(), positions)
        half.fold(keys, values, positions)
    torch.testing.assert_close(half.counts, exact.counts)
    for got, expected in zip(half.tensors(), exact.tensors()):
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=0)


# -- attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [False, True])
def test_equal_keys_merge_without_loss(spread):
    """One key, any values: attention with whatever was evicted in a summary is that of the full cache."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 1, 8, generator=g).expand(1, 1, 90, 8).contiguous()
    values, query = torch.randn(1, 1, 90, 8, generator=g), torch.randn(1, 3, 90, 8, generator=g)
    layer = BoundedLayer(Window(), 20, Settings(2, 4, 3), Summary(6, spread))
    torch.testing.assert_close(*attended(layer, query, keys, values), atol=1e-5, rtol=0)
    assert layer.summary.counts.sum() == 90 - layer.slots.used >= 60


def test_the_spread_gives_gaussian_keys_their_mass():
    """The mass of many keys with a diagonal covariance: exact in the limit, where the mean key alone gives too little."""
    g = torch.Generator().manual_seed(0)
    spread = torch.rand(8, generator=g) + 0.5
    keys = torch.randn(1, 2, 200_000, 8, generator=g) * spread + torch.randn(8, generator=g)
    query, scaling = torch.randn(1, 2, 4, 8, generator=g), 0.4
    gaps = []
    for second_order in (False, True):
        summary = allocated(Summary(1, spread=second_order), (1, 2), 8)
        for part in keys.split(20_000, 2):
            summary.fold(part, part, torch.arange(20_000).expand(1, 2, -1))
        logit = summary.logits(query.flatten(0, 1), Form(scaling)).view(1, 2, 4, 1)
        gaps.append((query @ keys.transpose(-1, -2) * scaling).logsumexp(-1) - logit[..., 0])
    torch.testing.assert_close(
        gaps[0], ((query * scaling).square() * spread.square()).sum(-1) / 2, atol=0.03, rtol=0
    )
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
        layer = BoundedLayer(Even(), 20, Settings(2, 4, 3), Summary(1, protects=protect))
        layer.update(keys, values)
        layer.attend(keys, keys, values, Tokens(None, torch.arange(80, dtype=torch.int32)[None]), Form(0.5))
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
    assert alone.nbytes() == nbytes(gpt2.config, method="decayed", **fresh.settings)


def test_padding_leaves_no_trace(gpt2, ids, fresh):
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    found = []
    for token in (0, 55):
        cache = fresh(gpt2)
        found.append(
            (
                generate(gpt2, ids.where(mask == 1, token), cache, 20, attention_mask=mask)[:, 100:],
                kept(cache),
            )
        )
        for layer in cache.layers:
            stored = (layer.slots.positions >= 0).sum(-1)
            assert torch.equal(
                stored + layer.summary.counts.sum(-1), (mask.sum(-1)[:, None] + 19).expand_as(stored).float()
            )
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
        ids[:, :60],
        past_key_values=fresh(gpt2),
        max_new_tokens=15,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for sequence, reported in zip(out.sequences, out.sequences_scores):
        nll = score(gpt2, sequence[None], fresh(gpt2))[0, 59:]
        assert abs(-nll.sum() - reported) < (0.1 if fresh.quantized else 1e-3)


def test_steps_can_be_recorded(gpt2, ids, fresh):
    """A summary does all on the device and leaves its tensors where they are."""
    caches = [fresh(gpt2) for _ in range(2)]
    places = []
    for length in (50, 28):
        tokens = [
            generate(gpt2, ids[:, :length], cache, 16, graph=graph)
            for cache, graph in zip(caches, (False, True))
        ]
        assert torch.equal(*tokens)
        places.append([t.data_ptr() for layer in caches[1].layers for t in layer.summary.tensors()])
        for cache in caches:
            cache.reset()
    assert places[0] == places[1]


def test_group_of_queries_and_rotary_keys():
    """Each query of a group has its own mass, in chunks and token by token."""
    model = sketchkv.enable(build("llama"))
    text = torch.randint(1, VOCABULARY, (1, 90), generator=torch.Generator().manual_seed(2))
    cache, again = (
        make_cache(model.config, "decayed", max_cache_size=32, **VARIANTS["both"]) for _ in range(2)
    )
    expected = score(model, text, cache, chunk_size=1)
    torch.testing.assert_close(score(model, text, again, chunk_size=90), expected, atol=1e-3, rtol=0)
    layer, query = cache.layers[0], torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(0))
    now = Tokens(None, torch.tensor([[layer.seen]], dtype=torch.int32))
    got = layer.ops.attend(layer, query, now, Form(0.25))
    *means, counts = (x.double() for x in (layer.summary.keys, layer.summary.values, layer.summary.counts))
    for head, q in enumerate(query[0, :, 0].double() / 4):
        own, few = head // 2, counts.shape[-1]
        keys, values = (
            torch.cat([m[0, own], layer.slots[n][0, own].double()]) for m, n in zip(means, ("keys", "values"))
        )
        logits = keys @ q
        logits[:few] += counts[0, own].log()
        logits[:few] += layer.summary.variance[0, own].double() @ q.square() / 2
        torch.testing.assert_close(got[0, head, 0].double(), logits.softmax(-1) @ values, atol=1e-5, rtol=0)


def test_bytes(gpt2):
    held = {
        name: nbytes(gpt2.config, method="decayed", max_cache_size=40, summary_slots=6, **options)
        for name, options in {
            "plain": {},
            "spread": dict(spread=True),
            "protected": dict(protects=True),
        }.items()
    }
    layers, heads, dim, slots, number = 2, 4, 16, 6, 4
    assert held["protected"] == held["plain"]
    assert held["spread"]["kv"] - held["plain"]["kv"] == layers * heads * slots * dim * number
    assert held["spread"]["policy"] == held["plain"]["policy"]


def test_without_options_it_is_one_mean_per_hash(gpt2, ids):
    settings = dict(recent_window=8, summary_slots=3)
    plain = score(
        gpt2, ids, SketchCache(gpt2.config, 24, recent_window=8, summary=Summary(3), policy=AttentionMass())
    )
    assert torch.equal(
        score(gpt2, ids, make_cache(gpt2.config, "decayed", max_cache_size=24, **settings)), plain
    )
