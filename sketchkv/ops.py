"""What a bounded layer computes, in torch operations: attention over slots, and who is evicted.

Each rule stands here once: what a query sees, who is protected, how ties fall, what NaN does. `sketchkv.fast` computes the
same in fewer launches, and is tested against this.
"""

import torch

from sketchkv.checks import checked_scores
from sketchkv.logits import products
from sketchkv.slots import EMPTY

CHECK_EVERY = 16  # evictions between two looks for NaN on CUDA, where looking makes the host wait


class Eager:
    """The operations of a layer. `layer` is the `BoundedLayer`, `tokens` what the block brings (`sketchkv.passes.Tokens`)."""

    suits = False  # whether `suited` may replace it: it was not set by hand

    def turn(self, layer, query, key, value):
        """Vectors of one block as the layer's codec stores and multiplies them."""
        return layer.slots.codec.turn(query, key, value)

    def turn_back(self, layer, output):
        """What attention took from values that were turned."""
        return layer.slots.codec.turn_back(output)

    def widened(self, slots, capacity):
        """A copy of slots for as long as a prompt passes."""
        return slots.widened(capacity)

    def append(self, layer, keys, values, tokens):
        """Stores new tokens in the layer's slots; returns the slots as a slice."""
        return layer.slots.append(keys, values, tokens.positions, tokens.first)

    def through(self, layer, query, key, value, tokens, form):
        """A pass through the layer."""
        return layer.attend(query, key, value, tokens, form)

    def attend(self, layer, query, tokens, form):
        """Attention of the newest tokens over all slots and the summary, and what the policy observes of it.

        query: `[batch, num_heads, n, width]`; the new tokens are the last n slots.
        form: how logits are formed (`sketchkv.logits.Form`).
        Returns `[batch, num_heads, n, width of values]`, in the dtype of the query.
        """
        slots, count = layer.slots, query.shape[2]
        near = slots.codec.near(slots, tokens.positions)
        if count > 1:
            from sketchkv.prompts import attend

            return attend(self, layer, query, near, tokens, form)
        return self.weigh(layer, query, slots["keys"], slots["values"], tokens, form, near)

    def weigh(self, layer, query, keys, values, tokens, form, near=None):
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
            logits = torch.cat([logits, summary.logits(grouped, form)], -1)
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
            layer.policy.observe(slots, received.float())
        return output.view(batch, -1, count, values.shape[-1])

    def settle(self, layer, tokens):
        """The codec looks at the first tokens of some rows, once per text."""
        begin, rows = tokens.settling(layer)
        layer.slots.codec.settle(layer.slots, begin + layer.num_sinks, rows)

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

    def score(self, layer, tokens):
        """Importance of the stored tokens as the layer's policy tells it."""
        return layer.policy.score(layer.slots, tokens.end(layer))

    def protected_scores(self, layer, tokens):
        """Importance of the stored tokens, `[batch, num_kv_heads, used]`: inf for sinks and the recent window, -inf for
        padding. Notes in `layer.nan` whether an importance was NaN."""
        slots, positions, end = layer.slots, layer.slots["positions"], tokens.end(layer)
        scores = checked_scores(self.score(layer, tokens), layer)
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
        due = tokens.clock is None and layer.evicted // layer.evict_every % CHECK_EVERY == 0
        if due or layer.nan.device.type == "cpu":
            layer.check()


eager = Eager()
unset = Eager()
unset.suits = True  # and of its copies, which a copied cache holds


def order(scores, positions):
    """Integers in the order of (score, position), so that one selection does and the older of equal scores goes first, on
    every device."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0: a negative zero equals zero
    bits ^= (bits >> 31) & 0x7FFFFFFF  # negative floats fall as their bits rise
    return (bits.long() << 32) + positions
