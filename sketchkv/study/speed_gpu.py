"""What is measured on an NVIDIA GPU: the fused kernel, recorded steps, and the pieces of a step.

"graph" times are replays of a CUDA graph, the device's work alone; "called" times include what Python and the launches
cost. Inputs rotate and exceed the L2 cache.
"""

import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, StaticCache
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sketchkv import H2O, AttentionMass, Sketch, SketchCache, Summary, Window, enable, generate
from sketchkv.checks import Settings
from sketchkv.fast.attention import attend
from sketchkv.fast.ops import fused
from sketchkv.layer import BoundedLayer
from sketchkv.logits import Form
from sketchkv.ops import eager
from sketchkv.passes import Tokens
from sketchkv.quantize import quantized
from sketchkv.study.timing import elapsed, in_turn

GRAPH = "time per step, graph"
L2 = 150e6  # bytes: several times what the L2 cache holds
DEVICE, DTYPE = "cuda", torch.bfloat16
COMPACT = dict(
    policy=AttentionMass(value_norm=True), codec=quantized((5, 4)), summary=Summary(1)
)  # as `SketchCache.compact`


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


# One layer


def filled(
    policy, batch, used, kv_heads=12, head_dim=64, summary=None, device=DEVICE, dtype=DTYPE, **settings
):
    """A layer whose slots are full of random tokens."""
    layer = BoundedLayer(policy, used - 16, Settings(**settings), summary)
    key, value = torch.randn(2, batch, kv_heads, used, head_dim, device=device, dtype=dtype)
    layer.update(key[:, :, :1], value[:, :, :1])
    now = Tokens(None, torch.arange(used, dtype=torch.int32, device=device)[None])
    policy.enter(layer.slots, layer.ops.append(layer, key, value, now), None)
    layer.seen = used
    return layer


def attending(layer, query, ops):
    """A function that attends once more with the newest token of a full layer."""
    now = Tokens(None, torch.full((1, 1), layer.seen - 1, dtype=torch.int32, device=query.device))
    return lambda: ops.attend(layer, query, now, Form(query.shape[-1] ** -0.5))


def attention_rows(table, bandwidth, batch, used=1024, heads=12, head_dim=64, seconds=20):
    """The fused kernel over `used` slots, the eager path and SDPA, beside the floor."""
    name = f"batch {batch}, {used} slots"
    layers = [filled(AttentionMass(), batch, used, heads, head_dim) for _ in range(3 if batch > 8 else 40)]
    queries = torch.randn(len(layers), batch, heads, 1, head_dim, device=DEVICE, dtype=DTYPE)
    pairs, per = list(zip(layers, queries)), len(layers)
    steps = {
        kind: [attending(*pair, ops) for pair in pairs] for kind, ops in (("fused", fused), ("eager", eager))
    }
    graphs = {f"{kind}, {name}": captured(each) for kind, each in steps.items()}
    graphs[f"SDPA, {name}"] = captured(
        [
            lambda layer=layer, q=q: scaled_dot_product_attention(
                q, layer.slots["keys"], layer.slots["values"]
            )
            for layer, q in pairs
        ]
    )
    in_turn(table, graphs, per, quantity=GRAPH, seconds=seconds)
    mass = 2 * 4 * batch * heads * used  # read and written
    needed = layers[0].slots.nbytes("keys", "values") + mass + 2 * queries[0].nbytes
    table.floor(f"fused, {name}", needed / bandwidth * 1e6, f"fused, {name}")
    for kind in ("eager", "SDPA"):
        table.ratio(f"{kind} / fused, {name}", f"{kind}, {name}", f"fused, {name}")
    calls = {
        f"{kind}, {name}, called": lambda each=each: [step() for step in each] for kind, each in steps.items()
    }
    in_turn(table, calls, per, seconds=seconds)
    table.ratio(f"eager / fused, {name}, called", *reversed(calls))
    table.ratio(f"eager, called / fused, graph, {name}", f"eager, {name}, called", f"fused, {name}")


def full_cache_rows(table, batch=64, tokens=16384, used=1024):
    """SDPA over all tokens against the fused kernel over a bounded cache, in turn."""
    query = torch.randn(batch, 12, 1, 64, device=DEVICE, dtype=DTYPE)
    keys, values = (torch.randn(batch, 12, tokens, 64, device=DEVICE, dtype=DTYPE) for _ in range(2))
    layers = [filled(AttentionMass(), batch, used) for _ in range(3)]
    bounded = captured([attending(layer, query, fused) for layer in layers * 2])
    full = captured([lambda: scaled_dot_product_attention(query, keys, values) for _ in range(6)])
    rows = {
        f"SDPA, batch {batch}, {tokens} tokens": full,
        f"fused beside it, batch {batch}, {used} slots": bounded,
    }
    in_turn(table, rows, per=6, quantity=GRAPH)
    table.ratio(f"SDPA over {tokens} tokens / fused over {used} slots, batch {batch}", *rows)


def recorded_layer(policy, batch, cap, kv_heads=12, group=1, head_dim=64, **settings):
    """16 steps of one layer's whole `attend` with their eviction, recorded as one CUDA graph."""
    layer = filled(policy, batch, cap + 16, kv_heads, head_dim, **settings)
    layer.ops.evict(layer, Tokens(None, torch.zeros(1, 1)))
    layer.ops = fused
    clock = torch.full((1,), layer.seen, dtype=torch.int32, device=DEVICE)
    queries = torch.randn(16, batch, kv_heads * group, 1, head_dim, device=DEVICE, dtype=DTYPE)
    # Many different tokens: equal ones would share counters of the sketch, and their additions would wait for each other.
    states = torch.randn(16, 2, batch, kv_heads, 1, head_dim, device=DEVICE, dtype=DTYPE)

    def step(query, state):
        layer.attend(query, *state, Tokens(None, clock[None], clock=clock), Form(head_dim**-0.5))
        clock.add_(1)

    return captured([lambda q=q, s=s: step(q, s) for q, s in zip(queries, states)])


def recorded_layer_rows(table, batch=64, cap=1024, seconds=20):
    """What choosing costs: one layer under several policies with the same slots."""
    policies = {"sketch": Sketch(), "attention mass": AttentionMass(), "H2O": H2O(), "window": Window()}
    runs = {
        f"recorded layer, {name}, batch {batch}, cap {cap}": recorded_layer(p, batch, cap)
        for name, p in policies.items()
    }
    in_turn(table, runs, per=16, quantity=GRAPH, seconds=seconds)
    sketch = next(iter(runs))
    for row, name in list(zip(runs, policies))[1:]:
        table.ratio(f"recorded layer, sketch / {name}, batch {batch}", sketch, row)


# Recorded steps of a whole model


def _model(dtype=DTYPE, **changes):
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(**changes))
    model = model.to(DEVICE, dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def _bounded(model, ids, new, policy=None, cap=256, compile=False):
    cache = SketchCache(model.config, cap, policy=policy, prefill_chunk=ids.shape[1])

    def run(new=new):
        cache.reset()
        generate(model, ids, cache, new, graph=True, compile=compile)

    return run


def _compare(table, runs, new, repetitions, seconds):
    """Whole texts in turn, each beside its prompt alone; rows "decoding" are what the new - 1 further steps cost. Ratios are
    to each run with a sketch."""
    both: dict[str, Callable] = {}
    for row, run in runs.items():
        both |= {row: run, f"prompt alone, {row}": lambda run=run: run(1)}
    in_turn(table, both, repetitions=repetitions, warmup=1, quantity="time of a text", seconds=seconds)
    for row in runs:
        steps = (table.samples[row] - table.samples[f"prompt alone, {row}"]) / (new - 1)
        table.add(f"decoding, {row}", "time per step", "us", steps)
    for ours in (row for row in runs if "sketch" in row):
        for row in (row for row in runs if row != ours):
            for kind in ("", "decoding, "):
                table.ratio(f"{kind}{row.split(', batch')[0]} / {ours}", kind + row, kind + ours)


def recorded_rows(table, batch=1, prompt=512, new=256, repetitions=20, seconds=70):
    """Decoding with recorded steps against `generate` with DynamicCache."""
    plain, model = _model(), enable(_model())
    ids = torch.randint(0, 50000, (batch, prompt), device=DEVICE)
    name = f"batch {batch}, {prompt} + {new} tokens"

    def library(new=new):
        plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    runs = {
        f"recorded, sketch, {name}": _bounded(model, ids, new),
        f"generate, DynamicCache, {name}": library,
        f"recorded, window, {name}": _bounded(model, ids, new, Window()),
        f"recorded and compiled, sketch, {name}": _bounded(model, ids, new, compile=True),
    }
    for row, run in runs.items():
        if row.startswith("recorded"):
            table.add(
                f"first text, recording and compiling included, {row}", "time of a text", "us", [elapsed(run)]
            )
    _compare(table, runs, new, repetitions, seconds)


def static_rows(table, prompt=512, new=256, repetitions=20, seconds=60):
    """Recorded steps, as they are and compiled, against transformers' StaticCache with the whole step compiled
    (`mode="reduce-overhead"`). What compiling takes stands in a row of its own."""
    plain, model = _model(), enable(_model())
    ids = torch.randint(0, 50000, (1, prompt), device=DEVICE)
    name = f"batch 1, {prompt} + {new} tokens"
    static = StaticCache(config=plain.config, max_cache_len=prompt + new)
    step = torch.compile(plain.forward, mode="reduce-overhead", fullgraph=True)

    def library(new=new):
        static.reset()
        logits = plain(ids, past_key_values=static, logits_to_keep=1).logits
        position = torch.full((1, 1), prompt, device=DEVICE)
        for _ in range(new - 1):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = step(token, past_key_values=static, position_ids=position, use_cache=True).logits
            position = position + 1

    runs = {
        f"recorded again, sketch, {name}": _bounded(model, ids, new),
        f"StaticCache, compiled, {name}": library,
        f"recorded and compiled again, sketch, {name}": _bounded(model, ids, new, compile=True),
    }
    for row, run in list(runs.items())[1:]:
        try:
            table.add(f"first text, compiling included, {row}", "time of a text", "us", [elapsed(run)])
        except Exception:  # a compiler's error leaves the others to be compared
            traceback.print_exc()
            del runs[row]
    _compare(table, runs, new, repetitions, seconds)


# The pieces of the cost model


SHAPES = {
    "GPT-2 small": dict(kv_heads=12, group=1, head_dim=64),
    "Llama-3.1": dict(kv_heads=8, group=4, head_dim=128),
}


def _piece(kind, batch, slots, kv_heads, group, head_dim):
    """A row's name, which `scaling` reads back."""
    return f"{kind}: batch {batch}, kv_heads {kv_heads}, group {group}, head_dim {head_dim}, slots {slots}"


def attention_pieces(table, repetitions=20):
    """The fused kernel from few slots to long full caches, SDPA beside it where a full cache would use it."""
    sizes = {
        "GPT-2 small": [(1, 1024), (8, 256), (8, 1024), (64, 256), (64, 4096), (256, 1024)],
        "Llama-3.1": [(1, 1024), (8, 1024), (64, 1024), (8, 8192), (1, 131072), (4, 131072)],
    }
    for model, pairs in sizes.items():
        shape = SHAPES[model]
        kv_heads, group, head_dim = shape.values()
        for batch, slots in pairs:
            sets = min(64, math.ceil(L2 / (4 * batch * kv_heads * slots * head_dim)))
            keys, values = torch.randn(2, sets, batch, kv_heads, slots, head_dim, device=DEVICE, dtype=DTYPE)
            query = torch.randn(batch, kv_heads * group, head_dim, device=DEVICE, dtype=DTYPE)
            mass = torch.zeros(sets, batch, kv_heads, slots, device=DEVICE)
            runs = {
                _piece("attention", batch, slots, **shape): captured(
                    [
                        lambda k=k, v=v, m=m: attend(query, k, v, head_dim**-0.5, None, m, 0.99)
                        for k, v, m in zip(keys, values, mass)
                    ]
                )
            }
            if slots >= 8192:
                runs[_piece("SDPA", batch, slots, **shape)] = captured(
                    [
                        lambda k=k, v=v: scaled_dot_product_attention(
                            query[:, :, None], k, v, enable_gqa=True
                        )
                        for k, v in zip(keys, values)
                    ]
                )
            in_turn(table, runs, sets, repetitions, quantity=GRAPH, seconds=3)
            del runs, keys, values, mass
            torch.cuda.empty_cache()


def layer_pieces(table, cap=1024, repetitions=20):
    """A whole step of one layer's cache: attention, storing, choosing; in 16 bits, and compact."""
    for shape in SHAPES.values():
        for batch in (1, 8, 64):
            runs = {
                _piece(kind, batch, cap, **shape): recorded_layer(batch=batch, cap=cap, **shape, **settings)
                for kind, settings in (("layer", dict(policy=Sketch())), ("compact layer", COMPACT))
            }
            in_turn(table, runs, 16, repetitions, quantity=GRAPH, seconds=3)
            del runs
            torch.cuda.empty_cache()


def block_pieces(table, repetitions=20):
    """A decoder layer less its attention: norms, projections, feed-forward. "/ 2" is one of two GPUs' share."""
    llama: dict[str, Any] = dict(head_dim=128, num_key_value_heads=8, intermediate_size=14336)
    configs = {
        "GPT-2 small": GPT2Config(),
        "Llama-3.1-8B": LlamaConfig(hidden_size=4096, num_attention_heads=32, **llama),
        "Llama-3.1-70B / 2": LlamaConfig(
            hidden_size=8192, num_attention_heads=32, **llama | dict(num_key_value_heads=4)
        ),
    }
    for name, config in configs.items():
        kind: Any = GPT2Block if isinstance(config, GPT2Config) else LlamaDecoderLayer
        config._attn_implementation = "sdpa"
        with torch.device(DEVICE):
            first = kind(config, layer_idx=0).to(DTYPE).eval().requires_grad_(False)
            size = sum(parameter.nbytes for parameter in first.parameters())
            blocks = [first] + [
                kind(config, layer_idx=0).to(DTYPE).eval() for _ in range(math.ceil(L2 / size) - 1)
            ]
        for batch in (1, 16, 64, 256):
            hidden = torch.randn(batch, 1, config.hidden_size, device=DEVICE, dtype=DTYPE)
            run = captured([lambda block=block: _without_attention(block, hidden) for block in blocks])
            row = f"block: {name}, batch {batch}, bytes {size}"
            in_turn(table, {row: run}, len(blocks), repetitions, quantity=GRAPH, seconds=3)


def _without_attention(block, hidden):
    if isinstance(block, GPT2Block):
        query = block.attn.c_attn(block.ln_1(hidden))[..., : hidden.shape[-1]]
        hidden = hidden + block.attn.c_proj(query)
        return hidden + block.mlp(block.ln_2(hidden))
    attention, normed = block.self_attn, block.input_layernorm(hidden)
    query, _, _ = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    hidden = hidden + attention.o_proj(query)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))
