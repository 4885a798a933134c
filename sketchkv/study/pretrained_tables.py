"""What notebook 16 shows of the tables that `sketchkv.study.pretrained` measured on a GPU."""

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sketchkv.study.measured import BENCHMARKS, COUNTS, LABELS
from sketchkv.study.stats import paired_interval

LOSSES = {
    "text": "prose (documentation of Django) or code (Python of held-out packages)",
    "method": "eviction rule and codec",
    "share": "bytes held in all, as a share of the full cache's in float16",
    "max_cache_size": "tokens kept per layer and KV head",
    "percent": "perplexity above the full cache's, in percent, mean over documents",
    "low": "lower end of its 95 % interval, documents resampled",
    "high": "upper end",
    "gain_kept": "share of what the context beyond 256 tokens gains that is kept",
    "kl": "mean KL divergence of the next token's distribution from the full cache's, nats",
    "top1": "share of tokens whose most probable successor is the full cache's",
    "n": "documents",
}
ANSWERS = {
    "task": "what was asked for",
    "method": "cache",
    "depth": "where in the text the fact stood, 0 its start",
    "right": "answers that were right in full",
    "n": "instances",
    "low": "lower end of the exact binomial 95 % interval of the share",
    "high": "upper end",
    "counts": f"whether the full cache answers {COUNTS} of 30 or more, so that the cell says something",
}


def losses(folder=BENCHMARKS):
    """Loss of each method at each size: a DataFrame with the columns `LOSSES`."""
    table = pd.read_csv(folder / "pretrained_quality.csv")
    near = table[table.name == "near"].groupby("text").nll.mean()
    rows = []
    for (text, name, share), part in table[table.name != "near"].groupby(
        ["text", "name", "share"], dropna=False, sort=False
    ):
        loss = part.nll - part.nll_full
        mean, low, high = (100 * np.expm1(x) for x in paired_interval(loss.to_numpy(copy=True)))
        rows.append(
            {
                "text": text,
                "method": LABELS[name],
                "share": part.bytes_total.mean() / part.bytes_full.mean(),
                "max_cache_size": int(part.max_cache_size.iloc[0]),
                "percent": mean,
                "low": low,
                "high": high,
                "gain_kept": 1 - loss.mean() / (near[text] - part.nll_full.mean()),
                "kl": part.kl.mean(),
                "top1": part.top1.mean(),
                "n": len(part),
                "budget": share,
            }
        )
    return pd.DataFrame(rows).sort_values(["text", "budget", "percent"], ignore_index=True)


def answers(folder=BENCHMARKS):
    """Right answers by task, method and depth: a DataFrame with the columns `ANSWERS`."""
    table = pd.read_csv(folder / "pretrained_recall.csv")
    full = table[table.name == "full"].groupby(["task", "depth"]).exact.sum()
    rows = []
    for (task, name, depth), part in table.groupby(["task", "name", "depth"], sort=False):
        right, n = int(part.exact.sum()), len(part)
        bounds = binomtest(right, n).proportion_ci()
        counts = bool(full[task, depth] >= COUNTS)
        rows.append((task, LABELS[name], depth, right, n, bounds.low, bounds.high, counts))
    return pd.DataFrame(rows, columns=list(ANSWERS))
