"""Results with provenance: tables, figures and facts, each beside a sidecar that says where it came from.

A notebook opens a run, hands over what it found, and closes it:

    run = record.start("03_the_sketch", model=model, dataset=dataset, device=device, profile=profile,
                       seed=seed, output=output)
    run.table("sketch_error", frame, columns={"width": "counters per row", "error": "share of the total weight"})
    run.figure("sketch_error", fig, caption="The error halves when the width doubles. Lines: ...", tables=["sketch_error"])
    run.fact("sketch_error_p95", 0.0123)
    run.finish()

Same inputs give the same bytes in tables and figures; what differs from run to run (wall time, the moment) is
kept in `run_<notebook>.json`, and measured times in the columns that a table names as its `timings`.
"""

import os
import platform
import re
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from sketchkv.study import closure, notebooks, sources
from sketchkv.study.sources import ROOT, KnobError, atomic_write, portable, read_json, sha256, to_json

INTERACTIVE = ROOT / "build" / "interactive"
SMOKE = ROOT / "build" / "smoke"

MAKE_DEFAULTS = {"model": "embedded", "dataset": "embedded", "device": "auto", "profile": "study"}
LONGEST = 90  # letters of a finding: the first sentence of a caption, which is the title of its figure
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def home(model, dataset, profile, root=ROOT):
    """The root that a run of these knobs writes under: only the study of the embedded model and text replaces the committed
    results. Neither two documents nor another model must replace what was found."""
    if profile == "smoke":
        return Path(root) / SMOKE.relative_to(ROOT)
    if (model, dataset) == (MAKE_DEFAULTS["model"], MAKE_DEFAULTS["dataset"]):
        return Path(root)
    names = (re.sub(r"[^\w.]+", "-", str(portable(name))).strip("-.")[-80:] for name in (model, dataset))
    return Path(root) / "build" / "-".join(names)


class Paths:
    """The result folders under one root (`home`), or under `build/interactive` for a notebook opened by hand."""

    def __init__(self, root):
        self.root = Path(root)
        self.results = self.root / "data" / "results"
        self.figures = self.root / "figures"
        self.report = self.root / "report"
        self.points = self.results / "points"


def remove_leftovers(root):
    """Removes the temporary files that killed processes left under the result folders of `root`."""
    paths = Paths(root)
    for folder in (paths.results, paths.figures, paths.report):
        for temporary in folder.rglob(".*.tmp"):
            temporary.unlink(missing_ok=True)


def load_table(name, root=ROOT):
    """A result table as a DataFrame. Raises FileNotFoundError, naming what to run, when the table has not been made."""
    path = Paths(root).results / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"there is no table {name!r} ({path.name}); `make reproduce` writes it")
    return pd.read_csv(path)


def start(
    notebook,
    *,
    model="embedded",
    dataset="embedded",
    device="auto",
    profile="smoke",
    seed=0,
    output="",
    **own,
):
    """Opens the run of one notebook: checks the knobs and returns a `Run`.

    `output` is the root that results are written under; empty means `build/interactive`, so that only the
    runner (`make reproduce`) overwrites the committed results. `own` are the notebook's own parameters, for
    the record. Raises KnobError for an unknown model, dataset, device or profile, a seed that is none, and
    for a parameter in a first cell that was run by hand which nothing in the notebook reads: a mistyped name.
    """
    sources.check_knobs(model, dataset, device, profile)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise KnobError(f"seed={seed!r} is no whole number of 0 or more")
    _check_first_cell(ROOT / "notebooks" / f"{notebook}.ipynb")
    params = {"model": model, "dataset": dataset, "device": device, "profile": profile, "seed": seed, **own}
    return Run(notebook, params, Path(output) if output else INTERACTIVE)


def _check_first_cell(path):
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if shell is None or not path.exists():
        return
    if unread := notebooks.unread(path, shell.user_ns.get("In", [])):
        declared = sorted(set(notebooks.parameters(path)) - set(unread))
        raise KnobError(
            f"nothing in {path.name} reads {', '.join(unread)}; its first cell sets: {', '.join(declared)}"
            f"{sources.did_you_mean(unread[0], declared)}; mend the name, then restart the kernel"
        )


def split_caption(caption):
    """(finding, rest) of a caption: its first sentence, and what follows."""
    finding, *rest = re.split(r"(?<=[.!?])\s", " ".join(caption.split()), maxsplit=1)
    return finding, "".join(rest)


def _documents(path):
    """How many documents a table is made of, as far as it says so; else 0."""
    frame = pd.read_csv(path)
    return frame.document.nunique() if "document" in frame else int(frame.n.min()) if "n" in frame else 0


class Run:
    """One notebook's run. Made by `start`; `device` ("cpu" or "cuda"), `seed`, `profile`, `params`, `paths`."""

    def __init__(self, notebook, params, root):
        self.notebook, self.params, self.paths = notebook, params, Paths(root)
        self.seed, self.profile = params["seed"], params["profile"]
        found = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = found if params["device"] == "auto" else params["device"]
        self.model_revision = sources.model_revision(params["model"])
        self.data_revision = sources.data_revision(params["dataset"])
        self.commit, self.dirty = sources.commit()
        self._package = closure.of_notebook(ROOT / "notebooks" / f"{notebook}.ipynb")
        self._started, self._clock = datetime.now(UTC), time.perf_counter()
        self._facts, self._outputs, self._inputs = {}, {}, {}
        self._finished = False

    def table(self, name, frame, columns, timings=()):
        """Writes `frame` as `data/results/NAME.csv` and its sidecar, and returns it.

        `columns` describes every column, with its unit; `timings` names those that may differ from run to run. Raises
        ValueError for a column without a description, a description without a column, or an empty table.
        """
        self._check(name, self.paths.results / f"{name}.json")
        if frame.index.nlevels > 1 or frame.index.name is not None:
            raise ValueError(
                f"table {name!r} has a named index, which a CSV would lose; call reset_index() first"
            )
        undescribed, absent = set(frame.columns) - set(columns), set(columns) - set(frame.columns)
        if undescribed or absent or frame.empty:
            raise ValueError(
                f"table {name!r}: columns without a description: {sorted(map(str, undescribed))}, "
                f"descriptions without a column: {sorted(absent)}, rows: {len(frame)}"
            )
        if set(timings) - set(columns):
            raise ValueError(f"table {name!r}: timings name no column: {sorted(set(timings) - set(columns))}")
        path = self._write(self.paths.results / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
        self._sidecar(
            path.with_suffix(".json"),
            name,
            f"make reproduce{self._knobs()}",
            rows=len(frame),
            columns={c: columns[c] for c in frame.columns},
            timings=list(timings),
        )
        return frame

    def load_table(self, name):
        """A table of this or an earlier notebook; a later change of it makes this notebook run again.

        A notebook opened by hand, or run alone at smoke size, falls back on the committed table.
        """
        root = self.paths.root
        if root in (INTERACTIVE, SMOKE) and not (self.paths.results / f"{name}.csv").exists():
            root = ROOT
        frame = load_table(name, root)
        self.read(Paths(root).results / f"{name}.csv")
        return frame

    def read(self, path):
        """Registers a file or folder that this run depends on."""
        self._inputs[self._relative(path)] = sha256(path)
        return Path(path)

    def figure(self, name, fig, caption, tables=()):
        """Writes a matplotlib figure as `figures/NAME.svg` with a sidecar, and shows it inline.

        caption: its first sentence is the finding, which becomes the figure's title; the rest, how to read it, is shown below.
        tables: names of the tables it was drawn from.
        """
        from sketchkv.study import figures

        self._check(name, self.paths.figures / f"{name}.json")
        finding, rest = split_caption(caption)
        if not finding:
            raise ValueError(f"figure {name!r} needs a caption that states its finding")
        drawn_from, documents = {}, 0
        for table in tables:
            path = self.paths.results / f"{table}.csv"
            path = path if path.exists() else Paths(ROOT).results / path.name
            if not path.exists():
                raise ValueError(
                    f"figure {name!r} is drawn from table {table!r}, which no notebook has written yet"
                )
            drawn_from[table] = sha256(path)
            documents = documents or _documents(path)
        figures.head(fig, finding)
        if self.profile == "smoke":
            figures.mark(fig, f"smoke, n = {documents}" if documents else "smoke: no conclusions")
        path = self._write(self.paths.figures / f"{name}.svg", figures.render(fig, name))
        command = f"make figures/{name}.svg{self._knobs()}"
        self._sidecar(
            path.with_suffix(".json"), name, command, caption=" ".join(caption.split()), tables=drawn_from
        )
        figures.show(fig, rest)

    def fact(self, name, value):
        """Records one number (or word) that the report's claims rest on; `finish` raises ValueError for NaN and infinity."""
        self._facts[name] = value

    def grid(self, kind, function, points, workers=None):
        """The results of many grid points (`store.compute`), kept in this run's folder under the model's revision.

        The run's seed, data set and its revision belong into the parameters of `points`.
        """
        from sketchkv.study import store

        return store.compute(
            kind, function, points, folder=self.paths.points, revision=self.model_revision, workers=workers
        )

    def output(self, path, content):
        """Writes another file (the report, say) under the run's root and counts it among its outputs."""
        return self._write(self.paths.root / path, content)

    def finish(self, **details):
        """Writes facts and provenance, removes what this notebook wrote in an earlier run but no longer makes.

        `details` join the provenance (`dtype="float32"`). Without this call the runner does not count the run as done.
        """
        if self._finished:
            raise RuntimeError(
                f"the run of {self.notebook} is finished already; open another with record.start()"
            )
        if self._facts:
            path = self.paths.results / f"facts_{self.notebook}.json"
            self._write(path, to_json({"notebook": self.notebook, "facts": self._facts}))
        path = provenance_path(self.paths.root, self.notebook)
        before = read_json(path)["outputs"] if path.exists() else {}
        for name in set(before) - set(self._outputs):
            (self.paths.root / name).unlink(missing_ok=True)
        provenance = self._origin() | {
            "device": self.device,
            "hardware": torch.cuda.get_device_name() if self.device == "cuda" else platform.machine(),
            "cpu_cores": os.cpu_count(),
            "versions": sources.versions(),
            **details,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": time.time(),
            "wall_seconds": round(time.perf_counter() - self._clock, 2),
            "reads": self._inputs,
            "outputs": self._outputs,
        }
        atomic_write(path, to_json(provenance))
        self._finished = True

    def _origin(self):
        return {
            "notebook": self.notebook,
            "inputs": {
                **{k: portable(v) if k in ("model", "dataset") else v for k, v in self.params.items()},
                "model_revision": self.model_revision,
                "data_revision": self.data_revision,
                "package": self._package,
            },
            "commit": self.commit,
            "dirty": self.dirty,
        }

    def _sidecar(self, path, name, command, **fields):
        self._write(path, to_json({"name": name, **fields, **self._origin(), "command": command}))

    def _knobs(self):
        """The knobs that differ from the Makefile's defaults, as they are typed after `make`."""
        changed = {k: portable(self.params[k]) for k, v in MAKE_DEFAULTS.items() if self.params[k] != v}
        return "".join(f" {k.upper()}={shlex.quote(v)}" for k, v in changed.items())

    def _write(self, path, content):
        atomic_write(path, content)
        self._outputs[self._relative(path)] = sha256(path)
        return path

    def _relative(self, path):
        path, root = Path(path), self.paths.root
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)

    def _check(self, name, sidecar):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a result: use a-z, 0-9 and _")
        owner = read_json(sidecar)["notebook"] if sidecar.exists() else self.notebook
        if owner != self.notebook and (ROOT / "notebooks" / f"{owner}.ipynb").exists():
            raise ValueError(f"{sidecar.stem!r} belongs to notebook {owner}; choose another name")


def provenance_path(root, notebook):
    """The file that says when, where and with what a notebook last ran to its end."""
    return Paths(root).results / f"run_{notebook}.json"
