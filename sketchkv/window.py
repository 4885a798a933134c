"""Layers that see the newest tokens alone: the sliding windows of hybrid models (Gemma, Mistral, gpt-oss)."""

import torch

from sketchkv.layer import BoundedLayer
from sketchkv.policies import Window

# New tokens of one attention product: as many slots are held beyond the window while a text passes.
MAX_BLOCK = 256


class WindowLayer(BoundedLayer):
    """Holds the newest `window` tokens, which are all that a query of a sliding-window layer may see, and no more.

    window: tokens that a query sees, itself included; a cap below the model's own window binds here, too.
    settings: `sketchkv.checks.Settings`, of which sinks, recent window and evictions have no meaning here.
    capped: whether the window is smaller than the model's own, so that what leaves it counts as evicted.
    """

    is_sliding = True
    selective = False
    capacity = property(lambda self: self.max_cache_size)

    def __init__(self, window, settings, capped):
        super().__init__(Window(), window, settings)
        self.capped = capped

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        codec = self.slots.codec
        if codec.settles_after > self.max_cache_size:
            codec.settles_after = 0  # tokens would leave the window before their centre is known

    def attend(self, query, key, value, tokens, form):
        codec, total, outputs = self.slots.codec, query.shape[2], []
        query, key, value = codec.turn(query, key, value)
        if total == 1 and not self.slots.room:  # the oldest leaves the window as the new one comes
            oldest = self.home.positions.argmin(-1, keepdim=True)
            replace(self.home, oldest, key, value, tokens.positions, tokens.first)
            self.seen, self.evicted, self.waiting = self.seen + 1, self.evicted + self.capped, False
            output = codec.turn_back(self.ops.attend(self, query, tokens, form))
            if tokens.until(codec, self.seen - 1) == 1:
                self.ops.settle(self, tokens)
            return output
        start = 0
        while start < total:
            count = min(MAX_BLOCK, total - start, due := tokens.until(codec, self.seen))
            block = slice(start, start + count)
            now, parts = tokens.part(block), [x[:, :, block] for x in (query, key, value)]
            if self.slots.room < count:
                self.slots = self.slots.widened(self.slots.used + count)
            self.ops.append(self, *parts[1:], now)
            self.seen += count
            outputs.append(self.ops.attend(self, parts[0], now, form))
            if count == due:
                self.ops.settle(self, now)
            gone = self.slots.used - self.max_cache_size
            if gone > 0:
                self.slots.evict(self.slots["positions"].topk(gone, largest=False).indices)
                self.evicted += gone * self.capped
            if self.slots is not self.home:
                self.home.adopt(self.slots)
                self.slots = self.home
            start += count
        self.waiting = False
        return codec.turn_back(torch.cat(outputs, 2))

    def advance(self):
        full = not self.slots.room
        self.seen, self.evicted = self.seen + 1, self.evicted + (full and self.capped)
        self.slots.used += not full

    def hide(self, logits, tokens):
        stored = self.slots["positions"][:, :, None]  # [batch, num_kv_heads, 1, used]
        query = tokens.positions[:, None, :, None]
        hidden = (stored < 0) | (stored > query) | (stored <= query - self.max_cache_size)
        logits.masked_fill_(hidden[:, :, None], torch.finfo(logits.dtype).min)


def replace(slots, index, keys, values, positions, first=0):
    """A new token takes the slot `index` (`[batch, num_kv_heads, 1]`) of each head; other parameters as of `append`."""
    coded = slots.coded(keys, values, positions, first)
    for name, new in (coded | {"positions": positions[:, None].expand_as(index)}).items():
        array = slots.arrays[name]
        array.scatter_(2, index[..., None].expand_as(new) if array.ndim == 4 else index, new.to(array.dtype))
