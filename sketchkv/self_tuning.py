"""A policy that sets its own decay and recent window, head by head, from the attention that it sees."""

import torch

from sketchkv.policies import AttentionMass, exposure

GRAIN = 16  # tokens by which a window is longer or shorter
KEPT = 1e30  # a score that nothing but the cache's own protection is above
MEMORY = 0.99  # per token, of the running means by which decays and windows are judged
MARGIN = 0.8  # of the first decay's loss: another must lose less; chosen on the development documents


class SelfTuned(AttentionMass):
    """`AttentionMass` with the decay, and the recent window, that would have served best so far: for each sequence and KV
    head its own, judged anew at every eviction.

    decays: the mass is kept under all of them at once. Each is judged by what it would have lost: after every eviction it
    names the half of the stored tokens that it ranks lowest, and the attention that these receive until the next eviction is
    its loss, a running mean. That can't be gamed: all name equally many of the same tokens, only their order counts, and the
    loss is what eviction costs. (An error of the estimates would care for the sinks alone, or reward whoever estimates
    least.) The first decay is listened to unless another loses clearly less.

    least, most: bounds of the recent window, multiples of 16. It reaches up to the age at which the score still does young
    tokens injustice: at which those that it alone would have evicted receive more attention per query than those that would
    go in their place. Since tokens beyond the window are evicted unseen, it begins wide, and measures ages inside it alone.
    It takes no more than a quarter of the stored tokens, and acts through the score: the cache's own `recent_window` is
    protected anyway, and should be no more than `least`.

    Attention soon is not attention later: the decay that foretells best what arrives until the next eviction need not be the
    one to evict by. Without `MARGIN` heads would choose short ones, and lose more.
    """

    def __init__(self, decays=(0.99, 0.95, 0.998), least=16, most=64, value_norm=False):
        if not decays:
            raise ValueError("decays must name at least one decay")
        for decay in decays:
            super().__init__(decay, True, value_norm)  # refuses what is out of range
        if not 0 <= least <= most or least % GRAIN or most % GRAIN:
            raise ValueError(f"least and most must be multiples of {GRAIN}, least no more than most; got {least} and {most}")
        self.decays, self.least, self.most = tuple(decays), least, most

    def allocate(self, slots):
        batch, heads, _ = slots.positions.shape
        slots.add("mass", torch.float32, len(self.decays))
        slots.add("arrived", torch.float32)  # attention since the last eviction
        # Whether each decay ranks it low; whether it would be evicted next; whether the window alone saves it.
        slots.add("named", torch.bool, len(self.decays) + 2)
        self.rates = torch.tensor(self.decays, device=slots.device)
        shape = dict(dtype=torch.float32, device=slots.device)
        self.losses = torch.zeros(batch, heads, len(self.decays), **shape)
        # Attention per query, summed, and tokens: of those that the window alone saves, by age, and of the next to be evicted.
        self.received = torch.zeros(batch, heads, 2, self.most // GRAIN + 1, **shape)

    def reset(self, slots):
        for tensor in (*(slots.arrays[name] for name in ("mass", "arrived", "named")), *self.tensors()):
            tensor.zero_()

    def tensors(self):
        return [self.losses, self.received]

    def nbytes(self, slots):
        held = super().nbytes(slots)
        return held | {"policy": held["policy"] + self.rates.nbytes}

    def observe(self, slots, attention):
        count = attention.shape[2]
        weights = self.rates ** torch.arange(count - 1, -1, -1, device=attention.device)[:, None]
        slots["mass"].mul_(self.rates**count).add_(torch.einsum("bhnl,nk->bhlk", attention, weights))
        slots["arrived"].add_(attention.sum(2))

    def enter(self, slots, new, token_ids):
        """The first tokens after an eviction: those that stayed are told apart, and what they receive from now on counts."""
        kept = slots.kept
        if not kept or new.start != kept:
            return
        half = kept // 2
        estimates, alone, young = self._estimates(slots, slots.positions[:, :, kept : kept + 1])
        estimates, alone, young = estimates[:, :, :kept], alone[:, :, :kept], young[:, :, :kept]
        named = slots["named"].zero_()[:, :, :kept]
        named[..., :-2].scatter_(2, estimates.masked_fill(young[..., None], KEPT).topk(half, 2, largest=False).indices, True)
        following = alone.masked_fill(young, KEPT).topk(min(slots.capacity - kept, half), largest=False)
        named[..., -2].scatter_(2, following.indices, True)
        named[..., -1] = young & (alone <= following.values[..., -1:])
        slots["arrived"].zero_()

    def score(self, slots, seen):
        if slots.kept:
            self._learn(slots, seen)
        _, alone, young = self._estimates(slots, seen)
        return alone.masked_fill(young, KEPT)

    def choice(self):
        """Index of the decay that is listened to now, int64 `[batch, num_kv_heads]`."""
        first, others = self.losses.split([1, len(self.decays) - 1], -1)
        return torch.cat([MARGIN * first, others], -1).argmin(-1)

    def window(self, slots):
        """Length of the recent window now, int64 `[batch, num_kv_heads, 1]`."""
        mean = self.received[:, :, 0] / self.received[:, :, 1]  # NaN where there were none: nothing to protect
        grains = torch.arange(1, self.most // GRAIN + 1, device=mean.device)
        worthy = (mean[..., :-1] > mean[..., -1:]) | (self.received[:, :, 1, -1:] == 0)
        reach = torch.nn.functional.pad(worthy * grains, (1, 0)).amax(-1, keepdim=True)
        length = (GRAIN * reach).clamp(self.least, self.most)
        return length.clamp(max=(slots.kept or slots.used) // 4)

    def _worth(self, slots):
        return slots["values"].float().norm(dim=-1) if self.value_norm else torch.ones_like(slots["arrived"])

    def _estimates(self, slots, seen):
        """By each decay the attention per query `[batch, num_kv_heads, used, decays]`; that of the one that is listened to, and
        which tokens are in the recent window, `[batch, num_kv_heads, used]`."""
        positions = slots["positions"]
        exposed = torch.stack([exposure(seen - positions, decay) for decay in self.decays], -1)
        estimates = slots["mass"] / exposed * self._worth(slots)[..., None]
        chosen = self.choice()[..., None, None].expand(*positions.shape, 1)
        return estimates, estimates.gather(-1, chosen).squeeze(-1), positions >= seen - self.window(slots)

    def _learn(self, slots, seen):
        """Takes in what arrived since the last eviction at the tokens that it left."""
        kept, elapsed = slots.kept, slots.used - slots.kept
        arrived = (slots["arrived"] * self._worth(slots))[:, :, :kept] / elapsed
        named = slots["named"][:, :, :kept].float()
        past = MEMORY**elapsed
        self.losses.mul_(past).add_(torch.einsum("bhl,bhlk->bhk", arrived, named[..., :-2]))
        age = seen - elapsed - 1 - slots["positions"][:, :, :kept]  # 0 for the newest that the eviction saw
        grains = torch.arange(self.most // GRAIN, device=arrived.device)
        of_age = (age[..., None] // GRAIN == grains) * named[..., -1:]
        groups = torch.cat([of_age, named[..., -2:-1]], -1)
        received = torch.stack([arrived, torch.ones_like(arrived)], 2) @ groups
        self.received.mul_(past).add_(received)
