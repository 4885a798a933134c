"""Grid points: computed once, kept whatever happens, the same wherever they ran."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import gridpoints
import pytest

from sketchkv.study import closure
from sketchkv.study import store as grid

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv(grid.ADDRESS, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """A scheduler in this process: workers that need no start."""
    with grid.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        monkeypatch.setenv(grid.ADDRESS, cluster.scheduler_address)
        yield monkeypatch


def asked(folder, widths, function=gridpoints.share, **more):
    own = {k: more.pop(k) for k in ("revision", "workers") if k in more}
    return grid.compute("sweep", function, [{"width": w, **more} for w in widths], folder=folder, **own)


def test_a_point_is_computed_once_per_parameters_source_and_model(tmp_path, quick):
    log = tmp_path / "log"
    log.touch()

    def ask(widths, **more):
        return asked(tmp_path, widths, log=str(log), **more)

    assert ask([64, 128]) == ask([64, 128]) == [{"nll": 64 / 3}, {"nll": 128 / 3}]
    assert sorted(log.read_text().split()) == ["128", "64"]
    assert ask([64, 64]) == [{"nll": 64 / 3}] * 2
    ask([64, 32])
    assert log.read_text().split()[2:] == ["32"]
    ask([64], revision="another model")
    assert log.read_text().split()[3:] == ["64"]
    assert len(list(tmp_path.rglob("*.json"))) == 4
    quick.setattr(closure, "of_function", lambda function: "other source")
    ask([64])
    assert log.read_text().split()[4:] == ["64"]


@pytest.mark.parametrize(
    "damage", [lambda t: t[: len(t) // 2], lambda t: t.replace("0.25", "0.75"), lambda t: "", lambda t: "[]"]
)
def test_corrupted_point_is_named_and_counts_as_missing(tmp_path, damage):
    path, identity = grid.point_path("sweep", {"width": 1}, tmp_path, None, "code")
    grid.write_point(path, identity, {"nll": 0.25})
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=re.escape(path.name)):
        assert grid.read_point(path) is None
    grid.write_point(path, identity, {"nll": 0.25})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert grid.read_point(path) == {"nll": 0.25}


def test_the_table_does_not_depend_on_the_number_of_workers_and_a_lost_worker_is_replaced(tmp_path):
    one = asked(tmp_path / "one", range(1, 6), workers=1)
    marker = tmp_path / "lost"
    two = asked(tmp_path / "two", range(1, 6), gridpoints.lose_its_worker_once, marker=str(marker), workers=2)
    assert marker.exists() and one == two


def test_what_a_point_raises_is_told_with_its_parameters(tmp_path, quick):
    with pytest.raises(grid.GridError, match="'width': 7.*not to its liking"):
        asked(tmp_path, [7], gridpoints.refuse)
    with pytest.raises(ValueError, match="'width': 7"):
        asked(tmp_path, [7], gridpoints.not_a_number)
    assert not list(tmp_path.rglob("*.json"))


def test_an_unreachable_scheduler_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "TIMEOUT", "1s")
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        monkeypatch.setenv(grid.ADDRESS, address)
        with pytest.raises(grid.GridError, match="unset the variable"):
            asked(tmp_path, [1])


def test_a_scheduler_in_the_environment_is_used(tmp_path, quick):
    quick.setattr(grid, "LocalCluster", None)
    assert asked(tmp_path, [1, 2]) == [{"nll": 1 / 3}, {"nll": 2 / 3}]


def test_a_killed_grid_loses_no_finished_point_and_leaves_no_half_file(tmp_path):
    script = textwrap.dedent(f"""
        import gridpoints
        from sketchkv.study import store as grid
        if __name__ == "__main__":
            points = [{{"width": w, "marker": {str(tmp_path / "killed")!r}}} for w in range(1, 5)]
            print(grid.compute("sweep", gridpoints.kill_everything, points, folder={str(tmp_path)!r}, workers=2))
    """)
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py")]
    killed = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=140)
    assert killed.returncode == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(kept) >= 2 and all(json.loads(text)["result"] for text in kept.values())
    again = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=140)
    assert str([{"nll": w / 3} for w in range(1, 5)]) in again.stdout, again.stderr
    assert all(path.read_bytes() == text for path, text in kept.items())
