"""Rounding as the peers do it: minimum and step of a group of channels, in the model's own coordinates."""

from functools import partial

import torch

from sketchkv.quantize import TINY, Half, Quantized, pack, quantized, unpack

GROUP = 32  # channels that share a range, as in KIVI
ROUND_UP = 1 + 2.0**-10  # more than rounding to float16 can take away


def ranges(bits):
    """The codec for `SketchCache(codec=...)` that rounds to `bits` (one number or a pair) within ranges."""
    return partial(Ranged, *quantized(bits).args)


class Ranged(Quantized):
    """Keys and values rounded within the range of their channels, neither rotated nor centred. Parameters as of
    `sketchkv.quantize.Quantized`."""

    rotates = False

    def make_coder(self, name, width):
        coder = super().make_coder(name, width)
        return coder if isinstance(coder, Half) else Range(self.bits[name], width)


class Range:
    """Asymmetric, the range of each group of 32 channels (one group if `head_dim` is no multiple of 32) divided evenly.

    Codes are uint8 `[..., head_dim * bits / 8]`; scales, float16 `[..., 2 * groups]`, are the minimum of each group, then
    the step of each. Both are rounded outwards, so that the range covers the group and no value is off by more than half a
    step. Values beyond float16's 65504 have no finite range and come back as NaN.
    """

    def __init__(self, bits, head_dim):
        self.bits, self.group = bits, GROUP if head_dim % GROUP == 0 else head_dim

    def encode(self, x):
        grouped = x.float().unflatten(-1, (-1, self.group))
        low, high = grouped.aminmax(dim=-1)
        low = (low - low.abs() * (ROUND_UP - 1) - TINY).half()
        step = ((high - low.float()) / (2**self.bits - 1) * ROUND_UP + TINY).half()
        codes = (grouped - low.float()[..., None]) / step.float()[..., None]
        codes = codes.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        return pack(codes, self.bits), torch.cat([low, step], -1)

    def decode(self, codes, scales, dtype):
        low, step = scales.float().unsqueeze(-1).chunk(2, -2)
        codes = unpack(codes, self.bits).unflatten(-1, (step.shape[-2], -1)).float()
        return torch.addcmul(low, codes, step).flatten(-2).to(dtype)
