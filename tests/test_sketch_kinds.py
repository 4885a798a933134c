"""Count-Sketch, RACE, conservative update and small counters, against plain Python and against what they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sketchkv.sketch import PRIME
from sketchkv.study.extras.sketches import RACE, AnyCounters, ByteCounters, ConservativeSketch, CountSketch

CHECKED = settings(max_examples=30, deadline=None, derandomize=True)
CHANCE = 1e-9
KINDS = {
    "count_min": AnyCounters,
    "conservative": ConservativeSketch,
    "count_sketch": CountSketch,
    "race": lambda *shape, **settings: RACE(6, *shape, bits=7, **settings),
}
batches = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1, max_size=20),
    min_size=1,
    max_size=4,
)


def split(batch):
    items, weights = zip(*batch)
    return torch.tensor(items), torch.tensor(weights, dtype=torch.float64)


def draw(kind, *shape, seed=0):
    """Random items of a kind, and weights that are eighths."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(*shape, 6, generator=generator)
    items = vectors if kind == "race" else torch.randint(0, 99, shape, generator=generator)
    return items, torch.randint(0, 80, shape, generator=generator).float() / 8


# Conservative update


class ReferenceConservative:
    """Conservative update in plain Python: a batch is taken at once, one item's weights summed."""

    def __init__(self, sketch):
        self.hash, self.rows = sketch.hash, [[0] * sketch.hash.width for _ in range(sketch.hash.depth)]

    def places(self, item):
        return [(r, i) for r, (i,) in enumerate(self.hash(torch.tensor([item])).tolist())]

    def update(self, items, weights):
        summed = {}
        for item, weight in zip(items, weights):
            summed[item] = summed.get(item, 0) + weight
        # Items that share all counters are one item.
        joint = {}
        for item, weight in summed.items():
            joint[tuple(self.places(item))] = joint.get(tuple(self.places(item)), 0) + weight
        raised = {
            places: min(self.rows[r][i] for r, i in places) + weight for places, weight in joint.items()
        }
        for places, estimate in raised.items():
            for r, i in places:
                self.rows[r][i] = max(self.rows[r][i], estimate)


@CHECKED
@given(batches, st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_conservative_equals_plain_python_between_truth_and_count_min(stream, width, depth, integers):
    dtype = torch.int64 if integers else torch.float64
    sketch, plain = (kind(width, depth, dtype=dtype) for kind in (ConservativeSketch, AnyCounters))
    reference, truth, every = (
        ReferenceConservative(sketch),
        torch.zeros(31, dtype=torch.float64),
        torch.arange(31),
    )
    for batch in stream:
        items, weights = split(batch)
        for one in (sketch, plain):
            one.update(items, weights.to(dtype))
        reference.update(items.tolist(), weights.long().tolist())
        truth.index_add_(0, items, weights)
        assert sketch.table.long().tolist() == reference.rows
        assert (sketch.query(every) >= truth).all() and (sketch.query(every) <= plain.query(every)).all()


@CHECKED
@given(batches, st.integers(1, 12), st.randoms())
def test_conservative_batch_has_no_order_and_is_below_one_at_a_time(stream, width, random):
    batch = stream[0]
    whole, shuffled, single = (ConservativeSketch(width, 3, dtype=torch.float64) for _ in range(3))
    whole.update(*split(batch))
    mixed = random.sample(batch, len(batch))
    shuffled.update(*split(mixed))
    for one in mixed:
        single.update(*split([one]))
    assert torch.equal(whole.table, shuffled.table) and (whole.table <= single.table).all()


def test_conservative_is_tighter_on_a_crowded_sketch():
    items, weights = draw("conservative", 400)
    conservative, plain = ConservativeSketch(40, 4), AnyCounters(40, 4)
    for part in range(0, 400, 40):
        for sketch in (conservative, plain):
            sketch.update(items[part : part + 40], weights[part : part + 40])
    truth = torch.zeros(99).index_add_(0, items, weights)
    excess = [(sketch.query(torch.arange(99)) - truth).mean() for sketch in (conservative, plain)]
    assert excess[0] < 0.8 * excess[1]


# Count-Sketch


@CHECKED
@given(batches, st.integers(1, 40), st.integers(1, 5), st.integers(0, 1000))
def test_count_sketch_equals_plain_python(stream, width, depth, seed):
    sketch = CountSketch(width, depth, seed=seed, dtype=torch.float64)
    place, sign = (
        [(a, b) for a, b in zip(h.a.tolist(), h.b.tolist())] for h in (sketch.hash.place, sketch.hash.sign)
    )
    rows = [[0.0] * width for _ in range(depth)]
    cells = {
        x: [
            (a * x + b) % PRIME % width + (c * x + d) % PRIME % 2 * width
            for (a, b), (c, d) in zip(place, sign)
        ]
        for x in range(31)
    }
    for batch in stream:
        sketch.update(*split(batch))
        for item, weight in batch:
            for row, cell in zip(rows, cells[item]):
                row[cell % width] += -weight if cell >= width else weight
    assert sketch.table.tolist() == rows
    for item in range(31):
        each = [
            -row[cell % width] if cell >= width else row[cell % width] for row, cell in zip(rows, cells[item])
        ]
        assert sketch.query(torch.tensor([item])).item() == np.median(each)


def test_count_sketch_is_unbiased_and_within_its_bound():
    generator = np.random.default_rng(0)
    counts = torch.from_numpy(
        generator.multinomial(5000, 1 / np.arange(1, 301) / (1 / np.arange(1, 301)).sum())
    ).double()
    width, seeds, asked = 32, 600, torch.tensor([0, 30, 299])
    spread = (((counts**2).sum() - counts[asked] ** 2) / width).sqrt()
    row, median = [], []
    for seed in range(seeds):
        for depth, errors in ((1, row), (5, median)):
            sketch = CountSketch(width, depth, seed=seed, dtype=torch.float64)
            sketch.update(torch.arange(300), counts)
            errors.append(sketch.query(asked) - counts[asked])
    row, median = torch.stack(row), torch.stack(median)
    assert (row.mean(0).abs() < 5 * spread / math.sqrt(seeds)).all() and (row.std(0) < 1.25 * spread).all()
    # Chebyshev: a row is beyond sqrt(8) spreads with probability 1/8, the median if three of five are.
    beyond = (median.abs() > math.sqrt(8) * spread).sum(0).max()
    assert beyond <= stats.binom.isf(CHANCE, seeds, stats.binom.sf(2, 5, 1 / 8))


def test_count_sketch_takes_weights_of_either_sign_and_forgets_what_is_taken_back():
    sketch = CountSketch(16, 3)
    items, weights = draw("count_sketch", 50)
    sketch.update(items, weights)
    sketch.update(items, -weights)
    assert not sketch.table.any()


# RACE


@CHECKED
@given(st.integers(1, 9), st.sampled_from([4, 64, 512]), st.integers(1, 5), st.integers(0, 100))
def test_race_is_the_share_of_rows_in_which_vectors_collide(bits, width, depth, seed):
    race = RACE(6, width, depth, bits, seed=seed, dtype=torch.float64)
    vectors, weights = draw("race", 25, seed=seed)
    race.update(vectors, weights)
    projection = race.hash.projection.numpy().reshape(6, depth, bits)
    code = lambda v, r: int(sum(2**j for j in range(bits) if np.dot(v, projection[:, r, j]) > 0))  # noqa: E731
    codes = [[code(vector, row) for row in range(depth)] for vector in vectors.numpy()]
    if 2**bits > width:
        a, b = race.hash.again.a.tolist(), race.hash.again.b.tolist()
        codes = [[(a[r] * c + b[r]) % PRIME % width for r, c in enumerate(of_vector)] for of_vector in codes]
    collide = (np.array(codes)[:, None] == np.array(codes)[None]).mean(-1)
    np.testing.assert_allclose(race.query(vectors).numpy(), collide @ weights.double().numpy(), rtol=1e-12)


def test_race_estimates_the_angular_kernel_density():
    vectors, weights = draw("race", 40)
    unit = torch.nn.functional.normalize(vectors, dim=-1).double()
    angle = (unit @ unit.T).clamp(-1, 1).arccos()
    expected = (1 - angle / math.pi) ** 4 @ weights.double()
    seeds = torch.stack([run_race(vectors, weights, seed) for seed in range(200)])
    assert ((seeds.mean(0) - expected).abs() < 5 * seeds.std(0) / math.sqrt(200)).all()


def run_race(vectors, weights, seed):
    race = RACE(6, 16, 8, bits=4, seed=seed, dtype=torch.float64)
    race.update(vectors, weights)
    return race.query(vectors)


# All kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_one_interface(kind, dtype):
    batched = KINDS[kind](37, 3, batch_shape=(2, 3), seed=5, dtype=dtype)
    items, weights = draw(kind, 2, 3, 20)
    for _ in range(3):
        batched.decay(0.5)
        batched.update(items, weights)
    assert batched.query(items).shape == (2, 3, 20)
    assert torch.equal(batched.query(items), batched.query(indices=batched.hash(items)))
    for i in range(2):  # one at a time
        single = KINDS[kind](37, 3, seed=5, dtype=dtype)
        for _ in range(3):
            single.decay(0.5)
            single.update(weights=weights[i, 1], indices=single.hash(items[i, 1]).int())
        assert torch.equal(single.query(items[i, 1]), batched.query(items)[i, 1])
    estimates = batched.query(items)
    assert sum(t.nbytes for t in batched.tensors()) + batched.hash.nbytes == batched.nbytes
    counters = batched.tensors()[0]
    assert counters.dtype == (torch.int8 if kind == "count_sketch" and dtype == torch.uint8 else dtype)
    assert counters.nbytes == 2 * 3 * 3 * 37 * dtype.itemsize
    merged = KINDS[kind](37, 3, batch_shape=(2, 3), seed=5, dtype=dtype)
    merged.merge(batched)
    torch.testing.assert_close(merged.query(items), estimates, rtol=1e-2, atol=0.5)
    batched.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(batched.query(items[[1, 1, 0]]), estimates[[1, 1, 0]])
    batched.reset()
    assert not batched.query(items[[1, 1, 0]]).any()
    batched.update(weights=1.0, indices=batched.hash(items[:1, :1, :0]))  # no items


@pytest.mark.parametrize("kind", KINDS)
def test_no_loop_over_items_rows_or_batch(kind):
    from test_sketches import CountOperations

    counts = []
    for shape, depth, n in (((1,), 2, 2), ((3, 4), 4, 100)):
        sketch = KINDS[kind](128, depth, batch_shape=shape, dtype=torch.uint8)
        with CountOperations() as operations:
            sketch.update(*draw(kind, *shape, n))
            sketch.query(draw(kind, *shape, n)[0])
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_decay_is_exact(kind, dtype):
    sketch = KINDS[kind](31, 3, dtype=dtype)
    items, weights = draw(kind, 30)
    sketch.update(items, weights)
    before = sketch.query(items)
    for _ in range(7):
        sketch.decay(0.5)
    assert torch.equal(sketch.query(items), before / 128)


# Small counters


@CHECKED
@given(batches, st.sampled_from(["count_min", "conservative", "count_sketch"]), st.floats(0.5, 1))
def test_half_precision_counters_err_by_what_rounding_allows(stream, kind, decay):
    half, exact = (KINDS[kind](7, 3, dtype=dtype) for dtype in (torch.float16, torch.float64))
    roundings, size = 0, 0.0
    for batch in stream:
        items, weights = split(batch)
        for sketch in (half, exact):
            sketch.decay(decay)
            sketch.update(items, weights)
        roundings, size = roundings + len(batch) + 1, decay * size + float(weights.sum())
    error = (half.table.double() - exact.table).abs().max()
    assert error <= roundings * 2.0**-11 * size * 1.01 + 1e-4


@CHECKED
@given(batches, st.sampled_from(["count_min", "count_sketch"]), st.floats(0.5, 1), st.integers(0, 50))
def test_eight_bit_counters_err_by_less_than_a_step_per_addition(stream, kind, decay, seed):
    byte, exact = (KINDS[kind](7, 3, dtype=dtype, seed=seed) for dtype in (torch.uint8, torch.float64))
    bound, largest = torch.zeros(3, 1), torch.zeros(3, 1)
    for batch in stream:
        items, weights = split(batch)
        for sketch in (byte, exact):
            sketch.decay(decay)
            sketch.update(items, weights)
        bound = bound * decay + byte.table.scale
        largest = torch.maximum(largest * decay, exact.table.abs().amax(-1, keepdim=True).float() + bound)
        assert ((byte.table.values() - exact.table).abs() <= bound * (1 + 1e-5) + 1e-6).all()
        assert (byte.table.scale <= 2.01 / byte.table.top * largest).all()


def test_eight_bit_counters_keep_small_additions_on_average():
    # 0.03 of a step each time: rounding to the nearest would lose them all.
    counters = ByteCounters((1, 2))
    index = torch.tensor([[0, 1]])
    counters.scatter_add_(-1, index, torch.tensor([[127.5, 0.0]]))
    step = counters.scale.item()
    for _ in range(1000):
        counters.scatter_add_(-1, index, torch.tensor([[0.0, 0.03 * step]]))
    assert counters.codes[0, 0] == 127 or counters.codes[0, 0] == 128  # an untouched counter stays
    assert abs(counters.values()[0, 1] - 30 * step) <= 3 * step


def test_untouched_codes_stay_for_every_code_and_threshold():
    counters = ByteCounters((1, 256))
    counters.scale.fill_(0.0123)
    counters.codes.copy_(torch.arange(256))
    before = counters.codes.clone()
    for _ in range(500):
        counters.scatter_add_(-1, torch.zeros(1, 1).long(), torch.zeros(1, 1))
        assert torch.equal(counters.codes, before)


def test_half_precision_counters_saturate():
    sketch = AnyCounters(4, 2, dtype=torch.float16)
    for _ in range(3):
        sketch.update(torch.tensor([1]), 60000.0)
    assert sketch.query(torch.tensor([1])) == 65504


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: RACE(6, 16, 2, bits=0), ValueError, "bits"),
        (lambda: RACE(6, 0, 2), ValueError, "width must be"),
        (lambda: RACE(6, 16, 2).update(torch.arange(3)), TypeError, "vectors"),
        (
            lambda: RACE(6, 16, 2, batch_shape=(2,)).update(torch.rand(3, 5, 6)),
            ValueError,
            "indices of the items",
        ),
        (lambda: RACE(6, 16, 2).update(torch.rand(5, 6), -1), ValueError, "not negative"),
        (lambda: CountSketch(8, 2).update(torch.arange(2), math.inf), ValueError, "finite"),
        (lambda: CountSketch(8, 2).total, AttributeError, "random signs"),
        (lambda: ConservativeSketch(8, 2).total, AttributeError, "total"),
        (lambda: ConservativeSketch(8, 2).merge(AnyCounters(8, 2)), TypeError, "one kind"),
        (lambda: AnyCounters(8, 2, dtype=torch.int8), TypeError, "uint8 with a scale"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_equals_cpu_and_never_waits(kind, dtype):
    items, weights = draw(kind, 2, 3, 50)
    found = []
    for device in ("cpu", "cuda"):
        sketch = KINDS[kind](101, 5, batch_shape=(2, 3), seed=3, dtype=dtype, device=device)
        here, mass = items.to(device), weights.to(device)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            for _ in range(3):
                sketch.decay(0.5)
                sketch.update(here, mass)
            found.append(sketch.query(here))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(
        found[0], found[1].cpu(), rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6
    )
