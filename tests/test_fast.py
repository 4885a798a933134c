"""Fused operations against the eager rule: one table of every policy and every feature, step by step.

Where kernels can't run, fused operations fall back on the eager rule: see `test_with_the_interpreter` in test_kernels.py.
"""

import copy

import pytest
import torch
from test_kernels import DEVICE, runs, sorted_by_position

from sketchkv import LRU, TOVA, AttentionMass, H2O, KeyNorm, Random, Sketch, SnapKV, Summary, Window
from sketchkv.fast.ops import Fused
from sketchkv.layer import BoundedLayer, Form, Settings
from sketchkv.passes import Tokens
from sketchkv.quantize import quantized
from sketchkv.slots import Plain
from sketchkv.window import WindowLayer

CAP, SINKS, RECENT, EVERY, STEPS, WIDTH = 9, 2, 3, 3, 19, 16


class Squared(AttentionMass):
    """A policy with a memory of its own kind: a kernel must not update its mass behind its back."""

    def observe(self, slots, attention):
        super().observe(slots, attention**2)


class Turned(Window):
    """Scores whose slots do not lie side by side in memory."""

    def score(self, slots, seen):
        return super().score(slots, seen).neg().transpose(1, 2).contiguous().transpose(1, 2)


POLICIES = {
    "window": Window(),
    "random": Random(),
    "decayed mean": AttentionMass(),
    "plain mean": AttentionMass(decay=1.0),
    "sum": AttentionMass(mean=False),
    "value norm": AttentionMass(value_norm=True),
    "H2O": H2O(),
    "sketch": Sketch(width=64, depth=2),
    "sketch of tokens": Sketch(width=64, depth=2, key="token"),
    "sketch of positions": Sketch(width=64, depth=2, key="position"),
    "sketch of sums": Sketch(width=64, depth=2, mean=False, decay=1.0),
    "key norm": KeyNorm(),
    "LRU": LRU(),
    "TOVA": TOVA(),
    "SnapKV": SnapKV(kernel=3, observation_window=2),
    "squared": Squared(),
    "turned": Turned(),
}
FEATURES = {
    "plain": dict(),
    "attend_topk": dict(attend_topk=7),
    "summary": dict(summary=Summary()),
    "protecting summaries": dict(summary=Summary(3, spread=True, protects=True)),
    "bits": dict(codec=quantized((5, 4))),
    "other bits": dict(codec=quantized((3, 8)), group=1),
    "keys alone": dict(codec=quantized((6, 16))),
    "compact": dict(codec=quantized((5, 4)), summary=Summary()),
    "padding": dict(padded=True),
    "padding, compact": dict(padded=True, codec=quantized((5, 4)), summary=Summary()),
    "windows": dict(window=True),
    "softcap and sinks": dict(form=Form(0.25, 4.0, torch.tensor([0.5, -0.5, 1.0, 0.0]).to(DEVICE))),
    "half precision": dict(dtype=torch.float16),
    "half precision, compact": dict(dtype=torch.float16, codec=quantized((5, 4)), summary=Summary()),
}


def text(dtype, group, padded, steps=STEPS):
    """A fresh random text of two rows: its queries, keys and values, [(query, key, value, Tokens)] by step, keys neither
    contiguous nor centred."""
    ids = torch.randint(50, (2, steps), device=DEVICE)
    first = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)[:, None, None] if padded else 0
    found = []
    for step in range(steps):
        query = torch.randn(2, 2 * group, 1, WIDTH, device=DEVICE) * 2
        key, value = torch.randn(2, 2, 2, WIDTH, 1, device=DEVICE).mT + 0.5
        positions = torch.full((1, 1), step, dtype=torch.int32, device=DEVICE)
        if padded:
            positions = positions.expand(2, 1).masked_fill(first[:, 0] > step, -1)
        tokens = Tokens(ids[:, step : step + 1], positions, first, padded)
        found.append((query.to(dtype), key.to(dtype), value.to(dtype), tokens))
    return found


def decode(policy, steps, ops, codec=Plain, summary=None, window=False, form=None, settles=8, clocked=False, **settings):
    """(outputs, layer) after `steps`; clocked: driven by a clock on the device, as recorded steps are."""
    settings = Settings(SINKS, RECENT, EVERY, codec=codec, **settings)
    if window:
        layer = WindowLayer(CAP, settings, capped=True)
    else:
        layer = BoundedLayer(copy.deepcopy(policy), CAP, settings, copy.deepcopy(summary))
    if ops:
        layer.ops = ops
    outputs, clock = [], torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for query, key, value, tokens in steps:
        layer.update(key, value)
        layer.slots.codec.settles_after = min(layer.slots.codec.settles_after, settles)  # sooner than in use
        tokens = tokens._replace(clock=clock, positions=clock[None]) if clocked else tokens
        outputs.append(layer.attend(query, key, value, tokens, form or Form(0.25)))
        clock += 1
    return torch.cat(outputs, 2), layer


def state(layer):
    """All that a layer knows: {name: tensor}, tokens in the text's order."""
    found = sorted_by_position(layer.slots, layer.slots.used)
    for name in layer.slots.parts:  # codes may be compared as vectors alone
        for part in layer.slots.parts[name]:
            found.pop(part)
        index = layer.slots["positions"].argsort(dim=-1, stable=True)
        vectors = layer.slots.take(name, index)
        found[name] = vectors.masked_fill((found["positions"] < 0)[..., None], 0)
    for index, tensor in enumerate(layer.policy.tensors()):
        found[f"policy {index}"] = tensor
    for index, tensor in enumerate(layer.summary.tensors() if layer.summary else []):
        found[f"summary {index}"] = tensor
    return found


def both(policy, feature, clocked=False, fused=None):
    """Raises AssertionError where fused operations and the eager rule differ."""
    settings = {"dtype": torch.float32, "group": 2, "padded": False} | FEATURES[feature]
    steps = text(settings.pop("dtype"), settings.pop("group"), settings.pop("padded"))
    expected, eager = decode(POLICIES[policy], steps, None, **settings)
    got, layer = decode(POLICIES[policy], steps, fused or Fused(), clocked=clocked, **settings)
    assert eager.evicted == layer.evicted > 0 and eager.seen == layer.seen
    tolerance = 2e-5 if expected.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    one, other = state(eager), state(layer)
    assert torch.equal(one["positions"], other["positions"])
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")


@runs
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("policy", POLICIES)
def test_fused_operations_equal_the_eager_rule(policy, feature):
    both(policy, feature)


@runs
@pytest.mark.parametrize("feature", ["plain", "compact", "attend_topk"])
@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.recordable])
def test_a_clock_on_the_device_changes_nothing(policy, feature):
    both(policy, feature, clocked=True)


class SinksOff(Fused):
    """Protects one sink too few."""

    def evict(self, layer, tokens):
        layer.num_sinks -= 1
        super().evict(layer, tokens)
        layer.num_sinks += 1


class RecentOff(Fused):
    """Protects one recent token too few."""

    def evict(self, layer, tokens):
        layer.recent_window -= 1
        super().evict(layer, tokens)
        layer.recent_window += 1


class Forgets(Fused):
    """Decays a little too fast."""

    def attend(self, layer, query, tokens, form):
        output = super().attend(layer, query, tokens, form)
        layer.slots["mass"].mul_(0.999)
        return output


@runs
@pytest.mark.parametrize("feature", ["plain", "compact"])
@pytest.mark.parametrize("mutant", [SinksOff(), RecentOff(), Forgets()], ids=lambda mutant: type(mutant).__name__)
def test_the_table_sees_small_faults(mutant, feature):
    found = 0
    for _ in range(4):
        try:
            both("decayed mean", feature, fused=mutant)
        except AssertionError:
            found += 1
    assert found >= 3
