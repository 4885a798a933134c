"""Counters of 8 bits: what they promise, and the policy on them."""

import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st

import sketchkv
from sketchkv import SketchCache, Window, score
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.sketch import CountMinSketch
from sketchkv.study.extras.sketches import TOP, ByteCounters, ByteSketch, SmallSketch

batches = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1, max_size=20),
    min_size=1,
    max_size=4,
)


def draw(*shape, seed=0):
    """Random items, and weights that are eighths."""
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(0, 99, shape, generator=generator)
    return items, torch.randint(0, 80, shape, generator=generator).float() / 8


@settings(max_examples=30, deadline=None, derandomize=True)
@given(batches, st.floats(0.5, 1), st.integers(0, 50))
def test_counters_err_by_less_than_a_step_per_addition(stream, decay, seed):
    byte, exact = ByteSketch(7, 3, seed=seed), CountMinSketch(7, 3, seed=seed, dtype=torch.float64)
    bound, largest = torch.zeros(3, 1), torch.zeros(3, 1)
    for batch in stream:
        items, weights = map(torch.tensor, zip(*batch))
        for sketch in (byte, exact):
            sketch.decay(decay)
            sketch.update(items, weights.double())
        bound = bound * decay + byte.table.scale
        largest = torch.maximum(largest * decay, exact.table.amax(-1, keepdim=True).float() + bound)
        assert ((byte.table.values() - exact.table).abs() <= bound * (1 + 1e-5) + 1e-6).all()
        assert (byte.table.scale <= 2.01 / TOP * largest).all()


def test_small_additions_stay_on_average():
    # 0.03 of a step each time: rounding to the nearest would lose them all.
    counters = ByteCounters((1, 2))
    index = torch.tensor([[0, 1]])
    counters.scatter_add_(-1, index, torch.tensor([[127.5, 0.0]]))
    step = counters.scale.item()
    for _ in range(1000):
        counters.scatter_add_(-1, index, torch.tensor([[0.0, 0.03 * step]]))
    assert counters.codes[0, 0] in (127, 128)  # an untouched counter stays
    assert abs(counters.values()[0, 1] - 30 * step) <= 3 * step


def test_untouched_codes_stay_for_every_code_and_threshold():
    counters = ByteCounters((1, 256))
    counters.scale.fill_(0.0123)
    counters.codes.copy_(torch.arange(256))
    before = counters.codes.clone()
    for _ in range(500):
        counters.scatter_add_(-1, torch.zeros(1, 1).long(), torch.zeros(1, 1))
        assert torch.equal(counters.codes, before)


def test_a_sketch_of_bytes_has_the_interface_of_a_sketch():
    batched, (items, weights) = ByteSketch(37, 3, batch_shape=(2, 3), seed=5), draw(2, 3, 20)
    for _ in range(3):
        batched.decay(0.5)
        batched.update(items, weights)
    estimates = batched.query(items)
    assert torch.equal(estimates, batched.query(indices=batched.hash(items)))
    assert sum(t.nbytes for t in batched.tensors()) + batched.hash.nbytes == batched.nbytes
    assert batched.tensors()[0].nbytes == 2 * 3 * 3 * 37
    merged = ByteSketch(37, 3, batch_shape=(2, 3), seed=5)
    merged.merge(batched)
    torch.testing.assert_close(merged.query(items), estimates, rtol=1e-2, atol=0.5)
    batched.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(batched.query(items[[1, 1, 0]]), estimates[[1, 1, 0]])
    batched.decay(0.5)
    assert torch.equal(batched.query(items[[1, 1, 0]]), estimates[[1, 1, 0]] / 2)
    batched.reset()
    assert not batched.query(items[[1, 1, 0]]).any()


@pytest.mark.parametrize("key", ["lsh", "token"])
def test_bounded_cache_equals_masked_full_cache_in_any_chunks(ids, key):
    llama, text = sketchkv.enable(build("llama")), ids[:, :64]
    make = lambda policy: SketchCache(llama.config, 20, policy=policy, recent_window=6, evict_every=4)  # noqa: E731
    policy = SmallSketch(width=64, depth=3, key=key)
    cache = make(policy)
    logits, visible = decode_and_watch(llama, text, cache)
    torch.testing.assert_close(logits, full_cache_logits(llama, text, visible), atol=1e-4, rtol=0)
    assert (score(llama, text, make(Window())) - score(llama, text, make(policy))).abs().max() > 1e-3
    for chunk_size in (64, 7):
        streamed = make(policy)
        _, again = score(llama, text, streamed, chunk_size=chunk_size, return_logits=True)
        torch.testing.assert_close(again, logits, atol=1e-4, rtol=0)
        assert streamed.nbytes() == cache.nbytes()
    size = cache.nbytes()
    cache.reset()
    torch.testing.assert_close(score(llama, text, cache), score(llama, text, make(policy)), atol=1e-5, rtol=0)
    assert cache.nbytes() == size
