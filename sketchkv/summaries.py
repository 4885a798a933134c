"""Other ways to fold evicted tokens into summary slots, one class each: what is merged with what (`Summary.buckets`)."""

import torch

from sketchkv.sketches import SignedHash, SimHash
from sketchkv.summary import SEED, Summary


class NearestCentroid(Summary):
    """A token joins the bucket whose mean key is nearest: online k-means (MacQueen 1967), with as many means as slots.

    Nearest in Euclidean distance: of a logit, q k, merging takes at most |q| times that distance. Tokens evicted together are
    assigned in two rounds: the first of them found the buckets that are still empty, one each, in the order of their
    eviction; the others go to the nearest mean that there is then, all at once, none seeing where the others go.
    """

    def allocate(self):
        pass

    def buckets(self, keys, positions):
        keys, means = keys.float(), self._mean(0)
        real, empty = positions >= 0, self.counts == 0
        # The j-th token of a block founds the j-th empty bucket.
        token, bucket = (which.cumsum(-1).where(which, 0) for which in (real, empty))
        founds = (token[..., None] == bucket[:, :, None]) & (token[..., None] > 0)
        means = torch.where(empty[..., None], founds.float().transpose(-1, -2) @ keys, means)
        empty = empty & ~founds.any(2)
        # |k - m|^2 less |k|^2, which is the same for all means
        distance = means.square().sum(-1)[:, :, None] - 2 * keys @ means.transpose(-1, -2)
        nearest = distance.masked_fill(empty[:, :, None], torch.inf).argmin(-1)
        return torch.where(founds.any(-1), founds.int().argmax(-1), nearest)


class SlidingMerge(Summary):
    """Buckets are stretches of the eviction's history, in its order: each block of tokens evicted together opens a new one,
    and once none is free, the two neighbours that are merged at the least cost make room.

    The cost is by how much merging raises the sum of squared distances of keys from their means (Ward 1963): old stretches
    that are alike become one, and what has just been evicted stays apart.
    """

    def allocate(self):
        pass

    def buckets(self, keys, positions):
        count = self.counts.shape[-1]
        place = torch.arange(count, device=keys.device)
        if count > 1:
            means, left, right = self._mean(0), self.counts[..., :-1], self.counts[..., 1:]
            cost = left * right / (left + right).clamp(min=1e-30) * (means[:, :, 1:] - means[:, :, :-1]).square().sum(-1)
            pair = cost.argmin(-1, keepdim=True)
            full = (self.counts[..., -1:] > 0) & (positions >= 0).any(-1, keepdim=True)
            self.merge(place - ((place > pair) & full).long())
        newest = ((self.counts > 0) * (place + 1)).amax(-1, keepdim=True)  # one past the last bucket in use
        return newest.clamp(max=count - 1).expand(positions.shape)


class Segments(Summary):
    """Buckets are stretches of the text, all equally long: the mean of what was evicted of each.

    The length of a stretch begins with one token. When a token comes from beyond the last, neighbouring stretches merge two
    by two and the length doubles, for each head when it needs to: whatever the length of the text, between half and all of
    the buckets are in use.
    """

    def allocate(self):
        # int32 [batch, num_kv_heads, 1]: how often the length has doubled
        self.doublings = torch.zeros_like(self.counts[..., :1], dtype=torch.int32)

    def buckets(self, keys, positions):
        count = self.counts.shape[-1]
        newest = positions.amax(-1, keepdim=True)
        powers = torch.arange(31, device=keys.device)
        needed = ((count << powers.long()) <= newest).sum(-1, keepdim=True).int()  # doublings with which it fits
        more = (needed - self.doublings).clamp(min=0)
        self.merge(torch.arange(count, device=keys.device) >> more)
        self.doublings += more
        return positions.clamp(min=0).long() >> self.doublings

    def tensors(self):
        return [*super().tensors(), self.doublings]


class CountSketchSummary(Summary):
    """Evicted tokens summed by the SimHash code of their key in a Count-Sketch (Charikar, Chen & Farach-Colton 2002), whose
    cells hold vectors: key, value and 1, each code with a random sign in one cell of every row.

    Of each of the 2^bits codes attention sees an estimate, the median over rows, channel by channel: as a slot with the
    mean key and value and the logarithm of the count. A code with a count below one half is taken to be empty; a mean key or
    value longer than any that came is noise, and cut to that length. All that is held are the cells, float32 `[batch,
    num_kv_heads, depth, cells / depth, 2 head_dim + 1]`; estimates are made anew for each pass.
    """

    in_place = False
    DEPTH = 3
    BITS = 4

    def __init__(self, keys, values, cells, depth=DEPTH, bits=BITS, weight="count", second_order=False):
        batch, heads, _, head_dim = keys.shape
        self.means, self.code = (keys, values), SimHash(head_dim, bits, SEED, keys.device)
        self.cells = torch.zeros(batch, heads, depth, cells // depth, 2 * head_dim + 1, device=keys.device)
        self.longest = torch.zeros(batch, heads, 2, 1, device=keys.device)
        at = SignedHash(cells // depth, depth, SEED, keys.device)(torch.arange(2**bits, device=keys.device))  # [depth, codes]
        place, sign = at % (cells // depth), 1 - 2 * (at >= cells // depth).float()
        # [depth, cells of a row, codes]: the signs with which codes are in cells
        self.signs = torch.nn.functional.one_hot(place, cells // depth).transpose(1, 2) * sign[:, None]

    def fold(self, keys, values, positions, scores=None):
        real = (positions >= 0)[..., None]
        tokens = torch.cat([keys.float(), values.float(), torch.ones_like(real, dtype=torch.float32)], -1) * real
        code = torch.arange(self.signs.shape[-1], device=keys.device)
        sums = (self.code(keys)[..., None] == code).float().transpose(-1, -2) @ tokens  # [..., codes, 2 head_dim + 1]
        self.cells += self.signs @ sums[:, :, None]
        lengths = torch.stack([x.float().norm(dim=-1).where(real[..., 0], 0).amax(-1) for x in (keys, values)], -1)
        self.longest.copy_(torch.maximum(self.longest, lengths[..., None]))

    def entries(self):
        rows = (self.signs.transpose(1, 2) @ self.cells).sort(2).values  # [..., depth, codes, 2 head_dim + 1]
        median = (rows[:, :, (rows.shape[2] - 1) // 2] + rows[:, :, rows.shape[2] // 2]) / 2
        counts = median[..., -1].where(median[..., -1] >= 0.5, 0)
        means = (median[..., :-1] / counts.clamp(min=0.5)[..., None]).chunk(2, -1)
        lengths = (mean.norm(dim=-1, keepdim=True).clamp(min=1e-30) for mean in means)
        cut = self.longest[..., None].unbind(2)
        return *(mean * (most / length).clamp(max=1) for mean, length, most in zip(means, lengths, cut)), counts

    def context(self, slots, query, scaling):
        *means, counts = self.entries()
        both = (torch.cat([mean.to(slots.dtype), slots[name]], 2) for name, mean in zip(("keys", "values"), means))
        return *both, counts.log()[:, :, None]

    def tensors(self):
        return [self.cells, self.longest]

    def nbytes(self):
        policy = self.longest.nbytes + self.signs.nbytes + self.code.nbytes
        return {"kv": self.cells.nbytes, "policy": policy}


KINDS = {
    "hash": Summary, "nearest": NearestCentroid, "sliding": SlidingMerge, "segments": Segments, "count_sketch": CountSketchSummary,
}  # fmt: skip
WEIGHTS = ("count", "mass", "decay")


def settings(summary, slots):
    """The full settings of a summary of that many `slots`, a dict, from the name of its kind or a dict of those that differ
    from the default. Raises ValueError for what there is not."""
    if not isinstance(summary, (str, dict)):
        raise ValueError(f"a summary is the name of a kind or a dict of settings, got {summary!r}")
    given = {"kind": summary} if isinstance(summary, str) else summary
    full = {"kind": "hash", "weight": "count", "second_order": False, "protect": False}
    if unknown := given.keys() - full.keys() - ({"depth", "bits"} if given.get("kind") == "count_sketch" else set()):
        raise ValueError(f"unknown setting of a summary: {', '.join(sorted(unknown))}; choose of {', '.join(full)}")
    full |= given
    for name, choices in (("kind", KINDS), ("weight", WEIGHTS), ("second_order", (False, True)), ("protect", (False, True))):
        if full[name] not in choices:
            raise ValueError(f"unknown {name} of a summary {full[name]!r}; choose one of {', '.join(map(str, choices))}")
    if not slots and full != settings("hash", 1):
        raise ValueError(f"summary={summary!r} needs slots to merge tokens into: give summary_slots")
    if full["kind"] == "count_sketch":
        depth = full.setdefault("depth", CountSketchSummary.DEPTH)
        if full["weight"] != "count" or full["second_order"]:
            raise ValueError('kind="count_sketch" holds plain sums: weight="count" and no second order')
        if depth < 1 or slots % depth:
            raise ValueError(f"the {slots} slots of a count_sketch are the cells of its {depth} rows: give a multiple of {depth}")
    return full


def make(slots, count, kind, protect, **own):
    """The summary of a layer, of `settings`, beside its `slots` (`Slots`)."""
    more = {} if KINDS[kind].in_place else {"cells": count}
    return KINDS[kind](slots.summary["keys"], slots.summary["values"], **more, **own)
