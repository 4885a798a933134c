"""The table of targets: verdicts follow the numbers, and the committed tables hold what they claim to."""

import numpy as np
import pandas as pd
import pytest

from sketchkv.study import targets


def row(method, increase, gain=0.0, **more):
    return {
        "model": "gpt2",
        "length": 1024,
        "budget": 1 / 8,
        "share": 0.124,
        "method": method,
        "max_cache_size": 100,
        "increase": increase,
        "low": increase - 0.002,
        "high": increase + 0.002,
        "kl": 0.01,
        "gain": gain,
        "gain_low": gain - 0.001,
        "gain_high": gain + 0.001,
        "n": 64,
    } | more


def test_a_verdict_is_about_the_upper_end_and_the_best_peer():
    loss = np.log1p(0.02)
    table = pd.DataFrame(
        [
            row("compact", 0.0079),
            row("decayed", 0.03, 0.02),
            row("streaming_int4", 0.02, loss / 2),
            row("evicting", 0.001),
            row("rounding", 0.001),
        ]
    )
    (found,) = targets.verdicts(table).to_dict("records")
    assert found["met"] and found["limit"] == 0.01
    assert found["peer"] == "streaming_int4"  # diagnoses are no peers
    assert found["less"] == pytest.approx(0.5)
    (found,) = targets.verdicts(table.assign(high=0.0101)).to_dict("records")
    assert not found["met"]


def test_recall_is_counted_against_the_full_cache():
    table = pd.DataFrame({"method": ["full", "full", "compact", "compact"], "exact": [1.0, 0.5, 0.75, 0.0]})
    assert targets.kept(table).compact == pytest.approx(0.5)


def test_the_committed_tables_are_of_enough_documents_and_equal_bytes():
    quality, recalled, facts = targets.measured()
    assert set(quality.columns) == set(targets.COLUMNS) and set(recalled.columns) == set(
        targets.RECALL_COLUMNS
    )
    assert facts["commit"] and quality.n.min() >= 64 and recalled.n.min() >= 64
    fair = quality[~quality.method.isin(targets.DIAGNOSES)]
    assert (fair.share <= fair.budget).all()
    assert set(targets.verdicts(quality).budget) == set(targets.LIMITS)
