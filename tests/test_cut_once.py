"""Prompts cut once, ours and kvpress's: the arithmetic on a small model, and agreement in the committed table."""

import pandas as pd
import pytest
import torch
from conftest import VOCABULARY, build

import sketchkv
from sketchkv.study import cut_once
from sketchkv.study.measured import BENCHMARKS


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(BENCHMARKS / "peers.csv")


def test_the_same_rule_under_the_same_protection_agrees(table):
    loss = cut_once.losses(table).set_index(["method", "kept", "code"]).loss
    for name in cut_once.SAME:
        for kept in cut_once.KEPT:
            pair = [loss[cut_once.NAMES[name], kept, code] for code in ("ours", "kvpress")]
            assert abs(pair[0] - pair[1]) < cut_once.AGREE, (name, kept)
    assert table.groupby(["code", "method", "kept"]).size().eq(cut_once.DOCUMENTS).all()
    full = table.groupby(["code", "document"]).nll_full.first().unstack(0)
    assert (full.ours - full.kvpress).abs().max() < 1e-4  # the same model on the same ids


def test_what_follows_is_scored_with_what_was_kept():
    """A window of the newest tokens and sinks, cut by a mask over the whole text instead of a cache."""
    lm, prompt, kept = sketchkv.enable(build("llama")), 60, 24
    ids = torch.randint(1, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(0))
    cache = cut_once.cut(lm.config, "streaming", kept, prompt, **cut_once.SAME["streaming"])
    found = cut_once.follows(lm, ids, cache, prompt)
    assert cache.evicted_tokens == (prompt - kept) * len(cache.layers)
    mask = torch.ones(80, 80, dtype=torch.bool).tril()
    mask[prompt:, 4 : prompt - kept + 4] = False
    logits = build("llama")(
        ids, attention_mask=torch.zeros(80, 80).masked_fill(~mask, -1e9)[None, None]
    ).logits
    expected = torch.nn.functional.cross_entropy(logits[0, prompt - 1 : -1], ids[0, prompt:])
    assert found == pytest.approx(expected.item(), abs=1e-5)
