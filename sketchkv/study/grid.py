"""Many grid points at once: through `dask.distributed`, each kept in a file of its own.

By default a local cluster, one process of one thread per core (one process on a CUDA device); or the scheduler at
`DASK_SCHEDULER_ADDRESS`, whose workers need this package and the model, but no folder in common with this process. A
point computes with one thread wherever it runs, so that the table does not depend on the number of workers.
"""

import atexit
import os
import tempfile
from contextlib import contextmanager
from functools import lru_cache

import torch
from dask.distributed import Client, LocalCluster, as_completed
from tqdm.auto import tqdm

from sketchkv.study import results

ADDRESS = "DASK_SCHEDULER_ADDRESS"
TIMEOUT = "10s"  # for a scheduler to answer
RETRIES = 2  # of a task that failed for reasons of its own; one whose worker was lost is given to another by dask


class GridError(RuntimeError):
    """The grid can't be computed as asked; the message says what to do."""


def compute(kind, function, grid, *, folder, revision=None, workers=None):
    """`[function(**params) for params in grid]`, in the order of the grid, in parallel and kept on disk.

    function: importable by name, its parameters and result what JSON can hold. Points that `folder` has are read, the
    others computed, and each is written as soon as it is there: an interrupted grid goes on where it stopped. workers:
    processes of the local cluster (default: one per core).

    Raises GridError for a scheduler that can't be reached or whose workers have another version of the package, and
    whatever a point raised, with its parameters named.
    """
    done, missing, order = {}, {}, []
    for params in grid:
        path, identity = results.point_path(kind, params, folder, revision, function)
        order.append(path)
        if path in done or path in missing:
            continue  # the same point twice is computed once
        stored = results.read_point(path)
        if stored is None:
            missing[path] = params, identity
        else:
            done[path] = stored
    if missing:
        first, _ = next(iter(missing.values()))
        with _client(workers or _workers(first), bool(workers)) as client:
            fingerprint = results.point_fingerprint(function)
            futures = {
                client.submit(_task, function, params, fingerprint, key=f"{kind}-{path.stem}", retries=RETRIES): path
                for path, (params, _) in missing.items()
            }
            with tqdm(total=len(set(order)), initial=len(done), desc=kind, disable=None) as bar:
                for future in as_completed(futures, loop=client.loop):
                    path = futures[future]
                    params, identity = missing[path]
                    try:
                        result = future.result()
                    except GridError:
                        raise
                    except Exception as error:
                        raise GridError(f"grid point {kind} {params}: {type(error).__name__}: {error}") from error
                    done[path] = results.write_point(path, identity, result)
                    bar.update()
    return [done[path] for path in order]


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
            f"no dask scheduler answers at {ADDRESS}={address!r} ({type(error).__name__}): start one with `dask scheduler` "
            "and `dask worker`, or unset the variable to compute on this machine"
        ) from error
    with client:
        yield client


@lru_cache(maxsize=1)
def _cluster(workers):
    """A local cluster that stays until this process ends: a second grid finds its workers with the model loaded."""
    scratch = tempfile.TemporaryDirectory(prefix="sketchkv-")
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, memory_limit=None, dashboard_address=None,
        local_directory=scratch.name, silence_logs="ERROR",
    )  # fmt: skip
    atexit.register(scratch.cleanup)
    atexit.register(cluster.close)
    return cluster


def _task(function, params, fingerprint):
    """Runs on a worker."""
    if (own := results.point_fingerprint(function)) != fingerprint:
        raise GridError(
            f"a dask worker has another version of the package ({own}, here {fingerprint}): restart the workers with "
            "this version"
        )
    torch.set_num_threads(1)
    return function(**params)
