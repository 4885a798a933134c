"""The study of the baselines: what fits into the bytes, the front and the verdicts against arithmetic done the slow way."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv import score
from sketchkv.study import baselines, figures, methods, one_slot, stats
from sketchkv.study.methods import full_nbytes, make_cache, nbytes


@pytest.fixture
def config(gpt2):
    gpt2.config.n_embd = 4 * 64  # heads as in the study; no model is run with it
    return gpt2.config


def test_points_fill_their_bytes_and_all_else_is_named(config):
    names, budgets = (
        ("streaming", "sketch", "decayed_summary", "decayed_int4", "h2o", "snapkv"),
        (1 / 2, 1 / 4, 1 / 16),
    )
    points, left_out = baselines.equal_bytes(config, budgets, 1024, torch.float32, names)
    full = full_nbytes(config, 1024)
    for name, budget, method in points:
        held = nbytes(config, 1024, **method)["total"]
        if budget:
            assert budget * full * 0.98 < held <= budget * full, (name, budget)
            assert method["max_cache_size"] + method.get("evict_every", 16) <= 1024
    assert {name for name, budget, _ in points if budget is None} == set(baselines.WHOLE)
    asked = {(name, budget) for name in names for budget in budgets if name != "snapkv" or budget == 1 / 4}
    reasons = {(entry["name"], entry["budget"]): entry["reason"] for entry in left_out}
    assert {(name, budget) for name, budget, _ in points if budget} | reasons.keys() == asked
    assert reasons == {("sketch", 1 / 16): "does not fit", ("decayed_int4", 1 / 2): "holds the whole text"}


def test_h2o_is_the_published_one(gpt2):
    """Half of the cap is recent; its scores under the common protection have a name of their own."""
    windows = {
        name: make_cache(gpt2.config, max_cache_size=100, **methods.BOUNDED[name]).layers[0].recent_window
        for name in ("h2o", "plain_sums", "decayed")
    }
    assert windows == {"h2o": 50, "plain_sums": 16, "decayed": 16}
    assert "h2o" in methods.PEERS and "plain_sums" not in methods.PEERS


def test_every_method_has_a_label_and_a_style_of_its_own():
    names = {*methods.BOUNDED, *methods.WHOLE}
    assert names == set(methods.LABELS) and names - {"full"} <= set(figures.METHODS)
    assert len({tuple(figures.method_style(name).values()) for name in names}) == len(names)
    assert set(methods.PEERS) <= names and {*baselines.EVERYWHERE, *baselines.QUARTER_ONLY} <= names


def test_losses_are_those_of_their_points(config):
    class Run:
        device, data_revision = "cpu", "abc"

        def grid(self, kind, function, points):
            assert all(point["text"] == "abc" for point in points)
            assert all(point["length"] == 256 and point["seed"] == 1 for point in points)
            row = {"nll_full": 1.0, "nll_late": 3.0, "nll_late_full": 1, "bytes_total": 100}
            return [
                [row | {"nll": i + 1.0, "evicted": int(p["method"]["method"] != "full")}]
                for i, p in enumerate(points)
            ]

    points, _ = baselines.equal_bytes(config, (1 / 2,), 256, torch.float32, ("streaming", "tova"))
    points = [point for point in points if point[0] in ("streaming", "tova", "int8")]
    found = baselines.losses(Run(), points, config, 256, seed=1)
    assert found.method.tolist() == ["int8", "streaming", "tova"] and found.loss.tolist() == [0, 1, 2]
    assert found.loss_late.eq(2).all() and (found.share == 100 / full_nbytes(config, 256)).all()


@pytest.mark.parametrize(
    "method", [{"method": "kivi", "bits": 2}, {"method": "snapkv", "bits": 16, "max_cache_size": 40}]
)
def test_bytes_said_are_bytes_held(gpt2, ids, method):
    cache = make_cache(gpt2.config, length=100, **method)
    score(gpt2, ids[:1], cache)
    assert cache.nbytes() == nbytes(gpt2.config, 100, **method)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(-2, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_beats(points):
    def beats(a, b):
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    expected = [not any(beats(other, point) for other in points) for point in points]
    assert baselines.pareto(*zip(*points)).tolist() == expected


def test_verdicts_follow_the_interval():
    losses = {
        "better": np.linspace(0.010, 0.012, 8),
        "worse": np.linspace(0.03, 0.05, 8),
        "unclear": np.linspace(-0.06, 0.1, 8),
        "large": np.zeros(8),
    }
    frame = pd.concat(
        pd.DataFrame(
            {
                "method": name,
                "budget": np.nan if name == "large" else 0.25,
                "share": 0.5 if name == "large" else 0.24,
                "loss": loss,
                "loss_late": 2 * loss,
                "document": range(8),
            }
        )
        for name, loss in losses.items()
    )
    half = frame[frame.method == "worse"].assign(budget=0.5, loss=0.0)
    verdicts = baselines.hypothesis(pd.concat([frame, half]))
    assert verdicts.increase.is_monotonic_increasing and set(verdicts.columns) == set(
        baselines.HYPOTHESIS_COLUMNS
    )
    verdicts = verdicts.set_index(["method", "budget"])
    expected = {"better": "holds", "worse": "fails", "unclear": "open", "large": "holds"}
    assert {
        name: verdict for (name, budget), verdict in verdicts.verdict.items() if budget != 0.5
    } == expected
    assert verdicts.verdict["worse", 0.5] == "holds" and verdicts.verdict_late["better", 0.25] == "fails"
    assert verdicts.increase["worse", 0.25] == pytest.approx(np.exp(0.04) - 1)
    gain = baselines.compare(frame, "better", "worse")
    assert gain[0] == pytest.approx(0.029) and stats.against(gain) == "better than"
    assert stats.against(baselines.compare(frame, "unclear", "better")) == "not distinguishable from"
    assert baselines.words([]) == "none" and baselines.words(["lru", "h2o", "tova"]) == "LRU, H2O and TOVA"


def test_a_setting_stands_beside_its_reference_on_the_same_documents():
    """Differences are of documents and percentages of means; a setting that is missing at a budget is left out."""
    losses = {"decayed one": 0.2, "decayed none": 0.3, "decayed hash": 0.19}
    table = pd.DataFrame(
        [
            {"method": name, "budget": budget, "share": budget, "loss": loss + d, "document": d}
            | {"max_cache_size": 9, "nll": 0}
            for name, loss in losses.items()
            for budget in (0.25, 0.125)
            for d in range(5)
            if budget == 0.25 or name != "decayed hash"
        ]
    )
    pairs = [(name, "decayed one") for name in ("decayed none", "decayed hash")]
    found = baselines.gains(table, pairs)
    assert list(found) == list(baselines.GAIN_COLUMNS) and found.n.eq(5).all()
    assert found.verdict.tolist() == ["worse than", "better than", "worse than"]
    assert found.set_index(["budget", "method"])["mean"].to_dict() == pytest.approx(
        {(0.25, "decayed none"): -0.1, (0.25, "decayed hash"): 0.01, (0.125, "decayed none"): -0.1}
    )
    rows = one_slot.increases(table).set_index(["setting", "budget"])["mean"]
    assert rows["decayed none", 0.125] == pytest.approx(100 * np.expm1(2.3))


def test_a_whole_text_stands_at_every_budget_that_it_fits():
    sizes = {"compact": ((0.25, 0.25, 0.1), (0.5, 0.5, 0.05)), "whole": ((np.nan, 0.3, 0.01),)}
    table = pd.DataFrame(
        {"method": name, "budget": budget, "share": share, "loss": loss + d / 100, "document": d}
        for name, points in sizes.items()
        for budget, share, loss in points
        for d in range(4)
    )
    found = baselines.gains(table, [("compact", "whole")])
    assert found.budget.tolist() == [0.5] and found["mean"].tolist() == pytest.approx([-0.04])
