"""What a bounded layer computes, in torch operations: attention over slots, and who is evicted.

Each rule stands here once: what a query sees, who is protected, how ties fall, what NaN does. `sketchkv.fast` computes the
same in fewer launches, and is tested against this.
"""

from importlib.util import find_spec

import torch
from torch.nn.functional import scaled_dot_product_attention

from sketchkv.checks import checked_scores
from sketchkv.slots import EMPTY

# Scores that are in memory at once while many tokens come, of all heads and sequences: what a CPU's cache holds, and on a GPU
# what is small beside the model. One query's scores always are.
SCORES = {"cpu": 2**20, "cuda": 2**26}
# Evictions between two looks for NaN on CUDA, where looking makes the host wait for the device.
CHECK_EVERY = 16


class Eager:
    """The operations of a layer. `layer` is the `BoundedLayer`, `tokens` what the block brings (`sketchkv.layer.Tokens`)."""

    @property
    def suits(self) -> bool:
        """Whether `suited` may replace it: it was not set by hand."""
        return self is eager

    def turn(self, layer, query, key, value):
        """Vectors of one block as the layer's codec stores and multiplies them."""
        return layer.slots.codec.turn(query, key, value)

    def turn_back(self, layer, output):
        """What attention took from values that were turned."""
        return layer.slots.codec.turn_back(output)

    def append(self, layer, keys, values, tokens):
        """Stores new tokens in the layer's slots; returns the slots as a slice."""
        return layer.slots.append(keys, values, tokens.positions, tokens.first)

    def attend(self, layer, query, tokens, form):
        """Attention of the newest tokens over all slots and the summary, and what the policy observes of it.

        query: `[batch, num_heads, n, width]`; the new tokens are the last n slots.
        form: how logits are formed (`sketchkv.layer.Form`).
        Returns `[batch, num_heads, n, width of values]`, in the dtype of the query.
        """
        slots, count = layer.slots, query.shape[2]
        keys, values = slots["keys"], slots["values"]
        near = slots.codec.near(slots, tokens.positions)
        if count == 1:
            return self._weigh(layer, query, keys, values, tokens, form, near)
        flash = near is None and needs_no_scores(layer, tokens, form)
        if flash and count == slots.used:
            layer.policy.query(slots, query)
            return _flash(query, keys, values, form.scaling)
        # Blocks of queries, each of which finds the slots as they were when its tokens came: no query sees what lies beyond.
        most, outputs = max(1, SCORES[query.device.type] // (query.shape[:2].numel() * slots.used)), []
        before = slots.used - count
        for start in range(0, count, most):
            part = slice(start, min(start + most, count))
            slots.used = before + part.stop
            block = query[:, :, part], keys[:, :, : slots.used], values[:, :, : slots.used]
            if flash:
                layer.policy.query(slots, block[0])
                seen = torch.ones(part.stop - start, slots.used, dtype=torch.bool, device=query.device)
                outputs.append(_flash(*block, form.scaling, seen.tril_(before + start)))
            else:
                fine = near and near.part(part, slots.used)
                outputs.append(self._weigh(layer, *block, tokens.part(part), form, fine))
        return torch.cat(outputs, 2)

    def _weigh(self, layer, query, keys, values, tokens, form, near=None):
        """Attention of one block, by a matrix of all scores."""
        slots, summary = layer.slots, layer.summary
        (batch, kv_heads), count, used = slots.shape, query.shape[2], slots.used
        layer.policy.query(slots, query)
        # The query heads of a group share the slots of their KV head: no key or value is repeated (grouped-query attention).
        grouped = query.reshape(batch * kv_heads, -1, query.shape[-1])
        logits = products(grouped, keys.flatten(0, 1), form.scaling)
        if near:
            near.add_logits(logits.view(batch, kv_heads, -1, count, used), grouped, form.scaling)
        logits = form.capped(logits)
        layer.hide(logits.view(batch, kv_heads, -1, count, used), tokens)
        if summary:
            logits = torch.cat([logits, form.capped(summary.logits(grouped, form.scaling))], -1)
        if form.sinks is not None:  # a learned logit per head that takes mass and gives nothing
            logits = torch.cat([logits, form.sink_column(batch, kv_heads, count)], -1)
        attention = logits.softmax(-1)
        received = attention[..., :used] if attention.shape[-1] > used else attention
        output = torch.bmm(received.to(values.dtype), values.flatten(0, 1))
        if near:
            output += near.output(received.view(batch, kv_heads, -1, count, used))
        if summary:
            behind = attention[..., used : used + summary.count]
            output = (output + summary.output(behind)).to(query.dtype)
        if layer.policy.uses_attention:
            received = received.view(batch, kv_heads, -1, count, used)
            received = received.squeeze(2) if received.shape[2] == 1 else received.sum(2)
            if tokens.padded:
                received = received * (tokens.positions >= 0)[:, None, :, None]
            layer.policy.observe(slots, received)
        return output.view(batch, -1, count, values.shape[-1])

    def evict(self, layer, tokens):
        """Back to `max_cache_size` tokens: the lowest scores go, padding first, sinks and the recent window never. Of the
        tokens that stay, all but the `attend_topk` highest are left out of attention until the next eviction. Those that go
        are folded into the summary, if there is one."""
        slots, cap = layer.slots, layer.max_cache_size
        positions, scores = slots["positions"], self.protected_scores(layer, tokens)
        lowest = order(scores, positions).topk(slots.used - layer.attend_topk, largest=False).indices
        if layer.selective:
            slots["unattended"].zero_().scatter_(-1, lowest, True)
        evicted = lowest[..., : slots.used - cap]
        if layer.summary:
            keys, values = slots.take("keys", evicted), slots.take("values", evicted)
            layer.summary.fold(keys, values, positions.gather(-1, evicted))
        layer.on_evict(scores, evicted)
        slots.evict(evicted)

    def protected_scores(self, layer, tokens):
        """Importance of the stored tokens, `[batch, num_kv_heads, used]`: inf for sinks and the recent window, -inf for
        padding. Notes in `layer.nan` whether an importance was NaN."""
        slots, positions, end = layer.slots, layer.slots["positions"], tokens.end(layer)
        scores = checked_scores(layer.policy.score(slots, end), layer)
        scores = scores.to(positions.device, torch.float32).clamp(-1e30, 1e30)
        if layer.summary:
            scores = layer.summary.protect(scores, slots)
        protected = (positions < tokens.first + layer.num_sinks) | (positions >= end - layer.recent_window)
        scores = scores.masked_fill(protected, torch.inf).masked_fill(positions == EMPTY, -torch.inf)
        layer.nan.logical_or_(scores.isnan().any())  # in place, where a recorded step finds it
        self.look(layer, tokens)
        return scores

    def look(self, layer, tokens):
        """Raises ValueError if an importance was NaN, on CUDA now and then."""
        if layer.nan.device.type == "cpu" or (
            tokens.clock is None and layer.evicted // layer.evict_every % CHECK_EVERY == 0
        ):
            layer.check()


eager = Eager()


def suited(ops, device):
    """The operations of a layer on `device`: the fused ones on a GPU with Triton, else the eager rule; `ops` if it is
    another that was set."""
    if not ops.suits:
        return ops
    if not _fuses(device):
        return eager
    from sketchkv.fast.ops import fused

    return fused


def _fuses(device):
    return device.type == "cuda" and find_spec("triton") is not None


def needs_no_scores(layer, tokens, form):
    """Whether the output is all that is asked for, and all heads and rows see the same slots."""
    asked = layer.policy.uses_attention or layer.summary or form.softcap is not None or form.sinks is not None
    return not (asked or tokens.padded or layer.is_sliding or (layer.selective and layer.evicted))


def _flash(query, keys, values, scaling, mask=None):
    """Attention by torch's kernels, which hold no scores; without a mask, queries and keys are of the same tokens."""
    if query.is_cuda:  # there the kernels that take a mask or float32 want a key for each query head
        keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (keys, values))
    return scaled_dot_product_attention(
        query, keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=not query.is_cuda
    )


def products(query, keys, scaling):
    """Scaled logits, float32 `[rows, m, n]`. Half precision is multiplied so that no logit overflows on the way."""
    keys = keys.transpose(1, 2)
    if query.dtype == torch.float32:
        return torch.baddbmm(query.new_empty(()), query, keys, beta=0, alpha=scaling)
    if query.is_cuda:
        return torch.bmm(query, keys, out_dtype=torch.float32).mul_(scaling)
    return torch.bmm(query.float() * scaling, keys.float())


def order(scores, positions):
    """Integers in the order of (score, position), so that one selection does and the older of equal scores goes first, on
    every device."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats fall as their bits rise
    return (bits.long() << 32) + positions
