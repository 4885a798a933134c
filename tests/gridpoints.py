"""Functions that dask workers import by name."""

import os
from pathlib import Path


def share(width, log=None):
    if log:
        with open(log, "a") as file:
            file.write(f"{width}\n")
    return {"nll": width / 3}


def refuse(width):
    raise ValueError("the width is not to its liking")


def not_a_number(width):
    return {"nll": float("nan")}


def lose_its_worker_once(width, marker):
    if not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return {"nll": width / 3}


def kill_everything(width, marker):
    """The third point takes the whole process group with it, as `kill -9` during a sweep does."""
    if width == 3 and not Path(marker).exists():
        while len(list(Path(marker).parent.rglob("*.json"))) < 2:
            pass
        Path(marker).touch()
        os.killpg(os.getpgid(0), 9)
    return {"nll": width / 3}
