"""How fast it is, on the device at hand: `make bench`, `make bench BENCH=all`, or one group: `make bench BENCH=cpu_steps`.

Every row is a median of repetitions with its 10th and 90th percentile (`sketchkv.study.timing`). Beside the CSV a JSON of
the same name says on what it ran. Groups run one after the other, each within its own limit; what was measured is written
after each, and rows of groups that are not run stay.
"""

import argparse
import platform
import re
import subprocess
import time
import traceback
from pathlib import Path

import pandas as pd
import torch
import transformers

from sketchkv.fast.launch import triton
from sketchkv.study import sources
from sketchkv.study.extras import llama_cpp
from sketchkv.study.steps import FULL, Bench
from sketchkv.study.timing import COLUMNS, Table, limited

FOLDER = sources.ROOT / "data" / "benchmarks"
LONG, RESIDENT = [1024, 4096, 32768], ("sketch", "compact", "recall", "recall, all resident")
# {group: (seconds it may take, what it measures)}; the limits of a device sum up to 12 minutes. The rest: BENCH=all.
DEFAULT = {
    "cpu_steps": (250, lambda t: _cpu(t).steps([1024, 2048, 4096])),
    "cpu_peers": (300, lambda t: _cpu(t).peers(3072, fast=("compact",))),
    "cpu_generate": (110, lambda t: _cpu(t, repetitions=5, warmup=1).generate(768, 64)),
    "cpu_prompts": (60, lambda t: _cpu(t, repetitions=3, warmup=1).prompts([1024])),
    "gpu_prompts": (50, lambda t: _gpu(t).prompts([1024, 4096, 8192], chunks=(2048,))),
    "gpu_one": (165, lambda t: _one(_gpu(t))),
    "gpu_generate": (
        160,
        lambda t: _gpu(t, warmup=3, seconds=130).generate(1024, 32, steps=True, chunk=2048),
    ),
    "gpu_batch": (
        150,
        lambda t: _gpu(t, batch=16).peers(8192, caps=(1024,), fast=("compact",), plain=(), others=(FULL,)),
    ),
    "gpu_longest": (25, lambda t: _gpu(t, batch=16).longest()),
    "gpu_steps": (135, lambda t: _gpu(t, seconds=90).steps(LONG, names=RESIDENT)),
}
MORE = {
    "cpu_long": (900, lambda t: _cpu(t, repetitions=10).steps([1024, 2048, 4096, 8192])),
    "cpu_large_cap": (
        600,
        lambda t: _cpu(t).peers(3072, caps=(1536,), fast=("compact",), plain=("compact",)),
    ),
    "cpu_policies": (
        600,
        lambda t: _cpu(t).peers(1024, caps=(256,), fast=("sketch", "streaming", "h2o"), plain=("sketch",)),
    ),
    "cpu_llama": (900, lambda t: llama_cpp.beside(_cpu(t), 3072)),
    "cpu_batch": (900, lambda t: _cpu(t, batch=8).peers(1024, plain=("compact",))),
    "gpu_peers": (400, lambda t: _gpu(t).peers(4096)),
    "gpu_steps_8": (250, lambda t: _gpu(t, batch=8, seconds=90).steps(LONG, names=RESIDENT)),
    "gpu_large": (
        300,  # beside 34 GB of StaticCache no other full cache has room
        lambda t: _gpu(t, "Llama-3.1-8B", batch=8).peers(
            32768, (4096,), fast=("compact",), plain=(), others=()
        ),
    ),
}


def _cpu(table, batch=1, repetitions=20, warmup=2):
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return Bench(table, "SmolLM2", batch=batch, repetitions=repetitions, warmup=warmup)


def _gpu(table, shape="SmolLM2", batch=1, repetitions=20, warmup=2, seconds=60):
    return Bench(table, shape, "cuda", batch, repetitions=repetitions, warmup=warmup, seconds=seconds)


def _one(bench):
    """One text at a time; what is compiled, is compiled once."""
    bench.peers(4096, others=(FULL,))
    bench.waits()


def machine(commit=None):
    """What the figures were measured on."""

    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    facts = dict(
        commit=commit or sources.commit()[0],
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        triton=getattr(triton, "__version__", None),
        node_llama_cpp=llama_cpp.version(),
        threads=torch.get_num_threads(),
    )
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_properties(0)
        driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= dict(
            gpu=chip.name, multiprocessors=chip.multi_processor_count, driver=driver, cuda=torch.version.cuda
        )
    return facts


def default_name(facts):
    """Of the files in data/benchmarks: the GPU's model (`speed_h100`), or `speed_cpu`."""
    found = re.search(r"[A-Z]+\d+\w*", facts.get("gpu", ""))
    return f"speed_{found.group().lower() if found else 'gpu' if 'gpu' in facts else 'cpu'}"


def chosen(names, device):
    """The groups to run, {name: (seconds, function)}; names: of groups, "default" or "all". Raises ValueError for another."""
    here = {name: group for name, group in (DEFAULT | MORE).items() if name.startswith(device)}
    if names == ["all"]:
        return here
    if names == ["default"]:
        return {name: group for name, group in here.items() if name in DEFAULT}
    if unknown := set(names) - here.keys():
        raise ValueError(
            f"no group {', '.join(sorted(unknown))} here; there are default, all, {', '.join(here)}"
        )
    return {name: here[name] for name in names}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sketchkv.study.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("groups", nargs="*", default=["default"], help="default, all, or names of groups")
    parser.add_argument("--output", help="CSV to write (default: data/benchmarks/speed_NAME.csv)")
    parser.add_argument(
        "--patience", type=float, default=1, help="factor of all limits: more time, more repetitions"
    )
    parser.add_argument("--commit", help="commit of the code, where git cannot tell")
    options = parser.parse_args(arguments)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    try:
        groups = chosen(options.groups, device)
    except ValueError as error:
        parser.error(str(error))
    if device == "gpu" and triton is None:
        parser.error("a GPU is measured with triton: install it, or hide the GPU (CUDA_VISIBLE_DEVICES=)")
    facts = machine(options.commit)
    output = Path(options.output or FOLDER / f"{default_name(facts)}.csv")
    kept = (
        pd.read_csv(output, float_precision="round_trip")
        if output.exists()
        else pd.DataFrame(columns=["group", *COLUMNS])
    )
    notes = sources.read_json(output.with_suffix(".json")) if output.exists() else {}
    missing = notes.get("missing", {})
    for name, (limit, group) in groups.items():
        begin, limit = time.monotonic(), limit * options.patience
        table = Table(until=begin + 0.8 * limit)
        missing.pop(name, None)
        try:
            with torch.no_grad(), limited(limit):
                group(table)
        except Exception as error:  # the other groups' figures are worth having
            traceback.print_exc()
            missing[name] = f"{type(error).__name__}: {error}"[:200]
        if device == "gpu":
            torch.cuda.empty_cache()
        torch.compiler.reset()
        new = table.frame()
        new.insert(0, "group", name)
        kept = pd.concat([kept[kept.group != name], new], ignore_index=True)
        sources.atomic_write(output, kept.to_csv(index=False, lineterminator="\n"))
        took = notes.get("seconds", {}) | {name: round(time.monotonic() - begin, 1)}
        commits = notes.get("commits", {}) | {name: facts["commit"]}
        notes = facts | {"commits": commits, "seconds": took, "missing": missing}
        sources.atomic_write(output.with_suffix(".json"), sources.to_json(notes))
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    return int(bool(missing.keys() & groups))


if __name__ == "__main__":
    raise SystemExit(main())
