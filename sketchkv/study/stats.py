"""Intervals: how far a mean over documents, or over independent runs, can be trusted."""

import numpy as np
import pandas as pd
import torch

# Columns beside a mean, as tables describe them.
ENDS = {
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "n": "documents",
}


def paired_interval(difference, seed=0, resamples=2000):
    """Mean of paired differences per document and its bootstrap 95 % interval, documents resampled: (mean, low, high)."""
    return ratio_interval(difference, torch.ones(len(difference)), seed, resamples)


def ratio_interval(part, whole, seed=0, resamples=2000):
    """Mean of `part` over mean of `whole`, paired per document, and its bootstrap 95 % interval: (ratio, low, high)."""
    generator = torch.Generator().manual_seed(seed)
    part, whole = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (part, whole))
    draws = torch.randint(len(part), (resamples, len(part)), generator=generator)
    ratios = part[draws].mean(1) / whole[draws].mean(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64))
    return (part.mean() / whole.mean()).item(), low.item(), high.item()


def intervals(table, by, value, seed=0):
    """`paired_interval` of the column `value`, one row a document, for each group of the columns `by`: a DataFrame with
    `by`, "mean", "low", "high" and "n" (documents), groups in the order in which they first appear."""
    by = [by] if isinstance(by, str) else list(by)
    rows = [
        (*group, *paired_interval(part[value], seed), len(part))
        for group, part in table.groupby(by, sort=False, dropna=False)
    ]
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n"])


def percent(nats):
    """Increase of perplexity, in percent, of so many nats per token."""
    return 100 * np.expm1(nats)


def against(interval):
    """What an interval of how much less a method loses says, in words."""
    _, low, high = interval
    return "better than" if low > 0 else "worse than" if high < 0 else "not distinguishable from"
