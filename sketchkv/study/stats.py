"""Intervals: how far a mean over documents, or over independent runs, can be trusted."""

import math

import numpy as np
import pandas as pd
import torch
from scipy import stats


def interval(values):
    """`(mean, half width)` of the 95 % interval of the mean of independent `values` (Student's t)."""
    values = np.asarray(values, dtype=np.float64)
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))


def paired_interval(difference, seed=0, resamples=2000):
    """Mean of paired differences per document and its bootstrap 95 % interval, documents resampled: (mean, low, high)."""
    generator = torch.Generator().manual_seed(seed)
    difference = torch.as_tensor(difference, dtype=torch.float64)
    draws = torch.randint(len(difference), (resamples, len(difference)), generator=generator)
    low, high = torch.quantile(difference[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return difference.mean().item(), low.item(), high.item()


def ratio_interval(part, whole, seed=0, resamples=2000):
    """Mean of `part` over mean of `whole`, paired per document, and its bootstrap 95 % interval: (ratio, low, high)."""
    generator = torch.Generator().manual_seed(seed)
    part, whole = (torch.as_tensor(x, dtype=torch.float64) for x in (part, whole))
    draws = torch.randint(len(part), (resamples, len(part)), generator=generator)
    ratios = part[draws].mean(1) / whole[draws].mean(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return (part.mean() / whole.mean()).item(), low.item(), high.item()


def intervals(table, by, value, seed=0):
    """`paired_interval` of the column `value`, one row a document, for each group of the columns `by`: a DataFrame with
    `by`, "mean", "low", "high" and "n" (documents), groups in the order in which they first appear."""
    by = [by] if isinstance(by, str) else list(by)
    rows = [
        (*group, *paired_interval(part[value].to_numpy(copy=True), seed), len(part))
        for group, part in table.groupby(by, sort=False, dropna=False)
    ]
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


def percent(nats):
    """Increase of perplexity, in percent, of so many nats per token."""
    return 100 * np.expm1(nats)


def named(name, interval):
    """`interval` (mean, low, high) as facts: {"NAME_mean", "NAME_low", "NAME_high"}."""
    return {f"{name}_{part}": float(value) for part, value in zip(("mean", "low", "high"), interval)}
