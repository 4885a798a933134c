"""What a whole model's steps cost with a bounded cache and with the cache it replaces, on either device.

A sample of decoding is a whole cycle of evictions, so each eviction is paid for by the tokens that it serves.
"""

import copy

import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from sketchkv import H2O, SketchCache, Window, enable, generate
from sketchkv.study.timing import in_turn

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


def decode_rows(table, models, name, batch, seen=1024, cap=256, repetitions=20, seconds=60, hardware=None):
    """A decode step after `seen` tokens: the full cache, the sketch, a window and H2O with the same slots.

    hardware: (bytes per second, operations per second) for the floor of each, or None.
    """
    plain, model = models
    ids = tokens(model, batch, seen)
    policies = {"SketchCache": None, "window": Window(), "H2O": H2O()}
    caches = {"DynamicCache": (plain, _prefill(plain, ids, DynamicCache(config=plain.config)))}
    caches |= {which: (model, _prefill(model, ids, SketchCache(model.config, cap, policy=p))) for which, p in policies.items()}
    name = f"{name}, batch {batch}, {seen} seen"
    runs = {f"{name}, {which}": (lambda m=m, c=c: _cycle(m, ids, c)) for which, (m, c) in caches.items()}
    in_turn(table, runs, per=CYCLE, repetitions=repetitions, warmup=2, seconds=seconds)
    for which in ("DynamicCache", "window", "H2O"):
        table.ratio(f"{name}, SketchCache / {which}", f"{name}, SketchCache", f"{name}, {which}")
    if hardware:
        for which, stored in (("DynamicCache", seen), ("SketchCache", cap)):
            table.floor(f"{name}, {which}", step_floor(model, batch, stored, *hardware), f"{name}, {which}")


def step_floor(model, batch, stored, bandwidth, rate):
    """Microseconds that one step needs at least: weights and stored keys and values read once, or its multiplications."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    weights = [p for name, p in model.named_parameters() if "wpe" not in name]  # of positions, one row is read
    cached = 2 * batch * config.num_hidden_layers * heads * head_dim * stored
    group = config.num_attention_heads // heads
    needed = sum(p.nbytes for p in weights) + cached * weights[0].element_size()
    operations = 2 * batch * sum(p.numel() for p in weights) + 2 * cached * group
    return max(needed / bandwidth, operations / rate) * 1e6


def loop_rows(table, models, name, prompt=512, new=512, cap=256, repetitions=3, warmup=1, seconds=60):
    """The decode loop in the open with SketchCache against `model.generate` with DynamicCache."""
    plain, model = models
    ids = tokens(model, 1, prompt)
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    name = f"{name}, {prompt} + {new} tokens"
    runs = {
        f"{name}, generate, DynamicCache": lambda: plain.generate(ids, attention_mask=torch.ones_like(ids), **settings),
        f"{name}, manual loop, SketchCache": lambda: generate(model, ids, SketchCache(model.config, cap), new),
    }
    in_turn(table, runs, per=new, repetitions=repetitions, warmup=warmup, seconds=seconds)
    table.ratio(f"{name}, manual loop / generate", *reversed(runs))
