"""What evicted tokens leave behind: running means in a few summary slots. Other ways to merge: `sketchkv.summaries`."""

import torch

from sketchkv.sketches import CarterWegmanHash, SimHash

LSH_BITS = 12
SEED = 0
FADE = 0.998  # weight="decay": what a folded token keeps of its weight, per token evicted after it
LEAST = 1e-6  # weight="mass": what a token of no importance weighs


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

    weight: what a token weighs in the means. "count", all alike; "mass", its importance when it was evicted, as the policy
    has it; "decay", all alike, but fading by `FADE` per token that is evicted later, so that n is the faded number.

    second_order: the variance of the merged keys is kept too, channel by channel, and gives back the mass that the mean
    key lacks: the logits of keys with mean k and variance s^2, if Gaussian, have the mean exponential exp(q k + q^2 s^2 / 2).

    A subclass says which token goes where (`buckets`).
    """

    in_place = True  # whether attention reads the means from the slots' own memory
    code = hash = None

    def __init__(self, keys, values, weight="count", second_order=False):
        self.means = (keys, values)
        half = keys.dtype != torch.float32
        self.remainders = (torch.zeros_like(keys), torch.zeros_like(values)) if half else ()
        self.counts = torch.zeros(keys.shape[:3], dtype=torch.float32, device=keys.device)
        self.weight = weight
        self.masses = torch.zeros_like(self.counts) if weight == "mass" else None
        self.variance = torch.zeros_like(keys, dtype=torch.float32) if second_order else None
        self.allocate()

    def allocate(self):
        """Makes what `buckets` needs."""
        keys = self.means[0]
        if keys.shape[2] > 1:  # one bucket needs no hashing
            self.code = SimHash(keys.shape[-1], LSH_BITS, SEED, keys.device)
            self.hash = CarterWegmanHash(keys.shape[2], 1, SEED, keys.device)

    def buckets(self, keys, positions=None):
        """Bucket of each key: int64 `[batch, num_kv_heads, n]` of `[batch, num_kv_heads, n, head_dim]`. Called once for all
        tokens that are folded together, so it may make room for them first (`merge`)."""
        if self.code is None:
            return torch.zeros(keys.shape[:-1], dtype=torch.int64, device=keys.device)
        return self.hash(self.code(keys)).squeeze(-2)

    def fold(self, keys, values, positions, scores=None):
        """Takes in n tokens, `[batch, num_kv_heads, n, head_dim]`; positions: in the text, `[batch, num_kv_heads, n]`, below 0
        for padding, which leaves no trace; scores: their importance, of the same shape, which weight="mass" needs."""
        buckets = torch.arange(self.counts.shape[-1], device=keys.device)
        real = positions >= 0
        if self.weight == "decay":
            self.counts.mul_(FADE ** keys.shape[2])
        # A product with a one-hot matrix, since scatter_add_ on CUDA sums in no fixed order.
        index = self.buckets(keys, positions)
        member = ((index[..., None] == buckets) & real[..., None]).float().transpose(-1, -2)
        added, total = member.sum(-1), self.counts
        total += added
        if self.masses is not None:
            member = member * scores.where(real, 0).clamp(min=LEAST)[:, :, None]
            added, total = member.sum(-1), self.masses
            total += added
        total = total.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        for i, new in enumerate((keys, values)):
            mean = self._mean(i)
            step = (member @ new.float() - added[..., None] * mean) / total
            if self.variance is not None and i == 0:
                own = mean.gather(2, index[..., None].expand_as(new))
                within = member @ (new.float() - own).square()
                spread = ((total - added[..., None]) * self.variance + within) / total - step.square()
                self.variance.copy_(spread.clamp(min=0))
            self._set(i, mean + step)

    def merge(self, target):
        """Bucket j becomes part of bucket `target[..., j]`, int64 `[batch, num_kv_heads, count]`: as if their tokens had come
        to one bucket."""
        member = (target[..., None, :] == torch.arange(target.shape[-1], device=target.device)[:, None]).float()
        weights = self.counts if self.masses is None else self.masses
        total = (member @ weights[..., None]).clamp(min=torch.finfo(torch.float32).tiny)
        share = member * weights[..., None, :] / total  # 1 for a bucket that stays alone: it is only moved
        means = [share @ self._mean(i) for i in range(2)]
        if self.variance is not None:
            apart = self._mean(0) - means[0].gather(2, target[..., None].expand_as(means[0]))
            self.variance.copy_(share @ (self.variance + apart.square()))
        for i, mean in enumerate(means):
            self._set(i, mean)
        for tensor in (self.counts, self.masses):
            if tensor is not None:
                tensor.copy_((member @ tensor[..., None])[..., 0])

    def _mean(self, i):
        """Means of keys (0) or values (1), float32."""
        mean = self.means[i].float()
        return mean + self.remainders[i] if self.remainders else mean

    def _set(self, i, mean):
        self.means[i].copy_(mean)
        if self.remainders:
            self.remainders[i].copy_(mean - self.means[i])

    def entries(self):
        """Mean keys and values, float32 `[batch, num_kv_heads, count, head_dim]`, and the numbers of tokens behind them."""
        return self._mean(0), self._mean(1), self.counts

    def context(self, slots, query, scaling):
        """What attention of the queries `[batch, num_kv_heads, m, head_dim]` reads: keys and values of the summary and then of
        the stored tokens (`Slots`), and what is added to the logits of the summary (`bias`)."""
        return slots.context("keys"), slots.context("values"), self.bias(query, scaling)

    def bias(self, query=None, scaling=1.0):
        """What is added to the logits: log n, -inf for an empty bucket, float32 `[batch, num_kv_heads, 1, count]`; with
        second_order for each of the m queries `[batch, num_kv_heads, m, head_dim]`, and `m` instead of 1."""
        log = self.counts.log()[:, :, None]
        if self.variance is None:
            return log
        return log + (query.float() * scaling).square() @ self.variance.transpose(-1, -2) / 2

    def misfit(self, keys, values, real):
        """How badly the summary would stand for tokens `[batch, num_kv_heads, n, head_dim]`: the distance of each from the
        nearest mean, key and value as one vector, relative to the mean distance of those that are `real` (bool `[batch,
        num_kv_heads, n]`). float32 `[batch, num_kv_heads, n]`, zero while the summary is empty."""
        *means, counts = self.entries()
        tokens, means = (torch.cat([k.float(), v.float()], -1) for k, v in ((keys, values), means))
        distance = torch.cdist(tokens, means).masked_fill(counts[:, :, None] == 0, torch.inf).amin(-1)
        distance = distance.where(real & (distance < torch.inf), 0)
        mean = distance.sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
        return distance / mean.clamp(min=1e-30)

    def tensors(self):
        """All state, the batch first."""
        more = [tensor for tensor in (self.masses, self.variance) if tensor is not None]
        return [*self.means, *self.remainders, self.counts, *more]

    def clear(self):
        for tensor in self.tensors():
            tensor.zero_()

    def nbytes(self):
        """Bytes held: {"kv": the means and variances, "policy": counts, projection and hash parameters}."""
        policy = self.tensors()[2 + len(self.remainders) :]
        kv = [*self.means, *self.remainders]
        if self.variance is not None:
            kv.append(self.variance)
        held = sum(tensor.nbytes for tensor in kv)
        hashing = 0 if self.code is None else self.code.nbytes + self.hash.nbytes
        return {"kv": held, "policy": sum(tensor.nbytes for tensor in policy if tensor is not self.variance) + hashing}
