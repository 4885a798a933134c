"""A step with an index by kernels: the choice is numpy's, attention is that of the decoded store, and all state that of torch's rule."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import build, interpreted
from exact import ExactKeys
from test_kernels import DEVICE, HAS_TRITON, INTERPRET, runs

import sketchkv
from sketchkv import SketchCache, generate
from sketchkv.checks import Settings
from sketchkv.fast import coding, scan
from sketchkv.fast.ops import Fused
from sketchkv.index import KeyIndex
from sketchkv.logits import Form
from sketchkv.ops import Eager
from sketchkv.passes import Tokens
from sketchkv.quantize import quantized
from sketchkv.recall import RecallLayer
from sketchkv.slots import Plain
from sketchkv.study.extras.device_store import DeviceStore
from sketchkv.tail import Tail

FORM = Form(0.5)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it exists for Linux)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="the tests below run in this very process")
def test_with_the_interpreter():
    interpreted(__file__)


@pytest.fixture(autouse=True)
def poisoned():
    """What a kernel forgets to write is NaN, or a number far outside."""
    whole = torch.empty

    def empty(*size, dtype=None, **kwargs):
        dtype = dtype or torch.float32
        return whole(*size, dtype=dtype, **kwargs).fill_(
            float("nan") if dtype.is_floating_point else 99 if dtype == torch.uint8 else 1 << 29
        )

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(scan, "TILE", 128 if INTERPRET else scan.TILE),
    ):
        yield


def layer_of(ops, codec=None, index=None, cap=40, recent=16, tail=False):
    settings = Settings(
        num_sinks=4, recent_window=recent, codec=codec or quantized((5, 4), newest=8, sinks=4)
    )
    index = copy.copy(index or KeyIndex(top=12, block=16))
    layer = RecallLayer(cap, settings, index, Tail() if tail else None)
    layer.ops = ops
    return layer


class Text:
    """Random vectors of a text, passed through layers: `prompt` tokens at once, then one by one."""

    def __init__(self, tokens, group=2, dim=16, dtype=torch.float32, padding=0, batch=2):
        normal = dict(device=DEVICE, dtype=torch.float32)
        query = torch.randn(batch, 2 * group, tokens, dim, **normal) * 2
        self.parts = [x.to(dtype) for x in (query, *torch.randn(2, batch, 2, tokens, dim, **normal))]
        self.positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)[None]
        self.first = 0
        if padding:
            self.positions = self.positions.repeat(batch, 1)
            self.positions[1, :padding] = -1
            self.first = torch.tensor([0, padding], dtype=torch.int32, device=DEVICE).view(2, 1, 1)

    def passed(self, layer, start, end):
        part = slice(start, end)
        query, key, value = (x[:, :, part] for x in self.parts)
        tokens = Tokens(None, self.positions[:, part], self.first, isinstance(self.first, torch.Tensor))
        layer.update(key, value)
        return layer.attend(query, key, value, tokens, FORM)


def attended(layer):
    at = layer.slots["positions"].masked_fill(layer.slots["unattended"], -1)
    return at.sort(-1).values


def content(layer):
    """What a layer holds whatever was chosen."""
    rows, heads = (x.cpu() for x in layer.all())
    held = dict(layer.store.read(rows, heads, torch.arange(layer.seen)))
    for name, array in layer.index.arrays.items():
        rows = layer.index.coded * array.shape[2] // layer.index.capacity
        held[f"index {name}"] = array[:, :, :rows]
    tail = layer.summary.tensors()[:2] if layer.summary else ()  # its weight depends on what was chosen
    held |= {f"tail {n}": tensor for n, tensor in enumerate(tail)}
    return held | {f"codec {n}": tensor for n, tensor in enumerate(layer.slots.codec.tensors())}


def assert_alike(found, expected, name=None):
    """But for a few numbers beside a rounding edge."""
    if found.dtype == torch.uint8:
        assert (found != expected).float().mean() < 0.01, name
    else:
        off = (found.double() - expected.double()).abs() > 1e-5 + 1e-4 * expected.double().abs()
        assert off.double().mean() < 0.02, name
        torch.testing.assert_close(found, expected, atol=3e-2, rtol=2e-2, msg=name)


CASES = {
    "fine": dict(),
    "coded": dict(codec=quantized((6, 5))),
    "few bits": dict(codec=quantized(3), index=KeyIndex(top=9, block=16, bits=2)),
    "wide": dict(index=KeyIndex(top=20, block=32, bits=4, num_sinks=2), recent=32, cap=60),
    "no group": dict(group=1),
    "group of three": dict(group=3, dim=64),
    "padded": dict(padding=23, tail=True),
    "tail": dict(tail=True, group=3, dim=64),
    "padded late": dict(padding=75, codec=quantized((5, 4))),
    "own device": dict(index=KeyIndex(top=12, block=16, store=DeviceStore())),
}


@runs
@pytest.mark.parametrize("case", ["fine", "padded", "few bits"] if INTERPRET else CASES)
def test_steps_are_those_of_torch(case):
    given = dict(CASES[case])
    last = 84 if INTERPRET else 130
    text = Text(last, **{name: given.pop(name) for name in ("group", "dim", "padding") if name in given})
    layers = [layer_of(ops, **given) for ops in (Fused(), Eager())]
    for layer in layers:
        text.passed(layer, 0, 80)
    outputs, differing = ([], []), 0
    for end in range(81, last + 1):
        for layer, passed in zip(layers, outputs, strict=True):
            output = text.passed(layer, end - 1, end)
            passed.append(output[(text.positions[:, end - 1] >= 0).expand(2)])
        differing += (attended(layers[0]) != attended(layers[1])).any(-1).sum()
    assert differing <= 2  # ranks that are nearly equal
    assert_alike(torch.cat(outputs[0]), torch.cat(outputs[1]))
    found, expected = ({name: int(count) for name, count in layer.moved.items()} for layer in layers)
    assert isinstance(layers[0].moved["missing"], torch.Tensor) and found["fetched"] > 0
    assert found["written"] == expected["written"] and found["chosen"] == expected["chosen"]
    assert found["fetched"] == found["missing"] * layers[0].store.record
    assert abs(found["missing"] - expected["missing"]) <= 4 * differing
    for layer in layers:
        layer.index.add(text.parts[1][:, :, :0])  # an open block that is full is coded with the next token
        assert (layer.seen, layer.evicted, layer.index.seen) == (last, last - given.get("cap", 40), last)
    found, expected = (content(layer) for layer in layers)
    for name in expected:
        assert_alike(found[name], expected[name], name)
    # What lies in slots is what the store holds of their tokens, and no token lies in two.
    slots = layers[0].slots
    at = slots.positions.long()
    rows, heads = layers[0].all()
    stored = layers[0].store.read(rows.expand_as(at), heads.expand_as(at), at.clamp(min=0))
    for name, array in stored.items():
        assert torch.equal(array[at >= 0], slots.arrays[name][at >= 0])
    assert all(
        len(set(row)) == len(row) for row in ([t for t in r if t >= 0] for r in at.flatten(0, 1).tolist())
    )


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_attends_to_the_store_in_float64_and_chooses_as_numpy(dtype):
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 as integers")
    text = Text(301, dtype=dtype)
    layer = layer_of(Fused(), quantized((6, 5)), KeyIndex(top=40, block=32), cap=80, recent=32)
    text.passed(layer, 0, 300)
    output = text.passed(layer, 300, 301)
    slots, codec = layer.slots, layer.slots.codec
    arrays = layer.store.read(*(x.cpu() for x in layer.all()), torch.arange(301))
    parts = ({p: arrays[p].to(DEVICE) for p in slots.parts[kind]} for kind in ("keys", "values"))
    codec.dtype = torch.float64
    keys, values = (codec.decode(kind, each) for kind, each in zip(("keys", "values"), parts, strict=True))
    turned = codec.turn(*(x[:, :, -1:].double() for x in text.parts))[0].view(2, 2, 2, -1)
    logits = (turned @ keys.transpose(-1, -2)) * 0.5
    estimate = layer.index.scores(text.parts[0][:, :, -1:])[:, :, :, 0].double() * 0.5
    always = {*range(4), *range(301 - 32, 301)}
    for row, head in np.ndindex(2, 2):
        others = np.array([t for t in range(301) if t not in always])
        near = logits[row, head][:, sorted(always)].exp().sum(1, keepdim=True)
        far = estimate[row, head][:, others].exp()
        rank = (far / (near + far.sum(1, keepdim=True))).sum(0).cpu().numpy()
        chosen = others[np.argsort(-rank, kind="stable")[:40]]
        assert set(attended(layer)[row, head].tolist()) - {-1} == always | set(chosen.tolist())
    seen = torch.zeros(2, 2, 302, dtype=torch.bool, device=DEVICE)
    at = attended(layer).long()
    seen.scatter_(-1, at.where(at >= 0, 301), True)
    weights = logits.masked_fill(~seen[:, :, None, :301], -torch.inf).softmax(-1)
    expected = codec.turn_back((weights @ values).view(2, 4, 1, -1))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert (output.double() - expected).norm() / expected.norm() < tolerance


@runs
@pytest.mark.parametrize(
    "bits, dtype", [(1, torch.float32), (2, torch.bfloat16), (4, torch.float16)], ids=str
)
def test_a_block_is_coded_as_by_the_index(bits, dtype):
    keys = torch.randn(2, 3, 96, 64, device=DEVICE) + torch.randn(64, device=DEVICE)
    keys[0, 1, 40, 3] = float("inf")  # counts in no centre
    keys, found = keys.to(dtype), KeyIndex(top=8, bits=bits, block=32, num_sinks=36)
    found.add(keys[:, :, :63])
    expected = copy.deepcopy(found)
    found.pending[:, :, 31] = keys[:, :, 63]
    coding.block(found)
    expected.code(torch.cat([expected.open(31, keys.device), keys[:, :, 63:64]], 2))
    assert found.coded == expected.coded == 64
    sound = torch.arange(64, device=DEVICE) != 40
    for name, array in expected.arrays.items():
        got, want = (
            found.arrays[name][:, :, : 64 * array.shape[2] // 1024],
            array[:, :, : 64 * array.shape[2] // 1024],
        )
        if got.shape[2] == 64:
            got, want = got[:, :, sound], want[:, :, sound]
        if got.dtype == torch.uint8:
            assert (got != want).float().mean() < 0.01, name  # beside a rounding edge
        else:
            torch.testing.assert_close(got, want, atol=1e-3, rtol=2e-3, msg=name)


@runs
def test_equal_ranks_give_the_newest_tokens():
    text, layer = Text(200), layer_of(Fused())
    text.parts[0].zero_()  # no key is nearer than another
    text.passed(layer, 0, 150)
    for end in range(151, 153 if INTERPRET else 171):
        text.passed(layer, end - 1, end)
        expected = [*range(4), *range(end - 16 - 12, end)]
        assert all([t for t in row if t >= 0] == expected for row in attended(layer).flatten(0, 1).tolist())


@runs
def test_many_tokens_are_chosen_tile_by_tile():
    text = Text(150)
    layers = [layer_of(ops, index=KeyIndex(top=40, block=16), cap=64) for ops in (Fused(), Eager())]
    with mock.patch.object(scan, "TILE", 32):
        for layer in layers:
            text.passed(layer, 0, 140)
        for end in range(141, 143 if INTERPRET else 151):
            found, expected = (text.passed(layer, end - 1, end) for layer in layers)
            assert torch.equal(attended(layers[0]), attended(layers[1]))
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@runs
@pytest.mark.parametrize(
    "changes",
    [
        dict(codec=Plain),
        dict(index=ExactKeys(top=12, block=16)),
        dict(index=KeyIndex(top=12, block=16, pooling="max")),
    ],
    ids=["plain", "exact keys", "pooling"],
)
def test_what_kernels_do_not_serve_is_left_to_torch(changes):
    text, layers = Text(90), [layer_of(ops, **changes) for ops in (Fused(), Eager())]
    for layer in layers:
        text.passed(layer, 0, 80)
    for end in range(81, 91):
        found, expected = (text.passed(layer, end - 1, end) for layer in layers)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert isinstance(layers[0].moved["missing"], int)


@runs
def test_a_text_begins_again_and_rows_move():
    text, other = Text(130), Text(130)
    layers = [layer_of(ops) for ops in (Fused(), Eager())]
    order = torch.tensor([1, 1], device=DEVICE)
    for layer in layers:
        text.passed(layer, 0, 90)
        [text.passed(layer, t, t + 1) for t in range(90, 91 if INTERPRET else 100)]
        layer.reset()
        [other.passed(layer, t, t + 1) for t in range(3)]
        other.passed(layer, 3, 35)
        other.passed(layer, 35, 36)  # kernels serve it once the codec has settled
        other.passed(layer, 36, 70)
        layer.reorder_cache(order)
    found, expected = (
        torch.cat([other.passed(layer, t - 1, t) for t in range(71, 73 if INTERPRET else 131)])
        for layer in layers
    )
    assert_alike(found, expected)
    assert (attended(layers[0]) != attended(layers[1])).sum() <= 2


@pytest.mark.parametrize(
    "store", ["host"] if INTERPRET else ["host", DeviceStore()], ids=lambda store: type(store).__name__
)
def test_recorded_steps_give_the_same_tokens(store):
    """Where nothing can be recorded, the steps that would be run one by one."""
    model = sketchkv.enable(build("llama", positions=2048)).to(DEVICE)
    ids = torch.randint(1, 97, (2 if DEVICE == "cuda" else 1, 1000), device=DEVICE)
    settings = dict(recent_window=16, index=KeyIndex(top=12, block=16, store=store), bits=(6, 5))
    caches = [SketchCache.recall(model.config, 40, **settings) for _ in "ab"]
    # On a GPU the first text passes a place where memory grows, and the second finds the recordings of the first.
    for length, new in ((1000, 60), (300, 40)) if DEVICE == "cuda" else ((70, 2), (60, 2)):
        expected, got = (
            generate(model, ids[:, :length], cache, new, graph=cache is caches[1]) for cache in caches
        )
        assert torch.equal(got, expected)
        assert caches[1].traffic() == caches[0].traffic() and caches[0].traffic()["fetched"] > 0
        for layer in range(2):
            kept = [cache.kept_positions(layer).sort(-1).values for cache in caches]
            assert torch.equal(*kept)
        assert caches[1].recordings.graphs or DEVICE == "cpu"
        logits = [model(got[:, -1:], past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        for cache in caches:
            cache.reset()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_the_host_waits_for_nothing():
    text, layer = Text(300), layer_of(Fused())
    text.passed(layer, 0, 200)
    for end in range(201, 270):
        text.passed(layer, end - 1, end)  # kernels are compiled, pages are taken
    layer.store.reserve(1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for end in range(270, 300):
            text.passed(layer, end - 1, end)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.seen == 299 and layer.moved["missing"] > 0
