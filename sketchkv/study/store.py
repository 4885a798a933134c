"""Grid points, computed in parallel through `dask.distributed`, each kept in a file of its own.

A point is known by its parameters, the model's revision and the code that its function reaches by imports
(`closure.of_function`). By default a local cluster computes, one process of one thread per core (one process
on a CUDA device); or the scheduler at `DASK_SCHEDULER_ADDRESS`, whose workers need this package and the
model, but no folder in common with this process. A point computes with one thread wherever it runs, so that
the table does not depend on the number of workers.
"""

import atexit
import hashlib
import json
import os
import tempfile
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from dask.distributed import Client, LocalCluster, as_completed
from tqdm.auto import tqdm

from sketchkv.study import closure, sources

ADDRESS = "DASK_SCHEDULER_ADDRESS"
TIMEOUT = "10s"  # for a scheduler to answer
RETRIES = (
    2  # of a task that failed for reasons of its own; one whose worker was lost is given to another by dask
)


class GridError(RuntimeError):
    """The grid can't be computed as asked; the message says what to do."""


def point_path(kind, params, folder, revision, code):
    """(file, identity) of one grid point: named by a hash over kind, parameters, fingerprint of the code and
    model revision."""
    identity = {"kind": kind, "params": params, "package": code, "model": revision}
    text = json.dumps(identity, sort_keys=True, default=lambda o: o.tolist())
    return Path(folder) / kind / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json", identity


def read_point(path):
    """The result in the file of a grid point, None if there is none. A file that cannot be read back is named
    in a warning and counts as none."""
    if not path.exists():
        return None
    try:
        stored = sources.read_json(path)
        if stored["sha256"] == hashlib.sha256(sources.to_json(stored["result"]).encode()).hexdigest():
            return stored["result"]
        reason = "its checksum does not fit"
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"corrupted result file {path} ({reason}); computing it again", stacklevel=2)
    return None


def write_point(path, identity, result):
    """Writes the file of a grid point atomically; returns the result as it will be read back."""
    try:
        result = json.loads(sources.to_json(result))
    except (ValueError, TypeError, AttributeError) as error:
        raise type(error)(f"grid point {identity['kind']} {identity['params']}: {error}") from error
    checksum = hashlib.sha256(sources.to_json(result).encode()).hexdigest()
    sources.atomic_write(path, sources.to_json({**identity, "result": result, "sha256": checksum}))
    return result


def compute(kind, function, grid, *, folder, revision=None, workers=None):
    """`[function(**params) for params in grid]`, in the order of the grid, in parallel and kept on disk.

    function: importable by name, its parameters and result what JSON can hold. Points that `folder` has are
    read, the others computed, and each is written as soon as it is there: an interrupted grid goes on where
    it stopped. workers: processes of the local cluster (default: one per core).

    Raises GridError for a scheduler that can't be reached or whose workers have another version of the
    package, and for whatever a point raised, with its parameters named.
    """
    code = closure.of_function(function)
    order = [(*point_path(kind, params, folder, revision, code), params) for params in grid]
    done = {path: read_point(path) for path, *_ in order}
    missing = {path: own for path, *own in order if done[path] is None}
    if missing:
        _, first = next(iter(missing.values()))
        with _client(workers or _workers(first), bool(workers)) as client:
            futures = {
                client.submit(_task, function, params, code, key=f"{kind}-{path.stem}", retries=RETRIES): path
                for path, (_, params) in missing.items()
            }
            with tqdm(total=len(done), initial=len(done) - len(missing), desc=kind, disable=None) as bar:
                for future in as_completed(futures, loop=client.loop):
                    path = futures[future]
                    identity, params = missing[path]
                    try:
                        result = future.result()
                    except GridError:
                        raise
                    except Exception as error:
                        raise GridError(
                            f"grid point {kind} {params}: {type(error).__name__}: {error}"
                        ) from error
                    done[path] = write_point(path, identity, result)
                    bar.update()
    return [done[path] for path, *_ in order]


def _workers(params):
    return 1 if params.get("device") == "cuda" else os.cpu_count()


@contextmanager
def _client(workers, own):
    """A client of the scheduler in the environment, or of a cluster on this machine."""
    address = None if own else os.environ.get(ADDRESS)
    try:
        client = Client(address or _cluster(workers), timeout=TIMEOUT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        if not address:
            raise
        raise GridError(
            f"no dask scheduler answers at {ADDRESS}={address!r} ({type(error).__name__}): start one with "
            "`dask scheduler` and `dask worker`, or unset the variable to compute on this machine"
        ) from error
    with client:
        yield client


@lru_cache(maxsize=1)
def _cluster(workers):
    """A local cluster that stays until this process ends: a second grid finds its workers with the model loaded."""
    scratch = tempfile.TemporaryDirectory(prefix="sketchkv-")
    cluster = LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        memory_limit=None,
        dashboard_address=None,
        local_directory=scratch.name,
        silence_logs="ERROR",
    )
    atexit.register(scratch.cleanup)
    atexit.register(cluster.close)
    return cluster


@lru_cache
def _own(function, code):
    """The worker's fingerprint, looked up once for each that the client has."""
    return closure.of_function(function)


def _task(function, params, code):
    """Runs on a worker."""
    if (own := _own(function, code)) != code:
        raise GridError(
            f"a dask worker has another version of the package ({own}, here {code}): restart the workers "
            "with this version"
        )
    torch.set_num_threads(1)
    return function(**params)
