"""Intervals, against exact distributions and scipy's: all of the report's rest on them."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from sketchkv.study import stats

GENERATOR = np.random.default_rng(0)
SKEWED = GENERATOR.gamma(2.0, size=60)
WHOLE = SKEWED + GENERATOR.gamma(5.0, size=60)


@pytest.mark.parametrize("hits, count", [(200, 400), (40, 400), (12, 48)])
def test_a_paired_interval_of_zeros_and_ones_is_binomial(hits, count):
    difference = np.arange(count) < hits
    exact = scipy.stats.binom(count, hits / count)
    mean, low, high = stats.paired_interval(difference.astype(float), resamples=50_000)
    low, high = round(low * count, 9), round(high * count, 9)
    assert mean == hits / count
    # Whole numbers, so that those of 2.4 and 2.6 % lie at most one apart.
    assert exact.ppf(0.024) <= low <= exact.ppf(0.026) < exact.ppf(0.05)
    assert exact.ppf(0.95) < exact.ppf(0.974) <= high <= exact.ppf(0.976)


def test_paired_and_ratio_intervals_are_those_of_scipys_bootstrap():
    same = dict(n_resamples=20_000, method="percentile", rng=1)
    expected = scipy.stats.bootstrap((SKEWED,), np.mean, **same).confidence_interval
    mean, low, high = stats.paired_interval(SKEWED, resamples=20_000)
    width = expected.high - expected.low
    assert mean == pytest.approx(SKEWED.mean())
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03 * width)

    def ratio(part, whole, axis):
        return part.mean(axis) / whole.mean(axis)

    expected = scipy.stats.bootstrap((SKEWED, WHOLE), ratio, paired=True, **same).confidence_interval
    found, low, high = stats.ratio_interval(SKEWED, WHOLE, resamples=20_000)
    assert found == pytest.approx(SKEWED.mean() / WHOLE.mean())
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03 * (expected.high - expected.low))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(size=(1000, 40))
    found = np.array(
        [stats.paired_interval(sample, seed=i, resamples=1000) for i, sample in enumerate(samples)]
    )
    covered = ((found[:, 1] <= 0) & (0 <= found[:, 2])).mean()
    # The percentile bootstrap of 40 normal values covers 94 % for a nominal 95, and 89 % for a nominal 90.
    assert 0.92 <= covered <= 0.96


def test_intervals_of_a_table_are_those_of_its_groups():
    table = pd.DataFrame({"method": ["b"] * 40 + ["a"] * 20, "loss": SKEWED})
    found = stats.intervals(table, "method", "loss", seed=3)
    assert found.method.tolist() == ["b", "a"] and found.n.tolist() == [40, 20]
    for row, part in zip(found.itertuples(), (SKEWED[:40], SKEWED[40:]), strict=True):
        assert (row.mean, row.low, row.high) == stats.paired_interval(part, seed=3)
