"""What to merge into what: every kind of summary at equal bytes, and whether protection keeps a needle out of it."""

import pandas as pd
import torch

from sketchkv.study import baselines, recall, results, stats
from sketchkv.study.evaluate import BATCH, _model, evaluate
from sketchkv.study.methods import fit, make_cache, nbytes

EXACT = {"method": "decayed", "bits": 16}  # half precision, the summary's means and variances in the bytes of float32
STRONG = {"second_order": True, "protect": True}  # chosen on the development documents

# Name: (number of slots, `summary` of `SketchCache`). Numbers of slots were tried on the development documents too.
KINDS = {
    "none": (0, "hash"),
    "one": (1, "hash"),
    "hash": (4, "hash"),
    "hash_8": (8, "hash"),
    "nearest": (4, "nearest"),
    "nearest_8": (8, "nearest"),
    "sliding": (4, "sliding"),
    "segments": (4, "segments"),
    "count_sketch": (6, "count_sketch"),
    "mass": (1, {"weight": "mass"}),
    "decay": (1, {"weight": "decay"}),
    "second_order": (1, {"second_order": True}),
    "protect": (1, {"protect": True}),
    "strong": (1, STRONG),
}
LABELS = {
    "none": "no summary", "one": "1 slot, plain mean", "hash": "4 slots by hash", "hash_8": "8 slots by hash",
    "nearest": "4 slots, nearest mean", "nearest_8": "8 slots, nearest mean", "sliding": "4 slots, sliding merge",
    "segments": "4 slots, stretches of text", "count_sketch": "Count-Sketch of 6 cells", "mass": "1 slot, weighted by attention",
    "decay": "1 slot, the old fades", "second_order": "1 slot, second order", "protect": "1 slot, protection",
    "strong": "1 slot, second order + protection",
}  # fmt: skip
WHERE = ("hash", "hash_8", "nearest", "nearest_8", "sliding", "segments", "count_sketch")  # what is merged with what
COLUMNS = {
    "kind": "what evicted tokens are folded into: " + ", ".join(KINDS),
    "model": "gpt2 or rotary: the embedded models",
    "budget": "bytes in all, as the cap of exact scores without a summary that they allow",
    "document": "held-out file",
    "max_cache_size": "tokens kept per layer and KV head, beside the summary",
    "bytes_total": "all bytes held for one sequence",
    "nll": "mean negative log-likelihood, nats per token",
    "nll_full": "the same with the full cache",
    "loss": "nll - nll_full",
    "over_one": "the loss less that of one slot with the plain mean, on the same document at the same bytes",
}
INTERVALS = {
    "kind": COLUMNS["kind"],
    "model": COLUMNS["model"],
    "budget": COLUMNS["budget"],
    "mean": "nats per token more than with one plain slot, mean of paired differences",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "n": "documents",
    "loss": "nats per token over the full cache, mean",
    "max_cache_size": COLUMNS["max_cache_size"],
    "verdict": "what the interval says of the kind beside one plain slot",
}


def at_equal_bytes(config, dtype, kind, cap):
    """Kind `kind` as a method with the largest cap whose bytes in all are at most those of exact scores with the cap `cap`
    and no summary. Raises ValueError if none fits."""
    slots, summary = KINDS[kind]
    method = EXACT | ({"summary_slots": slots, "summary": summary} if slots else {})
    budget = nbytes(config, dtype=dtype, **EXACT, max_cache_size=cap)["total"]
    return method | {"max_cache_size": fit(config, budget, dtype, **method)}


def point(method, *, text, **texts):
    """A grid point: rows of `evaluate`; text: revision of text and model, among what names the point."""
    return evaluate(method, **texts)


def losses(run, asked, workers=None, **texts):
    """Each of `asked`, a list of (model, its name, documents, kind, cap), on the same documents through `run.grid`: a DataFrame
    (`COLUMNS`). Every model and cap must have "one" among its kinds."""
    points = []
    for model, _, documents, kind, cap in asked:
        lm, _ = _model(model, run.device)
        method = at_equal_bytes(lm.config, lm.dtype, kind, cap)
        revision = f"{run.data_revision} {results.model_revision(model)}"
        points.append({"method": method, "model": model, "device": run.device, "documents": documents, "text": revision, **texts})
    rows = []
    for (_, name, _, kind, cap), own, found in zip(asked, points, run.grid("summaries", point, points, workers)):
        assert all(row["evicted"] > 0 for row in found), "texts are too short for an eviction"
        rows += [
            {"kind": kind, "model": name, "budget": cap, "max_cache_size": own["method"]["max_cache_size"]}
            | {key: row[key] for key in ("document", "bytes_total", "nll", "nll_full")} for row in found
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    table["loss"] = table.nll - table.nll_full
    one = table[table.kind == "one"].set_index(["model", "budget", "document"]).loss
    return table.assign(over_one=table.loss - one.loc[list(zip(table.model, table.budget, table.document))].to_numpy())


def gains(table, seed=0):
    """Each kind beside one plain slot, at each budget of each model: a DataFrame (`INTERVALS`)."""
    by = ["model", "budget", "kind"]
    found = stats.intervals(table[table.kind != "one"], by, "over_one", seed)
    means = table.groupby(by)[["loss", "max_cache_size"]].mean().loc[list(found[by].itertuples(index=False, name=None))]
    found["loss"], found["max_cache_size"] = means.loss.to_numpy(), means.max_cache_size.astype(int).to_numpy()
    return found.assign(verdict=[baselines.against_losses(row.low, row.high) for row in found.itertuples()])


def forest(axis, rows, limits, **style):
    """Differences and intervals, one row each from the top; one that lies beyond the `limits` of the axis is told in its
    place at the edge. `rows` has mean, low, high and y."""
    inside = rows[(rows["mean"] > limits[0]) & (rows["mean"] < limits[1])]
    axis.errorbar(inside["mean"], inside.y, xerr=[inside["mean"] - inside.low, inside.high - inside["mean"]], linestyle="none",
                  capsize=2, **style)  # fmt: skip
    for row in rows.drop(inside.index).itertuples():
        axis.annotate(f"{row.mean:+.2f} \u2192", (limits[1], row.y), ha="right", va="center", fontsize="x-small", color=style["color"])
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_xlim(*limits)


# -- needles ------------------------------------------------------------------------------------------------------------

NEEDLE_COLUMNS = {
    "kind": "what evicted tokens are folded into",
    "depth": recall.COLUMNS["depth"],
    "instance": recall.COLUMNS["instance"],
    "kept": "share of the tokens to be recalled that are still stored when the answer is due, over layers and KV heads",
    "loglik": recall.COLUMNS["loglik"],
    "loglik_full": recall.COLUMNS["loglik_full"],
    "exact": recall.COLUMNS["exact"],
    "exact_full": recall.COLUMNS["exact_full"],
}


def needle_table(run, kinds, depths, cap, workers=None, **texts):
    """The needles of all `kinds` at the bytes of exact scores with the cap `cap`: a DataFrame (`NEEDLE_COLUMNS`)."""
    lm, _ = _model(texts["model"], run.device)
    asked = [(kind, depth) for kind in kinds for depth in depths]
    points = [
        {"method": at_equal_bytes(lm.config, lm.dtype, kind, cap), "depth": depth, "device": run.device, "text": run.data_revision, **texts}
        for kind, depth in asked
    ]  # fmt: skip
    found = run.grid("summary_needles", needles, points, workers)
    return pd.DataFrame([{"kind": kind, **row} for (kind, _), rows in zip(asked, found) for row in rows])


@torch.no_grad()
def needles(
    method, *, depth, text, instances=16, length=512, model="embedded", dataset="embedded", device="cpu", split="test", seed=0
):  # fmt: skip
    """A grid point: rows (`NEEDLE_COLUMNS` less "kind"), one per instance of `recall.needle`, a line that is hidden at
    `depth` and asked for at the end. text: revision of the text, among what names the point."""
    lm, _ = _model(model, device)
    known, rows = recall.scored_instances("needle", depth, instances, length, model, dataset, device, split, seed), []
    for first in range(0, instances, BATCH):
        part, starts, answers, _, full = (each[first : first + BATCH] for each in known)
        cache = make_cache(lm.config, length=length, **method)
        found = recall.answer(lm, part, answers, cache)
        stored = [cache.kept_positions(layer).cpu() for layer in range(len(cache.layers))]
        assert cache.evicted_tokens > 0
        for i, (exact, loglik) in enumerate(found):
            hidden = _hidden(part[i], starts[i], answers[i])
            kept = torch.cat([(positions[i][..., None] == hidden).any(1) for positions in stored]).float().mean().item()
            rows.append({
                "depth": depth, "instance": first + i, "kept": kept, "loglik": loglik, "loglik_full": full[i][1],
                "exact": exact, "exact_full": full[i][0],
            })  # fmt: skip
    return rows


def _hidden(ids, start, answer):
    """Positions of the answer's tokens where the fact has them: the text ends with the fact, up to its closing quote."""
    size = next(n for n in range((len(ids) - start) // 2, 0, -1) if torch.equal(ids[start : start + n], ids[-n:]))
    return torch.arange(start + size - answer, start + size)
