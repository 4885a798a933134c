"""Settings of one cache at equal bytes, beside one of them: what each loses on the same documents."""

import pandas as pd

from sketchkv.study import baselines, stats
from sketchkv.study.evaluate import _model, evaluate
from sketchkv.study.methods import fit

COLUMNS = {
    "setting": "name of the setting",
    "model": "gpt2 or rotary: the embedded models",
    "budget": "bytes allowed in all",
    "max_cache_size": "tokens kept per layer and KV head, beside summaries",
    "bytes_total": "all bytes held for one sequence",
    "document": "held-out file",
    "nll": "mean negative log-likelihood, nats per token",
    "nll_full": "the same with the full cache",
    "loss": "nll - nll_full",
    "over": "the loss less that of the reference, on the same document at the same bytes",
}
GAINS = {
    **{name: COLUMNS[name] for name in ("model", "budget", "setting")},
    "mean": "nats per token more than the reference, mean of paired differences",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "n": "documents",
    "loss": "nats per token over the full cache, mean",
    "loss_low": "lower end of its 95 % interval",
    "loss_high": "upper end of its 95 % interval",
    "max_cache_size": COLUMNS["max_cache_size"],
    "verdict": "what the interval says of the setting beside the reference",
}


def filled(lm, budget, **method):
    """`method` with the largest cap whose bytes in all are at most `budget`. Raises ValueError if none fits."""
    return method | {"max_cache_size": fit(lm.config, int(budget), lm.dtype, **method)}


def point(method, *, text, **texts):
    """A grid point: rows of `evaluate`; text: revision of text and model, among what names the point."""
    return evaluate(method, **texts)


def losses(run, kind, asked, reference, workers=None, **texts):
    """What each setting loses: a DataFrame (`COLUMNS`), one row per setting and document.

    asked: list of (labels, allowed, method, own): labels are the columns "setting", "model" and "budget"; allowed(model) is
        the bytes; own are parameters of `point` beside `texts`.
    reference: the setting that all of one model and budget are compared with.
    """
    points = []
    for _, allowed, method, own in asked:
        lm, _ = _model(own["model"], run.device)
        points.append({"method": filled(lm, allowed(lm), **method), "device": run.device, **texts, **own})
    rows = []
    for (labels, *_), own, found in zip(asked, points, run.grid(kind, point, points, workers)):
        assert all(row["evicted"] > 0 for row in found), "texts are too short for an eviction"
        held = {"max_cache_size": own["method"]["max_cache_size"]}
        rows += [
            labels | held | {name: row[name] for name in ("document", "bytes_total", "nll", "nll_full")}
            for row in found
        ]
    table = pd.DataFrame(rows)
    table["loss"] = table.nll - table.nll_full
    by = ["model", "budget", "document"]
    beside = table[table.setting == reference].set_index(by).loss.rename("beside")
    table = table.join(beside, on=by)
    return table.assign(over=table.loss - table.beside)[list(COLUMNS)]


def gains(table, seed=0):
    """Each setting beside the reference, at each budget of each model: a DataFrame (`GAINS`), the reference among them."""
    by = ["model", "budget", "setting"]
    found, own = (stats.intervals(table, by, value, seed) for value in ("over", "loss"))
    found[["loss", "loss_low", "loss_high"]] = own[["mean", "low", "high"]]
    found["max_cache_size"] = table.groupby(by, sort=False).max_cache_size.first().to_numpy()
    return found.assign(verdict=[baselines.against_losses(row.low, row.high) for row in found.itertuples()])
