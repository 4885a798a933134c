"""Decode steps in C over coded slots: against the eager rule, and against attention in float64."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import build, named, with_fault
from test_fast import Squared, both, sorted_by_position

import sketchkv
from sketchkv import H2O, AttentionMass, SketchCache, Summary, Window
from sketchkv.checks import Settings
from sketchkv.fast import cpu, native
from sketchkv.fast.cpu import Coded, coded
from sketchkv.layer import BoundedLayer
from sketchkv.logits import Form
from sketchkv.ops import Eager, eager, unset
from sketchkv.passes import Tokens
from sketchkv.quantize import BITS, matrix, quantized

compiles = pytest.mark.skipif(
    native.library(cpu.SOURCE, DIM=16, KEY_BITS=5, VALUE_BITS=4, REST_BITS=4) is None,
    reason=f"nothing is compiled here: {native.reasons}",
)
# Of `test_fast`: what C takes, and what falls back on the eager rule.
TABLE = ["bits", "other bits", "compact", "ring", "other rings", "padding, ring", "padding, compact"]
TABLE += ["bits, softcap and sinks"]
OTHERS = ["keys alone", "ring in 16 bits", "attend_topk", "half precision", "softcap and sinks", "windows"]


class Told(Coded):
    """Notes how many steps went through C."""

    def __init__(self):
        self.steps = 0

    def attend(self, layer, query, tokens, form):
        self.steps += query.shape[2] == 1 and cpu._view(layer, query) is not None
        return super().attend(layer, query, tokens, form)


def agree(policy, feature, ops):
    """As `test_fast.agree`: a code at the edge of two may fall to either side, a fault shows in every text."""
    for _ in range(3):
        try:
            return both(policy, feature, fused=ops)
        except AssertionError as error:
            differ = error
    raise differ


@compiles
@pytest.mark.parametrize("feature", TABLE)
@pytest.mark.parametrize("policy", ["value norm", "plain mean", "H2O", "squared", "window", "SnapKV"])
def test_steps_equal_the_eager_rule(policy, feature):
    ops = Told()
    agree(policy, feature, ops)
    assert ops.steps > 0


@pytest.mark.parametrize("feature", OTHERS)
def test_what_c_does_not_know_falls_back(feature):
    ops = Told()
    agree("value norm", feature, ops)
    assert not ops.steps


def expected(layer, query, scaling, before):
    """(output, mass) of a step in float64, from what the layer holds after it: no code of its ops."""
    slots, codec, summary, ring = layer.slots, layer.slots.codec, layer.summary, layer.slots.codec.ring
    turn = matrix(codec.rotations["keys"], torch.float64)
    keys, values = (
        slots.take(name, torch.arange(slots.used).expand(*slots.shape, -1)).double() for name in slots.parts
    )
    if ring:
        rest_keys, rest_values = (ring.read(name, torch.float32).double() for name in ("keys", "values"))
        for batch, head, slot in torch.cartesian_prod(
            *map(torch.arange, (*slots.shape, slots.used))
        ).tolist():
            at = int(slots.positions[batch, head, slot])
            if at < ring.sinks or at >= layer.seen - ring.newest:
                row = at if at < ring.sinks else ring.sinks + at % ring.newest
                keys[batch, head, slot] += rest_keys[batch, head, row]
                values[batch, head, slot] += rest_values[batch, head, row]
    grouped = query.double().unflatten(1, (slots.shape[1], -1))[:, :, :, 0] @ turn
    logits = grouped @ keys.mT * scaling
    if summary:
        more = grouped @ summary.keys.double().mT * scaling + summary.counts.double().log()[..., None, :]
        logits, values = torch.cat([logits, more], -1), torch.cat([values, summary.values.double()], 2)
    share = logits.softmax(-1)
    output = (share @ values @ turn.T).flatten(1, 2)[:, :, None]
    return output, before * layer.policy.decay + share[..., : slots.used].sum(2)


def run(
    bits=(5, 4), newest=0, sinks=0, finer=4, summary=None, batch=2, group=3, width=64, kv_heads=2, steps=70
):
    """Raises AssertionError where a step of C is not that of float64, over several evictions."""
    settings = Settings(2, 3, 4, codec=quantized(bits, newest, sinks, finer))
    layer = BoundedLayer(AttentionMass(value_norm=True), 36, settings, summary)
    ops = layer.ops = Told()
    scaling = 1.6 * width**-0.5
    for step in range(steps):
        query = torch.randn(batch, kv_heads * group, 1, width) * 3
        key, value = torch.randn(2, batch, kv_heads, 1, width) + 0.5
        tokens = Tokens(None, torch.tensor([[step]], dtype=torch.int32))
        layer.update(key, value)
        slots = layer.slots
        before = torch.cat([slots["mass"], torch.zeros(batch, kv_heads, 1)], -1).double()
        ops.append(layer, *ops.turn(layer, query, key, value)[1:], tokens)
        layer.seen += 1
        output = ops.turn_back(layer, ops.attend(layer, query, tokens, Form(scaling)))
        wanted, mass = expected(layer, query, scaling, before)
        torch.testing.assert_close(output.double(), wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(slots["mass"].double(), mass, atol=2e-5, rtol=2e-5)
        if layer.seen == slots.codec.settles_after:
            slots.codec.settle(slots, layer.num_sinks)
        if not slots.room:
            torch.testing.assert_close(*(each.score(layer, tokens) for each in (ops, eager)))
            used = slots.used
            ops.evict(layer, tokens)
            layer.evicted += used - slots.used
    assert ops.steps == steps and layer.evicted > 2 * layer.evict_every


SHAPES = [
    *(dict(bits=(one, other)) for one, other in zip(BITS[1:], BITS[:0:-1], strict=True)),
    dict(summary=Summary()),
    dict(newest=5),
    *(dict(newest=9, sinks=2, finer=finer, summary=Summary()) for finer in (2, 5, 8)),
    *(dict(group=group, newest=3) for group in (1, 2, 4, 5)),
    *(dict(width=width, newest=3, sinks=1) for width in (8, 24, 96, 128, 192, 320)),
    dict(batch=1, kv_heads=1, summary=Summary()),
]


@compiles
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("shape", SHAPES, ids=named)
def test_steps_equal_attention_in_float64(shape):
    run(**shape)


@compiles
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", [AttentionMass(value_norm=True), H2O(), Window(), Squared()], ids=named)
def test_several_tokens_are_steps_one_by_one(monkeypatch, policy, padded):
    """Output, slots, masses and ring, over many evictions; texts of other lengths, sinks of attention and capped logits."""
    total, rows = 150, 2
    first = torch.tensor([0, 37], dtype=torch.int32)[:, None, None] if padded else 0
    positions = torch.arange(total, dtype=torch.int32)[None]
    if padded:
        positions = positions.expand(rows, -1).masked_fill(first[:, 0] > positions, -1)
    tokens = Tokens(None, positions, first, padded)
    query = torch.randn(rows, 6, 64, total).mT * 3  # the numbers of a vector lie apart
    key, value = torch.randn(2, rows, 2, total, 64) + 0.5
    form, layers, outputs = Form(0.2, 5.0, torch.randn(6)), [], []
    # Slots are read more than once for a block, the last time for one token.
    monkeypatch.setattr(cpu, "TOGETHER", 10)
    for sizes in [1] * total, [32, 3, 1, 17, 32, 2, 31, 32]:
        settings = Settings(2, 3, 11, codec=quantized((5, 4), newest=7, sinks=2))
        layer, start, found = BoundedLayer(copy.deepcopy(policy), 40, settings, Summary()), 0, []
        layer.ops = Coded()
        for size in sizes:
            part = slice(start, start + size)
            new = [x[:, :, part] for x in (query, key, value)]
            layer.update(*new[1:])
            found.append(layer.attend(*new, tokens.part(part), form))
            start += size
        assert start == total and layer.slots in cpu._views and layer.slots.coming is None
        layers.append(layer)
        outputs.append(torch.cat(found, 2))
    real = (positions >= 0)[:, None, :, None]
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*(output * real for output in outputs), **close)
    one, other = (layer.slots for layer in layers)
    assert torch.equal(one["positions"], other["positions"]) and layers[0].evicted == layers[1].evicted > 60
    for name in one.arrays:
        torch.testing.assert_close(one[name], other[name], **close)
    if not padded:  # what padding leaves there is never read
        assert all(map(torch.equal, one.codec.ring.tensors(), other.codec.ring.tensors()))


def broken(monkeypatch, tmp_path, old, new):
    """C with a fault."""
    monkeypatch.setattr(cpu, "SOURCE", with_fault(cpu.SOURCE, tmp_path, old, new))


@compiles
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "old, new",
    [
        (
            "i = 0; !decoded && i < used; i++) {\n        float scale = read(&slots->keys",
            "i = 0; !decoded && i < used - 1; i++) {\n        float scale = read(&slots->keys",
        ),
        (
            "i = 0; !decoded && i < used; i++) {\n        float scale = read(&slots->values",
            "i = 1; !decoded && i < used; i++) {\n        float scale = read(&slots->values",
        ),
        ("weight[g * stride + i] += dot", "weight[g * stride + i] += 0 * dot"),
        ("add(out + g * DIM, weight[g * stride + used]", "add(out + g * DIM, 0 * weight[g * stride + used]"),
        ("decay * mass[i]", "0.999f * decay * mass[i]"),
        ("slots->sinks + position % slots->newest", "slots->sinks + (position + 1) % slots->newest"),
    ],
)
def test_the_reference_sees_small_faults(monkeypatch, tmp_path, old, new):
    broken(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        run(newest=5, sinks=2, summary=Summary())


class Even(AttentionMass):
    """Scores of both signs, many of them equal, of which one is `odd`."""

    odd = -0.0

    def score(self, slots, seen):
        scores = (slots["positions"] * 37 % 7 - 3).float()
        return scores.where(slots["positions"] != 54, self.odd)


class EvictsEagerly(Coded):
    evict = Eager.evict


def left(ops, policy=None, padded=False, summary=True, steps=60):
    """A layer of which some tokens left, by `ops`."""
    generator = torch.Generator().manual_seed(0)
    settings = Settings(2, 3, 5, codec=quantized((5, 4), newest=4, sinks=1))
    layer = BoundedLayer(policy or Even(), 30, settings, Summary() if summary else None)
    layer.ops = ops
    first = torch.tensor([0, 13], dtype=torch.int32)[:, None, None] if padded else 0
    for step in range(steps):
        query, key, value = (torch.randn(2, 2, 1, 64, generator=generator) for _ in range(3))
        if type(layer.policy) is Even and step == 17:
            key[:] = torch.inf  # leaves no trace in the summary
        positions = torch.tensor([[step]], dtype=torch.int32)
        if padded:
            positions = positions.expand(2, 1).masked_fill(first[:, 0] > positions, -1)
        layer.update(key, value)
        layer.attend(query, key, value, Tokens(None, positions, first, padded), Form(0.2))
    assert layer.evicted == 30
    return layer


def assert_left_alike(padded=False, **case):
    one, other = (left(ops, padded=padded, **case) for ops in (Coded(), EvictsEagerly()))
    assert one.slots in cpu._views and one.slots.used == other.slots.used
    found, expected = (sorted_by_position(each.slots, each.slots.used) for each in (one, other))
    for name in expected:
        close = dict(atol=1e-5, rtol=1e-5, equal_nan=True)  # other orders of slots, and of sums
        torch.testing.assert_close(found[name], expected[name], **close, msg=name)
        free = one.slots.arrays[name][:, :, one.slots.used :]
        assert name in one.slots.kv or torch.equal(free, other.slots.arrays[name][:, :, one.slots.used :])
    for tensors in zip(
        one.summary.tensors() if one.summary else (), other.summary.tensors() if one.summary else ()
    ):
        torch.testing.assert_close(*tensors, atol=1e-5, rtol=1e-5)


@compiles
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("policy", [Even(), AttentionMass(value_norm=True), Window()], ids=named)
def test_evictions_equal_the_eager_rule(policy, summary, padded):
    assert_left_alike(policy=policy, summary=summary, padded=padded)


@compiles
@pytest.mark.parametrize("ops", [Coded(), EvictsEagerly()], ids=["C", "eager"])
def test_nothing_leaves_where_an_importance_is_nan(ops):
    policy = Even()
    left(ops, policy)
    policy.odd = torch.nan
    with pytest.raises(ValueError, match="Even gave NaN importance, found after 60 tokens"):
        left(ops, policy)


@compiles
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "old, new",
    [
        ("position >= recent", "position > recent"),
        (": 0) + sinks ||", ": 0) + sinks - 1 ||"),
        ("(1LL << 32) + position", "(1LL << 32) - position"),
        ("bits ^= bits >> 31", "bits ^= 0 & bits >> 31"),
        ("+ 0.0f", "+ -0.0f"),
        ("(total < 1 ? 1 : total);\n        other", "(total + 1);\n        other"),
        ("sound &= isfinite", "sound |= isfinite"),
        ("base + gone[hole]", "base + gone[0]"),
        ("base + slot *", "base + kept *"),
    ],
)
def test_small_faults_of_an_eviction_are_seen(monkeypatch, tmp_path, old, new):
    broken(monkeypatch, tmp_path, old, new)
    with pytest.raises(AssertionError):
        for padded in False, True:
            assert_left_alike(padded=padded)


def tokens_of(model, cache, ids):
    """Greedy tokens after a prompt."""
    return model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)


@compiles
def test_a_processor_without_wide_registers_gives_the_same(monkeypatch):
    monkeypatch.setattr(native, "TUNED", (("-march=x86-64-v2",), ()))
    monkeypatch.setattr(cpu, "library", native.library.__wrapped__)
    run(newest=5, sinks=2, summary=Summary())


@compiles
def test_a_cpu_takes_c_by_itself_where_something_is_coded():
    model = sketchkv.enable(build("llama"))
    ids = torch.randint(1, 97, (2, 42))
    cache, other = (SketchCache.compact(model.config, 24, recent_window=4, fine_window=3) for _ in "ab")
    for layer in other.layers:
        layer.ops = Eager()
    found, wanted = (tokens_of(model, each, ids) for each in (cache, other))
    assert all(layer.ops is coded for layer in cache.layers)
    assert all(layer.slots in cpu._views for layer in cache.layers)
    assert not any(layer.slots in cpu._views for layer in other.layers)
    assert torch.equal(found, wanted)
    plain = SketchCache(model.config, 24, recent_window=4)
    tokens_of(model, plain, ids)
    assert all(layer.ops is unset for layer in plain.layers)
    asked = SketchCache.compact(model.config, 24, recent_window=4, fine_window=3)
    for layer in asked.layers:
        layer.ops = eager
    assert torch.equal(tokens_of(model, asked, ids), wanted)
    assert all(layer.ops is eager for layer in asked.layers)


@compiles
def test_a_copy_of_a_cache_writes_into_its_own_memory():
    model = sketchkv.enable(build("llama"))
    cache = SketchCache.compact(model.config, 24, recent_window=4)
    model(torch.randint(1, 97, (1, 42)), past_key_values=cache)
    model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    held = [tensor.clone() for tensor in cache.layers[0].slots.tensors()]
    other = copy.deepcopy(cache)
    model(torch.ones(1, 1, dtype=torch.int64), past_key_values=other)
    assert all(map(torch.equal, held, cache.layers[0].slots.tensors()))


def test_without_a_compiler_the_eager_rule_serves(monkeypatch, tmp_path):
    model = sketchkv.enable(build("llama"))
    ids = torch.randint(1, 97, (1, 42))
    monkeypatch.setenv("SKETCHKV_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "library", native.library.__wrapped__)
    for compiler, reason in ("false", "false"), ("no-such-compiler", "no-such-compiler"):
        monkeypatch.setenv("CC", compiler)
        monkeypatch.setattr(native, "reasons", [])
        cache = SketchCache.compact(model.config, 24, recent_window=4)
        tokens_of(model, cache, ids)
        assert not any(layer.slots in cpu._views for layer in cache.layers)
        assert reason in native.reasons[0]
    assert not list(tmp_path.rglob("*.so"))


@compiles
def test_several_processes_may_compile_at_once(tmp_path):
    code = (
        "import sys; from sketchkv.fast import cpu, native;"
        "assert native.library(cpu.SOURCE, DIM=16, KEY_BITS=5, VALUE_BITS=4, REST_BITS=4), native.reasons"
    )
    environment = os.environ | {"SKETCHKV_CACHE": str(tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list((tmp_path / "compiled").iterdir())) == 1  # and nothing else is left


@compiles
def test_arrays_that_were_put_in_place_of_others_are_found():
    model = sketchkv.enable(build("llama"))
    cache, other = (SketchCache.compact(model.config, 24, recent_window=4) for _ in "ab")
    ids, one = torch.randint(1, 97, (1, 42)), torch.ones(1, 1, dtype=torch.int64)
    for each in (cache, other):
        model(ids, past_key_values=each)
        model(one, past_key_values=each)
    slots = cache.layers[0].slots
    for name in ("keys", "mass"):
        slots.arrays[name] = slots.arrays[name].clone()
    held = slots["mass"].clone()
    assert torch.equal(model(one, past_key_values=cache).logits, model(one, past_key_values=other).logits)
    assert not torch.equal(slots["mass"][..., :-1], held)
    for name in ("keys", "mass"):  # and C does not read what lies otherwise
        slots.arrays[name] = slots.arrays[name].transpose(1, 2).contiguous().transpose(1, 2)
    found = model(one, past_key_values=cache).logits
    torch.testing.assert_close(found, model(one, past_key_values=other).logits, atol=1e-3, rtol=1e-3)


@compiles
def test_a_number_that_is_not_finite_is_found():
    model = sketchkv.enable(build("llama"))
    cache = SketchCache.compact(model.config, 24, recent_window=4, evict_every=4)
    model(torch.randint(1, 97, (1, 24)), past_key_values=cache)
    layer = cache.layers[0]
    key = torch.full((1, 2, 1, 16), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        for step in range(24, 28):
            layer.update(key, key)
            tokens = Tokens(None, torch.tensor([[step]], dtype=torch.int32))
            layer.attend(torch.randn(1, 4, 1, 16), key, key, tokens, Form(0.25))


AUTOCAST = {
    "plain": lambda config: SketchCache(config, 100, policy=Window()),
    "coded": lambda config: SketchCache(config, 100, bits=8, policy=Window()),
    "recall": lambda config: SketchCache.recall(config, 132, top=64),
}


@pytest.mark.parametrize("kind", AUTOCAST)
def test_values_of_autocast_are_converted(kind):
    """There keys and queries of a rotary model are float32, and values are not."""
    model = sketchkv.enable(build("llama"))
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(ids).logits.float()
        for size in 60, 1:
            cache = AUTOCAST[kind](model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(size, 1)]
            off = (torch.cat(parts, 1).float() - wanted).abs().mean()
            assert off < 0.1 * wanted.std()
