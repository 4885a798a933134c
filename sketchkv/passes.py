"""Forward passes of a bounded cache: what one brings, and whether the one before it went well."""

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from sketchkv.slots import EMPTY

MOST_TOKENS = 2**31 - 1  # positions are int32
BROKEN = (
    "the pass before this one broke off in the middle, so that layers hold different tokens: "
    "call cache.reset() and begin the text again, or use a new cache"
)
MASK = (
    "attention_mask must be 0 for padding on the left of a row and 1 from its first token on: "
    "pad on the left, and hide no token that the cache has seen"
)


class Tokens(NamedTuple):
    """What one forward pass brings, worked out once for all layers."""

    ids: Any  # int64 [batch, n], or None where the model was called with embeddings
    positions: Any  # int32 [batch, n], or [1, n] if all rows are alike; -1 for padding
    first: Any = 0  # position of each row's first real token, int32 [batch, 1, 1], or 0 for all
    padded: bool = False  # whether a row has padding, in this pass or before
    clock: Any = (
        None  # int32 [1], the one new token's position, in a step that is recorded to run at other positions
    )

    def part(self, block):
        """The tokens of a slice."""
        ids = None if self.ids is None else self.ids[:, block]
        return self._replace(ids=ids, positions=self.positions[:, block])

    def end(self, layer):
        """Tokens seen with these: an int, or int32 `[1]` on the device in a recorded step."""
        return layer.seen if self.clock is None else self.clock + 1


def _checked_mask(mask, batch, tokens):
    """`mask` as bool, if it is one of `tokens` tokens, 0 or 1; values are looked at on a CPU only."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        given = (
            f"a mask of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        )
        raise ValueError(
            f"SketchCache takes a 2-D attention_mask [batch, tokens so far] or none, got {given}: 4-D masks cannot say "
            "which evicted tokens they mean"
        )
    if mask.shape != (batch, tokens):
        raise ValueError(
            f"attention_mask must be [batch, tokens so far], here {[batch, tokens]}, got {list(mask.shape)}: "
            "the cache may hold another text (cache.reset() forgets it)"
        )
    ones = mask == 1
    if mask.device.type == "cpu" and not bool(ones.all()) and not bool((ones | (mask == 0)).all()):
        raise ValueError(MASK)
    return ones


class Passes:
    """The forward passes of one cache. A pass is announced before it begins, by the hooks of `sketchkv.enable` or by whoever
    runs it, and is over when it has gone through every layer; one that broke off is found out when the next begins.

    config: of the decoder.
    """

    after: Any = None  # called when a pass went through every layer, for a cache that does something then

    def __init__(self, config):
        self.max_positions = getattr(config, "max_position_embeddings", None)
        # Without rotary embeddings, positions are rows of a table that ends.
        self.positions_end = getattr(config, "rope_parameters", None) is None
        self.layers: Sequence[Any] = ()
        self.forget()

    def forget(self):
        """Ready for another text."""
        self.tokens = None  # of the pass under way
        self.owners = []  # whose pass is under way: (id, tokens seen before), the innermost last
        self.first = None  # once a row has padding: position of each row's first real token, -1 before it, int32 [batch]
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
        self._enter(owner)
        if not self.owners:
            self.tokens = None
            if (
                not isinstance(inputs, torch.Tensor)
                or inputs.ndim != 2 + (inputs is not token_ids)
                or 0 in inputs.shape
            ):
                given = list(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
                raise ValueError(
                    "with a SketchCache, input_ids must be a tensor [batch, tokens], or inputs_embeds "
                    f"[batch, tokens, width], with at least one new token; got {given}"
                    + (
                        f": the cache has seen {self.seen} tokens (cache.reset() forgets them)"
                        if self.seen
                        else ""
                    )
                )
            self.tokens = self._tokens(inputs, token_ids, attention_mask, position_ids)
        self.owners.append((id(owner), self.seen))

    @contextmanager
    def announced(self, tokens, owner):
        """A pass of `owner` that brings `tokens`, ready-made `Tokens` or new token ids `[batch, n]`."""
        self._enter(owner)
        if not self.owners:
            if not isinstance(tokens, Tokens):
                tokens = self._tokens(tokens, tokens, None, None)
            else:
                self._check_length(self.seen + tokens.positions.shape[1], tokens.positions.shape[1], None)
            self.tokens = tokens
        self.owners.append((id(owner), self.seen))
        yield
        self.end(owner)

    def _enter(self, owner):
        start = self.seen
        if any(layer.seen != start or layer.waiting for layer in self.layers) or any(
            s != start for _, s in self.owners
        ):
            raise RuntimeError(BROKEN)
        if id(owner) in [name for name, _ in self.owners]:
            self.owners = []  # the pass before broke off, but no layer had taken anything: nothing is lost

    def end(self, owner=None):
        """The pass is through. Raises RuntimeError if a layer was left out: its attention would have been wrong."""
        start = self.owners.pop()[1]
        if any(layer.waiting or layer.seen == start for layer in self.layers):
            raise RuntimeError(
                f"attention in this {type(owner).__name__} does not take the keys that its cache returns, so that it can't be "
                "bounded: use another cache for this model"
            )
        if not self.owners:
            self.tokens = None
            if self.after is not None:
                self.after()

    def _tokens(self, inputs, token_ids, attention_mask, position_ids):
        batch, count = inputs.shape[:2]
        start, end = self.seen, self.seen + count
        if attention_mask is not None:
            attention_mask = _checked_mask(attention_mask, batch, end)
        self._check_length(end, count, position_ids)
        positions = torch.arange(start, end, dtype=torch.int32, device=inputs.device)[None]
        if attention_mask is not None:
            positions = self._padded(attention_mask, positions, batch, start)
        elif self.first is not None:
            self.first = torch.where(self.first < 0, start, self.first)
            positions = positions.expand(batch, count)
        first = 0 if self.first is None else self.first[:, None, None]
        return Tokens(token_ids, positions, first, self.first is not None)

    def _padded(self, mask, positions, batch, start):
        """`positions` with -1 for padding. What a mask must be: as long as the text, padding in front of it alone."""
        count = positions.shape[1]
        mask = mask.to(positions.device)
        # On CUDA looking makes the host wait: a step of one token, which is no padding, is left to `check`.
        late = mask.is_cuda and start > 0 and count == 1
        if self.first is None and not late and bool(mask.all()):
            return positions
        begins = torch.where(mask.any(-1), mask.int().argmax(-1), -1).int()
        if self.first is None:
            known = torch.zeros_like(begins) if start else begins
        else:
            known = torch.where(self.first < 0, begins, self.first)
        told = torch.arange(start + count, dtype=torch.int32, device=mask.device)
        wrong = (mask != ((told >= known[:, None]) & (known[:, None] >= 0))).any()
        if late:
            self.misfit = wrong if self.misfit is None else self.misfit | wrong
        elif wrong:
            raise ValueError(MASK)
        if late and self.first is None:
            return positions
        self.first = known
        return positions.expand(batch, count).masked_fill(~mask[:, -count:], EMPTY)

    def _check_length(self, end, count, position_ids):
        if end > MOST_TOKENS:
            raise ValueError(
                f"a text may have {MOST_TOKENS} tokens at most, since positions are int32; this one has {end}"
            )
        if self.max_positions is None:
            return
        if self.positions_end and position_ids is not None and position_ids.device.type == "cpu":
            low, high = position_ids.aminmax()
            if low < 0 or (high >= self.max_positions and end <= self.max_positions):
                raise ValueError(
                    f"position_ids must be in [0, {self.max_positions}), the model's positions; got {low} to {high}"
                )
        if end <= self.max_positions:
            return
        # Left padding makes positions smaller than the number of tokens; looking at them is dear, so only here.
        last = end - 1 if position_ids is None else int(position_ids.max())
        if last >= self.max_positions and self.positions_end:
            raise ValueError(
                f"the text reaches position {last}, but the model has only {self.max_positions} (0 to "
                f"{self.max_positions - 1}): shorten the text or use a model with rotary positions"
            )
        if last - count < self.max_positions <= last:  # once in a text
            warnings.warn(
                f"position {last} lies beyond the {self.max_positions} that the model was made for",
                stacklevel=2,
            )

    def check(self):
        """Raises ValueError if a mask hid stored tokens."""
        if self.misfit is not None and self.misfit:
            raise ValueError(MASK)

    def reorder(self, index):
        """Row i becomes what row `index[i]` was (beam search)."""
        if self.first is not None:
            self.first = self.first.index_select(0, index.to(self.first.device))
