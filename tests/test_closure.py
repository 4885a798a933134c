"""Which code a result follows from, which way imports run, and how large the core is."""

import ast
import inspect
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from types import SimpleNamespace

import nbformat
import pytest

from sketchkv import SketchCache
from sketchkv.study import closure, notebooks, sources, why


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package whose files can be edited, and a notebook beside it."""
    shutil.copytree(closure.PACKAGE, tmp_path / "sketchkv", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(closure, "PACKAGE", tmp_path / "sketchkv")
    return tmp_path


def write_notebook(folder, *cells):
    path = folder / "01_tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def named(file):
    """The name that Python knows a file of the package by."""
    parts = file.relative_to(closure.PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(file):
    """What a file imports, inside of functions too: a name stands for itself and what it is taken from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module


def edited(file, old, new):
    before = file.read_text()
    assert old in before
    file.write_text(before.replace(old, new, 1))
    return before


def test_only_what_imports_reach_changes_a_fingerprint(copy, monkeypatch):
    module = SimpleNamespace(__file__=str(copy / "sketchkv/study/why.py"))
    monkeypatch.setitem(closure.sys.modules, "why_copied", module)
    function = SimpleNamespace(__module__="why_copied")
    notebook = write_notebook(
        copy,
        "%matplotlib inline\nimport pandas as pd",
        "def f():\n    from sketchkv.study import recall",
        "1 +",
    )
    report = write_notebook(copy / "sketchkv", "from sketchkv.study import report")
    every = {
        "point": lambda: closure.of_function(function),
        "notebook": lambda: closure.of_notebook(notebook),
        "report": lambda: closure.of_notebook(report),
    }
    before = {name: fingerprint() for name, fingerprint in every.items()}
    addition = "\nADDED = 1\n"
    for module, reached in (
        ("study/report.py", {"report"}),
        ("study/claims.py", {"report"}),
        ("fast/cpu.c", {"point", "notebook", "report"}),  # compiled where a module runs
        ("fast/normal.c", {"point", "notebook", "report"}),  # included there
        ("study/recall.py", {"notebook", "report"}),  # an import inside a function
        ("study/why.py", {"point"}),
        ("study/methods.py", {"point", "notebook", "report"}),  # imported by what is imported
        ("cache.py", {"point", "notebook", "report"}),  # by sketchkv/__init__.py
        ("training.py", set()),
    ):
        file = copy / "sketchkv" / module
        text = file.read_text()
        file.write_text(text + addition)
        assert {name for name, fingerprint in every.items() if fingerprint() != before[name]} == reached, (
            module
        )
        file.write_text(text)
    assert before == {name: fingerprint() for name, fingerprint in every.items()}


def test_comments_docstrings_and_layout_change_nothing(copy):
    notebook, file = write_notebook(copy, "import sketchkv.tiny"), copy / "sketchkv" / "tiny.py"

    def fingerprint(text):
        file.write_text(text)
        return closure.of_notebook(notebook)

    plain = fingerprint("class A:\n    def f(self, x):\n        return x + 1\n")
    for same in (
        "# why\nclass A:\n\n    def f(self, x):\n        return (x +\n                1)\n",
        '"""Mod."""\nclass A:\n    """Class."""\n    def f(self, x):\n        "M."\n        return x + 1\n',
    ):
        assert fingerprint(same) == plain
    for other in (
        "class A:\n    def f(self, x):\n        return x + 2\n",
        'class A:\n    def f(self, x):\n        "first"\n        "no docstring"\n        return x + 1\n',
        "import sketchkv.texts\nclass A:\n    def f(self, x):\n        return x + 1\n",
        "from . import texts\nclass A:\n    def f(self, x):\n        return x + 1\n",
    ):
        assert fingerprint(other) != plain
    assert fingerprint("from .study import aims\n") != fingerprint("from .study import closure\n")


def test_fingerprints_of_the_study_are_of_these_files():
    reached = {named(file) for file in closure.reach("import sketchkv.study.why")}
    assert {"sketchkv", "sketchkv.cache", "sketchkv.study.evaluate", "sketchkv.study.why"} <= reached
    assert not {"sketchkv.study.report", "sketchkv.study.figures", "sketchkv.training"} & reached
    assert closure.of_function(why.oracles) == closure.of_function(why.oracles)
    absent = closure.of_notebook(sources.ROOT / "notebooks" / "absent.ipynb")
    assert len({absent, *(closure.of_notebook(path) for path in notebooks.find(sources.ROOT))}) > 8


def test_imports_run_one_way():
    files = {named(file): file for file in closure.PACKAGE.rglob("*.py")}
    graph = {name: set(imported(file)) & files.keys() for name, file in files.items()}
    core = [name for name in graph if not name.startswith(("sketchkv.study", "sketchkv.fast"))]
    assert "sketchkv.cache" in core and "sketchkv.switch" in graph["sketchkv"]
    for name in core:
        above = {other for other in graph[name] if other.startswith(("sketchkv.study", "sketchkv.fast"))}
        # Recorded and compiled steps are loaded when they are asked for, fused operations on a GPU, and only then.
        assert not above or (
            name in ("sketchkv.decode", "sketchkv.devices")
            and all(n.startswith("sketchkv.fast") for n in above)
        ), (name, above)
    study = {
        name: {n for n in graph[name] if n.startswith("sketchkv.study.")} for name in graph if "study" in name
    }
    assert len(list(TopologicalSorter(study).static_order())) >= len(study)  # raises CycleError


# What a reader must know of the bounded cache.
READING = ("attention", "cache", "passes", "layer", "ops", "slots", "policies")


def test_the_core_is_small():
    lines = {
        file: len(file.read_text(encoding="utf-8").splitlines()) for file in closure.PACKAGE.rglob("*.py")
    }
    assert sum(lines[closure.PACKAGE / f"{name}.py"] for name in READING) <= 1200
    assert max(lines.values()) <= 400
    for file in lines:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            assert not isinstance(node, ast.ClassDef) or node.end_lineno - node.lineno < 200, (
                file,
                node.name,
            )
    parameters = inspect.signature(SketchCache).parameters.values()
    assert sum(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters) <= 12


def test_importing_loads_little():
    code = "import sketchkv, sys; print(*(m for m in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert sum(name.split(".")[0] == "sketchkv" for name in loaded) <= 10
    assert not {"pandas", "scipy", "dask", "matplotlib", "sketchkv.fast"} & set(loaded)
