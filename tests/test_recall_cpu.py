"""A step with an index in C: against the eager rule, and its choice against NumPy in float64."""

import copy

import numpy as np
import pytest
import torch
from conftest import build, named, with_fault
from exact import ExactKeys
from test_cpu import compiles
from test_recall import attended, normal, recall, score

import sketchkv
from sketchkv.checks import Settings
from sketchkv.fast import cpu, native
from sketchkv.fast import recall as fast
from sketchkv.fast.cpu import coded
from sketchkv.index import KeyIndex
from sketchkv.logits import Form
from sketchkv.ops import Eager
from sketchkv.passes import Tokens
from sketchkv.quantize import normal_levels, quantized
from sketchkv.recall import RecallLayer
from sketchkv.slots import Plain
from sketchkv.study.extras.device_store import DeviceStore
from sketchkv.tail import Tail

WINDOW, SINKS = 16, 4


def inputs(step, batch, heads, group, width, pads=0):
    """(query, key, value, tokens) of one token; row 0 of a padded text begins after `pads` tokens."""
    key, value = normal(2, batch, heads, 1, width, seed=2 * step) + 0.5
    query = 2 * normal(batch, heads * group, 1, width, seed=2 * step + 1)
    positions, first = torch.full((1, 1), step, dtype=torch.int32), 0
    if pads:
        begins = torch.tensor([pads, *[0] * (batch - 1)], dtype=torch.int32)
        positions = positions.expand(batch, 1).masked_fill(step < begins[:, None], -1)
        first = begins.where(step >= begins, -1)[:, None, None]
    return query, key, value, Tokens(None, positions, first, bool(pads))


def make(codec=None, index=None, cap=None, top=12, tail=False, **_):
    index = KeyIndex(top=top, block=16) if index is None else index
    cap = cap or index.top + SINKS + WINDOW + 4
    settings = Settings(num_sinks=SINKS, recent_window=WINDOW, codec=codec or quantized((6, 5)))
    return RecallLayer(cap, settings, copy.copy(index), Tail() if tail else None)


def pass_on(layer, given, ops):
    query, key, value, tokens = given
    layer.update(key, value)
    layer.ops = ops
    return layer.attend(query, key, value, tokens, Form(0.3))


def held(layer):
    """What slots hold, in the text's order, and what is attended to of it."""
    order = layer.slots["positions"].sort(-1)
    return order.values, *(layer.slots[name].gather(-1, order.indices) for name in ("asked", "unattended"))


def agree(monkeypatch, batch=2, heads=2, group=2, width=16, steps=80, pads=0, form=None, **made):
    """Each step is made both ways from one state; the next one starts from either in turn, so that both go on from what the
    other left."""
    empty = torch.empty
    poisoned = lambda *shape, **like: empty(*shape, **like).fill_(85 if like else torch.nan)  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    layer, unlike, in_c = make(**made), 0, 0
    for step in range(steps):
        given = inputs(step, batch, heads, group, width, pads)
        other = copy.deepcopy(layer)
        expected, found = pass_on(layer, given, Eager()), pass_on(other, given, coded)
        in_c += other.slots in cpu._views
        real = slice(int(0 < pads and step < pads), None)  # what padding attends to, nobody reads
        same = layer.moved == other.moved and all(map(torch.equal, held(layer), held(other)))
        if layer.summary:
            tails = zip(layer.summary.tensors(), other.summary.tensors(), strict=True)
            same &= all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in tails)
        unlike += not same or not torch.allclose(found[real], expected[real], atol=3e-5, rtol=1e-4)
        assert torch.equal(layer.index.pending, other.index.pending) and layer.index.seen == other.index.seen
        assert (layer.seen, layer.slots.used, layer.evicted) == (other.seen, other.slots.used, other.evicted)
        layer = other if step % 3 else layer
    assert in_c == steps - 32 and layer.moved["missing"] > 0
    assert unlike <= 2, (
        f"{unlike} of {steps} steps differ"
    )  # a code beside a rounding edge falls on either side


CASES = [
    dict(),
    dict(codec=quantized((5, 4), newest=8, sinks=SINKS)),
    dict(codec=quantized((3, 8), newest=3, sinks=2, finer=5)),
    dict(codec=quantized((6, 5), newest=5), pads=45, batch=3),
    dict(pads=20),
    dict(tail=True),
    dict(tail=True, codec=quantized((6, 5), newest=5, sinks=SINKS), pads=45, batch=3),
    *(
        dict(index=KeyIndex(top=12, block=16, bits=bits), width=width)
        for bits in (1, 2, 4)
        for width in (32, 64)
    ),
    *(
        dict(index=KeyIndex(top=9, block=16, pooling=pooling), group=3)
        for pooling in ("max", "sum", "softmax")
    ),
    *(dict(width=width) for width in (8, 24, 96, 128)),
    *(dict(group=group, heads=1, batch=1) for group in (1, 3, 5)),
    dict(top=40, cap=100, steps=110),  # more than there are at first, and never all
    dict(cap=12 + SINKS + WINDOW),  # no slot to spare
    dict(index=KeyIndex(top=12, block=16, num_sinks=0)),
]


@compiles
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("case", CASES, ids=named)
def test_steps_equal_the_eager_rule(monkeypatch, case):
    agree(monkeypatch, **case)


@compiles
def test_a_processor_without_wide_registers_gives_the_same(monkeypatch):
    monkeypatch.setattr(native, "TUNED", (("-march=x86-64-v2",), ()))
    monkeypatch.setattr(cpu, "library", native.library.__wrapped__)
    agree(monkeypatch, width=64, steps=90)


def chosen(layer, query, scaling, pooling):
    """Tokens that a step attends to, a set for each row and head, in float64 from the bits of the index: no code of its own."""
    index, slots, seen = layer.index, layer.slots, layer.seen
    turn = torch.linalg.inv(torch.as_tensor(index.rotation).double() / len(index.rotation) ** 0.5).T.numpy()
    levels, found, width = normal_levels(index.bits).numpy(), {}, query.shape[-1]
    arrays = {name: array.numpy() for name, array in index.arrays.items()}
    for row, head in np.ndindex(slots.shape):
        end, keys = min(index.coded, seen - WINDOW), []
        for token in range(SINKS, end):
            packed, block = arrays["signature"][row, head, token], token // index.block
            per, stretch = 8 // index.bits, len(packed)
            key = [
                levels[packed[c % stretch] >> c // stretch * index.bits & 2**index.bits - 1]
                for c in range(width)
            ]
            centre = arrays["centre"][row, head, block]
            middle = [
                normal_levels(4)[centre[c % (width // 2)] >> c // (width // 2) * 4 & 15] for c in range(width)
            ]
            assert per * stretch == width
            keys.append(
                np.array(key) * float(arrays["factor"][row, head, token])
                + np.array(middle) * float(arrays["centre_scale"][row, head, block, 0])
            )
        group = query.shape[1] // slots.shape[1]
        asked = query[row, head * group : (head + 1) * group, 0].double().numpy() @ turn
        always = [t for t in range(seen) if t < SINKS or t >= seen - WINDOW]
        own = dict(
            zip(
                layer.slots["positions"][row, head].tolist(),
                layer.slots["keys"][row, head].double().numpy(),
                strict=True,
            )
        )
        logits = asked @ np.array(keys).T * scaling
        if pooling == "softmax":
            resident = np.exp(asked @ np.array([own[t] for t in always]).T * scaling).sum(1)
            rank = (np.exp(logits) / (np.exp(logits).sum(1) + resident)[:, None]).sum(0)
        else:
            rank = logits.max(0) if pooling == "max" else logits.sum(0)
        found[row, head] = {*always, *(SINKS + np.argsort(-rank)[: index.top]).tolist()}
    return found


@compiles
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("pooling", ["softmax", "max", "sum"])
def test_the_choice_is_that_of_numpy(bits, pooling):
    layer = make(index=KeyIndex(top=12, block=16, bits=bits, pooling=pooling))
    for step in range(120):
        given = inputs(step, 2, 2, 3, 32)
        pass_on(layer, given, coded)
        if step > 90 and step % 7 == 0:
            at = attended(layer)
            for (row, head), expected in chosen(layer, given[0], 0.3, pooling).items():
                assert set(at[row, head].tolist()) - {-1} == expected
    assert layer.slots in cpu._views


@compiles
@pytest.mark.usefixtures("quickly")
def test_of_equal_ranks_the_newest_are_chosen():
    layers = [make(top=12) for _ in "ab"]
    for step in range(90):
        query, key, value, tokens = inputs(step, 2, 2, 2, 64)
        for layer, ops in zip(layers, (Eager(), coded), strict=True):
            pass_on(layer, (query, torch.zeros_like(key), value, tokens), ops)
    for at in attended(layers[0])[0, 0], attended(layers[1])[1, 1]:
        assert sorted(set(at.tolist()) - {-1}) == [*range(SINKS), *range(90 - WINDOW - 12, 90)]


FAULTS = [
    ("tables[half * 16 + code]", "tables[(half ^ 1) * 16 + code]"),
    ("total += expf(resident[g] - top)", "total += 0"),
    ("end = end < coded ? end : coded", "end = end < coded ? end - 1 : coded - 1"),
    ("-index->asked[at + i]", "index->asked[at + i]"),
    ("? -positions[i]", "? positions[i]"),
    ("asked[i] = (int32_t)seen", "asked[i] = 1"),
    ("token % PAGE) * RECORD", "token % 63) * RECORD"),
    ("seen - index->window ||", "seen - index->window + 1 ||"),
    ("* scale;\n        for (int64_t token", "* scale * 0.5f;\n        for (int64_t token"),
]


@compiles
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("old, new", FAULTS)
def test_the_tests_see_small_faults(monkeypatch, tmp_path, old, new):
    monkeypatch.setattr(fast, "SOURCE", with_fault(fast.SOURCE, tmp_path, old, new))
    with pytest.raises(AssertionError):
        agree(monkeypatch, width=32, steps=110)


@pytest.mark.parametrize(
    "made",
    [
        dict(codec=Plain),
        dict(codec=quantized((6, 16))),
        dict(index=ExactKeys(top=12, block=16)),
        dict(index=KeyIndex(top=12, block=16, store=DeviceStore())),
        dict(form=Form(0.3, softcap=5.0)),
        dict(form=Form(0.3, sinks=torch.ones(4))),
    ],
    ids=named,
)
def test_what_c_does_not_know_falls_back(made):
    form, layers = made.get("form", Form(0.3)), [make(**made) for _ in "ab"]
    for step in range(60):
        query, key, value, tokens = inputs(step, 2, 2, 2, 16)
        found = []
        for layer, ops in zip(layers, (Eager(), coded), strict=True):
            layer.update(key, value)
            layer.ops = ops
            found.append(layer.attend(query, key, value, tokens, form))
        assert torch.equal(*found)
    assert layers[0].moved == layers[1].moved and layers[1].slots not in cpu._views


@compiles
@pytest.mark.parametrize("store", ["host", "folder"])
def test_a_model_takes_c_by_itself_and_gives_what_the_eager_rule_gives(store, tmp_path):
    model, store = sketchkv.enable(build("llama")), "host" if store == "host" else tmp_path
    ids = torch.randint(1, 97, (2, 100), generator=torch.Generator().manual_seed(1))
    cache, other = (recall(model, codec=quantized((6, 5)), store=store) for _ in "ab")
    for layer in other.layers:
        layer.ops = Eager()
    found, expected = (score(model, ids, each) for each in (cache, other))
    assert all(layer.slots in cpu._views for layer in cache.layers)
    assert not any(layer.slots in cpu._views for layer in other.layers)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    assert cache.traffic()["chosen"] == other.traffic()["chosen"]
    assert cache.traffic()["written"] == other.traffic()["written"]


def test_without_a_compiler_the_eager_rule_serves(monkeypatch, tmp_path):
    monkeypatch.setenv("SKETCHKV_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(cpu, "library", native.library.__wrapped__)
    model = sketchkv.enable(build("llama"))
    cache = recall(model, codec=quantized((6, 5)))
    score(model, torch.ones(1, 50, dtype=torch.int64), cache)
    assert not any(layer.slots in cpu._views for layer in cache.layers)
