"""All tokens of a text outside fast memory: where a bounded layer reads again what left its slots."""

import errno
import mmap
import os
import shutil
import tempfile
from typing import Any

import torch

PAGE = 64  # tokens


class HostStore:
    """Codes of every token, in host memory (pinned where the model is on CUDA). A layer writes each token
    once, when it enters, and reads tokens by their numbers.

    A token is one record of bytes per KV head, all arrays of its codec side by side. Records lie in pages of
    64 tokens; a sequence is a list of pages. A full page never changes again, so that beams share it: a
    reorder copies the open pages alone. As an argument of a cache a store is a template, of which each layer
    takes a copy.
    """

    table: Any = None  # pages of each sequence, int64 [batch, pages]
    device = "cpu"  # where the pages are
    in_place = True  # whether kernels may read and write them where they are
    mirror: Any = None  # the table where kernels read it, int32 [at least as many pages, batch]
    mirrors: Any = None  # the table that it is a copy of

    def open(self, arrays, shape, pinned=False):
        """Room for a batch, empty.

        arrays: {name: tensor `[..., width]`} as the codec stores them; shape: (batch, num_kv_heads).
        """
        self.layout = [(name, like.shape[-1], like.dtype) for name, like in arrays.items()]
        self.record = sum(width * dtype.itemsize for _, width, dtype in self.layout)  # bytes
        self.batch, self.heads = shape
        self.pinned, self.mirror, self.mirrors = pinned, None, None
        self.close()
        self.clear()

    def clear(self):
        """Forgets every token and keeps the memory."""
        self.table = torch.zeros(self.batch, 0, dtype=torch.int64)  # pages of each sequence
        self.tokens = 0

    def write(self, start, arrays):
        """Stores n tokens from number `start` on, arrays `[batch, num_kv_heads, n, ...]` as `codec.encode`
        gives them. What is written again must lie in the open page. Returns bytes written.

        Raises MemoryError or OSError before anything has changed if there is no room.
        """
        parts = (arrays[name].to(self.device, dtype).contiguous() for name, _, dtype in self.layout)
        records = torch.cat([part.view(torch.uint8) for part in parts], -1)
        end = start + records.shape[2]
        self.reserve(end)
        rows, heads = self._all()
        self.pages[self._at(rows, heads, torch.arange(start, end))] = records
        self.tokens = max(self.tokens, end)
        return records.numel()

    @torch.inference_mode(False)  # tensors that may be written to inside of it and outside
    def reserve(self, end):
        """Takes pages for the tokens before number `end`."""
        more = -(-end // PAGE) - self.table.shape[1]
        if more > 0:
            self.table = torch.cat([self.table, self._free(self.batch * more).view(self.batch, more)], 1)

    def mirrored(self, device):
        """Brings `mirror` up to date, on `device`, without waiting for it; it keeps its address while it is long enough."""
        if self.mirrors is self.table:
            return
        pages, own = self.table.shape[1], self.table.T.to(torch.int32).contiguous()
        if self.mirror is None or len(self.mirror) < pages:
            with torch.inference_mode(False):  # a tensor that may be written to inside of it and outside
                self.mirror = torch.zeros(pages * 3 // 2, self.batch, dtype=torch.int32, device=device)
        self.mirror[:pages].copy_(own.pin_memory() if device.type == "cuda" else own, non_blocking=True)
        self.mirrors = self.table

    def beside(self):
        """Bytes beside the model that kernels need to find a page."""
        return 0 if self.mirror is None else self.mirror.nbytes

    def read(self, rows, heads, tokens):
        """{name: array `[..., width]`} of the tokens with these numbers (int64, shapes that broadcast)."""
        records, start, arrays = self.pages[self._at(rows.cpu(), heads.cpu(), tokens.cpu())], 0, {}
        for name, width, dtype in self.layout:
            size = width * dtype.itemsize
            part = records[..., start : start + size].clone(memory_format=torch.contiguous_format)
            arrays[name] = part.view(dtype) if size else part.to(dtype)
            start += size
        return {name: array.to(tokens.device) for name, array in arrays.items()}

    def reorder(self, index):
        """Row i becomes what row `index[i]` was: full pages are shared, each row has its own open page."""
        self.table = self.table.index_select(0, index.cpu())
        if self.tokens % PAGE:
            shared = self.table[:, -1]
            own = self._free(self.batch)
            self.pages[own] = self.pages[shared]
            self.table = torch.cat([self.table[:, :-1], own[:, None]], 1)

    @staticmethod
    def zeros(*shape, dtype, device):
        """Of zeros, where the pages of a model on `device` lie."""
        return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "pages"}

    def __setstate__(self, state):
        """A copy's pages lie in its own bytes, whether it was copied or pickled."""
        vars(self).update(state)
        if "bytes" in state:
            self._hold(pinned_if(self.pinned, self.bytes))

    def close(self):
        """Gives the memory back."""
        self._hold(torch.zeros(0, dtype=torch.uint8))

    def _hold(self, memory):
        """Bytes, uint8 `[n]`, as pages of records."""
        size = self.heads * PAGE * self.record
        self.bytes, self.pages = memory, memory.view(len(memory) // size, self.heads, PAGE, self.record)

    def nbytes(self):
        """Bytes held, pages to come and the table included."""
        return 0 if self.table is None else self.bytes.numel() + self.table.nbytes

    def _all(self):
        """Every row and head, to be broadcast with tokens."""
        return torch.arange(self.batch)[:, None, None], torch.arange(self.heads)[:, None]

    def _at(self, rows, heads, tokens):
        return self.table[rows, tokens // PAGE], heads, tokens % PAGE

    def _free(self, count):
        """So many pages that no sequence has; memory grows by a half, if it must."""
        taken = torch.zeros(len(self.pages), dtype=torch.bool)
        taken[self.table] = True
        if len(taken) - int(taken.sum()) < count:
            pages = max(int(taken.sum()) + count, len(taken) * 3 // 2)
            self._hold(self._resized(pages * self.heads * PAGE * self.record))
            taken = torch.cat([taken, taken.new_zeros(pages - len(taken))])
        return (~taken).nonzero()[:count, 0]

    def _resized(self, size):
        """`size` bytes, of which the first are those held."""
        if self.pinned:
            torch.cuda.synchronize()  # kernels may be writing to what is copied
        try:
            larger = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise MemoryError(
                f"the host has no {size:,} bytes for a store: take a folder, store='path'"
            ) from error
        larger[: self.bytes.numel()] = self.bytes
        return larger


class FolderStore(HostStore):
    """The same in a memory-mapped file per layer, without a name where the system allows it and readable for
    the owner alone (mode 0600): it is gone when the process ends, however it ends.

    path: an existing folder, on a disk and not in memory.
    """

    in_place = False

    def __init__(self, path):
        if not isinstance(path, (str, os.PathLike)) or not os.path.isdir(path):
            raise ValueError(f"store={path!r} is no folder: make it first, or write store='host'")
        self.path = os.fspath(path)

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("file", None)  # a copy gets a file of its own
        return state | ({"bytes": self.bytes.clone()} if "bytes" in state else {})

    def __setstate__(self, state):
        super().__setstate__(state)
        if "bytes" in state:
            held = self.bytes
            self.close()
            if held.numel():
                self._hold(self._resized(held.numel()).copy_(held))

    def close(self):
        super().close()
        try:
            self.file = tempfile.TemporaryFile(dir=self.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, "the store's folder is gone: make it again", self.path
            ) from error

    def _resized(self, size):
        try:
            if hasattr(
                os, "posix_fallocate"
            ):  # a full disk is told now, not by a signal when pages are written
                os.posix_fallocate(self.file.fileno(), 0, size)
            else:
                self.file.truncate(size)
        except OSError as error:
            free = shutil.disk_usage(self.path).free
            told = f"the store needs {size:,} bytes in {self.path!r}, and {free:,} are free"
            raise OSError(error.errno or errno.ENOSPC, f"{told}: make room or use another folder") from error
        return torch.frombuffer(mmap.mmap(self.file.fileno(), size), dtype=torch.uint8)


def pinned_if(pinned, tensor):
    """A tensor of the host, in memory that kernels can reach if it was `pinned` before it was copied."""
    return tensor.pin_memory() if pinned and not tensor.is_pinned() else tensor


def as_store(store):
    """A store as an object, of "host", a folder's path or an object that is one. Raises ValueError for anything else."""
    if hasattr(store, "reorder") and not isinstance(store, type):
        return store
    return HostStore() if isinstance(store, str) and store == "host" else FolderStore(store)
