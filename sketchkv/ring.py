"""Sinks and newest tokens, finer than their codes: they take most of the attention, and are few."""

import dataclasses
from functools import cached_property
from typing import Any

import torch

from sketchkv.logits import products
from sketchkv.slots import gather


@dataclasses.dataclass
class Near:
    """What attention adds to what it reads of some slots, for n queries.

    at: the slots, int64 `[batch, num_kv_heads, m]`.
    keys, values: to be added to what is decoded there, `[batch, num_kv_heads, m, width]`.
    present: whether there is such a slot, bool `[batch, num_kv_heads, m]`.
    positions: of these tokens, int32 `[batch, num_kv_heads, m]`.
    queries: positions of the queries, int32 `[batch or 1, n]`.
    newest: how many tokens before it are near to a query.
    sinks: position after the last sink, int32 `[batch, 1, 1, 1]`.
    """

    at: Any
    keys: Any
    values: Any
    present: Any
    positions: Any
    queries: Any
    newest: int
    sinks: Any

    @cached_property
    def seen(self):
        """Which of these tokens are near to which query, bool `[batch, num_kv_heads, 1, n, m]`."""
        key, query = self.positions[:, :, None], self.queries[:, None, :, None]
        return (self.present[:, :, None] & ((key > query - self.newest) | (key < self.sinks)))[:, :, None]

    def part(self, part, used):
        """The same for some of the queries of a pass (slice), when so many slots are `used`: no token after them is there."""
        own = self.at.shape[-1] - self.queries.shape[1]
        first = own + max(0, part.start - self.newest)

        def cut(x, dim=-1):
            return torch.cat([x.narrow(dim, 0, own), x.narrow(dim, first, own + part.stop - first)], dim)

        at, present, positions = cut(self.at), cut(self.present), cut(self.positions)
        keys, values = cut(self.keys, 2), cut(self.values, 2)
        at, present = at.clamp(max=used - 1), present & (at < used)
        return Near(at, keys, values, present, positions, self.queries[:, part], self.newest, self.sinks)

    def add_logits(self, logits, query, scaling):
        """Adds in place to `logits` `[batch, num_kv_heads, group, n, used]` what `query` (`[batch * num_kv_heads, group * n,
        width]`) finds in these keys."""
        more = products(query, self.keys.flatten(0, 1), scaling).view(*logits.shape[:-1], -1)
        more = more.masked_fill(~self.seen, 0)
        logits.scatter_add_(-1, self.at[:, :, None, None].expand_as(more), more)

    def output(self, attention):
        """What `attention` (as the logits) takes from these values, `[batch * num_kv_heads, group * n, width]`."""
        share = attention.gather(-1, self.at[:, :, None, None].expand(*attention.shape[:-1], -1))
        share = share.masked_fill(~self.seen, 0).flatten(2, 3).flatten(0, 1)
        return torch.bmm(share.to(self.values.dtype), self.values.flatten(0, 1))


class Ring:
    """What rounding took from each sink and from each of the newest tokens, coded in its turn: read together, two codes of few
    bits are as fine as one of many (successive refinement, Equitz and Cover 1991).

    Slots know nothing of it. A token has a row of its own here until `newest` others have come, and is then read from its code
    alone: nothing moves and nothing is coded twice. Policies and the summary read codes.

    newest, sinks: how many tokens have a row, at least 1 and 0.
    """

    def __init__(self, newest, sinks):
        self.newest, self.sinks, self.rows = newest, sinks, newest + sinks
        self.parts, self.coders = {}, {}  # arrays [batch, num_kv_heads, rows, ...] of keys and values
        self.span: Any = None
        self.passing = (
            None  # of several tokens that attention has not come for yet: (span before, {name: vectors})
        )

    def allocate(self, name, shape, coder, coded):
        """Rows for "keys" or "values"; coded: what `coder` makes of one vector."""
        if name in self.parts:  # wider slots for a prompt share them
            return
        self.coders[name] = coder
        self.parts[name] = [like.new_zeros(*shape, self.rows, like.shape[-1]) for like in coded]
        # Position of the first real token of a row, and of the token to come.
        self.span = torch.zeros(shape[0], 2, dtype=torch.int32, device=coded[0].device)

    def row(self, positions, span):
        """Where tokens are, int64 like `positions` `[batch, any, n]`; `rows` for one that has no row."""
        first, end = span[:, None, None].unbind(-1)
        sink = positions < first + self.sinks
        held = (positions >= 0) & (positions < end) & (sink | (positions >= end - self.newest))
        row = torch.where(sink, positions - first, self.sinks + positions % self.newest)
        return row.where(held, self.rows).long()

    def keep(self, rests, positions, first):
        """Takes note of what the codes of n new tokens lack.

        rests: {"keys", "values": `[batch, num_kv_heads, n, width]`}.
        positions: int32 `[batch, n]`, or `[1, n]` if all sequences have the same.
        first: position of each sequence's first real token, int32 `[batch, 1, 1]`, or 0.
        """
        coded = {name: self.coders[name].encode(rest) for name, rest in rests.items()}
        count, self.passing = positions.shape[1], None
        if count > 1:  # what leaves the ring now is near to the first of them
            before = {
                name: torch.cat([self.read(name, rest.dtype), self._decode(name, coded[name], rest.dtype)], 2)
                for name, rest in rests.items()
            }
            self.passing = self.span.clone(), before
        first = first.view(-1) if isinstance(first, torch.Tensor) else first
        self.span[:, 0], self.span[:, 1] = first, positions[:, -1] + 1
        positions = positions.expand(len(self.span), count)
        if count > self.newest:
            index = self._held(count)
            positions = positions.gather(1, index)
            heads = index[:, None].expand(-1, next(iter(rests.values())).shape[1], -1)
            coded = {name: [gather(array, heads) for array in arrays] for name, arrays in coded.items()}
        row = self.row(positions[:, None], self.span)[..., None]
        for name, arrays in coded.items():
            for held, new in zip(self.parts[name], arrays, strict=True):
                if count == 1:  # padding comes before all that is held: it may overwrite any row
                    held.scatter_(2, row.clamp(max=self.rows - 1).expand_as(new), new)
                else:
                    self._fill(held, row.expand_as(new), new)

    def _held(self, count):
        """Which of the last `count` tokens to look at, int64 `[batch, rows]`: sinks, where they are, and the newest."""
        numbers = torch.arange(-self.rows, 0, device=self.span.device) + count
        index = numbers.expand(len(self.span), -1).clone()
        first, end = self.span[:, :1], self.span[:, 1:]
        index[:, : self.sinks] = first - end + count + numbers[: self.sinks] - numbers[0]
        return index.clamp(0, count - 1)

    @staticmethod
    def _fill(held, row, new):
        """Those without a row go to one that is dropped."""
        wide = torch.cat([held, held[:, :, :1]], 2).scatter_(2, row, new)
        held.copy_(wide[:, :, :-1])

    def read(self, name, dtype):
        """What all rows hold: `[batch, num_kv_heads, rows, width]`."""
        return self._decode(name, self.parts[name], dtype)

    def _decode(self, name, arrays, dtype):
        return self.coders[name].decode(*arrays, dtype)

    def before(self, dtype):
        """What a pass of several tokens finds: the span before it, and {name: what all rows held then, and what its own tokens
        lack}; if one token came, span and rows as they are."""
        if self.passing is None:
            return self.span, {name: self.read(name, dtype) for name in self.parts}
        passing, self.passing = self.passing, None
        return passing

    def near(self, slots, positions):
        """`Near`, for the queries at `positions` (int32 `[batch or 1, n]`), those of the tokens stored last."""
        stored, span = slots["positions"], self.span
        at, present = self.places(stored, span)
        rests = {name: self.read(name, slots.dtype) for name in self.parts}
        if self.passing:  # newest tokens as they were before, and the tokens of the pass, in the last slots
            (before, held), self.passing, kept = self.passing, None, slice(self.sinks)
            old, was = (x[..., self.sinks :] for x in self.places(stored, before))
            own = torch.arange(stored.shape[2] - positions.shape[1], stored.shape[2], device=at.device)
            real = (stored[..., own] >= 0) & (stored[..., own] >= span[:, :1, None] + self.sinks)
            at = torch.cat([at[..., kept], old, own.expand(*at.shape[:2], -1)], -1)
            present = torch.cat([present[..., kept], was, real], -1)
            rests = {
                name: torch.cat([rest[:, :, kept], held[name][:, :, self.sinks :]], 2)
                for name, rest in rests.items()
            }
        # A number that is not finite may stand in a row whose token was evicted.
        keys, values = (rests[name].masked_fill(~present[..., None], 0) for name in ("keys", "values"))
        sinks = self.span[:, 0, None, None, None] + self.sinks
        return Near(at, keys, values, present, stored.gather(-1, at), positions, self.newest, sinks)

    def places(self, stored, span):
        """The slot of each row, int64 `[batch, num_kv_heads, rows]`, of `stored` positions; whether there is one, bool."""
        row = self.row(stored, span)
        at = torch.full((*row.shape[:2], self.rows + 1), -1, dtype=torch.int64, device=row.device)
        at.scatter_(-1, row, torch.arange(row.shape[-1], device=row.device).expand_as(row))
        at = at[..., :-1]
        return at.clamp(min=0), at >= 0

    def added(self, slots, keys):
        """The stored keys with what their codes lack."""
        at, present = self.places(slots["positions"], self.span)
        rest = self.read("keys", keys.dtype).masked_fill(~present[..., None], 0)
        return keys.scatter_add(2, at[..., None].expand_as(rest), rest)

    def renew(self, slots, rest, rows=True):
        """The stored keys of `rows` (bool `[batch, 1, 1, 1]`, True: all) have new codes, which lack `rest`."""
        at, present = self.places(slots["positions"], self.span)
        for held, new in zip(self.parts["keys"], self.coders["keys"].encode(gather(rest, at)), strict=True):
            held.copy_(new.where(present[..., None] & rows, held))

    def tensors(self):
        """All state, the batch first."""
        return [array for arrays in self.parts.values() for array in arrays] + [self.span]
