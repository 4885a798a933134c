"""Fixed storage for the tokens that one layer keeps."""

import torch

from sketchkv import kernels
from sketchkv.quantize import coder, rotation

EMPTY = -1


class Slots:
    """`capacity` preallocated slots per sequence and KV head, of which the first `used` are occupied.

    Every array is `[batch, num_kv_heads, capacity, ...]`: `keys` and `values` (`[..., head_dim]`, the model's dtype),
    `positions` (int32, the token's position in its text, -1 for an empty slot or a padding token) and whatever a policy
    adds with `add`, which then travels with its token and is zero in a slot that has just been taken. All heads hold the
    same number of tokens, which token is up to each head. The first `kept` slots hold what survived the last eviction, in
    no particular order; those after it hold what came since, in the order of the text.

    Of keys and values, `summary` (`[batch, num_kv_heads, summary_slots, head_dim]` each) lies in front of the slots in
    the same memory, so that attention reads both in one product (`context`); nothing here writes to it.

    With `bits` (of keys and of values), `keys` and `values` hold codes, `keys_scale` and `values_scale` what they mean
    (`sketchkv.quantize`); every token is quantized when it is stored, the newest too. Reading by name gives numbers again,
    in `dtype`; the summary is not quantized. With the quantizer "normal", all vectors that come and go are in the
    coordinates of `rotation` (None: the model's own), and what is coded of a key is its distance from `centre`.
    """

    def __init__(
        self, batch, num_kv_heads, capacity, head_dim, dtype, device, summary_slots=0, bits=None, quantizer="normal"
    ):  # fmt: skip
        self.capacity = capacity
        self.used = self.kept = 0
        self.head_dim, self.dtype, self.device = head_dim, dtype, device
        self.coders, self.rotation, self.centre = {}, None, None
        if bits:
            self.coders = {n: coder(b, head_dim, quantizer, device) for n, b in zip(("keys", "values"), bits)}
        if bits and quantizer == "normal" and min(bits) < 16:
            self.rotation = rotation(head_dim, torch.device(device))
            self.centre = torch.zeros(batch, num_kv_heads, 1, head_dim, dtype=torch.float16, device=device)
        shape = (batch, num_kv_heads, capacity)
        self.arrays = {"positions": torch.full(shape, EMPTY, dtype=torch.int32, device=device)}
        self.summary, self.whole, self.home = {}, {}, None
        for name in ("keys", "values"):
            rows = summary_slots + (0 if self.coders else capacity)
            whole = torch.zeros(batch, num_kv_heads, rows, head_dim, dtype=dtype, device=device)
            self.whole[name], self.summary[name] = whole, whole[:, :, :summary_slots]
            if self.coders:
                example = self.coders[name].encode(torch.zeros(head_dim, device=device))
                for part, like in zip((name, f"{name}_scale"), example):
                    self.arrays[part] = torch.zeros(*shape, len(like), dtype=like.dtype, device=device)
            else:
                self.arrays[name] = whole[:, :, summary_slots:]
        self.kv = self.arrays.keys() - {"positions"}  # names of the arrays that hold keys and values

    keys = property(lambda self: self.arrays["keys"])
    values = property(lambda self: self.arrays["values"])
    positions = property(lambda self: self.arrays["positions"])
    room = property(lambda self: self.capacity - self.used)  # tokens that may enter before something must be done

    def add(self, name, dtype, *size):
        """Adds one number per slot, or `size` of them, under `name`, zero to begin with:
        `[batch, num_kv_heads, capacity, *size]`."""
        if name in self.arrays:  # after a reset: the same memory, where recorded steps expect it
            self.arrays[name].zero_()
        else:
            self.arrays[name] = torch.zeros(*self.positions.shape, *size, dtype=dtype, device=self.positions.device)

    def __getitem__(self, name):
        """The occupied part of an array: `[batch, num_kv_heads, used, ...]`, a view unless it is quantized."""
        return self.read(name, slice(self.used)) if name in self.coders else self.arrays[name].narrow(2, 0, self.used)

    def read(self, name, part):
        """The slots `part` (slice) of an array: `[batch, num_kv_heads, n, ...]`, a view unless it is quantized."""
        return self._decoded(name, lambda array: array[:, :, part])

    def take(self, name, index):
        """Keys or values in the slots `index` (`[batch, num_kv_heads, n]`): `[batch, num_kv_heads, n, head_dim]`."""
        return self._decoded(name, lambda array: gather(array, index))

    def context(self, name):
        """Summary and occupied slots of keys or values: `[batch, num_kv_heads, summary_slots + used, head_dim]`."""
        if self.coders:
            return torch.cat([self.summary[name], self[name]], 2)
        return self.whole[name].narrow(2, 0, self.summary[name].shape[2] + self.used)

    def _decoded(self, name, pick):
        array = pick(self.arrays[name])
        if name not in self.coders:
            return array
        vectors = self.coders[name].decode(array, pick(self.arrays[f"{name}_scale"]), self.dtype)
        return vectors if self.centre is None or name == "values" else vectors.add_(self.centre)

    def append(self, keys, values, positions):
        """Stores n new tokens (`[batch, num_kv_heads, n, head_dim]`; positions `[batch, n]`, `[n]` if all rows have the
        same, or the number of one token's); returns their slots."""
        start, count = self.used, keys.shape[2]
        new = slice(start, start + count)
        clocked = count == 1 and isinstance(positions, torch.Tensor) and positions.shape == (1,)
        if clocked and not self.coders and kernels.usable(positions, recorded=True):
            kernels.append(keys, values, positions, self.keys, self.values, self.positions, start)
            self.used = new.stop
            return new
        for name, vectors in (("keys", keys), ("values", values)):
            self._encode(name, vectors, new)
        stored = self.positions.narrow(2, start, count)
        if isinstance(positions, int):
            stored.fill_(positions)
        else:
            stored.copy_(positions[..., None, :])
        self.used = new.stop
        return new

    def _encode(self, name, vectors, part):
        for each, coded in self._coded(name, vectors).items():
            self.arrays[each].narrow(2, part.start or 0, coded.shape[2]).copy_(coded)

    def _coded(self, name, vectors):
        """What the arrays hold of keys or values `[..., head_dim]`: {name of an array: tensor}."""
        if not self.coders:
            return {name: vectors}
        vectors = vectors if self.centre is None or name == "values" else vectors - self.centre
        return dict(zip((name, f"{name}_scale"), self.coders[name].encode(vectors)))

    def recentre(self, first):
        """Codes all stored keys anew, as distances from the mean key of the tokens at position `first` and later.

        Keys of a head lie around a common point that says nothing of the token, and far from zero: without it their
        distances are coarser than they need be. The same in every slot, it could change no attention.
        """
        keys = self["keys"]
        member = (self["positions"] >= first)[..., None]
        self.centre.copy_((keys * member).sum(2, keepdim=True) / member.sum(2, keepdim=True).clamp(min=1))
        self._encode("keys", keys, slice(self.used))

    def evict(self, evicted, ranks=None):
        """Frees the slots `evicted` (`[batch, num_kv_heads, n]`, distinct indices below `used`). `ranks`, integers
        `[batch, num_kv_heads, used]`, say how the policy orders all tokens: slots that are not all alike want to know.

        The occupied slots must stay a prefix, so survivors of the last n slots move into the holes below: at most n
        tokens are copied, however many are stored.
        """
        count = evicted.shape[-1]
        kept = self.used - count
        evicted = evicted.sort(-1).values
        holes = evicted < kept
        dead = torch.zeros(evicted.shape, dtype=torch.bool, device=evicted.device)
        # Holes below the prefix mark nothing in the tail: they are sent to a column that is dropped.
        dead = torch.cat([dead, dead[..., :1]], -1).scatter_(-1, (evicted - kept).where(~holes, count), True)[..., :-1]
        # As many survivors in the tail as holes below it; stable order pairs the j-th survivor with the j-th hole.
        survivors = kept + dead.to(torch.int8).argsort(dim=-1, stable=True)
        target = torch.where(holes, evicted, survivors)  # past the last hole a slot is copied onto itself
        self._copy(survivors, target)
        for name in self.arrays.keys() - self.kv:
            self.arrays[name][:, :, kept : self.used] = EMPTY if name == "positions" else 0
        self.used = self.kept = kept

    def close(self, evicted):
        """`evict` in one launch per array, of slots chosen by `kernels.lowest`."""
        kept = self.used - evicted.shape[-1]
        for name, array in self.arrays.items():
            kernels.close(array, evicted, kept, None if name in self.kv else EMPTY if name == "positions" else 0)
        self.used = self.kept = kept

    def stretch(self, capacity):
        """As many slots until `shrink`, in memory of their own: for as long as a prompt passes."""
        self.home = self.capacity, self.arrays, self.whole, self.summary
        more, self.capacity = capacity - self.capacity, capacity
        kept, count = self.whole.keys() if not self.coders else (), self.summary["keys"].shape[2]
        self.arrays = {n: _longer(array, more, EMPTY if n == "positions" else 0) for n, array in self.arrays.items() if n not in kept}
        self.whole = {name: _longer(whole, more if kept else 0) for name, whole in self.whole.items()}
        self.summary = {name: whole[:, :, :count] for name, whole in self.whole.items()}
        self.arrays |= {name: self.whole[name][:, :, count:] for name in kept}

    def shrink(self):
        """Takes `stretch` back: what the slots hold moves home, where those occupied must fit."""
        stretched, summary = self.arrays, self.summary
        self.capacity, self.arrays, self.whole, self.summary = self.home
        self.home = None
        for name, array in self.arrays.items():
            array.copy_(stretched[name].narrow(2, 0, self.capacity))
        for name, means in self.summary.items():
            means.copy_(summary[name])

    def _copy(self, source, target):
        """Copies all that is in the slots `source` to the slots `target`, `[batch, num_kv_heads, n]` each."""
        for array in self.arrays.values():
            move(array, source, target)

    def reorder(self, index):
        """Row i becomes what row `index[i]` was, in place (beam search)."""
        for array in self.arrays.values():
            array.copy_(array.index_select(0, index.to(array.device)))
        if self.centre is not None:
            self.centre.copy_(self.centre.index_select(0, index.to(self.device)))

    def clear(self):
        """Empties every slot and keeps the memory."""
        self.used = self.kept = 0
        for array in self.arrays.values():
            array.zero_()
        self.positions.fill_(EMPTY)
        if self.centre is not None:
            self.centre.zero_()

    def nbytes(self, *names):
        """Bytes held by the named arrays."""
        return sum(self.arrays[name].nbytes for name in names)


def _longer(array, more, value=0):
    """A copy with `more` rows of `value` behind the others."""
    return torch.cat([array, array.new_full((*array.shape[:2], more, *array.shape[3:]), value)], 2)


def gather(array, index):
    """What is at `index` (`[batch, num_kv_heads, n]`) in `array` (`[batch, num_kv_heads, slots, ...]`)."""
    return array.gather(2, index[..., None].expand(*index.shape, array.shape[-1]) if array.ndim == 4 else index)


def move(array, source, target):
    """Copies what is at `source` to `target`, indices as of `gather`."""
    moved = gather(array, source)
    array.scatter_(2, target[..., None].expand_as(moved) if array.ndim == 4 else target, moved)
