"""Precision that falls before a token is evicted: a few fine slots in more bits, the others coarse, in fewer."""

from typing import NamedTuple

import torch

from sketchkv.slots import EMPTY, Slots, gather, move

DEMOTE = ("age", "importance")
FIRST = torch.iinfo(torch.int64).min


class Tiers(NamedTuple):
    """How slots are split: bits of keys and values in the coarse ones, the share that is fine, and who leaves it."""

    bits: tuple
    fine: float
    demote: str

    def checked(self, bits):
        """Itself. Raises ValueError for values out of range; `bits`: of the fine slots, a pair, or None."""
        if bits is None or any(coarse > fine for coarse, fine in zip(self.bits, bits)):
            raise ValueError(f"coarse_bits={self.bits} must be no more than bits, those of the fine slots; got bits={bits}")
        if isinstance(self.fine, bool) or not isinstance(self.fine, (int, float)) or not 0 < self.fine < 1:
            raise ValueError(f"fine must be the share of slots in more bits, between 0 and 1; got {self.fine!r}")
        if self.demote not in DEMOTE:
            raise ValueError(f"unknown demote={self.demote!r}; choose one of {', '.join(DEMOTE)}")
        return self

    def coarse(self, max_cache_size):
        """How many of `max_cache_size` slots are coarse: at least one of either kind."""
        return max_cache_size - min(max(int(self.fine * max_cache_size), 1), max_cache_size - 1)


class TieredSlots(Slots):
    """`Slots` of which the first `coarse.used` occupied ones are held in fewer bits.

    Tokens enter fine. Whenever the fine slots are full, those that are too many leave them: the oldest (`demote="age"`), or
    those that the policy ranks lowest (`"importance"`: sinks and the recent window last of all). They are decoded, and coded
    anew in coarse slots: those that were empty yet (`demote`), or that the eviction of the lowest ranked of all has freed
    (`evict`). A coarse token stays coarse, however important it becomes: its bits are gone.

    `max_cache_size` slots stay occupied after an eviction, and are divided as `tiers` says; those beyond them are fine. Keys
    and values lie in two stores, allocated once: `arrays["keys"]` and so on are the fine ones, `arrays["coarse_keys"]` the
    coarse ones, with one slot more, which takes what nobody will read. All other arrays have a row for each slot, coarse ones
    first, so that a policy sees no difference.
    """

    def __init__(
        self, batch, num_kv_heads, capacity, head_dim, dtype, device, summary_slots, bits, quantizer, tiers, max_cache_size
    ):  # fmt: skip
        self.most, self.extra, self.demotes = tiers.coarse(max_cache_size), capacity - max_cache_size, tiers.demote
        super().__init__(batch, num_kv_heads, capacity - self.most, head_dim, dtype, device, summary_slots, bits, quantizer)
        self.coarse = Slots(batch, num_kv_heads, self.most + 1, head_dim, dtype, device, 0, tiers.bits, quantizer)
        # Both stores in the same coordinates. Coarse bits are the fewer: where fine ones are turned, they are.
        self.rotation, self.centre = self.coarse.rotation, self.coarse.centre
        self.fine = self.kv
        self.arrays |= {f"coarse_{name}": self.coarse.arrays[name] for name in self.coarse.kv}
        self.kv = self.fine | {f"coarse_{name}" for name in self.coarse.kv}
        self.capacity = capacity
        self.arrays["positions"] = self.positions.new_full((batch, num_kv_heads, capacity), EMPTY)
        del self.coarse.arrays["positions"]  # one row for each token is enough

    @property
    def room(self):
        return self.capacity - self.most + self.coarse.used - self.used

    def read(self, name, part):
        if name not in self.fine:
            return super().read(name, part)
        (start, stop, _), border = part.indices(self.capacity), self.coarse.used
        fine = super().read(name, slice(max(start - border, 0), max(stop - border, 0)))
        return fine if start >= border else torch.cat([self.coarse.read(name, slice(start, min(stop, border))), fine], 2)

    def take(self, name, index):
        border = self.coarse.used
        fine = super().take(name, (index - border).clamp(min=0))
        return self.coarse.take(name, index.clamp(max=self.most)).where((index < border)[..., None], fine)

    def _encode(self, name, vectors, part):
        (start, stop, _), border = part.indices(self.capacity), self.coarse.used
        below = max(border - start, 0)
        if below:
            self.coarse._encode(name, vectors[:, :, :below], slice(start, border))
        super()._encode(name, vectors[:, :, below:], slice(start + below - border, stop - border))

    def demote(self, ranks):
        """Room for new tokens while coarse slots are still empty; `ranks` as of `evict`."""
        border, count = self.coarse.used, min(self.extra, self.most - self.coarse.used)
        order = self._stay(ranks)[:, :, border:].argsort(-1)
        for name in ("keys", "values"):
            self.coarse._encode(name, super().take(name, order[..., :count]), slice(border, border + count))
        for name in self.arrays.keys() - self.kv | self.fine:
            array = self.arrays[name][:, :, 0 if name in self.fine else border :]
            source = order[..., count:] if name in self.fine else order
            array[:, :, : source.shape[-1]] = gather(array, source)
        self.coarse.used += count
        self.kept = self.used  # as after an eviction of none

    def evict(self, evicted, ranks):
        # As many leave the fine slots as tokens are evicted: those evicted there, and one for each hole among the coarse.
        border = self.coarse.used
        stay = self._stay(ranks).scatter(-1, evicted, FIRST)
        leaving = stay[:, :, border:].topk(evicted.shape[-1], largest=False).indices + border  # the evicted first
        target = evicted.sort(-1, descending=True).values  # those in fine slots first: the dead go where the dead are
        holes = target.where(target < border, self.most)
        for name in ("keys", "values"):
            for each, coded in self.coarse._coded(name, super().take(name, leaving - border)).items():
                array = self.coarse.arrays[each]
                array.scatter_(2, holes[..., None].expand_as(coded), coded.to(array.dtype))
        for name in self.arrays.keys() - self.kv:
            move(self.arrays[name], leaving, target)
        super().evict(leaving)

    def _stay(self, ranks):
        """What those that stay fine have more of, int64 `[batch, num_kv_heads, used]`."""
        return self["positions"].long() if self.demotes == "age" else ranks

    def _copy(self, source, target):
        border = self.coarse.used
        for name in self.arrays.keys() - self.kv:
            move(self.arrays[name], source, target)
        for name in self.fine:
            move(self.arrays[name], source - border, target - border)

    def clear(self):
        super().clear()
        self.coarse.used = 0
