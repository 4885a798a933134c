"""What a whole model's steps cost with a bounded cache and with the cache it replaces, on either device.

A sample of decoding is a whole cycle of evictions, so each eviction is paid for by the tokens that it serves.
"""

import copy
import warnings
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import t as student
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from sketchkv import H2O, Sketch, SketchCache, Window, enable, generate, score
from sketchkv.fast.compiled import compiled_step
from sketchkv.study.timing import elapsed, in_turn

CYCLE = 16  # steps between two evictions


def gpt2_small(device="cpu", dtype=torch.float32, positions=4096):
    """A GPT-2 small with random weights: as fast as a trained one."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=positions, eos_token_id=None, bos_token_id=None)
    return GPT2LMHeadModel(config).to(device, dtype).eval().requires_grad_(False)


def pair(model):
    """(model as transformers runs it, a copy that knows `SketchCache`)."""
    return model, enable(copy.deepcopy(model))


def tokens(model, batch, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (batch, count), generator=generator).to(model.device)


def _prefill(model, ids, cache, chunk=512):
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


def _cycle(model, ids, cache):
    for token in ids[:, :CYCLE].split(1, 1):
        model(token, past_key_values=cache, logits_to_keep=1)
    if isinstance(cache, DynamicCache):  # stays at the same length; a bounded cache costs the same at any
        cache.crop(-CYCLE)


def decode_rows(
    table, models, name, batch, seen=1024, cap=256, repetitions=20, warmup=2, seconds=60, hardware=None
):
    """A decode step after `seen` tokens: the full cache, the sketch, a window and H2O with the same slots.

    hardware: (bytes per second, operations per second) for the floor of each, or None.
    """
    plain, model = models
    ids = tokens(model, batch, seen)
    policies = {"SketchCache": None, "window": Window(), "H2O": H2O()}
    caches = {"DynamicCache": (plain, _prefill(plain, ids, DynamicCache(config=plain.config)))}
    caches |= {
        which: (model, _prefill(model, ids, SketchCache(model.config, cap, policy=p)))
        for which, p in policies.items()
    }
    name = f"{name}, batch {batch}, {seen} seen"
    runs = {f"{name}, {which}": (lambda m=m, c=c: _cycle(m, ids, c)) for which, (m, c) in caches.items()}
    in_turn(table, runs, per=CYCLE, repetitions=repetitions, warmup=warmup, seconds=seconds)
    pairs = [
        ("SketchCache", "window"),
        ("SketchCache", "H2O"),
        *((which, "DynamicCache") for which in policies),
    ]
    for top, bottom in pairs:
        table.ratio(f"{name}, {top} / {bottom}", f"{name}, {top}", f"{name}, {bottom}")
    if hardware:
        for which, stored in (("DynamicCache", seen), ("SketchCache", cap)):
            table.floor(f"{name}, {which}", step_floor(model, batch, stored, *hardware), f"{name}, {which}")


def compiled_rows(
    table, models, name, batch, seen=1024, cap=256, repetitions=20, warmup=2, seconds=60, hardware=None
):
    """As `decode_rows`, the steps of bounded caches compiled (`sketchkv.fast.compiled`), beside the full cache as it is; and, since
    most of the gain is the compiler's, a compiled step that keeps as many tokens as the full cache. What compiling takes
    stands in a row of its own."""
    plain, model = models
    ids = tokens(model, batch, seen)
    step, name = compiled_step(model), f"{name}, batch {batch}, {seen} seen"

    def cycle(cache):
        for token in ids[:, :CYCLE].split(1, 1):
            step(token, cache)

    policies = {
        "SketchCache": (cap, None),
        "window": (cap, Window()),
        "H2O": (cap, H2O()),
        "all tokens": (seen, Window()),
    }
    caches = {
        which: _prefill(model, ids, SketchCache(model.config, size, policy=p))
        for which, (size, p) in policies.items()
    }
    table.add(
        f"{name}, compiling", "time of the first steps", "us", [elapsed(lambda: cycle(caches["SketchCache"]))]
    )
    full = _prefill(plain, ids, DynamicCache(config=plain.config))
    beside, first = f"{name}, DynamicCache beside compiled steps", f"{name}, SketchCache, compiled"
    runs: dict[str, Callable] = {beside: lambda: _cycle(plain, ids, full)}
    runs |= {f"{name}, {which}, compiled": (lambda c=c: cycle(c)) for which, c in caches.items()}
    in_turn(table, runs, per=CYCLE, repetitions=repetitions, warmup=warmup, seconds=seconds)
    for which in ("window", "H2O", "all tokens"):
        table.ratio(f"{first} / {which}, compiled", first, f"{name}, {which}, compiled")
    for which in policies:
        table.ratio(f"{name}, {which}, compiled / DynamicCache", f"{name}, {which}, compiled", beside)
    if hardware:
        table.floor(first, step_floor(model, batch, cap, *hardware), first)


def step_floor(model, batch, stored, bandwidth, rate):
    """Microseconds that one step needs at least: weights and stored keys and values read once, or its multiplications."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = [
        p for name, p in model.named_parameters() if "wpe" not in name
    ]  # of positions, one row is read
    cached = 2 * batch * config.num_hidden_layers * heads * head_dim * stored
    group = config.num_attention_heads // heads
    needed = sum(p.nbytes for p in weights) + cached * weights[0].element_size()
    operations = 2 * batch * sum(p.numel() for p in weights) + 2 * cached * group
    return max(needed / bandwidth, operations / rate) * 1e6


def loop_rows(
    table, models, name, prompt=512, new=512, cap=256, repetitions=20, warmup=1, seconds=60, compiled=False
):
    """The decode loop in the open with SketchCache, as it is and, if `compiled`, compiled, against `model.generate` with
    DynamicCache, the prompt included: it passes at once through all of them."""
    plain, model = models
    ids = tokens(model, 1, prompt)
    settings = dict(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    name = f"{name}, {prompt} + {new} tokens"

    def loop(compile):
        generate(
            model,
            ids,
            SketchCache(model.config, cap, prefill_chunk=prompt),
            new,
            chunk_size=prompt,
            compile=compile,
        )

    runs = {
        f"{name}, generate, DynamicCache": lambda: plain.generate(
            ids, attention_mask=torch.ones_like(ids), **settings
        ),
        f"{name}, manual loop, SketchCache": lambda: loop(False),
        f"{name}, manual loop, SketchCache, compiled": lambda: loop(True),
    }
    library, ours, faster = runs
    if not compiled:
        del runs[faster]
    in_turn(table, runs, per=new, repetitions=repetitions, warmup=warmup, seconds=seconds)
    table.ratio(f"{name}, manual loop / generate", ours, library)
    table.ratio(f"{name}, manual loop, compiled / generate", faster, library)


def prefill_rows(table, models, name, count=1024, chunk=512, cap=256, repetitions=20, warmup=2, seconds=60):
    """A prompt in chunks through a bounded cache against the plain model's single pass, evicting once per chunk
    (`prefill_chunk`) and as often as while decoding; and the most slots that a layer held."""
    plain, model = models
    ids = tokens(model, 1, count)
    name = f"{name}, prompt of {count} tokens"
    runs = {
        f"{name}, plain": lambda: _prefill(plain, ids, DynamicCache(config=plain.config), count),
        f"{name}, chunks of {chunk}": lambda: _prefill(
            model, ids, SketchCache(model.config, cap, prefill_chunk=chunk), chunk
        ),
        f"{name}, as if decoded": lambda: _prefill(model, ids, SketchCache(model.config, cap), chunk),
    }
    in_turn(table, runs, repetitions=repetitions, warmup=warmup, quantity="time of a prompt", seconds=seconds)
    plain_row, chunks, decoded = runs
    table.ratio(f"{name}, chunks / plain", chunks, plain_row)
    table.ratio(f"{name}, as if decoded / plain", decoded, plain_row)
    held = []

    class Watched(Sketch):
        def score(self, slots, seen):  # called where most slots are occupied
            held.append(slots.capacity)
            return super().score(slots, seen)

    cache = _prefill(model, ids, SketchCache(model.config, cap, prefill_chunk=chunk, policy=Watched()), chunk)
    assert cache.evicted_tokens > 0
    table.add(f"{name}, slots held at most / cap + chunk", "ratio", "1", [max(held) / (cap + chunk)])


def scoring_rows(table, models, name, count=1024, cap=256, repetitions=20, warmup=1, seconds=60):
    """`score` against predicting the same text one token at a time. Both must keep the same tokens and find the same loss."""
    _, model = models
    ids, found = tokens(model, 1, count), {}

    def streamed():
        cache = SketchCache(model.config, cap)
        found["streamed"] = score(model, ids, cache), cache

    def stepwise():
        cache, logits = SketchCache(model.config, cap), []
        for token in ids[:, :-1].split(1, 1):
            logits.append(model(token, past_key_values=cache).logits)
        predicted = torch.cat(logits, 1).float().transpose(1, 2)
        found["stepwise"] = torch.nn.functional.cross_entropy(predicted, ids[:, 1:], reduction="none"), cache
        model(ids[:, -1:], past_key_values=cache)  # `score` passes the last token through as well

    name = f"{name}, {count} tokens"
    runs = {f"{name}, token by token": stepwise, f"{name}, score": streamed}
    in_turn(
        table,
        runs,
        per=count,
        repetitions=repetitions,
        warmup=warmup,
        quantity="time per token",
        seconds=seconds,
    )
    table.ratio(f"{name}, token by token / score", *runs)
    (nll, cache), (nll_steps, cache_steps) = found["streamed"], found["stepwise"]
    torch.testing.assert_close(nll, nll_steps, rtol=1e-3, atol=1e-3)
    kept = [
        torch.stack([c.kept_positions(i).sort(-1).values for i in range(len(c.layers))])
        for c in (cache, cache_steps)
    ]
    share = float((kept[0] == kept[1]).double().mean())
    table.add(f"{name}, kept positions that are the same", "share", "1", [share])


def length_rows(table, model, name, lengths, cap=256, repetitions=20, warmup=2, seconds=120):
    """The time of a token against the text's length, with a cache for each, all in turn: time spent by the machine on other
    things then says nothing about length. The slope is relative to the mean time, per doubling of the length; its interval is
    Student's, over repetitions."""
    ids = tokens(model, 1, max(lengths) + CYCLE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="position .* lies beyond")
        caches = {
            length: _prefill(model, ids[:, :length], SketchCache(model.config, cap)) for length in lengths
        }
        runs = {f"{name}, {length} seen": (lambda c=c: _cycle(model, ids, c)) for length, c in caches.items()}
        in_turn(table, runs, per=CYCLE, repetitions=repetitions, warmup=warmup, seconds=seconds)
        held = [peak_bytes(lambda c=c: _cycle(model, ids, c)) + c.nbytes()["total"] for c in caches.values()]
    times = np.stack([table.samples[row] for row in runs], 1)
    x = np.log2(lengths) - np.mean(np.log2(lengths))
    slopes = (times / times.mean(1, keepdims=True)) @ x / (x @ x)
    half = student.ppf(0.975, len(slopes) - 1) * slopes.std(ddof=1) / len(slopes) ** 0.5
    mean = slopes.mean()
    table.rows.append(
        [
            f"{name}, slope of time per doubling",
            "95 % interval",
            "1",
            mean,
            mean - half,
            mean + half,
            len(slopes),
        ]
    )
    table.add(
        f"{name}, peak bytes at {max(lengths)} / at {min(lengths)} tokens", "ratio", "1", [held[-1] / held[0]]
    )


def peak_bytes(run):
    """The most bytes that tensors made in `run()` hold at one time, on the CPU."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max(initial=0))


def operations(run, top=12):
    """Where the time of `run()` goes: rows (dict) of torch.profiler, the operations that took most, by their own time."""
    with torch.profiler.profile() as profile:
        run()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [
        {
            "operation": e.key,
            "calls": e.count,
            "microseconds": e.self_cpu_time_total,
            "share": e.self_cpu_time_total / total,
        }
        for e in events[:top]
    ]
