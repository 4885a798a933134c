"""Results with provenance: tables, figures and facts, each beside a sidecar that says where it came from.

A notebook opens a run, hands over what it found, and closes it:

    run = results.start("01_sketch_validation", model=model, dataset=dataset, device=device, profile=profile,
                        seed=seed, output=output)
    run.table("sketch_error", frame, columns={"width": "counters per row", "error": "share of the total weight"})
    run.figure("sketch_error", fig, caption="The error halves when the width doubles.", tables=["sketch_error"])
    run.fact("sketch_error_p95", 0.0123)
    run.finish()

Same inputs give the same bytes in tables and figures; what differs from run to run (wall time, the moment) is kept in
`run_<notebook>.json`, and measured times in the columns that a table names as its `timings`.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import torch

from sketchkv import loading, texts

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent
INTERACTIVE = ROOT / "build" / "interactive"

DEVICES = ("auto", "cpu", "cuda")
PROFILES = ("smoke", "study")
DATASETS = ("embedded", texts.WIKITEXT)
HUB_MODELS = tuple(name for name in loading.HUB_REVISIONS if "wikitext" not in name)
MAKE_DEFAULTS = {"model": "embedded", "dataset": "embedded", "device": "auto", "profile": "study"}

GENERATED = ("data/results", "data/model/README.md", "figures", "report/report.html", "report/report.md", "report/report.pdf")
_SCORING = ("evaluate.py", "methods.py", "attention_analysis.py")
_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "pandas", "scipy", "dask", "matplotlib", "seaborn")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


class KnobError(ValueError):
    """A knob (MODEL, DATASET, DEVICE, PROFILE) has a value that does not exist."""


# -- files ------------------------------------------------------------------------------------------------------------


def atomic_write(path, content):
    """Writes `content` (str or bytes) so that `path` holds either the old or the new file, never a part of one.

    A killed process may leave a temporary `.NAME.*.tmp` behind, which `remove_leftovers` clears; readers never see it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(root):
    """Removes the temporary files that killed processes left under the result folders of `root`."""
    paths = Paths(root)
    for folder in (paths.results, paths.figures, paths.report):
        for temporary in folder.rglob(".*.tmp"):
            temporary.unlink(missing_ok=True)


def to_json(value):
    """JSON text with numpy scalars and arrays as plain numbers; NaN and infinity raise ValueError."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=lambda o: o.tolist()) + "\n"


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path):
    """Hex digest of one file, or of every file under a folder that is not hidden."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
        return loading.digest({file.relative_to(path).as_posix(): file for file in files}, digits=64)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Paths:
    """The result folders under one root: the repository, or `build/interactive` for a notebook opened by hand."""

    def __init__(self, root):
        self.root = Path(root)
        self.results = self.root / "data" / "results"
        self.figures = self.root / "figures"
        self.report = self.root / "report"
        self.points = self.results / "points"


# -- knobs and revisions ----------------------------------------------------------------------------------------------


def check_knobs(model="embedded", dataset="embedded", device="auto", profile="smoke"):
    """Raises KnobError, naming the knob and what it may be, unless all four values exist."""
    for knob, value, allowed in (("DEVICE", device, DEVICES), ("PROFILE", profile, PROFILES)):
        if value not in allowed:
            raise KnobError(f"{knob}={value!r} is unknown; allowed: {', '.join(allowed)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise KnobError("DEVICE=cuda, but PyTorch sees no CUDA device here; use DEVICE=cpu or DEVICE=auto")
    if not (model in ("embedded", *HUB_MODELS) or re.fullmatch(r"[\w./-]+@\w+", model) or _is_there(model, "is_dir")):
        raise KnobError(
            f"MODEL={model!r} is unknown; allowed: embedded, {', '.join(HUB_MODELS)}, "
            "any other hub model as name@commit, or an existing local folder in hub layout"
        )
    if not (dataset in DATASETS or _is_there(dataset, "exists")):
        raise KnobError(
            f"DATASET={dataset!r} is unknown; allowed: {', '.join(DATASETS)}, or an existing text file or folder"
        )


def _is_there(path, kind):
    return bool(path) and getattr(Path(path).expanduser(), kind)()


def package_fingerprint():
    """16 digits of a sha256 over `sketchkv/**/*.py`."""
    return loading.digest({file.relative_to(PACKAGE).as_posix(): file for file in PACKAGE.rglob("*.py")}, digits=16)


def model_revision(model):
    """What identifies the weights (`loading.revision`); None where the embedded ones are not trained yet."""
    try:
        return loading.revision(model)
    except loading.LoadError:
        if model == "embedded":
            return None  # not every notebook needs a model
        raise


def data_revision(dataset):
    """What identifies the text (`texts.text_revision`)."""
    return texts.text_revision(dataset)


def _git(*arguments):
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit():
    """(commit, dirty): the sources' commit ("unknown" without git), and whether the sources differ from it.

    Files that a run generates do not count, or the first notebook would make all the others dirty.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in GENERATED))
    return head or "unknown", bool(changes) or head is None


def versions():
    """Versions of Python and of the packages that the numbers depend on, without local suffixes such as `+cpu`."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- reading ----------------------------------------------------------------------------------------------------------


def load_table(name, root=ROOT, timings=True):
    """A result table as a DataFrame; `timings=False` drops the columns that may differ from run to run.

    Raises FileNotFoundError, naming what to run, when the table has not been made.
    """
    path = Paths(root).results / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"there is no table {name!r} ({path.name}); `make reproduce` writes it")
    frame = pd.read_csv(path)
    if not timings:
        frame = frame.drop(columns=read_json(path.with_suffix(".json"))["timings"])
    return frame


# -- grid points ------------------------------------------------------------------------------------------------------


def point_fingerprint(function):
    """16 digits of a sha256 over what a grid point follows from: the package less `study/`, the study's scoring, and the
    file that `function` is defined in. A change to a figure or the report computes nothing again."""
    digest = hashlib.sha256()
    own = sys.modules[function.__module__].__file__
    files = [*PACKAGE.glob("*.py"), *(PACKAGE / "study" / name for name in _SCORING)]
    for file in [*sorted(files), *([Path(own)] if own and Path(own) not in files else [])]:
        digest.update(f"{file.name}\0{sha256(file)}\n".encode())
    return digest.hexdigest()[:16]


def point_path(kind, params, folder, revision, function):
    """(file, identity) of one grid point: named by a hash over kind, parameters, package source and model revision."""
    identity = {"kind": kind, "params": params, "package": point_fingerprint(function), "model": revision}
    text = json.dumps(identity, sort_keys=True, default=lambda o: o.tolist())
    return Path(folder) / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json", identity


def read_point(path):
    """The result in the file of a grid point, None if there is none. A file that cannot be read back is named in a
    warning and counts as none."""
    if not path.exists():
        return None
    try:
        stored = read_json(path)
        if stored["sha256"] == hashlib.sha256(to_json(stored["result"]).encode()).hexdigest():
            return stored["result"]
        reason = "its checksum does not fit"
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"corrupted result file {path} ({reason}); computing it again", stacklevel=2)
    return None


def write_point(path, identity, result):
    """Writes the file of a grid point atomically; returns the result as it will be read back."""
    try:
        result = json.loads(to_json(result))
    except (ValueError, TypeError, AttributeError) as error:
        raise type(error)(f"grid point {identity['kind']} {identity['params']}: {error}") from error
    checksum = hashlib.sha256(to_json(result).encode()).hexdigest()
    atomic_write(path, to_json({**identity, "result": result, "sha256": checksum}))
    return result


# -- a run ------------------------------------------------------------------------------------------------------------


def start(notebook, *, model="embedded", dataset="embedded", device="auto", profile="smoke", seed=0, output="", **own):
    """Opens the run of one notebook: checks the knobs and returns a `Run`.

    `output` is the root that results are written under; empty means `build/interactive`, so that only the runner
    (`make reproduce`) overwrites the committed results. `own` are the notebook's own parameters, for the record.
    Raises KnobError for an unknown model, dataset, device or profile.
    """
    check_knobs(model, dataset, device, profile)
    params = {"model": model, "dataset": dataset, "device": device, "profile": profile, "seed": seed, **own}
    return Run(notebook, params, Path(output) if output else INTERACTIVE)


class Run:
    """One notebook's run. Made by `start`; `device` ("cpu" or "cuda"), `seed`, `profile`, `params`, `paths`."""

    def __init__(self, notebook, params, root):
        self.notebook, self.params, self.paths = notebook, params, Paths(root)
        self.seed, self.profile = params["seed"], params["profile"]
        self.device = params["device"]
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model_revision = model_revision(params["model"])
        self.data_revision = data_revision(params["dataset"])
        self.commit, self.dirty = commit()
        self._package = package_fingerprint()
        self._started, self._clock = datetime.now(timezone.utc), time.perf_counter()
        self._facts, self._outputs, self._inputs = {}, {}, {}
        self._finished = False

    def table(self, name, frame, columns, timings=()):
        """Writes `frame` as `data/results/NAME.csv` and its sidecar, and returns it.

        `columns` describes every column, with its unit; `timings` names those that may differ from run to run.
        Raises ValueError for a column without a description, a description without a column, or an empty table.
        """
        self._check(name, self.paths.results / f"{name}.json")
        if frame.index.nlevels > 1 or frame.index.name is not None:
            raise ValueError(f"table {name!r} has a named index, which a CSV would lose; call reset_index() first")
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
            path.with_suffix(".json"), name, f"make reproduce{self._knobs()}",
            rows=len(frame), columns={c: columns[c] for c in frame.columns}, timings=list(timings),
        )  # fmt: skip
        return frame

    def load_table(self, name, timings=True):
        """A table of this or an earlier notebook; a later change of it makes this notebook run again.

        A notebook opened by hand falls back on the committed table.
        """
        root = self.paths.root
        if root == INTERACTIVE and not (self.paths.results / f"{name}.csv").exists():
            root = ROOT
        frame = load_table(name, root, timings)
        self.read(Paths(root).results / f"{name}.csv")
        return frame

    def read(self, path):
        """Registers a file or folder that this run depends on."""
        self._inputs[self._relative(path)] = sha256(path)
        return Path(path)

    def figure(self, name, fig, caption, tables=()):
        """Writes a matplotlib figure as `figures/NAME.svg` with a sidecar, and shows it inline.

        `caption` states the finding, then how to read it; `tables` are the names of the tables it was drawn from.
        """
        from sketchkv.study import figures

        self._check(name, self.paths.figures / f"{name}.json")
        if not caption.strip():
            raise ValueError(f"figure {name!r} needs a caption that states its finding")
        sources = {}
        for table in tables:
            path = self.paths.results / f"{table}.csv"
            path = path if path.exists() else Paths(ROOT).results / path.name
            if not path.exists():
                raise ValueError(f"figure {name!r} is drawn from table {table!r}, which no notebook has written yet")
            sources[table] = sha256(path)
        path = self._write(self.paths.figures / f"{name}.svg", figures.render(fig, name))
        command = f"make figures/{name}.svg{self._knobs()}"
        self._sidecar(path.with_suffix(".json"), name, command, caption=" ".join(caption.split()), tables=sources)
        figures.show(fig)

    def fact(self, name, value):
        """Records one number (or word) that the report's prose injects; raises ValueError for NaN and infinity."""
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"fact {name!r} must be one number or word, not {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"fact {name!r} is {value}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a fact: use a-z, 0-9 and _")
        self._facts[name] = value
        return value

    def grid(self, kind, function, points, workers=None):
        """The results of many grid points (`grid.compute`), kept in this run's folder under the model's revision.

        The run's seed, data set and its revision belong into the parameters of `points`.
        """
        from sketchkv.study import grid

        return grid.compute(
            kind, function, points, folder=self.paths.points, revision=self.model_revision, workers=workers
        )  # fmt: skip

    def output(self, path, content):
        """Writes another file (the report, say) under the run's root and counts it among its outputs."""
        return self._write(self.paths.root / path, content)

    def finish(self, **details):
        """Writes facts and provenance, removes what this notebook wrote in an earlier run but no longer makes.

        `details` join the provenance (`dtype="float32"`). Without this call the runner does not count the run as done.
        """
        if self._finished:
            raise RuntimeError(f"the run of {self.notebook} is finished already; open another with results.start()")
        if self._facts:
            path = self.paths.results / f"facts_{self.notebook}.json"
            self._write(path, to_json({"notebook": self.notebook, "facts": self._facts}))
        path = provenance_path(self.paths.root, self.notebook)
        before = read_json(path)["outputs"] if path.exists() else {}
        for name in set(before) - set(self._outputs):
            (self.paths.root / name).unlink(missing_ok=True)
        hardware = torch.cuda.get_device_name() if self.device == "cuda" else platform.machine()
        atomic_write(path, to_json({
            **self._origin(),
            "device": self.device,
            "hardware": hardware,
            "cpu_cores": os.cpu_count(),
            "versions": versions(),
            **details,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": time.time(),
            "wall_seconds": round(time.perf_counter() - self._clock, 2),
            "reads": self._inputs,
            "outputs": self._outputs,
        }))  # fmt: skip
        self._finished = True

    def _origin(self):
        return {
            "notebook": self.notebook,
            "inputs": {
                **{k: _portable(v) if k in ("model", "dataset") else v for k, v in self.params.items()},
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
        changed = {k: _portable(self.params[k]) for k, v in MAKE_DEFAULTS.items() if self.params[k] != v}
        return "".join(f" {k.upper()}={shlex.quote(v)}" for k, v in changed.items())

    def _write(self, path, content):
        atomic_write(path, content)
        self._outputs[self._relative(path)] = sha256(path)
        return path

    def _relative(self, path):
        path = Path(path)
        return path.relative_to(self.paths.root).as_posix() if path.is_relative_to(self.paths.root) else str(path)

    def _check(self, name, sidecar):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a result: use a-z, 0-9 and _")
        owner = read_json(sidecar)["notebook"] if sidecar.exists() else self.notebook
        if owner != self.notebook and (ROOT / "notebooks" / f"{owner}.ipynb").exists():
            raise ValueError(f"{sidecar.stem!r} belongs to notebook {owner}; choose another name")


def provenance_path(root, notebook):
    """The file that says when, where and with what a notebook last ran to its end."""
    return Paths(root).results / f"run_{notebook}.json"


def _portable(value):
    """A path inside the repository is recorded relative to it; names and other paths stay as they are."""
    path = Path(value)
    return path.relative_to(ROOT).as_posix() if path.is_absolute() and path.is_relative_to(ROOT) else value
