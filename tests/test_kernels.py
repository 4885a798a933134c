"""The fused kernel against float64: on the GPU where there is one, else through Triton's interpreter."""

import importlib.util
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import interpreted

from sketchkv import AttentionMass, Sketch, Summary
from sketchkv.checks import Settings
from sketchkv.fast import attention as fast_attention
from sketchkv.fast import coded, codes, eviction, launch, storage, token
from sketchkv.fast.attention import attend
from sketchkv.fast.ops import Fused
from sketchkv.layer import BoundedLayer
from sketchkv.ops import eager
from sketchkv.passes import Tokens
from sketchkv.quantize import matrix, normal_levels, pack, quantized, unpack
from sketchkv.sketch import SimHash
from sketchkv.slots import Plain, Slots

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not (INTERPRET and HAS_TRITON),
    reason="needs a GPU with triton; on a CPU test_with_the_interpreter runs these with TRITON_INTERPRET=1",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it exists for Linux)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="the tests below run in this very process")
def test_with_the_interpreter():
    interpreted(__file__)


def test_a_rotation_too_large_for_a_gpu_is_left_to_the_eager_rule(monkeypatch):
    """232,448 bytes on an H100, where Triton asked for 278,528 of heads of 256 numbers in single precision."""
    properties = SimpleNamespace(shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    card = torch.device("cuda")
    assert not launch.has_room(256, torch.float32, card) and not launch.has_room(256, torch.bfloat16, card)
    assert launch.has_room(128, torch.float32, card) and launch.has_room(128, torch.bfloat16, card)
    assert launch.has_room(256, torch.float32, torch.device("cpu"))


def test_a_launch_is_repeated_only_where_nothing_differs_that_triton_compiles_for(monkeypatch):
    def kernel(x, size, scale, count, WIDTH):
        pass

    looked, ran = [], []
    compiled = SimpleNamespace(run=lambda *a: ran.append(a), function=0, packed_metadata=1)
    own = launch.Kernel(kernel, ["count"])
    own.slow = {grid: lambda *a, **c: looked.append((a, c)) or compiled for grid in ((2,), (3, 4))}
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    x = torch.zeros(64)
    own[(2,)](x, 32, 0.5, 3, WIDTH=8)
    assert len(looked) == 1 and not ran  # the first time Triton launches
    own[(3, 4)](
        x[4:], 48, 1.5, 4, WIDTH=8
    )  # another aligned address, multiple of 16, factor and loose number
    assert len(looked) == 1
    assert ran == [(3, 4, 1, 7, 0, 1, None, None, None, x[4:].data_ptr(), 48, 1.5, 4, 8)]
    for changed in (
        (x[1:], 32, 0.5, 3, 8),
        (x.half(), 32, 0.5, 3, 8),
        (x, 33, 0.5, 3, 8),
        (x, 1, 0.5, 3, 8),
        (x, 2**31, 0.5, 3, 8),
        (x, 32, 2, 3, 8),
        (x, 32, 0.5, 3, 16),
    ):
        *arguments, width = changed
        own[(2,)](*arguments, WIDTH=width)
    assert len(looked) == 8 and len(ran) == 1


@pytest.fixture
def poisoned():
    """Memory that a kernel forgets to write is NaN."""

    def empty(*args, **kwargs):
        return torch.full(*_shape(args), float("nan"), **kwargs)

    with mock.patch.object(torch, "empty", empty):
        yield


def _shape(args):
    return [tuple(args[0]) if isinstance(args[0], (tuple, list)) else args]


def reference(query, keys, values, scaling, positions):
    """(output, attention received) in float64."""
    batch, kv_heads, used, head_dim = keys.shape
    query = query.double().view(batch, kv_heads, -1, head_dim)
    logits = query @ keys.double().transpose(-1, -2) * scaling
    if positions is not None:
        logits = logits.masked_fill(positions[:, :, None] < 0, torch.finfo(torch.float32).min)
    attention = logits.softmax(-1)
    return (attention @ values.double()).reshape(batch, -1, head_dim), attention.sum(2)


def assert_near(result, expected, dtype):
    assert result.isfinite().all()
    assert (result.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


def draw(batch, kv_heads, group, used, head_dim, dtype, capacity=None, holes=0.0):
    """Fresh random (query, keys, values, positions); keys and values are views of larger arrays, sharply attended."""
    normal = dict(dtype=torch.float32, device=DEVICE)
    capacity = capacity or used + 13
    query = torch.randn(batch, kv_heads * group, head_dim, **normal) * 2
    keys, values = torch.randn(2, batch, kv_heads, capacity, head_dim, **normal)
    keys[:, :, used:] = values[:, :, used:] = float("nan")  # beyond the occupied slots lies nothing of use
    positions = (
        torch.arange(capacity, device=DEVICE, dtype=torch.int32)
        .expand(batch, kv_heads, capacity)
        .contiguous()
    )
    positions[torch.rand(positions.shape, device=DEVICE) < holes] = -1
    query, keys, values = query.to(dtype), keys.to(dtype)[:, :, :used], values.to(dtype)[:, :, :used]
    return query, keys, values, positions[:, :, :used]


# batch, kv_heads, group, used, head_dim, splits (None: as many as the kernel likes)
SIZES = [
    (1, 1, 1, 1, 16, None),
    (1, 3, 1, 257, 64, None),
    (2, 2, 1, 100, 64, 1),
    (2, 2, 1, 333, 128, 3),
    (3, 1, 1, 129, 80, 2),
    (1, 2, 2, 257, 64, None),
    (2, 2, 2, 100, 16, 1),
    (2, 1, 4, 333, 64, 3),
    (1, 1, 4, 200, 128, 1),
    (1, 2, 3, 70, 48, None),
]


@runs
@pytest.mark.parametrize(
    "dtype,holes", [(torch.float32, 0.4), (torch.float16, 0.4), (torch.bfloat16, 0.0)], ids=str
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attend_equals_float64(poisoned, size, dtype, holes):
    *shape, splits = size
    if INTERPRET and dtype == torch.bfloat16 and shape[2] > 1:
        pytest.skip(
            "Triton 3.6's interpreter multiplies matrices of bfloat16 by their bits; float16 and GPUs check this"
        )
    query, keys, values, positions = draw(*shape, dtype, holes=holes)
    positions = positions if holes else None
    scaling = query.shape[-1] ** -0.5
    output, received = attend(query, keys, values, scaling, positions, splits=splits)
    expected, attention = reference(query, keys, values, scaling, positions)
    assert output.dtype == dtype and received.dtype == torch.float32
    assert_near(output, expected, dtype)
    assert_near(received, attention, torch.float32)
    if holes and shape[3] > 1:
        assert (received[positions < 0] == 0).all()


@runs
@pytest.mark.parametrize("group,splits", [(1, 1), (1, 4), (2, 1), (4, 3)])
def test_received_is_updated_in_place(poisoned, group, splits):
    query, keys, values, positions = draw(2, 2, group, 190, 64, torch.float32, holes=0.2)
    held = torch.rand(2, 2, 224, device=DEVICE)
    before = held.clone()
    _, received = attend(query, keys, values, 0.1, positions, held[:, :, :190], decay=0.9, splits=splits)
    assert received.data_ptr() == held.data_ptr()
    _, attention = reference(query, keys, values, 0.1, positions)
    assert_near(received, 0.9 * before[:, :, :190] + attention, torch.float32)
    assert torch.equal(held[:, :, 190:], before[:, :, 190:])


@runs
@pytest.mark.parametrize("group,splits", [(1, 1), (1, 3), (2, 2)])
def test_a_row_of_padding_attends_evenly_and_extremes_stay_finite(poisoned, group, splits):
    query, keys, values, positions = draw(3, 1, group, 150, 32, torch.float32)
    positions[1] = -1
    query[2] *= 1e4  # all but one-hot
    output, received = attend(query, keys, values, 0.2, positions, splits=splits)
    expected, attention = reference(query, keys, values, 0.2, positions)
    torch.testing.assert_close(received[1], torch.full_like(received[1], group / 150))
    for row in range(2):
        assert_near(output[row], expected[row], torch.float32)
    assert output.isfinite().all() and received.isfinite().all()
    torch.testing.assert_close(received.sum(-1), torch.full_like(received[..., 0], group))


@runs
@pytest.mark.parametrize("group", [1, 2])
def test_nan_in_a_key_shows(group):
    query, keys, values, _ = draw(1, 1, group, 100, 32, torch.float32)
    keys[0, 0, 40, 3] = float("nan")
    output, received = attend(query, keys, values, 0.2)
    assert output.isnan().any() and received.isnan().any()


@runs
def test_any_strides(poisoned):
    query, keys, values, _ = draw(2, 3, 2, 70, 32, torch.float32)
    expected, attention = reference(query, keys, values, 0.2, None)
    layouts = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (query, keys, values)]
    layouts[2] = values.transpose(0, 1).contiguous().transpose(0, 1)
    output, received = attend(*layouts, 0.2)
    assert_near(output, expected, torch.float32)
    assert_near(received, attention, torch.float32)


@runs
def test_shapes_that_do_not_fit_are_refused():
    query, keys, values, positions = draw(2, 2, 1, 20, 32, torch.float32)
    for arguments in (
        (query[:, :, :16], keys, values, 1.0),
        (query[:1], keys, values, 1.0),
        (query, keys, values[:, :, :7], 1.0),
        (query, keys, values, 1.0, positions[:, :1]),
    ):
        with pytest.raises(ValueError, match="query .*, keys"):
            attend(*arguments)


def test_without_triton_use_is_refused_with_the_way_out(monkeypatch):
    for module in (launch, fast_attention):
        monkeypatch.setattr(module, "triton", None)
    query = torch.randn(1, 2, 16)
    assert not launch.usable(query.device)
    with pytest.raises(RuntimeError, match="package triton"):
        attend(query, torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 1.0)


@runs
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("fresh", [4, 40])
def test_remembering_equals_the_torch_path(mean, decay, fresh):
    """Fading, adding and asking in one kernel, twice in a row, against what `Sketch.score` does on any device."""
    policies = [Sketch(width=48, depth=3, key="token", decay=decay, mean=mean) for _ in range(2)]
    slots = [Slots((2, 3), 40, (16, 16), Plain(torch.float32, torch.device(DEVICE))) for _ in range(2)]
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    for policy, own in zip(policies, slots):
        policy.allocate(own)
        own.used, own.kept = 40, 40 - fresh
    for seen in (60, 60 + fresh):
        item, mass = (
            torch.randint(2**30, (2, 3, 40), generator=generator),
            torch.rand(2, 3, 40, generator=generator),
        )
        positions = torch.randint(-1, 60, (2, 3, 40), generator=generator)
        for own in slots:
            for name, new in (("signature", item), ("mass", mass), ("positions", positions)):
                own.arrays[name].copy_(new)
        for own in slots:
            own.arrays["signature"][:, :, 0] = 2**31 - 1  # p itself counts as 0
        expected = policies[0].score(slots[0], seen)
        clock = torch.tensor([seen], dtype=torch.int32, device=DEVICE)
        held = (slots[1]["signature"], slots[1]["mass"], slots[1]["positions"])
        got = eviction.remember(*held, policies[1].sketches, clock, fresh, decay)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        for one, other in zip(*(policy.tensors() for policy in policies)):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
        assert not slots[1].arrays["mass"].any()


@runs
@pytest.mark.parametrize("used,count", [(7, 2), (40, 16), (272, 16), (300, 5)])
@pytest.mark.parametrize("padded", [False, True])
def test_choosing_and_closing_equal_the_torch_path(used, count, padded):
    """The slots that are chosen, and what each array holds once they are freed, as on any device; twice in a row."""
    settings = Settings(num_sinks=2, recent_window=2, evict_every=count)
    layers = [BoundedLayer(AttentionMass(mean=False), used - count, settings) for _ in range(2)]
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    key, value = torch.randn(2, 2, 3, 1, 24, generator=generator).to(DEVICE)
    for layer in layers:
        layer.update(key, value)
        layer.slots.add("wide", torch.float16, 3)
    first = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)[:, None, None] if padded else 0
    for start in (0, used - count):
        fresh = used if start == 0 else count
        places = torch.rand(2, 3, fresh, generator=generator).argsort(-1).int() + layers[0].seen
        if padded:
            places[1][places[1] < 3] = -1
        new = {
            "keys": torch.randn(2, 3, fresh, 24, generator=generator),
            "values": torch.randn(2, 3, fresh, 24, generator=generator),
            "mass": torch.randint(-2, 3, (2, 3, fresh), generator=generator) / 2.0,
            "positions": places,
            "wide": torch.rand(2, 3, fresh, 3, generator=generator),
        }
        new["mass"][0, 0, 1] = -0.0
        clock = torch.full((1,), layers[0].seen + fresh - 1, dtype=torch.int32, device=DEVICE)
        tokens = Tokens(None, clock[None], first, padded)
        for layer in layers:
            for name, array in new.items():
                layer.slots.arrays[name][:, :, start:used] = array.to(DEVICE)
            layer.seen += fresh
            layer.slots.used = used
        eager.evict(layers[0], tokens)
        with mock.patch.object(storage, "compact", wraps=storage.compact) as compact:
            Fused().evict(layers[1], tokens if start else tokens._replace(clock=clock))
        assert compact.call_count == 1
        stored = [sorted_by_position(layer.slots, used - count) for layer in layers]
        for name in stored[0]:
            assert torch.equal(stored[0][name], stored[1][name]), name
        for layer in layers:
            assert (layer.slots.positions[:, :, used - count :] == -1).all()
            assert not layer.slots.arrays["mass"][:, :, used - count :].any()
            assert layer.slots.used == layer.slots.kept == used - count
    layers[1].slots.arrays["mass"][0, 0, : used - count] = torch.nan
    layers[1].slots.used = used
    with pytest.raises(ValueError, match="NaN"):
        Fused().evict(layers[1], tokens)
        layers[1].check()


def sorted_by_position(slots, end):
    """Every array of the first `end` slots, tokens in the text's order; padding, whose slots are alike, is zero."""
    order = slots.positions[:, :, :end].argsort(dim=-1, stable=True)
    real = slots.positions[:, :, :end].gather(-1, order) >= 0
    found = {}
    for name, array in slots.arrays.items():
        index, mask = (order, real) if array.ndim == 3 else (order[..., None], real[..., None])
        part = array[:, :, :end]
        found[name] = torch.where(mask, part.gather(2, index.expand_as(part)), 0)
    return found


@runs
@pytest.mark.parametrize("dim,bits,start,count", [(64, 24, 5, 16), (24, 3, 0, 37), (128, 30, 20, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codes_equal_simhash(dim, bits, start, count, dtype):
    keys = torch.randn(2, 3, 40, dim, device=DEVICE).to(dtype)
    items, code = torch.full((2, 3, 40), -7, dtype=torch.int32, device=DEVICE), SimHash(dim, bits, 1, DEVICE)
    eviction.codes(keys, code.projection, items, start, count)
    expected = code(keys)
    inside = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    inside[start : start + count] = True
    assert (items[..., ~inside] == -7).all()
    # A projection that is all but zero may have either sign.
    clear = ((keys.float() @ code.projection).abs() > 1e-4).all(-1)
    assert (
        torch.equal(items.long()[clear & inside], expected[clear & inside].long())
        and clear.float().mean() > 0.9
    )


def coded_slots(bits, kv_heads, used, dim, dtype, holes=0.0, spare=5):
    """Slots with random codes, scales and centre, and what they hold: float64 (keys, values), `[2, kv_heads, used, dim]`."""
    capacity = used + spare
    slots = Slots((2, kv_heads), capacity, (dim, dim), quantized(bits)(dtype, torch.device(DEVICE)))
    held = []
    for name, each in zip(("keys", "values"), bits):
        drawn = torch.randint(2**each, (2, kv_heads, capacity, dim), dtype=torch.uint8)
        scales = torch.randn(2, kv_heads, capacity, 1).half()
        slots.arrays[name].copy_(pack(drawn, each))
        slots.arrays[f"{name}_scale"].copy_(scales)
        slots.arrays[f"{name}_scale"][:, :, used:] = (
            torch.nan
        )  # beyond the occupied slots lies nothing of use
        held.append((normal_levels(each)[drawn.long()] * scales.double())[:, :, :used].to(DEVICE))
    slots.codec.centre.normal_()
    slots.positions.copy_(torch.arange(capacity).expand(2, kv_heads, capacity))
    slots.positions[torch.rand(slots.positions.shape, device=DEVICE) < holes] = -1
    slots.used = used
    return slots, held[0] + slots.codec.centre.double(), held[1]


def drawn_summary(slots, counts=(0.0, 40.0)):
    """One summary slot per KV head, empty in the first row."""
    summary = Summary()
    summary.allocate(slots)
    summary.keys.normal_()
    summary.values.normal_()
    summary.counts.copy_(torch.tensor(counts)[:, None, None])
    return summary


CODED = [  # bits, kv_heads, group, used, dim, splits
    ((5, 4), 2, 3, 70, 64, None),
    ((5, 4), 1, 1, 1, 16, None),
    ((5, 4), 1, 2, 300, 64, 4),
    ((3, 2), 2, 1, 40, 32, 1),
    ((8, 6), 1, 4, 129, 128, 2),
]


@runs
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("size", CODED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_over_codes_equals_float64(poisoned, size, dtype, filled):
    bits, kv_heads, group, used, dim, splits = size
    slots, keys, values = coded_slots(bits, kv_heads, used, dim, dtype, holes=0 if filled else 0.3)
    query = (torch.randn(2, kv_heads * group, dim, device=DEVICE) * 2).to(dtype)
    mass = torch.rand(2, kv_heads, slots.capacity, device=DEVICE)
    before, summary = mass.clone(), drawn_summary(slots)
    counter = torch.tensor([used - 1], dtype=torch.int32, device=DEVICE) if filled else None
    output, received = coded.attend(query, slots, 0.2, summary, mass, 0.9, not filled, counter, splits=splits)
    turn = matrix(slots.codec.rotations["keys"], torch.float64)
    turned = (query.double() @ turn).view(2, kv_heads, group, dim)
    logits = (turned @ keys.mT * 0.2).masked_fill(
        slots["positions"][:, :, None] < 0, torch.finfo(torch.float32).min
    )
    behind = turned @ summary.keys.double().mT * 0.2 + summary.counts.double().log()[:, :, None]
    attention = torch.cat([logits, behind], -1).softmax(-1)
    expected = attention @ torch.cat([values, summary.values.double()], 2) @ turn.T
    assert output.dtype == dtype and received.data_ptr() == mass.data_ptr()
    assert_near(output.view(expected.shape), expected, dtype)
    assert_near(received, 0.9 * before[:, :, :used] + attention[..., :used].sum(2), dtype)
    assert torch.equal(mass[:, :, used:], before[:, :, used:])
    plain, alone = coded.attend(query, slots, 0.2, masked=not filled, splits=splits)
    attention = logits.softmax(-1)
    assert_near(plain.view(expected.shape), attention @ values @ turn.T, dtype)
    assert_near(alone, attention.sum(2), dtype)


@runs
@pytest.mark.parametrize("bits", [(5, 4), (8, 6), (3, 2)], ids=str)
@pytest.mark.parametrize("dim", [16, 64])
@pytest.mark.parametrize("filled", [False, True])
def test_a_token_is_coded_as_by_the_codec(bits, dim, filled):
    slots = [coded_slots(bits, 3, 7, dim, torch.float32)[0] for _ in range(2)]
    slots[1].codec.centre.copy_(slots[0].codec.centre)
    key, value = torch.randn(2, 2, 3, dim, 1, device=DEVICE).mT  # not contiguous
    position = torch.tensor([[7], [-1]], dtype=torch.int32, device=DEVICE)
    slots[0].append(*slots[0].codec.turn(key, key, value)[1:], position)
    counter = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    if filled:
        slots[1].used = 2  # Python's count is not looked at
    before = {name: array.clone() for name, array in slots[1].arrays.items()}
    token.append(key, value, position, slots[1], counter if filled else None)
    for name, array in slots[1].arrays.items():
        untouched = torch.arange(slots[1].capacity, device=DEVICE) != 7
        assert torch.equal(array[:, :, untouched].nan_to_num(), before[name][:, :, untouched].nan_to_num())
    for name, bit, vectors in zip(("keys", "values"), bits, slots[0].codec.turn(key, key, value)[1:]):
        got, alike = (unpack(each.arrays[name][:, :, 7], bit).long() for each in slots[::-1])
        # A channel between two levels may go to either, and the scale, of least squares, follows what was chosen.
        assert (got - alike).abs().max() <= 1 and (got != alike).sum() <= 2
        levels = normal_levels(bit).double().to(DEVICE)[got]
        vectors = (vectors - slots[1].codec.centre if name == "keys" else vectors)[:, :, 0].double()
        scale = (vectors * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        torch.testing.assert_close(
            slots[1].arrays[f"{name}_scale"][:, :, 7].double(), scale, rtol=2e-3, atol=1e-6
        )


@runs
@pytest.mark.parametrize("bits,dim", [((5, 4), 64), ((3, 8), 16)], ids=str)
@pytest.mark.parametrize("decay,mean", [(0.9, True), (1.0, True), (1.0, False)])
def test_importance_from_codes_equals_float64(poisoned, bits, dim, decay, mean):
    slots, _, values = coded_slots(bits, 2, 100, dim, torch.float32)
    policy = AttentionMass(decay, mean, value_norm=True)
    policy.allocate(slots)
    slots.arrays["mass"].uniform_()
    age = 120 - slots["positions"].double()
    exposed = (age if decay == 1 else (1 - decay**age) / (1 - decay)) if mean else 1
    expected = slots["mass"].double() / exposed * values.norm(dim=-1)
    clock = torch.tensor([119], dtype=torch.int32, device=DEVICE)
    for tokens in (Tokens(None, clock[None]), Tokens(None, clock[None], clock=clock)):
        assert_near(
            codes.importance(policy, slots, tokens, 120 if tokens.clock is None else 3),
            expected,
            torch.float32,
        )


@runs
def test_folding_codes_equals_float64():
    slots, keys, values = coded_slots((5, 4), 2, 50, 64, torch.float32, holes=0.2)
    summary = drawn_summary(slots)
    evicted = torch.rand(2, 2, 50, device=DEVICE).argsort(-1)[..., :11].int().contiguous()
    slots.arrays["values_scale"][1, 1, evicted[1, 1, 3].long()] = torch.inf
    index = evicted.long()
    sound = slots["positions"].gather(-1, index) >= 0
    sound[1, 1, 3] = False
    counts = summary.counts[..., 0].double() + sound.sum(-1)
    expected = []
    for held, mean in ((keys, summary.keys), (values, summary.values)):
        taken = held.gather(2, index[..., None].expand(-1, -1, -1, 64)) * sound[..., None]
        total = taken.nan_to_num().sum(2) + mean[:, :, 0].double() * summary.counts.double()
        expected.append(total / counts.clamp(min=1)[..., None])
    codes.fold(summary, slots, evicted)
    assert torch.equal(summary.counts[..., 0].double(), counts)
    for mean, right in zip((summary.keys, summary.values), expected):
        assert_near(mean[:, :, 0], right, torch.float32)
