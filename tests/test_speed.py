"""The benchmarks' arithmetic on cases known by hand, and a bound that only a serious regression passes."""

import shutil
import time

import pandas as pd
import pytest
import torch

from sketchkv.sketch import CountMinSketch
from sketchkv.study import aims, bench, counting, speed, timing


def rows(*found):
    return pd.DataFrame(
        [[row, "ratio", "1", m, low, high, 20] for row, m, low, high in found], columns=list(timing.COLUMNS)
    )


def test_a_ratio_is_of_neighbouring_samples():
    table = timing.Table(quiet=True)
    table.add("a", "time", "us", [2, 40, 6])
    table.add("b", "time", "us", [1, 20, 3, 99])
    assert table.ratio("a / b", "a", "b") == 2 and table.ratio("a / c", "a", "c") is None
    assert table.frame().iloc[-1].tolist() == ["a / b", "ratio", "1", 2, 2, 2, 3]


def test_runs_are_timed_in_turn_and_their_warm_up_is_dropped():
    table, order = timing.Table(quiet=True), []
    timing.in_turn(
        table, {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=3, warmup=2
    )
    assert order == ["a", "b"] * 5 and len(table.samples["a"]) == 3


def test_a_group_is_stopped_at_its_limit():
    with pytest.raises(TimeoutError, match="0.05 s"), timing.limited(0.05):
        time.sleep(2)


def test_verdicts():
    found = aims.verdicts(
        {
            "cpu": rows(
                ("rotary, batch 1, 4096 seen, SketchCache / DynamicCache", 0.5, 0.4, 0.7),
                ("rotary, slope of time per doubling", 0.01, 0.002, 0.02),
            ),
            "H": rows(("eager / fused, batch 64, 1024 slots", 1.3, 1.2, 1.4)),
        }
    )
    verdict = found.set_index("quantity").verdict
    assert verdict["step of SketchCache / DynamicCache, rotary, batch 1"] == "met"
    assert (
        verdict["time of a token per doubling of the text"]
        == verdict["eager attention / fused, batch 64"]
        == "missed"
    )
    assert (verdict == "not measured here").sum() == len(aims.AIMS) - 3


def test_the_floor_counts_weights_and_stored_tokens_once(gpt2):
    weights = sum(p.numel() for name, p in gpt2.named_parameters() if "wpe" not in name)
    cached = 2 * 2 * 2 * 64 * 10  # keys and values, 2 sequences, 2 layers of 4 heads of 16, 10 tokens
    assert speed.step_floor(gpt2, 2, 10, 1e6, 1e30) == pytest.approx(4 * (weights + cached))
    assert speed.step_floor(gpt2, 2, 10, 1e30, 1e6) == pytest.approx(4 * weights + 2 * cached)


def test_the_reference_counts_as_the_sketch_does():
    sketch, items = CountMinSketch(32, 3), torch.arange(200) ** 2 % 61
    sketch.update(items)
    assert counting.python_count_min(items.tolist(), sketch.hash) == sketch.query(items).tolist()


def test_every_group_of_rows_runs(gpt2):
    table, models = timing.Table(quiet=True), speed.pair(gpt2)
    has_compiler = shutil.which("g++") is not None
    with torch.no_grad():
        speed.decode_rows(table, models, "m", 2, seen=80, cap=40, repetitions=1, hardware=(1e9, 1e9))
        speed.loop_rows(table, models, "m", prompt=50, new=8, cap=40, repetitions=1, compiled=has_compiler)
        if has_compiler:
            speed.compiled_rows(table, models, "m", 2, seen=80, cap=40, repetitions=1, hardware=(1e9, 1e9))
        speed.length_rows(table, models[1], "m", [64, 128], cap=40, repetitions=2)
        speed.prefill_rows(table, models, "m", count=120, chunk=60, cap=40, repetitions=1)
        speed.scoring_rows(table, models, "m", count=80, cap=40, repetitions=1)
    counting.counting_rows(table, count=2000, repetitions=1, reference=1)
    frame = table.frame().set_index("row")
    assert frame.loc["m, peak bytes at 128 / at 64 tokens", "median"] == pytest.approx(1, rel=0.05)
    assert frame.loc["m, 80 tokens, kept positions that are the same", "median"] == 1
    assert ("m, batch 2, 80 seen, SketchCache, compiled / window, compiled" in frame.index) == has_compiler
    assert frame["median"].notna().all() and bench.default_name({"gpu": "NVIDIA H100 80GB HBM3"}) == "h100"


def test_counting_and_scoring_are_far_from_slow(gpt2):
    """A tenth of what is aimed at: noise of a busy machine is less than that, a loop in Python more."""
    table = timing.Table(quiet=True)
    counting.counting_rows(table, count=50_000, repetitions=3, reference=1)
    with torch.no_grad():
        speed.scoring_rows(table, speed.pair(gpt2), "m", count=200, cap=60, repetitions=2)
    frame = table.frame().set_index("row")["median"]
    assert frame["50000 items, pure Python / CountMinSketch"] > 4
    assert frame["m, 200 tokens, token by token / score"] > 1.5
