"""Recorded steps against the plain loop. Without a GPU the same steps run one by one, with the device's own clock."""

import pytest
import torch
from conftest import named

from sketchkv import (
    H2O,
    LRU,
    TOVA,
    AttentionMass,
    Random,
    Sketch,
    SketchCache,
    SnapKV,
    Summary,
    Window,
    generate,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(policy=Sketch(key="token")),
        dict(policy=Sketch(mean=False, decay=1.0)),
        dict(policy=H2O()),
        dict(policy=Window()),
        dict(policy=LRU()),
        dict(policy=TOVA()),
        dict(policy=SnapKV()),
        dict(attend_topk=30),
        dict(summary=Summary(2)),
        dict(bits=8),
        dict(evict_every=1),
        dict(bits=(5, 4), summary=Summary(), policy=AttentionMass(value_norm=True)),
    ],
    ids=named,
)
def test_recorded_steps_give_the_same_tokens(gpt2, ids, settings):
    model, ids = gpt2.to(DEVICE), ids.to(DEVICE)
    settings = {"evict_every": 4} | settings
    caches = [SketchCache(model.config, 40, **settings) for _ in range(2)]
    # Begins after the first eviction, then before it; the second text finds the recordings of the first.
    for length, new in ((50, 16), (36, 24)):
        expected = generate(model, ids[:, :length], caches[0], new)
        got = generate(model, ids[:, :length], caches[1], new, graph=True)
        assert torch.equal(got, expected)
        for layer in range(2):
            kept = [cache.kept_positions(layer).sort(-1).values for cache in caches]
            assert torch.equal(*kept) and caches[0].evicted_tokens == caches[1].evicted_tokens > 0
        # The cache is whole afterwards: it goes on by itself.
        logits = [model(got[:, -1:], past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        for cache in caches:
            cache.reset()
    # One recording for all steps without an eviction and one for those with: unless shapes are the number of slots.
    phases = 2 if all(caches[1].recordings.growing) else settings["evict_every"]
    assert DEVICE == "cpu" or len(caches[1].recordings.graphs) == phases


def tensors(thing, name="cache", found=None):
    """Every tensor held by `thing` or by what it holds: {name: tensor}."""
    found = {} if found is None else found
    if isinstance(thing, torch.Tensor):
        found[name] = thing
    elif isinstance(thing, (dict, list, tuple)):
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            tensors(value, f"{name}[{key!r}]", found)
    elif type(thing).__module__.startswith("sketchkv"):
        for key in vars(thing).keys() - {"cache", "graphs", "tokens", "told", "_digest"}:
            tensors(vars(thing)[key], f"{name}.{key}", found)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(policy=Sketch(key="token")),
        dict(policy=LRU()),
        dict(policy=H2O()),
        dict(policy=TOVA()),
        dict(bits=(5, 4), summary=Summary(1), attend_topk=30),
    ],
    ids=named,
)
def test_a_second_text_finds_every_tensor_where_the_first_left_it(gpt2, ids, settings):
    """What was recorded reads and writes fixed addresses: nothing that lives from step to step may move."""
    cache = SketchCache(gpt2.config, 40, evict_every=4, **settings)
    generate(gpt2, ids[:, :50], cache, 4, graph=True)
    first = tensors(cache)
    assert {
        f"cache.layers[{layer}].{name}" for layer in range(2) for name in ("nan", "slots.arrays['keys']")
    } <= first.keys()
    assert "policy" in settings or any(".table" in name for name in first)
    cache.reset()
    generate(gpt2, ids[:1].repeat(2, 1), cache, 12, graph=True)
    second = tensors(cache)
    moved = [
        name
        for name in first | second
        if name not in first or second[name].data_ptr() != first[name].data_ptr()
    ]
    assert moved == []


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_recordings_outlive_matrix_workspaces_of_others(gpt2, ids):
    """A graph that is gone and `torch.compile`, which clears workspaces, take no memory away from the recordings."""
    model, ids = gpt2.to(DEVICE), ids.to(DEVICE)
    other, matrix = torch.cuda.CUDAGraph(), torch.eye(512, device=DEVICE)
    matrix = matrix @ matrix  # makes the handle, which recording could not
    with torch.cuda.graph(other):
        matrix = matrix @ matrix
    del other, matrix
    cache = SketchCache(model.config, 40, evict_every=4)
    first = generate(model, ids[:, :50], cache, 16, graph=True)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    cache.reset()
    assert torch.equal(generate(model, ids[:, :50], cache, 16, graph=True), first)


def test_what_cannot_be_recorded_is_refused(gpt2, ids, padding):
    tokens, mask = padding
    with pytest.raises(ValueError, match="graph=True"):
        generate(gpt2, tokens, SketchCache(gpt2.config, 40), 4, attention_mask=mask, graph=True)
    with pytest.raises(ValueError, match="graph=True"):
        generate(gpt2, ids, max_new_tokens=4, graph=True)
    with pytest.raises(ValueError, match="cannot be recorded"):
        generate(gpt2, ids, SketchCache(gpt2.config, 40, policy=Random()), 4, graph=True)
