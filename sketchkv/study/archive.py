"""Tried, and not worth keeping: what was measured of code that has left the package, and of `pyramid`, which stays.

The tables lie in `data/archive` as they were made, with a manifest that names for each its checksum, the commit and the
notebook that made it. `tried.csv` sums them up: one row per comparison, with the raw table and the commit of its code.
"""

import pandas as pd

from sketchkv.study import sources

FOLDER = sources.ROOT / "data" / "archive"


class ArchiveError(RuntimeError):
    """A file of the archive is not what was archived."""


def manifest(folder=FOLDER):
    """The manifest, after a check that the archive holds exactly the files that it names, unchanged. Raises ArchiveError."""
    listed = sources.read_json(folder / "manifest.json")
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {"manifest.json"}
    if there != set(listed["files"]):
        raise ArchiveError(
            f"{folder} and its manifest differ in {', '.join(sorted(there ^ set(listed['files'])))}: git checkout it"
        )
    for name, entry in listed["files"].items():
        if sources.sha256(folder / name) != entry["sha256"]:
            raise ArchiveError(
                f"{folder / name} is not what was archived (its checksum differs): git checkout it"
            )
    return listed


def table(folder=FOLDER):
    """(DataFrame of what was tried, {column: what it says}). Raises ArchiveError."""
    columns = manifest(folder)["files"]["tried.csv"]["columns"]
    return pd.read_csv(folder / "tried.csv"), columns
