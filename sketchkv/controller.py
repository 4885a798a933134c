"""One budget of slots for the whole model, and who gets how much of it: layers by a fixed shape (`pyramid`) or by what they
lose while decoding (`AdaptiveCache`), heads by competition (`HeadPoolCache`). The total never changes."""

import torch

from sketchkv.cache import SketchCache, SketchLayer
from sketchkv.policies import AttentionMass
from sketchkv.slots import EMPTY


def pyramid(max_cache_size, layers, steepness=0.5):
    """Caps of all layers, a list of int, falling evenly from (1 + steepness) to (1 - steepness) times `max_cache_size`;
    their sum is exactly `layers * max_cache_size`.

    After PyramidKV (Cai et al. 2024, arXiv 2406.02069): lower layers spread their attention over more tokens. Steepness 0 is
    the uniform split, a negative one favours the upper layers. Raises ValueError unless -1 < steepness < 1.
    """
    if not -1 < steepness < 1:
        raise ValueError(f"steepness must lie between -1 and 1, got {steepness}")
    # Sums are rounded, not caps: so that the whole is kept.
    tops = [round(max_cache_size * n * (1 + steepness * (layers - n) / max(layers - 1, 1))) for n in range(layers + 1)]
    return [top - below for below, top in zip(tops, tops[1:])]


class LentLayer(SketchLayer):
    """A layer whose slots lie in an `Arena`, and that tells what an eviction costs and what a smaller cap would.

    `prices`: float32 `[2]`, importance (of the policy, summed over KV heads and the tokens of a block of `evict_every`,
    mean over the batch) of the block that the last evictions threw away, and of the block that would have gone next,
    each a running mean over evictions with weight `memory` on the past.
    """

    arena = None
    memory = 0.0

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.prices = torch.zeros(2, device=key_states.device)
        self.known = False  # whether `prices` hold anything yet
        self.arena.adopt(self)

    def _forget(self):
        super()._forget()
        self.known = False

    def resize(self, max_cache_size):
        self.max_cache_size = self.attend_topk = max_cache_size

    def _part(self, scores, evicted):
        lowest = scores.topk(min(2 * self.evict_every, scores.shape[-1]), largest=False).values  # ascending
        lowest = lowest.where(lowest > -torch.inf, 0).sum(1).mean(0)
        now = torch.stack([lowest[: self.evict_every].sum(), lowest[self.evict_every :].sum()])
        self.prices.copy_(self.memory * self.prices + (1 - self.memory) * now if self.known else now)
        self.known = True

    def _evict(self, clock=None):
        super()._evict(clock)
        # A lender's cap fell before this eviction: what it freed beyond that is no longer its own.
        self.slots.capacity = self.max_cache_size + self.evict_every


class Arena:
    """The slots of all layers in one piece of memory per array, `[batch, num_kv_heads, all slots, ...]`.

    Each layer holds a stretch, in the order of the layers; `Slots` sees it as arrays of its own. A block of slots passes from
    one layer to another by moving the stretches between them by its length. Since stored tokens are in no order, that
    copies a block (and the newest tokens, which are in order) per layer moved, not the stretch.
    """

    def __init__(self, layers):
        self.layers = layers
        self.rows = {}  # name of an array: tensor of all layers
        self.begin()

    def begin(self):
        """Stretches as the layers' caps say, one after the other: for the first text or the next."""
        sizes = [layer.max_cache_size + layer.evict_every for layer in self.layers]
        self.starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.total = sum(sizes)

    def _front(self, layer, name):
        """Summary slots, which lie before the layer's slots where keys and values are not coded."""
        return layer.slots.summary[name].shape[2] if name in layer.slots.whole and not layer.slots.coders else 0

    def _first(self, index, name):
        """The row of the layer's first slot."""
        return self.starts[index] + self._front(self.layers[index], name) * (index + 1)

    def adopt(self, layer):
        """Takes over the freshly allocated, still empty slots of a layer."""
        for name, array in layer.slots.arrays.items():
            if name not in self.rows:
                rows = self.total + self._front(layer, name) * len(self.layers)
                fill = EMPTY if name == "positions" else 0
                self.rows[name] = array.new_full((*array.shape[:2], rows, *array.shape[3:]), fill)
        self.show(self.layers.index(layer))

    def show(self, index):
        """Makes the layer's arrays views of its stretch."""
        layer = self.layers[index]
        slots = layer.slots
        for name in slots.arrays:
            front, first = self._front(layer, name), self._first(index, name)
            whole = self.rows[name][:, :, first - front : first + slots.capacity]
            slots.arrays[name] = whole[:, :, front:]
            if name in slots.whole and not slots.coders:
                slots.whole[name], slots.summary[name] = whole, whole[:, :, :front]
        if layer.summary:
            layer.summary.means = (slots.summary["keys"], slots.summary["values"])

    def lend(self, lender, taker, size):
        """`size` free slots at the end of layer `lender` become free slots at the end of layer `taker` (indices)."""
        up = taker > lender
        for index in range(lender + 1, taker + 1) if up else range(lender, taker, -1):
            self._shift(index, size, up)
        self.layers[taker].slots.capacity += size
        for index in range(min(lender, taker), max(lender, taker) + 1):
            self.show(index)
            slots = self.layers[index].slots
            for name in slots.arrays.keys() - slots.kv:
                slots.arrays[name][:, :, slots.used :] = EMPTY if name == "positions" else 0

    def _shift(self, index, size, down):
        """Moves a stretch by `size` rows, which are free: those kept at one end hop over to the other."""
        slots = self.layers[index].slots
        kept, used = slots.kept, slots.used
        for name, rows in self.rows.items():
            front, first = self._front(self.layers[index], name), self._first(index, name)
            if down:
                source = [*range(-front, 0), *range(kept - size, used)]
                target = [*range(-front - size, 0), *range(kept - size, used - size)]
            else:
                source = [*range(-front, size), *range(kept, used)]
                target = [*range(size - front, size), *range(kept, used + size)]
            source, target = (torch.tensor(each, device=rows.device) + first for each in (source, target))
            rows.index_copy_(2, target, rows.index_select(2, source))
        self.starts[index] += -size if down else size


class AdaptiveCache(SketchCache):
    """A `SketchCache` whose layers lend each other slots while decoding, in memory that is allocated once.

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

    Raises ValueError for parameters out of range, and with `attend_topk`, `coarse_bits` or `prefill_chunk`.
    """

    layer_type = LentLayer
    recordable = False

    def __init__(self, config, max_cache_size, *, margin=1.2, least=0.5, memory=0.5, policy=None, **settings):
        if margin < 1 or not 0 < least <= 1 or not 0 <= memory < 1:
            raise ValueError(
                f"margin must be at least 1, least in (0, 1], memory in [0, 1); got {margin}, {least} and {memory}"
            )
        if settings.get("attend_topk") is not None:
            raise ValueError("attend_topk can't be set here: the caps move, and attention runs over all stored tokens")
        if settings.get("prefill_chunk") is not None:
            raise ValueError("prefill_chunk can't be set here: slots are lent from eviction to eviction, prompts included")
        if settings.get("coarse_bits") is not None:
            raise ValueError("coarse_bits can't be set here: only slots that are all alike can be lent")
        super().__init__(config, max_cache_size, policy=AttentionMass() if policy is None else policy, **settings)
        self.margin = margin
        self.block = self.layers[0].evict_every
        self.first = [layer.max_cache_size for layer in self.layers]
        protected = self.layers[0].num_sinks + self.layers[0].recent_window
        self.least = [max(int(least * cap), protected + 1, self.block) for cap in self.first]
        if len({cap % self.block for cap in self.first}) > 1:
            raise ValueError(f"caps must be equal modulo evict_every={self.block}, got {self.first}")
        if min(self.first) < self.block:
            raise ValueError(f"a cap must be at least evict_every={self.block}, got {min(self.first)}")
        self.arena = Arena(self.layers)
        for layer in self.layers:
            layer.arena, layer.memory = self.arena, memory
        self._begin()

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
        for layer, cap in zip(self.layers, self.first):
            layer.resize(cap)
            if layer.slots is not None:
                layer.slots.capacity = cap + self.block
        self.arena.begin()
        if self.layers[-1].slots is not None:
            for index in range(len(self.layers)):
                self.arena.show(index)
        super().reset()
        self._begin()

    def nbytes(self):
        held = super().nbytes()
        prices = sum(layer.prices.nbytes for layer in self.layers if layer.slots is not None)
        return held | {"policy": held["policy"] + prices, "total": held["total"] + prices}

    def close(self):
        super().close()
        if self.layers[0].slots is not None:
            past = max((self.seen_tokens - max(self.first)) // self.block, 0)
            # After an error layers may be at different tokens: then the text is lost, and nothing is moved.
            if past > self.round and len({layer.seen for layer in self.layers}) == 1:
                self.round = past
                self._move()

    def _move(self):
        if self.promised:
            lender, taker = self.promised
            if self.layers[lender].slots.kept != self.layers[lender].max_cache_size:
                return  # it has not evicted yet
            self.layers[taker].resize(self.layers[taker].max_cache_size + self.block)
            self.arena.lend(lender, taker, self.block)
            self.promised = None
            self.history.append((self.seen_tokens, self.caps))
        if not all(layer.known for layer in self.layers):
            return
        worth, cost = torch.stack([layer.prices for layer in self.layers]).T.tolist()
        # A layer that has just grown does not evict, and so does not know the price of its new cap.
        settled = [index for index, layer in enumerate(self.layers) if layer.slots.kept == layer.max_cache_size]
        lenders = [index for index in settled if self.layers[index].max_cache_size - self.block >= self.least[index]]
        if not lenders:
            return
        lender, taker = min(lenders, key=cost.__getitem__), max(settled, key=worth.__getitem__)
        if lender != taker and worth[taker] > self.margin * cost[lender]:
            self.layers[lender].resize(self.layers[lender].max_cache_size - self.block)
            self.promised = lender, taker


class AdaKV(AttentionMass):
    """`AttentionMass` for heads that compete for one pool of slots: each is sure of the share `floor` of an equal split, the
    rest goes to the highest scores of all (Ada-KV, Feng et al. 2024, arXiv 2407.11550)."""

    def __init__(self, decay=0.99, mean=True, value_norm=False, floor=0.5):
        super().__init__(decay, mean, value_norm)
        if not 0 <= floor < 1:
            raise ValueError(f"floor must be in [0, 1), got {floor}")
        self.floor = floor

    def score(self, slots, seen):
        score, owner = super().score(slots, seen), slots["head"]
        heads = torch.arange(slots.heads, device=score.device)[:, None]
        sure = int(self.floor * (slots.capacity // slots.heads))
        own = score.masked_fill(owner != heads, -torch.inf).topk(sure).indices  # [batch, heads, sure]
        return score.scatter(-1, own.flatten(1)[:, None], 1e30)


class PooledLayer(SketchLayer):
    """A layer whose KV heads share one pool of slots, `[batch, 1, heads * capacity]`, each slot with the head that owns it.

    Attention is computed of every query with every slot, and masked: as many times the arithmetic as there are KV heads.
    Bytes are those of an equal split and one more per slot.
    """

    heads = None

    def lazy_initialization(self, key_states, value_states):
        batch, self.heads, _, head_dim = key_states.shape
        self.max_cache_size, self.evict_every = self.max_cache_size * self.heads, self.evict_every * self.heads
        self.attend_topk = self.max_cache_size
        one = key_states.new_empty(batch, 1, 0, head_dim)
        super().lazy_initialization(one, one)
        self.slots.add("head", torch.uint8)
        self.slots.heads = self.heads

    def attend(self, query, key, value, valid, token_ids, scaling, clock=None):
        if valid is not None and not bool(valid.all()):
            raise ValueError("a HeadPoolCache takes texts without padding")
        total, outputs, start, slots = query.shape[2], [], 0, self.slots
        group = query.shape[1] // self.heads
        owners = torch.arange(query.shape[1], device=query.device)[:, None, None] // group
        while start < total:
            count = min((slots.capacity - slots.used) // self.heads, total - start)
            block = slice(start, start + count)
            now = torch.arange(self.seen, self.seen + count, dtype=torch.int32, device=query.device)
            pooled = (x[:, :, block].transpose(1, 2).flatten(1, 2)[:, None] for x in (key, value))
            new = slots.append(*pooled, now.repeat_interleave(self.heads))
            slots.arrays["head"][:, :, new] = torch.arange(self.heads, device=query.device, dtype=torch.uint8).repeat(count)
            self.seen += count
            hidden = (slots["head"][:, :, None] != owners) | (slots["positions"][:, :, None] > now[:, None])
            logits = (query[:, :, block] @ slots["keys"].transpose(-1, -2)).float().mul_(scaling)
            attention = logits.masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1)
            outputs.append(attention.to(value.dtype) @ slots["values"])
            self.policy.observe(slots, attention.sum(1, keepdim=True))
            if slots.used == slots.capacity:
                self._evict()
            start += count
        return torch.cat(outputs, 2)


class HeadPoolCache(SketchCache):
    """A `SketchCache` whose KV heads keep different numbers of tokens: those of a layer share `max_cache_size` slots each in
    one pool, and the lowest scores of all go (`AdaKV`). For texts without padding, in the model's dtype or 16 bits.

    Parameters as of `SketchCache` and `AdaKV`. Raises ValueError for what a pool can't do: summaries, fewer bits.
    """

    layer_type = PooledLayer
    recordable = False

    def __init__(self, config, max_cache_size, *, num_sinks=4, recent_window=16, evict_every=16, bits=None, **policy):
        if bits not in (None, 16):
            raise ValueError(f"a HeadPoolCache holds 16 bits or the model's dtype, got bits={bits}")
        protection = dict(num_sinks=num_sinks, recent_window=recent_window, evict_every=evict_every)
        super().__init__(config, max_cache_size, bits=bits, policy=AdaKV(**policy), **protection)

    @property
    def evicted_tokens(self):
        return sum(layer.evicted // (layer.heads or 1) for layer in self.layers)

    def stored_tokens(self):
        """Occupied slots per layer and KV head, mean over the heads of a layer."""
        return [0 if layer.slots is None else layer.slots.used // layer.heads for layer in self.layers]

    def kept_positions(self, layer):
        """As of `SketchCache`, `[batch, num_kv_heads, slots of the layer]`: -1 in the slots of other heads."""
        positions, slots = super().kept_positions(layer), self.layers[layer].slots
        owners = torch.arange(slots.heads, device=positions.device)[:, None]
        return positions.where(slots.arrays["head"] == owners, EMPTY)
