"""Forward passes of a bounded cache: what one brings, and whether the one before it went well."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sketchkv.checks import MASK, Length, begins, checked_inputs, checked_mask, digest
from sketchkv.slots import EMPTY, MOST_TOKENS
from sketchkv.support import layer_windows

BROKEN = (
    "the pass before this one broke off in the middle, so that layers hold different tokens: "
    "call cache.reset() and begin the text again, or use a new cache"
)
FOLD = 64  # passes whose ids are held until the digest takes them in


class Tokens(NamedTuple):
    """What one forward pass brings, worked out once for all layers."""

    ids: Any  # int64 [batch, n], or None where the model was called with embeddings
    positions: Any  # int32 [batch, n], or [1, n] if all rows are alike; -1 for padding
    first: Any = 0  # position of each row's first real token, int32 [batch, 1, 1], or 0 for all
    padded: bool = False  # whether a row has padding, in this pass or before
    begins: Any = (0,)  # the different numbers in `first`, where the host knows them
    clock: Any = None  # int32 [1], the one new token's position, in a step recorded to run at others

    def part(self, block):
        """The tokens of a slice."""
        ids = None if self.ids is None else self.ids[:, block]
        return self._replace(ids=ids, positions=self.positions[:, block])

    def until(self, codec, seen):
        """Tokens until `codec` is due to look at the first ones of a row's text; `MOST_TOKENS` where it has looked at all."""
        after = codec.settles_after
        due = [begin + after - seen for begin in self.begins if after and 0 <= begin and begin + after > seen]
        return min(due, default=MOST_TOKENS)

    def settling(self, layer):
        """(where the texts begin that a codec is due to look at, which rows those are: bool `[batch, 1, 1]`, or None: all)."""
        begin = layer.seen - layer.slots.codec.settles_after
        return begin, self.first == begin if self.padded else None

    def end(self, layer):
        """Tokens seen with these: an int, or int32 `[1]` on the device in a recorded step."""
        return layer.seen if self.clock is None else self.clock + 1


class Passes:
    """The forward passes of one cache. A pass is announced before it begins, by the hooks of `sketchkv.enable` or by whoever
    runs it, and is over when it has gone through every layer; one that broke off is found out when the next begins.

    config: of the decoder.
    """

    def __init__(self, config):
        self.length, self.windows = Length(config), layer_windows(config)
        self.model: Any = None  # configuration of the model that was announced last, and of its decoder
        self.text: Any = None
        self.layers: Sequence[Any] = ()
        self.forget()

    def forget(self):
        """Ready for another text."""
        self.tokens: Any = None  # of the pass under way
        self.owners = []  # whose pass is under way: (id, tokens seen before), the innermost last
        self.first = None  # once a row has padding: position of each row's first real token, -1 before it, int32 [batch]
        self.begins: Any = (0,)  # these numbers, on the host
        self.told: Any = []  # ids of passes that the digest does not know yet; None: some were not told
        self._digest: Any = 0
        self.misfit = None  # whether a mask hid stored tokens, bool [] on a device where looking waits

    seen = property(lambda self: self.layers[0].seen)

    def begin(self, inputs, token_ids=None, attention_mask=None, position_ids=None, owner=None):
        """A forward pass brings new tokens: what they are is worked out here, once for all layers.

        inputs: token ids `[batch, n]` or embeddings `[batch, n, width]`.
        token_ids: int64 `[batch, n]` or None.
        attention_mask: `[batch, tokens so far]`, 0 for padding on the left, or None.
        position_ids: `[batch, n]` or None.
        owner: whose pass it is; another may begin inside of it, and brings nothing new.
        Raises ValueError for a mask that can't be, RuntimeError after a pass that broke off.
        """
        if self._opens(owner):
            self.tokens = None
            checked_inputs(inputs, inputs is token_ids, self.seen)
            self.tokens = self._tokens(inputs, token_ids, attention_mask, position_ids)
        self.owners.append((id(owner), self.seen))

    @contextmanager
    def announced(self, tokens, owner):
        """A pass of `owner` that brings `tokens`, ready-made `Tokens` or new token ids `[batch, n]`."""
        if not isinstance(tokens, Tokens):
            self.begin(tokens, tokens, owner=owner)
        else:
            if self._opens(owner):
                count = tokens.positions.shape[1]
                self.length.check(self.seen + count, count, None)
                self.tokens = tokens
            self.owners.append((id(owner), self.seen))
        depth = len(self.owners)
        try:
            yield
        except BaseException:
            if not self.torn():  # no layer has taken anything: the step may be made again, by others, too
                del self.owners[depth - 1 :]
            raise
        self.end(owner)

    def torn(self):
        """Whether a pass broke off when some layers had taken its tokens."""
        start = self.seen
        held = any(layer.seen != start or layer.waiting for layer in self.layers)
        return held or any(before != start for _, before in self.owners)

    def _opens(self, owner):
        """Whether a pass begins, not one within another's. Raises RuntimeError after one that broke off in the middle."""
        if self.torn():
            raise RuntimeError(BROKEN)
        if id(owner) in [name for name, _ in self.owners]:
            self.owners = []  # the pass before broke off, but no layer had taken anything: nothing is lost
        return not self.owners

    def end(self, owner=None):
        """The pass is through. Raises RuntimeError if a layer was left out: its attention would have been wrong."""
        start = self.owners.pop()[1]
        if any(layer.waiting or layer.seen == start for layer in self.layers):
            raise RuntimeError(
                f"attention in this {type(owner).__name__} does not take the keys that its cache returns, so that it can't be "
                "bounded: use another cache for this model"
            )
        if not self.owners:
            if self.tokens.ids is None:
                self.told = None
            elif self.told is not None:
                self.told.append(self.tokens.ids.clone())  # the caller may write its next token there
                if len(self.told) == FOLD:
                    self.digest()
            self.tokens = None

    def _tokens(self, inputs, token_ids, attention_mask, position_ids):
        batch, count = inputs.shape[:2]
        start, end = self.seen, self.seen + count
        if attention_mask is not None:
            attention_mask = checked_mask(attention_mask, batch, end).to(inputs.device)
        self.length.check(end, count, position_ids)
        positions = torch.arange(start, end, dtype=torch.int32, device=inputs.device)[None]
        if attention_mask is not None:
            self.first, wrong = begins(attention_mask, self.first, start)
            if wrong is not None:
                self.misfit = wrong if self.misfit is None else self.misfit | wrong
            if self.first is not None:
                positions = positions.expand(batch, count).masked_fill(~attention_mask[:, -count:], EMPTY)
        elif self.first is not None:
            self.first = torch.where(self.first < 0, start, self.first)
            positions = positions.expand(batch, count)
        if self.first is None:
            return Tokens(token_ids, positions)
        if -1 in self.begins or not any(self.begins):  # where they may be new: looking waits for the device
            self.begins = tuple(set(self.first.tolist()))
        return Tokens(token_ids, positions, self.first[:, None, None], True, self.begins)

    def digest(self):
        """Of the ids that have passed (`sketchkv.checks.digest`), int64 `[batch]`, or 0; None if some were not told."""
        if self.told:
            self._digest, self.told = digest(torch.cat(self.told, 1), self._digest), []
        return None if self.told is None else self._digest

    def check(self):
        """Raises ValueError if a mask hid stored tokens."""
        if self.misfit is not None and self.misfit:
            raise ValueError(MASK)

    def reorder(self, index):
        """Row i becomes what row `index[i]` was (beam search)."""
        if self.first is not None:
            self.first = self.first.index_select(0, index.to(self.first.device))
        held = self.digest()
        if isinstance(held, torch.Tensor):
            self._digest = held.index_select(0, index.to(held.device))
