"""The search for a regime of the sketch: points fill their bytes, what returns is scored alone, gains have their sign."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VOCABULARY

from sketchkv import score
from sketchkv.study import sketch_regimes as regimes
from sketchkv.study.methods import make_cache, nbytes
from sketchkv.texts import Documents


@pytest.mark.parametrize("cap, recent_window", [(24, 4), (64, 16)])
def test_points_fill_the_bytes_of_exact_accumulators(gpt2, cap, recent_window):
    gpt2.config.n_embd = 4 * 64  # heads as in the study; no model is run with it
    budget = nbytes(gpt2.config, **regimes.exact(cap, recent_window))["total"]
    small = [*regimes.SKETCHES.values()] + [{"method": "sketch"} | shape for shape in regimes.SHAPES.values()]
    for sketch in small if cap > 24 else list(regimes.SKETCHES.values())[:1]:
        method = regimes.at_equal_bytes(gpt2.config, torch.float32, cap, recent_window, **sketch)
        assert method["recent_window"] == recent_window and method["max_cache_size"] < cap
        assert budget * 0.95 < nbytes(gpt2.config, **method)["total"] <= budget
    with pytest.raises(ValueError, match="more than the budget"):
        regimes.at_equal_bytes(gpt2.config, torch.float32, 24, 16, method="sketch", width=4096)


@pytest.mark.parametrize("key", regimes.KEYS)
def test_every_key_makes_a_cache(gpt2, key):
    assert make_cache(gpt2.config, **{"method": "sketch", "max_cache_size": 32} | regimes.KEYS[key])


def test_of_what_comes_back_only_the_return_is_scored(gpt2, monkeypatch):
    first = torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(regimes, "_model", lambda *a: (gpt2, None))
    monkeypatch.setattr(regimes, "read_documents", lambda *a: Documents(first, ["a", "b", "c"]))
    method = regimes.exact(32, 8)
    rows = regimes.point(method, text="returning", revision="", documents=3, length=120)
    for i, row in enumerate(rows):
        text = torch.cat([first[i], first[(i + 1) % 3], first[i]])[None]
        late = (
            score(gpt2, text, make_cache(gpt2.config, **method))[:, 80:].mean()
            - score(gpt2, text)[:, 80:].mean()
        )
        assert row["loss"] == pytest.approx(late.item(), abs=1e-4) and row["evicted"] > 0
        assert set(row) == set(regimes.COLUMNS)


def test_gains_are_positive_where_the_sketch_loses_less():
    losses = {
        "exact": np.linspace(0.2, 0.4, 8),
        "good": np.linspace(0.1, 0.3, 8),
        "bad": np.linspace(0.5, 0.7, 8),
    }
    table = pd.concat(
        pd.DataFrame(
            {"regime": "one", "method": name, "document": range(8), "loss": loss, "max_cache_size": 24}
        )
        for name, loss in losses.items()
    )
    found = regimes.gains(table, "regime").set_index("method")
    assert list(found.index) == ["bad", "good"] and set(found.columns) == {"regime", *regimes.GAINS}
    assert found["mean"].tolist() == pytest.approx([-0.3, 0.1]) and found.n.tolist() == [8, 8]
    assert found.verdict.tolist() == ["worse than", "better than"]
