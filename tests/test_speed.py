"""The benchmarks' arithmetic on cases known by hand; that every group of rows runs, and measures what it says."""

import json
import shutil
import time
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
from transformers import DynamicCache

from sketchkv.study import bench, speed, steps, timing
from sketchkv.study.extras import llama_cpp
from sketchkv.study.steps import CYCLE, FULL, Bench


def rows(*found):
    return pd.DataFrame(
        [[row, "1", *numbers, 20, "abc"] for row, *numbers in found], columns=list(timing.COLUMNS)
    )


@pytest.fixture(scope="module")
def tiny():
    return Bench(timing.Table(quiet=True), "tiny", repetitions=2, warmup=1)


def test_a_ratio_is_of_neighbouring_samples():
    table = timing.Table(quiet=True)
    table.add("a", "ms", [2, 40, 6])
    table.add("b", "ms", [1, 20, 3, 99])
    assert table.ratio("a", "b") == 2 and table.ratio("a", "c") is None
    assert table.frame().iloc[-1].tolist() == ["a / b", "1", 2, 2, 2, 3, ""]


def test_a_slope_is_relative_and_per_doubling():
    table = timing.Table(quiet=True)
    for name, samples in (("1", [8, 9, 8.5]), ("2", [10, 11.2, 10.6]), ("4", [12, 13.4, 12.7])):
        table.add(name, "ms", samples)
    assert table.slope("slope", [1, 2, 4], ["1", "2", "4"]) == pytest.approx(0.2, abs=0.01)
    *_, low, high, n, _ = table.rows[-1]
    assert low < 0.2 < high and n == 3


def test_runs_are_timed_in_turn_and_their_warm_up_is_dropped():
    table, order = timing.Table(quiet=True), []
    timing.in_turn(
        table, {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=3, warmup=2
    )
    assert order == ["a", "b"] * 5 and len(table.samples["a"]) == 3


def test_no_repetition_begins_after_the_end():
    """Two are measured at least: a median of one says nothing of its spread."""
    table, calls = timing.Table(quiet=True, until=0), []
    timing.in_turn(table, {"a": lambda: calls.append(1)}, repetitions=20, warmup=1)
    assert len(calls) == 3 and len(table.samples["a"]) == 2


def test_what_fails_is_left_out_but_a_limit_is_not():
    def raising(kind):
        def make():
            raise kind("reason")

        return make

    found = Bench._there({"a": lambda: lambda: None, "b": raising(ImportError), "c": raising(RuntimeError)})
    assert list(found) == ["a"]
    with pytest.raises(TimeoutError):
        Bench._there({"d": raising(TimeoutError)})


def test_the_most_that_fits_is_found():
    def fits(count):
        if count > 123_456:
            raise torch.OutOfMemoryError

    assert 123_456 / 1.02 <= steps.most(fits) <= 123_456


def test_a_group_is_stopped_at_its_limit():
    with pytest.raises(TimeoutError, match="0.05 s"), timing.limited(0.05):
        time.sleep(2)


def test_verdicts_are_of_the_first_device_that_was_asked():
    step = "compact, cap 512, 3072 seen, batch 1 / DynamicCache, 3072 seen, batch 1"
    here = rows(
        (step, 2, 1.9, 2.1),
        ("generate, sketch / generate, DynamicCache", 9, 9, 9),
    )
    there = rows(
        (step, 1, 1, 1),
        ("recall, 8192 seen / DynamicCache, 8192 seen", 0.6, 0.5, 0.9),
    )
    gpu = rows(("generate, sketch / generate, DynamicCache", 1.2, 1.1, 1.3))
    found = speed.verdicts({"CPU, here": here, "CPU, make bench": there, "NVIDIA H100": gpu})
    found = found.set_index("question")
    slow = found.loc["step, compact / full cache, 3072 tokens, cap 512"]
    assert (slow.device, slow.verdict, slow["median"]) == ("CPU, here", "missed", 2)
    assert found.loc["step, recall / full cache, 8192 tokens", ["device", "verdict"]].tolist() == [
        "CPU, make bench",
        "met",
    ]
    assert found.loc["model.generate, sketch / full cache", ["device", "median"]].tolist() == [
        "NVIDIA H100",
        1.2,
    ]
    assert len(found) <= 15 and (found.verdict == "not measured here").sum() == len(found) - 3


def test_every_question_is_a_row_that_some_group_measures(tiny, monkeypatch):
    """A question whose row no group writes would never be answered."""

    def time_nothing(self, runs, per=CYCLE):
        for row in runs:
            self.table.add(row, "ms", [1.0])

    monkeypatch.setattr(Bench, "time", time_nothing)
    monkeypatch.setattr(Bench, "_there", staticmethod(lambda makers: makers))
    monkeypatch.setattr(Bench, "predict", lambda *a: None)
    for name in ("full", "cycle"):
        monkeypatch.setattr(Bench, name, lambda self, *a, **k: lambda: None)
    monkeypatch.setattr(Bench, "ids", lambda self, *a: torch.ones(1, 1))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(steps, "most", lambda fits: 1.0)
    for name in ("write_gguf", "LlamaCpp", "_agree"):
        monkeypatch.setattr(llama_cpp, name, MagicMock())
    monkeypatch.setattr(llama_cpp, "version", lambda: "0")
    monkeypatch.setattr(llama_cpp, "_counted", lambda run, clock, took: took.append(1.0))
    monkeypatch.setattr(timing.Table, "slope", lambda self, row, *a: self.add(row, "1", [0.0]))
    table = timing.Table(quiet=True)

    def fake(table, batch=1, **_):
        own = Bench.__new__(Bench)
        own.__dict__ |= tiny.__dict__ | {"table": table, "batch": batch}
        return own

    monkeypatch.setattr(bench, "_cpu", fake)
    monkeypatch.setattr(bench, "_gpu", lambda table, shape="", **own: fake(table, **own))
    for _, group in (bench.DEFAULT | bench.MORE).values():
        group(table)
    assert set(pd.read_csv(speed.GOALS).row) <= set(table.frame().row)


def test_groups_are_chosen_by_name_and_the_default_takes_12_minutes():
    for device in ("cpu", "gpu"):
        default, every = bench.chosen(["default"], device), bench.chosen(["all"], device)
        assert sum(seconds for seconds, _ in default.values()) <= 720 and default.keys() < every.keys()
    assert list(bench.chosen(["cpu_steps"], "cpu")) == ["cpu_steps"]
    with pytest.raises(ValueError, match="no group gpu_steps here; there are default, all, cpu_steps"):
        bench.chosen(["gpu_steps"], "cpu")
    assert (
        bench.default_name({"gpu": "NVIDIA H100 80GB HBM3"}) == "speed_h100"
        and bench.default_name({}) == "speed_cpu"
    )


def test_the_baseline_is_untouched_and_shares_its_weights(tiny):
    ids = tiny.ids(40)
    plain, ours = (
        model(ids, past_key_values=DynamicCache(config=tiny.config)).logits
        for model in (tiny.plain, tiny.model)
    )
    assert torch.equal(plain, ours) and "sketchkv" not in str(tiny.plain.config._attn_implementation)
    assert tiny.model.lm_head.weight.data_ptr() == tiny.plain.lm_head.weight.data_ptr()


def test_a_static_step_sees_what_is_stored(tiny, monkeypatch):
    """Each sample starts over at the same length, and the compiled step gives what a growing cache gives."""
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda *a, **k: seen.append(function(*a, **k).logits)
    )
    seen = []
    run = tiny.full(50, "StaticCache")
    run(), run()
    assert len(seen) == 2 * CYCLE
    torch.testing.assert_close(torch.cat(seen[:CYCLE]), torch.cat(seen[CYCLE:]))


def test_every_group_of_rows_runs(tiny, tmp_path, monkeypatch):
    with torch.no_grad():
        tiny.steps([144, 288], cap=96)
        tiny.generate(120, 8, cap=96)
        tiny.prompts([120], cap=96)
        if compiler := shutil.which("g++"):
            tiny.peers(120, caps=(96,), fast=("compact",), plain=("compact",))
    frame = tiny.table.frame().set_index("row")
    assert (
        "compact, cap 96, compiled, 120 seen, batch 1 / StaticCache, compiled, 120 seen, batch 1"
        in frame.index
    ) == bool(compiler)
    assert frame["median"].notna().all() and frame.settings.str.len().eq(12).all()
    assert (
        frame.settings["compact, 144 seen"]
        == frame.settings["recall, 288 seen"]
        != frame.settings["generate, compact"]
    )
    told = speed.steps({"CPU": frame.reset_index()})
    assert set(told.cache) == {FULL, "sketch", "compact", "recall"} and set(told.context) == {144, 288}
    assert set(told.kind) == {"measured", "predicted"}

    # A group that is measured again replaces its rows, and no others; one that fails is named.
    monkeypatch.setattr(
        bench, "DEFAULT", {"cpu_one": (9, lambda t: t.add("a", "ms", [1])), "cpu_two": (9, lambda t: 1 / 0)}
    )
    monkeypatch.setattr(bench, "MORE", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "speed_cpu.csv"
    pd.DataFrame(
        [["cpu_old", *rows(("b", 1, 1, 1)).iloc[0]], ["cpu_one", *rows(("c", 1, 1, 1)).iloc[0]]],
        columns=["group", *timing.COLUMNS],
    ).to_csv(output, index=False)
    (tmp_path / "speed_cpu.json").write_text("{}")
    assert bench.main(["--output", str(output), "--commit", "abc"]) == 1
    assert pd.read_csv(output).row.tolist() == ["b", "a"]
    notes = json.loads((tmp_path / "speed_cpu.json").read_text())
    assert "ZeroDivisionError" in notes["missing"]["cpu_two"] and notes["commits"]["cpu_one"] == "abc"
    # More patience, more time; what other groups were measured with stays told.
    slow = {"cpu_slow": (0.1, lambda t: (time.sleep(0.3), t.add("s", "ms", [1])))}
    monkeypatch.setattr(bench, "DEFAULT", slow)
    assert bench.main(["cpu_slow", "--output", str(output), "--commit", "def"]) == 1
    assert bench.main(["cpu_slow", "--output", str(output), "--commit", "def", "--patience", "50"]) == 0
    notes = json.loads((tmp_path / "speed_cpu.json").read_text())
    assert (notes["commits"]["cpu_one"], notes["commits"]["cpu_slow"]) == ("abc", "def")
