"""Runs the notebooks in order, headless: `python -m sketchkv.study.run` (or `make reproduce`).

A notebook counts as done once it has run to its end and written its provenance. It is skipped as long as its source,
its parameters, what it imports of the package, the model and the data are what they were, and all its outputs are still in
place.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import time
from pathlib import Path

import papermill
from filelock import FileLock, Timeout
from nbclient.output_widget import OutputWidget
from papermill.exceptions import PapermillExecutionError

from sketchkv.corpus import CorpusError
from sketchkv.loading import LoadError
from sketchkv.study import closure, record, sources
from sketchkv.study import notebooks as notebook_files

# Errors whose messages name the way out: the traceback stays in the notebook.
_SAYS_ALL = ("CorpusError", "GridError", "KnobError", "LoadError", "ReportError", "WriteError")

# nbclient answers the kernel for each output of a widget, and the kernel may then overlook the next cell, for which
# the run would wait forever (nbclient issue 312). The executed notebook holds what widgets show without the answers.
OutputWidget.send = lambda *_, **__: None  # type: ignore[method-assign]

KNOBS = ("model", "dataset", "device", "profile")


class RunError(RuntimeError):
    """The study stopped; the message says where and why."""


def check_parameters(notebook, parameters):
    """Raises RunError for a parameter that the notebook does not declare, which papermill would only warn of and ignore."""
    declared = notebook_files.parameters(notebook)
    unknown = sorted(set(parameters) - set(declared))
    if unknown:
        raise RunError(
            f"{notebook.name} has no parameter {', '.join(unknown)}; its cell tagged `parameters` declares: "
            f"{', '.join(sorted(declared)) or 'nothing'}{sources.did_you_mean(unknown[0], declared)}"
        )


def key(notebook, parameters):
    """Hash of everything that a notebook's results follow from, what it reads from earlier notebooks aside."""
    names = (n.name for n in notebook_files.find(notebook.parent.parent))
    identity = {
        "source": [(c.cell_type, c.source) for c in notebook_files.cells(notebook)],
        "parameters": parameters,
        "package": closure.of_notebook(notebook),
        "model": sources.model_revision(parameters.get("model", "embedded")),
        "data": sources.data_revision(parameters.get("dataset", "embedded")),
        "versions": sources.versions(),
        # A notebook added ahead of this one may be among its sources.
        "before": list(itertools.takewhile(lambda name: name != notebook.name, names)),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _mark(notebook, root):
    return Path(root) / "build" / "done" / f"{notebook.stem}.json"


def is_done(notebook, parameters, root):
    """Whether an earlier run with the same key finished, and its outputs and sources are what they were then."""
    try:
        mark = sources.read_json(_mark(notebook, root))
    except (FileNotFoundError, ValueError):
        return False
    files = {**mark["reads"], **mark["outputs"]}
    return mark["key"] == key(notebook, parameters) and all(
        (Path(root) / name).exists() and sources.sha256(Path(root) / name) == digest
        for name, digest in files.items()
    )


def isolate():
    """Makes the kernel `python3` the running environment's own, and the run blind to the user's settings.

    A kernel of the same name in the user's home, a startup script of IPython or an inherited matplotlib backend would
    change the results; nothing is written to the home folder either.
    """
    private = sources.ROOT / "build" / "jupyter"
    (private / "ipython").mkdir(parents=True, exist_ok=True)
    os.environ.pop("JUPYTER_PATH", None)
    os.environ.update(
        JUPYTER_PREFER_ENV_PATH="1",
        JUPYTER_DATA_DIR=str(private),
        IPYTHONDIR=str(private / "ipython"),
        MPLBACKEND="module://matplotlib_inline.backend_inline",
        PYTHONHASHSEED="0",
    )
    # Each process loads the model: its progress, and advice on padding that no text here has, would hide the study's own.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def execute(notebook, parameters, root):
    """Runs one notebook in its own folder and marks it done.

    On success the executed notebook is `build/executed/NAME.ipynb`; on failure what there is of it stays as
    `NAME.failed.ipynb`, and RunError carries the cell's source and error.
    """
    check_parameters(notebook, parameters)
    mark = _mark(notebook, root)
    executed = Path(root) / "build" / "executed" / notebook.name
    partial, failed = executed.with_suffix(".partial.ipynb"), executed.with_suffix(".failed.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    for stale in (mark, executed, failed, partial):
        stale.unlink(missing_ok=True)
    identity, began = key(notebook, parameters), time.time()
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            parameters=parameters,
            cwd=notebook.parent,
            kernel_name="python3",
            language="python",
            progress_bar={"leave": False, "disable": None},  # None: only on a terminal
            stderr_file=sys.stderr if sys.stderr.isatty() else None,
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except BaseException as error:
        if partial.exists():
            os.replace(partial, failed)
        if isinstance(error, PapermillExecutionError):
            raise RunError(_describe(error, notebook, failed)) from None
        if isinstance(error, OSError):
            raise RunError(
                f"{notebook.name} stopped: {sources.cannot_write(error.filename or executed, error)}"
            ) from error
        if isinstance(error, Exception):
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"{notebook.name} stopped: {reason}\npartial output: {failed}") from error
        raise
    provenance = record.provenance_path(root, notebook.stem)
    facts = sources.read_json(provenance) if provenance.exists() else {"finished": 0}
    if facts["finished"] < began:
        os.replace(partial, failed)
        raise RunError(f"{notebook.name} ran, but never called run.finish(): its results are not complete")
    sources.atomic_write(
        mark, sources.to_json({"key": identity, "reads": facts["reads"], "outputs": facts["outputs"]})
    )
    os.replace(partial, executed)


def _describe(error, notebook, failed):
    ending = f"partial output: {failed}\nfinished notebooks are kept; run the same command again to go on from here"
    if error.ename in _SAYS_ALL:
        return f"{notebook.name}: {error.evalue}\n\n{ending}"
    trace = "\n".join(error.traceback) or f"{error.ename}: {error.evalue}"
    if not sys.stderr.isatty():
        trace = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    source = "\n".join(f"    {line}" for line in error.source.splitlines())
    return f"{notebook.name} failed in cell [{error.exec_count}]:\n\n{source}\n\n{trace}\n\n{ending}"


@contextlib.contextmanager
def alone(root):
    """Holds the lock of `root`; RunError names the process that has it. A killed process loses it by itself."""
    build = Path(root) / "build"
    build.mkdir(parents=True, exist_ok=True)
    holder = build / "reproduce.pid"
    lock = FileLock(build / "reproduce.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "unknown"
        raise RunError(
            f"another run is at work in this folder (process {who}); wait for it, or stop it"
        ) from None
    try:
        holder.write_text(f"{os.getpid()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def check_writable(root):
    """Raises RunError unless the folders of results, or what there is above them, can be written to."""
    paths = record.Paths(root)
    for folder in (paths.results, paths.figures, paths.report, paths.root / "build"):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise RunError(
                f"results can't be written to {folder}: make {there} a folder that you may write to"
            )


def reproduce(notebooks, parameters, root=sources.ROOT, force=False):
    """Runs `notebooks` in order with the same parameters, skipping what is done; stops at the first that fails."""
    isolate()
    for notebook in notebooks:
        check_parameters(notebook, parameters)  # before hours of work, not after
    check_writable(root)
    with alone(root):
        record.remove_leftovers(root)
        for number, notebook in enumerate(notebooks, 1):
            label = f"[{number}/{len(notebooks)}] {notebook.stem}"
            if not force and is_done(notebook, parameters, root):
                print(f"{label}: up to date", flush=True)
                continue
            print(f"{label}: running ...", flush=True)
            clock = time.monotonic()
            execute(notebook, parameters, root)
            print(f"{label}: done in {time.monotonic() - clock:.0f} s", flush=True)


def notebook_named(name, root):
    """The notebook that `name` says: its stem, with or without the number, or an unambiguous beginning of it."""
    stems = {n.stem: n for n in notebook_files.find(root)}
    asked = name.removesuffix(".ipynb")
    words = [stem.partition("_")[2] for stem in stems]
    both = zip(stems, words)
    found = [stem for stem, word in both if asked and (stem.startswith(asked) or word.startswith(asked))]
    if len(found) != 1:
        near = "" if found else sources.did_you_mean(asked, [*stems, *words])
        raise RunError(
            f"{name!r} names {len(found) or 'no'} notebooks; there are: {', '.join(stems) or 'none'}{near}"
        )
    return stems[found[0]]


def notebook_of_figure(name, root):
    """The notebook whose source draws the figure `name`."""
    name = Path(name).stem
    drawn = {figure: n for n in notebook_files.find(root) for figure in notebook_files.makes(n, "figure")}
    if name not in drawn:
        known = f"{', '.join(sorted(drawn)) or 'none'}{sources.did_you_mean(name, drawn)}"
        raise RunError(f"no notebook draws figure {name!r}; there are: {known}")
    return drawn[name]


def own_parameters(assignments):
    """`{name: value}` of `NAME=VALUE` texts, values read as JSON or else as text."""
    parameters = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise RunError(f"-p takes NAME=VALUE, not {assignment!r}")
        if name in KNOBS:
            raise RunError(f"{name} is no parameter of a notebook's own: set it by --{name}")
        if name == "output":
            raise RunError("where results go follows from the profile, the model and the dataset")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        parameters[name] = value
    return parameters


def main(arguments=None, root=sources.ROOT):
    parser = argparse.ArgumentParser(prog="python -m sketchkv.study.run", description=__doc__.splitlines()[0])
    for name, default, told in (
        ("--model", "embedded", "embedded, a hub name such as gpt2, or a local folder"),
        ("--dataset", "embedded", "embedded, wikitext-2-raw-v1, or a text file or folder"),
        ("--device", "auto", ", ".join(sources.DEVICES)),
        ("--profile", "study", "study, or smoke, which writes to build/smoke alone"),
        ("--only", None, "run one notebook, named by its stem or number"),
        ("--figure", None, "run the notebook that draws this figure"),
    ):
        parser.add_argument(name, default=default, help=told)
    parser.add_argument("--force", action="store_true", help="run again what is done already")
    own = "a parameter of the notebook's own, NAME=VALUE (repeatable)"
    parser.add_argument("-p", metavar="NAME=VALUE", action="append", default=[], dest="own", help=own)
    args = parser.parse_args(arguments)
    parameters = {knob: getattr(args, knob) for knob in KNOBS}
    try:
        sources.check_knobs(**parameters)
        for knob in ("model", "dataset"):
            # The notebooks run in their own folder, where a relative path would lead astray.
            if parameters[knob] not in ("embedded", *sources.DATASETS, *sources.HUB_MODELS):
                path = Path(parameters[knob]).expanduser()
                parameters[knob] = str(path.resolve()) if path.exists() else parameters[knob]
        output = record.home(parameters["model"], parameters["dataset"], args.profile, root)
        parameters |= {"output": str(output), **own_parameters(args.own)}
        notebooks = notebook_files.find(root)
        if not notebooks:
            raise RunError(f"there are no notebooks in {Path(root) / 'notebooks'}")
        if args.only is not None:
            notebooks = [notebook_named(args.only, root)]
        elif args.figure is not None:
            notebooks = [notebook_of_figure(args.figure, root)]
        reproduce(notebooks, parameters, output, args.force)
        if output != Path(root):
            print(
                f"tables, figures and report of this run are in {output}; the committed ones are what they were",
                flush=True,
            )
    except sources.KnobError as error:
        parser.error(str(error))
    except (RunError, LoadError, CorpusError, OSError) as error:
        file = getattr(error, "filename", None)
        print(f"\nerror: {sources.cannot_write(file, error) if file else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
