"""How fast a decode step is: `python -m sketchkv.study.bench --device cuda --output bench.csv`.

Every row is a median of repetitions with its 10th and 90th percentile, after a discarded warm-up, with the device
synchronised by events; ratios are of samples taken in turn within this run. "graph" times are replays of a CUDA graph, the
device's work alone; "called" times include what Python and the launches cost. Inputs rotate and exceed the L2 cache. The
floor is the bytes that must move over the copy bandwidth measured here. Beside the CSV a JSON of the same name says on
what it ran.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import time
import traceback
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
import transformers
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from sketchkv import H2O, AttentionMass, Sketch, SketchCache, Window, enable, generate, kernels
from sketchkv.cache import SketchLayer

COLUMNS = ["row", "quantity", "unit", "median", "low", "high", "n"]
SCALING = 64**-0.5


class Table:
    """Rows of the long table; `samples` are kept for ratios."""

    def __init__(self):
        self.rows, self.samples = [], {}

    def add(self, row, quantity, unit, samples):
        samples = np.asarray(samples, dtype=float)
        self.samples[row] = samples
        low, median, high = np.percentile(samples, [10, 50, 90])
        self.rows.append([row, quantity, unit, median, low, high, len(samples)])
        print(f"{row:62} {median:10.4g} [{low:.4g}, {high:.4g}] {unit} (n={len(samples)})", flush=True)

    def ratio(self, row, top, bottom):
        if top in self.samples and bottom in self.samples:
            count = min(len(self.samples[top]), len(self.samples[bottom]))
            self.add(row, "ratio", "1", self.samples[top][:count] / self.samples[bottom][:count])

    def frame(self):
        return pd.DataFrame(self.rows, columns=COLUMNS)


@contextmanager
def fused(enabled):
    before, kernels.ENABLED = kernels.ENABLED, enabled
    try:
        yield
    finally:
        kernels.ENABLED = before


def elapsed(run):
    """Microseconds of `run()` on the current device, synchronised at both ends."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1000
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e6


def captured(steps):
    """The calls `steps`, captured in one CUDA graph: a function that replays them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:  # compiles, and gives allocations their home
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def in_turn(table, candidates, per=1, repetitions=30, warmup=3, kind="called", seconds=math.inf):
    """Times the functions of `candidates` {row: run} alternately, at most for `seconds`; `per`: steps that one run holds."""
    samples, begin = {row: [] for row in candidates}, time.monotonic()
    for repetition in range(warmup + repetitions):
        if repetition > warmup and time.monotonic() - begin > seconds:
            break
        for row, run in candidates.items():
            took = elapsed(run) / per
            if repetition >= warmup:
                samples[row].append(took)
    for row, values in samples.items():
        table.add(row, f"time per step, {kind}", "us", values)


# One layer's attention on the GPU


def copy_bandwidth(table):
    source = torch.randn(2**29, device="cuda")  # 2 GiB
    target = torch.empty_like(source)
    times = [elapsed(lambda: target.copy_(source)) for _ in range(25)][5:]
    table.add("copy bandwidth", "bytes read and written per second", "TB/s", [2 * source.nbytes / t * 1e-6 for t in times])
    return float(np.median(table.samples["copy bandwidth"])) * 1e12


def filled(policy, batch, used, heads=12, head_dim=64, dtype=torch.bfloat16, device="cuda"):
    """A layer whose slots are full of random tokens."""
    layer = SketchLayer(policy, used - 16, 4, 16, 16)
    key, value = torch.randn(2, batch, heads, used, head_dim, device=device, dtype=dtype)
    layer.update(key[:, :, :1], value[:, :, :1])
    layer._store(key, value, None, None, slice(0, used))
    return layer


def attention_rows(table, bandwidth, batch, used=1024, heads=12, head_dim=64):
    """The fused kernel, its variants and the eager path over `used` slots, bf16, against the floor."""
    name = f"batch {batch}, {used} slots"
    sets = 3 if batch > 8 else 40  # together several times the L2
    layers = [filled(AttentionMass(), batch, used, heads, head_dim) for _ in range(sets)]
    queries = torch.randn(sets, batch, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    needed = layers[0].slots.nbytes("keys", "values") + 2 * 4 * batch * heads * used + 2 * queries[0].nbytes
    floor = needed / bandwidth * 1e6
    table.add(f"floor, {name}", "bytes over copy bandwidth", "us", [floor])

    def step(layer, query, **tuning):
        slots = layer.slots
        return lambda: kernels.attend(
            query, slots["keys"], slots["values"], SCALING, None, slots["mass"], 0.99, **tuning
        )  # fmt: skip

    pairs = list(zip(layers, queries))
    candidates = {}
    variants = [{}]
    if batch > 8:
        variants += [dict(block=b, splits=s, num_warps=w, num_stages=g) for b, s, w, g in (
            (64, 1, 4, 3), (32, 1, 4, 4), (16, 1, 2, 4), (32, 2, 4, 3),
        )]  # fmt: skip
    else:
        variants += [dict(splits=s) for s in (4, 8, 16, 32)]
    for tuning in variants:
        label = " ".join(f"{key}={value}" for key, value in tuning.items()) or "default"
        candidates[f"fused, {name}, {label}"] = captured([step(*pair, **tuning) for pair in pairs])
    eager = [lambda l=l, q=q: l._attend_block(q[:, :, None], None, SCALING) for l, q in pairs]
    with fused(False):
        candidates[f"eager, {name}"] = captured(eager)
    plain = [
        lambda l=l, q=q: torch.nn.functional.scaled_dot_product_attention(q[:, :, None], l.slots.keys, l.slots.values)
        for l, q in pairs
    ]
    candidates[f"SDPA, {name}"] = captured(plain)
    in_turn(table, candidates, per=sets, kind="graph")
    for row in candidates:
        if row.startswith("fused"):
            table.add(f"{row} / floor", "ratio", "1", table.samples[row] / floor)
    default = f"fused, {name}, default"
    table.ratio(f"eager / fused, {name}", f"eager, {name}", default)
    table.ratio(f"SDPA / fused, {name}", f"SDPA, {name}", default)

    def every(steps):
        return lambda: [one() for one in steps]

    def eager_called():
        with fused(False):
            every(eager)()

    calls = {f"fused, {name}, called": every(eager), f"eager, {name}, called": eager_called}
    in_turn(table, calls, per=sets)
    table.ratio(f"eager / fused, {name}, called", *reversed(calls))


def full_cache_rows(table, batch=64, tokens=16384, used=1024):
    """SDPA over all tokens against the fused kernel over a bounded cache, batch 64."""
    query = torch.randn(batch, 12, 1, 64, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(batch, 12, tokens, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    row = f"SDPA, batch {batch}, {tokens} tokens"
    in_turn(
        table, {row: captured([lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values)])}, kind="graph"
    )  # fmt: skip
    table.ratio(f"SDPA over {tokens} tokens / fused over {used} slots", row, f"fused, batch {batch}, {used} slots, default")


def policy_rows(table, batch=64, cap=1024, device="cuda", dtype=torch.bfloat16):
    """One layer's whole `attend`, one token at a time, evictions among 16 steps: what choosing costs."""
    names = {"sketch": Sketch(), "attention mass": AttentionMass(), "H2O": H2O(), "window": Window()}
    layers = {name: filled(policy, batch, cap + 16, device=device, dtype=dtype) for name, policy in names.items()}
    # Many different tokens: equal ones would share counters of the sketch, and their additions would wait for each other.
    states = torch.randn(256, 3, batch, 12, 1, 64, device=device, dtype=dtype)

    def cycle(layer):
        begin = layer.seen % 256 // 16 * 16
        for state in states[begin : begin + 16]:
            layer.attend(*state, None, None, SCALING)

    for layer in layers.values():
        layer._evict()
    runs = {f"layer, {name}, batch {batch}, cap {cap}": (lambda layer=layer: cycle(layer)) for name, layer in layers.items()}
    in_turn(table, runs, per=16)
    sketch, mass, h2o, window = runs
    table.ratio(f"layer, sketch / attention mass, batch {batch}", sketch, mass)
    table.ratio(f"layer, sketch / H2O, batch {batch}", sketch, h2o)
    table.ratio(f"layer, sketch / window, batch {batch}", sketch, window)


def recorded_policy_rows(table, batch=64, cap=1024, device="cuda", dtype=torch.bfloat16):
    """As `policy_rows`, 16 steps with their eviction recorded as one CUDA graph: the device's work alone."""
    names = {"sketch": Sketch(), "attention mass": AttentionMass(), "H2O": H2O(), "window": Window()}
    states = torch.randn(16, 3, batch, 12, 1, 64, device=device, dtype=dtype)
    runs = {}
    for name, policy in names.items():
        layer = filled(policy, batch, cap + 16, device=device, dtype=dtype)
        layer._evict()
        clock = torch.full((1,), layer.seen, dtype=torch.int32, device=device)

        def step(state, layer=layer, clock=clock):
            layer.attend(*state, None, None, SCALING, clock)
            clock.add_(1)

        runs[f"recorded layer, {name}, batch {batch}, cap {cap}"] = captured([lambda s=s, step=step: step(s) for s in states])
    in_turn(table, runs, per=16, kind="graph")
    sketch = next(iter(runs))
    for row, name in list(zip(runs, names))[1:]:
        table.ratio(f"recorded layer, sketch / {name}, batch {batch}", sketch, row)


# Whole models


def model_rows(table, batch, device, dtype, seen=1024, cap=256, repetitions=20):
    """A decode step of a random-weight GPT-2 small after `seen` tokens."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=4096)).to(device, dtype).eval().requires_grad_(False)
    plain = GPT2LMHeadModel(GPT2Config(n_positions=4096)).to(device, dtype).eval().requires_grad_(False)
    enable(model)
    ids = torch.randint(0, 50000, (batch, seen), device=device)

    def bounded(policy, size=cap):
        return SketchCache(model.config, size, policy=policy)

    caches = {
        "DynamicCache": (plain, DynamicCache(config=plain.config), True),
        "SketchCache": (model, bounded(None), True),
        "window": (model, bounded(Window()), True),
        "H2O": (model, bounded(H2O()), True),
    }
    if device == "cuda":
        caches["SketchCache, eager"] = (model, bounded(None), False)
        caches[f"SketchCache, cap {seen - 16}"] = (model, bounded(None, seen - 16), True)
    for used, cache, _ in caches.values():
        for part in ids.split(512, 1):
            used(part, past_key_values=cache, logits_to_keep=1)

    def cycle(used, cache, enabled):
        with fused(enabled):
            for token in ids[:, :16].split(1, 1):
                used(token, past_key_values=cache, logits_to_keep=1)
        if isinstance(cache, DynamicCache):
            cache.crop(-16)

    name = f"GPT-2 small, batch {batch}, {seen} seen"
    runs = {f"{name}, {which}": (lambda it=it: cycle(*it)) for which, it in caches.items()}
    in_turn(table, runs, per=16, repetitions=repetitions, warmup=2)
    sketch = f"{name}, SketchCache"
    for other in caches:
        if other != "SketchCache":
            table.ratio(f"{name}, SketchCache / {other}", sketch, f"{name}, {other}")


def loop_rows(table, device, dtype, prompt=512, new=512, repetitions=3):
    """The decode loop in the open with SketchCache against `model.generate` with DynamicCache."""
    torch.manual_seed(0)
    plain, model = (GPT2LMHeadModel(GPT2Config()).to(device, dtype).eval().requires_grad_(False) for _ in range(2))
    enable(model)
    ids = torch.randint(0, 50000, (1, prompt), device=device)
    plain.generation_config.eos_token_id = None
    runs = {
        "generate, DynamicCache": lambda: plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        ),  # fmt: skip
        "manual loop, SketchCache": lambda: generate(model, ids, SketchCache(model.config, 256), max_new_tokens=new),
    }
    in_turn(table, runs, per=new, repetitions=repetitions, warmup=1)
    table.ratio("manual loop, SketchCache / generate, DynamicCache", *reversed(runs))


def recorded_rows(
    table, batch=1, dtype=torch.bfloat16, prompt=512, new=256, cap=256, repetitions=20, compiled=True, seconds=90
):  # fmt: skip
    """Decoding with recorded steps against `generate` with DynamicCache and against a compiled StaticCache.

    Rows "decoding" are what new - 1 further steps cost: the prompt's time, measured beside, is taken off.
    """
    torch.manual_seed(0)
    plain, model = (GPT2LMHeadModel(GPT2Config()).to("cuda", dtype).eval().requires_grad_(False) for _ in range(2))
    enable(model)
    plain.generation_config.eos_token_id = None
    ids = torch.randint(0, 50000, (batch, prompt), device="cuda")
    name = f"batch {batch}, {prompt} + {new} tokens"

    def bounded(policy):
        cache = SketchCache(model.config, cap, policy=policy)

        def run(new=new):
            cache.reset()
            generate(model, ids, cache, new, graph=True)

        return run

    def library(new=new):
        plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )  # fmt: skip

    runs = {f"recorded steps, {which}, {name}": bounded(policy) for which, policy in (
        ("sketch", None), ("attention mass", AttentionMass()), ("window", Window())
    )}  # fmt: skip
    for row, run in runs.items():
        table.add(f"first text, recording included, {row}", "time per token", "us", [elapsed(run) / new])
    bounded_rows = list(runs)
    runs[f"generate, DynamicCache, {name}"] = library
    if compiled:
        static = StaticCache(config=plain.config, max_cache_len=prompt + new)
        step = torch.compile(plain.forward, mode="reduce-overhead", fullgraph=True)

        def run(new=new):
            static.reset()
            logits = plain(ids, past_key_values=static, logits_to_keep=1).logits
            position = torch.full((1, 1), prompt, device="cuda")
            for _ in range(new - 1):
                token = logits[:, -1].argmax(-1, keepdim=True)
                logits = step(token, past_key_values=static, position_ids=position, use_cache=True).logits
                position = position + 1

        try:
            table.add(f"first text, compiling included, StaticCache, {name}", "time per token", "us", [elapsed(run) / new])
            runs[f"StaticCache, compiled, {name}"] = run
        except Exception:
            traceback.print_exc()
    both = {}
    for row, run in runs.items():
        both |= {row: run, f"prompt alone, {row}": lambda run=run: run(1)}
    in_turn(table, both, per=new, repetitions=repetitions, warmup=1, seconds=seconds)
    for row in runs:
        steps = (table.samples[row] - table.samples[f"prompt alone, {row}"]) * new / (new - 1)
        table.add(f"decoding, {row}", "time per step", "us", steps)
    sketch = bounded_rows[0]
    for kind in ("", "decoding, "):
        for row in bounded_rows[1:]:
            table.ratio(f"{kind}{sketch} / {row.split(', ')[1]}", kind + sketch, kind + row)
        for row in list(runs)[len(bounded_rows) :]:
            table.ratio(f"{kind}{row} / recorded steps", kind + row, kind + sketch)


def machine(commit=None):
    """What the figures were measured on."""

    def ask(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    facts = dict(
        commit=commit or ask("git", "rev-parse", "HEAD"), time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
        triton=getattr(kernels.triton, "__version__", None), threads=torch.get_num_threads(),
    )  # fmt: skip
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_properties(0)
        driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= dict(gpu=chip.name, multiprocessors=chip.multi_processor_count, driver=driver, cuda=torch.version.cuda)
    return facts


def main():
    parser = argparse.ArgumentParser(prog="python -m sketchkv.study.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="CSV to write; its JSON goes beside it")
    parser.add_argument("--commit", help="commit of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=240, help="no new group of rows is begun after this long")
    parser.add_argument("--only", nargs="+", metavar="GROUP", help="groups of rows to measure, by name")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and (not torch.cuda.is_available() or kernels.triton is None):
        parser.error("--device cuda needs a GPU and triton; --device cpu runs here")
    kernels.ENABLED = True  # rows that want it off say so
    table, begin = Table(), time.monotonic()
    if cuda:
        bandwidth = copy_bandwidth(table)
        groups = {
            "recorded-layer": lambda: recorded_policy_rows(table),
            "recorded-layer-1": lambda: recorded_policy_rows(table, batch=1),
            "attention": lambda: attention_rows(table, bandwidth, 64),
            "full-cache": lambda: full_cache_rows(table),
            "recorded": lambda: recorded_rows(table),
            "attention-1": lambda: attention_rows(table, bandwidth, 1),
            "layer": lambda: policy_rows(table),
            "layer-1": lambda: policy_rows(table, batch=1),
            "model-1": lambda: model_rows(table, 1, "cuda", torch.bfloat16),
            "model": lambda: model_rows(table, 64, "cuda", torch.bfloat16),
            "loop": lambda: loop_rows(table, "cuda", torch.bfloat16),
            "recorded-64": lambda: recorded_rows(table, batch=64, repetitions=5, compiled=False),
        }
    else:
        groups = {
            "model-1": lambda: model_rows(table, 1, "cpu", torch.float32),
            "model-8": lambda: model_rows(table, 8, "cpu", torch.float32),
            "loop": lambda: loop_rows(table, "cpu", torch.float32),
        }
    unknown = set(options.only or ()) - groups.keys()
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    facts, skipped, failed = machine(options.commit), [], 0
    for name, group in groups.items():
        if options.only and name not in options.only:
            continue
        if time.monotonic() - begin > options.seconds:
            skipped.append(name)
            continue
        try:
            with torch.inference_mode():
                group()
        except Exception:  # the other groups' figures are worth having
            traceback.print_exc()
            failed += 1
        if cuda:
            torch.cuda.empty_cache()
        if options.output:  # after each group: what was measured is kept
            os.makedirs(os.path.dirname(os.path.abspath(options.output)), exist_ok=True)
            table.frame().to_csv(options.output, index=False)
            with open(os.path.splitext(options.output)[0] + ".json", "w") as file:
                json.dump(facts | dict(seconds=round(time.monotonic() - begin, 1)), file, indent=1)
    frame = table.frame()
    print(json.dumps(facts))
    if skipped:
        print(f"not begun within {options.seconds:g} s: {', '.join(skipped)}")
    if failed:
        print(f"{failed} groups of rows failed, see above")
    ratios = frame[(frame.quantity == "ratio") & ~frame.row.str.contains("block=")]
    for _, row in ratios.iterrows():
        print(f"{row['row']:74} {row['median']:8.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
