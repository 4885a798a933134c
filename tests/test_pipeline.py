"""The study's machinery: knobs, runner, results with provenance, report. Tiny notebooks in a temporary folder."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager
from packaging.requirements import Requirement

from sketchkv.study import (
    closure,
    evaluate,
    figures,
    notebooks,
    record,
    run,
    sources,
    store,
)

ROOT = sources.ROOT
PARAMETERS = (
    'model = "embedded"\ndataset = "embedded"\ndevice = "auto"\nprofile = "smoke"\nseed = 0\noutput = ""'
)
START = """from sketchkv.study import record
run = record.start("{name}", model=model, dataset=dataset, device=device, profile=profile, seed=seed, output=output)
"""


@pytest.fixture(autouse=True)
def same_environment():
    """The runner sets variables for its kernels; other tests must not see them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def write_notebook(root, name, *cells):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path = Path(root) / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    return path


def write_results(root):
    """A finished run with a table, a figure and a fact, without a kernel."""
    started = record.start("01_tiny", output=str(root))
    frame = pd.DataFrame({"width": [64, 128], "error": [0.25, 1 / 3], "seconds": [0.5, 0.6]})
    columns = {"width": "counters per row", "error": "share of the mass", "seconds": "seconds"}
    started.table("error", frame, columns, timings=["seconds"])
    fig, ax = plt.subplots(figsize=(2, 1.5))
    ax.plot(frame.width, frame.error, **figures.method_style("sketch"))
    ax.fill_between(frame.width, frame.error)
    started.figure(
        "error", fig, caption="The error falls with the width. One point is one width.", tables=["error"]
    )
    started.fact("share", 0.1234)
    started.finish(dtype="float32")
    return started


@pytest.fixture(scope="module")
def _finished(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def finished(_finished, tmp_path):
    """A folder with the results of `write_results`."""
    shutil.copytree(_finished.paths.root, tmp_path, dirs_exist_ok=True)
    return tmp_path


# -- knobs and runner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, allowed",
    [
        (["--profile", "tiny"], "smoke, study"),
        (["--device", "gpu"], "auto, cpu, cuda"),
        (["--model", "embeded"], "gpt2"),
        (["--model", "owner/name"], "name@commit"),
        (["--dataset", "wikitext"], "wikitext-2-raw-v1"),
        (["--only", "99"], "01_tiny"),
        (["--figure", "none"], "drawn"),
        (["--only", "01", "-p", "typo=7"], "profile"),
        (["--only", "01", "-p", "sede=7"], "did you mean 'seed'?"),
        (["--only", ""], "01_tiny"),
        (["--only", "tyny"], "did you mean 'tiny'?"),
        (["--figure", "drown.svg"], "did you mean 'drawn'?"),
        (["--figure", ""], "drawn"),
        (["--profile", "studdy"], "did you mean 'study'?"),
        (["--model", "gtp2"], "did you mean 'gpt2'?"),
        (["-p", "seed"], "NAME=VALUE"),
        (["-p", "profile=smoke"], "--profile"),
        (["-p", "output=elsewhere"], "follows from the profile"),
    ],
)
def test_unknown_value_is_an_error_that_lists_the_allowed(tmp_path, capsys, monkeypatch, arguments, allowed):
    write_notebook(tmp_path, "01_tiny", 'run.figure("drawn", fig)')
    monkeypatch.setattr(run.papermill, "execute_notebook", lambda *a, **k: pytest.fail("ran all the same"))
    try:
        code = run.main(arguments, root=tmp_path)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code != 0 and "error" in printed and allowed in printed
    assert not (tmp_path / "build" / "done").exists()


def test_study_runs_resumes_and_stops_at_a_failing_cell(tmp_path, capsys, monkeypatch):
    table = 'import pandas as pd\nrun.table("t", pd.DataFrame({"a": [seed]}), {"a": "the seed"})\nrun.fact("a", 1)'
    first = write_notebook(tmp_path, "01_first", START.format(name="01_first") + table, "run.finish()")
    failing = write_notebook(
        tmp_path, "02_failing", "x = 40", "print('got here')\nraise ValueError(f'boom {x + 2}')"
    )
    write_notebook(tmp_path, "03_never", "raise SystemError('ran after a failure')")
    monkeypatch.setattr(closure, "of_notebook", lambda _: "fixed")
    assert run.main(["--profile", "smoke"], root=tmp_path) == 1

    output = tmp_path / "build" / "smoke"  # a smoke run leaves everything else alone
    assert {p.name for p in tmp_path.iterdir()} == {"build", "notebooks"}
    printed = capsys.readouterr()
    assert "raise ValueError(f'boom {x + 2}')" in printed.err and "ValueError: boom 42" in printed.err
    assert "02_failing" in printed.err and "[1/3] 01_first: done" in printed.out
    executed = {p.name for p in (output / "build" / "executed").iterdir()}
    assert executed == {"01_first.ipynb", "02_failing.failed.ipynb"}
    assert "got here" in (output / "build" / "executed" / "02_failing.failed.ipynb").read_text()
    assert {p.name for p in (output / "build" / "done").iterdir()} == {"01_first.json"}
    assert record.load_table("t", output)["a"].tolist() == [0]

    # Resumed: the first is left alone, and no longer once anything that it follows from is different.
    ran = []
    monkeypatch.setattr(run, "execute", lambda notebook, *_: ran.append(notebook.stem))
    monkeypatch.setattr(run, "isolate", lambda: None)
    assert run.main(["--profile", "smoke"], root=tmp_path) == 0
    assert ran == ["02_failing", "03_never"]
    parameters = {"model": "embedded", "dataset": "embedded", "device": "auto", "profile": "smoke"}
    parameters["output"] = str(output)
    assert run.is_done(first, parameters, output)
    assert not run.is_done(first, parameters | {"profile": "study"}, output)
    assert not run.is_done(failing, parameters, output)
    for module, name in (
        (closure, "of_notebook"),
        (sources, "versions"),
        (sources, "model_revision"),
        (sources, "data_revision"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, lambda *_: "other")
            assert not run.is_done(first, parameters, output)
    table_file = output / "data" / "results" / "t.csv"
    content = table_file.read_text()
    table_file.write_text("a\n7\n")
    assert not run.is_done(first, parameters, output)
    table_file.unlink()
    assert not run.is_done(first, parameters, output)
    table_file.write_text(content)
    assert run.is_done(first, parameters, output)
    write_notebook(tmp_path, "01_first", START.format(name="01_first") + table + "  # edited", "run.finish()")
    assert not run.is_done(first, parameters, output)


def test_bad_input_is_told_without_a_traceback(tmp_path, capsys):
    source = "from types import SimpleNamespace\nfrom sketchkv import texts\n"
    write_notebook(
        tmp_path, "01_tiny", source + "texts.documents(dataset, SimpleNamespace(bos_token_id=None))"
    )
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert run.main(["--dataset", str(empty)], root=tmp_path) == 1
    printed = capsys.readouterr().err
    assert f"{empty} is empty" in printed and "DATASET=embedded" in printed and "Traceback" not in printed
    (kept,) = (tmp_path / "build").rglob("01_tiny.failed.ipynb")
    assert "Traceback" in kept.read_text()


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    write_notebook(tmp_path, "01_tiny", "")
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("ran all the same"))
    (tmp_path / "data").write_text("a file where a folder should be")
    assert run.main([], root=tmp_path) == 1
    assert f"make {tmp_path / 'data'} a folder that you may write to" in capsys.readouterr().err
    (tmp_path / "data").unlink()
    monkeypatch.setattr(run.os, "access", lambda path, _: Path(path) != tmp_path)  # a read-only file system
    assert run.main([], root=tmp_path) == 1
    assert f"make {tmp_path} a folder" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file_and_the_remedy(tmp_path, capsys, monkeypatch):
    notebook = write_notebook(tmp_path, "01_tiny", "")

    def execute(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "the notebook")

    monkeypatch.setattr(run.papermill, "execute_notebook", execute)
    assert run.main([], root=tmp_path) == 1
    printed = capsys.readouterr().err
    assert (
        "can't write the notebook (No space left on device): free some space" in printed
        and notebook.name in printed
    )
    assert "Traceback" not in printed

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources.os, "fsync", fsync)
    with pytest.raises(
        sources.WriteError, match="can't write .*/t.csv .*No space left.*: free some space, then run"
    ):
        sources.atomic_write(tmp_path / "results" / "t.csv", "x")
    assert list((tmp_path / "results").iterdir()) == []
    with pytest.raises(sources.WriteError, match=f"make {re.escape(str(notebook / 'results'))} a folder"):
        sources.atomic_write(notebook / "results" / "t.csv", "x")
    assert run._SAYS_ALL.count("WriteError") == 1


def test_a_smoke_run_leaves_the_study_alone_and_says_so(tmp_path):
    """Two notebooks as `make reproduce` and `make figures/NAME.svg` run them, in a folder with results of a study."""
    draw = """import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot([0, seed])
run.figure("drawn", fig, caption="It rises.")
run.finish()"""
    write_notebook(tmp_path, "01_tiny", START.format(name="01_tiny") + draw)
    write_notebook(tmp_path, "02_other", START.format(name="02_other") + "run.fact('a', 1)\nrun.finish()")
    for name in ("figures/drawn.svg", "data/results/facts_02_other.json", "report/report.md"):
        sources.atomic_write(tmp_path / name, "the study's")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run.main(["--profile", "smoke", "--figure", "drawn"], root=tmp_path) == 0
    assert run.main(["--profile", "smoke"], root=tmp_path) == 0
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path).parts[0] for p in set(after) - set(before)} == {"build"}
    assert {p: after[p] for p in before} == before
    smoke = tmp_path / "build" / "smoke"
    assert ">smoke: no conclusions<" in (smoke / "figures" / "drawn.svg").read_text()
    ignored = subprocess.run(["git", "check-ignore", "-q", "build/smoke/figures/drawn.svg"], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: this is no checkout


def test_a_study_of_another_text_leaves_the_committed_one_alone(tmp_path):
    text = tmp_path / "my text.txt"
    text.write_text("Of another study. " * 50)
    cell = "import pandas as pd\nrun.table('t', pd.DataFrame({'n': [1]}), {'n': 'number'})\nrun.finish()"
    write_notebook(tmp_path, "01_tiny", START.format(name="01_tiny") + cell)
    sources.atomic_write(tmp_path / "data/results/t.csv", "the study's")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert run.main(["--dataset", str(text)], root=tmp_path) == 0
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.relative_to(tmp_path).parts[0] for p in set(after) - set(before)} == {"build"}
    assert {p: after[p] for p in before} == before
    home = record.home("embedded", str(text), "study", tmp_path)
    assert record.load_table("t", home).n.tolist() == [1]
    assert sources.read_json(home / "data/results/t.json")["command"].startswith("make reproduce DATASET=")


def test_every_study_but_the_default_has_a_folder_of_its_own(tmp_path):
    assert record.home("embedded", "embedded", "study") == ROOT
    models, texts = (
        ("embedded", "gpt2", "a/b@0123", "/models/gpt2", "..", "/" + "m" * 300),
        ("embedded", "/t.txt"),
    )
    homes = [record.home(m, t, "study", tmp_path) for m in models for t in texts][1:]
    assert homes[1] == tmp_path / "build" / "gpt2-embedded" and len(set(homes)) == len(homes)
    assert {home.parent for home in homes} == {tmp_path / "build"}
    assert {record.home(m, t, "smoke", tmp_path) for m in models for t in texts} == {tmp_path / "build/smoke"}
    for home in homes:
        home.mkdir(parents=True)


def test_a_mistyped_parameter_in_a_first_cell_run_by_hand_is_told(monkeypatch):
    path = run.notebook_named("02", ROOT)
    (first,) = (c.source for c in notebooks.cells(path) if "parameters" in c.tags)
    shell = SimpleNamespace(user_ns={"In": ["", first, "injected = 3", 'profile = "smoke"\noutput = ""']})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    record.start(path.stem)
    shell.user_ns["In"].append(first + "\nevict_evry = 32")
    with pytest.raises(sources.KnobError, match="reads evict_evry.*did you mean 'evict_every'"):
        record.start(path.stem)
    for seed in ("abc", -1, 1.5, True):
        with pytest.raises(sources.KnobError, match="whole number of 0 or more"):
            record.start("01_tiny", seed=seed)


def test_the_kernel_gets_no_answer_for_what_a_widget_shows():
    """An answer beside the next cell may leave both without a reply, and the run waiting."""
    widget = run.OutputWidget("a", {"outputs": []}, None, None)  # no way to the kernel
    content = {"name": "stdout", "text": "seen"}
    widget.output([], {"header": {"msg_type": "stream"}, "parent_header": {}, "content": content}, None, 0)
    assert widget.outputs[0]["text"] == "seen"


def test_every_parameter_of_a_notebook_is_read_by_it():
    for path in notebooks.find(ROOT):
        first = [c.source for c in notebooks.cells(path) if "parameters" in c.tags]
        assert first and notebooks.unread(path, first) == [], path.name


def test_a_changed_source_table_makes_its_reader_run_again(finished, tmp_path, monkeypatch):
    reader = write_notebook(tmp_path, "02_reader", "")

    def execute(_, partial, **__):
        opened = record.start("02_reader", output=str(tmp_path))
        opened.load_table("error")
        opened.finish()
        partial.write_text("{}")

    monkeypatch.setattr(run.papermill, "execute_notebook", execute)
    run.execute(reader, {}, tmp_path)
    assert run.is_done(reader, {}, tmp_path)
    table = tmp_path / "data" / "results" / "error.csv"
    table.write_text(table.read_text().replace("0.25", "0.5"))
    assert not run.is_done(reader, {}, tmp_path)


def test_notebook_that_never_finishes_its_run_is_not_done(tmp_path, monkeypatch):
    notebook = write_notebook(tmp_path, "01_tiny", "")
    monkeypatch.setattr(run.papermill, "execute_notebook", lambda _, partial, **__: partial.write_text("{}"))
    with pytest.raises(run.RunError, match="finish"):
        run.execute(notebook, {}, tmp_path)
    assert not run.is_done(notebook, {}, tmp_path)
    assert (tmp_path / "build" / "executed" / "01_tiny.failed.ipynb").exists()


def test_kernel_in_the_users_home_is_not_taken(tmp_path):
    for folder in ("path", "home"):
        kernel = tmp_path / folder / "kernels" / "python3"
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(
            json.dumps({"argv": ["false"], "display_name": "x", "language": "python"})
        )
    os.environ.update(JUPYTER_PATH=str(tmp_path / "path"), JUPYTER_DATA_DIR=str(tmp_path / "home"))
    assert KernelSpecManager().get_kernel_spec("python3").argv == ["false"]
    run.isolate()
    assert Path(KernelSpecManager().get_kernel_spec("python3").resource_dir).is_relative_to(sys.prefix)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_kill_in_the_middle_of_a_write_leaves_the_old_file_and_frees_the_lock(tmp_path):
    target = tmp_path / "data" / "results" / "t.csv"
    sources.atomic_write(target, "old")
    child = os.fork()
    if child == 0:  # writes the temporary file, then waits to be killed
        sources.os.fsync = lambda _: (target.with_name("writing").touch(), time.sleep(60))
        with run.alone(tmp_path):
            sources.atomic_write(target, "new" * 100_000)
        os._exit(1)
    while not target.with_name("writing").exists():
        time.sleep(0.01)
    with pytest.raises(run.RunError, match=str(child)):
        with run.alone(tmp_path):
            pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    target.with_name("writing").unlink()
    assert target.read_text() == "old" and len(list(target.parent.iterdir())) == 2
    with run.alone(tmp_path):
        record.remove_leftovers(tmp_path)
    assert [p.name for p in target.parent.iterdir()] == ["t.csv"]


def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    sources.atomic_write(tmp_path / "f", "old")
    monkeypatch.setattr(sources.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sources.atomic_write(tmp_path / "f", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_same_inputs_give_the_same_bytes(tmp_path):
    figures.use_style()
    for name in ("a", "b"):
        write_results(tmp_path / name)
    for file in ("data/results/error.csv", "data/results/error.json", "figures/error.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_text_in_a_figure_is_text_and_many_points_become_a_picture():
    figures.use_style()
    sizes = []
    for count in (10, 100_000):
        fig, ax = plt.subplots()
        ax.scatter(range(count), torch.rand(count, generator=torch.Generator().manual_seed(0)))
        ax.set_xlabel("tokens of the prefix")
        svg = figures.render(fig, "many").decode()
        plt.close(fig)
        assert ">tokens of the prefix</text>" in svg and "'DejaVu Sans', 'Verdana'" in svg
        assert ("data:image/png" in svg) == (count > 10)
        sizes.append(len(svg))
    assert sizes[0] < 20_000 and sizes[1] < figures.HEAVY


def test_two_runs_give_identical_quality_tables(tmp_path):
    methods = [
        {"method": "sketch", "max_cache_size": 32, "recent_window": 8, "seed": 1},
        {"method": "random", "max_cache_size": 32, "recent_window": 8, "seed": 1},
        {"method": "h2o", "max_cache_size": 32, "recent_window": 8, "summary_slots": 4},
    ]
    grid_points = [{"method": method, "documents": 2, "length": 160} for method in methods]

    def write(root, parts):
        opened = record.start("03_tiny", output=str(root))
        table = pd.concat(
            [pd.DataFrame(part).assign(method=i) for i, part in enumerate(parts)], ignore_index=True
        )
        opened.table("quality", table, evaluate.COLUMNS | {"method": "index"})
        return record.load_table("quality", root)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker does
    try:
        here = write(tmp_path / "a", [evaluate.evaluate(**params) for params in grid_points])
    finally:
        torch.set_num_threads(threads)
    elsewhere = store.compute(
        "quality", evaluate.evaluate, grid_points, folder=tmp_path / "points", workers=1
    )
    pd.testing.assert_frame_equal(here, write(tmp_path / "b", elsewhere), check_exact=True)
    assert (here.evicted > 0).all() and here.groupby("method").nll.mean().is_unique


def test_two_runs_of_the_study_give_identical_tables(tmp_path):
    """Notebook 05 at smoke size, as `make reproduce` runs it: own kernel, own workers, nothing kept from the first run."""
    notebook = run.notebook_named("05", sources.ROOT)
    for name in ("a", "b"):
        knobs = {**record.MAKE_DEFAULTS, "device": "cpu", "profile": "smoke", "output": str(tmp_path / name)}
        run.reproduce([notebook], knobs, tmp_path / name)
    tables = sorted(path.stem for path in (tmp_path / "a" / "data" / "results").glob("*.csv"))
    assert "baselines" in tables
    for table in tables:
        first, second = (record.load_table(table, tmp_path / name) for name in ("a", "b"))
        pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_sidecars_say_where_a_result_comes_from(finished, tmp_path):
    sidecar = sources.read_json(tmp_path / "figures" / "error.json")
    assert sidecar["notebook"] == "01_tiny" and sidecar["inputs"]["profile"] == "smoke" and sidecar["commit"]
    assert sidecar["command"] == "make figures/error.svg PROFILE=smoke"
    assert sidecar["tables"] == {"error": sources.sha256(tmp_path / "data" / "results" / "error.csv")}
    assert record.load_table("error", tmp_path)["error"][1] == 1 / 3


def test_committed_figures_say_where_they_come_from():
    pictures = sorted((ROOT / "figures").glob("*.svg"))
    assert pictures
    for picture in pictures:
        sidecar = sources.read_json(picture.with_suffix(".json"))
        assert {"caption", "notebook", "inputs", "commit", "command", "tables"} <= set(sidecar), picture.name
        assert (ROOT / "notebooks" / f"{sidecar['notebook']}.ipynb").exists(), picture.name
        assert f"figures/{picture.name}" in sidecar["command"]
        for table, digest in sidecar["tables"].items():
            source = ROOT / "data" / "results" / f"{table}.csv"
            assert sources.sha256(source) == digest, f"{picture.name} was not drawn from today's {table}"


def test_bad_results_are_refused(tmp_path):
    opened = record.start("01_tiny", output=str(tmp_path))
    frame = pd.DataFrame({"a": [1]})
    with pytest.raises(ValueError, match="without a description.*'a'"):
        opened.table("t", frame, {})
    with pytest.raises(ValueError, match="without a column.*'b'"):
        opened.table("t", frame, {"a": "A", "b": "B"})
    with pytest.raises(ValueError, match="rows: 0"):
        opened.table("t", frame[:0], {"a": "A"})
    with pytest.raises(ValueError, match="reset_index"):
        opened.table("t", frame.set_index("a", drop=False), {"a": "A"})
    with pytest.raises(ValueError, match="no notebook has written"):
        opened.figure("f", plt.figure(), caption="x", tables=["absent"])
    opened.fact("f", float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        opened.finish()
    assert not (tmp_path / "data").exists() and not (tmp_path / "figures").exists()


def test_finish_removes_what_the_notebook_no_longer_makes(finished):
    opened = record.start("02_other", output=str(finished))
    opened.fact("other", 1)
    opened.finish()
    opened = record.start("01_tiny", output=str(finished))
    opened.fact("share", 1)
    opened.finish()
    left = {p.name for p in finished.rglob("*") if p.is_file()}
    assert left == {"facts_01_tiny.json", "run_01_tiny.json", "facts_02_other.json", "run_02_other.json"}


# -- make and the pins ------------------------------------------------------------------------------------------------


def test_one_list_of_pins():
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)  # a pin for one platform says so behind a semicolon
            (only,) = pin.specifier
            assert only.operator == "==", line
            pins[pin.name.lower().replace("_", "-")] = only.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {Requirement(text).name for text in project["dependencies"]}
    assert core == {"torch", "transformers", "tokenizers", "safetensors", "numpy"}
    for text in sum(project["optional-dependencies"].values(), [*project["dependencies"], "setuptools"]):
        needed = Requirement(text)
        assert needed.specifier.contains(pins[needed.name.lower()]), text
    conda = (ROOT / "environment.yml").read_text()
    assert "- -r requirements.lock" in conda and "==" not in conda and "python=3.11" in conda
    assert (
        "-r requirements.lock" in (ROOT / "Makefile").read_text()
        and "==" not in (ROOT / "Makefile").read_text()
    )


def make(folder, *arguments):
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_help_lists_every_target_and_knob(copy):
    printed = make(copy).stdout
    for target in (
        "reproduce",
        "lab",
        "test",
        "test-oldest",
        "lint",
        "model",
        "figures/NAME.svg",
        "clean",
        "env",
    ):
        assert f"make {target} " in printed
    for knob in ("MODEL=", "DATASET=", "DEVICE=", "PROFILE="):
        assert knob in printed
    assert not (copy / ".venv").exists()


def test_make_passes_the_knobs_on(copy):
    planned = make(copy, "-n", "reproduce", "PROFILE=smoke", "MODEL=gpt2", "DATASET=my text").stdout
    assert "--model 'gpt2' --dataset 'my text' --device 'auto' --profile 'smoke'" in planned
    assert "--figure 'error'" in make(copy, "-n", "figures/error.svg").stdout


def test_make_lab_passes_arguments_on_and_says_what_root_can_do(copy):
    planned = make(copy, "-n", "lab", "ARGS=--port 9999 --no-browser").stdout
    assert "-m jupyterlab --notebook-dir=notebooks --port 9999 --no-browser" in planned
    lab = re.search(r"^lab:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[0].replace(
        "$(READY)", ""
    )
    for root, arguments, starts in ((True, "", False), (True, "--allow-root", True), (False, "", True)):
        (copy / "id").write_text(f"#!/bin/sh\necho {0 if root else 1000}\n")
        (copy / "python").write_text("#!/bin/sh\necho started $@\n")
        for name in ("id", "python"):
            (copy / name).chmod(0o755)
        (copy / "Lab").write_text(f"BIN := .\nIPYTHONDIR := build\n{lab}")
        environment = {**os.environ, "PATH": f"{copy}:{os.environ['PATH']}"}
        command = ["make", "-f", "Lab", "lab", f"ARGS={arguments}"]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
        assert (done.returncode == 0) == starts == ("started -m jupyterlab" in done.stdout), done.stderr
        assert starts or 'make lab ARGS="--allow-root' in done.stderr


def test_missing_python_is_an_error_that_names_the_fix(copy):
    done = make(copy, "env", "PYTHON=python-that-is-not-there")
    assert done.returncode != 0 and "PYTHON=" in done.stderr and not (copy / ".venv").exists()


def test_make_clean_keeps_results_and_checkpoints(copy):
    kept = ["figures/a.png", "data/results/a.csv", "report/report.md", "build/training/checkpoint.pt"]
    for name in [*kept, "build/done/a.json", "build/interactive/a"]:
        sources.atomic_write(copy / name, "x")
    assert make(copy, "clean").returncode == 0
    assert all((copy / name).exists() for name in kept)
    assert [p.name for p in (copy / "build").iterdir()] == ["training"]
