"""The operations of a layer in few launches, by Triton kernels, for steps that are recorded.

Each method falls back on the eager rule where a kernel does not serve: padding, summaries, coded slots, many slots.
"""

from sketchkv.fast import kernels
from sketchkv.ops import Eager
from sketchkv.policies import AttentionMass, Sketch
from sketchkv.sketch import CountMinSketch
from sketchkv.slots import Plain


class Fused(Eager):
    """One launch to store a token, one to attend and accumulate, one each to score, choose and close holes."""

    def append(self, layer, keys, values, tokens):
        slots = layer.slots
        if tokens.clock is None or type(slots.codec) is not Plain or keys.shape[2] > 1:
            return super().append(layer, keys, values, tokens)
        start = slots.used
        kernels.append(keys, values, tokens.clock, slots.keys, slots.values, slots.positions, start)
        slots.used += 1
        return slice(start, slots.used)

    def attend(self, layer, query, tokens, form):
        slots, policy = layer.slots, layer.policy
        plain = form.softcap is None and form.sinks is None and slots.widths[0] == slots.widths[1]
        served = type(slots.codec) is Plain and not layer.summary and not layer.selective and not layer.is_sliding
        if query.shape[2] > 1 or not (plain and served):
            return super().attend(layer, query, tokens, form)
        policy.query(slots, query)
        # A subclass that observes in its own way is asked to.
        accumulates = type(policy).observe is AttentionMass.observe and not tokens.padded
        mass, decay = (slots["mass"], policy.decay) if accumulates else (None, 1.0)
        positions = slots["positions"] if tokens.padded else None
        output, received = kernels.attend(
            query[:, :, 0], slots["keys"], slots["values"], form.scaling, positions, mass, decay
        )
        if policy.uses_attention and not accumulates:
            received = received[:, :, None]
            real = (tokens.positions >= 0)[:, None, :, None] if tokens.padded else None
            policy.observe(slots, received if real is None else received * real)
        return output[:, :, None]

    def evict(self, layer, tokens):
        slots = layer.slots
        count = slots.used - layer.max_cache_size
        served = (
            tokens.clock is not None
            and type(slots.codec) is Plain
            and not (tokens.padded or layer.summary or layer.selective)
            and count <= kernels.MOST_CHOSEN
            and slots.used <= kernels.MOST_SLOTS
            and type(layer).on_evict is _no_account()
        )
        if not served:
            return super().evict(layer, tokens)
        importance = _score(layer.policy, slots, tokens.clock + 1).float()
        if importance.stride(-1) != 1:
            importance = importance.contiguous()
        protection = layer.num_sinks, layer.recent_window, layer.nan
        evicted = kernels.lowest(importance, slots["positions"], tokens.clock, count, *protection)
        if slots.device.type == "cpu":
            layer.check()
        kept = slots.used - count
        for name, array in slots.arrays.items():
            blank = None if name in slots.kv else -1 if name == "positions" else 0
            kernels.compact_slots(array, evicted, kept, blank)
        slots.used = slots.kept = kept


fused = Fused()


def _no_account():
    from sketchkv.layer import BoundedLayer

    return BoundedLayer.on_evict


def _score(policy, slots, seen):
    """`policy.score`, for the Count-Min Sketch in two launches."""
    if type(policy) is not Sketch or type(policy.sketches[0]) is not CountMinSketch:
        return policy.score(slots, seen)
    elapsed = slots.used - slots.kept
    if policy.key == "lsh":
        kernels.codes(slots.keys, policy.code.projection, slots.arrays["signature"], slots.kept, elapsed)
        signatures = slots["signature"]
    else:
        signatures = policy.signatures(slots)
    return kernels.remember(
        signatures, slots["mass"], slots["positions"], policy.sketches, seen, elapsed, policy.decay
    )
