"""Eviction rules of others, as policies: what the sketch is compared with."""

import torch
from torch.nn.functional import avg_pool1d

from sketchkv.checks import seed as checked_seed
from sketchkv.checks import whole
from sketchkv.policies import AttentionMass, Policy


class KeyNorm(Policy):
    """Keeps tokens with short key vectors, which tend to attract attention (Devoto et al. 2024, arXiv 2406.11430)."""

    def score(self, slots, seen):
        return -slots["keys"].float().norm(dim=-1)


class LRU(Policy):
    """Evicts what was least recently used. A query uses the tokens that get more of its attention than an equal share."""

    uses_attention = True

    def allocate(self, slots):
        slots.add("last_used", torch.int32)

    def enter(self, slots, new, token_ids):
        slots.arrays["last_used"][:, :, new] = slots.positions[:, :, new]

    def observe(self, slots, attention):
        count, used = attention.shape[2:]
        visible = torch.arange(
            used - count + 1, used + 1, device=attention.device
        )  # what each query could look at
        query = slots["positions"][..., -count:].unsqueeze(-1)
        latest = (query * (attention * visible[:, None] > 1)).amax(2)
        slots["last_used"].copy_(torch.maximum(slots["last_used"], latest))

    def score(self, slots, seen):
        return (
            slots["last_used"] - seen
        ).float()  # ages: whole numbers of float32 end at 2^24, texts need not


class TOVA(Policy):
    """Keeps what the newest query attends to, mean over heads, so that all heads of a layer keep the same tokens (Oren et
    al. 2024, arXiv 2401.06104)."""

    uses_attention = True

    def allocate(self, slots):
        slots.add("attention", torch.float32)

    def observe(self, slots, attention):
        slots["attention"].copy_(attention[:, :, -1])

    def score(self, slots, seen):
        return slots["attention"].mean(1, keepdim=True).expand_as(slots["attention"])


class SnapKV(AttentionMass):
    """Keeps what the last queries attended to, smoothed over neighbours in the text (Li et al. 2024, arXiv 2404.14469).

    SnapKV chooses once, at the end of the prompt: with `evict_every = P - max_cache_size` the cache does so, for a prompt of
    P tokens. Otherwise the rule is applied at every eviction.

    kernel: width of the mean over neighbouring stored tokens, odd.
    observation_window: queries before an eviction that are listened to.
    Raises ValueError for a value out of range.
    """

    def __init__(self, kernel=7, observation_window=16):
        super().__init__(decay=1.0, mean=False)
        self.kernel = whole("kernel", kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.observation_window = whole("observation_window", observation_window, 1)

    def observe(self, slots, attention):
        count = attention.shape[2]
        before = (
            slots.capacity - self.observation_window - (slots.used - count)
        )  # queries too early to be listened to
        super().observe(slots, attention[:, :, min(max(before, 0), count) :])

    def score(self, slots, seen):
        order = slots["positions"].argsort(-1)  # slots are in no order, neighbours are
        in_text = slots["mass"].gather(-1, order)
        smooth = avg_pool1d(in_text, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False)
        slots["mass"].zero_()
        return torch.empty_like(smooth).scatter_(-1, order, smooth)


class Random(Policy):
    """Evicts at random: what a policy must beat under the same protection. Seeded, the same on every device."""

    recordable = False

    def __init__(self, seed=0):
        self.seed = checked_seed(seed)

    def allocate(self, slots):
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.layer)

    def score(self, slots, seen):
        return torch.rand(slots["positions"].shape, generator=self.generator).to(slots.device)


class H2O(AttentionMass):
    """Heavy hitters by the plain sum of the attention received (Zhang et al. 2023, arXiv 2306.14048). The published method
    also gives half of the cap to the newest tokens: `recent_window = max_cache_size // 2`."""

    def __init__(self):
        super().__init__(decay=1.0, mean=False)
