"""Eviction policies: which tokens a full cache keeps. One class, one idea; `score` is all that a new one must define.

A policy belongs to one layer. It may keep numbers that travel with a token (`slots.add` in `allocate`) and tensors of its
own (listed by `tensors`, batch first), so that memory is counted and beam search moves it. Sinks and the recent window are
protected by the cache alike for all policies, so that comparisons between policies compare scores and nothing else.
"""

import torch

from sketchkv import kernels
from sketchkv.sketches import CountMinSketch, SimHash


class Policy:
    """Base of all policies.

    `uses_attention` says whether `observe` wants attention probabilities: without them a layer may use a fused kernel.
    """

    uses_attention = False
    layer = 0  # index of the layer it serves, set by the cache

    def allocate(self, slots):
        """Called once per layer when its slots (`Slots`) are allocated, and again after a reset."""

    def enter(self, slots, new, token_ids):
        """Tokens entered the slots `new` (slice); `token_ids` is `[batch, n]`, or None if the model saw embeddings."""

    def observe(self, slots, attention):
        """Attention mass of n new queries on each occupied slot: `[batch, num_kv_heads, n, used]`, float32, query heads
        of a group summed, rows of padding zero. Called after `enter`, the new tokens being the last n slots."""

    def accumulator(self, slots):
        """`(tensor, decay)` if all that `observe` does with one new query is `tensor = decay * tensor + attention`, in
        place and with `tensor` `[batch, num_kv_heads, used]` float32: a fused kernel may then do it instead. Else None
        for the tensor."""
        return None, 1.0

    def score(self, slots, seen):
        """Importance of each occupied slot `[batch, num_kv_heads, used]`, higher is kept; `seen` tokens have passed."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def tensors(self):
        """Tensors of the policy's own (not per slot), the batch first."""
        return []

    def nbytes(self, slots):
        """Bytes held beside keys and values: {"sketch", "policy"}, the latter with the slots' positions."""
        beside = slots.arrays.keys() - slots.kv
        return {"sketch": 0, "policy": slots.nbytes(*beside) + sum(tensor.nbytes for tensor in self.tensors())}


class Window(Policy):
    """Keeps the newest tokens; with sinks this is StreamingLLM (Xiao et al. 2023, arXiv 2309.17453)."""

    def score(self, slots, seen):
        return slots["positions"].float()


class Random(Policy):
    """Evicts at random: what a policy must beat under the same protection. Seeded, the same on every device."""

    def __init__(self, seed=0):
        self.seed = seed

    def allocate(self, slots):
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.layer)

    def score(self, slots, seen):
        positions = slots["positions"]
        return torch.rand(positions.shape, generator=self.generator).to(positions.device)


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
        visible = torch.arange(used - count + 1, used + 1, device=attention.device)  # what each query could look at
        query = slots["positions"][..., -count:].unsqueeze(-1)
        latest = (query * (attention * visible[:, None] > 1)).amax(2)
        slots["last_used"].copy_(torch.maximum(slots["last_used"], latest))

    def score(self, slots, seen):
        return slots["last_used"].float()


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


def exposure(age, decay):
    """Queries that could have attended to a token of this age (in tokens, itself included), discounted like its mass:
    the sum of decay^i for i below age."""
    return age.float() if decay == 1 else (1 - decay ** age.float()) / (1 - decay)


class AttentionMass(Policy):
    """Exact accumulators: the attention mass a token received since it was stored, one float32 per slot.

    `decay` discounts the past per query. `mean=True` divides by the (equally discounted) number of queries that could
    have attended to the token, since plain sums let old tokens win by age (A2SF, arXiv 2407.20485).
    """

    uses_attention = True

    def __init__(self, decay=0.99, mean=True):
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}; 1 never forgets")
        self.decay = decay
        self.mean = mean

    def allocate(self, slots):
        slots.add("mass", torch.float32)

    def observe(self, slots, attention):
        count = attention.shape[2]
        mass = slots["mass"]
        if count == 1:
            torch.add(attention[:, :, 0], mass, alpha=self.decay, out=mass)
        elif self.decay == 1:
            mass += attention.sum(2)
        else:
            weights = self.decay ** torch.arange(count - 1, -1, -1, dtype=torch.float32, device=mass.device)
            mass.mul_(self.decay**count).add_(torch.einsum("bhnl,n->bhl", attention, weights))

    def accumulator(self, slots):
        # A subclass that observes in its own way is asked to.
        return (slots["mass"], self.decay) if type(self).observe is AttentionMass.observe else (None, 1.0)

    def score(self, slots, seen):
        return slots["mass"] / exposure(seen - slots["positions"], self.decay) if self.mean else slots["mass"]


class H2O(AttentionMass):
    """Heavy hitters by the plain sum of the attention received (Zhang et al. 2023, arXiv 2306.14048)."""

    def __init__(self):
        super().__init__(decay=1.0, mean=False)


class SnapKV(AttentionMass):
    """Keeps what the last queries attended to, smoothed over neighbours in the text (Li et al. 2024, arXiv 2404.14469).

    SnapKV chooses once, at the end of the prompt; here its rule is applied at every eviction, its observation window being
    the queries since the last one (`evict_every`). `kernel`: width of the mean over neighbouring stored tokens.
    """

    def __init__(self, kernel=7):
        super().__init__(decay=1.0, mean=False)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.kernel = kernel

    def score(self, slots, seen):
        order = slots["positions"].argsort(-1)  # slots are in no order, neighbours are
        in_text = slots["mass"].gather(-1, order)
        smooth = torch.nn.functional.avg_pool1d(
            in_text, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False
        )  # fmt: skip
        slots["mass"].zero_()
        return torch.empty_like(smooth).scatter_(-1, order, smooth)


class Sketch(AttentionMass):
    """Attention mass kept in Count-Min sketches (Cormode & Muthukrishnan 2005), one per sequence and KV head.

    What a slot received since the last eviction is added to the sketch under the slot's key; importance is what the
    sketch remembers of that key, evicted tokens included, so a key that comes back finds its history. `mean=True`
    divides the estimated mass by the estimated number of queries the key was exposed to, a second sketch of the same
    shape.

    key: "lsh", the signs of `lsh_bits` random projections of the key vector (SimHash, Charikar 2002): tokens whose keys
    point the same way share their history. 24 bits were chosen on the development documents: with fewer, unlike tokens
    share, and more is lost. "token", the token's id. "position", every token its own key, the negative control: exact
    accumulators plus collisions.
    """

    KEYS = ("lsh", "token", "position")

    def __init__(self, width=512, depth=4, key="lsh", decay=0.99, mean=True, lsh_bits=24, seed=0):
        super().__init__(decay, mean)
        if key not in self.KEYS:
            raise ValueError(f"unknown sketch key {key!r}; choose one of {', '.join(self.KEYS)}")
        if not 1 <= lsh_bits <= 30:
            raise ValueError(f"lsh_bits must be between 1 and 30, got {lsh_bits}")
        CountMinSketch(width, depth)  # refuses a bad shape now instead of at the first eviction
        self.width, self.depth, self.key, self.lsh_bits, self.seed = width, depth, key, lsh_bits, seed

    def allocate(self, slots):
        super().allocate(slots)
        batch, heads, _ = slots.positions.shape
        device = slots.device
        slots.add("item", torch.int32)
        if self.tensors() and self.tensors()[0].shape[:2] == (batch, heads) and self.tensors()[0].device == device:
            for sketch in self.sketches:
                sketch.reset()
            return
        self.code = SimHash(slots.head_dim, self.lsh_bits, self.seed, device) if self.key == "lsh" else None
        shape = dict(batch_shape=(batch, heads), seed=self.seed, device=device)
        self.sketches = [CountMinSketch(self.width, self.depth, **shape) for _ in range(1 + self.mean)]

    def enter(self, slots, new, token_ids):
        if self.key == "token":
            if token_ids is None:
                raise ValueError('key="token" needs input_ids, the model was called with embeddings: use key="lsh"')
            slots.arrays["item"][:, :, new] = token_ids[:, None]

    def items(self, slots):
        """The sketch's key of each occupied slot, int32 `[batch, num_kv_heads, used]`. Tokens that came since the last
        eviction get theirs now, in one operation, not one by one as they enter."""
        fresh = slice(slots.kept, slots.used)
        if self.key == "lsh":
            slots.arrays["item"][:, :, fresh] = self.code(slots.read("keys", fresh))
        elif self.key == "position":
            slots.arrays["item"][:, :, fresh] = slots.positions[:, :, fresh]
        return slots["item"]

    def _flush(self, slots, indices, seen):
        """Moves the mass received since the last eviction from the slots into the sketch."""
        mass, elapsed = slots["mass"], slots.used - slots.kept
        for sketch in self.sketches:
            sketch.decay(self.decay**elapsed)
        self.sketches[0].update(indices=indices, weights=mass)
        if self.mean:
            present = slots["positions"] >= 0
            age = (seen - slots["positions"]).clamp(max=elapsed)
            self.sketches[1].update(indices=indices, weights=exposure(age, self.decay) * present)
        mass.zero_()

    def score(self, slots, seen):
        # For the cache to refuse, before it spoils the whole table; on CUDA looking would stall the device.
        if slots.positions.device.type == "cpu" and slots["mass"].isnan().any():
            return slots["mass"]
        if isinstance(seen, torch.Tensor) and kernels.usable(slots.positions, recorded=True):
            mass, elapsed = slots["mass"], slots.used - slots.kept
            return kernels.remember(self.items(slots), mass, slots["positions"], self.sketches, seen, elapsed, self.decay)
        indices = self.sketches[0].hash(self.items(slots))  # all sketches share the hash functions
        self._flush(slots, indices, seen)
        estimate = self.sketches[0].query(indices=indices)
        return estimate / self.sketches[1].query(indices=indices).clamp(min=1e-6) if self.mean else estimate

    def tensors(self):
        return [sketch.table for sketch in getattr(self, "sketches", [])]

    def nbytes(self, slots):
        """"sketch" is all that exists for the sketch's sake: counters, hash parameters, projection, a key per slot."""
        address = 0 if self.code is None else self.code.nbytes
        sketch = sum(sketch.nbytes for sketch in self.sketches) + slots.nbytes("item") + address
        return {"sketch": sketch, "policy": slots.nbytes(*slots.arrays.keys() - slots.kv - {"item"})}
