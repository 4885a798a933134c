"""Keys and values in 16, 8 or 4 bits: what `Slots` holds when a cache is given `bits`."""

import torch

GROUP = 32  # channels that share a range, as in KIVI
TINY = 2.0**-24  # the smallest positive float16
ROUND_UP = 1 + 2.0**-10  # more than rounding to float16 can take away


def quantize(x, bits):
    """Codes and ranges of vectors `x` `[..., head_dim]`, each on its own: asymmetric, in groups of 32 channels (one
    group if `head_dim` is no multiple of 32).

    Returns codes, uint8 `[..., head_dim * bits / 8]` (with 4 bits, channels i and i + head_dim / 2 share a byte, i in
    the low half), and ranges, float16 `[..., 2 * groups]`: the minimum of each group, then the step of each. Both are
    rounded outwards, so that the range covers the group and no value is off by more than half a step.

    Ranges per token are all that a cache that evicts can have: KIVI (Liu et al. 2024, arXiv 2402.02750) lets
    neighbouring tokens share a range per channel of the keys, and after an eviction neighbours are no longer together.

    With 16 bits the codes are the numbers themselves in float16, without ranges.

    Raises ValueError for other `bits`, or an odd `head_dim` with 4. Values beyond float16's 65504 have no finite range
    and come back as NaN.
    """
    head_dim = x.shape[-1]
    if bits == 16:
        return x.half(), x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)
    if bits not in (4, 8) or head_dim * bits % 8:
        raise ValueError(
            f"vectors of {head_dim} channels can't be held in {bits!r} bits: bits=4 (even head_dim), bits=8 or bits=16"
        )
    grouped = x.float().unflatten(-1, (-1, GROUP if head_dim % GROUP == 0 else head_dim))
    low, high = grouped.aminmax(dim=-1)
    low = (low - low.abs() * (ROUND_UP - 1) - TINY).half()
    step = ((high - low.float()) / (2**bits - 1) * ROUND_UP + TINY).half()
    codes = (grouped - low.float()[..., None]) / step.float()[..., None]
    codes = codes.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        first, second = codes.chunk(2, -1)
        codes = first | second << 4
    return codes, torch.cat([low, step], -1)


def dequantize(codes, ranges, bits, dtype):
    """Vectors `[..., head_dim]` in `dtype`, from what `quantize` returned."""
    if bits == 16:
        return codes.to(dtype)
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    low, step = ranges.float().unsqueeze(-1).chunk(2, -2)
    return torch.addcmul(low, codes.unflatten(-1, (step.shape[-2], -1)).float(), step).flatten(-2).to(dtype)
