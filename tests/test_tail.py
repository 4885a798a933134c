"""One slot for what a query leaves out, against plain attention over all keys."""

import pytest
import torch
from conftest import build

import sketchkv
from sketchkv import SketchCache, score
from sketchkv.checks import Settings
from sketchkv.index import KeyIndex
from sketchkv.logits import Form
from sketchkv.passes import Tokens
from sketchkv.quantize import quantized
from sketchkv.recall import RecallLayer
from sketchkv.slots import Plain
from sketchkv.summary import Summary
from sketchkv.tail import Tail

SINKS, WINDOW, TOP = 4, 16, 12


def layer_of(codec=Plain, exact=False, tail=True):
    index = KeyIndex(top=TOP, block=16, exact_prompts=exact)
    return RecallLayer(40, Settings(recent_window=WINDOW, codec=codec), index, Tail() if tail else None)


def vectors(batch=2, count=150, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(1, 2, 1, 16, generator=generator)
    query, key, value = (torch.randn(batch, heads, count, 16, generator=generator) for heads in (4, 2, 2))
    return query * 2, key + shift, value


def pass_through(layer, parts, chunk, first=None):
    outputs, count = [], parts[0].shape[2]
    for start in range(0, count, chunk):
        now = slice(start, min(start + chunk, count))
        query, key, value = (x[:, :, now] for x in parts)
        positions = torch.arange(count, dtype=torch.int32)[None, now]
        tokens = Tokens(None, positions)
        if first is not None:
            positions = positions.expand(len(first), -1).masked_fill(positions < first[:, None], -1)
            tokens = Tokens(None, positions, first[:, None, None], True)
        layer.update(key, value)
        outputs.append(layer.attend(query, key, value, tokens, Form(0.5)))
    return torch.cat(outputs, 2)


def expected(parts, layer, attended, first=0):
    """The last query's attention, in float64, token by token."""
    query, keys, values = (x.double() for x in parts)
    output = torch.empty_like(query[:, :, -1])
    for row in range(len(query)):
        start = int(first[row]) if isinstance(first, torch.Tensor) else first
        for head in range(query.shape[1]):
            group = head // 2
            seen = sorted(attended[row, group])
            of = range(start + SINKS, keys.shape[2])
            key, value = keys[row, group, of].mean(0), values[row, group, of].mean(0)
            all_keys = torch.cat([keys[row, group, seen], key[None]])
            logits = all_keys @ query[row, head, -1] * 0.5
            logits[-1] += torch.tensor(keys.shape[2] - start - len(seen)).double().log()
            output[row, head] = logits.softmax(0) @ torch.cat([values[row, group, seen], value[None]])
    return output.float()


def attended_to(layer):
    at = layer.slots["positions"].masked_fill(layer.slots["unattended"], -1)
    return [[{t for t in head if t >= 0} for head in row] for row in at.tolist()]


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_query_leaves_out_weighs_as_so_many_tokens_with_the_mean(padded):
    parts, layer = vectors(), layer_of()
    first = torch.tensor([0, 23], dtype=torch.int32) if padded else None
    found = pass_through(layer, parts, 1, first)[:, :, -1]
    attended = {(r, h): seen for r, row in enumerate(attended_to(layer)) for h, seen in enumerate(row)}
    assert all(len(seen) == SINKS + WINDOW + TOP for seen in attended.values())
    wanted = expected(parts, layer, attended, first if padded else 0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    without = pass_through(layer_of(tail=False), parts, 1, first)[:, :, -1]
    assert (without - wanted).abs().max() > 1e-2  # the slot must have changed something


@pytest.mark.parametrize("codec", [Plain, quantized((5, 4))], ids=["plain", "coded"])
@pytest.mark.parametrize("chunk", [150, 37, 16])
def test_chunks_by_index_give_what_steps_give(codec, chunk):
    parts = vectors()
    steps, chunks = (pass_through(layer_of(codec), parts, n) for n in (1, chunk))
    torch.testing.assert_close(chunks, steps, atol=2e-4, rtol=1e-3)


def test_where_nothing_is_left_out_the_slot_has_no_weight():
    parts = vectors(count=30)
    with_tail, without = (pass_through(layer_of(tail=tail), parts, 1) for tail in (True, False))
    torch.testing.assert_close(with_tail, without, atol=1e-6, rtol=0)


def test_a_model_with_it_goes_on_after_reset_and_counts_its_bytes():
    model = sketchkv.enable(build("llama"))
    ids = torch.randint(0, 90, (2, 120), generator=torch.Generator().manual_seed(1))
    index = KeyIndex(top=12, block=16)
    caches = [
        SketchCache.recall(model.config, 40, index=index, recent_window=16, fine_window=0, summary=tail)
        for tail in (None, Tail())
    ]
    plain, first = (score(model, ids, cache) for cache in caches)
    caches[1].reset()
    assert torch.equal(score(model, ids, caches[1]), first) and not torch.equal(first, plain)
    width, heads = 16, 2
    per_head = 4 * (2 * width + 2)  # means of keys and values, and two counts
    assert caches[1].nbytes()["total"] - caches[0].nbytes()["total"] == 2 * 2 * heads * per_head


def test_a_summary_goes_with_evictions_and_a_tail_with_an_index():
    config = build("llama").config
    with pytest.raises(TypeError, match=r"summary=sketchkv.tail.Tail\(\)"):
        SketchCache(config, 300, index=KeyIndex(), summary=Summary())
    for make in (SketchCache, SketchCache.compact):
        with pytest.raises(
            TypeError, match=r"take SketchCache.recall or give index=sketchkv.index.KeyIndex\(\)"
        ):
            make(config, 300, summary=Tail())
