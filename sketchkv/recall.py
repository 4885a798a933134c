"""A layer that evicts and does not forget: an index ranks every token that was seen, and those that a query
asks for come back from a store. What matters is told by the query itself (`sketchkv.index`), not by past
attention.
"""

import copy
from functools import partial
from typing import Any

import torch

from sketchkv.layer import BoundedLayer
from sketchkv.policies import Window
from sketchkv.ring import Near
from sketchkv.slots import EMPTY, Slots, gather

# While a prompt passes: queries of one attention product, and tokens read from the store at a time.
QUERIES, READ = 512, 256


class RecallLayer(BoundedLayer):
    """Slots as a cache of a store that holds every token.

    A decode step attends to sinks, recent window and the `index.top` other tokens that the index ranks
    highest for its queries. What of these is not in the slots is read from the store into the slots that were
    attended to longest ago; a slot is overwritten and nothing copied back, since every token was written to
    the store when it entered.

    A pass of several tokens reads the stored tokens once per 512 queries, block by block, merged by
    log-sum-exp: the whole of them is never in fast memory, one block is for a moment, decoded and not
    counted. Its queries attend to all tokens before them (`exact_prompts`), or each to what it would attend
    to as a step, for which the stored tokens are read once per block of the index. Afterwards slots hold
    sinks and the newest tokens. With `exact_prompts` a pass of one token is a step, be it of a prompt or not.

    Codec and index are apart: the codec codes a key around its own centre, the index around its block's, so
    that the signs of a key are stored twice. The keys of the index's open block lie with the store, a second time.

    index: a `sketchkv.index.KeyIndex` of the layer's own; its store is a template.
    summary: a `sketchkv.tail.Tail` of what a query leaves out, or None.
    Raises ValueError for a cap or a window that is too small.
    """

    selective = True  # slots may be left out of attention
    capacity = property(lambda self: self.max_cache_size)

    def __init__(self, max_cache_size, settings, index, summary=None):
        super().__init__(Window(), max_cache_size, settings, summary)
        self.index, self.store, self.exact_prompts = index, copy.copy(index.store), index.exact_prompts
        self.moved = dict.fromkeys(("written", "fetched", "streamed", "chosen", "missing"), 0)
        least = self.num_sinks + self.recent_window + index.top
        if max_cache_size < least:
            raise ValueError(
                f"max_cache_size={max_cache_size} can't hold {self.num_sinks} sinks, a recent window of "
                f"{self.recent_window} and the top {index.top} of the index: raise it to {least} or lower one"
            )
        if self.recent_window < index.block:
            raise ValueError(
                f"recent_window={self.recent_window} is less than the index's block of {index.block} tokens, "
                f"which is ranked when it is full: raise recent_window to {index.block} or lower "
                "KeyIndex(block=...)"
            )

    @torch.inference_mode(False)  # tensors that may be written to inside of it and outside
    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        slots = self.slots
        _holds(self, slots)
        slots.add("asked", torch.int32)  # tokens seen when a query last attended to it
        parts = {name: slots.arrays[name] for group in slots.parts.values() for name in group}
        self.store.open(parts, slots.shape, slots.device.type == "cuda")
        self.index.shape = None  # what it held elsewhere, or for another batch or dtype, is not taken
        self.index.reset()

    def reset(self):
        super().reset()
        self.index.reset()
        if self.slots is not None:
            self.store.clear()
        self.moved = dict.fromkeys(self.moved, 0)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.index.reorder(beam_idx)
        if self.slots is not None:
            self.store.reorder(beam_idx)

    def nbytes(self):
        return super().nbytes() | {
            "index": self.index.nbytes() + self.store.beside(),
            "host": self.store.nbytes() + (self.index.pending.nbytes if self.index.shape else 0),
        }

    def shared(self):
        own = {id(tensor): ("index", tensor.nbytes) for tensor in self.index.shared()}
        return own | super().shared()  # a rotation that the codec counts is the same

    @property
    def row(self):
        """Bytes that a step writes outside of fast memory, for one KV head: a record, and a key of the open block."""
        return self.store.record + self.index.pending[0, 0, 0].nbytes

    def advance(self):
        self.seen += 1
        self.index.seen = self.store.tokens = self.seen
        self.moved["written"] += self.slots.shape[0] * self.slots.shape[1] * self.row
        self.evicted = self.seen - self.slots.used

    def attend(self, query, key, value, tokens, form):
        whole = getattr(self.ops, "recalled", None) if query.shape[2] == 1 else None
        output = whole and whole(self, query, key, value, tokens, form)
        if output is None:
            output = self._blocks(query, key, value, tokens, form)
        self.evicted, self.waiting = self.seen - self.slots.used, False
        return output

    def _blocks(self, query, key, value, tokens, form):
        slots, codec, total, outputs, start = self.slots, self.slots.codec, query.shape[2], [], 0
        turned = codec.turn(query, key, value)
        while start < total:
            most = QUERIES if self.exact_prompts else self.index.block - self.seen % self.index.block
            count = min(most, total - start, due := tokens.until(codec, self.seen))
            block, now = slice(start, start + count), tokens.part(slice(start, start + count))
            new, coming, values = (x[:, :, block] for x in turned)
            self._enter(key[:, :, block], coming, values, now, alone=total == 1)
            given = query[:, :, block], new, now, form
            outputs.append(recall(self, *given) if total == 1 else stream(self, *given))
            if count == due:
                settle(self, now)
            start += count
        if total > 1 and self.seen > slots.capacity:
            refill(self, tokens)
        return codec.turn_back(outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2))

    # New tokens

    def _enter(self, raw, key, value, tokens, alone):
        """New tokens go to the store, to the index and, if there is room or one comes `alone`, to slots."""
        slots, count = self.slots, key.shape[2]
        coded = slots.coded(key, value, tokens.positions, tokens.first)
        self.write(self.seen, coded)
        if self.summary:
            at = tokens.positions[:, None]
            at = at.masked_fill(at < tokens.first + self.num_sinks, EMPTY)
            self.summary.take(key, value, at, passing=not (alone or self.exact_prompts))
        self.index.add(raw, tokens.positions if tokens.padded else None)
        held = 1 if alone else min(count, self.index.seen - self.index.coded)
        self.moved["written"] += self.index.pending[:, :, :held].nbytes
        at = torch.arange(slots.used, slots.used + count, device=slots.device)
        if slots.room >= count:
            slots.used += count
        elif alone:
            at = self.idle(self.always(tokens.first))[..., :1]
        self.seen += count
        if slots.used == self.seen or alone:
            self.place((*self.all(), at), coded, tokens.positions[:, None])

    def write(self, start, coded):
        self.moved["written"] += self.store.write(start, coded)

    def read(self, rows, heads, tokens, why):
        arrays = self.store.read(rows, heads, tokens)
        self.moved[why] += sum(array.nbytes for array in arrays.values())
        return arrays

    def all(self) -> tuple[Any, Any]:
        """Every row and head, to be broadcast with slots."""
        (batch, heads), device = self.slots.shape, self.slots.device
        return torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]

    def place(self, where, coded, positions):
        """Puts tokens into the slots `where`, a tuple of (row, head, slot)."""
        for name, array in coded.items():
            self.slots.arrays[name][where] = array.to(self.slots.arrays[name].dtype)
        self.slots.positions[where] = positions.int()
        self.slots.arrays["asked"][where] = 0

    def always(self, first):
        """Which slots every query attends to: sinks and recent window, bool `[batch, num_kv_heads, used]`."""
        at = self.slots["positions"]
        return (at != EMPTY) & ((at >= self.seen - self.recent_window) | (at < first + self.num_sinks))

    def idle(self, needed):
        """All slots: empty ones first, then by when they were last attended to, the needed ones last."""
        asked, at = self.slots["asked"].long(), self.slots["positions"]
        age = ((asked << 32) + at).masked_fill(at == EMPTY, -1)
        return age.masked_fill(needed, torch.iinfo(torch.int64).max).argsort(-1)

    # Attention

    def choose(self, query, logits, tokens, form, end):
        """Tokens that the index ranks highest, `[batch, num_kv_heads, n, top]`, -1 where there are fewer;
        `logits` are those of the tokens that a query attends to anyway."""
        first = tokens.first if isinstance(tokens.first, int) else tokens.first[:, :, 0]
        resident = logits.logsumexp(-1).flatten(1, 2)
        return self.index.choose(query, form.scaling, first + self.num_sinks, end, resident)

    def real(self, tokens):
        """Tokens seen up to each of n new ones, padding left out: int32 `[batch or 1, 1, n]`."""
        positions = tokens.positions[:, None]
        return (positions - tokens.first + 1).masked_fill(positions < 0, 0)

    def vectors(self, token):
        """Keys and values of these tokens, decoded, of all heads."""
        slots, arrays = self.slots, self.read(*self.all(), token, "streamed")
        parts = ({name: arrays[name] for name in slots.parts[kind]} for kind in ("keys", "values"))
        return [slots.codec.decode(kind, each) for kind, each in zip(("keys", "values"), parts, strict=True)]

    def logits(self, query, keys, form):
        """Float32 or float64 `[batch, num_kv_heads, group, n, tokens]`."""
        query = wide(query).unflatten(1, (self.slots.shape[1], -1)) * form.scaling
        return form.capped(query @ wide(keys)[:, :, None].transpose(-1, -2))


def recall(layer, query, turned, tokens, form):
    """Attention of one new token: over slots, once they hold all that the index asks for. Parameters as of
    `BoundedLayer.attend`; turned: the query as the codec multiplies it."""
    slots, (batch, heads), used = layer.slots, layer.slots.shape, layer.slots.used
    needed = layer.always(tokens.first)
    logits = layer.logits(turned, slots["keys"], form).masked_fill(~needed[:, :, None, None], -torch.inf)
    end = torch.tensor([[layer.seen - layer.recent_window]], device=slots.device)
    chosen = layer.choose(query, logits, tokens, form, end)[:, :, 0]
    at, order = slots["positions"].sort(-1)
    place = torch.searchsorted(at, chosen.int()).clamp(max=used - 1)
    asked = chosen >= 0
    here = (at.gather(-1, place) == chosen) & asked
    slot = order.gather(-1, place).where(here, used)  # a column that is dropped
    needed |= needed.new_zeros(batch, heads, used + 1).scatter_(-1, slot, True)[..., :used]
    missing = asked & ~here
    row, head, which = missing.nonzero(as_tuple=True)
    layer.moved["chosen"] += int(asked.sum())
    layer.moved["missing"] += len(row)
    if len(row):
        slot = layer.idle(needed)[row, head, missing.cumsum(-1)[row, head, which] - 1]
        token = chosen[row, head, which]
        layer.place((row, head, slot), layer.read(row, head, token, "fetched"), token)
        needed[row, head, slot] = True
    if layer.summary:
        layer.summary.stand_for(layer.real(tokens)[:, :, 0] - needed.sum(-1))
    slots["unattended"].copy_(~needed)
    slots["asked"].masked_fill_(needed, layer.seen)
    return layer.ops.attend(layer, turned, tokens, form)


def _holds(layer, slots):
    """Raises ValueError where the slots do not hold what the codec needs."""
    if slots.codec.settles_after > slots.capacity:
        least = slots.codec.settles_after
        raise ValueError(f"max_cache_size={slots.capacity} is too small for the codec: raise it to {least}")
    ring = getattr(slots.codec, "ring", None)
    if ring and ring.newest > layer.recent_window:  # a token that is held finely must be in a slot
        raise ValueError(
            f"recent_window={layer.recent_window} is less than the newest {ring.newest} tokens that the codec holds "
            f"finely: raise recent_window to {ring.newest} or lower fine_window (`newest` of the codec)"
        )


def settle(layer, tokens):
    """The codec looks at the first tokens of some rows' texts: they have other codes now, in the store and in slots."""
    slots, codec, (begin, rows) = layer.slots, layer.slots.codec, tokens.settling(layer)
    token = torch.arange(begin, layer.seen, device=slots.device)
    first = Slots(slots.shape, len(token), slots.widths, codec)
    first.arrays |= layer.read(*layer.all(), token, "streamed")
    first.positions.copy_(layer.index.positions(layer.seen)[:, :, token])
    first.used = len(token)
    codec.settle(first, begin + layer.num_sinks, rows)
    layer.write(begin, {name: first.arrays[name] for name in slots.kv})
    at = slots["positions"] - begin
    here = ((at >= 0) & (at < len(token)))[..., None]
    for name in slots.kv:
        held = slots.arrays[name][:, :, : slots.used]
        held.copy_(gather(first.arrays[name], at.clamp(0, len(token) - 1).long()).where(here, held))


def refill(layer, tokens):
    """Slots hold sinks and the newest tokens, after a pass that had no room for all of its own."""
    slots, first = layer.slots, torch.as_tensor(tokens.first, device=layer.slots.device).view(-1, 1)
    oldest = layer.seen - slots.capacity + layer.num_sinks
    newest = torch.arange(oldest, layer.seen, device=slots.device)[None]
    newest = newest.where(newest >= first + layer.num_sinks, EMPTY)
    sinks = first + torch.arange(layer.num_sinks, device=slots.device)
    token = torch.cat([sinks.expand(len(newest), -1), newest], -1)
    token = token.where((first >= 0) & (token < layer.seen), EMPTY).expand(slots.shape[0], -1)[:, None]
    slots.used = slots.capacity
    coded = layer.read(*layer.all(), token.clamp(min=0).long(), "streamed")
    layer.place((*layer.all(), torch.arange(slots.used, device=slots.device)), coded, token)


def stream(layer, query, turned, tokens, form):
    """Attention of n new tokens over the store, part by part, with a running maximum as in FlashAttention (Dao et al. 2022,
    arXiv 2205.14135)."""
    shape = (*layer.slots.shape, query.shape[1] // layer.slots.shape[1], query.shape[2], 1)
    most = turned.new_full(shape, torch.finfo(torch.float32).min, dtype=wide(turned[:0]).dtype)
    total = output = torch.zeros_like(most)
    for logits, take in parts(layer, query, turned, tokens, form):
        higher = torch.maximum(most, logits.amax(-1, keepdim=True))
        weights, kept = (logits - higher).exp_(), (most - higher).exp_()
        most, total = higher, total * kept + weights.sum(-1, keepdim=True)
        output = output * kept + take(weights)
    return (output / total).flatten(1, 2).to(query.dtype)


def parts(layer, query, turned, tokens, form):
    """What n new tokens attend to, of the store block by block: yields (logits `[batch, num_kv_heads, group, n, m]`, what gives
    the values that their weights take)."""
    (batch, heads), count, device = layer.slots.shape, query.shape[2], query.device
    number = torch.arange(layer.seen - count, layer.seen, device=device)[:, None]
    first = torch.as_tensor(tokens.first, device=device).view(-1, 1, 1, 1)
    allowed = None if layer.exact_prompts else allowed_to(layer, query, turned, tokens, form, number, first)
    if form.sinks is not None:  # a learned logit of the model's, which gives nothing
        yield form.sink_column(batch, heads, count).view(batch, heads, -1, count, 1), torch.zeros_like
    ring = getattr(layer.slots.codec, "ring", None)
    fine = Fine(layer, ring, tokens, first) if ring else None
    for start in range(0, layer.seen, READ):
        token = torch.arange(start, min(start + READ, layer.seen), device=device)
        keys, values = layer.vectors(token)
        visible = (token <= number) & (token >= first)
        if allowed is not None:
            visible = visible & allowed[..., start : start + READ]
        logits = layer.logits(turned, keys, form)
        near = fine.near(token) if fine and fine.touches(start) else None
        if near:
            logits = torch.where(near.seen, layer.logits(turned, keys + near.keys, form), logits)
        logits.masked_fill_(~visible[:, :, None], torch.finfo(torch.float32).min)
        yield logits, partial(taken, values=values, near=near)
    if layer.summary and allowed is not None:
        token = torch.arange(layer.seen, device=device)
        attended = (allowed & (token <= number) & (token >= first)).sum(-1)
        logits, values = layer.summary.passing(turned, layer.real(tokens) - attended, form)
        yield logits, values.mul


def taken(weights, values, near):
    """What the weights `[batch, num_kv_heads, group, n, m]` of a block take from its values `[batch, num_kv_heads, m, width]`."""
    output = weights @ wide(values)[:, :, None]
    return output + (weights * near.seen) @ wide(near.values)[:, :, None] if near else output


def wide(x):
    """In float32, unless it is wider."""
    return x if x.dtype == torch.float64 else x.float()


class Fine:
    """What the codes lack of the tokens near to those of a pass, while the store streams by."""

    def __init__(self, layer, ring, tokens, first):
        self.layer, self.ring, self.tokens, self.sinks = layer, ring, tokens, first + ring.sinks
        self.start = layer.seen - tokens.positions.shape[1]
        self.span, self.rests = ring.before(layer.slots.dtype)

    def touches(self, start):
        """Whether tokens from number `start` on, `READ` of them, may be near to one of the pass."""
        oldest = self.start - self.ring.newest
        return self.tokens.padded or start < self.ring.sinks or start + READ > oldest

    def near(self, token):
        """`sketchkv.ring.Near` of the tokens of these numbers (int64 `[n]`), each of which is where it is."""
        layer, ring, own = self.layer, self.ring, token - self.start
        positions = layer.index.positions(layer.seen)[:, :, token]
        row = ring.row(positions, self.span)
        passing = (own >= 0) & (positions >= 0) & (self.rests["keys"].shape[2] > ring.rows)
        present = passing | (row < ring.rows)
        row = torch.where(passing, ring.rows + own, row).where(present, 0).expand(*layer.slots.shape, -1)
        keys, values = (
            gather(self.rests[name], row).masked_fill(~present[..., None], 0) for name in ("keys", "values")
        )
        queries = self.tokens.positions
        return Near(token, keys, values, present, positions, queries, ring.newest, self.sinks)


def allowed_to(layer, query, turned, tokens, form, number, first):
    """What each of n new tokens would attend to alone: bool `[batch, num_kv_heads, n, tokens seen]`."""
    device, oldest = query.device, max(0, layer.seen - len(number) + 1 - layer.recent_window)
    newest = torch.arange(oldest, layer.seen)
    sinks = first.view(-1, 1, 1) + torch.arange(layer.num_sinks, device=device)
    near = torch.cat([sinks, newest.to(device).expand(len(first), 1, -1)], -1)
    keys, _ = layer.vectors(near.clamp(0, layer.seen - 1))
    recent = (near > number[None] - layer.recent_window) & (near >= first[..., 0] + layer.num_sinks)
    recent[..., : layer.num_sinks] = True
    visible = recent & (near <= number[None]) & (near >= 0)
    logits = layer.logits(turned, keys, form).masked_fill_(~visible[:, None, None], -torch.inf)
    end = number.view(1, -1) + 1 - layer.recent_window
    chosen = layer.choose(query, logits, tokens, form, end)
    marked = torch.zeros(*chosen.shape[:3], layer.seen + 1, dtype=torch.bool, device=device)
    marked.scatter_(-1, chosen.where(chosen >= 0, layer.seen), True)
    token = torch.arange(layer.seen, device=device)
    return marked[..., :-1] | (token > number - layer.recent_window) | (token < first + layer.num_sinks)
