"""The operations of a layer in few launches, by Triton kernels.

Each method falls back on the eager rule where a kernel does not serve: several tokens at once, many slots, or a subclass
that computes in a way of its own.
"""

from sketchkv.fast import attention, eviction
from sketchkv.layer import BoundedLayer
from sketchkv.ops import Eager
from sketchkv.policies import AttentionMass, Policy, Sketch
from sketchkv.sketch import CountMinSketch
from sketchkv.slots import Plain


class Fused(Eager):
    """One launch to store a token, one to attend and accumulate, one each to score, choose and close holes.

    filled: int32 `[1]`, tokens that the layer has stored, where the device counts them; None: Python does.
    """

    def __init__(self, filled=None):
        self.filled = filled

    def append(self, layer, keys, values, tokens):
        slots = layer.slots
        if type(slots.codec) is not Plain or keys.shape[2] > 1:
            return super().append(layer, keys, values, tokens)
        attention.append(keys, values, tokens.positions, slots, self.filled)
        return self._stored(slots)

    def _stored(self, slots):
        slots.used += 1
        return slice(slots.used - 1, slots.used) if self.filled is None else self.filled.long()

    def attend(self, layer, query, tokens, form):
        slots, policy = layer.slots, layer.policy
        if query.shape[2] > 1 or not _attends_plainly(layer, form):
            return super().attend(layer, query, tokens, form)
        policy.query(slots, query)
        # A subclass that observes in its own way is asked to.
        accumulates = type(policy).observe is AttentionMass.observe and not tokens.padded
        mass, decay = (self._stretch(slots, "mass"), policy.decay) if accumulates else (None, 1.0)
        output, received = attention.attend(
            query[:, :, 0],
            self._stretch(slots, "keys"),
            self._stretch(slots, "values"),
            form.scaling,
            slots["positions"] if tokens.padded else None,
            mass,
            decay,
            self.filled,
        )
        if policy.uses_attention and not accumulates:
            received = received[:, :, None]
            real = (tokens.positions >= 0)[:, None, :, None] if tokens.padded else None
            policy.observe(slots, received if real is None else received * real)
        return output[:, :, None]

    def _stretch(self, slots, name):
        """The slots that a kernel may look at: the occupied ones, or all where the device knows which are."""
        return slots[name] if self.filled is None else slots.arrays[name]

    def evict(self, layer, tokens):
        slots = layer.slots
        count = slots.used - layer.max_cache_size
        served = (
            type(slots.codec) is Plain
            and not (layer.summary or layer.selective)
            and count <= eviction.MOST_CHOSEN
            and slots.used <= eviction.MOST_SLOTS
            and type(layer).on_evict is BoundedLayer.on_evict
        )
        if not served:
            return super().evict(layer, tokens)
        importance = _score(layer.policy, slots, tokens.end(layer)).float()
        if importance.stride(-1) != 1:
            importance = importance.contiguous()
        protection = layer.num_sinks, layer.recent_window, layer.nan
        evicted = eviction.lowest(importance, slots["positions"], tokens, layer.seen, count, *protection)
        self.look(layer, tokens)
        eviction.compact(slots, evicted)


fused = Fused()


def grows(layer, padded):
    """Whether a step of the layer may be recorded once for any number of occupied slots, as long as none is evicted."""
    policy = type(layer.policy)
    watches = policy.uses_attention and policy.observe is not AttentionMass.observe
    return not (padded or watches or policy.query is not Policy.query) and _attends_plainly(layer, None)


def _attends_plainly(layer, form):
    slots = layer.slots
    plain = form is None or (form.softcap is None and form.sinks is None)
    return (
        plain
        and type(slots.codec) is Plain
        and slots.widths[0] == slots.widths[1]
        and not (layer.summary or layer.selective)
        and type(layer).hide is BoundedLayer.hide
    )


def _score(policy, slots, seen):
    """`policy.score`, for the Count-Min Sketch in two launches."""
    if type(policy) is not Sketch or type(policy.sketches[0]) is not CountMinSketch:
        return policy.score(slots, seen)
    elapsed = slots.used - slots.kept
    if policy.key == "lsh":
        eviction.codes(slots.keys, policy.code.projection, slots.arrays["signature"], slots.kept, elapsed)
        signatures = slots["signature"]
    else:
        signatures = policy.signatures(slots)
    return eviction.remember(signatures, slots["mass"], slots["positions"], policy.sketches, seen, elapsed, policy.decay)
