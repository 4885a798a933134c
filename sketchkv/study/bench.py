"""How fast it is, on the device at hand: `make bench`, or `python -m sketchkv.study.bench --output bench.csv`.

Every row is a median of repetitions with its 10th and 90th percentile (`sketchkv.study.timing`). Beside the CSV a JSON of
the same name says on what it ran. Groups of rows run one after the other, the most telling first, each within its own
limit; what was measured is written after each.
"""

import argparse
import platform
import re
import subprocess
import time
import traceback
from pathlib import Path

import torch
import transformers

from sketchkv import loading
from sketchkv.fast.launch import triton
from sketchkv.study import counting, results, speed, speed_gpu
from sketchkv.study.timing import Table, copy_bandwidth, limited, matmul_rate


def gpu_groups(table):
    """{name: (seconds it may take, function)}."""
    bandwidth = copy_bandwidth(table)

    def gpt2(rows, name="GPT-2 small", **settings):
        models = speed.pair(speed.gpt2_small("cuda", torch.bfloat16))
        return rows(table, models, name, **settings)

    return {
        "recorded": (110, lambda: speed_gpu.recorded_rows(table)),
        "attention": (40, lambda: speed_gpu.attention_rows(table, bandwidth, 64)),
        "full-cache": (30, lambda: speed_gpu.full_cache_rows(table)),
        "recorded-layer": (30, lambda: speed_gpu.recorded_layer_rows(table)),
        "recorded-layer-1": (30, lambda: speed_gpu.recorded_layer_rows(table, batch=1)),
        "static": (200, lambda: speed_gpu.static_rows(table)),
        "attention-pieces": (60, lambda: speed_gpu.attention_pieces(table)),
        "layer-pieces": (60, lambda: speed_gpu.layer_pieces(table)),
        "block-pieces": (40, lambda: speed_gpu.block_pieces(table)),
        "recorded-64": (
            60,
            lambda: speed_gpu.recorded_rows(table, batch=64, new=128, repetitions=10, seconds=30),
        ),
        "attention-1": (30, lambda: speed_gpu.attention_rows(table, bandwidth, 1)),
        "model-1": (40, lambda: gpt2(speed.decode_rows, batch=1, seconds=25)),
        "model-64": (40, lambda: gpt2(speed.decode_rows, batch=64, seconds=25)),
    }


def cpu_groups(table, size="bench"):
    """As `gpu_groups`, on at most two cores: the embedded model, a GPT-2 small, and the rotary model for long texts.

    size: "bench"; "study", what a notebook has the time for; "smoke", which shows that all of it runs and measures nothing.
    """
    torch.set_num_threads(min(2, torch.get_num_threads()))
    smoke, bench = size == "smoke", size == "bench"
    seen, few = (192, dict(repetitions=2, warmup=1)) if smoke else (1024, {})
    hardware = (
        copy_bandwidth(table, "cpu", 2**28, 10),
        matmul_rate(table, "cpu", torch.float32, 1024 if smoke else 2048, 10),
    )
    decode = dict(hardware=hardware, cap=64 if smoke else 256, seconds=500 if bench else 45, **few)

    def on(which, rows, **settings):
        load = {
            "embedded": lambda: loading.load("embedded")[0],
            "GPT-2 small": speed.gpt2_small,
            "rotary": lambda: loading.load(results.ROOT / "data" / "model-rotary")[0],
        }[which]
        return rows(table, speed.pair(load().requires_grad_(False)), which, **settings)

    lengths = [128, 256, 512] if smoke else [1024, 2048, 4096, 8192, 16384]
    compiled = {
        f"{group}-compiled": (
            400,
            lambda w=which, b=batch, s=count: on(w, speed.compiled_rows, batch=b, seen=s, **decode),
        )
        for group, which, batch, count in (
            ("embedded-1", "embedded", 1, seen),
            ("embedded-8", "embedded", 8, seen),
            ("rotary", "rotary", 1, 4 * seen),
            ("gpt2-1", "GPT-2 small", 1, seen),
            ("gpt2-8", "GPT-2 small", 8, seen),
        )
    }
    groups = {
        "embedded-1": (60, lambda: on("embedded", speed.decode_rows, batch=1, seen=seen, **decode)),
        "embedded-8": (180, lambda: on("embedded", speed.decode_rows, batch=8, seen=seen, **decode)),
        "rotary": (120, lambda: on("rotary", speed.decode_rows, batch=1, seen=4 * seen, **decode)),
        "gpt2-1": (180, lambda: on("GPT-2 small", speed.decode_rows, batch=1, seen=seen, **decode)),
        "gpt2-8": (600, lambda: on("GPT-2 small", speed.decode_rows, batch=8, seen=seen, **decode)),
        "loop": (
            500,
            lambda: on(
                "embedded",
                speed.loop_rows,
                prompt=seen // 2,
                new=32 if smoke else 512,
                seconds=450,
                compiled=bench,
                **few,
            ),
        ),
        "length": (
            200,
            lambda: on("rotary", lambda t, m, name: speed.length_rows(t, m[1], name, lengths, **few)),
        ),
        "prefill": (
            90,
            lambda: on("embedded", speed.prefill_rows, count=seen, chunk=seen // 2, cap=decode["cap"], **few),
        ),
        "scoring": (
            400,
            lambda: on(
                "embedded", speed.scoring_rows, count=seen // 2 if smoke else seen, seconds=350, **few
            ),
        ),
        "counting": (120, lambda: counting.counting_rows(table, 20_000 if smoke else 1_000_000, **few)),
    }
    slow = ("gpt2-1", "gpt2-8", *compiled)
    left_out = {"smoke": slow, "study": (*slow, "loop", "scoring")}.get(size, ())
    return {name: group for name, group in (groups | compiled).items() if name not in left_out}


def machine(commit=None):
    """What the figures were measured on."""

    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    facts = dict(
        commit=commit or results.commit()[0],
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        triton=getattr(triton, "__version__", None),
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
    """Of the files in data/benchmarks: the GPU's model (`h100`), or `cpu`."""
    found = re.search(r"[A-Z]+\d+\w*", facts.get("gpu", ""))
    return found.group().lower() if found else "gpu" if "gpu" in facts else "cpu"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sketchkv.study.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--output", help="CSV to write (default: data/benchmarks/NAME.csv); its JSON goes beside it"
    )
    parser.add_argument("--commit", help="commit of the code, where git cannot tell")
    parser.add_argument(
        "--seconds", type=float, default=2700, help="all groups together take about this long at most"
    )
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of rows to measure, by name")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    if cuda and (not torch.cuda.is_available() or triton is None):
        parser.error("--device cuda needs a GPU and triton; --device cpu runs here")
    begin, facts, table = time.monotonic(), machine(options.commit), Table()
    output = Path(options.output or results.ROOT / "data" / "benchmarks" / f"{default_name(facts)}.csv")
    groups = gpu_groups(table) if cuda else cpu_groups(table)
    if unknown := set(options.only or ()) - groups.keys():
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    missing = {}
    for name, (limit, group) in groups.items():
        left = options.seconds - (time.monotonic() - begin)
        if options.only and name not in options.only:
            continue
        if left < 5:
            missing[name] = "not begun in time"
            continue
        try:
            with torch.no_grad(), limited(min(limit, left)):
                group()
        except Exception as error:  # the other groups' figures are worth having
            traceback.print_exc()
            missing[name] = f"{type(error).__name__}: {error}"[:200]
        if cuda:
            torch.cuda.empty_cache()
        # After each group: what was measured is kept.
        results.atomic_write(output, table.frame().to_csv(index=False, lineterminator="\n"))
        notes = {"seconds": round(time.monotonic() - begin, 1), "missing": missing}
        results.atomic_write(output.with_suffix(".json"), results.to_json(facts | notes))
    for row in table.frame().query("quantity == 'ratio'").itertuples():
        print(f"{row.row:90} {row.median:8.3f} [{row.low:.3f}, {row.high:.3f}] n={row.n}")
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    return int(bool(missing))


if __name__ == "__main__":
    raise SystemExit(main())
