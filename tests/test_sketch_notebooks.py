"""The notebooks on the model, the cache, the sketch, attention and loss: every parameter works over its stated range, a wrong
value is one line before a model is loaded, and each shows what it found."""

import re

import matplotlib
import nbformat
import pytest

import sketchkv
from sketchkv.loading import EMBEDDED
from sketchkv.study import evaluate, notebooks, record  # noqa: F401  (evaluate keeps the true `load`)
from sketchkv.study.sources import ROOT, KnobError, read_json

OWN = ("01_the_model", "02_the_cache", "03_the_sketch", "04_sweep", "06_attention", "07_why", "08_sketches")
WRONG = {
    "01_the_model": {"max_cache_size": [23, 513, "64"], "documents": [1, 65]},
    "02_the_cache": {"max_cache_size": [31, 257, "128"], "evict_every": [0, 65], "summary_slots": [0, 9]},
    "03_the_sketch": {"vocabulary": [511, 16385], "length": [1023, 262145], "cap": [7, 129, 8.0]},
    "04_sweep": {"summary_slots": [0, 17], "workers": [-1, 65]},
    "06_attention": {"max_cache_size": [23, 257], "evict_every": [0, 65, True]},
    "07_why": {"slots": [[23, 64], [64, 64], [32, 48, 64], 64], "documents": [1, 33]},
    "08_sketches": {"documents": [1, 33, "2"]},
}
# Both ends of every range, and something between; the default is what the notebook itself runs with.
RIGHT = [
    ("01_the_model", {"max_cache_size": 24}),
    ("01_the_model", {"max_cache_size": 512, "documents": 2}),
    ("01_the_model", {"documents": 3}),
    ("03_the_sketch", {"cap": 8, "vocabulary": 512, "length": 1024}),
    ("03_the_sketch", {"cap": 128, "length": 262144}),
    ("03_the_sketch", {"vocabulary": 16384}),
    ("06_attention", {"max_cache_size": 24, "evict_every": 64}),
    ("06_attention", {"max_cache_size": 256, "evict_every": 1}),
    ("02_the_cache", {"max_cache_size": 32, "evict_every": 1, "summary_slots": 8}),
    ("02_the_cache", {"max_cache_size": 256, "evict_every": 64, "summary_slots": 1}),
    ("04_sweep", {"summary_slots": 1, "workers": 1}),
    ("04_sweep", {"summary_slots": 16}),
    ("07_why", {"slots": [24, 128], "documents": 2}),
    ("07_why", {"slots": [40], "documents": 3}),
    ("08_sketches", {"documents": 3}),
]
trained = pytest.mark.skipif(not (EMBEDDED / "model.safetensors").exists(), reason="the model is not there")


def cells(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells


def execute(name, parameters, output):
    """Runs the cells of a notebook in this process, with results under `output`."""
    space = {"__name__": "__main__", "display": lambda *_: None}
    for cell in cells(name):
        if cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            assert not set(parameters) - set(space), "no such parameter"
            space |= {"output": str(output)} | parameters
    return space


@pytest.mark.parametrize(
    "name, parameter, value", [(n, p, v) for n in OWN for p in WRONG[n] for v in WRONG[n][p]]
)
def test_a_wrong_value_is_one_line_before_a_model_is_loaded(name, parameter, value, tmp_path, monkeypatch):
    monkeypatch.setattr(sketchkv, "load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(KnobError) as told:
        execute(name, {parameter: value}, tmp_path)
    said = str(told.value)
    assert (
        "\n" not in said
        and parameter in said
        and repr(value if not isinstance(value, list) else value[0]) in said
    )


def test_every_own_parameter_states_its_range():
    for name in OWN:
        (first,) = (c.source for c in cells(name) if "parameters" in c.metadata.get("tags", []))
        for line in first.splitlines():
            parameter, comment = re.fullmatch(r"(\w+) = \S.*?  # (.+)", line).groups()
            ends = re.search(r"(\d+) to (\d+)", comment)
            assert ends or parameter not in WRONG[name], line
        assert set(WRONG[name]) == set(notebooks.parameters(ROOT / "notebooks" / f"{name}.ipynb")) - {
            "model",
            "dataset",
            "device",
            "profile",
            "seed",
            "output",
        }


@trained
@pytest.mark.parametrize("name, parameters", RIGHT, ids=lambda value: re.sub(r"\W+", "-", str(value)))
def test_parameters_work_over_their_range(name, parameters, tmp_path, monkeypatch):
    matplotlib.use("agg")
    here = lambda run, kind, function, points, workers=None: [function(**point) for point in points]  # noqa: E731
    monkeypatch.setattr(record.Run, "grid", here)  # without other processes
    execute(name, parameters, tmp_path)
    drawn = {path.stem: read_json(path)["caption"] for path in record.Paths(tmp_path).figures.glob("*.json")}
    assert set(drawn) == set(notebooks.makes(ROOT / "notebooks" / f"{name}.ipynb", "figure"))
    for figure, caption in drawn.items():
        finding = re.split(r"(?<=[^\d\W])\. |(?<=%)\. |(?<=\d)\. ", caption)[0]
        assert len(finding) <= 90 and "nan" not in caption, (figure, caption)


def test_cells_are_short_and_notebooks_tell_their_way():
    for name in OWN:
        found = cells(name)
        code = [len(c.source.splitlines()) for c in found if c.cell_type == "code"]
        assert max(code) <= 30 and sum(code) / len(code) <= 12, name
        last = found[-1].source
        assert found[0].source.startswith("# ") and "at `smoke`" in found[0].source, name
        assert "## What you should have seen" in last and "## Try this" in last and "Next: [" in last, name
        links = re.findall(r"\]\((\w+)\.ipynb\)", "\n".join(c.source for c in found))
        assert all(re.fullmatch(r"\d\d_\w+", link) for link in links), name
