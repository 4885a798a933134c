"""What one summary slot and what fewer bits are worth: settings and findings of `09_one_slot`."""

from sketchkv.study import baselines, stats
from sketchkv.study.methods import BOUNDED

SCORES = {"decayed": "exact scores", "streaming": "window with sinks", "sketch_small": "sketch 128x2"}
# Slots and options beside one plain mean, all with exact scores.
SUMMARIES = {
    "none": {},
    "one": {"summary_slots": 1},
    "hash": {"summary_slots": 4},
    "hash_8": {"summary_slots": 8},
    "spread": {"summary_slots": 1, "spread": True},
    "protects": {"summary_slots": 1, "protects": True},
    "strong": {"summary_slots": 1, "spread": True, "protects": True},
}
# Bits of keys and values of `SketchCache.compact`, whose scores and summary slot all share.
BITS = {"16": 16, "8": 8, "5/4": [5, 4], "4": 4, "4/3": [4, 3], "3": 3, "2": 2}
LOSS_COLUMNS = {
    "setting": "name of the setting",
    "budget": baselines.COLUMNS["budget"],
    "max_cache_size": "tokens kept per layer and KV head, beside summaries",
    "mean": "growth of perplexity over the full cache, %",
    **stats.ENDS,
}


def settings():
    """{name: settings}: each way to score without and with a slot, then the other summaries with exact scores."""
    found = {
        f"{score} {slots}": BOUNDED[score] | SUMMARIES[slots] for score in SCORES for slots in ("none", "one")
    }
    others = [name for name in SUMMARIES if name not in ("none", "one")]
    return found | {f"decayed {name}": BOUNDED["decayed"] | SUMMARIES[name] for name in others}


def increases(table, seed=0):
    """Growth of perplexity of each setting at each budget, in percent: a DataFrame (`LOSS_COLUMNS`)."""
    by = ["method", "budget"]
    found = stats.intervals(table, by, "loss", seed)
    found[["mean", "low", "high"]] = stats.percent(found[["mean", "low", "high"]])
    found["max_cache_size"] = table.groupby(by, sort=False).max_cache_size.first().to_numpy()
    return found.rename(columns={"method": "setting"})[list(LOSS_COLUMNS)]


def summaries_caption(found, gains, length):
    at = found.set_index(["setting", "budget"])["mean"]
    before, after = (
        [at[(f"{score} {slots}", b)] for score in SCORES for b in found.budget.unique()]
        for slots in ("none", "one")
    )
    fewer = [1 - new / old for old, new in zip(before, after)]
    several = gains[gains.budget == gains.budget.min()].set_index("method").verdict
    finding = (
        f"One summary slot takes {100 * min(fewer):.0f} to {100 * max(fewer):.0f} % off the loss"
        if min(fewer) > 0
        else "One summary slot does not lower the loss everywhere"
    )
    return (
        f"{finding}, at the same bytes. Arrows lead from a cache that drops what it evicts to one that folds it into "
        f"the mean of one slot. Filled by a hash of the key, four slots are {several['decayed hash']} one, eight "
        f"{several['decayed hash_8']} one; a slot that knows its spread and protects what it would swallow is "
        f"{several['decayed strong']} the plain mean. "
        f"Exact scores unless said otherwise; bars: bootstrap 95 % intervals (n = {found.n.iloc[0]} documents of {length} "
        f"tokens)."
    )


def spelled(setting):
    return f"{setting.replace('/', ' and ')} bits"


def bits_caption(found, length):
    said = []
    for budget, part in found.groupby("budget"):
        best, worst = part.loc[part["mean"].idxmin()], part.loc[part["mean"].idxmax()]
        said.append(
            f"at 1/{1 / budget:.0f} of the bytes {spelled(best.setting)} lose {best['mean']:.1f} % with "
            f"{best.max_cache_size} tokens kept, {spelled(worst.setting)} {worst['mean']:.1f} % with {worst.max_cache_size}"
        )
    best = {part.loc[part["mean"].idxmin(), "setting"] for _, part in found.groupby("budget")}
    finding = f"{' or '.join(spelled(name) for name in sorted(best))} lose least for their bytes"
    return (
        f"{finding}. Neither more bits nor more tokens make up for the other: {'; '.join(said)}. Beside each point: tokens "
        f"kept. Bars: bootstrap 95 % intervals (n = {found.n.iloc[0]} documents of {length} tokens)."
    )
