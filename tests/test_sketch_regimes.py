"""The search for a regime of the sketch: points fill their bytes, what returns is scored alone, gains have their sign."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import VOCABULARY

from sketchkv import score
from sketchkv.study import baselines
from sketchkv.study import sketch_regimes as regimes
from sketchkv.study.methods import make_cache, nbytes
from sketchkv.texts import Documents


@pytest.mark.parametrize("cap, recent_window", [(24, 4), (64, 16)])
def test_points_fill_the_bytes_of_exact_accumulators(gpt2, cap, recent_window):
    gpt2.config.n_embd = 4 * 64  # heads as in the study; no model is run with it
    found = regimes.methods(gpt2.config, torch.float32, cap, recent_window)
    held = {name: nbytes(gpt2.config, **method)["total"] for name, method in found.items()}
    assert held["exact"] * 0.95 < held["equal bytes"] <= held["exact"] < held["equal slots"]
    assert found["equal slots"]["max_cache_size"] == cap > found["equal bytes"]["max_cache_size"]
    assert all(method["recent_window"] == recent_window for method in found.values())
    with pytest.raises(ValueError, match="more than the budget"):
        regimes.methods(gpt2.config, torch.float32, 21, 16)


def test_of_what_comes_back_only_the_return_is_scored(gpt2, monkeypatch):
    first = torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(regimes, "_model", lambda *a: (gpt2, None))
    monkeypatch.setattr(regimes, "read_documents", lambda *a: Documents(first, ["a", "b", "c"]))
    method = {"method": "decayed", "bits": 16, "recent_window": 8, "max_cache_size": 32}
    rows = regimes.point(method, text="returning", revision="", documents=3, length=120)
    for i, row in enumerate(rows):
        text = torch.cat([first[i], first[(i + 1) % 3], first[i]])[None]
        late = (
            score(gpt2, text, make_cache(gpt2.config, **method))[:, 80:].mean()
            - score(gpt2, text)[:, 80:].mean()
        )
        assert row["nll"] - row["nll_full"] == pytest.approx(late.item(), abs=1e-4) and row["evicted"] > 0
        assert {"regime", "method", "max_cache_size", "loss", *row} >= set(regimes.COLUMNS)


def test_gains_are_positive_where_the_sketch_loses_less():
    losses = {
        "exact": np.linspace(0.2, 0.4, 8),
        "equal slots": np.linspace(0.1, 0.3, 8),
        "equal bytes": np.linspace(0.5, 0.7, 8),
    }
    table = pd.concat(
        pd.DataFrame({"regime": "one", "method": name, "document": range(8), "loss": loss})
        for name, loss in losses.items()
    )
    found = baselines.gains(table, regimes.PAIRS, by="regime")
    assert list(found) == list(regimes.GAINS) and list(found.method) == ["equal slots", "equal bytes"]
    assert found["mean"].tolist() == pytest.approx([0.1, -0.3]) and found.n.tolist() == [8, 8]
    assert found.verdict.tolist() == ["better than", "worse than"]
