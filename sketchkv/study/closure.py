"""Fingerprints of code: what a result follows from is its own source and every module of this package that
its imports reach, imports inside functions included. Comments, docstrings and layout are no part of it."""

import ast
import hashlib
import sys
from functools import lru_cache
from pathlib import Path

from sketchkv.study import notebooks

PACKAGE = Path(__file__).resolve().parent.parent


def of_function(function):
    """16 hex digits for the module that defines `function`, and what it imports."""
    return _fingerprint([_Module(Path(str(sys.modules[function.__module__].__file__)), function.__module__)])


def of_notebook(path):
    """16 hex digits for what the notebook's code imports; for the whole package if there is no such file."""
    if not Path(path).exists():
        return _fingerprint(_Module(file, _name(file)) for file in PACKAGE.rglob("*.py"))
    reached = {
        name for source in notebooks.code(path) for name in _imports(notebooks.tree(source), "", False)
    }
    return _fingerprint(found for name in reached for found in _resolve(name))


def reach(start):
    """Names of all modules that `start` (modules) are and import."""
    found, waiting = {}, list(start)
    while waiting:
        module = waiting.pop()
        if module.name not in found:
            found[module.name] = module
            waiting += [other for name in module.imports for other in _resolve(name)]
    return found


def _fingerprint(start):
    found = reach(start)
    return hashlib.sha256(
        "\n".join(f"{name} {found[name].digest}" for name in sorted(found)).encode()
    ).hexdigest()[:16]


class _Module:
    """A file by the name that Python knows it by: `digest` of its code, `imports` (names, not all of them modules)."""

    def __init__(self, file, name):
        state = file.stat()
        self.name = name
        self.digest, self.imports = _read(file, name, state.st_mtime_ns, state.st_size)
        if (beside := file.with_suffix(".c")).exists():  # what the module compiles
            self.digest = hashlib.sha256(self.digest.encode() + beside.read_bytes()).hexdigest()


@lru_cache(maxsize=512)
def _read(file, name, *_):
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    reached = frozenset(_imports(tree, name, file.name == "__init__.py"))
    for node in ast.walk(tree):
        if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        ) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), reached


def _imports(tree, module, is_package):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _resolve(name):
    """The modules of this package that `import name` runs: those above it first, then it. A name inside a
    module: none of its own."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return []
    found = []
    for length in range(1, len(parts) + 1):
        place = PACKAGE.parent.joinpath(*parts[:length])
        file = next((f for f in (place / "__init__.py", place.with_suffix(".py")) if f.exists()), None)
        if file is None:
            break
        found.append(_Module(file, ".".join(parts[:length])))
    return found


def _name(file):
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
