"""Fixed storage for the tokens that one layer keeps."""

from typing import Any

import torch

EMPTY = -1
MOST_TOKENS = 2**31 - 1  # positions are int32


class Plain:
    """The codec that stores keys and values as they are, in the model's dtype. Every codec has these methods.

    dtype, device: of the model's keys and values.
    """

    settles_after = 0  # tokens after which `settle` is due; 0: never

    def __init__(self, dtype, device):
        self.dtype, self.device = dtype, torch.device(device)

    def arrays(self, name, shape, width):
        """What stores "keys" or "values": {name of an array: zero tensor `[*shape, ...]`}; width: of the vectors."""
        return {name: torch.zeros(*shape, width, dtype=self.dtype, device=self.device)}

    def encode(self, name, vectors):
        """{name of an array: tensor} of vectors `[batch, num_kv_heads, n, width]`."""
        return {name: vectors}

    def decode(self, name, arrays):
        """Vectors, of what `encode` gave."""
        return arrays[name]

    def keep(self, coded, positions, first):
        """Called when new tokens were stored: {"keys", "values": (vectors, what `encode` gave)}; other parameters as of
        `Slots.append`."""

    def near(self, slots, positions):
        """What attention of the queries at `positions` adds to what it reads of the slots: `sketchkv.ring.Near`, or None."""

    def turn(self, query, key, value):
        """Vectors as they are stored and multiplied: no product of a query and a key changes."""
        return query, key, value

    def turn_back(self, output):
        """What attention took from values that were turned."""
        return output

    def settle(self, slots, first, rows=None):
        """Called once per text, `settles_after` tokens after it began, for the `rows` (bool `[batch, 1, 1]`, None: all) where that
        is now. Tokens before position `first` are sinks, or padding."""

    def tensors(self):
        """State of the codec's own, the batch first."""
        return []

    def shared(self):
        """Tensors that all layers share, such as a rotation."""
        return []


class Slots:
    """`capacity` preallocated slots per sequence and KV head, of which the first `used` are occupied.

    Every array is `[batch, num_kv_heads, capacity, ...]`: what `codec` stores of keys and values, `positions` (int32, the
    token's place in its text, -1 for an empty slot or padding) and what a policy adds, which travels with its token and is
    zero in a slot that has just been taken. All heads hold equally many tokens; each head holds its own. The first `kept`
    slots hold what survived the last eviction, in no order; the others what came since, in the text's order.

    shape: (batch, num_kv_heads).
    widths: of key and value vectors.
    """

    served: Any = None  # (policy, whether kernels work on codes that it chooses among)
    coming: Any = None  # what a kernel that stored many tokens left for the attention that comes for them

    def __init__(self, shape, capacity, widths, codec):
        self.shape, self.widths, self.codec = tuple(shape), tuple(widths), codec
        self.dtype, self.device = codec.dtype, codec.device
        self.used = self.kept = 0
        full = (*self.shape, capacity)
        self.arrays = {"positions": torch.full(full, EMPTY, dtype=torch.int32, device=self.device)}
        self.parts = {}  # names of the arrays that store keys and values
        for name, width in zip(("keys", "values"), self.widths, strict=True):
            stored = codec.arrays(name, full, width)
            self.parts[name] = tuple(stored)
            self.arrays |= stored
        self.kv = {part for parts in self.parts.values() for part in parts}

    capacity = property(lambda self: self.arrays["positions"].shape[2])
    room = property(lambda self: self.capacity - self.used, doc="Tokens that may enter before an eviction.")
    positions = property(lambda self: self.arrays["positions"])

    def add(self, name, dtype, *size):
        """Adds one number per slot, or `size` of them, under `name`, zero to begin with."""
        if name in self.arrays:  # after a reset: the same memory, where recorded steps expect it
            self.arrays[name].zero_()
        else:
            self.arrays[name] = torch.zeros(*self.positions.shape, *size, dtype=dtype, device=self.device)

    def __getitem__(self, name):
        """The occupied part of an array: `[batch, num_kv_heads, used, ...]`, a view unless it is coded."""
        return self._decoded(name, lambda array: array.narrow(2, 0, self.used))

    def read(self, name, part):
        """The slots `part` (slice) of an array: `[batch, num_kv_heads, n, ...]`, a view unless it is coded."""
        return self._decoded(name, lambda array: array[:, :, part])

    def take(self, name, index):
        """Keys or values in the slots `index` (`[batch, num_kv_heads, n]`): `[batch, num_kv_heads, n, width]`."""
        return self._decoded(name, lambda array: gather(array, index))

    def _decoded(self, name, pick):
        if name not in self.parts:
            return pick(self.arrays[name])
        return self.codec.decode(name, {part: pick(self.arrays[part]) for part in self.parts[name]})

    def append(self, keys, values, positions, first=0):
        """Stores n new tokens; returns their slots as a slice.

        keys, values: `[batch, num_kv_heads, n, width]`.
        positions: int32 `[batch, n]`, or `[1, n]` if all rows have the same.
        first: position of each row's first real token, int32 `[batch, 1, 1]`, or 0 for all.
        """
        start, count = self.used, keys.shape[2]
        for name, coded in self.coded(keys, values, positions, first).items():
            self.arrays[name].narrow(2, start, count).copy_(coded)
        self.positions.narrow(2, start, count).copy_(positions[:, None])
        self.used = start + count
        return slice(start, self.used)

    def coded(self, keys, values, positions, first=0):
        """{name of an array: tensor} of new tokens, of which the codec takes note. Parameters as of `append`."""
        vectors = {"keys": keys, "values": values}
        coded = {name: (each, self.codec.encode(name, each)) for name, each in vectors.items()}
        self.codec.keep(coded, positions, first)
        return coded["keys"][1] | coded["values"][1]

    def evict(self, evicted):
        """Frees the slots `evicted` (`[batch, num_kv_heads, n]`, distinct indices below `used`).

        The occupied slots must stay a prefix, so survivors of the last n slots move into the holes below: at most n tokens
        are copied, however many are stored.
        """
        count = evicted.shape[-1]
        kept = self.used - count
        evicted = evicted.sort(-1).values
        holes = evicted < kept
        # Holes below the prefix mark nothing in the tail: they are sent to a column that is dropped.
        dead = torch.zeros(*evicted.shape[:-1], count + 1, dtype=torch.bool, device=self.device)
        dead = dead.scatter_(-1, (evicted - kept).where(~holes, count), True)[..., :-1]
        # As many survivors in the tail as holes below it; stable order pairs the j-th survivor with the j-th hole.
        survivors = kept + dead.to(torch.int8).argsort(dim=-1, stable=True)
        target = torch.where(holes, evicted, survivors)  # past the last hole a slot is copied onto itself
        for name, array in self.arrays.items():
            moved = gather(array, survivors)
            array.scatter_(2, target[..., None].expand_as(moved) if array.ndim == 4 else target, moved)
            if name not in self.kv:
                array[:, :, kept : self.used] = EMPTY if name == "positions" else 0
        self.used = self.kept = kept

    def widened(self, capacity):
        """A copy with `capacity` slots, for as long as a prompt passes; `adopt` takes back what it holds then."""
        wide = Slots(self.shape, capacity, self.widths, self.codec)
        for name, array in self.arrays.items():
            if name not in wide.arrays:
                wide.add(name, array.dtype, *array.shape[3:])
            wide.arrays[name][:, :, : self.used] = array[:, :, : self.used]
        wide.used, wide.kept = self.used, self.kept
        return wide

    def adopt(self, other):
        """Takes over what `other`, a wider copy, holds: no more than there are slots here."""
        for name, array in self.arrays.items():
            array.copy_(other.arrays[name][:, :, : self.capacity])
        self.used, self.kept = other.used, other.kept

    def tensors(self):
        """All tensors that belong to this text, the batch first."""
        return [*self.arrays.values(), *self.codec.tensors()]

    def clear(self):
        """Empties every slot and keeps the memory."""
        self.used = self.kept = 0
        for tensor in self.tensors():
            tensor.zero_()
        self.positions.fill_(EMPTY)

    def nbytes(self, *names):
        """Bytes held by the named arrays."""
        return sum(self.arrays[name].nbytes for name in names)


def gather(array, index):
    """What is at `index` (`[batch, num_kv_heads, n]`) in `array` (`[batch, num_kv_heads, slots, ...]`)."""
    index = index[..., None].expand(*index.shape, array.shape[-1]) if array.ndim == 4 else index
    return array.gather(2, index)
