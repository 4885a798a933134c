"""Eviction policies: which tokens a full cache keeps. One class, one idea; `score` is all that a new one must define.

A policy belongs to one layer. It may keep numbers that travel with a token (`slots.add` in `allocate`) and tensors of its
own (listed by `tensors`, batch first), so that memory is counted and beam search moves it. Sinks and the recent window are
protected by the cache alike for all policies, so that comparisons between policies compare scores and nothing else.
"""

import torch

from sketchkv import kernels
from sketchkv.sketches import PRIME, RACE, ConservativeSketch, CountMinSketch, CountSketch, SimHash


class Policy:
    """Base of all policies.

    `uses_attention` says whether `observe` wants attention probabilities: without them a layer may use a fused kernel.
    `uses_queries` says whether `query` wants the queries. `in_step` says that layers exchange what they saw, so that a
    forward pass may bring no more tokens than lie between two evictions. `recordable` says that the same operations on the
    device serve every cycle of evictions, with nothing that Python counts or draws (`sketchkv.graph`).
    """

    uses_attention = False
    uses_queries = False
    in_step = False
    recordable = True
    layer = 0  # index of the layer it serves, set by the cache
    peers = ()  # the policies of all layers, set by the cache

    def allocate(self, slots):
        """Called once per layer when its slots (`Slots`) are allocated."""

    def reset(self, slots):
        """The slots were emptied for another text. Tensors must stay where they are: recorded steps expect them there."""
        self.allocate(slots)

    def enter(self, slots, new, token_ids):
        """Tokens entered the slots `new` (slice); `token_ids` is `[batch, n]`, or None if the model saw embeddings."""

    def query(self, slots, query):
        """Queries of n new tokens, `[batch, num_heads, n, head_dim]`, query heads of a group being neighbours. Called after
        `enter`, the new tokens being the last n slots, padding among them."""

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

    recordable = False

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
    have attended to the token, since plain sums let old tokens win by age (A2SF, arXiv 2407.20485). `value_norm=True`
    weights it by the norm of the token's value: what is lost with a token is its attention times its value (VATP, Guo et
    al. 2024, arXiv 2406.12335).
    """

    uses_attention = True

    def __init__(self, decay=0.99, mean=True, value_norm=False):
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}; 1 never forgets")
        self.decay = decay
        self.mean = mean
        self.value_norm = value_norm

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
            mass.mul_(self.decay**count).add_(weights @ attention)

    def accumulator(self, slots):
        # A subclass that observes in its own way is asked to.
        return (slots["mass"], self.decay) if type(self).observe is AttentionMass.observe else (None, 1.0)

    def score(self, slots, seen):
        score = slots["mass"] / exposure(seen - slots["positions"], self.decay) if self.mean else slots["mass"]
        return score * slots["values"].float().norm(dim=-1) if self.value_norm else score


class H2O(AttentionMass):
    """Heavy hitters by the plain sum of the attention received (Zhang et al. 2023, arXiv 2306.14048)."""

    def __init__(self):
        super().__init__(decay=1.0, mean=False)


class SnapKV(AttentionMass):
    """Keeps what the last queries attended to, smoothed over neighbours in the text (Li et al. 2024, arXiv 2404.14469).

    SnapKV chooses once, at the end of the prompt: with `evict_every = P - max_cache_size` the cache does so, for a prompt of
    P tokens. Otherwise the rule is applied at every eviction. `observation_window`: queries before an eviction that are
    listened to. `kernel`: width of the mean over neighbouring stored tokens.
    """

    def __init__(self, kernel=7, observation_window=16):
        super().__init__(decay=1.0, mean=False)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        if observation_window < 1:
            raise ValueError(f"observation_window must be at least 1, got {observation_window}")
        self.kernel = kernel
        self.observation_window = observation_window

    def observe(self, slots, attention):
        count = attention.shape[2]
        before = slots.capacity - self.observation_window - (slots.used - count)  # queries too early to be listened to
        super().observe(slots, attention[:, :, min(max(before, 0), count) :])

    def score(self, slots, seen):
        order = slots["positions"].argsort(-1)  # slots are in no order, neighbours are
        in_text = slots["mass"].gather(-1, order)
        smooth = torch.nn.functional.avg_pool1d(
            in_text, self.kernel, stride=1, padding=self.kernel // 2, count_include_pad=False
        )  # fmt: skip
        slots["mass"].zero_()
        return torch.empty_like(smooth).scatter_(-1, order, smooth)


class PositionItems:
    """Every token its own item: the negative control, exact accumulators plus collisions."""

    reads_text = False  # whether items need the token ids, which are there only as the tokens enter

    def __init__(self, slots, bits, seed):
        self.nbytes = 0

    def __call__(self, slots, new, token_ids):
        """Items of the tokens that entered the slots `new` (slice): integers below 2^31 that broadcast to
        `[batch, num_kv_heads, n]`."""
        return slots.positions[:, :, new].clamp(min=0)

    def tensors(self):
        """State, the batch first."""
        return []


class TokenItems(PositionItems):
    """The token's id: a word shares its history with all its occurrences."""

    reads_text = True

    def __call__(self, slots, new, token_ids):
        return _ids(token_ids)[:, None]


class BigramItems(TokenItems):
    """The ids of the token before and of the token, hashed to one number: a word after the same word.

    Padding is skipped; the first token of a text follows id -1. Two different pairs share a number with a probability of
    about 2^-31.
    """

    MULTIPLIER = 1103515245

    def __init__(self, slots, bits, seed):
        batch = slots.positions.shape[0]
        self.last = torch.zeros(batch, 1, dtype=torch.int64, device=slots.device)  # id + 1 of each row's newest token
        self.nbytes = self.last.nbytes

    def __call__(self, slots, new, token_ids):
        real = slots.positions[:, 0, new] >= 0
        ids = torch.cat([self.last, _ids(token_ids) + 1], 1)
        # Where the newest real token is, up to and with each token; place 0 is that of the tokens before.
        place = (torch.arange(1, ids.shape[1], device=ids.device) * real).cummax(1).values
        newest = torch.cat([self.last, ids.gather(1, place)], 1)
        self.last.copy_(newest[:, -1:])
        return ((newest[:, :-1] * self.MULTIPLIER + ids[:, 1:]) % PRIME)[:, None]

    def tensors(self):
        return [self.last]


def _ids(token_ids):
    if token_ids is None:
        raise ValueError('key="token" and "bigram" need input_ids, the model was called with embeddings: use key="lsh"')
    return token_ids


class CodeItems(PositionItems):
    """The SimHash code of the key vector (Charikar 2002): tokens whose keys point the same way share their history."""

    def __init__(self, slots, bits, seed):
        self.code = SimHash(slots.head_dim, bits, seed, slots.device)
        self.nbytes = self.code.nbytes

    def __call__(self, slots, new, token_ids):
        return self.code(slots.read("keys", new))


class Sketch(AttentionMass):
    """Attention mass kept in a sketch per sequence and KV head, by default a Count-Min Sketch (Cormode & Muthukrishnan
    2005).

    What a slot received since the last eviction is added to the sketch under the slot's key; importance is what the
    sketch remembers of that key, evicted tokens included, so a key that comes back finds its history. `mean=True`
    divides the estimated mass by the estimated number of queries the key was exposed to, a second sketch of the same
    shape.

    key: "lsh", the signs of `lsh_bits` random projections of the key vector (SimHash, Charikar 2002): tokens whose keys
    point the same way share their history. 24 bits were chosen on the development documents: with fewer, unlike tokens
    share, and more is lost. "token", the token's id. "bigram", the ids of the token before it and its own. "position",
    every token its own key, the negative control: exact accumulators plus collisions. "query": no attention is counted,
    but queries are (`QuerySketch`).

    kind: "count_min"; "conservative", Count-Min with conservative update; "count_sketch", signed counters; "race", which
    takes the key vectors themselves (key "lsh" or "query") and hashes them to `lsh_bits` bits anew in each row. Default
    of `lsh_bits`: 24; 8 where queries are counted; for "race" as many as a row of `width` counters has room for.

    counters: "float32", "float16", or "uint8", 8 bits with a float32 scale per row (`sketchkv.sketches.ByteCounters`).

    shared: None, a sketch for each KV head. "heads", one for all heads of a layer; "layers", one for all heads of all
    layers: tokens of the same key share their history wherever they are. Their estimates and exposures are sums over
    heads, each of which still has tokens of its own. With "layers" what one layer saw counts in all others from the next
    eviction on, so all must have come to the same token: a forward pass may bring at most `evict_every` tokens (`score`
    and `generate` keep to it), or a ValueError is raised.
    """

    KEYS = {"lsh": CodeItems, "token": TokenItems, "position": PositionItems, "bigram": BigramItems}
    KINDS = {"count_min": CountMinSketch, "conservative": ConservativeSketch, "count_sketch": CountSketch, "race": RACE}
    COUNTERS = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}
    SHARED = (None, "heads", "layers")
    BITS = 24
    own = {"item"}  # arrays of the slots that exist for the sketch's sake
    memory = property(lambda self: self.decay)  # what counters are multiplied by, per token
    flushed = 0  # tokens seen when the sketch last took in what the slots received

    def __new__(cls, width=512, depth=4, key="lsh", *args, **settings):
        return super().__new__(QuerySketch if cls is Sketch and key == "query" else cls)

    def __init__(
        self, width=512, depth=4, key="lsh", decay=0.99, mean=True, lsh_bits=None, seed=0, kind="count_min",
        counters="float32", shared=None,
    ):  # fmt: skip
        super().__init__(decay, mean)
        for name, value, choices in (
            ("sketch key", key, [*Sketch.KEYS, "query"]),
            ("kind", kind, self.KINDS),
            ("counters", counters, self.COUNTERS),
            ("shared", shared, self.SHARED),
        ):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, choices))}")
        if kind == "race" and key not in ("lsh", "query"):
            raise ValueError(f'kind="race" hashes vectors, key={key!r} is a number: use key="lsh" or key="query"')
        if lsh_bits is None:
            lsh_bits = max(1, width.bit_length() - 1) if kind == "race" else self.BITS
        if not 1 <= lsh_bits <= 30:
            raise ValueError(f"lsh_bits must be between 1 and 30, got {lsh_bits}")
        CountMinSketch(width, depth)  # refuses a bad shape now instead of at the first eviction
        self.width, self.depth, self.key, self.lsh_bits, self.seed = width, depth, key, lsh_bits, seed
        self.kind, self.counters, self.shared = kind, counters, shared
        self.in_step = shared == "layers"

    @property
    def lead(self):
        """The policy that holds the counters: this one, or with shared="layers" that of the first layer."""
        return self.peers[0] if self.in_step and self.peers else self

    def allocate(self, slots):
        super().allocate(slots)
        if self.kind != "race":  # which reads the stored keys again
            slots.add("item", torch.int32)
        self.items = PositionItems(slots, 0, 0) if self.kind == "race" else self.KEYS[self.key](slots, self.lsh_bits, self.seed)
        self._allocate_sketches(slots, 1 + self.mean)

    def _allocate_sketches(self, slots, count):
        batch, heads, _ = slots.positions.shape
        self.flushed = 0
        if self.in_step and any(not isinstance(peer, Sketch) or peer.settings != self.settings for peer in self.peers):
            raise ValueError('shared="layers" needs one policy for all layers, not a list of different ones')
        if self.lead is not self:
            self.sketches = self.lead.sketches
            return
        shape = (batch,) if self.shared else (batch, heads)
        settings = dict(batch_shape=shape, seed=self.seed, dtype=self.COUNTERS[self.counters], device=slots.device)
        vectors = dict(dim=slots.head_dim, bits=self.lsh_bits) if self.kind == "race" else {}
        kind = self.KINDS[self.kind]
        self.sketches = [kind(width=self.width, depth=self.depth, **vectors, **settings) for _ in range(count)]

    @property
    def settings(self):
        names = ("width", "depth", "key", "decay", "mean", "lsh_bits", "seed", "kind", "counters", "shared")
        return {name: getattr(self, name) for name in names}

    @property
    def recordable(self):
        # 8-bit counters are rounded by a sequence that Python counts; layers in step compare how far each has come.
        return self.counters != "uint8" and not self.in_step

    def reset(self, slots):
        self.flushed = 0
        for sketch in self.sketches:
            sketch.reset()
        for tensor in self.items.tensors():
            tensor.zero_()

    def enter(self, slots, new, token_ids):
        super().enter(slots, new, token_ids)
        if self.kind != "race" and self.items.reads_text:
            slots.arrays["item"][:, :, new] = self.items(slots, new, token_ids)

    def _hashed(self, slots, fused=False):
        """What the sketch hashes of the stored tokens: their items, int32 `[batch, num_kv_heads, used]`, or keys."""
        if fused and type(self.items) is CodeItems and not slots.coders:
            kernels.codes(slots.keys, self.items.code.projection, slots.arrays["item"], slots.kept, slots.used - slots.kept)
        elif self.kind != "race" and not self.items.reads_text:
            # Tokens that came since the last eviction get their items now, in one operation, not as they enter.
            fresh = slice(slots.kept, slots.used)
            slots.arrays["item"][:, :, fresh] = self.items(slots, fresh, None)
        return slots["keys" if self.kind == "race" else "item"]

    def _pool(self, indices):
        """`[batch, num_kv_heads, depth, n]` as the sketches want it: if heads share one, one after the other."""
        return indices.transpose(1, 2).flatten(2) if self.shared else indices

    def _add(self, sketch, indices, weights):
        sketch.update(weights=weights.flatten(1) if self.shared else weights, indices=indices)

    def _ask(self, sketch, indices, slots):
        return sketch.query(indices=indices).float().view(slots["positions"].shape)

    def _decay(self, slots, seen):
        """Discounts what the counters hold by the time since the last flush, which is returned in tokens."""
        elapsed = slots.used - slots.kept
        if self.in_step:
            # The first layer begins when all have taken in the last eviction, the others follow it.
            first = self.lead is self
            at = {peer.flushed for peer in self.peers} if first else {self.lead.flushed}
            if at - {self.flushed if first else seen}:
                raise ValueError(
                    'shared="layers" needs all layers at the same token, but one forward pass brought several evictions: '
                    "give at most evict_every tokens at a time (model.generate(..., prefill_chunk_size=evict_every))"
                )
            self.flushed = seen
        if self.lead is self:
            for sketch in self.sketches:
                sketch.decay(max(self.memory**elapsed, 1e-30))
        return elapsed

    def _flush(self, slots, seen, indices):
        """Moves the mass received since the last flush from the slots into the sketch."""
        elapsed, mass = self._decay(slots, seen), slots["mass"]
        self._add(self.sketches[0], indices, mass)
        if self.mean:
            present = slots["positions"] >= 0
            age = (seen - slots["positions"]).clamp(max=elapsed)
            self._add(self.sketches[1], indices, exposure(age, self.decay) * present)
        mass.zero_()

    def score(self, slots, seen):
        # For the cache to refuse, before it spoils the whole table; on CUDA looking would stall the device.
        if slots.positions.device.type == "cpu" and slots["mass"].isnan().any():
            return slots["mass"]
        plain = (self.kind, self.counters, self.shared) == ("count_min", "float32", None)
        fused = plain and isinstance(seen, torch.Tensor) and kernels.usable(slots.positions, recorded=True)
        hashed = self._hashed(slots, fused)
        if fused:
            mass, elapsed = slots["mass"], slots.used - slots.kept
            return kernels.remember(hashed, mass, slots["positions"], self.sketches, seen, elapsed, self.decay)
        indices = self._pool(self.sketches[0].hash(hashed))  # all sketches share the hash functions
        self._flush(slots, seen, indices)
        estimate = self._ask(self.sketches[0], indices, slots)
        if not self.mean:
            return estimate
        # A key was exposed to no fewer queries than its token. Where rounding or random signs say so, half of these; a
        # plain Count-Min estimate is never that low.
        least = exposure(seen - slots["positions"], self.decay) / 2
        return estimate / torch.maximum(self._ask(self.sketches[1], indices, slots), least)

    def tensors(self):
        own = [tensor for sketch in self.sketches for tensor in sketch.tensors()] if self.lead is self else []
        return own + self.items.tensors()

    def nbytes(self, slots):
        """"sketch" is all that exists for the sketch's sake: counters, hash parameters, projection, a key per slot."""
        own = slots.arrays.keys() & self.own
        counters = sum(sketch.nbytes for sketch in self.sketches) if self.lead is self else 0
        policy = slots.nbytes(*slots.arrays.keys() - slots.kv - own)
        return {"sketch": counters + self.items.nbytes + slots.nbytes(*own), "policy": policy}


class QuerySketch(Sketch):
    """`Sketch(key="query")`: the density of queries, as a sketch of the directions that queries came from.

    Every query adds 1 to the counters of its own SimHash code, discounted by `decay` per token; the importance of a
    stored token is what the sketch holds at the code of its key: how many queries pointed its way. With kind="race" this
    is a kernel density over the query stream (Coleman & Shrivastava 2020). The query heads of a group count in the sketch
    of their KV head. No attention is asked for; `mean` says nothing here, since all tokens see the same queries.

    Queries wait in the slots of their tokens, as indices of their counters, and are counted at the next eviction: the
    same sums for any split of a text into chunks.
    """

    uses_attention = False
    uses_queries = True
    BITS = 8
    own = {"cells"}

    def allocate(self, slots):
        self.items = CodeItems(slots, self.lsh_bits, self.seed) if self.kind != "race" else PositionItems(slots, 0, 0)
        self._allocate_sketches(slots, 1)

    def enter(self, slots, new, token_ids):
        pass

    def accumulator(self, slots):
        return None, 1.0

    def _cells(self, vectors):
        """Counters of vectors `[..., n, head_dim]`: int64 `[..., depth, n]`."""
        return self.sketches[0].hash(vectors if self.kind == "race" else self.items.code(vectors))

    def query(self, slots, query):
        batch, heads, _ = slots.positions.shape
        count, head_dim = query.shape[2:]
        cells = self._cells(query.reshape(batch, heads, -1, count, head_dim)).flatten(2, 3)  # group and rows
        if "cells" not in slots.arrays:
            slots.add("cells", torch.int16 if self.sketches[0].hash.width <= 2**15 else torch.int32, cells.shape[2])
        slots["cells"][:, :, -count:] = cells.transpose(2, 3)

    def score(self, slots, seen):
        elapsed = self._decay(slots, seen)  # the tokens that came since are the last slots
        cells = slots["cells"][:, :, -elapsed:].unflatten(-1, (-1, self.depth)).permute(0, 1, 4, 3, 2)
        positions = slots["positions"][:, :, -elapsed:]
        weights = self.decay ** (seen - 1 - positions).float() * (positions >= 0)
        weights = weights[:, :, None].expand(*cells.shape[:2], *cells.shape[3:])  # each query head's
        self._add(self.sketches[0], self._pool(cells.flatten(3)), weights.flatten(2))
        return self._ask(self.sketches[0], self._pool(self._cells(slots["keys"])), slots)


class Prior(Sketch):
    """Exact accumulators, shrunk towards what a sketch knows of the token's key: `(mass + strength * prior) / (exposure +
    strength)`, the empirical-Bayes estimate of a mean under a conjugate prior (Morris 1983, JASA 78).

    A stored token has its own record, a token that has just come has little: for it speaks the mean attention of the tokens
    with the same key, those evicted long ago included, which exact accumulators can't know. `strength` is the weight of
    that mean, in queries. At every eviction the mass and the exposure of each stored token are added to the sketch, whose
    counters never forget; further parameters are those of `Sketch`, with the mean, and counters as float32 or uint8 (float16
    would overflow). Raises ValueError for a strength below 0.
    """

    memory = 1.0
    recordable = False

    def __init__(
        self, width=512, depth=2, key="token", decay=0.99, lsh_bits=None, seed=0, kind="count_min", counters="float32",
        shared=None, strength=2.0,
    ):  # fmt: skip
        if strength < 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        if key == "query" or counters == "float16":
            raise ValueError('a prior counts attention in float32 or uint8: key="query" and counters="float16" are refused')
        super().__init__(width, depth, key, decay, True, lsh_bits, seed, kind, counters, shared)
        self.strength = strength

    def _flush(self, slots, seen, indices):
        self._decay(slots, seen)
        positions = slots["positions"]
        self._add(self.sketches[0], indices, slots["mass"])
        self._add(self.sketches[1], indices, exposure(seen - positions, self.decay) * (positions >= 0))

    def score(self, slots, seen):
        age = exposure(seen - slots["positions"], self.decay)
        return (slots["mass"] + self.strength * super().score(slots, seen)) / (age + self.strength)
