"""Slots against a plain list of tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv.slots import Plain, Slots

PLAIN = Plain(torch.float32, "cpu")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 4))
def test_evict_keeps_exactly_the_others(kept, extra, seed, rounds):
    generator = torch.Generator().manual_seed(seed)
    batch, heads = 2, 3
    slots = Slots((batch, heads), kept + extra, (4, 4), PLAIN)
    slots.add("mass", torch.float32)
    model = [[set() for _ in range(heads)] for _ in range(batch)]
    seen = 0
    for _ in range(rounds):
        count = slots.capacity - slots.used
        positions = torch.arange(seen, seen + count)
        keys = positions[:, None].float().expand(batch, heads, count, 4)
        new = slots.append(keys, -keys, positions.expand(batch, count).int())
        slots.arrays["mass"][:, :, new] = positions.float()
        seen += count
        evicted = torch.rand(batch, heads, slots.used, generator=generator).topk(extra).indices
        for b in range(batch):
            for h in range(heads):
                model[b][h] |= set(positions.tolist())
                model[b][h] -= set(slots.positions[b, h, evicted[b, h]].tolist())
        slots.evict(evicted)
        assert slots.used == kept
        for b in range(batch):
            for h in range(heads):
                assert set(slots["positions"][b, h].tolist()) == model[b][h]
        # What belongs to a token moved with it.
        position = slots["positions"].float()
        assert torch.equal(slots["mass"], position)
        assert torch.equal(slots["keys"], position[..., None].expand(*position.shape, 4))
        assert torch.equal(slots["values"], -slots["keys"])
        assert (slots.positions[:, :, kept:] == -1).all()


def test_memory_stays_where_it_is():
    slots = Slots((1, 1), 8, (4, 4), PLAIN)
    addresses = {name: array.data_ptr() for name, array in slots.arrays.items()}
    slots.append(torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8, 4), torch.arange(8)[None].int())
    slots.evict(torch.tensor([[[0, 3, 7]]]))
    slots.clear()
    assert {name: array.data_ptr() for name, array in slots.arrays.items()} == addresses
    assert slots.used == 0 and (slots.positions == -1).all() and not slots.arrays["keys"].any()
