"""Checks of what users hand in, so that one kind of fault has one wording."""

import contextlib
import dataclasses
import numbers
import operator
import os
import warnings
from collections.abc import Hashable
from functools import lru_cache, partial
from typing import Any, TypeGuard

import torch

from sketchkv.slots import MOST_TOKENS, Plain, Slots


def whole(name, value, least, most=None):
    """`value` as an int: whole numbers of numpy and torch count, booleans of either don't.

    Raises ValueError that names `name` and what it may be.
    """
    try:
        number = None if _boolean(value) else operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        limits = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name} must be a whole number, {limits}; got {value!r}")
    return number


def refuses(why):
    """A method of a layer that raises NotImplementedError: what a bounded cache can't do, and what to do."""

    def refuse(self, *_):
        raise NotImplementedError(f"a bounded cache {why}")

    return refuse


def real(value) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or numpy."""
    return isinstance(value, numbers.Real)


def share(name, value, hint=""):
    """`value` as a float in (0, 1]. Raises ValueError that names `name`; `hint` is added to the message."""
    least = torch.finfo(torch.float32).tiny  # what is below is 0 on some devices
    if _boolean(value) or not real(value) or not least <= value <= 1:
        raise ValueError(f"{name} must be a number in (0, 1], not below {least:.1e}; got {value!r}{hint}")
    return float(value)


def flag(name, value):
    """`value` as a bool if it is one, of numpy or torch too, else a ValueError that names `name`: a string "false" would
    count as true."""
    if not _boolean(value) or getattr(value, "ndim", 0) > 0:
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def seed(value):
    """A seed as an int that random generators take."""
    return whole("seed", value, -(2**63), 2**63 - 1)


def device(value):
    """A torch device; None is the CPU."""
    try:
        return torch.device("cpu" if value is None else value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be one of torch's, such as 'cpu' or 'cuda', got {value!r}") from None


@lru_cache(16)
def slot_nbytes(codec, dtype, widths):
    """Bytes of one slot; codec: a function of (dtype, device), as of `SketchCache`."""
    slots = Slots((1, 1), 1, widths, codec(dtype, torch.device("cpu")))
    return slots.nbytes(*slots.arrays)


def memory(needed, device, remedy):
    """Raises ValueError, with the remedy, if `needed` bytes are more than all memory of the device: allocators' own messages
    name neither, and a CPU's process may be killed without one."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > total:
        raise ValueError(
            f"{needed / 2**30:.3g} GiB are needed, {device} has {total / 2**30:.3g} GiB of memory: {remedy}"
        )


def told(value):
    """What an error tells of a wrong value: the dtype and shape of a tensor, the class of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _boolean(value):
    return "bool" in str(getattr(value, "dtype", type(value)))


def rows(index, count, length=None):
    """Raises ValueError unless `index` is a tensor of whole numbers in [0, count), of so many if `length` is given: rows of a
    batch to go on with."""
    sound = isinstance(index, torch.Tensor) and index.dim() == 1 and index.dtype in (torch.int32, torch.int64)
    if sound and index.device.type == "cpu" and index.numel():
        sound = 0 <= index.min() <= index.max() < count
    if not sound or length not in (None, len(index)):
        raise ValueError(
            f"rows must be an int64 tensor [{'n' if length is None else length}] of numbers from 0 to {count - 1}, "
            f"got {index!r}"
        )


# Of a cache


@dataclasses.dataclass
class Settings:
    """What the layers of a cache have in common; `sketchkv.SketchCache` says what each means.

    Raises ValueError for a value out of range.
    """

    num_sinks: int = 4
    recent_window: int = 16
    evict_every: int = 16
    prefill_chunk: int | None = None
    attend_topk: int | None = None
    codec: Any = Plain

    def __post_init__(self):
        for name, least, optional in (
            ("num_sinks", 0, False),
            ("recent_window", 0, False),
            ("evict_every", 1, False),
            ("prefill_chunk", self.evict_every, True),
            ("attend_topk", 1, True),
        ):
            if not optional or getattr(self, name) is not None:
                setattr(self, name, whole(name, getattr(self, name), least, MOST_TOKENS))

    def leave_room(self, caps):
        """`caps`, one per layer, as ints, if there is something to choose below each. Raises ValueError where all is protected,
        and for an `attend_topk` that chooses nothing, or more than there is."""
        caps = [whole("max_cache_size", cap, 1, MOST_TOKENS) for cap in caps]
        least = self.num_sinks + self.recent_window
        beside = f"beside {self.num_sinks} sinks and a recent window of {self.recent_window}"
        if min(caps) <= least:
            raise ValueError(
                f"max_cache_size={min(caps)} leaves nothing to choose {beside}: "
                f"raise the cap above {least} or lower num_sinks, recent_window"
            )
        if self.attend_topk is not None:
            if self.attend_topk <= least:
                raise ValueError(
                    f"attend_topk={self.attend_topk} leaves nothing to choose {beside}, which are always attended to: "
                    f"raise it above {least}"
                )
            if self.attend_topk > max(caps):
                raise ValueError(
                    f"attend_topk={self.attend_topk} is more than max_cache_size={max(caps)}, all that an eviction leaves: "
                    "lower it, or leave it out to attend to all"
                )
        return caps


def codec_of(bits, codec):
    if bits is None:
        codec, made = Plain if codec is None else codec, None
        with contextlib.suppress(TypeError):  # another number of parameters, or nothing that can be called
            made = codec(torch.float32, torch.device("cpu"))
        if not (hasattr(made, "encode") and hasattr(made, "arrays")):
            raise TypeError(
                "codec must be a function of (dtype, device) that gives a codec, such as sketchkv.slots.Plain or "
                f"sketchkv.quantize.quantized(bits); got {codec!r}"
            )
        return codec if isinstance(codec, Hashable) else partial(codec)  # whose bytes are counted once
    if codec is not None:
        raise TypeError("give either bits= or codec=, not both")
    from sketchkv.quantize import quantized

    return quantized(bits)


def fitting(index, summary, windows, **others):
    """Raises TypeError for what is no index or no summary and for two that do not fit each other, ValueError for `others`
    that an index leaves nothing to do, and where all layers have `windows` (None: a layer has none)."""
    if index is None:
        if not _made(summary, "fold"):
            raise TypeError(
                f"summary must be a sketchkv.summary.Summary, such as Summary(1), or None; got {summary!r}"
            )
        if hasattr(summary, "stand_for"):
            raise TypeError(
                "a Tail stands for what an index leaves out, and there is no index: take SketchCache.recall or give "
                "index=sketchkv.index.KeyIndex(); a Summary() stands for what was evicted"
            )
        return
    if not _made(index, "choose"):
        raise TypeError(
            f"index must be a sketchkv.index.KeyIndex, such as KeyIndex(top=256), or None; got {index!r}"
        )
    if not _made(summary, "stand_for"):
        raise TypeError(
            "with an index nothing is evicted for good that a Summary could stand for: give summary=sketchkv.tail.Tail(), "
            f"which stands for what a query leaves out, or None; got {summary!r}"
        )
    if None not in windows:
        raise ValueError(
            "all layers of this model have sliding windows, and an index has nothing to bring back: take SketchCache.compact "
            "or leave index= out"
        )
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(
            f"index and {', '.join(given)} exclude each other: with an index the query decides what is attended to, "
            "slots attended to longest ago are overwritten, and prompts pass exactly (SketchCache.recall has what fits)"
        )


def _made(part, method):
    """Whether `part` is None, or an object and no class that has the method."""
    return part is None or (not isinstance(part, type) and hasattr(part, method))


def per_layer(name, value, count):
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        kind = TypeError if name == "policy" else ValueError
        raise kind(
            f"{name} must be one for all layers or a list of {count}, one per layer; got {len(values)}"
        )
    return values


def checked_scores(scores, layer):
    """What a policy's `score` gave. Raises ValueError unless it is one real number per stored token."""
    shape = layer.slots["positions"].shape
    if not isinstance(scores, torch.Tensor) or scores.shape != shape or scores.is_complex():
        raise ValueError(
            f"{type(layer.policy).__name__}.score() must return one number per stored token, {list(shape)}; "
            f"got {told(scores)}"
        )
    return scores


def policies_of(policy, count):
    """One policy per layer, of one for all, a list or None, the sketch. Raises TypeError for what is none."""
    from sketchkv.policies import Policy

    if policy is None:
        from sketchkv.sketch_policy import Sketch

        policy = Sketch()
    policies = per_layer("policy", policy, count)
    if not all(isinstance(each, Policy) for each in policies):
        raise TypeError(
            f"policy must be a sketchkv Policy, or a list of {count}, one per layer; got {policy!r}"
        )
    return policies


# Of a forward pass

MASK = (
    "attention_mask must be 0 for padding on the left of a row and 1 from its first token on: "
    "pad on the left, and hide no token that the cache has seen"
)


def checked_mask(mask, batch, tokens):
    """`mask` as bool, if it is one of `tokens` tokens, 0 or 1; values are looked at on a CPU only."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise ValueError(
            f"SketchCache takes a 2-D attention_mask [batch, tokens so far] or none, got {told(mask)}: 4-D masks cannot say "
            "which evicted tokens they mean"
        )
    if mask.shape != (batch, tokens):
        raise ValueError(
            f"attention_mask must be [batch, tokens so far], here {[batch, tokens]}, got {list(mask.shape)}: "
            "the cache may hold another text (cache.reset() forgets it)"
        )
    ones = mask == 1
    if mask.device.type == "cpu" and not bool(ones.all()) and not bool((ones | (mask == 0)).all()):
        raise ValueError(MASK)
    return ones


def begins(mask, first, start):
    """Where the text of each row begins, by a mask that must be 0 for padding in front of it alone.

    mask: bool `[batch, tokens so far]`.
    first: what was known before, int32 `[batch]`, -1 for a row without a real token yet, or None if none has padding.
    start: tokens seen before.
    Returns (first, wrong); wrong: None, or bool `[]` on a device where looking waits. Raises ValueError for another mask.
    """
    # On CUDA looking makes the host wait: a step of one token, which is no padding, is left to `Passes.check`.
    late = mask.is_cuda and start > 0 and mask.shape[1] == start + 1
    if first is None and not late and bool(mask.all()):
        return None, None
    found = torch.where(mask.any(-1), mask.int().argmax(-1), -1).int()
    if first is None:
        known = torch.zeros_like(found) if start else found
    else:
        known = torch.where(first < 0, found, first)
    told = torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    wrong = (mask != ((told >= known[:, None]) & (known[:, None] >= 0))).any()
    if late:
        return (None if first is None else known), wrong
    if wrong:
        raise ValueError(MASK)
    return known, None


def checked_inputs(inputs, are_ids, seen):
    """Raises ValueError unless `inputs` are ids `[batch, n]` or embeddings `[batch, n, width]` of new tokens."""
    if not isinstance(inputs, torch.Tensor) or inputs.ndim != 3 - are_ids or 0 in inputs.shape:
        hint = f": the cache has seen {seen} tokens (cache.reset() forgets them)" if seen else ""
        raise ValueError(
            "with a SketchCache, input_ids must be a tensor [batch, tokens], or inputs_embeds "
            f"[batch, tokens, width], with at least one new token; got {told(inputs)}{hint}"
        )


class Length:
    """How long a text may be.

    config: of the decoder.
    """

    def __init__(self, config):
        self.max_positions = getattr(config, "max_position_embeddings", None)
        # Without rotary embeddings, positions are rows of a table that ends.
        self.positions_end = getattr(config, "rope_parameters", None) is None

    def check(self, end, count, position_ids):
        """Raises ValueError for a pass of `count` tokens after which `end` were seen, if that is too many or its `position_ids`
        (`[batch, count]` or None) lie beyond the model's; warns where a rotary model passes the length it was made for."""
        if end > MOST_TOKENS:
            raise ValueError(
                f"a text may have {MOST_TOKENS} tokens at most, since positions are int32; this one has {end}"
            )
        if self.max_positions is None:
            return
        if self.positions_end and position_ids is not None and position_ids.device.type == "cpu":
            low, high = position_ids.aminmax()
            if low < 0 or (high >= self.max_positions and end <= self.max_positions):
                raise ValueError(
                    f"position_ids must be in [0, {self.max_positions}), the model's positions; got {low} to {high}"
                )
        if end <= self.max_positions:
            return
        # Left padding makes positions smaller than the number of tokens; looking at them is dear, so only here.
        last = end - 1 if position_ids is None else int(position_ids.max())
        if last >= self.max_positions and self.positions_end:
            raise ValueError(
                f"the text reaches position {last}, but the model has only {self.max_positions} (0 to "
                f"{self.max_positions - 1}): shorten the text or use a model with rotary positions"
            )
        if last - count < self.max_positions <= last:  # once in a text
            warnings.warn(
                f"position {last} lies beyond the {self.max_positions} that the model was made for",
                stacklevel=2,
            )


FACTOR = (
    6364136223846793005  # of a linear congruential generator modulo 2^64 (Knuth): odd, and spreads low bits
)


def digest(ids, before=0):
    """A number per row that tells texts apart, int64 `[batch]`: of what `before` is the digest of, followed by `ids`
    (int64 `[batch, n]`)."""
    if ids.shape[1] == 1:
        return before * FACTOR + ids[:, 0]
    powers = torch.full((ids.shape[1],), FACTOR, dtype=torch.int64, device=ids.device).cumprod(0)
    own = ids[:, -1] + (ids[:, :-1] * powers[:-1].flip(0)).sum(1)
    return before * powers[-1] + own
