"""The eviction policy that gives the project its name: attention mass in a Count-Min Sketch."""

from typing import Any

import torch

from sketchkv.checks import seed as checked_seed
from sketchkv.checks import whole
from sketchkv.policies import AttentionMass, exposure
from sketchkv.sketch import MOST_ROWS, PRIME, CountMinSketch, SimHash


class Sketch(AttentionMass):
    """Attention mass kept in a Count-Min Sketch per sequence and KV head (Cormode & Muthukrishnan 2005).

    What a slot received since the last eviction is added to the sketch under the slot's signature; importance is what the
    sketch remembers of that signature, evicted tokens included, so a key that comes back finds its history.

    width, depth: of the sketch, counters per row and rows.
    key: what a token is remembered by. "lsh", the signs of `lsh_bits` random projections of its key vector (SimHash,
        Charikar 2002): tokens whose keys point the same way share their history. "token", the token's id. "position", every
        token its own: the negative control, exact accumulators plus collisions.
    decay: discounts the past per query, in (0, 1].
    mean: divides the estimated mass by the estimated number of queries that the signature was exposed to, a second sketch.
    lsh_bits: 1 to 30; with fewer, unlike tokens share.
    seed: of hash functions and projections.
    Raises ValueError for a value out of range or an unknown key.
    """

    code: Any  # `SimHash` where key="lsh"
    KEYS = ("lsh", "token", "position")

    def __init__(self, width=512, depth=4, key="lsh", decay=0.99, mean=True, lsh_bits=24, seed=0):
        super().__init__(decay, mean)
        if key not in self.KEYS:
            raise ValueError(f"unknown sketch key {key!r}; choose one of {', '.join(self.KEYS)}")
        self.key, self.seed = key, checked_seed(seed)
        self.width, self.depth = whole("width", width, 1, PRIME), whole("depth", depth, 1, MOST_ROWS)
        self.lsh_bits = whole("lsh_bits", lsh_bits, 1, 30)

    def allocate(self, slots):
        super().allocate(slots)
        slots.add("signature", torch.int32)
        self.code = (
            SimHash(slots.widths[0], self.lsh_bits, self.seed, slots.device) if self.key == "lsh" else None
        )
        # One of mass, one of exposure.
        sizes = self.width, self.depth, slots.shape, self.seed
        self.sketches = [CountMinSketch(*sizes, device=slots.device) for _ in range(1 + self.mean)]

    def reset(self, slots):
        for sketch in self.sketches:
            sketch.reset()

    def enter(self, slots, new, token_ids):
        if self.key == "token":
            if token_ids is None:
                raise ValueError(
                    'key="token" needs input_ids, the model was called with embeddings: use key="lsh"'
                )
            slots.arrays["signature"][:, :, new] = token_ids[:, None].to(torch.int32)

    def signatures(self, slots):
        """What the sketch hashes of the stored tokens, int32 `[batch, num_kv_heads, used]`. Tokens that came since the last
        eviction are named now, in one operation, not as they enter."""
        fresh = slice(slots.kept, slots.used)
        if self.key != "token":
            named = (
                self.code(slots.read("keys", fresh))
                if self.code
                else slots.positions[:, :, fresh].clamp(min=0)
            )
            slots.arrays["signature"][:, :, fresh] = named
        return slots["signature"]

    def score(self, slots, seen):
        mass, positions = slots["mass"], slots["positions"]
        # For the cache to refuse, before it spoils the whole table; on CUDA looking would stall the device.
        if slots.device.type == "cpu" and mass.isnan().any():
            return mass
        elapsed, age = slots.used - slots.kept, seen - positions
        indices = self.sketches[0].hash(self.signatures(slots))  # both sketches share the hash functions
        present = exposure(age.clamp(max=elapsed), self.decay) * (positions >= 0) if self.mean else None
        for sketch, weights in zip(self.sketches, (mass, present), strict=False):
            sketch.decay(max(self.decay**elapsed, 1e-30))
            sketch.add(indices, weights)
        mass.zero_()
        estimate, *exposed = (sketch.ask(indices) for sketch in self.sketches)
        if not self.mean:
            return estimate.float()
        # A signature was exposed to no fewer queries than its token. Where rounding says so, half of these; a Count-Min
        # estimate is never that low.
        return estimate.float() / torch.maximum(exposed[0].float(), exposure(age, self.decay) / 2)

    def tensors(self):
        return [tensor for sketch in self.sketches for tensor in sketch.tensors()]

    def nbytes(self, slots):
        """ "sketch" is all that exists for the sketch's sake: counters, hash parameters, projection, a signature per slot."""
        own = sum(sketch.nbytes for sketch in self.sketches) + slots.nbytes("signature")
        policy = slots.nbytes(*(slots.arrays.keys() - slots.kv - {"signature"}))
        return {"sketch": own + (self.code.nbytes if self.code else 0), "policy": policy}
