"""One slot for all tokens that a query does not attend to, beside those that an index chose for it."""

from typing import Any

import torch

from sketchkv.summary import Summary


class Tail(Summary):
    """The mean key and value of all tokens so far, but for sinks, weighted as as many tokens as a query leaves out.

    Means are over all tokens, those attended to as well: a token need not be found again when it is left out, and where a
    text is long they are few.
    """

    means: Any = None  # of a pass of several tokens, as each of them finds them: (keys, values, any taken)

    def __init__(self):
        super().__init__(1)

    def allocate(self, slots):
        super().allocate(slots)
        self.taken = torch.zeros_like(self.counts)  # tokens in the means

    def take(self, keys, values, positions, passing=False):
        """Takes in n new tokens, `[batch, num_kv_heads, n, width]`, those at positions `[batch or 1, 1, n]` below 0 not.
        passing: whether the queries of these tokens come together."""
        positions = positions.expand(keys.shape[:3])
        if passing:
            counted = (positions >= 0)[..., None]
            taken = self.taken[..., None] + counted.cumsum(2)
            before = zip((self.keys, self.values), (keys, values), strict=True)
            sums = (mean * self.taken[..., None] + (new.float() * counted).cumsum(2) for mean, new in before)
            self.means = *(each / taken.clamp(min=1) for each in sums), taken > 0
        self.counts.copy_(self.taken)
        self.fold(keys, values, positions)
        self.taken.copy_(self.counts)

    def stand_for(self, tokens):
        """Weights the slot as so many `tokens` (`[batch, num_kv_heads]`), for the next query."""
        self.counts.copy_(tokens[..., None].clamp(min=0).where(self.taken > 0, 0))

    def passing(self, query, tokens, form):
        """The same for n queries of a pass, each of which finds the means of the tokens up to its own.

        query: `[batch, num_heads, n, width]`, as the codec multiplies it.
        tokens: how many each leaves out, `[batch, num_kv_heads, n]`.
        Returns float32 (logits `[batch, num_kv_heads, group, n, 1]`, values `[batch, num_kv_heads, 1, n, width]`).
        """
        (keys, values, any_taken), self.means = self.means, None
        query = query.float().unflatten(1, (keys.shape[1], -1))
        logits = form.capped((query * keys[:, :, None]).sum(-1, keepdim=True) * form.scaling) + weight(tokens)
        return logits.masked_fill(~any_taken[:, :, None], -torch.inf), values[:, :, None]

    def tensors(self):
        return [*super().tensors(), self.taken]

    def nbytes(self):
        held = super().nbytes()
        return held | {"kv": held["kv"] - self.taken.nbytes, "policy": held["policy"] + self.taken.nbytes}


def weight(tokens):
    """What so many tokens add to a logit, float32 `[batch, num_kv_heads, 1, n, 1]`: -inf for none."""
    return tokens[:, :, None, :, None].float().log()
