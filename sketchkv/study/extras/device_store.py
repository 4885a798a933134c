"""A store on the model's own device: what recall gives is the same, and long texts are scored in a fraction of the time."""

from typing import Any

import torch

from sketchkv.store import HostStore


class DeviceStore(HostStore):
    """For measurements of quality alone: it saves no fast memory, and `nbytes` counts it as if it were the host's."""

    arrays: Any = None

    def open(self, arrays, shape, pinned=False):
        self.arrays = {name: like.new_zeros(*shape, 0, like.shape[-1]) for name, like in arrays.items()}
        self.tokens = 0

    def clear(self):
        self.tokens = 0

    def write(self, start, arrays):
        end = start + next(iter(arrays.values())).shape[2]
        for name, held in self.arrays.items():
            if held.shape[2] < end:
                more = held.new_zeros(*held.shape[:2], max(end - held.shape[2], 1024), held.shape[3])
                self.arrays[name] = held = torch.cat([held, more], 2)
            held[:, :, start:end] = arrays[name].to(held.dtype)
        self.tokens = max(self.tokens, end)
        return sum(array.nbytes for array in arrays.values())

    def read(self, rows, heads, tokens):
        return {name: held[rows, heads, tokens] for name, held in self.arrays.items()}

    def reorder(self, index):
        for name, held in self.arrays.items():
            self.arrays[name] = held.index_select(0, index.to(held.device))

    def nbytes(self):
        return sum(held.nbytes for held in (self.arrays or {}).values())
