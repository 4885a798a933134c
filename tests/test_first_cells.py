"""A wrong value in a notebook's first cell is one line, before a model is loaded or anything is computed."""

import nbformat
import pytest

import sketchkv
from sketchkv.study import sources, steps

WRONG = [
    ("00_explore", "length", (95, 513, "192")),
    ("05_baselines", "documents", (1, 65, 2.5, "8", True)),
    ("09_one_slot", "documents", (1, 65, -2)),
    ("10_generation", "max_cache_size", (79, 193, "128")),
    ("10_generation", "prompts", (1, 33)),
    ("13_speed", "max_cache_size", (127, 1025, None)),
    ("14_write_a_policy", "caps", ([20], [], [32, 32], 64)),
    ("14_write_a_policy", "documents", (1, 65)),
    ("15_from_scratch", "max_cache_size", (20, 129)),
]


@pytest.mark.parametrize("notebook, name, value", [(n, name, v) for n, name, values in WRONG for v in values])
def test_a_wrong_value_is_refused_before_the_model_loads(notebook, name, value, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("loaded before the check")

    monkeypatch.setattr(sketchkv, "load", forbidden)
    monkeypatch.setattr(steps, "Bench", forbidden)
    cells = nbformat.read(sources.ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells
    first, second = [cell.source for cell in cells if cell.cell_type == "code"][:2]
    names: dict = {}
    exec(first, names)
    assert name in names
    names[name] = value
    with pytest.raises(sources.KnobError, match=f"{name}.* must be .*got ") as error:
        exec(second, names)
    assert "\n" not in str(error.value)
