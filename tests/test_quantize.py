"""Quantized slots: the error, the bytes, and the model's output against keys and values rounded the slow way."""

import copy

import numpy as np
import pytest
import torch
from conftest import build
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

import sketchkv
from sketchkv import AttentionMass, SketchCache, Summary, Window, oracle, quantize, score
from sketchkv.quantize import Half, Normal, matrix, normal_levels, pack, quantized, rotation, unpack
from sketchkv.slots import Slots
from sketchkv.study.extras.ranges import Range, ranges


def coder(bits, head_dim, kind):
    return Half() if bits == 16 else Normal(bits, "cpu") if kind == "normal" else Range(bits, head_dim)


def codec(bits, kind):
    return {"range": ranges, "normal": quantized}[kind](bits)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 5, 8]), st.sampled_from([8, 16, 64, 96]), st.integers(0, 2**31))
def test_what_is_packed_comes_back_and_fills_its_bytes(bits, count, seed):
    codes = torch.randint(
        2**bits, (2, 3, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, count * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 5, 8]),
    st.sampled_from([8, 16, 32, 48, 64, 128]),
    st.integers(0, 2**31),
    st.floats(-6, 4),
    st.floats(-100, 100),
)
def test_no_value_is_off_by_more_than_half_a_step(bits, head_dim, seed, magnitude, offset):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 5, head_dim, generator=generator) * 10**magnitude + offset).clamp(-6e4, 6e4)
    x[0, 0] = offset  # a constant group
    of_range = coder(bits, head_dim, "range")
    codes, ranges = of_range.encode(x)
    groups = head_dim // 32 if head_dim % 32 == 0 else 1
    assert codes.shape == (3, 5, head_dim * bits // 8) and codes.dtype == torch.uint8
    assert ranges.shape == (3, 5, 2 * groups) and ranges.dtype == torch.float16
    back = of_range.decode(codes, ranges, torch.float32)
    grouped, error = (t.unflatten(-1, (groups, -1)).double() for t in (x, back - x))
    step = ranges[..., groups:].double()
    float32 = 2**-22 * grouped.abs().amax(-1)  # the arithmetic itself
    assert (error.abs().amax(-1) <= step / 2 + float32).all()
    # Rounding outwards widens the range by little: the step is that of the group, and float16's last places.
    span = grouped.amax(-1) - grouped.amin(-1)
    assert (step <= (span + 2**-9 * grouped.abs().amax(-1)) / (2**bits - 1) * (1 + 2**-9) + 2**-22).all()


@pytest.mark.parametrize("bits, error", [(2, 0.1175), (3, 0.03454), (4, 0.009497), (5, 0.002499)])
def test_normal_levels_have_the_published_error(bits, error):
    """Max (1960), table I: the least mean squared error of a normal variable at 4 to 32 levels."""
    x = torch.special.ndtri((torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000)
    levels = normal_levels(bits)
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    assert (x - nearest).square().mean().item() == pytest.approx(error, rel=0.01)
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-9, rtol=0)
    vectors = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 7
    normal = coder(bits, 64, "normal")
    back = normal.decode(*normal.encode(vectors), torch.float32)
    assert ((back - vectors).square().mean() / 49).item() == pytest.approx(error, rel=0.1)
    # The scale is the best one: no other brings the vector nearer.
    for factor in (0.98, 1.02):
        assert ((back * factor - vectors).square().sum(-1) >= (back - vectors).square().sum(-1) - 1e-2).all()


def test_zero_and_tiny_vectors_survive():
    for bits in (2, 4, 5):
        normal = coder(bits, 16, "normal")
        for x in (torch.zeros(1, 16), torch.full((1, 16), 1e-30)):
            assert normal.decode(*normal.encode(x), torch.float32).abs().max() < 1e-6


@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 128])
def test_the_rotation_is_one(head_dim):
    kept = rotation(head_dim, torch.device("cpu"))
    assert rotation(head_dim, torch.device("cpu")) is kept
    assert kept.nbytes == head_dim**2 * (1 if head_dim in (8, 16, 64, 128) else 4)
    turned = matrix(kept, torch.float32)
    torch.testing.assert_close(turned @ turned.T, torch.eye(head_dim), atol=1e-5, rtol=0)
    spike = torch.zeros(head_dim)
    spike[0] = 1
    assert (spike @ turned).abs().max() < 0.9, "a channel that stands out stays one"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["range", "normal"])
def test_dtype_of_the_model_comes_back(dtype, kind):
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for bits in (8, 16):
        of = coder(bits, 64, kind)
        back = of.decode(*of.encode(x), dtype)
        assert back.dtype == dtype
        torch.testing.assert_close(back, x, atol=0.08, rtol=0)


@pytest.mark.parametrize("kind", ["range", "normal"])
def test_what_cannot_be_packed_is_refused(kind):
    with pytest.raises(ValueError, match="multiple of 8"):
        Slots((1, 1), 8, (12, 12), codec(4, kind)(torch.float32, "cpu"))


@pytest.mark.parametrize("bits", [7, 0, "4", True, (4, 4, 4), (4, 7)])
def test_bad_settings(gpt2, bits):
    with pytest.raises(ValueError, match="bits"):
        SketchCache(gpt2.config, 64, bits=bits)
    with pytest.raises(TypeError, match="either bits= or codec="):
        SketchCache(gpt2.config, 64, bits=4, codec=ranges(4))


def test_a_codec_need_not_be_hashable(gpt2, ids):
    class Made(dict):
        def __call__(self, dtype, device):
            return quantized(4)(dtype, device)

    cache = SketchCache(gpt2.config, 64, codec=Made())
    gpt2(ids, past_key_values=cache)
    assert cache.evicted_tokens > 0


def rounded(x, bits):
    """The documented rule in numpy: one range per vector (head_dim 16), minimum and step rounded outwards."""
    x = x.double().numpy()
    low = x.min(-1, keepdims=True)
    low = np.float16(low - abs(low) * 2.0**-10 - 2.0**-24).astype(float)
    step = np.float16((x.max(-1, keepdims=True) - low) / (2**bits - 1) * (1 + 2.0**-10) + 2.0**-24).astype(
        float
    )
    return torch.from_numpy(low + np.clip(np.rint((x - low) / step), 0, 2**bits - 1) * step).float()


def rounded_normally(x, bits):
    """The documented rule, each number to its nearest level: in rotated coordinates, one scale per vector."""
    turned = matrix(rotation(x.shape[-1], torch.device("cpu")), torch.float64).numpy()
    levels = normal_levels(bits).numpy()
    x = x.double().numpy() @ turned
    norm = np.sqrt((x**2).mean(-1, keepdims=True))
    nearest = levels[np.abs((x / norm)[..., None] - levels).argmin(-1)]
    scale = np.float16((x * nearest).sum(-1, keepdims=True) / (nearest**2).sum(-1, keepdims=True)).astype(
        float
    )
    return torch.from_numpy(nearest * scale @ turned.T).float()


@pytest.fixture
def rounding_oracle():
    """Lets the oracle's attention round keys and values by this rule."""
    rules = []

    def attention(module, query, key, value, *args, **kwargs):
        for_keys, for_values = rules
        return oracle._attention(module, query, for_keys(key), for_values(value), *args, **kwargs)

    AttentionInterface.register(oracle.NAME, attention)
    yield rules.extend
    AttentionInterface.register(oracle.NAME, oracle._attention)


@pytest.mark.parametrize("policy", [None, AttentionMass(), Window()])
@pytest.mark.parametrize("bits, quantizer", [(4, "range"), (8, "range"), (4, "normal"), ((5, 3), "normal")])
def test_bounded_quantized_cache_equals_masked_full_cache_of_rounded_tokens(
    model, ids, bits, quantizer, policy, rounding_oracle, monkeypatch
):
    monkeypatch.setattr(quantize, "CENTRE_AFTER", 0)  # the rule of a centre has a test of its own
    rule = {"range": rounded, "normal": rounded_normally}[quantizer]
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    rounding_oracle([lambda x, b=b: rule(x, b) for b in pair])
    settings = dict(recent_window=8, evict_every=5, policy=copy.deepcopy(policy))
    cache = SketchCache(model.config, 32, codec=codec(bits, quantizer), **settings)
    logits, visible = oracle.decode_and_watch(model, ids, cache)
    expected = oracle.full_cache_logits(model, ids, visible)
    # A number on the edge between two codes may fall to either side; then a few logits move by a step of one channel.
    difference = (logits - expected).abs()
    assert difference.median() < 1e-4 and difference.max() < 0.5 * expected.std()
    assert cache.evicted_tokens > 0
    plain = SketchCache(model.config, 32, recent_window=8, evict_every=5, policy=copy.deepcopy(policy))
    effect = (score(model, ids, plain, return_logits=True)[1] - logits).abs()
    assert effect.median() > 10 * difference.median()


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_centring_happens_at_one_token_however_the_text_arrives(model, ids, chunk):
    def run(chunk):
        cache = SketchCache(model.config, 40, recent_window=8, evict_every=5, bits=(5, 4), policy=Window())
        nll = score(model, ids, cache, chunk_size=chunk)
        return nll, cache.layers[0].slots.codec.centre

    nll, centre = run(chunk)
    expected, its_centre = run(ids.shape[1])
    assert centre.abs().max() > 0
    torch.testing.assert_close(centre, its_centre, atol=1e-3, rtol=1e-2)
    assert (nll - expected).abs().median() < 1e-4


def test_a_centre_brings_keys_nearer():
    generator = torch.Generator().manual_seed(0)
    slots = Slots((2, 3), 60, (64, 64), quantized(3)(torch.float32, "cpu"))
    keys = torch.randn(2, 3, 60, 64, generator=generator) + 4 * torch.randn(2, 3, 1, 64, generator=generator)
    positions = torch.arange(60, dtype=torch.int32).expand(2, 60)
    slots.append(keys[:, :, :32], keys[:, :, :32], positions[:, :32])
    slots.codec.settle(slots, 4)
    slots.append(keys[:, :, 32:], keys[:, :, 32:], positions[:, 32:])
    error = (slots["keys"] - keys).square().mean((0, 1, 3))
    assert error[32:].mean() < 0.1 * (slots["values"] - keys)[:, :, 32:].square().mean()
    assert error[:32].mean() < 1.5 * (slots["values"] - keys)[:, :, :32].square().mean()
    slots.clear()
    assert slots.codec.centre.abs().max() == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_the_packed_tensors(model, ids, bits):
    cache = SketchCache(
        model.config,
        32,
        recent_window=8,
        evict_every=5,
        codec=ranges(bits),
        summary=Summary(2),
        policy=Window(),
    )
    score(model, ids, cache)
    heads, head_dim, rows, layers = cache.layers[0].slots.positions.shape[1], 16, 2, 2
    slot = 2 * (head_dim * bits // 8 + 2 * 2)  # codes, minimum and step in float16; keys and values
    summary = 2 * 2 * head_dim * 4
    assert cache.nbytes()["kv"] == layers * rows * heads * (37 * slot + summary)
    held = {
        id(t.untyped_storage()): t.untyped_storage().nbytes()
        for layer in cache.layers
        for t in (
            *layer.slots.arrays.values(),
            *layer.summary.tensors(),
            layer.summary.code.projection,
            layer.summary.code.powers,
            layer.summary.hash.a,
            layer.summary.hash.b,
        )
    }
    assert cache.nbytes()["total"] == sum({t: n for t, n in held.items()}.values())


def mistral():
    config = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=48, max_position_embeddings=512)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**config, **heads)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3)  # attention that is sharp enough for an error to show
    return model


CACHES = {
    "slots": lambda model: SketchCache.compact(model.config, 160),
    "coarse": lambda model: SketchCache(model.config, 160, bits=3, policy=Window()),
    "window": lambda model: SketchCache(model.config, 160, bits=4, policy=Window()),
    "index": lambda model: SketchCache.recall(model.config, 232, top=160, recent_window=64, fine_window=8),
    "store": lambda model: SketchCache.recall(model.config, 90, top=16, recent_window=64, fine_window=8),
}


@pytest.mark.parametrize("chunk", [1, 50, 150])
@pytest.mark.parametrize("kind", CACHES)
def test_a_row_behind_padding_is_coded_as_it_is_alone(kind, chunk):
    """Its keys are centred after as many tokens of its own: the same vectors get the same codes, whatever stands beside them."""
    torch.manual_seed(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = sketchkv.enable(mistral() if kind == "window" else build("llama")).to(device)
    pads, length, total = torch.tensor([0, 30, 64, 125]), 150, 158
    ids = torch.randint(97, (4, total)).to(device)
    mask = (torch.arange(total) >= pads[:, None]).to(device)
    positions = (torch.arange(total) - pads[:, None]).clamp(min=0).to(device)

    def run(ids, mask, positions):
        cache, found = CACHES[kind](model), []
        begin = int((~mask).sum(1).min())
        cuts = [*range(begin, length, chunk), *range(length, total)]
        for start, end in zip(cuts, [*cuts[1:], total]):
            now = dict(attention_mask=mask[:, begin:end], position_ids=positions[:, start:end])
            found.append(model(ids[:, start:end], past_key_values=cache, **now).logits)
        return torch.cat(found, 1), cache.layers[0].slots.codec

    together, codec = run(ids, mask, positions)
    for row in range(4):
        alone, own = run(*(x[row : row + 1] for x in (ids, mask, positions)))
        torch.testing.assert_close(codec.centre[row], own.centre[0])
        if total - int(pads[row]) >= 32:
            assert own.centre.abs().max() > 0
        # Where its blocks begin elsewhere, the index ranks otherwise, and a step may ask for other tokens.
        elsewhere = kind == "store" and int(pads[row]) % 64 > 0
        if elsewhere and chunk == 1:
            continue
        end = length if elsewhere else total
        error = (together[row, int(pads[row]) : end] - alone[0, : end - int(pads[row])]).abs()
        # A number between two levels may fall to either side, by sums in another order, and later tokens follow it.
        assert error.median() < 2e-3
