"""On trained weights: quality is tested where sinks and heavy hitters exist, which random toy models do not have."""

import pytest
import torch

from sketchkv import Random, SketchCache, Window, enable, generate, load, score
from sketchkv.loading import EMBEDDED
from sketchkv.oracle import decode_and_watch, full_cache_logits
from sketchkv.study import integration
from sketchkv.study.stats import paired_interval
from sketchkv.texts import documents

pytestmark = pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded model is being trained (make model)"
)
CAP = 64


@pytest.fixture(scope="module")
def trained():
    model, tokenizer = load("embedded", device="cpu")
    return enable(model), documents("embedded", tokenizer, split="development", count=24, length=512)


@pytest.fixture(scope="module")
def losses(trained):
    """Mean nats per token beyond the cap over the full cache, by cache and document."""
    model, docs = trained
    caches = {
        "sketch": lambda: SketchCache(model.config, CAP),
        "random": lambda: SketchCache(model.config, CAP, policy=Random()),
        "window": lambda: SketchCache(model.config, CAP, policy=Window()),
        "window without sinks": lambda: SketchCache(model.config, CAP, policy=Window(), num_sinks=0),
    }
    table = integration.losses(model, docs, caches, CAP, batch=12)
    with pytest.raises(AssertionError, match="roomy: nothing was evicted"):
        integration.losses(model, docs, {"roomy": lambda: SketchCache(model.config, 512)}, CAP)
    return table.pivot(index="document", columns="cache", values="loss")


def test_evicting_costs_something(losses):
    for name in ("sketch", "random", "window"):
        assert paired_interval(losses[name])[1] > 0, name


def test_sketch_beats_random_eviction(losses):
    mean, low, _ = paired_interval(losses["random"] - losses["sketch"])
    assert low > 0 and mean > 0.01, (mean, low)


def test_sinks_matter(losses):
    mean, low, _ = paired_interval(losses["window without sinks"] - losses["window"])
    assert low > 0.01, (mean, low)


def test_oracle_on_trained_weights(trained):
    model, docs = trained
    ids = docs.input_ids[:1, :200]
    logits, visible = decode_and_watch(model, ids, SketchCache(model.config, CAP))
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-3, rtol=0)


def test_generation_past_the_cap(trained):
    model, docs = trained
    cache = SketchCache(model.config, CAP)
    prompt = docs.input_ids[:2, :100]  # begins with token 0, which without a mask would be taken for padding
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=150,
        do_sample=False,
        eos_token_id=None,
    )
    assert tokens.shape == (2, 250) and cache.seen_tokens == 249 and cache.evicted_tokens > 0
    by_hand = SketchCache(model.config, CAP)
    again = generate(model, prompt, by_hand, 150)
    assert torch.equal(again, tokens)
    for layer in range(len(cache.layers)):
        assert torch.equal(by_hand.kept_positions(layer), cache.kept_positions(layer))


def test_single_pass_perplexity_would_not_have_noticed(trained):
    """The predecessor's metric, a cap above the length of the text, gives the same figure for every policy."""
    model, docs = trained
    short = docs.input_ids[:4, :50]
    for policy in (None, Random(), Window()):
        cache = SketchCache(model.config, CAP, policy=policy)
        torch.testing.assert_close(score(model, short, cache), score(model, short), atol=1e-4, rtol=0)
        assert cache.evicted_tokens == 0
