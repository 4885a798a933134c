"""Measures of generated text against cases known by hand, and the two ways of generating against each other."""

import math

import pandas as pd
import pytest
import sacrebleu
import torch
from transformers import DynamicCache

from sketchkv import H2O, SketchCache, generate
from sketchkv.study import generation


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
    assert sacrebleu.__version__ in generation.COLUMNS["bleu_full"]


def test_repetition():
    tokens = torch.stack([torch.arange(12), torch.zeros(12, dtype=torch.long), torch.arange(12) % 4])
    torch.testing.assert_close(
        generation.repetition(tokens), torch.tensor([0, 8 / 9, 5 / 9], dtype=torch.float64)
    )


def test_both_ways_of_generating_agree(model, ids):
    prompts, new = ids[:, :40], 16
    for make in (
        lambda: DynamicCache(config=model.config),
        lambda: SketchCache(model.config, 32, evict_every=8, policy=H2O()),
    ):
        hand = generation.continuation(model, prompts, make(), new)
        theirs = generation.continuation(model, prompts, make(), new, by_hand=False)
        assert hand.shape == (2, new) and torch.equal(hand, theirs)


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
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_end_of_text_token_ends_nothing(gpt2, ids):
    prompts = ids[:, :40]
    tokens = generate(gpt2, prompts, None, 5)
    gpt2.generation_config.eos_token_id = int(tokens[0, 41])
    for by_hand in (True, False):
        found = generation.continuation(gpt2, prompts, DynamicCache(config=gpt2.config), 20, by_hand=by_hand)
        assert found.shape == (2, 20)


def test_what_a_text_loses_is_of_the_same_prompt():
    """Against the mean and the ratio of perplexities worked out by hand; the full cache is the reference, not a row."""
    rows = [
        (
            name,
            mode,
            f"d{d}",
            3 if name == "x" else 9,
            1.0,
            0.0,
            0.0,
            0.0,
            2 + d + (0.1 if name == "x" else 0),
        )
        for name in ("full", "x")
        for mode in ("greedy", "sampling")
        for d in range(4)
    ]
    found = generation.worse(pd.DataFrame(rows, columns=list(generation.COLUMNS)))
    assert found.method.tolist() == ["x"] and found.n.tolist() == [4] and found["first"].tolist() == [3]
    assert found["mean"][0] == pytest.approx(100 * (math.exp(0.1) - 1), rel=1e-5) and found.low[0] > 10
