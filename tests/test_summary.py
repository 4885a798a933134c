"""Summary slots against the record of what was evicted, recomputed in float64 from plain lists."""

import copy

import pytest
import torch
from conftest import attended

from sketchkv import H2O, AttentionMass, SketchCache, Window, score
from sketchkv.checks import Settings
from sketchkv.layer import BoundedLayer
from sketchkv.slots import Plain, Slots
from sketchkv.summary import Summary

POLICIES = {"window": Window(), "H2O": H2O(), "decayed mean": AttentionMass(), "default": None}


def allocated(summary, shape=(1, 1), width=8, dtype=torch.float32):
    summary.allocate(Slots(shape, 1, (width, width), Plain(dtype, "cpu")))
    return summary


def plain_buckets(keys, summary):
    """Bucket of each key of a list, bit by bit and hashed in Python's integers."""
    projection = summary.code.projection.double()
    a, b = int(summary.hash.a), int(summary.hash.b)
    buckets = []
    for key in keys:
        code = sum(
            2**bit for bit in range(projection.shape[1]) if float(key.double() @ projection[:, bit]) > 0
        )
        buckets.append((a * code + b) % (2**31 - 1) % summary.counts.shape[-1])
    return buckets


def reference(layer, record, kept, query, scaling, row, head, group):
    """Output of one query head, from all keys and values ever seen (`record`) and the positions `kept` before the step,
    the query's own token being the newest. Everything else that is real must be in a summary."""
    keys, values, real = record
    now = keys.shape[2] - 1
    stored = {p for p in kept[row, head].tolist() if p >= 0} | ({now} if real[row, now] else set())
    evicted = [p for p in range(now) if real[row, p] and p not in stored]
    buckets = {}
    for position, bucket in zip(evicted, plain_buckets(keys[row, head, evicted], layer.summary)):
        buckets.setdefault(bucket, []).append(position)
    query = query[row, head * group[1] + group[0], 0].double()
    entries = [(keys[row, head, p].double(), values[row, head, p].double(), 1.0) for p in sorted(stored)]
    for members in buckets.values():
        mean = [x[row, head, members].double().mean(0) for x in (keys, values)]
        entries.append((*mean, float(len(members))))
    weights = torch.stack([(query @ key * scaling).exp() * count for key, _, count in entries])
    return sum(w * value for w, (_, value, _) in zip(weights / weights.sum(), entries)), len(evicted)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("padded", [False, True])
def test_output_equals_attention_recomputed_from_the_record(model, ids, padding, policy, padded, monkeypatch):
    """Each layer's attention for a text fed token by token; with padding, row 1 lacks its first 23 tokens."""
    tokens, mask = padding if padded else (ids, torch.ones_like(ids))
    cache = SketchCache(
        model.config,
        24,
        num_sinks=2,
        recent_window=6,
        evict_every=5,
        summary=Summary(3),
        policy=copy.deepcopy(POLICIES[policy]),
    )
    checked, records = [], {}
    attend = BoundedLayer.attend

    def watched(layer, query, key, value, tokens, form):
        kept = layer.slots.positions.clone()
        kept[:, :, layer.slots.used :] = -1
        now = [key, value, mask[:, layer.seen : layer.seen + 1] == 1]
        past = records.get(layer)
        records[layer] = (
            now if past is None else [torch.cat([p, n], d) for p, n, d in zip(past, now, (2, 2, 1))]
        )
        output = attend(layer, query, key, value, tokens, form)
        step = layer.seen - 1
        if step % 9 == 0 or step in (29, 30, 99):
            size = query.shape[1] // key.shape[1]
            for row in range(2):
                if mask[row, step]:
                    head, member = (step + row) % key.shape[1], step % size
                    which = (row, head, (member, size))
                    expected, evicted = reference(layer, records[layer], kept, query, form.scaling, *which)
                    got = output[row, head * size + member, 0].double()
                    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
                    checked.append(evicted)
        return output

    monkeypatch.setattr(BoundedLayer, "attend", watched)
    for step in range(100):
        positions = (mask[:, : step + 1].cumsum(-1) - 1).clamp(min=0)[:, -1:]
        seen = mask[:, : step + 1]
        model(tokens[:, step : step + 1], attention_mask=seen, position_ids=positions, past_key_values=cache)
    assert len(checked) > 30 and max(checked) >= 70
    # Every real token is either stored or counted once.
    for layer in cache.layers:
        stored = (layer.slots.positions >= 0).sum(-1)
        assert torch.equal(
            stored + layer.summary.counts.sum(-1), mask.sum(-1)[:, None].expand_as(stored).float()
        )


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_one_repeated_token_equals_the_full_cache(softcap):
    """Keys of a bucket are equal, and so are values: log n is exact, and the bounded cache loses nothing."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(5, 8, generator=generator)
    values_of = torch.randn(5, 8, generator=generator)
    order = torch.randint(0, 5, (90,), generator=generator)
    buckets = None
    for slots in range(1, 400):  # a number of buckets that keeps the five apart
        buckets = allocated(Summary(slots), width=8).buckets(kinds[None, None])[0, 0]
        if len(buckets.unique()) == 5:
            break
    layer = BoundedLayer(Window(), 20, Settings(2, 4, 3), Summary(slots))
    keys, values = kinds[order][None, None], values_of[order][None, None]
    query = torch.randn(1, 3, 90, 8, generator=generator)
    torch.testing.assert_close(*attended(layer, query, keys, values, softcap), atol=1e-5, rtol=0)
    assert layer.summary.counts.sum() == 90 - layer.slots.used >= 60


def test_policies_see_no_mass_on_summaries(gpt2, ids):
    """What a policy observes lies on stored tokens, and with summaries it is less than the whole."""
    totals = []

    class Watch(AttentionMass):
        def observe(self, slots, attention):
            assert attention.shape[3] == slots.used
            totals.append(attention.sum(-1))
            super().observe(slots, attention)

    cache = SketchCache(gpt2.config, 24, recent_window=6, evict_every=5, summary=Summary(3), policy=Watch())
    score(gpt2, ids, cache, chunk_size=1)
    torch.testing.assert_close(totals[0], torch.ones_like(totals[0]))
    assert (totals[-1] < 0.999).all()


def test_bytes(gpt2, ids):
    caches = [
        SketchCache(gpt2.config, 24, evict_every=5, recent_window=6, summary=s) for s in (None, Summary(3))
    ]
    for cache in caches:
        score(gpt2, ids, cache)
    without, with_summary = (cache.nbytes() for cache in caches)
    heads, head_dim, layers, rows = 4, 16, 2, 2
    assert with_summary["kv"] - without["kv"] == layers * rows * heads * 3 * head_dim * 2 * 4
    counts = rows * heads * 3 * 4
    assert with_summary["policy"] - without["policy"] == layers * (
        counts + head_dim * 12 * 4 + 12 * 4 + 2 * 8
    )
    assert with_summary["sketch"] == without["sketch"]
    assert caches[1].stored_tokens() == caches[0].stored_tokens()
    assert caches[1].kept_positions(0).shape == caches[0].kept_positions(0).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_keep_moving_in_half_precision(dtype):
    """Many tokens near one value, then as many near another: a mean that stalls stays with the first."""
    summary = allocated(Summary(), width=4, dtype=dtype)
    half = torch.full((1, 1, 10, 4), 1.0, dtype=dtype)
    positions = torch.arange(10).expand(1, 1, 10)
    for part in [half] * 400 + [half * 3] * 400:
        summary.fold(part, -part, positions)
    assert summary.counts.item() == 8000
    for mean, exact in zip((summary.keys, summary.values), (2, -2), strict=True):
        torch.testing.assert_close(mean.float(), torch.full((1, 1, 1, 4), float(exact)), atol=0.02, rtol=0)
    assert summary.nbytes()["kv"] == 2 * 4 * 4  # as float32, whatever the model's dtype


@pytest.mark.parametrize("slots", [-1, 0, 2.0, True])
def test_bad_settings(gpt2, slots):
    with pytest.raises(ValueError, match="summary slots must be a whole number"):
        Summary(slots)
    with pytest.raises(TypeError, match="such as Summary"):
        SketchCache(gpt2.config, 64, summary=slots)


def test_one_slot_needs_no_hashing_and_holds_the_mean():
    keys, values = torch.randn(2, 2, 3, 5, 16)
    summary = allocated(Summary(), (2, 3), 16)
    real = torch.rand(2, 3, 5) < 0.8
    real[..., 0] = True
    summary.fold(keys, values, real.int() - 1)
    assert summary.nbytes() == {"kv": 2 * 2 * 3 * 16 * 4, "policy": 2 * 3 * 4}
    weights = real[..., None].float() / real.sum(-1)[..., None, None]
    torch.testing.assert_close(summary.keys, (keys * weights).sum(2, keepdim=True))
    torch.testing.assert_close(summary.values, (values * weights).sum(2, keepdim=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_leaves_no_trace(bad):
    with_it, without = (allocated(Summary(spread=True), width=4) for _ in range(2))
    keys, values = torch.randn(2, 1, 1, 6, 4)
    positions = torch.arange(6).view(1, 1, 6)
    without.fold(keys[:, :, 1:], values[:, :, 1:], positions[..., 1:])
    keys[..., 0, 2] = bad
    with_it.fold(keys, values, positions)
    for a, b in zip(with_it.tensors(), without.tensors(), strict=True):
        torch.testing.assert_close(a, b)
