"""What the notebooks are: their order, their code, their parameters and the figures that they draw, read from
the files."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple


def find(root):
    """The notebooks `NN_name.ipynb` of `root`, in the order in which they are read and run."""
    return sorted((Path(root) / "notebooks").glob("[0-9]*.ipynb"))


class Cell(NamedTuple):
    cell_type: str
    source: str
    tags: list


def cells(path):
    """All cells. Every kernel and every worker comes by here: nbformat takes seconds to import and would check nothing of use."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [Cell(c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", [])) for c in found]


def code(path):
    """The sources of the code cells."""
    return [cell.source for cell in cells(path) if cell.cell_type == "code"]


def tree(source):
    """The syntax tree of a cell, without lines meant for IPython; that of an empty one where it is no Python."""
    try:
        return ast.parse(re.sub(r"^\s*[%!].*$", "pass", source, flags=re.M))
    except SyntaxError:
        return ast.Module([], [])


def parameters(path):
    """`{name: default}` of the cell tagged `parameters`; a default that is no literal is None. Empty without
    the cell."""
    tagged = [cell.source for cell in cells(path) if "parameters" in cell.tags]
    return _assigned(tagged[0]) if tagged else {}


def unread(path, executed):
    """Names that a cell of parameters among the sources `executed` assigns, but no cell of the notebook reads."""
    nodes = (node for source in code(path) for node in ast.walk(tree(source)))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    given = [names for source in executed if {"profile", "output"} <= (names := set(_assigned(source)))]
    return sorted(set().union(*given) - read)


def makes(path, kind):
    """Names of what the notebook's code writes by `run.KIND("name", ...)`: figures, tables or facts."""
    return re.findall(rf"""\.{kind}\(\s*["'](\w+)["']""", "\n".join(code(path)))


def _assigned(source):
    found: dict[str, object] = {}
    for node in tree(source).body:
        if isinstance(node, ast.Assign):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = None
            found |= {target.id: value for target in node.targets if isinstance(target, ast.Name)}
    return found
