"""Sinks and newest tokens beside the codes: what attention reads, against exact vectors and codes made the slow way."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, SketchCache, Summary, Window, prompts, quantize, ring, score
from sketchkv.checks import Settings
from sketchkv.layer import BoundedLayer
from sketchkv.logits import Form
from sketchkv.passes import Tokens
from sketchkv.quantize import matrix, normal_levels, quantized, rotation
from sketchkv.slots import Plain, Slots
from sketchkv.window import WindowLayer

WIDTH, HEADS, GROUP, BITS = 16, 2, 2, (3, 2)


def coarse(x, bits):
    """Vectors `[..., WIDTH]` as their codes say: in rotated coordinates, each number to its nearest level."""
    turned = matrix(rotation(WIDTH, torch.device("cpu")), torch.float64).numpy()
    levels, x = normal_levels(bits).numpy(), x @ turned
    nearest = levels[np.abs((x / np.sqrt((x**2).mean(-1, keepdims=True)))[..., None] - levels).argmin(-1)]
    scale = (x * nearest).sum(-1, keepdims=True) / (nearest**2).sum(-1, keepdims=True)
    return nearest * np.float16(scale).astype(float) @ turned.T


class Told:
    """One text of each sequence, and what its queries must get if sinks and newest tokens are exact."""

    def __init__(self, total, first, seed):
        generator = torch.Generator().manual_seed(seed)
        self.total, self.first = total, np.array(first)
        draw = lambda heads: torch.randn(len(first), heads, total, WIDTH, generator=generator)  # noqa: E731
        self.query, self.key, self.value = draw(HEADS * GROUP) * 1.5, draw(HEADS), draw(HEADS)
        self.positions = torch.arange(total, dtype=torch.int32).expand(len(first), -1)
        self.positions = self.positions.masked_fill(
            self.positions < torch.tensor(first, dtype=torch.int32)[:, None], -1
        )

    def part(self, start, stop):
        now = slice(start, stop)
        first = torch.tensor(self.first, dtype=torch.int32)[:, None, None] if self.first.any() else 0
        tokens = Tokens(None, self.positions[:, now], first, bool(self.first.any()))
        return *(x[:, :, now] for x in (self.query, self.key, self.value)), tokens

    def reorder(self, index, before):
        """What came before is another row's."""
        for x in (self.key, self.value):
            x[:, :, :before] = x[index, :, :before].clone()

    def expected(self, step, kept, newest, sinks):
        """What the query at `step` takes from the tokens `kept` ([batch][head], positions) and itself: float64."""
        found = np.zeros((len(self.first), HEADS * GROUP, WIDTH))
        for row, head in np.ndindex(found.shape[:2]):
            tokens = sorted({int(p) for p in kept[row][head // GROUP] if p >= 0} | {step})
            key, value = (x[row, head // GROUP].double().numpy()[tokens] for x in (self.key, self.value))
            rounded = [coarse(x, bits) for x, bits in ((key, BITS[0]), (value, BITS[1]))]
            exact = [p > step - newest or p < self.first[row] + sinks for p in tokens]
            key, value = (
                np.where(np.array(exact)[:, None], x, y) for x, y in zip((key, value), rounded, strict=True)
            )
            logits = key @ self.query[row, head, step].double().numpy() * 0.5
            weights = np.exp(logits - logits.max())
            found[row, head] = weights @ value / weights.sum()
        return found


def layer_of(newest, sinks, cap=20, every=5, finer=16, window=False, summary=None, **settings):
    codec = quantized(BITS, newest=newest, sinks=sinks, finer=finer)
    settings = Settings(num_sinks=max(sinks, 1), recent_window=3, evict_every=every, codec=codec, **settings)
    if window:
        return WindowLayer(cap, settings, capped=True)
    return BoundedLayer(AttentionMass(), cap, settings, summary)


def feed(layer, told, cuts, settles=0):
    """Attention's outputs `[batch, heads, tokens, WIDTH]` of a text that comes in parts; settles: tokens before keys are
    centred, 0: they never are."""
    found = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        query, key, value, tokens = told.part(start, stop)
        layer.update(key, value)
        layer.slots.codec.settles_after = settles
        found.append(layer.attend(query, key, value, tokens, Form(0.5)))
    return torch.cat(found, 2)


def steps_differ(newest, sinks, first, seed, window=False, beams=None):
    """The largest difference of a step's output from what is told, of a bounded layer."""
    told, layer, worst = Told(40, first, seed), layer_of(newest, sinks, window=window), 0.0
    for step in range(told.total):
        if beams is not None and step == 25:
            layer.reorder_cache(beams)
            told.reorder(beams, step)
        kept = layer.slots.positions.tolist() if step else [[[]] * HEADS] * len(first)
        if window:
            kept = [[[p for p in head if p > step - 20] for head in row] for row in kept]
        got = feed(layer, told, [step, step + 1])[:, :, 0]
        expected = told.expected(step, kept, newest, sinks)
        real = told.first <= step
        worst = max([worst, *np.abs(got.double().numpy() - expected)[real].flatten()])
    return worst


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 4),
    st.sampled_from([(0, 0), (0, 7), (3, 0)]),
    st.booleans(),
    st.sampled_from([None, (0, 0), (1, 0)]),
    st.integers(0, 99),
)
def test_attention_reads_sinks_and_newest_tokens_exactly(newest, sinks, first, window, beams, seed):
    if any(first):
        beams = None  # rows of one search have one prompt
    beams = None if beams is None else torch.tensor(beams)
    assert steps_differ(newest, sinks, first, seed, window, beams) < 4e-3  # of float16, and scales on an edge


@pytest.mark.parametrize("newest, sinks", [(5, 2), (16, 0)])
def test_the_oracle_sees_a_ring_that_is_off_by_one(newest, sinks, monkeypatch):
    class Late(ring.Ring):
        def near(self, slots, positions):
            return super().near(slots, positions + 1)

    class Early(ring.Ring):
        def row(self, positions, span):
            return super().row(positions, span - torch.tensor([0, 1]))

    assert steps_differ(newest, sinks, (0, 0), 0) < 4e-3
    for mutant in (Late, Early):
        monkeypatch.setattr(quantize, "Ring", mutant)
        assert steps_differ(newest, sinks, (0, 0), 0) > 0.02


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 4),
    st.lists(st.integers(1, 39), unique=True, max_size=6),
    st.sampled_from([(0, 0), (0, 7), (12, 3)]),
    st.sampled_from([dict(), dict(window=True), dict(summary=Summary()), dict(attend_topk=12)]),
    st.integers(0, 99),
)
def test_a_token_sees_the_same_however_the_text_arrives(newest, sinks, cuts, first, changes, seed):
    told = Told(40, first, seed)
    single, parts = (layer_of(newest, sinks, finer=3, **copy.deepcopy(changes)) for _ in range(2))
    expected, got = feed(single, told, range(41), 9), feed(parts, told, [0, *sorted(cuts), 40], 9)
    real = (told.positions >= 0)[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-3)
    for one, other in zip(single.slots.codec.tensors(), parts.slots.codec.tensors(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("first", [(0, 0), (12, 3)])
@pytest.mark.parametrize("scores", [1, 300, 2000])
def test_blocks_of_queries_change_nothing(first, scores, monkeypatch):
    """Many tokens attend in blocks, so that scores stay few."""
    told = Told(40, first, 3)
    single, blocks = (layer_of(4, 2, cap=39, finer=3) for _ in range(2))
    expected = feed(single, told, range(41), 9)
    monkeypatch.setattr(prompts, "SCORES", {"cpu": scores})
    got = feed(blocks, told, [0, 9, 40], 9)
    real = (told.positions >= 0)[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("finer, error", [(16, 2e-3), (4, 0.025)])
def test_a_centre_changes_nothing_of_what_is_held_exactly(dtype, finer, error):
    """Keys lie far from zero; at token 32 all have new codes."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 60, 64, generator=generator) + 4 * torch.randn(1, 2, 1, 64, generator=generator)
    slots = Slots((1, 2), 60, (64, 64), quantized(5, newest=8, sinks=3, finer=finer)(dtype, "cpu"))
    positions = torch.arange(60, dtype=torch.int32)[None]
    for start, stop in ((0, 30), (30, 31), (31, 32), (32, 33), (33, 60)):
        part = keys[:, :, start:stop].to(dtype)
        slots.append(part, part, positions[:, start:stop])
        slots.codec.near(slots, positions[:, start:stop])  # attention comes for them
        if stop == 32:
            slots.codec.settle(slots, 3)
            assert slots.codec.centre.abs().max() > 1
        held, now = slots.codec.ring.added(slots, slots["keys"]), keys[:, :, :stop].to(dtype)
        off = (held - now).float().square().mean(-1).sqrt().amax((0, 1))
        rounding = {torch.float32: 0, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        fine = torch.tensor([p < 3 or p >= stop - 8 for p in range(stop)])
        assert off[fine].mean() < error + rounding and off[~fine].mean() > 0.04


def test_a_codec_of_float16_numbers_is_not_changed_by_reading():
    """Of a model in float16 they are decoded as a view."""
    slots = Slots((1, 1), 40, (16, 16), quantized((16, 4))(torch.float16, "cpu"))
    keys = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)).half() + 3
    slots.append(keys, keys, torch.arange(40, dtype=torch.int32)[None])
    slots.codec.settle(slots, 0)
    before = slots["keys"].clone()
    assert torch.equal(slots["keys"], before)
    torch.testing.assert_close(before, keys, atol=1e-2, rtol=0)


def test_reset_forgets_and_every_byte_is_counted(model, ids):
    def cache(**changes):
        return SketchCache(model.config, 32, recent_window=8, evict_every=5, policy=Window(), **changes)

    plain, fine = cache(bits=(5, 4)), cache(codec=quantized((5, 4), newest=8, sinks=4, finer=3))
    first = score(model, ids, fine)
    score(model, ids, plain)
    rows, heads, head_dim, layers = 2, fine.layers[0].slots.shape[1], 16, len(fine.layers)
    each = 12 * 2 * (head_dim * 3 // 8 + 2)  # codes and a scale in float16; keys and values
    assert fine.nbytes()["kv"] - plain.nbytes()["kv"] == layers * rows * (heads * each + 2 * 4)
    fine.reset()
    assert not any(tensor.any() for layer in fine.layers for tensor in layer.slots.codec.tensors())
    assert torch.equal(score(model, ids, fine), first)


def test_prompts_in_wide_slots(model, ids):
    """`prefill_chunk` passes the prompt through other slots, and the ring is the same."""
    found = []
    for chunk in (1, ids.shape[1]):
        cache = SketchCache(
            model.config, 200, prefill_chunk=16, codec=quantized((3, 3), newest=8, sinks=4), policy=Window()
        )
        found.append(score(model, ids, cache, chunk_size=chunk))
    torch.testing.assert_close(*found, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "wrong", [dict(newest=-1), dict(newest=2.5), dict(newest=4, sinks=-1), dict(newest=4, finer=7)]
)
def test_bad_settings(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        quantized(4, **wrong)


@pytest.mark.parametrize("cap, newest", [(64, None), (128, 4), (1000, 31), (4096, 64)])
def test_compact_holds_a_share_of_its_cap_finely(model, cap, newest):
    def rows(**changes):
        layer = SketchCache.compact(model.config, cap, **changes).layers[0]
        found = layer.codec(torch.float32, "cpu").ring if layer.codec.func is quantize.Quantized else None
        return found and (found.newest, found.sinks)

    assert rows() == (newest and (newest, 4)) and rows(fine_window=3, num_sinks=1) == (3, 1)
    assert rows(fine_window=0) is None and rows(bits=16) is None
    assert SketchCache.compact(model.config, cap, bits=None).layers[0].codec is Plain
    with pytest.raises(ValueError, match="needs bits"):
        SketchCache.compact(model.config, cap, bits=None, fine_window=3)
    for both in (dict(fine_window=3), dict(bits=4)):
        with pytest.raises(TypeError, match="give either"):
            SketchCache.compact(model.config, cap, codec=quantized((5, 4)), **both)
