"""Fingerprints of code: what a result follows from is its own source and every module of this package that
its imports reach, imports inside functions included. Comments, docstrings and layout are no part of it."""

import ast
import hashlib
import sys
from functools import lru_cache
from modulefinder import ModuleFinder
from pathlib import Path

from sketchkv.fast import native
from sketchkv.study import notebooks

PACKAGE = Path(__file__).resolve().parent.parent


def of_function(function):
    """16 hex digits for the module that defines `function`, and what it imports."""
    file = Path(str(sys.modules[function.__module__].__file__))
    return _fingerprint({file, *reach(file.read_text(encoding="utf-8"))})


def of_notebook(path):
    """16 hex digits for what the notebook's code imports; for the whole package if there is no such file."""
    if not Path(path).exists():
        return _fingerprint(PACKAGE.rglob("*.py"))
    nodes = (node for source in notebooks.code(path) for node in ast.walk(notebooks.tree(source)))
    imports = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return _fingerprint(reach("\n".join(imports)))


def reach(source):
    """The files of this package that Python code `source` imports, directly or not."""
    finder = ModuleFinder(path=[str(PACKAGE.parent)])
    finder.scan_code(compile(source, "", "exec"), finder.add_module("__main__"))
    named = (getattr(module, "__file__", None) for module in finder.modules.values())
    files = (Path(name) for name in named if name)
    return [file for file in files if file.is_relative_to(PACKAGE)]


def _fingerprint(files):
    lines = []
    for file in files:
        name = file.relative_to(PACKAGE) if file.is_relative_to(PACKAGE) else file.name
        lines.append(f"{name} {_digest(file, file.stat().st_mtime_ns)}")
        if (beside := file.with_suffix(".c")).exists():  # what the module compiles
            lines.append(f"{beside.name} {hashlib.sha256(native.source(beside)).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@lru_cache(maxsize=512)
def _digest(file, _):
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for node in ast.walk(tree):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
