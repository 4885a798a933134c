"""Fused operations against the eager rule: one table of every policy and every feature, step by step.

On a CPU the table runs in Triton's interpreter, in a process of its own.
"""

import copy

import pytest
import torch
from conftest import interpreted
from test_kernels import DEVICE, HAS_TRITON, INTERPRET, runs, sorted_by_position

from sketchkv import H2O, LRU, TOVA, AttentionMass, KeyNorm, Random, Sketch, SnapKV, Summary, Window
from sketchkv.checks import Settings
from sketchkv.fast.ops import Fused
from sketchkv.layer import BoundedLayer
from sketchkv.logits import Form
from sketchkv.ops import Eager
from sketchkv.passes import Tokens
from sketchkv.quantize import quantized
from sketchkv.slots import Plain
from sketchkv.window import WindowLayer

CAP, SINKS, RECENT, EVERY, WIDTH = 9, 2, 3, 3, 16
PROMPT, STEPS = 8, 9  # tokens that come at once, and one by one


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
    "ring": dict(codec=quantized((5, 4), newest=4, sinks=2)),
    "other rings": dict(codec=quantized((3, 8), newest=11, finer=3), group=1, summary=Summary()),
    "ring in 16 bits": dict(codec=quantized((5, 4), newest=2, sinks=1, finer=16)),
    "padding, ring": dict(padded=True, codec=quantized((5, 4), newest=4, sinks=2), summary=Summary()),
    "padding": dict(padded=True),
    "padding, compact": dict(padded=True, codec=quantized((5, 4)), summary=Summary()),
    "windows": dict(window=True),
    "softcap and sinks": dict(form=Form(0.25, 4.0, torch.tensor([0.5, -0.5]).to(DEVICE))),
    "bits, softcap and sinks": dict(
        codec=quantized((5, 4)),
        summary=Summary(),
        form=Form(0.25, 4.0, torch.tensor([0.5, -0.5]).to(DEVICE)),
    ),
    "half precision": dict(dtype=torch.float16),
}


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (it exists for Linux)")
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="the tests below run in this very process")
def test_with_the_interpreter():
    interpreted(__file__)


def text(dtype, group, padded):
    """A fresh random text of two rows, [(query, key, value, Tokens)]: a prompt, then single tokens."""
    total = PROMPT + STEPS
    ids = torch.randint(50, (2, total), device=DEVICE)
    first = torch.tensor([0, 5], dtype=torch.int32, device=DEVICE)[:, None, None] if padded else 0
    query = torch.randn(2, group, total, WIDTH, device=DEVICE) * 2
    key, value = torch.randn(2, 2, 1, WIDTH, total, device=DEVICE).mT + 0.5  # neither contiguous nor centred
    positions = torch.arange(total, dtype=torch.int32, device=DEVICE)[None]
    if padded:
        positions = positions.expand(2, total).masked_fill(first[:, 0] > positions, -1)
    tokens, found = Tokens(ids, positions, first, padded), []
    for part in [slice(PROMPT), *(slice(step, step + 1) for step in range(PROMPT, total))]:
        found.append((*(x[:, :, part].to(dtype) for x in (query, key, value)), tokens.part(part)))
    return found


def decode(
    policy,
    steps,
    ops,
    codec=Plain,
    summary=None,
    window=False,
    form=None,
    settles=8,
    clocked=False,
    **settings,
):
    """(outputs, layer) after `steps`; clocked: driven by a clock on the device, as recorded steps are."""
    settings = Settings(SINKS, RECENT, EVERY, codec=codec, **settings)
    if window:
        layer = WindowLayer(CAP, settings, capped=True)
    else:
        layer = BoundedLayer(copy.deepcopy(policy), CAP, settings, copy.deepcopy(summary))
    layer.ops = ops or Eager()  # set by hand, it is what computes on a GPU, too
    outputs, clock = [], torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for query, key, value, tokens in steps:
        layer.update(key, value)
        layer.slots.codec.settles_after = min(layer.slots.codec.settles_after, settles)  # sooner than in use
        if clocked and clock > 0:
            tokens = tokens._replace(clock=clock, positions=clock[None])
        outputs.append(layer.attend(query, key, value, tokens, form or Form(0.25)))
        clock += query.shape[2]
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
    if getattr(layer.slots.codec, "ring", None):
        for name, kind in (("keys", "near keys"), ("values", "near values")):
            found[kind] = layer.slots.codec.ring.read(name, torch.float32)
        found["span"] = layer.slots.codec.ring.span
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
    # What padding attends to is nobody's business.
    real = torch.cat([each.positions for *_, each in steps], -1)[:, None, :, None] >= 0
    torch.testing.assert_close(
        *(x.masked_fill(~real, 0) for x in (got, expected)), atol=tolerance, rtol=tolerance
    )
    one, other = state(eager), state(layer)
    assert torch.equal(one["positions"], other["positions"])
    for name in one:
        torch.testing.assert_close(
            other[name], one[name], atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}"
        )


def agree(policy, feature, clocked=False):
    """`both`, of up to three texts where vectors are coded: sums are formed in different orders, and now and then a scale lies
    so near the middle between two float16 numbers, or a channel between two levels, that the two fall apart by one step. A
    fault of the code shows in every text."""
    for _ in range(3 if "codec" in FEATURES[feature] else 1):
        try:
            return both(policy, feature, clocked)
        except AssertionError as error:
            differ = error
    raise differ


def some(policies, features, every):
    """Pairs of the table: all on a GPU; in the interpreter, which is slow, one in `every`, so that each row and each
    column occurs."""
    pairs = [(p, f, i + j) for i, p in enumerate(policies) for j, f in enumerate(features)]
    return [(p, f) for p, f, number in pairs if DEVICE == "cuda" or number % every == 0]


@runs
@pytest.mark.parametrize("policy, feature", some(POLICIES, FEATURES, 12))
def test_fused_operations_equal_the_eager_rule(policy, feature):
    if policy == "random" and "padding" in feature:
        pytest.skip("draws one number per slot, and padding goes in any order: the slots may differ")
    agree(policy, feature)


@runs
@pytest.mark.parametrize(
    "policy, feature",
    some(
        [name for name in POLICIES if POLICIES[name].recordable],
        ["plain", "compact", "attend_topk", "ring"],
        6,
    ),
)
def test_a_clock_on_the_device_changes_nothing(policy, feature):
    agree(policy, feature, clocked=True)


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
@pytest.mark.parametrize(
    "mutant", [SinksOff(), RecentOff(), Forgets()], ids=lambda mutant: type(mutant).__name__
)
def test_the_table_sees_small_faults(mutant, feature):
    # Norms of keys know no age: protected tokens are as likely as others to be the lowest.
    policy = "decayed mean" if isinstance(mutant, Forgets) else "key norm"
    with pytest.raises(AssertionError):
        for _ in range(6):  # some texts would evict the token anyway
            both(policy, feature, fused=mutant)
