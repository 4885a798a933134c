"""Measures of generated text against cases known by hand, and the two ways of generating against each other."""

import pytest
import sacrebleu
import torch
from transformers import DynamicCache

from sketchkv import H2O, SketchCache, generate
from sketchkv.study import generation
from sketchkv.study.integration import held_bytes


class Letters:
    """A tokenizer of words "w0 w1 ..."."""

    def batch_decode(self, rows, **_):
        return [" ".join(f"w{index}" for index in row.tolist()) for row in rows]


def test_agreement():
    reference = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    tokens = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 9, 9, 9]])
    share, first = generation.agreement(tokens, reference)
    assert share.tolist() == [1.0, 0.75, 0.0] and first.tolist() == [4, 1, 0]


def test_bleu_is_sacrebleus():
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 9, 9], [7, 7, 7, 7, 7, 7]])
    reference = torch.tensor([[1, 2, 3, 4, 5, 6]] * 3)
    same, half, none = generation.bleu(Letters(), tokens, reference)
    assert same == pytest.approx(100) and 20 < half < 80 and none < 5
    text, true = Letters().batch_decode(tokens[1:2])[0], Letters().batch_decode(reference[:1])[0]
    assert half == pytest.approx(sacrebleu.sentence_bleu(text, [true]).score)
    assert f"version:{sacrebleu.__version__}" in generation.bleu_signature()


def test_repetition():
    tokens = torch.stack([torch.arange(12), torch.zeros(12, dtype=torch.long), torch.arange(12) % 4])
    torch.testing.assert_close(
        generation.repetition(tokens), torch.tensor([0, 8 / 9, 5 / 9], dtype=torch.float64)
    )


def test_both_ways_of_generating_agree(model, ids):
    prompts, new, before = ids[:, :40], 16, list(model._forward_hooks.values())
    for make in (
        lambda: DynamicCache(config=model.config),
        lambda: SketchCache(model.config, 32, evict_every=8, policy=H2O()),
    ):
        hand = generation.continuation(model, prompts, make(), new)
        theirs = generation.continuation(model, prompts, make(), new, by_hand=False)
        assert hand["tokens"].shape == (2, new) and torch.equal(hand["tokens"], theirs["tokens"])
        assert len(hand["seconds"]) == len(theirs["seconds"]) == new - 1 and (hand["seconds"] > 0).all()
        assert hand["held"] == theirs["held"] == hand["peak"] > 0
    assert list(model._forward_hooks.values()) == before, "hooks are taken back"


def test_sampling_is_repeatable_and_coupled(gpt2, ids):
    """The same seed gives the same text, also under another cache that evicts nothing."""
    prompts = ids[:, :40]
    first = generation.continuation(
        gpt2, prompts, DynamicCache(config=gpt2.config), 30, do_sample=True, seed=5
    )
    again = generation.continuation(gpt2, prompts, SketchCache(gpt2.config, 100), 30, do_sample=True, seed=5)
    other = generation.continuation(
        gpt2, prompts, DynamicCache(config=gpt2.config), 30, do_sample=True, seed=6
    )
    assert torch.equal(first["tokens"], again["tokens"]) and not torch.equal(first["tokens"], other["tokens"])


def test_an_end_of_text_token_ends_nothing(gpt2, ids):
    prompts = ids[:, :40]
    tokens = generate(gpt2, prompts, None, 5)
    gpt2.generation_config.eos_token_id = int(tokens[0, 41])
    for by_hand in (True, False):
        found = generation.continuation(gpt2, prompts, DynamicCache(config=gpt2.config), 20, by_hand=by_hand)
        assert found["tokens"].shape == (2, 20)


def test_held_bytes_of_the_full_cache(gpt2, ids):
    prompts = ids[:, :40]
    found = generation.continuation(gpt2, prompts, cache := DynamicCache(config=gpt2.config), 10)
    layers, heads, head_dim = 2, 4, 16
    assert found["held"] == held_bytes(cache)["total"] == 2 * layers * 2 * heads * head_dim * (40 + 9) * 4
