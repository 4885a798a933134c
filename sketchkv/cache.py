"""A transformers cache that never holds more than `max_cache_size` tokens per KV head."""

import copy
import warnings

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sketchkv import kernels, summaries
from sketchkv.policies import AttentionMass, Policy, Sketch
from sketchkv.quantize import coder, matrix
from sketchkv.slots import EMPTY, Slots
from sketchkv.tiers import TieredSlots, Tiers

# Queries of one attention product: bounds the score matrix while a large cache fills.
MAX_BLOCK = 256
# Tokens after which quantized keys are centred (`Slots.recentre`): early enough for most of a text, late enough for a mean.
CENTRE_AFTER = 32
# Evictions between two looks for NaN on CUDA, where looking makes the host wait for the device.
CHECK_EVERY = 16


class SketchLayer(CacheLayerMixin):
    """One layer's slots and policy. `attend` stores, attends and evicts block by block; `update` only checks.

    Blocks end where the slots are full, at fixed numbers of seen tokens: the same tokens are evicted whether a text
    arrives at once, in chunks or token by token, and a token sees what it would see while decoding.
    """

    is_sliding = False

    def __init__(
        self, policy, max_cache_size, num_sinks, recent_window, evict_every, attend_topk=None, summary_slots=0, bits=None,
        quantizer="normal", prefill_chunk=None, tiers=None, summary="hash",
    ):  # fmt: skip
        super().__init__()
        self.policy = policy
        self.max_cache_size = max_cache_size
        self.num_sinks = num_sinks
        self.recent_window = recent_window
        self.evict_every = evict_every
        self.attend_topk = min(attend_topk or max_cache_size, max_cache_size)
        self.summary_slots = summary_slots
        self.folding = summaries.settings(summary, summary_slots)
        self.bits = bits
        self.quantizer = quantizer
        self.prefill_chunk = prefill_chunk
        self.tiers = tiers
        self.summary = None
        self.slots = None
        self.nan = None  # whether an importance was NaN, a bool tensor on the device
        self._forget()

    def _forget(self):
        self.seen = 0
        self.evicted = 0
        self.padded = False
        self.first = None  # [batch], position of each row's first real token once `padded`

    # The interface of a transformers cache layer

    def lazy_initialization(self, key_states, value_states):
        batch, heads, _, head_dim = key_states.shape
        capacity = self.max_cache_size + self.evict_every
        shape = batch, heads, capacity, head_dim, key_states.dtype, key_states.device
        coding = self.summary_slots if summaries.KINDS[self.folding["kind"]].in_place else 0, self.bits, self.quantizer
        if self.tiers:
            self.slots = TieredSlots(*shape, *coding, self.tiers, self.max_cache_size)
        else:
            self.slots = Slots(*shape, *coding)
        if self.summary_slots:
            self.summary = summaries.make(self.slots, self.summary_slots, **self.folding)
        self.policy.allocate(self.slots)
        if self.attend_topk < self.max_cache_size:
            self.slots.add("unattended", torch.bool)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Returns the new keys and values as they are: storing and evicting happen in `attend`, after the mask of this
        call was built."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, batch = self.slots, self.slots.positions.shape[0]
        if key_states.shape[0] != batch:
            raise ValueError(
                f"the cache holds a batch of {batch}, this call brings {key_states.shape[0]}: "
                "finish one batch before the next, with cache.reset() between them or a new cache"
            )
        if key_states.dtype != held.dtype or key_states.device != held.device:
            raise ValueError(
                f"the cache holds {held.dtype} on {held.device}, this call brings {key_states.dtype} on "
                f"{key_states.device}: use a new cache after converting or moving a model"
            )
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
        self._forget()
        if self.slots is not None:
            self._shrink()  # an error may have come in the middle of a prompt
            self.slots.clear()
            if self.nan is not None:
                self.nan.zero_()
            if self.summary:
                self.summary.clear()
            self.policy.reset(self.slots)

    def reorder_cache(self, beam_idx):
        if self.slots is None:
            return
        self.slots.reorder(beam_idx)
        for tensor in self.policy.tensors() + (self.summary.tensors() if self.summary else []):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        if self.first is not None:
            self.first = self.first.index_select(0, beam_idx.to(self.first.device))

    def crop(self, *_):
        raise NotImplementedError(
            "a bounded cache cannot give back tokens it has evicted: use greedy search, sampling or beam search"
        )

    batch_repeat_interleave = batch_select_indices = crop

    # What makes it bounded

    def attend(self, query, key, value, valid, token_ids, scaling, clock=None):
        """Attention of new tokens over stored and new ones, `[batch, num_heads, n, head_dim]` like `query`.

        query: `[batch, num_heads, n, head_dim]`; key, value: `[batch, num_kv_heads, n, head_dim]`; valid: bool
        `[batch, n]`, False for padding, or None; token_ids: `[batch, n]` or None; scaling: factor of the logits; clock:
        int32 `[1]`, the position of the one new token, for a step that will run again at other positions
        (`sketchkv.graph`), or None.
        """
        total, outputs, start = query.shape[2], [], 0
        rotation = self.slots.rotation
        if rotation is not None:  # of queries and keys alike: no product of the two changes
            rotation = matrix(rotation, query.dtype)
            query, key, value = query @ rotation, key @ rotation, value @ rotation
        while start < total:
            if self.prefill_chunk and total > self.evict_every and self.slots.home is None:
                self._stretch(total - start)
            count = min(self.slots.room, total - start, MAX_BLOCK)
            if rotation is not None and self.seen < CENTRE_AFTER:
                count = min(count, CENTRE_AFTER - self.seen)
            block = slice(start, start + count)
            parts = (query, key, value) if count == total else (x[:, :, block] for x in (query, key, value))
            queries, keys, values = parts
            real = self._store(keys, values, valid, token_ids, block, clock)
            outputs.append(self._attend_block(queries, real, scaling, clock is not None))
            if rotation is not None and self.seen == CENTRE_AFTER:
                self.slots.recentre(self.num_sinks)
            if self.slots.used == self.slots.capacity:
                self._evict(clock)
                self._shrink()
            elif not self.slots.room:
                self.slots.demote(self._rank(clock)[0])
            start += count
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return output if rotation is None else output @ rotation.T

    def _stretch(self, coming):
        """Room for the tokens of a prompt that are yet to come, `prefill_chunk` beyond the cap at most; none is made where
        they fit as it is."""
        needed = min(self.slots.used + coming, self.max_cache_size + self.prefill_chunk)
        if needed > self.slots.capacity:
            self.slots.stretch(needed)
            self._point()

    def _shrink(self):
        if self.prefill_chunk and self.slots.home is not None:
            self.slots.shrink()
            self._point()

    def _point(self):
        if self.summary:
            self.summary.means = self.slots.summary["keys"], self.slots.summary["values"]

    def _store(self, key, value, valid, token_ids, block, clock=None):
        """Appends the tokens of `block` (`key` and `value` are theirs alone); returns which of them are real (`[batch, n]`),
        None if all are."""
        count = block.stop - block.start
        padded = valid is not None or self.padded
        positions, real = clock, None
        if clock is None:
            positions = self.seen
            if count > 1 or padded:
                positions = torch.arange(self.seen, self.seen + count, dtype=torch.int32, device=key.device)
        if padded:
            positions = positions.expand(key.shape[0], count)
            real = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid[:, block]
            if not self.padded:
                self.padded = True
                # Tokens before the first mask were all real; -1 stands for a row that had none yet.
                self.first = torch.full_like(positions[:, 0], 0 if self.seen else -1)
            begins = (self.first < 0) & real.any(-1)
            self.first = torch.where(begins, self.seen + real.int().argmax(-1), self.first)
            positions = positions.masked_fill(~real, EMPTY)
        new = self.slots.append(key, value, positions)
        self.policy.enter(self.slots, new, None if token_ids is None else token_ids[:, block])
        self.seen += count
        return real

    def _attend_block(self, query, real, scaling, recorded=False):
        count, used = query.shape[2], self.slots.used
        if self.policy.uses_queries:
            self.policy.query(self.slots, query)
        if count == 1 and kernels.usable(query, recorded) and not self.summary and self.attend_topk >= self.max_cache_size:
            return self._attend_fused(query[:, :, 0], real, scaling)[:, :, None]
        # The query heads of a group share their KV head's slots: no key or value is repeated (grouped-query attention).
        batch, kv_heads, _ = self.slots.positions.shape
        query = query.reshape(batch, kv_heads, -1, self.slots.head_dim)
        if self.summary:
            keys, values, bias = self.summary.context(self.slots, query, scaling)
        else:
            keys, values = self.slots["keys"], self.slots["values"]
        length, head_dim = keys.shape[2:]  # summary slots, then stored tokens
        stored = slice(length - used, None)
        query, keys, values = query.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        logits = torch.baddbmm(query.new_empty(()), query, keys.transpose(1, 2), beta=0, alpha=scaling).float()
        logits = logits.view(batch, kv_heads, -1, count, length)
        least = torch.finfo(logits.dtype).min
        if count > 1:  # the new tokens are the last ones stored: of each other, they see those before them
            later = torch.ones(count, count, dtype=torch.bool, device=keys.device).triu_(1)
            logits[..., length - count :].masked_fill_(later, least)
        if self.padded:
            logits[..., stored].masked_fill_((self.slots["positions"] < 0)[:, :, None, None], least)
        if self.attend_topk < self.max_cache_size:
            logits[..., stored].masked_fill_(self.slots["unattended"][:, :, None, None], least)
        if self.summary:
            logits.flatten(2, 3)[..., : stored.start] += bias
        attention = logits.softmax(-1)
        output = torch.bmm(attention.view(batch * kv_heads, -1, length).to(values.dtype), values)
        if self.policy.uses_attention:
            received = attention[..., stored] if self.summary else attention
            received = received.squeeze(2) if received.shape[2] == 1 else received.sum(2)
            if real is not None:
                received = received * real[:, None, :, None]
            self.policy.observe(self.slots, received)
        return output.view(batch, -1, count, head_dim)

    def _attend_fused(self, query, real, scaling):
        """`_attend_block` for one new token, `[batch, num_heads, head_dim]`, in one pass over keys and values."""
        slots, policy = self.slots, self.policy
        positions = slots["positions"] if self.padded else None
        mass, decay = (None, 1.0) if real is not None else policy.accumulator(slots)
        output, received = kernels.attend(query, slots["keys"], slots["values"], scaling, positions, mass, decay)
        if policy.uses_attention and mass is None:
            received = received[:, :, None]
            policy.observe(slots, received if real is None else received * real[:, None, :, None])
        return output

    def _evict(self, clock=None):
        """Back to `max_cache_size` tokens: the lowest scores go, padding first, sinks and the recent window never. Of
        those that stay, all but the `attend_topk` highest are left out of attention until the next eviction. Those that
        go are folded into the summary, if there is one.

        Among equal scores (tokens that share a sketch key, say) the older goes: the same choice on every device.
        """
        if clock is not None and self._simple():
            return self._evict_fused(clock)
        positions = self.slots["positions"]
        ranks, scores, importance = self._rank(clock)
        lowest = ranks.topk(self.slots.capacity - self.attend_topk, largest=False).indices
        if self.attend_topk < self.max_cache_size:
            self.slots["unattended"].zero_().scatter_(-1, lowest, True)
        evicted = lowest[..., : self.slots.used - self.max_cache_size]
        if self.summary:
            keys, values = self.slots.take("keys", evicted), self.slots.take("values", evicted)
            self.summary.fold(keys, values, *(x.gather(-1, evicted) for x in (positions, importance)))
        self._part(scores, evicted)
        self.slots.evict(evicted, ranks)
        self.evicted += evicted.shape[-1]

    def _simple(self):
        """Whether an eviction asks for nothing but scores, and the kernels serve."""
        slots = self.slots
        count = slots.used - self.max_cache_size
        return (
            kernels.usable(slots.positions, recorded=True) and type(slots) is Slots and not slots.coders and not self.padded
            and not self.summary and self.attend_topk >= self.max_cache_size and count <= kernels.MOST_CHOSEN
            and slots.used <= kernels.MOST_SLOTS and type(self)._part is SketchLayer._part
        )  # fmt: skip

    def _evict_fused(self, clock):
        """`_evict` in few launches, for a step that will be recorded."""
        slots, count = self.slots, self.slots.used - self.max_cache_size
        if self.nan is None:
            self.nan = torch.zeros((), dtype=torch.bool, device=slots.device)
        importance = self.policy.score(slots, clock + 1).float()
        if importance.stride(-1) != 1:
            importance = importance.contiguous()
        evicted = kernels.lowest(importance, slots["positions"], clock, count, self.num_sinks, self.recent_window, self.nan)
        if slots.positions.device.type == "cpu":
            self.check()
        slots.close(evicted)
        self.evicted += count

    def _rank(self, clock=None):
        """Of all occupied slots, `[batch, num_kv_heads, used]` each: integers in the order of their scores, among equals the
        older lower; the scores, those of sinks and recent window inf and those of padding -inf; and what the policy says."""
        positions, seen = self.slots["positions"], self.seen if clock is None else clock + 1
        scores = importance = self.policy.score(self.slots, seen).clamp(-1e30, 1e30)
        if self.summary and self.folding["protect"]:
            # What is lost with a token is what the summary does not say of it, and no more.
            scores = scores + scores.abs() * self.summary.misfit(self.slots["keys"], self.slots["values"], positions >= 0)
        first = 0 if self.first is None else self.first[:, None, None]
        protected = (positions < first + self.num_sinks) | (positions >= seen - self.recent_window)
        scores = scores.masked_fill(protected, torch.inf).masked_fill(positions < 0, -torch.inf)
        nan = scores.isnan().any()
        self.nan = nan if self.nan is None else self.nan.logical_or_(nan)  # in place, where a recorded step finds it
        if nan.device.type == "cpu" or (clock is None and self.evicted // self.evict_every % CHECK_EVERY == 0):
            self.check()
        return _order(scores, positions), scores, importance

    def _part(self, scores, evicted):
        """The slots `evicted` are about to be freed, the lowest of `scores` (inf for protected, -inf for padding): for layers
        that keep an account of what they lose."""

    def skip(self):
        """What one step changes on Python's side: for a step that runs on the device alone (`sketchkv.graph`)."""
        self.seen += 1
        self.slots.used += 1
        if self.slots.used == self.slots.capacity:
            self.slots.used = self.slots.kept
            self.evicted += self.evict_every

    def check(self):
        """Raises ValueError if an importance was NaN. On CUDA this waits for the device; evictions call it now and then."""
        if self.nan is not None and self.nan:
            raise ValueError(
                f"{type(self.policy).__name__} gave NaN importance, found after {self.seen} tokens: the model's keys, "
                "queries or the policy's score are not finite (half precision that overflows? try float32 or bfloat16)"
            )


def _order(scores, positions):
    """Integers in the order of (score, position), so that one selection does and nothing depends on how ties fall."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats fall as their bits rise
    return (bits.long() << 32) + positions


def _pair(bits, quantizer):
    """Bits for keys and values as a tuple, None as it is. Raises ValueError for what does not exist."""
    if bits is None:
        return None
    bits = tuple(bits) if isinstance(bits, (tuple, list)) else (bits, bits)
    if len(bits) != 2:
        raise ValueError(f"bits must be one number, a pair for keys and values, or None; got {bits!r}")
    for each in bits:
        coder(each, 64, quantizer, "cpu")  # refuses what does not exist now instead of at the first token
    return bits


class SketchCache(Cache):
    """A bounded KV cache for `model.generate(..., past_key_values=cache)` on a model switched by `sketchkv.enable`.

    config: the model's configuration (or the model). max_cache_size: tokens kept per sequence, layer and KV head after
    an eviction; or a list, one cap per layer (`sketchkv.controller.pyramid`). evict_every: tokens between evictions; as
    many slots are held beyond the cap, and count as memory.
    num_sinks: first tokens of a text that are never evicted; recent_window: newest tokens that are never evicted.
    attend_topk: attention runs over this many stored tokens alone, those that the policy ranked highest at the last
    eviction (sinks and recent window first), and over all that arrived since, which have no rank yet; before the first
    eviction over all. A token left out stays stored and gains no attention; the next eviction ranks it again. None, or
    at least `max_cache_size`: all stored tokens.
    summary_slots: 0 drops evicted tokens; otherwise they are folded into this many summary slots per KV head, running
    means that attention sees beside the stored tokens (`sketchkv.summary.Summary`). Policies see no attention that
    falls on them. Their bytes are counted as "kv" (means) and "policy" (counts, projection).
    summary: how tokens are folded, the name of a kind ("hash"; "nearest", "sliding", "segments", "count_sketch":
    `sketchkv.summaries`) or a dict of "kind", "weight" ("count", "mass", "decay"), "second_order" (the spread of the merged
    keys raises their logit) and "protect": a score is raised by how badly the summary would stand for the token, so that
    what it would swallow stays, and what it says already goes first.
    bits: 8, 5, 4, 3 or 2 holds keys and values quantized from the moment they enter, 16 in float16, a pair is for keys and
    values; None, in the model's dtype. quantizer: "normal" in rotated coordinates, or "range" in groups of 32 channels
    (`sketchkv.quantize`). Attention turns one layer at a time back into numbers: that working memory is not part of
    `nbytes`.
    coarse_bits: precision that falls before a token is evicted (`sketchkv.tiers`): tokens enter in `bits`, in which the share
    `fine` of the slots is held; the others are coded anew in these, no more than those. demote: "age" or "importance", what
    it falls with.
    policy: an eviction policy, or one per layer (list); default `Sketch(**sketch)`, whose parameters (`width`, `depth`,
    `key`, `decay`, ...) may be given directly.

    Raises ValueError for a cap or `attend_topk` that leaves no room beside sinks and recent window, or a parameter out
    of range, and TypeError for an unknown parameter.
    """

    layer_type = SketchLayer
    recordable = True  # whether `sketchkv.graph` may record its steps

    def __init__(
        self, config, max_cache_size, *, num_sinks=4, recent_window=16, evict_every=16, attend_topk=None,
        summary_slots=0, summary="hash", bits=None, quantizer="normal", coarse_bits=None, fine=0.25, demote="importance",
        prefill_chunk=None, policy=None, **sketch,
    ):  # fmt: skip
        config = getattr(config, "config", config).get_text_config(decoder=True)
        caps = list(max_cache_size) if isinstance(max_cache_size, (list, tuple)) else [max_cache_size] * config.num_hidden_layers
        if len(caps) != config.num_hidden_layers:
            raise ValueError(f"max_cache_size must be one number, or {config.num_hidden_layers}, one per layer; got {len(caps)}")
        for name, value, least in (
            *(("max_cache_size", cap, 1) for cap in caps),
            ("num_sinks", num_sinks, 0),
            ("recent_window", recent_window, 0),
            ("evict_every", evict_every, 1),
            ("attend_topk", 1 if attend_topk is None else attend_topk, 1),
            ("summary_slots", summary_slots, 0),
            ("prefill_chunk", evict_every if prefill_chunk is None else prefill_chunk, evict_every),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}; got {value!r}")
        if min(caps) <= num_sinks + recent_window:
            raise ValueError(
                f"max_cache_size={min(caps)} leaves nothing to choose beside {num_sinks} sinks and a recent window "
                f"of {recent_window}: raise the cap above {num_sinks + recent_window} or lower num_sinks, recent_window"
            )
        if attend_topk is not None and attend_topk <= num_sinks + recent_window:
            raise ValueError(
                f"attend_topk={attend_topk} leaves nothing to choose beside {num_sinks} sinks and a recent window of "
                f"{recent_window}, which are always attended to: raise it above {num_sinks + recent_window}"
            )
        bits, coarse_bits = _pair(bits, quantizer), _pair(coarse_bits, quantizer)
        tiers = None if coarse_bits is None else Tiers(coarse_bits, fine, demote).checked(bits)
        summaries.settings(summary, summary_slots)
        if policy is not None and sketch:
            raise TypeError(f"give either policy= or sketch parameters, not both: {', '.join(sketch)}")
        policy = Sketch(**sketch) if policy is None else policy
        policies = policy if isinstance(policy, (list, tuple)) else [policy] * config.num_hidden_layers
        if len(policies) != config.num_hidden_layers or not all(isinstance(p, Policy) for p in policies):
            raise TypeError(f"policy must be a sketchkv Policy, or a list of {config.num_hidden_layers}, one per layer")
        if prefill_chunk is not None and tiers:
            raise ValueError("prefill_chunk can't be set with coarse_bits: slots of two precisions do not stretch")
        if prefill_chunk is not None and any(p.in_step for p in policies):
            raise ValueError('shared="layers" needs evictions at the same tokens in all layers: leave prefill_chunk out')
        if len(set(caps)) > 1 and any(p.in_step for p in policies):
            raise ValueError('shared="layers" needs one max_cache_size for all layers: layers exchange what they saw as they evict')
        self.max_cache_size = max_cache_size
        self.max_positions = getattr(config, "max_position_embeddings", None)
        # Without rotary embeddings, positions are rows of a table that ends.
        self.positions_end = getattr(config, "rope_parameters", None) is None
        self.is_open = False
        self.token_ids = None
        self.clock = None  # set while `sketchkv.graph` runs a step
        self.steps = None  # its recordings
        self.prefill_chunk = prefill_chunk
        settings = dict(
            num_sinks=num_sinks, recent_window=recent_window, evict_every=evict_every, attend_topk=attend_topk,
            summary_slots=summary_slots, summary=summary, bits=bits, quantizer=quantizer, tiers=tiers, prefill_chunk=prefill_chunk,
        )  # fmt: skip
        layers = [self.layer_type(copy.deepcopy(p), cap, **settings) for p, cap in zip(policies, caps)]
        for index, layer in enumerate(layers):
            layer.policy.layer = index
            layer.policy.peers = [peer.policy for peer in layers]
        super().__init__(layers=layers)

    @classmethod
    def compact(cls, config, max_cache_size, **changes):
        """The setting with the best quality for its bytes, chosen on the development documents for both embedded models
        and frozen: 5-bit keys and 4-bit values, exact decayed mean attention weighted by the norm of the value, and one
        summary slot for all that was evicted. `changes` replace single parameters."""
        settings = dict(bits=(5, 4), summary_slots=1, policy=AttentionMass(value_norm=True)) | changes
        return cls(config, max_cache_size, **settings)

    @property
    def seen_tokens(self):
        """Tokens that passed through the cache, padding included; the next token's position."""
        return self.layers[0].seen

    @property
    def max_chunk_size(self):
        """The most tokens that a forward pass may bring, None for any number: `score` and `generate` keep to it."""
        layer = self.layers[0]
        return layer.evict_every if layer.policy.in_step else None

    @property
    def evicted_tokens(self):
        """Tokens evicted so far, per sequence and KV head, summed over layers."""
        return sum(layer.evicted for layer in self.layers)

    def stored_tokens(self):
        """Occupied slots per layer: a list of int, the same for every sequence and KV head of a layer."""
        return [0 if layer.slots is None else layer.slots.used for layer in self.layers]

    def kept_positions(self, layer):
        """Positions of the tokens that layer `layer` holds: int64 `[batch, num_kv_heads, slots]`, -1 for an empty slot
        or padding; slots are in no particular order."""
        slots = self.layers[layer].slots
        if slots is None:
            raise RuntimeError("the cache is empty: no text has passed through it yet")
        return slots.positions.long()

    def nbytes(self):
        """Bytes of the tensors really held: {"kv", "sketch", "policy", "total"}.

        "kv": key and value slots, with the `evict_every` extra ones, the scales of quantized ones, their centre and rotation
        (one for all layers), and the summary's means.
        "sketch": counters, hash parameters, projections and the sketch's key per slot. "policy": positions and everything
        else that choosing needs.
        """
        held = {"kv": 0, "sketch": 0, "policy": 0}
        for layer in self.layers:
            if layer.slots is not None:
                held["kv"] += layer.slots.nbytes(*layer.slots.kv)
                for part in (layer.policy.nbytes(layer.slots), layer.summary.nbytes() if layer.summary else {}):
                    for kind, count in part.items():
                        held[kind] += count
                held["policy"] += 0 if layer.first is None else layer.first.nbytes
                held["kv"] += 0 if layer.slots.centre is None else layer.slots.centre.nbytes
        rotations = {id(layer.slots.rotation): layer.slots.rotation for layer in self.layers if layer.slots is not None}
        held["kv"] += sum(rotation.nbytes for rotation in rotations.values() if rotation is not None)
        return held | {"total": sum(held.values())}

    def check(self):
        """Raises ValueError if an importance was NaN: on CUDA the error may otherwise come some evictions late."""
        for layer in self.layers:
            layer.check()

    # Called by the model through `sketchkv.enable`

    def open(self, count, token_ids, position_ids):
        """A forward pass of `count` tokens begins."""
        end = self.seen_tokens + count
        if self.max_positions is not None and end > self.max_positions:
            # Left padding makes positions smaller than the number of tokens; looking at them is dear, so only here.
            last = end - 1 if position_ids is None or self.clock is not None else int(position_ids.max())
            if last >= self.max_positions and self.positions_end:
                raise ValueError(
                    f"the text reaches position {last}, but the model has only {self.max_positions} (0 to "
                    f"{self.max_positions - 1}): shorten the text or use a model with rotary positions"
                )
            if last - count < self.max_positions <= last:  # once in a text
                warnings.warn(f"position {last} lies beyond the {self.max_positions} that the model was made for", stacklevel=2)
        self.is_open = True
        self.token_ids = token_ids

    def close(self):
        self.is_open = False
        self.token_ids = None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.is_open:
            raise RuntimeError(
                "SketchCache needs a model whose attention knows it: call sketchkv.enable(model) once before using the cache"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
