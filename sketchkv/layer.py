"""One layer of a bounded cache: it stores new tokens, attends to what is stored, and evicts when it is full."""

from collections import Counter
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from sketchkv.checks import memory, refuses, slot_nbytes
from sketchkv.ops import unset
from sketchkv.slots import Slots
from sketchkv.support import fits, made_for


class BoundedLayer(CacheLayerMixin):
    """Slots and a policy. Blocks end where the slots are full, at fixed numbers of seen tokens: the same tokens are evicted
    whether a text arrives at once, in chunks or token by token, and a token sees what it would see while decoding.

    policy: decides what is evicted.
    max_cache_size: tokens kept after an eviction.
    settings: `sketchkv.checks.Settings`.
    summary: `sketchkv.summary.Summary` of the evicted tokens, or None.
    """

    is_sliding = False
    ops: Any = unset  # how it computes: what suits the device, once that is known, or what was set
    # Of `Settings`.
    num_sinks: int
    recent_window: int
    evict_every: int
    prefill_chunk: int | None
    codec: Any
    slots: Any  # None, as the two below, until the first tokens come
    home: Any
    nan: Any

    def __init__(self, policy, max_cache_size, settings, summary=None):
        super().__init__()
        self.policy, self.max_cache_size, self.summary = policy, max_cache_size, summary
        for name, value in vars(settings).items():
            setattr(self, name, value)
        self.attend_topk = min(settings.attend_topk or max_cache_size, max_cache_size)
        self.slots = self.home = self.nan = None
        self.seen = self.evicted = 0
        self.waiting = False  # whether `update` took tokens that no attention has come for yet
        self.all_slots = None  # of all layers of a cache, per head

    selective = property(lambda self: self.attend_topk < self.max_cache_size)
    capacity = property(lambda self: self.max_cache_size + self.evict_every)  # slots per sequence and KV head

    # The interface of a transformers cache layer

    @torch.inference_mode(False)  # tensors that may be written to inside of it and outside
    def lazy_initialization(self, key_states, value_states):
        shape, widths = key_states.shape[:2], (key_states.shape[-1], value_states.shape[-1])
        like = key_states.dtype, key_states.device
        from sketchkv.devices import suited

        self.ops = suited(self.ops, like[1], self.codec)
        self.slots = self.home = None  # frees what another batch took
        self.slots = self.home = _allocated(self, shape, widths, like)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Takes note of new keys and values and returns them as they are: storing, attending and evicting come in `attend`,
        after the mask of this pass was built."""
        held = self.slots
        if held is None or (self.seen == 0 and made_for(held) != made_for(key_states, value_states)):
            try:
                self.lazy_initialization(key_states, value_states)
            except BaseException:
                self.slots = self.home = None  # memory ended on the way: nothing is left half made
                raise
        else:
            fits(held, key_states, value_states)
        self.waiting = True
        return key_states, value_states

    def get_mask_sizes(self, query_length):
        """The mask of a call covers its own tokens alone; which stored tokens are visible, the slots know."""
        return query_length, self.seen

    def get_seq_length(self):
        """Tokens seen, not tokens stored: positions must go on past the cap."""
        return self.seen

    def get_max_length(self):
        return -1

    def reset(self):
        self.seen, self.evicted, self.waiting = 0, 0, False
        if self.slots is not None:
            self.slots = self.home  # an error may have come in the middle of a prompt
            self.slots.clear()
            self.nan.zero_()
            self.policy.reset(self.slots)
            if self.summary:
                self.summary.clear()

    def reorder_cache(self, beam_idx):
        if self.slots is None:
            return
        own = self.summary.tensors() if self.summary else []
        for tensor in self.slots.tensors() + self.policy.tensors() + own:
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    crop = refuses("cannot give back tokens it has evicted: use greedy search, sampling or beam search")
    batch_select_indices = refuses("has one batch: reset() it and begin with all rows")
    batch_repeat_interleave = batch_select_indices
    offload = refuses("stays on its device: hold fewer tokens, or others in a store (SketchCache.recall)")

    # What makes it bounded

    def attend(self, query, key, value, tokens, form):
        """Stores new tokens, attends to what is stored and to them, and evicts, block by block.

        query: `[batch, num_heads, n, width]`.
        key, value: `[batch, num_kv_heads, n, width]`.
        tokens: `Tokens`; form: `Form`.
        Returns attention's output, `[batch, num_heads, n, width of values]`.
        """
        codec, total, outputs, start = self.slots.codec, query.shape[2], [], 0
        while start < total:
            if self.prefill_chunk and total > self.evict_every:
                self._widen(total - start)
            count = min(self.slots.room, total - start, due := tokens.until(codec, self.seen))
            now, parts = tokens, [query, key, value]
            if count < total:
                block = slice(start, start + count)
                now, parts = tokens.part(block), [x[:, :, block] for x in parts]
            parts = self.ops.turn(self, *parts)
            new = self.ops.append(self, *parts[1:], now)
            self.policy.enter(self.slots, new, now.ids)
            self.seen += count
            outputs.append(self.ops.turn_back(self, self.ops.attend(self, parts[0], now, form)))
            if count == due:
                self.ops.settle(self, now)
            if not self.slots.room:
                used = self.slots.used
                self.ops.evict(self, now)
                self._narrow()
                self.evicted += used - self.slots.used
            start += count
        self.waiting = False
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def hide(self, logits, tokens):
        """Masks, in place, the logits `[batch, num_kv_heads, group, n, used]` of slots that the new tokens may not see."""
        count, least = logits.shape[3], torch.finfo(logits.dtype).min
        if tokens.padded:
            logits.masked_fill_((self.slots["positions"] < 0)[:, :, None, None], least)
        if self.selective:
            logits.masked_fill_(self.slots["unattended"][:, :, None, None], least)
        if count > 1:  # the new tokens are the last ones stored: of each other, they see those before them
            later = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu_(1)
            logits[..., -count:].masked_fill_(later, -torch.inf)

    def on_evict(self, scores, evicted):
        """The slots `evicted` are about to be freed, the lowest of `scores` (inf for protected, -inf for padding): for layers
        that keep an account of what they lose."""

    def _widen(self, coming):
        """Room for the tokens of a prompt that are yet to come, `prefill_chunk` beyond the cap at most."""
        needed = min(self.slots.used + coming, self.max_cache_size + self.prefill_chunk)
        if needed > self.slots.capacity:
            self.slots = self.ops.widened(self.slots, needed)

    def _narrow(self):
        """Back to the steady slots after an eviction."""
        if self.slots is not self.home:
            self.home.adopt(self.slots)
            self.slots = self.home

    def advance(self):
        """What one step changes on Python's side: for a step that runs on the device alone (`sketchkv.fast.graphs`)."""
        self.seen += 1
        self.slots.used += 1
        if not self.slots.room:
            self.slots.used = self.slots.kept = self.max_cache_size
            self.evicted += self.evict_every

    def check(self):
        """Raises ValueError if an importance was NaN. On CUDA this waits for the device; evictions call it now and then."""
        if self.nan is not None and self.nan:
            raise ValueError(
                f"{type(self.policy).__name__} gave NaN importance, found after {self.seen} tokens: the model's keys, "
                "queries or the policy's score are not finite (half precision that overflows? try float32 or bfloat16)"
            )

    def nbytes(self):
        """Bytes of the tensors held: {"kv", "sketch", "policy"}, without what layers share."""
        held = Counter(kv=0, sketch=0, policy=0)
        if self.slots is not None:
            held["kv"] = self.slots.nbytes(*self.slots.kv) + sum(t.nbytes for t in self.slots.codec.tensors())
            held.update(self.policy.nbytes(self.slots))
            held.update(self.summary.nbytes() if self.summary else {})
        return dict(held)

    def shared(self):
        """Tensors that layers share, which count once: {identity: (kind, bytes)}."""
        tensors = () if self.slots is None else self.slots.codec.shared()
        return {id(tensor): ("kv", tensor.nbytes) for tensor in tensors}


def _allocated(layer, shape, widths, like):
    """Empty slots of a layer, and what its policy and summary hold."""
    needed = shape.numel() * (layer.all_slots or layer.capacity) * slot_nbytes(layer.codec, like[0], widths)
    remedy = f"lower max_cache_size, evict_every or the batch ({layer.capacity} slots per head in this layer)"
    memory(needed, like[1], remedy)
    slots = Slots(shape, layer.capacity, widths, layer.codec(*like))
    layer.nan = torch.zeros((), dtype=torch.bool, device=like[1])
    layer.policy.allocate(slots)
    if layer.summary:
        layer.summary.allocate(slots)
    if layer.selective:
        slots.add("unattended", torch.bool)
    return slots
