"""C that is compiled where it runs, once for each set of constants, with the system's compiler."""

import ctypes
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from sketchkv.corpus import cache_folder

COMPILERS = ("cc", "gcc", "clang")
# No fast-math: what is not finite must spread as it does in torch.
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# The first that the compiler takes. Threads are torch's own: the library that it brings is loaded already.
TUNED = ("-march=native",), ("-mcpu=native",), ()
THREADS = "-fopenmp", "-fopenmp-simd"
LONGEST = 120  # seconds of one compilation

reasons: list[str] = []  # why something was not compiled, for whoever wonders what is slow


@lru_cache
def library(path, **constants):
    """The shared library made of the C file `path`, or None where there is no compiler or it fails (see `reasons`). $CC names
    another compiler; one that fails, such as `false`, leaves everything to torch.

    constants: whole numbers, macros of the source.
    """
    try:
        text = source(Path(path))
        macros = [f"-D{name}={value}" for name, value in sorted(constants.items())]
        compiler = _compiler()
        told = repr((compiler, _version(*compiler), FLAGS, TUNED, THREADS, macros, _processor())).encode()
        target = cache_folder("compiled") / f"{hashlib.sha256(text + told).hexdigest()[:32]}.so"
        if not target.is_file():
            _compile(compiler, macros, path, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reasons.append(f"{type(error).__name__}: {error}")
        return None


def source(path):
    """The bytes of a file, and of those beside it that it includes."""
    text = path.read_bytes()
    return text + b"".join(
        source(path.with_name(n.decode())) for n in re.findall(rb'^#include "(.+)"', text, re.M)
    )


def _compiler():
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return tuple(chosen)
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise RuntimeError(f"no C compiler was found: install one of {COMPILERS}, or set CC")
    return (found,)


@lru_cache
def _version(*compiler):
    return subprocess.run([*compiler, "--version"], capture_output=True, timeout=LONGEST, check=True).stdout


@lru_cache
def _processor():
    """What -march=native depends on: a folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.machine(), platform.processor()


def _compile(compiler, macros, path, target):
    """Several processes may do so at once: each compiles a file of its own, and the last one stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, said = Path(folder, target.name), ""
        for tuned, threads in itertools.product(TUNED, THREADS):
            command = [*compiler, *FLAGS, *tuned, threads, *macros, str(path), "-o", str(made), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
            if done.returncode == 0 and made.is_file():
                made.replace(target)
                return
            said = said or done.stderr.strip()
    raise RuntimeError(f"{' '.join(compiler)} could not compile {Path(path).name}: {said[-2000:]}")
