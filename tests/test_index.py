"""The index of keys: no bias, the proven error, NumPy in float64 beside it; padding, chunks, beams, bytes."""

import math

import numpy as np
import pytest
import torch
from exact import ExactKeys
from hypothesis import given, settings
from hypothesis import strategies as st

from sketchkv.index import GROWTH, KeyIndex, lookup
from sketchkv.quantize import Normal, matrix, normal_levels, rotation, unpack

KINDS = [KeyIndex, ExactKeys]
DIMS = [8, 16, 24, 64, 80, 128]  # powers of two have a Hadamard rotation, the others a random one


def turn(head_dim):
    return matrix(rotation(head_dim, torch.device("cpu")), torch.float32)


def filled(index, keys, positions=None):
    index.add(keys, torch.arange(keys.shape[2])[None] if positions is None else positions)
    return index


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(vector):
    """To 4 bits a coordinate: the nearest of 16 levels of a normal distribution, times one scale."""
    levels = normal_levels(4).numpy()
    spread = np.sqrt(np.mean(vector**2))
    near = levels[np.abs(vector[:, None] / spread - levels).argmin(1)]
    return np.float64(np.float16(vector @ near / (near @ near))) * near


def by_hand(keys, query, positions, block, num_sinks):
    """One head's estimates, token by token, float64: keys `[tokens, d]`, query `[d]`."""
    d = keys.shape[1]
    turned = turn(d).double().numpy()
    estimates = []
    for token, key in enumerate(keys):
        first = token // block * block
        if first + block > len(keys):
            estimates.append(key @ query)
            continue
        counted = [keys[i] for i in range(first, first + block) if positions[i] >= num_sinks]
        centre = rounded(np.mean(counted, 0) @ turned) if counted else np.zeros(d)
        away = key @ turned - centre
        total = sum((query @ turned)[i] * (1 if away[i] > 0 else -1) for i in range(d))
        estimates.append(centre @ (query @ turned) + away @ away / np.abs(away).sum() * total)
    return np.array(estimates)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(DIMS), st.integers(1, 90), st.integers(0, 20), st.integers(0, 5), st.integers(0, 2**31)
)
def test_estimates_are_those_of_the_formula(head_dim, tokens, pads, num_sinks, seed):
    keys = normal(2, 2, tokens, head_dim, seed=seed) * 2 + normal(1, 2, 1, head_dim, seed=seed + 1) * 3
    keys, query = keys.half().float(), normal(2, 6, 3, head_dim, seed=seed + 2)
    number = torch.arange(tokens)
    positions = torch.stack([number, number.masked_fill(number < pads, -1)])
    scores = filled(KeyIndex(block=16, num_sinks=num_sinks), keys, positions).scores(query)
    assert scores.shape == (2, 2, 3, 3, tokens) and scores.dtype == torch.float32
    for row, head, group, n in [(0, 0, 0, 0), (0, 1, 2, 1), (1, 0, 1, 2), (1, 1, 0, 0)]:
        asked = query[row, head * 3 + group, n].double().numpy()
        expected = by_hand(
            keys[row, head].double().numpy(), asked, positions[row].numpy(), 16, num_sinks + row * pads
        )
        # A factor is rounded to float16: its relative error times the sum that it multiplies.
        scale = np.linalg.norm(asked) * keys[row, head].norm(dim=-1).max().item()
        assert np.abs(scores[row, head, group, n].numpy() - expected).max() < 2e-3 * scale


def estimates_over_rotations(length, along, aside, head_dim, count=2048, seed=0, **options):
    """Estimates of one product after `count` random rotations of the space, float64 `[count]`.

    The key has this length; of the query, `along` lies along the key, `aside` at a right angle. Turned at
    random, the two directions are random orthonormal vectors.
    """
    first, second = normal(2, count, head_dim, seed=seed)
    first = first / first.norm(dim=-1, keepdim=True)
    second = second - (second * first).sum(-1, keepdim=True) * first
    keys, queries = length * first, along * first + aside * second / second.norm(dim=-1, keepdim=True)
    keys = torch.stack([keys, -keys], 1).flatten(0, 1)  # pairs, so that every centre is zero
    index = filled(KeyIndex(num_sinks=0, block=64, **options), keys.view(count // 32, 1, 64, head_dim))
    scores = index.scores(queries.view(count // 32, 1, 32, head_dim))[:, 0, 0, :, ::2]
    return scores.diagonal(dim1=1, dim2=2).flatten().double()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(DIMS),
    st.sampled_from([1, 2, 4]),
    st.floats(-3, 3),
    st.floats(0, 3),
    st.floats(-3, 3),
    st.integers(0, 2**31),
)
def test_no_bias_over_random_rotations(head_dim, bits, along, aside, magnitude, seed):
    length = 10**magnitude
    estimates = estimates_over_rotations(length, along, aside, head_dim, seed=seed, bits=bits)
    # Four and a half standard errors, and what float16 takes from a factor.
    allowed = 4.5 * estimates.std() / len(estimates) ** 0.5 + 1e-3 * length * (abs(along) + aside) + 2**-20
    assert abs(estimates.mean() - length * along) < allowed


def test_the_test_of_bias_finds_one():
    """The factor of least squares, sum|k| / d, is short by about 2 / pi."""
    estimates = estimates_over_rotations(8, 1, 0.5, 64)
    error = estimates.std().item() / len(estimates) ** 0.5
    assert abs(estimates.mean().item() - 8) < 4.5 * error + 8e-3
    assert abs(2 / math.pi * estimates.mean().item() - 8) > 10 * error


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128, 256])
def test_the_error_is_what_was_proven_and_falls_with_the_dimension(head_dim):
    """RaBitQ, theorem 3.2: with b the cosine of a key and its signs, sqrt(2 / pi) on average, the error of
    unit vectors at a right angle has variance (1 / b^2 - 1) / (d - 1), and far errors are rare.
    """
    error = estimates_over_rotations(1, 0, 1, head_dim, count=8192)
    expected = math.sqrt((math.pi / 2 - 1) / (head_dim - 1))
    assert error.square().mean().sqrt().item() == pytest.approx(expected, rel=0.08)
    assert (error.abs() > 4 * expected).double().mean() < 1e-3
    finer = [estimates_over_rotations(1, 0, 1, head_dim, bits=bits).std() for bits in (1, 2, 4)]
    assert finer[0] > 1.8 * finer[1] > 3.2 * finer[2]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DIMS), st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_a_lookup_per_byte_is_the_product_of_what_is_unpacked(head_dim, bits, seed):
    index = filled(KeyIndex(bits=bits, block=16), normal(2, 3, 48, head_dim, seed=seed))
    query = normal(2, 3, 5, head_dim, seed=seed + 1)
    assert index.used("signature").shape[-1] == head_dim * bits // 8
    levels = index.coder.levels[unpack(index.used("signature"), bits).int()]
    torch.testing.assert_close(lookup(index, query), query @ levels.transpose(-1, -2), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("bits", [3, 5])
def test_a_signature_is_the_top_plane_of_the_codes(bits):
    """`pack` holds the top plane of odd bits apart: codes around the same centre hold the signature."""
    index = filled(KeyIndex(block=16, num_sinks=0), normal(1, 2, 32, 64))
    turned = normal(1, 2, 32, 64) @ turn(64)
    away = turned.unflatten(2, (-1, 16)) - index.centre()[..., None, :]
    codes, _ = Normal(bits, "cpu").encode(away.flatten(2, 3))
    assert torch.equal(codes[..., -8:], index.used("signature"))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DIMS), st.floats(-3, 3), st.integers(0, 2**31))
def test_along_a_key_and_along_its_signs_nothing_is_lost(head_dim, magnitude, seed):
    keys = normal(1, 1, 16, head_dim, seed=seed) * 10**magnitude
    index = filled(KeyIndex(block=16, num_sinks=0), keys)
    away = keys - index.centre() @ turn(head_dim).T
    exact = (away @ keys.transpose(-1, -2)).diagonal(dim1=2, dim2=3)
    estimate = index.scores(away)[:, :, 0].diagonal(dim1=2, dim2=3)
    torch.testing.assert_close(estimate, exact, rtol=3e-3, atol=3e-3 * exact.abs().max().item())
    # Keys whose rotated coordinates are all of one size lose nothing to their signs: exact for every query.
    signs = torch.where(normal(1, 1, 8, head_dim, seed=seed) > 0, 1.0, -1.0)
    keys = torch.cat([signs, -signs], 2) @ turn(head_dim).T
    query = normal(1, 1, 4, head_dim, seed=seed + 1)
    index = filled(KeyIndex(block=16, num_sinks=0), keys)
    torch.testing.assert_close(
        index.scores(query)[:, :, 0], query @ keys.transpose(-1, -2), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_text_make_the_same_index(kind):
    keys, query = normal(2, 2, 3 * GROWTH // 2, 16), normal(2, 4, 1, 16, seed=1)
    whole = filled(kind(top=50), keys)
    parts, start = kind(top=50), 0
    for count in (1, 5, 200, 63, 64, 65, GROWTH, keys.shape[2]):
        part = slice(start, min(start + count, keys.shape[2]))
        parts.add(keys[:, :, part], torch.arange(part.start, part.stop)[None])
        start = part.stop
    assert torch.equal(whole.positions(whole.seen), parts.positions(parts.seen))
    for name in whole.arrays.keys() - {"positions"}:
        assert torch.equal(whole.arrays[name], parts.arrays[name])
    assert torch.equal(whole.choose(query, 0.25, 4), parts.choose(query, 0.25, 4))
    assert whole.nbytes() == parts.nbytes()


@pytest.mark.parametrize("pooling", ["softmax", "max", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_tokens_out_of_range_are_never_chosen(kind, pooling):
    pads, keys = 37, normal(2, 2, 200, 16)
    positions = torch.stack([torch.arange(200), (torch.arange(200) - pads).clamp(min=-1)])
    query, end = keys[:, :, :3].repeat_interleave(2, 1) * 100, torch.tensor([[90, 4, 300], [60, 2, 300]])
    keys[1, :, :pads] = query[1, ::2, :1] * 100  # what every query would look at first
    index = filled(kind(top=150, pooling=pooling), keys, positions)
    chosen = index.choose(query, 0.25, start=4, end=end)
    assert chosen.shape == (2, 2, 3, 150)
    for row in range(2):
        for n in range(3):
            allowed = (positions[row] >= 4) & (positions[row] < end[row, n])
            for head in range(2):
                of_head = chosen[row, head, n]
                real = of_head[of_head >= 0]
                assert allowed[real].all() and len(real.unique()) == len(real) == min(150, int(allowed.sum()))
                assert (of_head[len(real) :] == -1).all()


def test_positions_are_held_from_the_first_that_do_not_follow_those_before():
    keys, query = normal(2, 2, 100, 16), normal(2, 4, 2, 16, seed=1)
    told, follow = filled(KeyIndex(top=30, block=16), keys), KeyIndex(top=30, block=16)
    follow.add(keys[:, :, :70])
    assert "positions" not in follow.arrays
    follow.add(keys[:, :, 70:], torch.arange(70, 100)[None].expand(2, -1))
    assert torch.equal(follow.positions(100).expand(2, -1, -1), told.positions(100))
    assert torch.equal(follow.rank(query, 0.25, 4), told.rank(query, 0.25, 4))
    follow.reset()
    follow.add(keys)
    assert torch.equal(follow.rank(query, 0.25, 4), told.rank(query, 0.25, 4))


def test_of_equal_tokens_the_newer_are_chosen():
    index = filled(KeyIndex(top=20, block=16), torch.zeros(1, 2, 100, 16))
    chosen = index.choose(normal(1, 2, 3, 16), 0.25, 4, torch.tensor([[90, 60, 20]]))
    for n, end in enumerate((90, 60, 20)):
        assert (chosen[0, :, n].sort(-1).values[:, -16:] == torch.arange(end - 16, end)).all()


def test_keys_of_padding_leave_no_trace_even_if_they_are_not_finite():
    keys, query = normal(2, 2, 100, 16), normal(2, 4, 2, 16, seed=1)
    positions = torch.stack([torch.arange(100), (torch.arange(100) - 20).clamp(min=-1)])
    clean = filled(KeyIndex(top=30, block=32), keys, positions).rank(query, 0.25)
    keys[1, :, :20] = torch.nan
    assert torch.equal(filled(KeyIndex(top=30, block=32), keys, positions).rank(query, 0.25), clean)


@pytest.mark.parametrize("pooling", ["softmax", "max", "sum"])
def test_ranks_and_choice_are_those_of_numpy(pooling):
    keys, query = normal(2, 3, 150, 16).half().float(), normal(2, 6, 4, 16, seed=1) * 3
    resident = normal(2, 6, 4, seed=2) + 4
    index = filled(ExactKeys(top=20, pooling=pooling), keys)
    ranks = index.rank(query, 0.25, 4, torch.full((1, 4), 140), resident).numpy()
    chosen = index.choose(query, 0.25, 4, torch.full((1, 4), 140), resident).numpy()
    for row, head, n in np.ndindex(2, 3, 4):
        logits = np.array(
            [
                keys[row, head, 4:140].double() @ query[row, h, n].double() * 0.25
                for h in (2 * head, 2 * head + 1)
            ]
        )
        around = np.exp(resident[row, [2 * head, 2 * head + 1], n].double().numpy())
        share = np.exp(logits) / (np.exp(logits).sum(1) + around)[:, None]
        expected = {"softmax": share.sum(0), "max": logits.max(0), "sum": logits.sum(0)}[pooling]
        np.testing.assert_allclose(ranks[row, head, n, 4:140], expected, rtol=2e-4, atol=1e-5)
        assert np.isneginf(np.delete(ranks[row, head, n], slice(4, 140))).all()
        assert set(chosen[row, head, n]) == set(4 + np.argsort(-expected)[:20])


@pytest.mark.parametrize("kind", KINDS)
def test_beams_take_their_rows_along_and_a_reset_forgets(kind):
    keys, query, index = normal(3, 2, 150, 16), normal(3, 4, 2, 16, seed=1), kind(top=20)
    filled(index, keys)
    before, held = index.scores(query), index.nbytes()
    order = torch.tensor([2, 0, 0])
    index.reorder(order)
    torch.testing.assert_close(index.scores(query[order]), before[order])
    index.reset()
    assert index.nbytes() == held
    other = normal(3, 2, 90, 16, seed=5)
    torch.testing.assert_close(filled(index, other).scores(query), filled(kind(top=20), other).scores(query))
    index.reset()
    fewer = normal(1, 2, 70, 16, seed=6)
    assert filled(index, fewer).scores(query[:1]).shape == (1, 2, 2, 2, 70)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bytes_are_those_of_the_signatures_factors_and_centres(bits):
    index = KeyIndex(bits=bits, block=64)
    assert index.nbytes() == 0
    filled(index, normal(2, 3, 5000, 64).bfloat16())
    room = -(-5000 // GROWTH) * GROWTH
    per_token = 64 * bits / 8 + 2 + (64 * 4 / 8 + 2) / 64  # signature, factor, a centre for 64
    assert index.nbytes() == 2 * (3 * room * per_token + 4 * room)
    assert index.pending.nbytes == 2 * 3 * 64 * 64 * 2  # with the store


def test_bad_input_is_told():
    for options in (dict(top=0), dict(bits=3), dict(pooling="mean"), dict(block=10)):
        with pytest.raises(ValueError, match="must be"):
            KeyIndex(**options)
    with pytest.raises(ValueError, match="multiple of 8"):
        filled(KeyIndex(), normal(1, 1, 3, 12))
    index = filled(KeyIndex(), normal(1, 1, 3, 16))
    with pytest.raises(ValueError, match="finish one batch"):
        filled(index, normal(2, 1, 3, 16))


def test_a_centre_holds_far_away():
    """Keys with one mean before the rotary embedding: after it, the mean depends on the position."""
    tokens, angles = 33 * GROWTH, 100_000 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = (torch.arange(tokens)[:, None] * angles).repeat(1, 2)
    keys = normal(tokens, 64) + 3 * normal(64, seed=1)
    half = torch.cat([-keys[:, 32:], keys[:, :32]], -1)
    keys = (keys * angles.cos() + half * angles.sin()).float()[None, None]
    query = normal(1, 1, 32, 64, seed=2)
    index, bare = KeyIndex(), KeyIndex(num_sinks=tokens)  # to the second, all tokens are sinks: no centre
    for part in keys.split(4 * GROWTH, 2):
        for each in (index, bare):
            each.add(part, torch.arange(each.seen, each.seen + part.shape[2])[None])
    exact = (query @ keys.transpose(-1, -2))[:, :, None]
    error, without = ((each.scores(query) - exact)[..., :-64].flatten() for each in (index, bare))
    error, without = error.view(32, -1), without.view(32, -1)
    assert error[:, -GROWTH:].std() < 1.1 * error[:, :GROWTH].std()
    assert without.std() > 1.3 * error.std()
