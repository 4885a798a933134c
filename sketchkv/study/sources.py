"""What a result follows from, and how it is kept: the revisions of model, text and sources, versions, and
files that are written whole or not at all."""

import difflib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from sketchkv import loading, texts

ROOT = Path(__file__).resolve().parent.parent.parent

DEVICES = ("auto", "cpu", "cuda")
PROFILES = ("smoke", "study")
DATASETS = texts.NAMED
HUB_MODELS = (*loading.PACKAGED, *(name for name in loading.HUB_REVISIONS if "wikitext" not in name))

# What a run writes.
GENERATED = (
    "data/results",
    "data/model/README.md",
    "figures",
    "report/report.html",
    "report/report.md",
    "report/report.pdf",
)
_VERSIONS = "torch transformers tokenizers numpy pandas scipy dask matplotlib seaborn".split()
_FULL = (errno.ENOSPC, errno.EDQUOT)


class KnobError(ValueError):
    """A knob (MODEL, DATASET, DEVICE, PROFILE) or a parameter of a notebook has a value that does not exist."""

    def _render_traceback_(self):
        """What IPython shows: the message alone."""
        return [f"{type(self).__name__}: {self}"]


class WriteError(OSError):
    """A result can't be written; the message names the file and the way out."""


def did_you_mean(name, names):
    """`"; did you mean 'x'?"` for the nearest of `names`, or nothing."""
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# -- files ---------------------------------------------------------------------------------------------------


def atomic_write(path, content):
    """Writes `content` (str or bytes) so that `path` holds either the old or the new file, never a part of one.

    A killed process may leave a temporary `.NAME.*.tmp` behind, which `record.remove_leftovers` clears;
    readers never see it. Raises WriteError where the file can't be written.
    """
    path = Path(path)
    content = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise WriteError(cannot_write(path, error)) from error
        raise


def cannot_write(path, error):
    """What to tell of an OSError, with its remedy."""
    remedy = (
        "free some space"
        if error.errno in _FULL
        else f"make {Path(path).parent} a folder that you may write to"
    )
    return f"can't write {path} ({error.strerror or error}): {remedy}, then run the same command again"


def to_json(value):
    """JSON text with numpy scalars and arrays as plain numbers; NaN and infinity raise ValueError."""
    return (
        json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=lambda o: o.tolist()) + "\n"
    )


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


# -- knobs and revisions -------------------------------------------------------------------------------------


def check_knobs(model="embedded", dataset="embedded", device="auto", profile="smoke"):
    """Raises KnobError, naming the knob and what it may be, unless all four values exist."""
    for knob, value, allowed in (("DEVICE", device, DEVICES), ("PROFILE", profile, PROFILES)):
        if value not in allowed:
            raise KnobError(
                f"{knob}={value!r} is unknown; allowed: {', '.join(allowed)}{did_you_mean(value, allowed)}"
            )
    if device == "cuda" and not torch.cuda.is_available():
        raise KnobError("DEVICE=cuda, but PyTorch sees no CUDA device here; use DEVICE=cpu or DEVICE=auto")
    if not (
        model in ("embedded", *HUB_MODELS)
        or re.fullmatch(r"[\w./-]+@\w+", model)
        or _is_there(model, "is_dir")
    ):
        raise KnobError(
            f"MODEL={model!r} is unknown; allowed: embedded, {', '.join(HUB_MODELS)}, "
            "any other hub model as name@commit, or an existing local folder in hub layout"
            + did_you_mean(model, ["embedded", *HUB_MODELS])
        )
    if not (dataset in DATASETS or _is_there(dataset, "exists")):
        raise KnobError(
            f"DATASET={dataset!r} is unknown; allowed: {', '.join(DATASETS)}, "
            "or an existing text file or folder" + did_you_mean(dataset, DATASETS)
        )


def _is_there(path, kind):
    return bool(path) and getattr(Path(path).expanduser(), kind)()


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


def portable(value):
    """A path inside the repository is recorded relative to it; names and other paths stay as they are."""
    path = Path(value)
    return path.relative_to(ROOT).as_posix() if path.is_absolute() and path.is_relative_to(ROOT) else value
