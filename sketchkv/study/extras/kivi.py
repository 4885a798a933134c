"""The full text in few bits: a store in the manner of KIVI (Liu et al. 2024, arXiv 2402.02750), without eviction."""

import torch

from sketchkv import quantize
from sketchkv.cache import SketchCache
from sketchkv.checks import Settings, whole
from sketchkv.layer import BoundedLayer
from sketchkv.ops import Eager
from sketchkv.policies import Window
from sketchkv.slots import EMPTY, Plain

GROUP = 32  # numbers that share a range: tokens of one channel of the keys, channels of one token's value
TINY = 2.0**-24  # the smallest positive float16


def pack(x, bits):
    """Codes and ranges of `x` `[..., n]`, in groups of 32 along the last axis (one group if n is no multiple of 32).

    Returns codes, uint8 `[..., n * bits / 8]` (`sketchkv.quantize.pack`), and ranges, float16 `[..., groups, 2]`: the minimum
    of each group and the step to the next code.
    """
    grouped = x.float().unflatten(-1, (-1, GROUP if x.shape[-1] % GROUP == 0 else x.shape[-1]))
    low, high = grouped.aminmax(dim=-1)
    ranges = torch.stack([low, ((high - low) / (2**bits - 1)).clamp(min=TINY)], -1).half()
    low, step = ranges.float()[..., None].unbind(-2)
    codes = ((grouped - low) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    return quantize.pack(codes, bits), ranges


def unpack(codes, ranges, bits, dtype):
    """The numbers `[..., n]` in `dtype`, from what `pack` returned."""
    low, step = ranges.float()[..., None].unbind(-2)
    codes = quantize.unpack(codes, bits).unflatten(-1, (ranges.shape[-2], -1)).float()
    return torch.addcmul(low, codes, step).flatten(-2).to(dtype)


class KiviSlots:
    """What `BoundedLayer` asks of its slots, for tokens in the order of the text: first the packed ones, then the newest,
    between `residual` and `residual` + 32 of them, in float16.

    Keys are packed per channel over 32 tokens, values per token over 32 channels, both in the model's own coordinates.
    """

    def __init__(self, shape, max_cache_size, head_dim, dtype, device, bits, residual):
        self.shape, self.widths, self.codec = tuple(shape), (head_dim, head_dim), Plain(dtype, device)
        self.dtype, self.device, self.bits, self.residual = dtype, device, bits, residual
        batch, num_kv_heads = shape
        groups = max(0, max_cache_size - residual) // GROUP
        group = torch.zeros(batch, num_kv_heads, GROUP, head_dim, device=device)
        self.arrays = {"real": torch.zeros(batch, max_cache_size, dtype=torch.bool, device=device)}
        for name in ("keys", "values"):
            shape = (batch, num_kv_heads, residual + GROUP, head_dim)
            self.arrays[name] = torch.zeros(shape, dtype=torch.float16, device=device)
            for part, like in zip(
                (f"{name}_codes", f"{name}_range"), pack(self._turn(name, group), bits), strict=True
            ):
                shape = (batch, num_kv_heads, groups, *like.shape[2:])
                self.arrays[part] = torch.zeros(shape, dtype=like.dtype, device=device)
        self.kv = self.arrays.keys() - {"real"}
        self.clear()

    @staticmethod
    def _turn(name, group):
        """Brings the axis along which numbers share a range to the end, or back."""
        return group.transpose(-1, -2) if name == "keys" else group

    packed: int  # groups
    newest: int  # tokens not packed yet
    used = property(lambda self: self.packed * GROUP + self.newest)
    capacity = property(lambda self: self.packed * GROUP + self.residual + GROUP)
    room = property(lambda self: self.capacity - self.used)
    positions = property(lambda self: self["positions"])

    def __getitem__(self, name):
        if name != "positions":
            return self.context(name)
        real = self.arrays["real"][:, : self.used]
        positions = torch.arange(self.used, dtype=torch.int32, device=self.device).where(real, EMPTY)
        return positions[:, None].expand(-1, self.shape[1], -1)

    def context(self, name):
        """Keys or values of all tokens: `[batch, num_kv_heads, used, head_dim]`."""
        codes, ranges = (self.arrays[f"{name}_{part}"][:, :, : self.packed] for part in ("codes", "range"))
        old = self._turn(name, unpack(codes, ranges, self.bits, self.dtype)).flatten(2, 3)
        return torch.cat([old, self.arrays[name][:, :, : self.newest].to(self.dtype)], 2)

    def append(self, keys, values, positions, first=0):
        new = slice(self.newest, self.newest + keys.shape[2])
        self.arrays["keys"][:, :, new] = keys
        self.arrays["values"][:, :, new] = values
        self.arrays["real"][:, self.used : self.used + keys.shape[2]] = positions >= 0
        self.newest = new.stop
        return new

    def fold(self):
        """Packs the oldest 32 of the newest."""
        for name in ("keys", "values"):
            newest = self.arrays[name]
            for part, packed in zip(
                ("codes", "range"), pack(self._turn(name, newest[:, :, :GROUP]), self.bits), strict=True
            ):
                self.arrays[f"{name}_{part}"][:, :, self.packed] = packed
            newest[:, :, :-GROUP] = newest[:, :, GROUP:].clone()
        self.packed += 1
        self.newest -= GROUP

    def tensors(self):
        return list(self.arrays.values())

    def clear(self):
        self.packed = self.newest = 0

    def nbytes(self, *names):
        return sum(self.arrays[name].nbytes for name in names)


class Packing(Eager):
    """Packs where a bounded layer evicts: at fixed numbers of seen tokens, so that chunks make no difference."""

    def evict(self, layer, tokens):
        layer.slots.fold()

    def attend(self, layer, query, tokens, form):  # never many tokens: they end where the newest are packed
        return self.weigh(layer, query, layer.slots["keys"], layer.slots["values"], tokens, form)


class KiviLayer(BoundedLayer):
    """A layer that packs and evicts nothing."""

    ops = Packing()

    def __init__(self, max_cache_size, bits, residual):
        super().__init__(
            Window(), max_cache_size, Settings(num_sinks=0, recent_window=residual, evict_every=GROUP)
        )
        self.bits = bits

    def lazy_initialization(self, key_states, value_states):
        head_dim = key_states.shape[-1]
        if head_dim * self.bits % 8:
            raise ValueError(f"values of {head_dim} channels can't be packed in {self.bits} bits: use bits=8")
        with torch.inference_mode(False):
            like = key_states.dtype, key_states.device
            self.slots = KiviSlots(
                key_states.shape[:2], self.max_cache_size, head_dim, *like, self.bits, self.recent_window
            )
            self.home, self.nan = self.slots, torch.zeros((), dtype=torch.bool, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if self.seen + key_states.shape[2] > self.max_cache_size:
            raise ValueError(
                f"the text has {self.seen + key_states.shape[2]} tokens, but this cache evicts none and has room for "
                f"max_cache_size={self.max_cache_size}: make it with a larger one"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def _narrow(self):
        return 0


class KiviCache(SketchCache):
    """A cache of the whole text in 8, 4 or 2 bits, for models switched by `sketchkv.enable`, after KIVI (Liu et al. 2024).

    Keys share a range per channel over 32 tokens, since a few channels of the keys are large whatever the token; values
    per token over 32 channels. The newest `residual` to `residual` + 31 tokens are held in float16: a token is packed as
    soon as its 32 are complete and `residual` newer ones are there. (KIVI packs its keys in batches of `residual`, and
    takes 128.) Attention turns one layer at a time back into numbers: that working memory is not part of `nbytes`.

    config: the model's configuration (or the model). max_cache_size: tokens of the text, for which memory is held from
    the start. Padding is hidden, but its keys count where ranges are taken.

    Raises ValueError for other bits, a negative `residual`, and a text longer than `max_cache_size`.
    """

    def __init__(self, config, max_cache_size, *, bits=4, residual=32):
        if bits not in (8, 4, 2) or isinstance(bits, float):
            raise ValueError(f"bits must be 8, 4 or 2; got {bits!r}")
        residual = whole("residual", residual, 0)
        self.bits, self.residual = bits, residual
        super().__init__(config, max_cache_size, num_sinks=0, recent_window=0, policy=Window())

    def make_layer(self, cap, window, policy, settings, summary):
        if window is not None:
            raise ValueError("a KiviCache holds whole texts: layers with sliding windows need a SketchCache")
        return KiviLayer(cap, self.bits, self.residual)
