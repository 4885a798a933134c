"""Attention statistics against maps whose answer is known, and against the masked full attention."""

import keyword

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import AttentionMass, Random, SketchCache, Window
from sketchkv.oracle import decode_and_watch
from sketchkv.study import attention_analysis as analysis
from sketchkv.study.attention_analysis import CLASSES
from sketchkv.study.model_card import sink_mass

CAP, EVERY = 24, 8


def uniform(tokens):
    """Each query attends to everything before it alike."""
    return (torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None])[None, None]


def random_maps(tokens, seed, sharp=3.0):
    scores = torch.randn(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(seed)) * sharp
    return scores.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


# -- distributions


def test_spread_of_uniform_attention():
    found = analysis.spread(uniform(256), sinks=4, recent=16, skip=128)
    lengths = torch.arange(129, 257).float()
    torch.testing.assert_close(found["effective"], lengths.mean()[None, None])
    torch.testing.assert_close(found["recent"], (16 / lengths).mean()[None, None])
    torch.testing.assert_close(found["sinks"], (4 / lengths).mean()[None, None])
    torch.testing.assert_close(found["rest"], ((lengths - 20) / lengths).mean()[None, None])


def test_spread_agrees_with_the_model_card():
    maps = random_maps(96, 0)
    torch.testing.assert_close(analysis.spread(maps, skip=64)["sinks"], sink_mass(maps, skip=64))


def test_effective_tokens_of_a_head_that_looks_at_one_token():
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., 0] = 1
    torch.testing.assert_close(analysis.spread(maps, skip=32)["effective"], torch.ones(1, 1))


def test_mass_curves_of_uniform_attention_are_the_diagonal():
    for curve in analysis.mass_curves(uniform(132), [0.25, 0.5, 1.0], sinks=2).values():
        torch.testing.assert_close(curve[0, 0], torch.tensor([0.25, 0.5, 1.0]), atol=1e-3, rtol=0)


@given(st.integers(0, 10**6), st.floats(0.1, 6))
@settings(max_examples=25, deadline=None)
def test_knowing_more_never_holds_less(seed, sharp):
    each, hindsight, foresight = analysis.mass_curves(
        random_maps(64, seed, sharp), [0.05, 0.2, 0.5, 1.0]
    ).values()
    assert (each >= hindsight - 1e-5).all() and (hindsight >= foresight - 1e-5).all()
    torch.testing.assert_close(each[..., -1], torch.ones(2, 3))


def test_persistence_of_fixed_and_of_passing_heavy_hitters():
    tokens, block = 512, 64
    fixed = uniform(tokens).clone()
    fixed[..., 10:30] *= 100
    overlap = analysis.persistence(fixed, share=20 / 252, block=block, first=4)
    assert list(overlap) == [64, 128, 192]
    assert all((value > 0.7).all() for value in overlap.values())
    passing = torch.rand(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(0)).tril()
    assert all((value < 0.3).all() for value in analysis.persistence(passing, block=block).values())


def test_persistence_by_hand():
    """Two blocks' heavy tokens, half of them the same."""
    maps = torch.zeros(1, 1, 24, 24)
    maps[..., 8:16, [1, 3]] = 1.0
    maps[..., 16:24, [3, 5]] = 1.0
    overlap = analysis.persistence(maps, share=0.25, block=8, sinks=0, first=1)
    assert overlap[8].item() == 0.5 and list(overlap) == [8]


def test_reach():
    maps = torch.zeros(1, 1, 64, 64)
    query = torch.arange(10, 64)
    maps[0, 0, query, query] = 0.25
    maps[0, 0, query, query - 9] = 0.25
    maps[..., 0] += 0.5
    torch.testing.assert_close(
        analysis.reach(maps, [1, 9, 10, 64], sinks=4)[0, 0], torch.tensor([0.5, 0.5, 1.0, 1.0])
    )


# -- token classes


class Words:
    """A tokenizer as far as `token_classes` needs one."""

    all_special_ids = [0]

    def __init__(self, *texts):
        self.texts = ["<|endoftext|>", *texts]

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, rows, **_):
        return [self.texts[row[0]] for row in rows]


def test_token_classes():
    expected = {
        "\n    ": "line break",
        "):\n": "line break",
        "   ": "blank",
        "42": "number",
        " 3.14": "number",
        "10_000": "number",
        " name": "word",
        "ame": "piece",
        "_x1": "piece",
        '",': "quote",
        "'''": "quote",
        " (": "bracket",
        "]:": "bracket",
        "_": "punctuation",
        " +=": "punctuation",
        ".": "punctuation",
        " return": "keyword",
        "é": "piece",
        "\ufffd": "other",
    }
    found = analysis.token_classes(Words(*expected), keyword.kwlist)
    assert [CLASSES[index] for index in found] == ["special", *expected.values()]
    prose = analysis.token_classes(Words(" in"))
    assert CLASSES[prose[1]] == "word", "without a list of keywords there are none"


def test_class_shares_of_uniform_attention_are_the_shares_of_the_tokens():
    classes = torch.arange(200) % len(CLASSES)
    maps = torch.ones(2, 3, 200, 200).tril() / 200
    mass, tokens = analysis.class_shares(maps, classes, skip=64)
    torch.testing.assert_close(mass, tokens.expand_as(mass))
    torch.testing.assert_close(tokens.sum(), torch.tensor(1.0))


def test_class_shares_leave_out_sinks_and_the_recent_window():
    classes = torch.zeros(64, dtype=torch.long)
    classes[4:20] = 1
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., 0], maps[..., 10], maps[..., 40] = 0.5, 0.3, 0.2
    mass, _ = analysis.class_shares(maps, classes, sinks=4, recent=16, skip=32)
    # Token 40 is older than 16 tokens for the queries 56 to 63 alone, token 10 for all 32.
    assert mass[0, 0, 1].item() == pytest.approx(32 * 0.3 / (32 * 0.3 + 8 * 0.2))
    assert mass[0, 0, 0].item() == pytest.approx(8 * 0.2 / (32 * 0.3 + 8 * 0.2))


# -- what policies keep


def test_maps_are_attention(model, ids):
    maps = analysis.attention_maps(model, ids)
    assert (
        maps.shape[:2] == (model.config.num_hidden_layers, len(ids))
        and model.config._attn_implementation == "sketchkv_sdpa"
    )
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert maps.triu(1).abs().max() == 0


def test_compare_is_the_masked_full_attention(model, ids):
    """In the first layer queries and keys do not depend on the cache: there the compressed attention is the full one over
    the tokens still held, which an independent run writes down token by token."""
    maps = analysis.attention_maps(model, ids)
    found = analysis.compare(model, ids, maps, AttentionMass(), CAP, EVERY, num_sinks=2, recent_window=4)
    cache = SketchCache(
        model.config, CAP, policy=AttentionMass(), evict_every=EVERY, num_sinks=2, recent_window=4
    )
    logits, visible = decode_and_watch(model, ids, cache)
    retained = torch.stack(
        [(maps[i] * seen).sum(-1)[:, :, CAP + EVERY :].mean((1, 2)) for i, seen in enumerate(visible)]
    )
    torch.testing.assert_close(found["retained"], retained, atol=1e-5, rtol=0)

    first = maps[0] * visible[0]
    kept = first.sum(-1)
    log_kept = -kept.log()
    cosine = first.norm(dim=-1) / maps[0].norm(dim=-1)
    if (
        maps.shape[2] == model.config.num_attention_heads
    ):  # a mean over a group of heads is not renormalised as a whole
        late = slice(CAP + EVERY, None)
        torch.testing.assert_close(found["kl"][0], log_kept[:, :, late].mean((1, 2)), atol=1e-4, rtol=0)
        torch.testing.assert_close(found["cosine"][0], cosine[:, :, late].mean((1, 2)), atol=1e-4, rtol=0)

    nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(found["nll"], nll[:, CAP + EVERY :].mean(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("tokens", [97, 100, 104])
def test_no_policy_exceeds_the_bound(gpt2, tokens):
    ids = torch.randint(1, 97, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    maps = analysis.attention_maps(gpt2, ids)
    protection = dict(num_sinks=2, recent_window=4, evict_every=EVERY)
    best = analysis.bound(maps, CAP, **protection).mean(-1)
    assert (best < 1).all()
    oracle = [analysis.Oracle(layer) for layer in analysis.future_mass(maps, CAP, EVERY)]
    held = {
        name: analysis.compare(gpt2, ids, maps, policy, CAP, **protection)["retained"]
        for name, policy in {
            "random": Random(),
            "window": Window(),
            "exact": AttentionMass(),
            "oracle": oracle,
        }.items()
    }
    assert all((retained <= best + 1e-5).all() for retained in held.values())
    assert all((held["oracle"] > held[name]).all() for name in ("random", "window", "exact"))


def test_bound_without_pressure_is_everything():
    """All that could be evicted gets no attention."""
    maps = torch.zeros(1, 1, 64, 64)
    maps[..., :2] = 0.5
    torch.testing.assert_close(analysis.bound(maps, 24, 2, 4, 8), torch.ones(1, 1))


def test_future_mass():
    maps = random_maps(40, 1)
    future = analysis.future_mass(maps, 16, 8)
    torch.testing.assert_close(
        future, torch.stack([maps[..., start:, :].sum(-2) for start in (24, 32, 40)], -2)
    )


def test_too_short_a_text_is_refused(gpt2, ids):
    with pytest.raises(ValueError, match="never fill a cache of 128"):
        analysis.compare(gpt2, ids, analysis.attention_maps(gpt2, ids), Window(), 128)
