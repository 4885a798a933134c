"""Policies on other sketches than a Count-Min Sketch of float32 counters, and one that counts queries."""

from typing import Any

import torch

from sketchkv.checks import whole
from sketchkv.sketch import SimHash
from sketchkv.sketch_policy import Sketch
from sketchkv.study.extras.sketches import RACE, AnyCounters, ConservativeSketch, CountSketch

KINDS = {
    "count_min": AnyCounters,
    "conservative": ConservativeSketch,
    "count_sketch": CountSketch,
    "race": RACE,
}
COUNTERS = {"float32": torch.float32, "float16": torch.float16, "uint8": torch.uint8}


class AnySketch(Sketch):
    """`sketchkv.Sketch` on any sketch and counters.

    kind: "count_min"; "conservative", Count-Min with conservative update; "count_sketch", signed counters; "race", which
        takes the key vectors themselves (key "lsh") and hashes them to `lsh_bits` bits anew in each row.
    counters: "float32", "float16", or "uint8", 8 bits with a float32 scale per row.
    lsh_bits: default 24; for "race" as many as a row of `width` counters has room for.
    Other parameters as of `Sketch`. Raises ValueError for an unknown kind or counters.
    """

    BITS = 24

    def __init__(
        self,
        width=512,
        depth=4,
        key="lsh",
        decay=0.99,
        mean=True,
        lsh_bits=None,
        seed=0,
        kind="count_min",
        counters="float32",
    ):
        for name, value, choices in (("kind", kind, KINDS), ("counters", counters, COUNTERS)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        if kind == "race" and key != "lsh":
            raise ValueError(f'kind="race" hashes vectors, key={key!r} is a number: use key="lsh"')
        if lsh_bits is None:
            lsh_bits = max(1, whole("width", width, 1).bit_length() - 1) if kind == "race" else self.BITS
        super().__init__(width, depth, key, decay, mean, lsh_bits, seed)
        self.kind, self.counters = kind, counters
        self.recordable = counters != "uint8"  # 8-bit counters are rounded by a sequence that Python counts

    def make_sketch(self, slots):
        vectors = dict(dim=slots.widths[0], bits=self.lsh_bits) if self.kind == "race" else {}
        shape = dict(width=self.width, depth=self.depth, batch_shape=slots.shape, seed=self.seed)
        return KINDS[self.kind](**vectors, **shape, dtype=COUNTERS[self.counters], device=slots.device)

    def allocate(self, slots):
        super().allocate(slots)
        if self.kind == "race":  # which reads the stored keys again
            del slots.arrays["signature"]
            self.code = None

    def signatures(self, slots):
        return slots["keys"] if self.kind == "race" else super().signatures(slots)

    def nbytes(self, slots):
        own = slots.arrays.keys() & {"signature"}
        counters = sum(sketch.nbytes for sketch in self.sketches) + (self.code.nbytes if self.code else 0)
        policy = slots.nbytes(*(slots.arrays.keys() - slots.kv - own))
        return {"sketch": counters + slots.nbytes(*own), "policy": policy}


class QuerySketch(AnySketch):
    """The density of queries, as a sketch of the directions that queries came from.

    Every query adds 1 to the counters of its own SimHash code, discounted by `decay` per token; the importance of a
    stored token is what the sketch holds at the code of its key: how many queries pointed its way. With kind="race" this
    is a kernel density over the query stream (Coleman & Shrivastava 2020). The query heads of a group count in the sketch
    of their KV head. No attention is asked for; there is no mean, since all tokens see the same queries.

    Queries wait in the slots of their tokens, as indices of their counters, and are counted at the next eviction: the
    same sums for any split of a text into chunks. Parameters as of `AnySketch`; `lsh_bits` is 8 by default.
    """

    uses_attention = False
    BITS = 8
    code: Any  # None for RACE, which hashes vectors itself

    def __init__(
        self, width=512, depth=4, decay=0.99, lsh_bits=None, seed=0, kind="count_min", counters="float32"
    ):
        super().__init__(width, depth, "lsh", decay, False, lsh_bits, seed, kind, counters)

    def allocate(self, slots):
        self.code = (
            SimHash(slots.widths[0], self.lsh_bits, self.seed, slots.device) if self.kind != "race" else None
        )
        self.sketches = [self.make_sketch(slots)]

    def enter(self, slots, new, token_ids):
        pass

    def _cells(self, vectors):
        """Counters of vectors `[..., n, width]`: int64 `[..., depth, n]`."""
        return self.sketches[0].hash(vectors if self.kind == "race" else self.code(vectors))

    def query(self, slots, query):
        count = query.shape[2]
        cells = self._cells(query.reshape(*slots.shape, -1, count, query.shape[-1])).flatten(
            2, 3
        )  # group and rows
        if "cells" not in slots.arrays:
            slots.add(
                "cells", torch.int16 if self.sketches[0].hash.width <= 2**15 else torch.int32, cells.shape[2]
            )
        slots["cells"][:, :, -count:] = cells.transpose(2, 3)

    def score(self, slots, seen):
        elapsed = slots.used - slots.kept  # the tokens that came since are the last slots
        sketch = self.sketches[0]
        sketch.decay(max(self.decay**elapsed, 1e-30))
        cells = slots["cells"][:, :, -elapsed:].long().unflatten(-1, (-1, self.depth)).permute(0, 1, 4, 3, 2)
        positions = slots["positions"][:, :, -elapsed:]
        weights = self.decay ** (seen - 1 - positions).float() * (positions >= 0)
        weights = weights[:, :, None].expand(*cells.shape[:2], *cells.shape[3:])  # each query head's
        sketch.add(cells.flatten(3), weights.flatten(2))
        return sketch.ask(self._cells(slots["keys"])).float()

    def nbytes(self, slots):
        own = slots.arrays.keys() & {"cells"}
        counters = sum(sketch.nbytes for sketch in self.sketches) + (self.code.nbytes if self.code else 0)
        return {
            "sketch": counters + slots.nbytes(*own),
            "policy": slots.nbytes(*(slots.arrays.keys() - slots.kv - own)),
        }
