"""A used cache goes on with its own text, and with no other."""

import copy
import inspect
import pickle

import pytest
import torch
from conftest import VOCABULARY, build
from hypothesis import given
from hypothesis import strategies as st

from sketchkv import SketchCache, disable, enable, generate
from sketchkv.checks import digest


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    return enable(build(request.param))


def text(tokens, batch=1, seed=0):
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def further(model, ids, cache):
    return model.generate(
        ids, past_key_values=cache, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids)
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_only_a_prompt_that_begins_with_the_text_goes_on(model, batch):
    cache, ids = SketchCache(model.config, 32), text(60, batch)
    told = further(model, ids, cache)
    longer = torch.cat([told, text(9, batch, seed=1)], 1)
    fresh = further(model, longer, SketchCache(model.config, 32))
    other = longer.clone()
    other[-1, 3] += 1
    with pytest.raises(ValueError, match=r"another text than this prompt begins with: call cache.reset\(\)"):
        further(model, other, cache)
    with pytest.raises(ValueError, match="another text"):
        further(model, text(200, batch, seed=2), cache)
    for short in (text(20, batch), told[:, : cache.seen_tokens]):
        with pytest.raises(
            ValueError, match=r"holds \d+ tokens, and this prompt of \d+ .*call cache.reset\(\)"
        ):
            further(model, short, cache)
    assert torch.equal(further(model, longer, cache), fresh)  # refused prompts left no trace
    cache.reset()
    assert torch.equal(further(model, other, cache), further(model, other, SketchCache(model.config, 32)))


def test_rows_that_were_reordered_and_new_tokens_alone_go_on(model):
    cache, ids, new = SketchCache(model.config, 32), text(40, 2), text(4, 2, seed=1)
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="another text"):
        further(model, torch.cat([ids, new], 1), cache)
    assert len(further(model, torch.cat([ids.flip(0), new], 1), cache)) == 2
    ids = text(40)
    cache = SketchCache(model.config, 32)
    model(ids, past_key_values=cache)
    new = text(3, seed=2)
    mask = torch.ones(1, 43, dtype=torch.int64)
    model.generate(new, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert cache.seen_tokens == 44


def test_a_token_that_is_written_in_place_is_told_as_it_was(model):
    cache, ids, token = SketchCache(model.config, 32), text(60), torch.empty(1, 1, dtype=torch.int64)
    model(ids[:, :40], past_key_values=cache)
    for step in range(40, 60):
        model(token.copy_(ids[:, step : step + 1]), past_key_values=cache)
    assert further(model, torch.cat([ids, text(4, seed=1)], 1), cache).shape[1] > 64


def test_what_is_not_known_is_not_refused(model):
    cache = SketchCache(model.config, 32)
    model(inputs_embeds=model.get_input_embeddings()(text(40)), past_key_values=cache)
    assert cache.passes.digest() is None
    further(model, text(50, seed=3), cache)
    assert generate(model, text(40), SketchCache(model.config, 32), 3).shape == (1, 43)


def test_copies_of_a_model_are_their_own(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert vars(twin)["prepare_inputs_for_generation"].model is twin
        ids = text(40)
        assert further(twin, ids, SketchCache(twin.config, 32)).shape[1] > 40
    signature = inspect.signature(model.prepare_inputs_for_generation)
    disable(model)
    assert "prepare_inputs_for_generation" not in vars(model)
    assert signature == inspect.signature(model.prepare_inputs_for_generation)


@given(st.lists(st.lists(st.integers(0, 10**6), min_size=12, max_size=12), min_size=1, max_size=3), st.data())
def test_a_digest_does_not_depend_on_the_cuts_of_a_text_and_tells_texts_apart(rows, data):
    ids, told, start = torch.tensor(rows), 0, 0
    while start < 12:
        stop = data.draw(st.integers(start + 1, 12))
        told, start = digest(ids[:, start:stop], told), stop
    by_hand = torch.zeros(len(rows), dtype=torch.int64)
    for column in ids.T:
        by_hand = by_hand * 6364136223846793005 + column
    assert torch.equal(told, by_hand)
    other = ids.clone()
    other[0, data.draw(st.integers(0, 11))] += 1
    assert digest(other)[0] != told[0]
