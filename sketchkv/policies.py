"""Eviction policies: which tokens a full cache keeps. One class, one idea; `score` is all that a new one must define.

A policy belongs to one layer. It may keep numbers that travel with a token (`slots.add` in `allocate`) and tensors of its
own (listed by `tensors`, batch first), so that memory is counted and beam search moves it. Sinks and the recent window are
protected by the cache alike for all policies, so that comparisons between policies compare scores and nothing else.
"""

import torch

from sketchkv.checks import flag, share


class Policy:
    """Base of all policies."""

    uses_attention = False  # whether `observe` wants attention: without, a layer need not compute it
    recordable = True  # whether the same operations serve every eviction, with nothing that Python draws
    layer = 0  # index of the layer it serves, set by the cache

    def allocate(self, slots):
        """Called once per layer when its slots (`sketchkv.slots.Slots`) are allocated."""

    def reset(self, slots):
        """The slots were emptied for another text. Tensors stay where they are: recorded steps expect them there."""
        self.allocate(slots)

    def enter(self, slots, new, token_ids):
        """Tokens entered the slots `new` (slice); `token_ids` is `[batch, n]`, or None if the model saw embeddings."""

    def query(self, slots, query):
        """Queries of n new tokens, `[batch, num_heads, n, width]`; the new tokens are the last n slots."""

    def observe(self, slots, attention):
        """Attention mass of n new queries on each occupied slot: `[batch, num_kv_heads, n, used]`, float32, query heads of a
        group summed, rows of padding zero. The new tokens are the last n slots."""

    def score(self, slots, seen):
        """Importance of each occupied slot `[batch, num_kv_heads, used]`, higher is kept; `seen` tokens have passed."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def tensors(self):
        """Tensors of the policy's own (not per slot), the batch first."""
        return []

    def nbytes(self, slots):
        """Bytes held beside keys and values: {"sketch", "policy"}, the latter with the slots' positions."""
        beside = slots.nbytes(*(slots.arrays.keys() - slots.kv))
        return {"sketch": 0, "policy": beside + sum(tensor.nbytes for tensor in self.tensors())}


class Window(Policy):
    """Keeps the newest tokens; with sinks this is StreamingLLM (Xiao et al. 2023, arXiv 2309.17453)."""

    def score(self, slots, seen):
        return slots["positions"].float()


MOST_DECAY = 0.9999  # between this and 1, sums of its powers lose their digits


def exposure(age, decay):
    """Queries that could have attended to a token of this age (in tokens, itself included), discounted like its mass: the
    sum of decay^i for i below age."""
    return age.float() if decay == 1 else (1 - decay ** age.float()) / (1 - decay)


class AttentionMass(Policy):
    """Exact accumulators: the attention mass a token received since it was stored, one float32 per slot.

    decay: discounts the past per query, in (0, 1].
    mean: divides by the (equally discounted) number of queries that could have attended to the token, since plain sums let
        old tokens win by age (A2SF, arXiv 2407.20485).
    value_norm: weights by the norm of the token's value, since what is lost with a token is its attention times its value
        (VATP, Guo et al. 2024, arXiv 2406.12335).
    Raises ValueError for a value out of range.
    """

    uses_attention = True

    def __init__(self, decay=0.99, mean=True, value_norm=False):
        self.decay = share("decay", decay, "; 1 never forgets")
        if MOST_DECAY < self.decay < 1:
            raise ValueError(
                f"decay must be 1 or at most {MOST_DECAY}, which float32 can tell from 1; got {decay!r}"
            )
        self.mean, self.value_norm = flag("mean", mean), flag("value_norm", value_norm)

    def allocate(self, slots):
        slots.add("mass", torch.float32)

    def observe(self, slots, attention):
        count, mass = attention.shape[2], slots["mass"]
        if count == 1:
            torch.add(attention[:, :, 0], mass, alpha=self.decay, out=mass)
        else:
            self.receive(slots, self.weights(count, mass.device) @ attention, count)

    def weights(self, count, device):
        """How much the attention of each of `count` new queries counts, float32 `[count]`: what `observe` adds up of a slot's
        column, and kernels that hold no score do."""
        return self.decay ** torch.arange(count - 1, -1, -1, dtype=torch.float32, device=device)

    def receive(self, slots, sums, count):
        """Adds what `count` new queries gave to each slot, weighted: float32 `[batch, num_kv_heads, used]`."""
        slots["mass"].mul_(self.decay**count).add_(sums)

    def received(self, slots, seen):
        """Attention of each occupied slot, sum or mean: float32 `[batch, num_kv_heads, used]`."""
        return slots["mass"] / (exposure(seen - slots["positions"], self.decay) if self.mean else 1)

    def score(self, slots, seen):
        received = self.received(slots, seen)
        return received * slots["values"].float().norm(dim=-1) if self.value_norm else received
