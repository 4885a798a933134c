"""A claim is judged by intervals alone: whatever a table lacks is open."""

import numpy as np
import pandas as pd
import pytest

from sketchkv.study import across, measured, report, sources


def test_words_of_intervals():
    assert across.below([(-2, -1), (-3, -0.5)]) == "holds"
    assert across.below([(-2, -1), (-1, 1)]) == across.below([]) == "open"
    assert across.below([(-2, -1), (0.1, 1)]) == "does not"
    assert across.not_below_zero([(-1, 1), (0.1, 1)]) == "holds"
    assert across.not_below_zero([(-1, 1)]) == "open"
    assert across.not_below_zero([(0.1, 1), (-1, -0.1)]) == "does not"


def test_a_hypothesis_must_hold_over_the_second_half_too():
    table = pd.DataFrame({"verdict": ["holds", "fails"], "verdict_late": ["open", "fails"]})
    assert across.any_method(table) == "open" and across.any_method(table[1:]) == "does not"
    assert across.any_method(table.assign(verdict_late="holds")) == "holds"


@pytest.fixture
def folder(tmp_path):
    """Twelve documents of each kind: `compact` loses 0.001, or 0.1 in the second half of code, `decayed` twice as much."""
    rows = [
        {
            "text": text,
            "tokens": measured.LENGTH,
            "name": name,
            "share": share,
            "bytes_total": 9 * share,
            "bytes_full": 10,
        }
        | {"document": f"{text} {i}", "nll_full": 2.0, "nll_late_full": 1.0}
        | {
            "nll": 2 + loss * (1 + i / 99),
            "nll_late": 1 + loss * (100 if text == "code" else 1) * (1 + i / 99),
        }
        for text in ("prose", "code")
        for name, loss in (("compact", 0.001), ("decayed", 0.002))
        for share in (1 / 8, 1 / 4)
        for i in range(12)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "pretrained_quality.csv", index=False)
    return tmp_path


def test_a_model_is_judged_on_all_its_texts(folder):
    class Nothing:
        facts: dict = {}

        def frame(self, name):
            raise KeyError(name)

    found = across.verdicts(Nothing(), folder).set_index("claim")
    assert set(found.embedded) == {"open"} and set(found["Gemma 3"]) == {"open"}
    (folder / "gemma3").mkdir()
    short = pd.read_csv(folder / "pretrained_quality.csv").assign(tokens=2048)
    short.to_csv(folder / "gemma3" / "pretrained_quality.csv", index=False)
    again = across.verdicts(Nothing(), folder).set_index("claim")
    assert (again["Gemma 3"] == again.SmolLM2).all()
    short[short.share == 1 / 8].to_csv(folder / "gemma3" / "pretrained_quality.csv", index=False)
    less = across.verdicts(Nothing(), folder).set_index("claim")
    words = less["Gemma 3"][[across.CLAIMS["hypothesis"], across.CLAIMS["bits"]]]
    assert list(words) == ["open", "holds"]
    words = found.SmolLM2[[across.CLAIMS["hypothesis"], across.CLAIMS["bits"], across.CLAIMS["keys"]]]
    assert list(words) == ["does not", "holds", "open"]
    assert found.everywhere[across.CLAIMS["bits"]] == "open"
    low, high = next(across.more(across.texts(folder, 1 / 8)[0], "compact", "decayed"))
    assert low < -0.001 * (1 + np.arange(12).mean() / 99) < high < 0


def test_the_committed_tables_give_words_for_each_model():
    found = across.verdicts(report.Results(sources.ROOT)).set_index("claim")
    assert list(found.index) == list(across.CLAIMS.values())
    assert set(found.to_numpy().ravel()) <= {"holds", "does not", "open", "differs"}
    assert (found[["embedded", "SmolLM2"]] != "open").any().all()
