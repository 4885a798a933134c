"""What a step, a prompt and a text cost with each cache, on either device: models of random weights, as fast as trained ones.

The baseline is always an untouched model of the same weights in the same process. A sample of decoding is a whole cycle of
evictions, so each eviction is paid for by the tokens that it serves.
"""

import copy
import math
import traceback
import unittest.mock
import warnings
from functools import partial
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)

from sketchkv import enable, recall
from sketchkv.fast.compiled import compiled_step
from sketchkv.fast.graphs import StepGraphs
from sketchkv.study.measured import digest
from sketchkv.study.methods import BOUNDED, full_nbytes, make_cache, nbytes
from sketchkv.study.timing import copy_bandwidth, elapsed, in_turn

CYCLE = 16  # steps between two evictions
CHUNK = 512  # tokens of a prompt that pass at once
SHAPES = {
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
    "SmolLM2": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, vocab_size=49152
    ),
    "Llama-3.1-8B": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    )
    | dict(vocab_size=128256, tie_word_embeddings=False),
}
KV_HEADS = {"tiny": 2, "SmolLM2": 3, "Llama-3.1-8B": 8}
FULL = "DynamicCache"
QUANTIZED, OFFLOADED = ("QuantizedCache, quanto", "QuantizedCache, hqq"), "OffloadedCache"


class Runs:
    """Models of one shape on one device, what is timed of them, and a table for what is found. settings: of `timing.in_turn`."""

    def __init__(self, table, shape, device="cpu", batch=1, **settings):
        self.table, self.shape, self.device, self.batch, self.settings = table, shape, device, batch, settings
        config: dict[str, Any] = (
            dict(num_key_value_heads=KV_HEADS[shape], max_position_embeddings=2**17) | SHAPES[shape]
        )
        config = {"tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": None} | config
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            with torch.device(device):
                self.plain = LlamaForCausalLM(LlamaConfig(**config)).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        self.plain.generation_config.eos_token_id = None
        # Two models, one set of weights.
        self.model = enable(copy.deepcopy(self.plain, {id(p): p for p in self.plain.parameters()}))
        self.config, self.known = self.plain.config, config | {"dtype": str(dtype), "batch": batch}

    def ids(self, count):
        draw = torch.Generator().manual_seed(count)
        return torch.randint(1, self.config.vocab_size, (self.batch, count), generator=draw).to(self.device)

    def method(self, name, cap):
        """The study's settings of a method; 16-bit methods hold the model's own dtype, recall a store in host memory, but as
        "recall, all resident" in the device's."""
        name, _, resident = name.partition(", ")
        own = {key: value for key, value in BOUNDED[name].items() if (key, value) != ("bits", 16)}
        store = {"store": "device" if resident else "host", "top": min(cap // 2, cap - 68)}
        return own | {"max_cache_size": cap} | (store if name == "recall" else {})

    def bounded(self, name, cap, **changes):
        return make_cache(self.config, **self.method(name, cap), **changes)

    def prompt(self, model, cache, count, chunk=CHUNK):
        for part in self.ids(count).split(chunk, 1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def begin(self, **asked):
        self.table.settings = digest(self.known, asked)

    def time(self, runs, per=CYCLE):
        in_turn(self.table, runs, per, **self.settings)

    # Cycles of steps

    def cycle(self, name, seen, cap=512, fast=None):
        """A function that decodes `CYCLE` tokens after `seen` with a bounded cache that has read all of them. fast: "recorded"
        on a GPU, or "compiled", and on a GPU recorded."""
        chunk = 4 * CHUNK if self.device == "cuda" else CHUNK
        own = {} if name.startswith("recall") else {"prefill_chunk": chunk}
        with unittest.mock.patch.object(recall, "stream", _nothing):
            cache = self.prompt(self.model, self.bounded(name, cap, **own), seen, chunk)
        ids = self.ids(CYCLE)
        assert cache.evicted_tokens > 0
        if not fast:
            return lambda: self._steps(self.model, ids, cache)
        compiled = compiled_step(self.model) if fast == "compiled" else None
        cache.recordings = StepGraphs(self.model, cache, compiled)
        return lambda: [cache.recordings(token) for token in ids.split(1, 1)]

    def full(self, seen, kind=FULL):
        """The same with a cache of transformers and the untouched model; `seen` random keys and values, no prompt."""
        ids = self.ids(CYCLE)
        if kind.startswith("StaticCache"):
            return self._static(seen, ids)
        cache = {
            FULL: lambda: DynamicCache(config=self.config),
            OFFLOADED: lambda: DynamicCache(config=self.config, offloading=True),
            QUANTIZED[0]: lambda: QuantizedCache("quanto", self.config),
            QUANTIZED[1]: lambda: QuantizedCache("hqq", self.config),
        }[kind]()
        for layer in range(self.config.num_hidden_layers):
            cache.update(*self._states(seen), layer)

        def run():
            self._steps(self.plain, ids, cache)
            if kind in (FULL, OFFLOADED):  # stays at the same length; others grow by a cycle a sample
                cache.crop(-CYCLE)

        return run

    def _static(self, seen, ids):
        cache: Any = StaticCache(config=self.config, max_cache_len=seen + CYCLE)
        heads, width = self.config.num_key_value_heads, self.config.head_dim
        cache.early_initialization(self.batch, heads, width, self.plain.dtype, self.plain.device)
        for layer in cache.layers:
            layer.keys.normal_(), layer.values.normal_()
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        step = torch.compile(self.plain.forward, mode=mode, fullgraph=True, dynamic=False)

        def run():
            for layer in cache.layers:
                layer.cumulative_length.fill_(seen)
            for place, token in enumerate(ids.split(1, 1)):
                position = torch.full((1, 1), seen + place, device=token.device)
                step(token, past_key_values=cache, position_ids=position, use_cache=True)

        return run

    def _states(self, count):
        shape = self.batch, self.config.num_key_value_heads, count, self.config.head_dim
        return (torch.randn(shape, device=self.device, dtype=self.plain.dtype) for _ in range(2))

    @staticmethod
    def _steps(model, ids, cache):
        for token in ids.split(1, 1):
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)


class Bench(Runs):
    """Groups of rows: what is compared with what."""

    def steps(self, contexts, cap=512, names=("sketch", "compact", "recall")):
        """Milliseconds a token against the context, all caches of all contexts in turn, as `model.generate` runs them: on a GPU
        steps of bounded caches are recorded. Beside them the least time that copying takes."""
        self.begin(contexts=contexts, methods=[self.method(name, cap) for name in names])
        fast = "recorded" if self.device == "cuda" else None
        runs = {f"{FULL}, {seen} seen": self.full(seen) for seen in contexts}
        runs |= {
            f"{name}, {seen} seen": self.cycle(name, seen, cap, fast) for name in names for seen in contexts
        }
        self.time(runs)
        for seen in contexts:
            for name in names:
                self.table.ratio(f"{name}, {seen} seen", f"{FULL}, {seen} seen")
        for name in (FULL, *names):
            self.table.slope(
                f"{name}, slope per doubling", contexts, [f"{name}, {seen} seen" for seen in contexts]
            )
        self.predict(contexts, cap)

    def predict(self, contexts, cap):
        """Rows "predicted, ...": weights and cache of a step, read once at the bandwidth of a copy. No measurement."""
        rate = copy_bandwidth(self.device, 2**30 if self.device == "cuda" else 2**27)
        weights = sum(p.nbytes for p in self.plain.parameters())
        held = nbytes(self.config, dtype=self.plain.dtype, **self.method("compact", cap))["total"]
        for seen in contexts:
            for name, size in ((FULL, full_nbytes(self.config, seen, self.plain.dtype)), ("compact", held)):
                self.table.add(
                    f"predicted, {name}, {seen} seen", "ms", [1e3 * (weights + self.batch * size) / rate]
                )

    def peers(
        self,
        seen,
        caps=(512,),
        fast=("compact", "sketch"),
        plain=("sketch", "compact"),
        others=(FULL, *QUANTIZED, OFFLOADED),
    ):
        """A step after `seen` tokens: transformers' caches, a compiled StaticCache and `others`, ours as they are (`plain`) and
        compiled (`fast`; on a GPU recorded, too)."""
        where = f"{seen} seen, batch {self.batch}"
        self.begin(seen=seen, caps=caps, methods=[self.method(name, caps[0]) for name in (*fast, *plain)])
        makers = {"StaticCache, compiled": partial(self.full, seen, "StaticCache")}
        others = [each for each in others if each != OFFLOADED or self.device == "cuda"]
        makers |= {kind: partial(self.full, seen, kind) for kind in others}
        for cap in caps:
            makers |= {f"{n}, cap {cap}": partial(self.cycle, n, seen, cap) for n in plain}
            makers |= {
                f"{n}, cap {cap}, compiled": partial(self.cycle, n, seen, cap, "compiled") for n in fast
            }
        runs = self._there({f"{name}, {where}": make for name, make in makers.items()})
        self.time(runs)
        for row in runs:
            for other in (FULL, "StaticCache, compiled"):  # nothing where one was left out
                if not row.startswith(other):
                    self.table.ratio(row, f"{other}, {where}")
        for cap in caps:
            for name in fast[1:]:
                self.table.ratio(
                    f"{fast[0]}, cap {cap}, compiled, {where}", f"{name}, cap {cap}, compiled, {where}"
                )

    @staticmethod
    def _there(makers):
        """Those that run here, their first cycle done: a library that is missing or a compiler that fails leaves one out."""
        runs = {}
        for row, make in makers.items():
            try:
                run = make()
                elapsed(run)
                runs[row] = run
            except TimeoutError:
                raise
            except ImportError as error:
                print(f"left out: {row} ({error})", flush=True)
            except Exception:
                print(f"left out: {row}\n{traceback.format_exc(limit=3)}", flush=True)
        return runs

    def generate(self, prompt, new, cap=512, names=("sketch", "compact"), steps=False, chunk=CHUNK):
        """Whole texts through `model.generate`, per new token; steps: on a GPU, where steps are recorded, one by one, too."""
        self.begin(prompt=prompt, new=new, chunk=chunk, methods=[self.method(name, cap) for name in names])
        ids = self.ids(prompt)
        own = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
        plain, held = f"generate, {FULL}", dict[str, Any]()

        def bounded(row, name, **more):
            cache = held.setdefault(row, self.bounded(name, cap, prefill_chunk=chunk))
            cache.reset()
            self.model.generate(ids, past_key_values=cache, **own, **more)

        runs = {plain: partial(self.plain.generate, ids, **own)}
        for name in names:
            row = f"generate, {name}"
            runs[row] = partial(bounded, row, name)
            if steps:
                row = f"generate, {name}, step by step"
                runs[row] = partial(bounded, row, name, disable_compile=True)
        self.time(runs, per=new)
        for row in list(runs)[1:]:
            self.table.ratio(row, plain)

    def prompts(self, counts, cap=512, names=("sketch", "compact"), chunks=(None, CHUNK)):
        """A whole prompt with a new cache, against a plain one; chunks: tokens between evictions (`prefill_chunk`), None: as the
        preset has it."""
        self.begin(counts=counts, methods=[self.method(name, cap) for name in names], chunks=chunks)

        def full(count):
            self.prompt(self.plain, DynamicCache(config=self.config), count, count)

        def bounded(count, name, chunk):
            self.prompt(self.model, self.bounded(name, cap, prefill_chunk=chunk), count, count)

        for count in counts:
            plain = f"prompt of {count}, {FULL}"
            runs = {plain: partial(full, count)}
            for name in names:
                for chunk in chunks:
                    row = f"prompt of {count}, {name}" + (f", once per {chunk}" if chunk else "")
                    runs[row] = partial(bounded, count, name, chunk)
            self.time(runs, per=1)
            for row in list(runs)[1:]:
                self.table.ratio(row, plain)

    def waits(self, cap=512, seen=1024, names=("sketch", "compact")):
        """How often the host waits for a GPU in a cycle of steps, per step."""
        self.begin(methods=[self.method(name, cap) for name in names])
        for name in names:
            for kind, fast in (("as it is", None), ("recorded", "compiled")):
                run = self.cycle(name, seen, cap, fast)
                for _ in range(3):  # recorded when they come again
                    run()
                counts = []
                for _ in range(5):
                    with warnings.catch_warnings(record=True) as told:
                        warnings.simplefilter("always")
                        torch.cuda.set_sync_debug_mode("warn")
                        run()
                        torch.cuda.set_sync_debug_mode("default")
                    counts.append(len([each for each in told if "synchroniz" in str(each.message)]) / CYCLE)
                self.table.add(f"waits of the host, {name}, {kind}", "per step", counts)

    def longest(self, share=8):
        """The longest context with which a step still runs: of the full cache, and of compact in a share of its bytes."""
        self.begin(share=share)
        token, dtype = self.ids(1), self.plain.dtype
        small, large = (
            nbytes(self.config, dtype=dtype, **self.method("compact", cap))["total"] for cap in (512, 1024)
        )

        def full(context):
            cache: Any = StaticCache(config=self.config, max_cache_len=context)
            heads, width = self.config.num_key_value_heads, self.config.head_dim
            cache.early_initialization(self.batch, heads, width, self.plain.dtype, self.plain.device)
            for layer in cache.layers:
                layer.cumulative_length.fill_(context - 1)
            position = torch.full((1, 1), context - 1, device=token.device)
            self.plain(token, past_key_values=cache, position_ids=position, use_cache=True)

        def compact(context):
            more = full_nbytes(self.config, context, dtype) // share - small
            cache = self.bounded("compact", 512 + int(more / (large - small) * 512))
            self._steps(self.model, token, cache)
            for layer in cache.layers:  # as if a text had filled them
                layer.slots.used = layer.slots.kept = layer.seen = layer.max_cache_size
                layer.slots.positions.copy_(torch.arange(layer.capacity, device=token.device))
            self._steps(self.model, token, cache)

        ours, theirs = f"longest context, compact at 1/{share}", f"longest context, {FULL}"
        for row, fits in ((ours, compact), (theirs, full)):
            self.table.add(row, "tokens", [most(fits)])
        self.table.ratio(ours, theirs)


def _nothing(layer, query, *_):
    """In place of attention over recall's store while a text is read that is only to fill it: 32,768 tokens take minutes."""
    return torch.zeros_like(query)


def most(fits, least=4096):
    """The largest number, to 2 %, for which `fits` raises no error for want of memory."""
    low, high = least, math.inf
    while high > 1.02 * low:
        middle = min(2 * low, (low + high) / 2)
        try:
            fits(int(middle))
            low = middle
        except (torch.OutOfMemoryError, ValueError) as error:
            print(f"{middle:.0f} tokens do not fit: {str(error)[:90]}", flush=True)
            high = middle
        torch.cuda.empty_cache()
    return low
