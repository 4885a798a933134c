"""Settings at equal bytes: they fill their bytes, and differ from the reference on the same documents; needles by position."""

import pytest
import torch
from conftest import VOCABULARY

from sketchkv.study import equal_bytes, recall
from sketchkv.study.methods import make_cache, nbytes

EXACT = {"method": "decayed", "bits": 16}


class FakeRun:
    """Scores by a rule that is known: with a summary each document loses 0.1 less."""

    device = "cpu"

    def grid(self, kind, function, points, workers=None):
        self.points = points
        return [
            [
                {
                    "document": f"d{i}",
                    "bytes_total": 7,
                    "nll": 3 + i - 0.1 * ("summary_slots" in p["method"]),
                    "nll_full": 2.5,
                    "evicted": 1,
                }
                for i in range(p["documents"])
            ]
            for p in points
        ]


def test_losses_and_gains(gpt2, monkeypatch):
    gpt2.config.n_embd = 4 * 64  # heads as in the study; no model is run with it
    monkeypatch.setattr(equal_bytes, "_model", lambda *a: (gpt2, None))
    budget = nbytes(gpt2.config, dtype=gpt2.dtype, **EXACT, max_cache_size=64)["total"]
    asked = [
        (
            {"setting": name, "model": "gpt2", "budget": cap},
            lambda lm: budget,
            EXACT | summary,
            {"model": "m", "documents": 3},
        )
        for cap in (64, 128)
        for name, summary in (("some", {"summary_slots": 2}), ("none", {}))
    ]
    run = FakeRun()
    table = equal_bytes.losses(run, "kind", asked, "none", length=128)
    assert list(table.columns) == list(equal_bytes.COLUMNS) and len(table) == 12
    for point in run.points:
        assert 0.95 * budget < nbytes(gpt2.config, dtype=gpt2.dtype, **point["method"])["total"] <= budget
        assert point["length"] == 128 and point["model"] == "m"
    gains = equal_bytes.gains(table)
    assert set(gains.columns) == set(equal_bytes.GAINS) and len(gains) == 4
    some, none = (gains[gains.setting == name] for name in ("some", "none"))
    assert some["mean"].tolist() == pytest.approx([-0.1, -0.1]) and (none["mean"] == 0).all()
    assert set(some.verdict) == {"better than"} and set(none.verdict) == {"not distinguishable from"}
    assert (
        none.loss.tolist() == pytest.approx([1.5, 1.5])
        and (some.max_cache_size < 64).all()
        and (none.max_cache_size == 64).all()
    )


def test_needles_count_what_is_stored_of_the_answer(gpt2, monkeypatch):
    """Against positions counted by hand, where the answer lies in the text."""
    generator = torch.Generator().manual_seed(0)
    ids, fact = (
        torch.randint(1, VOCABULARY - 6, (2, 90), generator=generator),
        torch.arange(VOCABULARY - 6, VOCABULARY),
    )
    starts, answers = (
        [10, 60],
        [2, 2],
    )  # a fact of a question of four tokens and an answer of two, repeated at the end
    for row, start in enumerate(starts):
        ids[row, start : start + 6] = ids[row, -6:] = fact
    monkeypatch.setattr(recall, "_model", lambda *a: (gpt2, None))
    monkeypatch.setattr(
        recall, "scored_instances", lambda *a: (ids, starts, answers, ["a", "b"], [(1, -0.5), (0, -2.0)])
    )
    method = {"method": "streaming", "max_cache_size": 40, "recent_window": 8}
    rows = recall.needles(method, depth=0.3, text="", instances=2, length=90)
    assert [row["kept"] for row in rows] == [
        0,
        1,
    ]  # a window of the newest has lost the first, and holds the second
    assert set(rows[0]) == set(recall.KEPT) - {"setting"} and rows[1]["loglik_full"] == -2.0
    for row, start in enumerate(starts):
        assert recall._hidden(ids[row], start, 2).tolist() == [start + 4, start + 5]
    cache = make_cache(gpt2.config, **method)
    assert recall.answer(gpt2, ids, answers, cache)[0][1] == pytest.approx(rows[0]["loglik"])
