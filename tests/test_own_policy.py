"""Policies that a notebook defines, as the grid scores them, and limits of a notebook's parameters."""

import linecache

import pytest
import torch

from sketchkv import SketchCache, Window, enable, load
from sketchkv.loading import EMBEDDED
from sketchkv.study import limits, own_policy
from sketchkv.study.sources import KnobError

CELL = """from sketchkv import Policy  # a comment


class Mine(Policy):
    def score(self, slots, seen):
        return slots["positions"].float()
"""


def defined(cell, name="Mine", **names):
    """The class that a notebook's cell defines: its source is known to `linecache`, as IPython's cells are."""
    file = f"<cell {hash(cell)}>"
    linecache.cache[file] = len(cell), None, cell.splitlines(keepends=True), file
    names |= {"__name__": "__main__"}
    exec(compile(cell, file, "exec"), names)
    return names[name]


def test_the_source_of_a_cell_makes_the_class_again():
    text = own_policy.source(defined(CELL))
    assert "comment" not in text
    slots = {"positions": torch.tensor([3, 1])}
    made = own_policy.build("Mine", text)
    assert made is not defined(CELL) and made().score(slots, 4).tolist() == [3, 1]
    assert own_policy.source(defined(CELL.replace("a comment", "another"))) == text
    assert own_policy.source(defined(CELL.replace(".float()", ".double()"))) != text


@pytest.mark.parametrize(
    "cell, names, message",
    [
        (CELL.replace("from sketchkv import Policy", ""), {"Policy": Window}, "imports and the class alone"),
        (CELL.replace("(Policy)", ""), {}, "no sketchkv Policy named Mine"),
    ],
)
def test_a_cell_that_does_not_stand_alone_is_refused(cell, names, message):
    with pytest.raises(KnobError, match=message):
        own_policy.source(defined(cell, **names))


def test_a_class_without_a_cell_is_refused():
    with pytest.raises(KnobError, match="run the cell again"):
        own_policy.source(type("Mine", (Window,), {}))


@pytest.mark.skipif(not (EMBEDDED / "model.safetensors").exists(), reason="the embedded model is not there")
def test_a_point_scores_the_policy_of_the_cell():
    texts = dict(text="", split="development", documents=2, length=64)
    sizes = {"max_cache_size": 24}
    own = own_policy.point({"method": "Mine"} | sizes, own=own_policy.source(defined(CELL)), **texts)
    known = own_policy.point({"method": "streaming"} | sizes, **texts)
    other = own_policy.point({"method": "tova"} | sizes, **texts)
    assert [row["nll"] for row in own] == [row["nll"] for row in known] != [row["nll"] for row in other]
    model, _ = load("embedded", "cpu")
    assert isinstance(SketchCache(enable(model), 24, policy=own_policy.build("Mine", CELL)()), SketchCache)


@pytest.mark.parametrize("value", [20, 129, "48", 48.0, True, None])
def test_a_number_out_of_its_limits_is_one_line(value):
    assert limits.whole("cap", 21, 21, 128) == 21 and limits.whole("cap", 128, 21, 128) == 128
    with pytest.raises(
        KnobError, match="^cap must be a whole number, at least 21 and at most 128; got [^\n]+$"
    ):
        limits.whole("cap", value, 21, 128)


@pytest.mark.parametrize("values", [[], 32, [32, 32], [20], [32, "64"], [21, 22, 23]])
def test_a_list_out_of_its_limits_is_one_line(values):
    assert limits.several("caps", [21, 128], 21, 128, 2) == [21, 128]
    with pytest.raises(KnobError, match="^(caps|each of caps) must be [^\n]+$"):
        limits.several("caps", values, 21, 128, 2)
