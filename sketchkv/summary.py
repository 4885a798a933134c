"""What evicted tokens leave behind: running means in a few summary slots."""

import torch

from sketchkv.sketches import CarterWegmanHash, SimHash

LSH_BITS = 12
SEED = 0


class Summary:
    """`count` summary slots per sequence and KV head, into which evicted tokens are folded.

    A token goes into the bucket that the SimHash code of its key (Charikar 2002) is hashed to, so that keys that point
    the same way are merged. A bucket holds the mean key, the mean value and the number n of its tokens, and attention
    treats it as n tokens with that key and value: one slot whose logit is raised by log n. This is exact when the
    tokens of a bucket have equal keys. Where keys differ it gives them too little mass, since the mean of exponentials
    is above the exponential of the mean (Jensen). An empty bucket has log 0, no mass.

    With rotary positions the mean is over keys rotated each to its own position: components that turn fast average out,
    and those that turn slowly remain.

    keys, values: `[batch, num_kv_heads, count, head_dim]` in the model's dtype, zero, which attention reads in place;
    they are written to. Means in bfloat16 or float16 alone would stop moving after a few hundred tokens, when a step
    falls below half of the last place: what rounding leaves over is kept too, in a second tensor of that dtype, which
    comes to the bytes of float32. A float32 model needs none.
    """

    def __init__(self, keys, values):
        self.means = (keys, values)
        half = keys.dtype != torch.float32
        self.remainders = (torch.zeros_like(keys), torch.zeros_like(values)) if half else ()
        self.counts = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        self.code = self.hash = None  # one bucket needs no hashing
        if keys.shape[2] > 1:
            self.code = SimHash(keys.shape[-1], LSH_BITS, SEED, keys.device)
            self.hash = CarterWegmanHash(keys.shape[2], 1, SEED, keys.device)

    def buckets(self, keys):
        """Bucket of each key: int64 `[batch, num_kv_heads, n]` of `[batch, num_kv_heads, n, head_dim]`."""
        if self.code is None:
            return torch.zeros(keys.shape[:-1], dtype=torch.int64, device=keys.device)
        return self.hash(self.code(keys)).squeeze(-2)

    def fold(self, keys, values, real):
        """Takes in n tokens, `[batch, num_kv_heads, n, head_dim]`; `real`: bool `[batch, num_kv_heads, n]`, False for
        padding, which leaves no trace."""
        buckets = torch.arange(self.counts.shape[-1], device=keys.device)
        # A product with a one-hot matrix, since scatter_add_ on CUDA sums in no fixed order.
        member = ((self.buckets(keys)[..., None] == buckets) & real[..., None]).float().transpose(-1, -2)
        added = member.sum(-1)
        self.counts += added
        for i, new in enumerate((keys, values)):
            mean = self.means[i].float()
            if self.remainders:
                mean = mean + self.remainders[i]
            step = member @ new.float() - added[..., None] * mean
            mean = mean + step / self.counts.clamp(min=1)[..., None]
            self.means[i].copy_(mean)
            if self.remainders:
                self.remainders[i].copy_(mean - self.means[i])

    def bias(self):
        """What is added to the logits: log n, float32 `[batch, num_kv_heads, count]`, -inf for an empty bucket."""
        return self.counts.log()

    def tensors(self):
        """All state, the batch first."""
        return [*self.means, *self.remainders, self.counts]

    def clear(self):
        for tensor in self.tensors():
            tensor.zero_()

    def nbytes(self):
        """Bytes held: {"kv": the means, "policy": counts, projection and hash parameters}."""
        means = sum(tensor.nbytes for tensor in (*self.means, *self.remainders))
        hashing = 0 if self.code is None else self.code.nbytes + self.hash.nbytes
        return {"kv": means, "policy": self.counts.nbytes + hashing}
