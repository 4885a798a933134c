"""One budget of slots for the whole model: layers lend each other slots by what they lose while decoding."""

from typing import Any

import torch

from sketchkv.cache import SketchCache
from sketchkv.layer import BoundedLayer
from sketchkv.policies import AttentionMass


class LentLayer(BoundedLayer):
    """A layer whose cap moves, and that tells what an eviction costs and what a smaller cap would.

    `prices`: float32 `[2]`, importance (of the policy, summed over KV heads and the tokens of a block of `evict_every`,
    mean over the batch) of the block that the last evictions threw away, and of the block that would have gone next,
    each a running mean over evictions with weight `memory` on the past.
    """

    memory = 0.0
    known = False  # whether `prices` hold anything yet

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.prices, self.known = torch.zeros(2, device=key_states.device), False

    def reset(self):
        super().reset()
        self.known = False

    def resize(self, max_cache_size):
        """Another cap: a smaller one is reached by the next eviction, a larger one when `fit` has made room."""
        self.max_cache_size = self.attend_topk = max_cache_size

    def fit(self):
        """As many slots as the cap asks for."""
        if self.slots is not None and self.slots.capacity != self.capacity:
            self.slots = self.home = self.slots.widened(self.capacity)

    def on_evict(self, scores, evicted):
        lowest = scores.topk(min(2 * self.evict_every, scores.shape[-1]), largest=False).values  # ascending
        lowest = lowest.where(lowest > -torch.inf, 0).sum(1).mean(0)
        now = torch.stack([lowest[: self.evict_every].sum(), lowest[self.evict_every :].sum()])
        self.prices.copy_(self.memory * self.prices + (1 - self.memory) * now if self.known else now)
        self.known = True

    def _narrow(self):
        freed = super()._narrow()
        self.fit()  # a lender's cap fell before this eviction: what it freed beyond that is no longer its own
        return freed


class AdaptiveCache(SketchCache):
    """A `SketchCache` whose layers lend each other slots while decoding. The sum of all caps never changes; only while a block
    passes from one layer to the other are its slots held twice.

    Layers are compared by the importance, in the units of the policy's score, of what they throw away. With `AttentionMass`
    (the default) that is attention per query that will miss its token: the running estimate of the tail mass that a layer
    loses by an eviction. Once per `evict_every` tokens one block of as many slots goes from the layer in which a block
    costs least to the one in which it is worth most, if that is worth more than `margin` times its cost; the next eviction
    of the lender frees it. No layer falls below `least` times its first cap.

    Attention is not loss: on the development documents this beats a uniform split with the embedded GPT-2, whose lowest
    layer wants far more slots than the others, and does not with the embedded rotary model.

    config, max_cache_size and further parameters as of `SketchCache`; a list of caps is the split to begin with, and must
    be equal modulo `evict_every`, so that layers evict at the same tokens. memory: weight of the past in the running
    means, per eviction. The split is one for all rows of a batch, so a row is not what it would be alone, and steps can't be
    recorded (`sketchkv.graph`). `score` and `generate` bring at most `evict_every` tokens at a time, and what is evicted
    then does not depend on how a text is cut; longer passes move slots less often.

    Raises ValueError for parameters out of range, and with `attend_topk` or `prefill_chunk`.
    """

    recordable = False  # it decides on the host
    layers: list[Any]  # `LentLayer`s

    def __init__(self, config, max_cache_size, *, margin=1.2, least=0.5, memory=0.5, policy=None, **settings):
        if margin < 1 or not 0 < least <= 1 or not 0 <= memory < 1:
            raise ValueError(
                f"margin must be at least 1, least in (0, 1], memory in [0, 1); got {margin}, {least} and {memory}"
            )
        if settings.get("attend_topk") is not None:
            raise ValueError(
                "attend_topk can't be set here: the caps move, and attention runs over all stored tokens"
            )
        if settings.get("prefill_chunk") is not None:
            raise ValueError(
                "prefill_chunk can't be set here: slots are lent from eviction to eviction, prompts included"
            )
        self.memory = memory
        super().__init__(
            config, max_cache_size, policy=AttentionMass() if policy is None else policy, **settings
        )
        self.margin = margin
        self.block = self.layers[0].evict_every
        self.first = [layer.max_cache_size for layer in self.layers]
        protected = self.layers[0].num_sinks + self.layers[0].recent_window
        self.least = [max(int(least * cap), protected + 1, self.block) for cap in self.first]
        if len({cap % self.block for cap in self.first}) > 1:
            raise ValueError(f"caps must be equal modulo evict_every={self.block}, got {self.first}")
        if min(self.first) < self.block:
            raise ValueError(f"a cap must be at least evict_every={self.block}, got {min(self.first)}")
        self.passes.after = self._after
        self._begin()

    def make_layer(self, cap, window, policy, settings, summary):
        if window is not None:
            raise ValueError("layers with sliding windows have no slots to lend: use a SketchCache")
        layer = LentLayer(policy, cap, settings, summary)
        layer.memory = self.memory
        return layer

    def _begin(self):
        self.round = 0  # evictions that have come and gone
        self.promised = None  # (lender, taker) of the block that the next eviction frees
        self.history = []  # (tokens seen, caps) after each change

    @property
    def caps(self):
        """Caps of all layers as they are now, a list of int: a promised block still counts for its lender."""
        caps = [layer.max_cache_size for layer in self.layers]
        if self.promised:
            caps[self.promised[0]] += self.block
        return caps

    @property
    def max_chunk_size(self):
        return self.block

    def reset(self):
        super().reset()
        for layer, cap in zip(self.layers, self.first, strict=True):
            layer.resize(cap)
            layer.fit()
        self._begin()

    def nbytes(self):
        held = super().nbytes()
        prices = sum(layer.prices.nbytes for layer in self.layers if layer.slots is not None)
        return held | {"policy": held["policy"] + prices, "total": held["total"] + prices}

    def _after(self):
        if self.layers[0].slots is not None:
            past = max((self.seen_tokens - max(self.first)) // self.block, 0)
            if past > self.round:
                self.round = past
                self._move()

    def _move(self):
        if self.promised:
            lender, taker = self.promised
            if self.layers[lender].slots.kept != self.layers[lender].max_cache_size:
                return  # it has not evicted yet
            self.layers[taker].resize(self.layers[taker].max_cache_size + self.block)
            self.layers[taker].fit()
            self.promised = None
            self.history.append((self.seen_tokens, self.caps))
        if not all(layer.known for layer in self.layers):
            return
        worth, cost = torch.stack([layer.prices for layer in self.layers]).T.tolist()
        # A layer that has just grown does not evict, and so does not know the price of its new cap.
        settled = [
            index for index, layer in enumerate(self.layers) if layer.slots.kept == layer.max_cache_size
        ]
        lenders = [
            index for index in settled if self.layers[index].max_cache_size - self.block >= self.least[index]
        ]
        if not lenders:
            return
        lender, taker = min(lenders, key=cost.__getitem__), max(settled, key=worth.__getitem__)
        if lender != taker and worth[taker] > self.margin * cost[lender]:
            self.layers[lender].resize(self.layers[lender].max_cache_size - self.block)
            self.promised = lender, taker
