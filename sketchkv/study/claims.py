"""What the report's claims rest on, read from the results; the template (`report/template.md.j2`) has the words.

Losses are percent of perplexity above the full cache; less is better. A claim whose results are absent is None, and the
template says that it was not measured.
"""

from types import SimpleNamespace as Claim
from typing import NamedTuple

import pandas as pd
from scipy.stats import binomtest

from sketchkv.study import measured, sweep
from sketchkv.study.stats import against, paired_interval, percent

# Shares of the bytes that count as an eighth, and as a sixteenth.
EIGHTH, SIXTEENTH = (0.12, 0.1251), (0.06, 0.0626)
TEXTS = ("prose", "code")


class Found(NamedTuple):
    """A mean and its 95 % interval, in percent."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:.{self._digits()}f} % ({self.low:.{self._digits()}f} to {self.high:.{self._digits()}f})"

    def short(self):
        return f"{self.mean:.{self._digits()}f} %"

    def than(self):
        """Of a difference: "3.9 % (3.3 to 4.6) lower", or that none was measured."""
        if self.low <= 0 <= self.high:
            return f"not measurably different ({self.low:+.1f} to {self.high:+.1f} %)"
        if self.high < 0:
            return f"{Found(-self.mean, -self.high, -self.low)} lower"
        return f"{self} higher"

    def won(self):
        """Of a share: as `str`, or that it is too small to be measured."""
        return (
            f"nothing measurable ({self.low:+.1f} to {self.high:+.1f} %)"
            if self.low <= 0 <= self.high
            else str(self)
        )

    def added(self):
        """Of a loss: as `short`, or that there is none, or none that can be measured."""
        if self.high < 0:
            return "nothing"
        return "nothing measurable" if self.low <= 0 else self.short()

    def _digits(self):
        return 0 if self.mean >= 20 else 1 if abs(self.mean) >= 0.1 else 2


def gather(found):
    """{name: Claim or None} of `report.Results`."""
    claims = {}
    for part in (
        at_an_eighth,
        beside,
        at_a_sixteenth,
        longer,
        second,
        past,
        keys,
        parts,
        slot,
        swept,
        forgotten,
        speed,
        recorded,
        generated,
        prompts,
        peers,
    ):
        try:
            claims[part.__name__] = part(found)
        except (KeyError, IndexError):
            claims[part.__name__] = None
    return claims


def at_an_eighth(found):
    """`loss[text][method]` (Found), `slots[method]` of the pretrained model; `embedded` of the embedded one."""
    table = found.frame("pretrained_losses")
    table = table[table["share"].between(*EIGHTH)]
    front = found.frame("baseline_front")
    front = front[front["share"].between(*EIGHTH)].set_index("method").loss
    return Claim(
        loss=_losses(table),
        slots=table.groupby("method").max_cache_size.first().to_dict(),
        n=int(table.n.min()),
        tokens=found.facts["pretrained_tokens"],
        embedded={name: float(percent(value)) for name, value in front.items()},
    )


def beside(_):
    """Of the pretrained model at an eighth of the bytes: `late[text][method]`, percent over the second half of the texts, where
    evictions have begun; `host`, percent of the full cache's bytes that the store of recall takes besides."""
    table = pd.read_csv(measured.BENCHMARKS / "pretrained_quality.csv")
    table = table[table["share"].between(*EIGHTH) & (table.tokens == measured.LENGTH)]
    lost = (table.nll_late - table.nll_late_full).groupby([table.text, table.name]).mean()
    stored = table[table.name == "recall"]
    return Claim(
        late={text: percent(part.droplevel(0)).to_dict() for text, part in lost.groupby(level=0)},
        host=float(100 * (stored.bytes_host / stored.bytes_full).mean()),
    )


def at_a_sixteenth(found):
    """`loss[text][method]` (Found) at a sixteenth of the bytes."""
    table = found.frame("pretrained_losses")
    return Claim(loss=_losses(table[table["share"].between(*SIXTEENTH)]))


def longer(found):
    """`loss[text][method]` (Found) at an eighth of the bytes of a longer text."""
    table = found.frame("pretrained_longer")
    table = table[table["share"].between(*EIGHTH)]
    return Claim(loss=_losses(table), n=int(table.n.min()), tokens=found.facts["pretrained_longer_tokens"])


def second(found):
    """`loss[text][method]` (Found) of Gemma 3 at an eighth of the bytes of its layers that attend to the whole text."""
    table = found.frame("pretrained_second")
    table = table[table["share"].between(*EIGHTH)]
    return Claim(loss=_losses(table), n=int(table.n.min()), tokens=found.facts["pretrained_second_tokens"])


def _losses(table):
    return {
        text: {row.method: Found(row.percent, row.low, row.high) for row in part.itertuples()}
        for text, part in table.groupby("text")
    }


def past(found):
    """A sketch of past attention beside exact scores at equal bytes: trials of the embedded model; `over[text]` of
    the other, and `smaller[text]` with fewer counters."""
    over, smaller = (
        {text: _ends(found.facts, f"pretrained_{text}_{name}_over_decayed") for text in TEXTS}
        for name in ("sketch", "sketch_small")
    )
    trials = found.frame("sketch_gains_regimes").query("method == 'equal bytes'")
    better, worse = ((trials.verdict == f"{word} than").sum() for word in ("better", "worse"))
    return Claim(
        trials=len(trials),
        better=better,
        worse=worse,
        documents=trials.n.max(),
        over=over,
        smaller=smaller,
        never=better == 0 and all(each.high > 0 for each in (*over.values(), *smaller.values())),
        n=found.facts["pretrained_documents"],
    )


def keys(found):
    """Recall beside exact scores and beside compact, paired: `exact[text]` and `compact[text]`, percent more than they lose;
    `tail[text]`: what recall loses more without its tail, empty where that was not measured; `tenth`: percent of the
    attention that a tenth of the tokens holds, chosen anew for each query and by past attention, in `tenth_n` documents."""
    facts = found.facts
    exact, compact = (
        {text: _ends(facts, f"pretrained_{text}_recall_over_{other}") for text in TEXTS}
        for other in ("decayed", "compact")
    )
    tenth = found.frame("pretrained_attended").query("of == 0.1").set_index("chosen")
    return Claim(
        exact=exact,
        compact=compact,
        tail={
            text: _ends(facts, f"pretrained_{text}_recall_alone_over_recall")
            for text in TEXTS
            if f"pretrained_{text}_recall_alone_over_recall_mean" in facts
        },
        tenth=[100 * tenth.mass[way] for way in ("each query", "foresight")],
        tenth_n=int(tenth.n.min()),
        ahead=all(each.high < 0 for each in exact.values()),
    )


def parts(found):
    """Shares of a small cache's loss: `share[step]` (Found) at the smallest size, the largest step first."""
    table = found.frame("why_steps")
    table = table[table.slots == table.slots.min()]
    share = {
        row.step: Found(100 * row.share, 100 * row.share_low, 100 * row.share_high)
        for row in table.itertuples()
        if row.step in ("sketch error", "wrong eviction", "lost tail", "rest")
    }
    return Claim(
        share=share,
        order=sorted(share, key=lambda step: -share[step].mean),
        slots=table.slots.iloc[0],
        tokens=found.facts["why_tokens"],
        n=found.frame("why_ladder").document.nunique(),
    )


def slot(found):
    """Loss with no summary slot, with one and with several, at equal bytes: `loss[setting]` (Found), in few and in many bytes."""
    table, gains, scored = (found.frame(name) for name in ("summary_losses", "summary_gains", "summaries"))
    budget, tokens = table.budget.min(), scored.tokens.iloc[0]
    table = table[table.budget == budget].set_index("setting")
    gains = gains[gains.budget == budget].set_index("method")[["mean", "low", "high"]]
    loss = {
        name: Found(*map(float, table.loc[f"decayed {name}", ["mean", "low", "high"]]))
        for name in ("none", "one")
    }
    return Claim(
        loss=loss,
        helps=against(gains.loc["decayed none"]) == "worse than",
        several=against(gains.loc["decayed hash"]),
        ways=[
            row.verdict for row in found.frame("tried").itertuples() if row.what.startswith("4 summary slots")
        ],
        cap=round(budget * tokens),
        tokens=tokens,
        n=scored.document.nunique(),
    )


def swept(_):
    """The sweep on SmolLM2 at its smallest cap, in `n` documents: whether four summary slots are `worse` than none, of as many
    slots in all, at every shape of the sketch that was measured with both."""
    table, cap = pd.read_csv(measured.BENCHMARKS / "pretrained_sweep.csv"), min(sweep.CAPS)
    losses = table.pivot(index="document", columns="name", values="nll")
    pairs = [
        (name, name.replace("aggregate", f"topk{cap}")) for name in losses if name.startswith("aggregate")
    ]
    pairs = [(four, none) for four, none in pairs if four.endswith(f" cap {cap}") and none in losses]
    lows = [paired_interval((losses[four] - losses[none]).to_numpy(copy=True))[1] for four, none in pairs]
    return Claim(cap=cap, worse=bool(lows) and min(lows) > 0, n=len(losses))


def forgotten(found):
    """Right answers to questions about a fact in the text. Of a number ("needle"): `right[method]` of `n`, of the first half of
    the text `far[method]` (right, n, share as Found), of the last depth `near[method]` of `near_n`. Of one of four keys: `keys[method]`
    of `keys_n`. Only depths at which the full cache answers well enough count; `hard`: tasks that have none."""
    table = found.frame("pretrained_answers")
    counted = table[table.counts]
    needle, keys = (counted[counted.task == task] for task in ("needle", "four_keys"))
    sums, of_keys, far = (
        part.groupby("method")[["right", "n"]].sum() for part in (needle, keys, needle[needle.depth <= 0.5])
    )
    last = needle[needle.depth == needle.depth.max()].set_index("method")
    return Claim(
        right=sums.right.to_dict(),
        n=int(sums.n["full cache"]),
        far={row.Index: (row.right, row.n, _binomial(row.right, row.n)) for row in far.itertuples()},
        near=last.right.to_dict(),
        near_n=int(last.n.min()),
        keys=of_keys.right.to_dict(),
        keys_n=int(of_keys.n.max()) if len(of_keys) else 0,
        hard=sorted({*table.task} - {*counted.task}),
    )


def speed(found):
    """A decode step beside that of the full cache, where the study ran: `ratio[cache]` (least, most) of samples taken in turn,
    `milliseconds[cache]` at the shortest and the longest text, `slope[cache]` for each doubling."""
    table = found.frame("speed_steps")
    table = table[table["kind"] == "measured"].replace({"cache": {"DynamicCache": "full"}})
    here = table.device.iloc[0]
    table = table[table.device == here]
    medians = table.pivot(index="context", columns="cache", values="median")
    rows = found.frame("speed_rows")
    pairs = rows.row.str.extract(r"^(?P<cache>\w+), (\d+) seen / DynamicCache, \d+ seen$")
    slopes = rows.set_index("row")[["median", "low", "high"]]
    slopes = 100 * slopes[slopes.index.str.endswith(", slope per doubling")]
    return Claim(
        device=here.partition(", measured")[0],
        ratio={cache: (of.min(), of.max()) for cache, of in rows["median"].groupby(pairs.cache)},
        milliseconds={cache: (column.iloc[0], column.iloc[-1]) for cache, column in medians.items()},
        contexts=(int(medians.index.min()), int(medians.index.max())),
        slope={
            row[0].partition(",")[0].replace("DynamicCache", "full"): Found(*row[1:])
            for row in slopes.itertuples()
        },
        n=int(table.n.min()),
    )


def recorded(found):
    """Time of a token on a GPU beside the full cache's: `generate[cache]` through `model.generate`, `long` of recall after 32k
    tokens, `compiled` of compact beside a compiled full cache, of one text, of 16 and of 8 with a larger model's
    shape; `prompt` of 8,192 tokens with compact."""
    rows = found.frame("speed_questions").set_index("question")
    median = rows["median"]
    return Claim(
        card=rows.device["model.generate, compact / full cache"],
        generate={cache: median[f"model.generate, {cache} / full cache"] for cache in ("sketch", "compact")},
        long=median["recorded step, recall with its store in host memory / full cache, 32k tokens"],
        compiled=[
            median["compiled and recorded step, compact / compiled full cache, 4096 tokens"],
            median[
                "compiled and recorded step, compact / compiled full cache, batch 16, 8192 tokens, cap 1024"
            ],
            median[
                "compiled and recorded step, compact / compiled full cache, Llama-3.1-8B's shape, batch 8, 32k tokens, "
                "cap 4096"
            ],
        ],
        prompt=median["prompt of 8192 tokens, compact, evicting every 2048 / full cache"],
        n=int(rows.n["model.generate, compact / full cache"]),
    )


def generated(_):
    """Time of a text through `model.generate` with compact, no step recorded, beside the full cache's: (ratio, n) on `cpu` and
    `gpu`."""

    def one(name, row):
        rows = pd.read_csv(measured.BENCHMARKS / f"speed_{name}.csv").set_index("row")
        return rows["median"][row], int(rows.n[row])

    return Claim(
        cpu=one("cpu", "generate, compact / generate, DynamicCache"),
        gpu=one("h100", "generate, compact, step by step / generate, DynamicCache"),
    )


def prompts(found):
    """Time of a prompt of `tokens`, the first measured, beside that of the full cache: `ratio[cache]`, and `chunk[cache]`, (tokens, ratio) where fewer
    evictions were measured, too."""
    rows = found.frame("speed_rows").row.str.extract(
        r"^prompt of (?P<tokens>\d+), (?P<cache>\w+)(?:, once per (?P<chunk>\d+))? / prompt of \d+, DynamicCache$"
    )
    rows = rows.assign(ratio=found.frame("speed_rows")["median"]).dropna(subset="tokens")
    rows = rows[rows.tokens == rows.tokens.iloc[0]]
    whole, cut = rows[rows.chunk.isna()], rows.dropna(subset="chunk")
    return Claim(
        tokens=int(rows.tokens.astype(int).iloc[0]),
        ratio=whole.set_index("cache").ratio.to_dict(),
        chunk={row.cache: (int(row.chunk), row.ratio) for row in cut.itertuples()},
    )


def peers(found):
    """Prompts cut once: `rows`, (rule, code, Found), the least loss first; the `best` of all and of `ours`; `apart`: the
    largest difference of one rule in both codes."""
    table = found.frame("peers_losses")
    table = table[table.kept == table.kept.max()].sort_values("loss")
    codes = table.pivot(index="method", columns="code", values="loss")
    rows = [
        (row.method, row.code, Found(*map(percent, (row.loss, row.low, row.high))))
        for row in table.itertuples()
    ]
    return Claim(
        rows=rows,
        best=rows[0],
        ours=next(row for row in rows if row[1] == "ours"),
        kept=int(table.kept.iloc[0]),
        apart=percent((codes.ours - codes.kvpress).abs().max()),
        n=int(table.n.min()),
    )


def title(claims):
    """The report's title: as much as the results bear."""
    past, keys = claims["past"], claims["keys"]
    if past is None or keys is None:
        return "What should a bounded KV cache remember?"
    if past.never and keys.ahead:
        return "Do not sketch what attention was; sketch the keys and let the query ask"
    if past.never:
        return "In a KV cache, exact scores do at least as well as a sketch of past attention"
    return "In a KV cache, a sketch of past attention can beat exact scores"


def _ends(facts, name):
    return Found(*(facts[f"{name}_{end}"] for end in ("mean", "low", "high")))


def _binomial(right, n):
    ends = binomtest(int(right), int(n)).proportion_ci()
    return Found(100 * right / n, 100 * ends.low, 100 * ends.high)
