"""How logits are formed."""

from typing import Any, NamedTuple

import torch


class Form(NamedTuple):
    """How a model forms logits of queries and keys.

    scaling: their factor.
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2), or None.
    sinks: `[num_heads]`, a logit per head that takes attention and gives nothing (gpt-oss), or None.
    """

    scaling: float
    softcap: Any = None
    sinks: Any = None

    def capped(self, logits):
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def sink_column(self, batch, kv_heads, count):
        sinks = self.sinks.float().reshape(1, kv_heads, -1, 1).expand(batch, -1, -1, count)
        return sinks.reshape(batch * kv_heads, -1, 1)


def products(query, keys, scaling):
    """Scaled logits, float32 `[rows, m, n]`. Half precision is multiplied so that no logit overflows on the way."""
    keys = keys.transpose(1, 2)
    if query.dtype in (torch.float32, torch.float64):
        return torch.baddbmm(query.new_empty(()), query, keys, beta=0, alpha=scaling)
    if query.is_cuda:
        return torch.bmm(query, keys, out_dtype=torch.float32).mul_(scaling)
    return torch.bmm(query.float() * scaling, keys.float())
