"""What evicted tokens leave behind: running means in one or a few summary slots, beside the stored tokens."""

import math
from typing import Any

import torch

from sketchkv.checks import flag, memory, whole
from sketchkv.sketch import CarterWegmanHash, SimHash

LSH_BITS = 12


class Summary:
    """`count` summary slots per sequence and KV head, into which evicted tokens are folded.

    A slot holds the mean key, the mean value and the number n of its tokens; attention treats it as n tokens with that key
    and value: its logit is raised by log n. Exact where the keys are equal; where they differ it gives too little mass,
    since the mean of exponentials is above the exponential of the mean (Jensen). An empty slot has log 0, no mass. With
    rotary positions the mean is over keys rotated each to its own position: components that turn fast average out.

    All state is float32: means in half precision would stop moving after a few hundred tokens.

    count: slots. With several, a token goes where the SimHash code of its key (Charikar 2002) is hashed to, so that keys
        that point the same way are merged.
    spread: the variance of the merged keys is kept too, channel by channel, and gives back the mass that the mean key lacks:
        the logits of keys with mean k and variance s^2, if Gaussian, have the mean exponential exp(q k + q^2 s^2 / 2).
    protects: a score is raised by how badly the summary would stand for the token, so that what it says already goes first.
    Raises ValueError for a value out of range.
    """

    # None without spread, or with a single slot.
    variance: Any
    code: Any
    hash: Any

    def __init__(self, count=1, spread=False, protects=False):
        self.count = whole("the number of summary slots", count, 1, 2**20)
        self.spread, self.protects = flag("spread", spread), flag("protects", protects)

    def allocate(self, slots):
        shape, (key_width, value_width) = (*slots.shape, self.count), slots.widths
        needed = 4 * math.prod(shape) * (key_width * (1 + self.spread) + value_width)
        memory(needed, slots.device, f"lower the number of summary slots, {self.count}")
        self.keys = torch.zeros(*shape, key_width, device=slots.device)
        self.values = torch.zeros(*shape, value_width, device=slots.device)
        self.counts = torch.zeros(shape, device=slots.device)
        self.variance = torch.zeros_like(self.keys) if self.spread else None
        self.code = SimHash(key_width, LSH_BITS, 0, slots.device) if self.count > 1 else None
        self.hash = CarterWegmanHash(self.count, 1, 0, slots.device) if self.count > 1 else None

    def buckets(self, keys):
        """Slot of each key: int64 `[batch, num_kv_heads, n]` of `[batch, num_kv_heads, n, width]`."""
        if self.count == 1:
            return torch.zeros(keys.shape[:-1], dtype=torch.int64, device=keys.device)
        return self.hash(self.code(keys)).squeeze(-2)

    def fold(self, keys, values, positions):
        """Takes in n tokens, `[batch, num_kv_heads, n, width]`. Positions below 0 are padding, which leaves no trace, and
        neither does a key or value that is not finite: it would spoil the means for good."""
        keys, values, index = keys.float(), values.float(), self.buckets(keys)
        sound = (positions >= 0) & keys.isfinite().all(-1) & values.isfinite().all(-1)
        keys, values = (x.masked_fill(~sound[..., None], 0) for x in (keys, values))
        # A product with a one-hot matrix, since scatter_add_ on CUDA sums in no fixed order.
        member = (index[..., None] == torch.arange(self.count, device=keys.device)) & sound[..., None]
        member = member.float().transpose(-1, -2)
        added = member.sum(-1)
        self.counts += added
        added, total = added[..., None], self.counts.clamp(min=1)[..., None]
        step = (member @ keys - added * self.keys) / total
        if self.spread:
            within = member @ (keys - self.keys.gather(2, index[..., None].expand_as(keys))).square()
            self.variance.copy_(
                (((total - added) * self.variance + within) / total - step.square()).clamp(min=0)
            )
        self.keys += step
        self.values += (member @ values - added * self.values) / total

    def logits(self, query, form):
        """Logits of queries `[batch * num_kv_heads, m, width]`, as of so many tokens alike: float32
        `[batch * num_kv_heads, m, count]`."""
        query = query.float() * form.scaling
        logits = query @ self.keys.flatten(0, 1).transpose(1, 2)
        if self.spread:
            logits = logits + query.square() @ self.variance.flatten(0, 1).transpose(1, 2) / 2
        return form.capped(logits) + self.counts.log().flatten(0, 1)[:, None]

    def output(self, attention):
        """What attention `[batch * num_kv_heads, m, count]` takes from the summary: float32 `[..., m, width of values]`."""
        return attention.float() @ self.values.flatten(0, 1)

    def protect(self, scores, slots):
        """`scores`, or with `protects` raised by the distance of each token from the nearest mean, key and value as one
        vector, relative to the mean distance of all: what is lost with a token is what the summary does not say of it."""
        if not self.protects:
            return scores
        tokens = torch.cat([slots["keys"].float(), slots["values"].float()], -1)
        distance = torch.cdist(tokens, torch.cat([self.keys, self.values], -1))
        distance = distance.masked_fill(self.counts[:, :, None] == 0, torch.inf).amin(-1)
        real = slots["positions"] >= 0
        distance = distance.where(real & (distance < torch.inf), 0)
        mean = distance.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
        return scores + scores.abs() * distance / mean.clamp(min=1e-30)

    def tensors(self):
        """All state, the batch first."""
        return [self.keys, self.values, self.counts] + ([self.variance] if self.spread else [])

    def clear(self):
        for tensor in self.tensors():
            tensor.zero_()

    def nbytes(self):
        """Bytes held: {"kv": means and variances, "policy": counts and hashing}."""
        hashing = self.code.nbytes + self.hash.nbytes if self.code else 0
        kv = sum(tensor.nbytes for tensor in self.tensors()) - self.counts.nbytes
        return {"kv": kv, "policy": self.counts.nbytes + hashing}
