"""The bounded cache against its two oracles: unbounded it is the plain model, bounded it is a masked full cache."""

import copy

import pytest
import torch
from conftest import build
from transformers import DynamicCache

import sketchkv
from sketchkv import (
    H2O,
    LRU,
    TOVA,
    AttentionMass,
    KeyNorm,
    Random,
    Sketch,
    SketchCache,
    SnapKV,
    Window,
    generate,
    score,
)
from sketchkv.oracle import decode_and_watch, full_cache_logits

POLICIES = {
    "default": None,
    "sketch of sums by token": Sketch(key="token", mean=False, decay=1.0),
    "sketch by position": Sketch(key="position", width=64, depth=2),
    "H2O": H2O(),
    "decayed mean": AttentionMass(),
    "random": Random(),
    "window": Window(),
    "LRU": LRU(),
    "TOVA": TOVA(),
    "SnapKV": SnapKV(),
    "key norm": KeyNorm(),
}


def bounded(model, cap=32, **settings):
    return SketchCache(model.config, cap, **({"recent_window": 8, "evict_every": 5} | settings))


def kept(cache):
    """Kept positions of all layers in a fixed order: [layers, batch, heads, slots]."""
    return torch.stack([cache.kept_positions(layer).sort(-1).values for layer in range(len(cache.layers))])


# 1. Cap >= length: the plain model


@pytest.mark.parametrize("chunk_size", [100, 1, 7, 32])
def test_unbounded_cache_equals_plain_model(model, ids, chunk_size):
    expected = model(ids).logits
    cache = SketchCache(model.config, 128)
    nll, logits = score(model, ids, cache, chunk_size=chunk_size, return_logits=True)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    reference = torch.nn.functional.cross_entropy(
        expected[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    torch.testing.assert_close(nll, reference, atol=1e-4, rtol=0)
    assert cache.evicted_tokens == 0 and cache.stored_tokens() == [100, 100]


def test_enabled_model_without_our_cache_is_unchanged(model, ids, padding):
    plain = copy.deepcopy(model)
    sketchkv.disable(plain)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    padded, mask = padding
    new = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(padded, **new), plain.generate(padded, **new))
    sketchkv.enable(sketchkv.enable(plain))  # twice does no harm, and on again after off
    assert score(plain, ids, SketchCache(plain.config, 32)).shape == (2, 99)


@pytest.mark.parametrize("chunked", [False, True])
def test_left_padding_equals_the_rows_alone(model, padding, chunked):
    padded, mask = padding
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = SketchCache(model.config, 128)
    parts = torch.arange(100).split(7 if chunked else 100)
    logits = [
        model(
            padded[:, p],
            attention_mask=mask[:, : p[-1] + 1],
            position_ids=positions[:, p],
            past_key_values=cache,
        ).logits
        for p in parts
    ]
    logits = torch.cat(logits, 1)
    torch.testing.assert_close(logits[0], model(padded[:1]).logits[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, 23:], model(padded[1:, 23:]).logits[0], atol=1e-4, rtol=0)


DECODING = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=0.8, top_k=20),
    "beam search": dict(num_beams=3, do_sample=False),
    "beam sampling": dict(num_beams=3, do_sample=True),
}


@pytest.mark.parametrize("how", DECODING)
def test_unbounded_generate_equals_plain_generate(model, padding, how):
    padded, mask = padding
    arguments = dict(attention_mask=mask, max_new_tokens=20, **DECODING[how])
    torch.manual_seed(3)
    expected = model.generate(padded, past_key_values=DynamicCache(config=model.config), **arguments)
    torch.manual_seed(3)
    cache = SketchCache(model.config, 128)
    assert torch.equal(model.generate(padded, past_key_values=cache, **arguments), expected)
    assert cache.seen_tokens == 119


# 2. Cap < length: a full cache with the evicted tokens masked out


@pytest.mark.parametrize("evict_every", [1, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_bounded_cache_equals_masked_full_cache(model, ids, policy, evict_every):
    def fresh():
        return bounded(model, policy=copy.deepcopy(POLICIES[policy]), evict_every=evict_every)

    cache = fresh()
    logits, visible = decode_and_watch(model, ids, cache)
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-4, rtol=0)
    assert cache.evicted_tokens > 0
    assert (
        logits[:, 40:] - model(ids).logits[:, 40:]
    ).abs().max() > 1e-2  # evicting must have changed something
    # A rotation keeps norms, so equal tokens have equal scores and rounding decides between them.
    for chunk_size in (100, 7) if policy != "key norm" else ():
        streamed = fresh()
        _, again = score(model, ids, streamed, chunk_size=chunk_size, return_logits=True)
        torch.testing.assert_close(again, logits, atol=1e-4, rtol=0)
        assert torch.equal(kept(streamed), kept(cache))


def test_bounded_cache_with_padding_equals_masked_full_cache(model, padding):
    padded, mask = padding
    cache = bounded(model)
    logits, visible = decode_and_watch(model, padded, cache, mask)
    expected = full_cache_logits(model, padded, visible, mask)
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, 23:], expected[1, 23:], atol=1e-4, rtol=0)
    # Padding goes first and is no sink: row 1 keeps its own first tokens.
    positions = kept(cache)
    assert not ((positions[:, 1] >= 0) & (positions[:, 1] < 23)).any()
    for sink in range(4):
        assert (positions[:, 0] == sink).any(-1).all() and (positions[:, 1] == 23 + sink).any(-1).all()


@pytest.mark.parametrize("how", DECODING)
def test_generate_and_manual_loop_agree_past_the_cap(model, padding, how):
    padded, mask = padding
    arguments = DECODING[how]
    cache = bounded(model)
    torch.manual_seed(5)
    tokens = model.generate(
        padded, attention_mask=mask, past_key_values=cache, max_new_tokens=30, eos_token_id=None, **arguments
    )
    assert tokens.shape == (2, 130) and cache.seen_tokens == 129 and cache.evicted_tokens > 0
    if "num_beams" in arguments:
        return  # the manual loop has no beams; beam search is checked below
    by_hand = bounded(model)
    torch.manual_seed(5)
    again = generate(model, padded, by_hand, 30, attention_mask=mask, chunk_size=11, **arguments)
    assert torch.equal(again, tokens)
    assert torch.equal(kept(by_hand), kept(cache))


def test_beam_search_equals_each_beam_decoded_alone(model, ids):
    """The score that beam search reports is the likelihood of its sequence under a bounded cache of its own: true only
    if sketch, policy state and slots followed their beam at every step."""
    cache = bounded(model, cap=24)
    out = model.generate(
        ids[:, :60],
        past_key_values=cache,
        max_new_tokens=30,
        num_beams=4,
        num_return_sequences=4,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for sequence, reported in zip(out.sequences, out.sequences_scores):
        nll = score(model, sequence[None], bounded(model, cap=24))[0, 59:]
        assert abs(-nll.sum() - reported) < 1e-3
    assert len(out.beam_indices.unique()) > 2  # beams were really exchanged


# 3. Past the cap: bounded, counted, and positions go on


def test_generate_past_the_cap_fills_and_bounds_the_cache(model):
    prompt = torch.randint(1, 97, (2, 50), generator=torch.Generator().manual_seed(2))
    cache = bounded(model, cap=32, evict_every=4)
    sizes = []
    for length in (50, 100, 200, 400):  # the text grows 8x
        cache.reset()
        model.generate(
            prompt, past_key_values=cache, max_new_tokens=length - 50 + 2, do_sample=False, eos_token_id=None
        )
        assert cache.seen_tokens == length + 1
        assert all(32 <= stored <= 36 for stored in cache.stored_tokens())
        positions = cache.kept_positions(0)
        assert positions.max() == length and (positions >= 0).sum(-1).unique().tolist() == [
            cache.stored_tokens()[0]
        ]
        sizes.append(cache.nbytes())
    assert all(size == sizes[0] for size in sizes)
    layers, kv_heads, head_dim = 2, cache.layers[0].slots.arrays["keys"].shape[1], 16
    assert sizes[0]["kv"] == layers * 2 * kv_heads * (32 + 4) * head_dim * 2 * 4
    assert sizes[0]["total"] == sum(sizes[0][kind] for kind in ("kv", "sketch", "policy"))


def test_among_equal_scores_the_older_goes(gpt2, ids):
    class Indifferent(Window):
        def score(self, slots, seen):
            return torch.zeros_like(slots["positions"], dtype=torch.float32)

    cache = bounded(gpt2, policy=Indifferent())
    score(gpt2, ids, cache)
    newest = bounded(gpt2, policy=Window())
    score(gpt2, ids, newest)
    assert torch.equal(kept(cache), kept(newest))


@pytest.mark.parametrize("evict_every", [1, 3, 40])
def test_exactly_max_cache_size_after_each_eviction(gpt2, ids, evict_every):
    cache = bounded(gpt2, evict_every=evict_every)
    evictions = 0
    for step in range(100):
        before = cache.evicted_tokens
        gpt2(ids[:, step : step + 1], past_key_values=cache)
        if cache.evicted_tokens > before:
            evictions += 1
            assert cache.stored_tokens() == [32, 32]
        assert cache.seen_tokens == step + 1 == cache.stored_tokens()[0] + cache.evicted_tokens // 2
    assert evictions == (100 - 32) // evict_every


def test_sketch_bytes_are_counted(gpt2, ids):
    cache = bounded(gpt2, policy=Sketch(width=100, depth=3, key="token"))
    score(gpt2, ids, cache)
    heads, layers, slots = 4, 2, 37
    tables = 2 * 2 * heads * 3 * 100 * 4  # mass and exposure, batch of 2, float32
    hashes = 2 * 2 * 3 * 8
    keys = 2 * heads * slots * 4
    assert cache.nbytes()["sketch"] == layers * (tables + hashes + keys)
    held = sum(t.nbytes for layer in cache.layers for t in layer.slots.arrays.values())
    assert cache.nbytes()["total"] == held + layers * (tables + hashes)


# 5. State


@pytest.mark.parametrize("policy", POLICIES)
def test_two_texts_in_a_row_equal_two_fresh_caches(gpt2, ids, policy):
    cache = bounded(gpt2, policy=copy.deepcopy(POLICIES[policy]))
    first = score(gpt2, ids[:1], cache)
    cache.reset()
    assert cache.seen_tokens == 0 and cache.evicted_tokens == 0 and cache.stored_tokens() == [0, 0]
    second = score(gpt2, ids[1:], cache)
    for text, nll in ((ids[:1], first), (ids[1:], second)):
        assert torch.equal(score(gpt2, text, bounded(gpt2, policy=copy.deepcopy(POLICIES[policy]))), nll)


def test_layers_share_no_state(gpt2, ids):
    policy = Sketch()
    cache = bounded(gpt2, policy=policy)
    score(gpt2, ids, cache)
    tables = [layer.policy.sketches[0].table for layer in cache.layers]
    assert not torch.equal(*tables) and not hasattr(policy, "sketches")
    mixed = SketchCache(gpt2.config, 32, policy=[Window(), Random()])
    assert [type(layer.policy) for layer in mixed.layers] == [Window, Random]


def test_rows_of_a_batch_are_independent(gpt2, ids):
    together = score(gpt2, ids, bounded(gpt2))
    alone = torch.cat([score(gpt2, row[None], bounded(gpt2)) for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


# 7. Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_cache_size=0), "max_cache_size"),
        (dict(max_cache_size=-3), "max_cache_size"),
        (dict(max_cache_size=64.0), "whole number"),
        (dict(max_cache_size=20), "raise the cap above 20"),
        (dict(max_cache_size=64, recent_window=60), "leaves nothing to choose"),
        (dict(max_cache_size=64, num_sinks=-1), "num_sinks"),
        (dict(max_cache_size=64, evict_every=0), "evict_every"),
        (dict(width=0), "width"),
        (dict(depth=0), "depth"),
        (dict(key="colour"), "lsh, token, position"),
        (dict(decay=1.5), "decay"),
        (dict(lsh_bits=0), "lsh_bits"),
    ],
)
def test_bad_settings(gpt2, settings, message):
    with pytest.raises(ValueError, match=message):
        SketchCache(gpt2.config, **settings) if "max_cache_size" in settings else Sketch(**settings)


def test_unknown_and_contradicting_parameters(gpt2):
    with pytest.raises(TypeError, match="widht"):
        SketchCache(gpt2.config, 64, widht=3)
    with pytest.raises(TypeError, match=r"policy=Sketch\(width=...\)"):
        SketchCache(gpt2.config, 64, policy=Window(), width=3)
    for former in ("depth", "summary_slots", "quantizer", "coarse_bits", "shared", "counters"):
        with pytest.raises(TypeError, match=f"no parameter '{former}': write"):
            SketchCache(gpt2.config, 64, **{former: 2})
    for make, wrong, meant in (
        (SketchCache, "recent_windw", "recent_window"),
        (SketchCache.compact, "fine_windw", "fine_window"),
        (SketchCache.recall, "stor", "store"),
    ):
        with pytest.raises(TypeError, match=f"no parameter '{wrong}'; did you mean '{meant}'"):
            make(gpt2.config, 40, **{wrong: 3})
    with pytest.raises(TypeError, match="one per layer"):
        SketchCache(gpt2.config, 64, policy=[Window()])


def test_model_that_was_not_enabled(ids):
    model = build("gpt2")
    with pytest.raises(RuntimeError, match=r"sketchkv.enable\(model\)"):
        score(model, ids, bounded(model))
    sketchkv.enable(model).set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="enable"):
        score(model, ids, bounded(model))


def test_cache_of_another_model(gpt2, ids):
    config = copy.deepcopy(gpt2.config)
    config.n_layer = 3
    with pytest.raises(ValueError, match="for 3 layers.*the model has 2"):
        score(gpt2, ids, SketchCache(config, 32))


def test_layers_that_attend_otherwise_are_refused():
    model = build("qwen2")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="Qwen2ForCausalLM: .*linear_attention"):
        sketchkv.enable(model)


def test_text_longer_than_positions(gpt2):
    long = torch.randint(1, 97, (1, 600))
    for call in (lambda c: score(gpt2, long, c), lambda c: generate(gpt2, long[:, :500], c, 20)):
        with pytest.raises(ValueError, match="512 positions"):
            call(bounded(gpt2))
    with pytest.raises(ValueError, match="has only 512"):
        gpt2(long, past_key_values=bounded(gpt2))
    rotary = sketchkv.enable(build("llama"))
    with pytest.warns(UserWarning, match="beyond the 512"):
        assert score(rotary, long, bounded(rotary)).isfinite().all()


def test_batch_dtype_and_reuse_errors(gpt2, ids):
    cache = bounded(gpt2)
    with pytest.raises(RuntimeError, match="empty"):
        cache.kept_positions(0)
    score(gpt2, ids, cache)
    with pytest.raises(ValueError, match="batch of 2, this call brings 1"):
        gpt2(ids[:1, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="reset"):
        score(gpt2, ids, cache)
    with pytest.raises(NotImplementedError, match="give back"):
        cache.crop(-1)
    half = copy.deepcopy(gpt2).to(torch.bfloat16)
    with pytest.raises(ValueError, match="torch.float32 .* torch.bfloat16"):
        half(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="at least two tokens"):
        score(gpt2, ids[:, :1], bounded(gpt2))
    with pytest.raises(ValueError, match="at least one token"):
        generate(gpt2, ids[:, :0], bounded(gpt2))


def test_a_failed_call_leaves_no_open_cache(gpt2, ids):
    cache = bounded(gpt2)
    with pytest.raises(ValueError, match="4-D"):
        gpt2(ids, attention_mask=torch.ones(2, 1, 100, 64), past_key_values=cache)
    assert cache.passes.tokens is None
    assert score(gpt2, ids, bounded(gpt2)).isfinite().all()


def test_nan_importance(gpt2, ids):
    class Broken(Window):
        def score(self, slots, seen):
            return super().score(slots, seen) * torch.nan

    with pytest.raises(ValueError, match="Broken gave NaN importance"):
        score(gpt2, ids, bounded(gpt2, policy=Broken()))
    with torch.no_grad():
        gpt2.transformer.wte.weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN importance"):
        score(gpt2, torch.full((1, 60), 3), bounded(gpt2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(gpt2, ids, dtype):
    model = copy.deepcopy(gpt2).to(dtype)
    cache = bounded(model)
    logits, visible = decode_and_watch(model, ids, cache)
    expected = full_cache_logits(model, ids, visible)
    # Rounding of one product is about 2^-8 (bfloat16); anything masked wrongly changes logits by whole units.
    assert (logits - expected).abs().float().mean() < 0.05 * expected.float().std()
    assert cache.layers[0].slots.arrays["keys"].dtype == dtype
