"""The operations of a layer in few launches, by Triton kernels.

Each method falls back on the eager rule where a kernel does not serve: several tokens at once, many slots, or a subclass
that computes in a way of its own.
"""

from functools import lru_cache

import torch

from sketchkv.checks import checked_scores
from sketchkv.fast import (
    attention,
    chunk,
    coded,
    codes,
    coding,
    columns,
    eviction,
    prompt,
    recalled,
    replay,
    storage,
    survivors,
    token,
)
from sketchkv.fast.launch import has_room
from sketchkv.layer import BoundedLayer
from sketchkv.ops import Eager
from sketchkv.policies import AttentionMass, Policy
from sketchkv.prompts import needs_no_scores
from sketchkv.quantize import Normal, Quantized
from sketchkv.sketch import CountMinSketch
from sketchkv.sketch_policy import Sketch
from sketchkv.slots import Plain
from sketchkv.summary import Summary

FEW_SLOTS = 1024
MOST_TOGETHER = 2**14  # queries of which a table says how much they count


class Fused(Eager):
    """One launch to store a token, one to attend and accumulate, one each to score, choose and close holes.

    filled: int32 `[1]`, tokens that the layer has stored, where the device counts them; None: Python does.
    """

    def __init__(self, filled=None):
        self.filled = filled

    def turn(self, layer, query, key, value):
        """Kernels turn what they take to codes themselves."""
        if _is_coded(layer) and (query.shape[2] == 1 or _adds_up(layer)):
            return query, key, value
        return super().turn(layer, query, key, value)

    def turn_back(self, layer, output):
        if _is_coded(layer) and (output.shape[2] == 1 or _adds_up(layer)):
            return output
        return super().turn_back(layer, output)

    def widened(self, slots, capacity):
        return survivors.widened(slots, capacity)

    def append(self, layer, keys, values, tokens):
        slots, count = layer.slots, keys.shape[2]
        if type(slots.codec) is Plain:
            storage.append(keys, values, tokens.positions, slots, self.filled)
        elif not _is_coded(layer) or (count > 1 and not _adds_up(layer)):
            return super().append(layer, keys, values, tokens)
        elif count > 1:
            slots.coming = chunk.append(keys, values, slots, tokens, layer.seen)
        else:
            token.append(keys, values, tokens.positions, slots, self.filled, tokens.first)
        slots.used += count
        return slice(slots.used - count, slots.used) if self.filled is None else self.filled

    def recalled(self, layer, query, key, value, tokens, form):
        """A whole step of a layer with an index (`sketchkv.recall`), or None."""
        return recalled.step(layer, query, key, value, tokens, form)

    def through(self, layer, query, key, value, tokens, form):
        if replay.suits(layer, query, form) and _adds_up(layer) and _leaves_at_once(layer):
            return replay.attend(layer, query, key, value, tokens, form)
        return super().through(layer, query, key, value, tokens, form)

    def attend(self, layer, query, tokens, form):
        slots, policy = layer.slots, layer.policy
        if query.shape[2] > 1:
            flash = (
                slots.coming is None and query.shape[2] == slots.used and needs_no_scores(layer, tokens, form)
            )
            many = super().attend if flash or not _adds_up(layer) else self._attend_many
            return many(layer, query, tokens, form)
        plain = _is_plain(layer)
        if not (plain or _is_coded(layer)):
            return super().attend(layer, query, tokens, form)
        if form.softcap is not None or form.sinks is not None:
            turned = slots.codec.turn(query, query, query)[0]
            return slots.codec.turn_back(super().attend(layer, turned, tokens, form))
        policy.query(slots, query)
        # A subclass that observes in its own way is asked to.
        accumulates = type(policy).observe is AttentionMass.observe and not tokens.padded
        decay = policy.decay if accumulates else 1.0
        # Where the host launches each step, one launch less is worth more than a full chip.
        splits = 1 if tokens.clock is None and slots.used <= FEW_SLOTS else None
        if plain:
            mass = self._stretch(slots, "mass") if accumulates else None
            positions = slots["positions"] if tokens.padded else None
            stored = self._stretch(slots, "keys"), self._stretch(slots, "values")
            output, received = attention.attend(
                query[:, :, 0], *stored, form.scaling, positions, mass, decay, self.filled, splits=splits
            )
        else:
            mass = slots.arrays["mass"] if accumulates else None
            output, received = coded.attend(
                query[:, :, 0],
                slots,
                form.scaling,
                layer.summary,
                mass,
                decay,
                tokens.padded,
                self.filled,
                splits=splits,
            )
        if policy.uses_attention and not accumulates:
            received = received[:, :, None]
            real = (tokens.positions >= 0)[:, None, :, None] if tokens.padded else None
            policy.observe(slots, received if real is None else received * real)
        return output[:, :, None]

    def _attend_many(self, layer, query, tokens, form):
        """Attention of many new tokens: the output in one launch, in another what slots receive, no score in memory."""
        slots, policy, summary = layer.slots, layer.policy, layer.summary
        (batch, kv_heads), (heads, count) = slots.shape, query.shape[1:3]
        turn = slots.codec.rotations["keys"] if slots.coming else None
        (keys, values, fine), slots.coming = slots.coming or (slots["keys"], slots["values"], None), None
        away, beside = None, []
        if tokens.padded or layer.selective:
            away = slots["positions"] < 0
            away = (away | slots["unattended"] if layer.selective else away).to(torch.uint8)
        inside = summary if summary and summary.count == 1 and not summary.spread else None
        if summary and not inside:
            grouped = query.reshape(batch * kv_heads, -1, query.shape[-1])
            beside.append(summary.logits(grouped, form))
        if form.sinks is not None:
            beside.append(form.sink_column(batch, kv_heads, count))
        others = torch.cat(beside, -1).logsumexp(-1).view(batch, heads, count) if beside else None
        alike = form.scaling, form.softcap, away
        output, normaliser = prompt.attend(query, keys, values, *alike, others, inside, turn, fine)
        if summary and not inside:
            total = normaliser.view(batch * kv_heads, -1, 1) / attention.LOG2E
            behind = summary.output((beside[0] - total).exp()).view(output.shape)
            output = (output + behind).to(query.dtype)
        if policy.uses_attention:
            weights = _weights(policy, count, query.device)
            if tokens.padded:
                weights = weights * (tokens.positions >= 0)
            given = query, keys, normaliser, weights, *alike, fine
            if type(policy).receive is AttentionMass.receive:
                columns.receive(*given, slots["mass"], policy.decay**count)
            else:
                policy.receive(slots, columns.receive(*given), count)
        return output

    def _stretch(self, slots, name):
        """The slots that a kernel may look at: the occupied ones, or all where the device knows which are."""
        return slots[name] if self.filled is None else slots.arrays[name]

    def settle(self, layer, tokens):
        if tokens.padded or not _is_coded(layer) or layer.slots.used > coding.MOST_SETTLED:
            return super().settle(layer, tokens)
        coding.settle(layer.slots, layer.seen, layer.num_sinks)

    def evict(self, layer, tokens):
        slots, summary = layer.slots, layer.summary
        count = slots.used - layer.max_cache_size
        if slots is not layer.home and _leaves_at_once(layer):
            return self._evict_many(layer, tokens)
        served = (
            (type(slots.codec) is Plain or _is_coded(layer))
            and not (layer.selective or (summary and summary.protects))
            and count <= eviction.MOST_CHOSEN
            and slots.used <= eviction.MOST_SLOTS
            and getattr(layer.on_evict, "__func__", None) is BoundedLayer.on_evict
        )
        if not served:
            return super().evict(layer, tokens)
        importance = checked_scores(self.score(layer, tokens), layer).to(slots.device, torch.float32)
        if importance.stride(-1) != 1:
            importance = importance.contiguous()
        protection = layer.num_sinks, layer.recent_window, layer.nan
        evicted = eviction.lowest(importance, slots["positions"], tokens, layer.seen, count, *protection)
        self.look(layer, tokens)
        if summary and _is_coded(layer):
            codes.fold(summary, slots, evicted)
        elif summary:
            index = evicted.long()
            taken = slots.take("keys", index), slots.take("values", index)
            summary.fold(*taken, slots["positions"].gather(-1, index))
        storage.compact(slots, evicted)

    def score(self, layer, tokens):
        """`policy.score`, for the Count-Min Sketch in two launches, for norms of coded values in one."""
        policy, slots, seen = layer.policy, layer.slots, tokens.end(layer)
        if type(policy).score is AttentionMass.score and _is_coded(layer):
            return codes.importance(policy, slots, tokens, layer.seen)
        if type(policy) is not Sketch or type(policy.sketches[0]) is not CountMinSketch:
            return super().score(layer, tokens)
        elapsed = slots.used - slots.kept
        if policy.key == "lsh" and type(slots.codec) is Plain:
            eviction.codes(
                slots.arrays["keys"], policy.code.projection, slots.arrays["signature"], slots.kept, elapsed
            )
            signatures = slots["signature"]
        else:
            signatures = policy.signatures(slots)
        return eviction.remember(
            signatures, slots["mass"], slots["positions"], policy.sketches, seen, elapsed, policy.decay
        )

    def look(self, layer, tokens):
        if not (layer.nan.is_cuda and torch.cuda.is_current_stream_capturing()):  # a later eviction looks
            super().look(layer, tokens)

    def _evict_many(self, layer, tokens):
        """Those that stay go back to the steady slots."""
        slots, summary = layer.slots, layer.summary
        importance = checked_scores(self.score(layer, tokens), layer).to(slots.device, torch.float32)
        if importance.stride(-1) != 1:
            importance = importance.contiguous()
        ranks, best, index = survivors.chosen(importance, slots, tokens, layer)
        if (
            layer.nan.device.type == "cpu"
        ):  # elsewhere evictions of later steps look: here the host would wait for each layer
            self.look(layer, tokens)
        if summary:
            survivors.fold(summary, slots, ranks, best)
        survivors.move(slots, layer.home, layer.max_cache_size, index)
        layer.slots = layer.home


fused = Fused()
fused.suits = True


@lru_cache
def _weights_of(decay, device):
    return AttentionMass(decay).weights(MOST_TOGETHER, device)[None]


def _weights(policy, count, device):
    """`policy.weights`, float32 `[1, count]`, of one table for all layers and passes: none is made while a pass is recorded."""
    if type(policy).weights is AttentionMass.weights and count <= MOST_TOGETHER:
        return _weights_of(policy.decay, device)[:, -count:]
    return policy.weights(count, device)[None]


def _leaves_at_once(layer):
    """Whether what a prompt leaves is chosen and moved by kernels."""
    plain = type(layer.slots.codec) is Plain and not layer.summary
    return (
        (plain or _is_coded(layer))
        and layer.policy.recordable  # not one that draws a number for each slot: their order changes
        and not (layer.selective or (layer.summary and layer.summary.protects))
        and getattr(layer.on_evict, "__func__", None) is BoundedLayer.on_evict
        and type(layer)._narrow is BoundedLayer._narrow
    )


def grows(layer, padded=False):
    """Whether a step of the layer may be recorded once for any number of occupied slots, as long as none is evicted."""
    policy = type(layer.policy)
    watches = policy.uses_attention and policy.observe is not AttentionMass.observe
    return not (padded or watches or policy.query is not Policy.query) and (
        _is_plain(layer) or _is_coded(layer)
    )


def _adds_up(layer):
    """Whether all that the layer's policy asks of many queries is a sum over them, of slots that all see in the order in which
    they came."""
    policy = type(layer.policy)
    return (
        (not policy.uses_attention or policy.observe is AttentionMass.observe)
        and policy.query is Policy.query
        and type(layer).hide is BoundedLayer.hide
        and (getattr(layer.slots.codec, "ring", None) is None or _is_coded(layer))
    )


def _is_plain(layer):
    """Whether a kernel attends to the layer's slots as they are."""
    slots = layer.slots
    plain = type(slots.codec) is Plain and slots.widths[0] == slots.widths[1] and not layer.summary
    return plain and not layer.selective and type(layer).hide is BoundedLayer.hide


def _is_coded(layer):
    """Whether kernels work on the layer's codes: of vectors as wide as a power of two, with one summary slot at most. Looked at
    once for the slots and the policy at hand."""
    slots, policy = layer.slots, layer.policy
    if slots.served is None or slots.served[0] is not policy:
        slots.served = policy, _serves_codes(layer)
    return slots.served[1]


def _serves_codes(layer):
    codec, summary, (width, other) = layer.slots.codec, layer.summary, layer.slots.widths
    return (
        type(codec) is Quantized
        and all(type(coder) is Normal for coder in codec.all_coders())
        and width == other
        and width >= 16
        and not width & width - 1
        and has_room(width, layer.slots.dtype, layer.slots.device)
        and (summary is None or (type(summary) is Summary and summary.count == 1 and not summary.spread))
        and not layer.selective
        and type(layer).hide is BoundedLayer.hide
        and type(layer.policy).query is Policy.query
    )
