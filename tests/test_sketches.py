"""The Count-Min Sketch against plain Python integers, its guarantee, and its algebra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from sketchkv.sketch import PRIME, CarterWegmanHash, CountMinSketch
from sketchkv.study.sketch_validation import draw_counts

CHECKED = settings(max_examples=60, deadline=None, derandomize=True)
CHANCE = 1e-9  # that a test of the guarantee fails although it holds; the seeds are fixed, so it is no flake

# Around p and 2^31, where a wrong reduction or 32-bit arithmetic shows, and far beyond.
ids = st.one_of(
    st.integers(0, 40),
    st.sampled_from([PRIME - 1, PRIME, PRIME + 1, 2**31, 2**31 + 5, 2**32 - 1, 2**62, 2**63 - 1]),
    st.integers(0, 2**63 - 1),
)
streams = st.lists(st.tuples(ids, st.integers(0, 1000)), min_size=1, max_size=60)


class ReferenceCountMin:
    """A Count-Min Sketch in plain Python, with the hash functions of `sketch`."""

    def __init__(self, sketch):
        self.functions = list(zip(sketch.hash.a.tolist(), sketch.hash.b.tolist()))
        self.width = sketch.hash.width
        self.rows = [[0] * self.width for _ in self.functions]

    def places(self, item):
        return [(a * item + b) % PRIME % self.width for a, b in self.functions]

    def update(self, items, weights):
        for item, weight in zip(items, weights):
            for place, row in zip(self.places(item), self.rows):
                row[place] += weight

    def query(self, items):
        return [min(row[place] for place, row in zip(self.places(item), self.rows)) for item in items]


def split(stream, dtype=torch.float64):
    items, weights = zip(*stream)
    return torch.tensor(items), torch.tensor(weights, dtype=dtype)


def draw(*shape, high=500, seed=0):
    """Random ids and weights; the weights are eighths, whose sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, high, shape, generator=generator),
        torch.randint(0, 80, shape, generator=generator).float() / 8,
    )


@CHECKED
@given(streams, st.integers(1, 50), st.integers(1, 6), st.integers(0, 2**32), st.booleans())
def test_equals_plain_python(stream, width, depth, seed, integers):
    items, weights = split(stream, torch.int64 if integers else torch.float64)
    sketch = CountMinSketch(width, depth, seed=seed, dtype=weights.dtype)
    reference = ReferenceCountMin(sketch)
    sketch.update(items, weights)
    reference.update(items.tolist(), weights.long().tolist())
    assert sketch.table.long().tolist() == reference.rows
    asked = torch.cat([items, torch.arange(20), PRIME + torch.arange(20)])
    assert sketch.query(asked).long().tolist() == reference.query(asked.tolist())


def test_the_hash_of_a_seed_is_the_same_everywhere():
    # Other values here mean that results made with an earlier version of PyTorch can't be compared.
    hash_functions = CarterWegmanHash(1000, 4, seed=0)
    assert hash_functions.a.tolist() == [1237374186, 880567971, 1155342356, 115038336]
    assert hash_functions.b.tolist() == [2022385383, 756644127, 741779617, 1461401191]
    assert not torch.equal(hash_functions.a, CarterWegmanHash(1000, 4, seed=1).a)


@CHECKED
@given(streams, st.integers(1, 50), st.integers(1, 6), st.integers(0, 1000))
def test_never_underestimates(stream, width, depth, seed):
    items, weights = split(stream, torch.float32)
    sketch = CountMinSketch(width, depth, seed=seed)
    sketch.update(items, weights / 8)
    truth = (items[:, None] == items).float() @ (weights / 8)
    assert (sketch.query(items) >= truth).all()


def misses(items, weights, asked, truth, width, depth, seeds):
    """For how many seeds the estimate of `asked` is beyond the bound: independent trials."""
    beyond = 0
    for seed in range(seeds):
        sketch = CountMinSketch(width, depth, seed=seed, dtype=torch.float64)
        sketch.update(items, weights)
        error = sketch.query(asked) - truth
        beyond += bool(error > math.e / width * weights.sum())
    return beyond


@settings(max_examples=15, deadline=None, derandomize=True)
@given(streams, ids, st.integers(2, 40), st.integers(1, 3))
def test_error_bound_on_any_stream(stream, asked, width, depth):
    items, weights = split(stream)
    asked = torch.tensor([asked])
    truth = weights[items % PRIME == asked % PRIME].sum()  # ids that differ by a multiple of p are one item
    beyond = misses(items, weights, asked, truth, width, depth, seeds=200)
    assert beyond <= stats.binom.isf(CHANCE, 200, math.exp(-depth))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 30, 1000])
def test_error_bound_on_zipf_streams(depth, rank):
    counts = torch.from_numpy(draw_counts(1.0, 20_000, 2000, seed=0)).double()
    asked = counts.argsort(descending=True)[rank : rank + 1]
    beyond = misses(torch.arange(2000), counts, asked, counts[asked], 64, depth, seeds=300)
    assert beyond <= stats.binom.isf(CHANCE, 300, math.exp(-depth))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_error_bound_is_nearly_reached_by_the_worst_stream(depth):
    """width / e ids share all the weight: one collision in every row takes an id that never came beyond the bound."""
    # Anything laxer than the guarantee would fail above, anything stricter would fail below.
    width, seeds = 64, 1500
    items = torch.randint(0, PRIME, (int(width / math.e) + 1,), generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0] * (len(items) - 1) + [0.0], dtype=torch.float64)
    beyond = misses(items, weights, items[-1:], 0, width, depth, seeds)
    expected = (1 - (1 - 1 / width) ** (len(items) - 1)) ** depth
    assert (
        stats.binom.isf(1 - CHANCE, seeds, expected)
        <= beyond
        <= stats.binom.isf(CHANCE, seeds, math.exp(-depth))
    )


def test_topk_recall_on_zipf_streams():
    k, candidates = 64, torch.arange(4096)
    recall = {16: [], 1024: []}
    for seed in range(10):
        counts = torch.from_numpy(draw_counts(1.0, 16_384, 4096, seed))
        for width, found in recall.items():
            sketch = CountMinSketch(width, 4, seed=seed)
            sketch.update(candidates, counts)
            estimates, items = sketch.topk(candidates, k)
            assert torch.equal(estimates, sketch.query(items)) and (estimates.diff() <= 0).all()
            found.append((counts[items] >= counts.sort().values[-k]).double().mean().item())
    assert min(recall[1024]) > 0.9
    assert max(recall[16]) < 0.3  # far too narrow a sketch must not look good


def test_topk_is_the_stable_sort_of_the_estimates():
    sketch = CountMinSketch(3, 2, batch_shape=(4,))  # so narrow that ties are certain
    sketch.update(*draw(4, 50))
    candidates = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int()
    estimates, items = sketch.topk(candidates, 7)
    every = sketch.query(candidates)
    for row in range(4):
        order = sorted(range(40), key=lambda i: -every[row, i].item())[:7]
        assert items[row].tolist() == candidates[order].tolist()
        assert estimates[row].tolist() == every[row, order].tolist()
    by_indices = sketch.topk(candidates, 7, indices=sketch.hash(candidates))
    assert torch.equal(by_indices[0], estimates) and torch.equal(by_indices[1], items)


def test_blocks_and_merge_equal_one_update():
    items, weights = draw(2, 90)
    whole, blocks, first, second = (CountMinSketch(37, 3, batch_shape=(2,), seed=5) for _ in range(4))
    whole.update(items, weights)
    for block in range(0, 90, 7):
        blocks.update(items[:, block : block + 7], weights[:, block : block + 7])
    first.update(items[:, :31], weights[:, :31])
    second.update(items[:, 31:], weights[:, 31:])
    first.merge(second)
    assert torch.equal(blocks.table, whole.table) and torch.equal(first.table, whole.table)


def test_decay_equals_weights_that_shrink_with_age():
    items, weights = draw(60)
    decayed, direct = CountMinSketch(31, 3), CountMinSketch(31, 3)
    for step in range(6):
        decayed.decay(0.5)  # exact in binary
        decayed.update(items[step * 10 :][:10], weights[step * 10 :][:10])
    direct.update(items, weights * 0.5 ** (5 - torch.arange(60) // 10))
    assert torch.equal(decayed.table, direct.table)
    before = decayed.table.clone()
    decayed.decay(0.99)
    torch.testing.assert_close(decayed.table, before * 0.99)


def test_batched_equals_one_at_a_time():
    items, weights = draw(2, 3, 40)
    batched = CountMinSketch(29, 4, batch_shape=(2, 3))
    batched.update(items, weights)
    for i in range(2):
        for j in range(3):
            single = CountMinSketch(29, 4)
            single.update(items[i, j], weights[i, j])
            assert torch.equal(batched.table[i, j], single.table)
            assert torch.equal(batched.query(items)[i, j], single.query(items[i, j]))
            assert batched.total[i, j] == single.total == weights[i, j].sum()


def test_broadcasting_and_default_weights():
    items, weights = draw(2, 3, 40)
    shared, repeated = CountMinSketch(29, 4, batch_shape=(2, 3)), CountMinSketch(29, 4, batch_shape=(2, 3))
    shared.update(items[0, 0], weights[:, :1])  # ids for all, weights for each sequence
    repeated.update(items[0, 0].expand(2, 3, 40), weights[:, :1].expand(2, 3, 40))
    shared.update(items[:, :1])
    repeated.update(items[:, :1].expand(2, 3, 40), torch.ones(2, 3, 40))
    shared.update(items, 0.25)
    repeated.update(items, torch.full((2, 3, 40), 0.25))
    shared.update(items[..., :0])
    assert torch.equal(shared.table, repeated.table)
    assert torch.equal(shared.query(items[0, 0]), repeated.query(items[0, 0].expand(2, 3, 40)))


@pytest.mark.parametrize("stored", [torch.int16, torch.int32, torch.int64])
def test_indices_hashed_before_equal_items(stored):
    items, weights = draw(2, 3, 40)
    by_items, by_indices = (
        CountMinSketch(29, 4, batch_shape=(2, 3)),
        CountMinSketch(29, 4, batch_shape=(2, 3)),
    )
    by_items.update(items, weights)
    by_items.update(items[0, 0])
    by_indices.update(weights=weights, indices=by_indices.hash(items).to(stored))
    by_indices.update(indices=by_indices.hash(items[0, 0]).to(stored))
    assert torch.equal(by_items.table, by_indices.table)
    assert torch.equal(by_items.query(items), by_indices.query(indices=by_indices.hash(items).to(stored)))


@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 1], [0, 2], [0, 0, 1, 1, 2, 2]])
def test_reorder_moves_whole_sketches(index):
    sketch = CountMinSketch(29, 4, batch_shape=(3, 2))
    sketch.update(*draw(3, 2, 40))
    before = sketch.table.clone()
    sketch.reorder(torch.tensor(index))
    assert torch.equal(sketch.table, before[index]) and sketch.batch_shape == (len(index), 2)
    items, weights = draw(len(index), 2, 5, seed=1)  # copies of one sketch go separate ways
    sketch.update(items, weights)
    torch.testing.assert_close(
        sketch.total, before[index][..., 0, :].sum(-1) + weights.sum(-1), rtol=0, atol=0
    )


def test_reset_forgets_the_counts_and_keeps_the_hash():
    sketch, fresh = CountMinSketch(29, 4, batch_shape=(2,)), CountMinSketch(29, 4, batch_shape=(2,))
    sketch.update(*draw(2, 40))
    sketch.reset()
    items, weights = draw(2, 40, seed=1)
    for one in (sketch, fresh):
        one.update(items, weights)
    assert torch.equal(sketch.table, fresh.table)


@pytest.mark.parametrize(
    "dtype, size", [(torch.float16, 2), (torch.float32, 4), (torch.int32, 4), (torch.float64, 8)]
)
def test_nbytes_is_counters_and_hash_parameters(dtype, size):
    sketch = CountMinSketch(128, 3, batch_shape=(2, 5), dtype=dtype)
    assert sketch.nbytes == 2 * 5 * 3 * 128 * size + 3 * 2 * 8
    tensors = [
        t for held in (vars(sketch), vars(sketch.hash)) for t in held.values() if isinstance(t, torch.Tensor)
    ]
    assert sketch.nbytes == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2**11), (torch.float32, 2**24)])
def test_float_counters_stop_counting_where_the_docstring_says(dtype, limit):
    sketch, item = CountMinSketch(8, 2, dtype=dtype), torch.tensor([3])
    sketch.update(item, limit - 1)
    sketch.update(item)
    assert sketch.query(item).item() == limit
    sketch.update(item)
    assert sketch.query(item).item() == limit


def test_random_ids_are_spread_like_dice_and_any_ids_collide_as_promised():
    draws, width, n = 1000, 64, 2048
    hash_functions = CarterWegmanHash(width, draws, seed=0)
    spread = {}
    for name, items in {
        "random": torch.from_numpy(np.random.default_rng(0).integers(0, PRIME, n)),
        "consecutive": torch.arange(n),
        "strided": torch.arange(n) * 4096,
    }.items():
        index = hash_functions(items)
        assert index.shape == (draws, n) and 0 <= index.min() and index.max() < width
        counts = torch.zeros(draws, width).scatter_add_(1, index, torch.ones(draws, n)).double().numpy()
        spread[name] = stats.chi2.sf(((counts - n / width) ** 2 / (n / width)).sum(1), width - 1)
        pairs = (counts * (counts - 1)).sum(1) / (n * (n - 1)) * width
        margin = 5 * pairs.std() / math.sqrt(draws)
        assert pairs.mean() <= 1 + margin, f"{name} ids collide more often than a universal family may"
    assert stats.kstest(spread["random"], "uniform").pvalue > 1e-3


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_no_loop_over_items_rows_or_batch():
    counts = []
    for shape, depth, n in (((1,), 1, 2), ((3, 4), 8, 100)):
        sketch = CountMinSketch(16, depth, batch_shape=shape)
        items, weights = draw(*shape, n)
        with CountOperations() as operations:
            sketch.update(items, weights)
            sketch.topk(items, 2)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_gradients_are_left_alone():
    sketch = CountMinSketch(16, 2)
    sketch.update(torch.arange(3), torch.ones(3, requires_grad=True))
    assert not sketch.table.requires_grad


def sketch_of(**changes):
    return CountMinSketch(**(dict(width=16, depth=2, batch_shape=(2,)) | changes))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: sketch_of(width=0), ValueError, "must be a whole number, at least 1"),
        (lambda: sketch_of(depth=0), ValueError, "must be a whole number, at least 1"),
        (lambda: sketch_of(width=2**31), ValueError, "width must be .* at most 2147483647"),
        (lambda: sketch_of(batch_shape=(2, 0)), ValueError, "batch_shape"),
        (lambda: sketch_of(dtype=torch.bool), TypeError, "float type, int32 or int64"),
        (lambda: sketch_of().update(torch.rand(2, 3)), TypeError, r"items\.long\(\)"),
        (lambda: sketch_of().update(torch.tensor(3)), ValueError, "single number"),
        (lambda: sketch_of().query(torch.tensor([-1])), ValueError, "not be negative"),
        (lambda: sketch_of().update(), ValueError, "either items or indices"),
        (
            lambda: sketch_of().query(torch.arange(2), indices=torch.zeros(2, 2, 2).long()),
            ValueError,
            "either items",
        ),
        (lambda: sketch_of().query(indices=torch.zeros(2, 2)), TypeError, "indices must be integers"),
        (lambda: sketch_of().query(indices=torch.zeros(3, 5).long()), ValueError, "indices of shape"),
        (lambda: sketch_of().update(torch.zeros(3, 5).long()), ValueError, r"items of shape \[3, 5\]"),
        (lambda: sketch_of().update(torch.arange(5), torch.ones(4)), ValueError, r"weights of shape \[4\]"),
        (lambda: sketch_of().update(torch.arange(2), torch.tensor([1.0, -1.0])), ValueError, "not negative"),
        (lambda: sketch_of().update(torch.arange(2), -1), ValueError, "not negative"),
        (lambda: sketch_of().update(torch.arange(2), torch.tensor([1.0, math.nan])), ValueError, "finite"),
        (lambda: sketch_of().update(torch.arange(2), math.inf), ValueError, "finite"),
        (lambda: sketch_of(dtype=torch.int64).update(torch.arange(2), 0.5), TypeError, "use a float dtype"),
        (
            lambda: sketch_of(dtype=torch.int32).update(torch.arange(2), torch.rand(2)),
            TypeError,
            "use a float dtype",
        ),
        (lambda: sketch_of().topk(torch.arange(5), 6), ValueError, "at least 1 and at most 5"),
        (lambda: sketch_of().topk(torch.arange(5), 0), ValueError, "at least 1 and at most 5"),
        (lambda: sketch_of().decay(0), ValueError, "factor"),
        (lambda: sketch_of().decay(1.5), ValueError, "factor"),
        (lambda: sketch_of(dtype=torch.int64).decay(0.5), TypeError, "can't decay"),
        (lambda: sketch_of().merge(sketch_of(seed=1)), ValueError, "same seed"),
        (lambda: sketch_of().merge(sketch_of(width=8)), ValueError, "same width"),
        (lambda: sketch_of().merge(sketch_of(depth=3)), ValueError, "same depth"),
        (lambda: sketch_of().merge(sketch_of(batch_shape=(3,))), ValueError, "same batch_shape"),
        (lambda: sketch_of().merge(sketch_of(dtype=torch.float64)), TypeError, "one dtype"),
        (lambda: sketch_of(batch_shape=()).reorder(torch.tensor([0])), ValueError, "batch dimension"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_refused_input_changes_nothing():
    sketch = sketch_of()
    sketch.update(*draw(2, 30))
    before = sketch.table.clone()
    for ids, weights in (
        ([1, -1], 1),
        ([1, 2], -1),
        ([1, 2], torch.tensor([1, math.nan])),
        ([1, 2], torch.ones(3)),
    ):
        with pytest.raises(ValueError):
            sketch.update(torch.tensor(ids), weights)
    assert torch.equal(sketch.table, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_and_never_waits():
    items = torch.randint(0, 2**62, (2, 3, 1000), generator=torch.Generator().manual_seed(0))
    weights = draw(2, 3, 1000)[1]
    sketches = [
        CountMinSketch(101, 5, batch_shape=(2, 3), seed=3, device=device) for device in ("cpu", "cuda")
    ]
    found = []
    for sketch in sketches:
        here, mass = items.to(sketch.table.device), weights.to(sketch.table.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sketch.update(here, mass)
            sketch.update(here, 2)
            sketch.decay(0.5)
            found.append(sketch.topk(here[0, 0], 20))
            sketch.reorder(torch.ones_like(here[:, 0, 0]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(sketches[0].hash(items), sketches[1].hash(items.cuda()).cpu())
    assert torch.equal(sketches[0].table, sketches[1].table.cpu())  # eighths: exact in any order
    for cpu, cuda in zip(*found):
        assert torch.equal(cpu, cuda.cpu())
