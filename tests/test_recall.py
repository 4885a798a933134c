"""Recall against its oracles: given the choice, attention is that of a masked full cache of its codes."""

import copy
import errno
import os
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import build
from exact import ExactKeys

import sketchkv
from sketchkv import SketchCache, Window, generate, score
from sketchkv.checks import Settings
from sketchkv.index import KeyIndex
from sketchkv.logits import Form
from sketchkv.oracle import full_cache_logits
from sketchkv.passes import Tokens
from sketchkv.quantize import quantized
from sketchkv.recall import RecallLayer
from sketchkv.slots import Plain
from sketchkv.store import PAGE, FolderStore, HostStore
from sketchkv.window import WindowLayer


@pytest.fixture(params=["llama", "gpt2", "qwen3"])
def model(request):
    return sketchkv.enable(build(request.param))


@pytest.fixture
def llama():
    return sketchkv.enable(build("llama"))


CODECS = pytest.mark.parametrize(
    "codec",
    [Plain, quantized((5, 4)), quantized((5, 4), newest=8, sinks=4)],
    ids=["plain", "coded", "fine"],
)


def assert_alike(codec, ids, both):
    """both: of ids, (found, expected). Passes of other shapes give sums in another order, so that a number beside the edge
    of two codes may fall to either, as processor and threads have it: logits change by 1e-3 then, or by more where another
    token is chosen for it. A fault changes them by 0.2 or more, and in every text."""
    for text in (ids, ids.flip(1), ids.roll(1, 1)):
        found, expected = both(text)
        differ = (found - expected).abs().max()
        if differ <= (1e-4 if codec is Plain else 2e-2):
            return
    raise AssertionError(f"logits differ by {differ} in each of three texts")


def recall(model, cap=40, top=12, exact_prompts=True, store="host", **changes):
    index = KeyIndex(top=top, block=16, exact_prompts=exact_prompts, store=store)
    settings = dict(recent_window=16, index=index, summary=None) | (
        {} if "codec" in changes else dict(bits=None, fine_window=0)
    )
    return SketchCache.recall(model.config, cap, **settings | changes)


def attended(layer):
    """Token numbers that the last step attended to, int64 `[batch, num_kv_heads, slots]`, -1 elsewhere."""
    return layer.slots["positions"].masked_fill(layer.slots["unattended"], -1).long()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(codec=Plain, tokens=150, index=None, cap=40, **settings):
    """A layer that a prompt has passed through, and what comes next: (query, key, value, tokens)."""
    settings = Settings(num_sinks=4, recent_window=16, codec=codec, **settings)
    layer = RecallLayer(cap, settings, index or KeyIndex(top=12, block=16))
    query, key, value = (
        normal(2, 4, tokens + 1, 16) * 2,
        normal(2, 2, tokens + 1, 16, seed=1),
        normal(2, 2, tokens + 1, 16, seed=2),
    )
    positions = torch.arange(tokens + 1, dtype=torch.int32)[None]
    old = [x[:, :, :-1] for x in (query, key, value)]
    layer.update(*old[1:])
    layer.attend(*old, Tokens(None, positions[:, :-1]), Form(0.5))
    return layer, (query, key, value), Tokens(None, positions[:, -1:])


def step(layer, parts, tokens):
    new = [x[:, :, -1:] for x in parts]
    layer.update(*new[1:])
    return layer.attend(*new, tokens, Form(0.5))


# Given the choice, attention is exact


@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_a_full_cache_masked_to_what_they_attend_to(model, ids, padding, padded):
    ids, mask = padding if padded else (ids, torch.ones_like(ids))
    places, cache, logits = (mask.cumsum(-1) - 1).clamp(min=0), recall(model), []
    visible = [
        torch.zeros(2, 4 if model.config.model_type == "gpt2" else 2, 100, 101, dtype=torch.bool)
        for _ in range(2)
    ]
    for t in range(100):
        given = dict(attention_mask=mask[:, : t + 1], position_ids=places[:, t : t + 1]) if padded else {}
        logits.append(model(ids[:, t : t + 1], past_key_values=cache, **given).logits)
        for layer, of_layer in zip(cache.layers, visible, strict=True):
            at = attended(layer)
            of_layer[:, :, t].scatter_(-1, at.where(at >= 0, 100), True)
            assert ((at >= 0).sum(-1) <= 4 + 16 + 12).all()
    visible = [of_layer[..., :100] for of_layer in visible]
    counts = visible[0][0, :, -1].sum(-1)
    assert (counts == 4 + 16 + 12).all() and cache.traffic()["fetched"] > 0
    if padded:
        assert not visible[0][1, :, 23:, :23].any()  # padding is never asked for
        assert visible[0][1, :, -1, 23:27].all()  # the row's own sinks
    masks = [of_layer | torch.eye(100, dtype=torch.bool) for of_layer in visible]  # padding sees something
    expected = full_cache_logits(model, ids, masks, mask if padded else None)
    logits = torch.cat(logits, 1)
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1, 23:], expected[1, 23:], atol=1e-4, rtol=0)
    assert (
        logits[0, 60:] - model(ids[:1]).logits[0, 60:]
    ).abs().max() > 1e-2  # leaving out must have changed something


@pytest.mark.parametrize("bits", [(5, 4), 16, 3])
def test_a_step_over_codes_is_attention_over_the_decoded_store(bits):
    layer, parts, tokens = filled(quantized(bits))
    output = step(layer, parts, tokens)
    codec, rows, heads = layer.slots.codec, torch.arange(2)[:, None, None], torch.arange(2)[:, None]
    arrays = layer.store.read(rows, heads, torch.arange(151))
    names = {"keys": ("keys", "keys_scale"), "values": ("values", "values_scale")}
    keys, values = (codec.decode(n, {p: arrays[p] for p in names[n]}).double() for n in names)
    query = codec.turn(parts[0][:, :, -1:], parts[1], parts[2])[0].double()
    logits = torch.einsum("bhgd,bhtd->bhgt", query.view(2, 2, 2, 16), keys) * 0.5
    seen, at = torch.zeros(2, 2, 152, dtype=torch.bool), attended(layer)
    seen.scatter_(-1, at.where(at >= 0, 151), True)
    assert (seen[..., :151].sum(-1) == 32).all()
    weights = logits.masked_fill(~seen[:, :, None, :151], -torch.inf).softmax(-1)
    expected = codec.turn_back((weights @ values).view(2, 4, 1, 16).float())
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_the_choice_is_that_of_numpy():
    layer, parts, tokens = filled(index=ExactKeys(top=12, block=16))
    step(layer, parts, tokens)
    at, (query, keys, _) = attended(layer), (x.double().numpy() for x in parts)
    always = {*range(4), *range(151 - 16, 151)}
    for row, head in np.ndindex(2, 2):
        logits = query[row, 2 * head : 2 * head + 2, -1] @ keys[row, head].T * 0.5
        share = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).sum(0)
        ranked = [t for t in np.argsort(-share) if t not in always][:12]
        assert set(at[row, head][at[row, head] >= 0].tolist()) == always | set(ranked)


def test_store_rows_that_are_not_asked_for_leave_no_trace_and_those_that_are_do():
    layer, parts, tokens = filled()
    watched, resident = copy.deepcopy(layer), layer.slots["positions"].clone()
    expected, asked = step(watched, parts, tokens), attended(watched)

    def poisoned(spared):
        other = copy.deepcopy(layer)
        for row, head in np.ndindex(2, 2):
            for t in set(range(150)) - spared(row, head):
                other.store.pages[other.store.table[row, t // PAGE], head, t % PAGE] = 255  # NaN in float32
        return step(other, parts, tokens)

    assert torch.equal(poisoned(lambda row, head: set(asked[row, head].tolist())), expected)
    missing = {
        (r, h): set(asked[r, h].tolist()) - set(resident[r, h].tolist()) - {-1, 150}
        for r, h in np.ndindex(2, 2)
    }
    spoilt = poisoned(lambda row, head: set(range(150)) - set(sorted(missing[row, head])[:1]))
    assert any(missing.values())
    for row, head in np.ndindex(2, 2):
        assert spoilt[row, 2 * head : 2 * head + 2].isnan().any() == bool(missing[row, head])


@CODECS
@pytest.mark.parametrize("exact", [True, False])
def test_with_top_above_the_length_it_is_a_cache_of_all(model, ids, codec, exact):
    def both(ids):
        cache = recall(model, cap=160, top=110, codec=codec, exact_prompts=exact)
        found = score(model, ids, cache, return_logits=True)[1]
        assert cache.evicted_tokens == 0 and cache.traffic()["fetched"] == 0
        return found, model(ids, past_key_values=SketchCache(model.config, 128, codec=codec)).logits

    assert_alike(codec, ids, both)


@CODECS
@pytest.mark.parametrize("chunk", [100, 50, 9])
def test_prompts_pass_exactly_whatever_the_cap(model, padding, codec, chunk):
    ids, mask = padding
    places = (mask.cumsum(-1) - 1).clamp(min=0)

    def passed(ids, cache):
        parts = torch.arange(100).split(chunk)
        out = [
            model(
                ids[:, p],
                attention_mask=mask[:, : p[-1] + 1],
                position_ids=places[:, p],
                past_key_values=cache,
            ).logits
            for p in parts[: 100 // chunk]
        ]
        logits = torch.cat(out, 1)
        return torch.cat([logits[0], logits[1, 23:]])

    def both(ids):
        cache = recall(model, codec=codec)
        logits = passed(ids, cache)
        assert cache.stored_tokens() == [40, 40] and cache.traffic()["streamed"] > 0
        kept = cache.kept_positions(0)[1, 0]  # sinks and the newest, and nothing twice
        assert sorted(kept.tolist()) == sorted(
            [*range(23, 27), *range(cache.seen_tokens - 36, cache.seen_tokens)]
        )
        return logits, passed(ids, SketchCache(model.config, 128, codec=codec))

    assert_alike(codec, ids, both)


def test_a_learned_sink_takes_its_share_in_a_prompt_and_in_a_step():
    layer, (query, key, value), tokens = filled(tokens=30)
    layer.reset()
    sinks, many = torch.tensor([1.0, -2.0, 0.5, 3.0]), Tokens(None, torch.arange(30, dtype=torch.int32)[None])
    form = Form(0.5, sinks=sinks)
    layer.update(key[:, :, :-1], value[:, :, :-1])
    outputs = [layer.attend(query[:, :, :-1], key[:, :, :-1], value[:, :, :-1], many, form)]
    outputs.append(layer.attend(query[:, :, -1:], key[:, :, -1:], value[:, :, -1:], tokens, form))
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    logits = (query @ key.transpose(-1, -2) * 0.5).masked_fill(
        ~torch.ones(31, 31, dtype=torch.bool).tril(), -torch.inf
    )
    weights = torch.cat([logits, sinks.view(1, 4, 1, 1).expand(2, -1, 31, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(torch.cat(outputs, 2), weights @ value, atol=1e-5, rtol=1e-4)


# Chunks, batches, beams, texts


@CODECS
@pytest.mark.parametrize("chunk", [100, 33, 7])
def test_by_index_chunks_give_what_steps_give(model, ids, codec, chunk):
    def both(ids):
        by_index = recall(model, codec=codec, exact_prompts=False)
        chunked = score(model, ids, by_index, chunk_size=chunk, return_logits=True)[1]
        return chunked, score(model, ids, recall(model, codec=codec), return_logits=True)[1]

    assert_alike(codec, ids, both)


def test_rows_of_a_batch_are_independent_and_a_reset_forgets(model, ids):
    cache = recall(model)
    together = score(model, ids, cache)
    held = cache.nbytes()
    for row in range(2):
        torch.testing.assert_close(
            together[row], score(model, ids[row : row + 1], recall(model))[0], atol=1e-4, rtol=0
        )
    cache.reset()
    assert cache.traffic()["written"] == 0 and cache.stored_tokens() == [0, 0]
    assert torch.equal(score(model, ids.flip(0), cache), score(model, ids.flip(0), recall(model)))
    assert cache.nbytes() == held
    cache.reset()  # another batch: other memory
    assert torch.equal(score(model, ids[:1], cache), score(model, ids[:1], recall(model)))


@pytest.mark.parametrize("how", [dict(do_sample=False), dict(do_sample=True, temperature=0.8, top_k=20)])
@pytest.mark.parametrize("exact", [True, False])
def test_generate_and_model_generate_agree(model, padding, how, exact):
    ids, mask = padding
    cache, by_hand = recall(model, exact_prompts=exact), recall(model, exact_prompts=exact)
    torch.manual_seed(5)
    tokens = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=30, eos_token_id=None, **how
    )
    torch.manual_seed(5)
    assert torch.equal(generate(model, ids, by_hand, 30, attention_mask=mask, chunk_size=11, **how), tokens)
    assert cache.seen_tokens == 129 and 0 < cache.traffic()["missing"] < cache.traffic()["chosen"]


def test_beam_search_equals_each_beam_decoded_alone(model, ids):
    cache = recall(model, exact_prompts=False)
    beams = dict(num_beams=4, num_return_sequences=4, do_sample=False, eos_token_id=None, length_penalty=0.0)
    told = dict(output_scores=True, return_dict_in_generate=True)
    out = model.generate(ids[:, :70], past_key_values=cache, max_new_tokens=30, **beams, **told)
    for sequence, reported in zip(out.sequences, out.sequences_scores, strict=True):
        nll = score(model, sequence[None], recall(model, exact_prompts=False))[0, 69:]
        assert abs(-nll.sum() - reported) < 1e-3
    assert len(out.beam_indices.unique()) > 2  # beams were really exchanged
    tables = cache.layers[0].store.table
    assert len(tables[:, 0].unique()) < len(tables)  # full pages are shared
    assert len(tables[:, -1].unique()) == len(tables)  # open ones are not


@pytest.mark.parametrize("bits", [None, (5, 4)])
def test_half_precision(llama, ids, bits):
    model, expected = copy.deepcopy(llama).to(torch.bfloat16), llama(ids).logits
    for exact in (True, False):
        cache = recall(model, bits=bits, exact_prompts=exact, cap=128, top=100)
        logits = model(ids, past_key_values=cache).logits
        bounded = model(ids, past_key_values=SketchCache(model.config, 128, bits=bits)).logits
        assert logits.dtype == torch.bfloat16
        # Rounding of one product is about 2^-8; anything masked wrongly changes logits by whole units.
        assert (logits - bounded).abs().float().mean() < 0.05 * expected.std()
        score(model, ids, recall(model, bits=bits, exact_prompts=exact))


def test_layers_with_a_window_stay_as_they_are(ids):
    config = transformers.Gemma2Config(
        **dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16),
        **dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=24, max_position_embeddings=512),
    )
    torch.manual_seed(0)
    model = sketchkv.enable(transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False))
    cache = recall(model, cap=130, top=110)
    assert [type(layer) for layer in cache.layers] == [WindowLayer, RecallLayer]
    expected = model(ids).logits
    torch.testing.assert_close(score(model, ids, cache, return_logits=True)[1], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids, past_key_values=recall(model)).logits, expected, atol=1e-4, rtol=0)


# Stores


def opened(store, batch=3):
    arrays = {
        "codes": torch.zeros(1, 1, 1, 5, dtype=torch.uint8),
        "scale": torch.zeros(1, 1, 1, 1, dtype=torch.float16),
    }
    store.open(arrays | {"none": torch.zeros(1, 1, 1, 0, dtype=torch.float16)}, (batch, 2))
    return store


def coded(count, batch=3, seed=0):
    codes = torch.randint(0, 256, (batch, 2, count, 5), generator=torch.Generator().manual_seed(seed)).byte()
    return {
        "codes": codes,
        "scale": normal(batch, 2, count, 1, seed=seed).half(),
        "none": torch.zeros(batch, 2, count, 0).half(),
    }


@pytest.mark.parametrize("kind", ["host", "folder"])
def test_a_store_gives_back_what_was_written_and_rows_go_their_own_way(kind, tmp_path):
    store = opened(HostStore() if kind == "host" else FolderStore(tmp_path))
    rows, heads = torch.arange(3)[:, None, None], torch.arange(2)[:, None]
    expected = {name: array.clone() for name, array in coded(0).items()}
    start, generator = 0, torch.Generator().manual_seed(3)
    for turn, count in enumerate((1, 30, 33, 64, 200, 1, 1, 63, 7)):
        new = coded(count, seed=turn)
        assert store.write(start, new) == 3 * 2 * count * 7
        start += count
        index = torch.randint(0, 3, (3,), generator=generator)
        store.reorder(index)
        expected = {name: torch.cat([expected[name], new[name]], 2)[index] for name in new}
        for name, array in store.read(rows, heads, torch.arange(start)).items():
            assert torch.equal(array, expected[name])
    token = torch.tensor([5, 399, 64])
    found = store.read(torch.tensor([2, 0, 1]), torch.tensor([0, 1, 1]), token)
    assert torch.equal(found["codes"], expected["codes"][[2, 0, 1], [0, 1, 1], token])
    assert store.nbytes() == store.pages.numel() + store.table.numel() * 8
    store.clear()
    store.write(0, coded(10, seed=9))
    assert torch.equal(store.read(rows, heads, torch.arange(10))["codes"], coded(10, seed=9)["codes"])


def test_a_folder_gives_the_same_and_leaves_no_file(llama, ids, tmp_path):
    cache = recall(llama, store=tmp_path)
    assert torch.equal(score(llama, ids, cache), score(llama, ids, recall(llama)))
    assert cache.nbytes()["host"] == recall_nbytes(llama, ids)["host"]
    for layer in cache.layers:
        told = os.fstat(layer.store.file.fileno())
        assert told.st_mode & 0o777 == 0o600 and told.st_size >= 100 * layer.store.record
    if os.name == "posix":
        assert not list(tmp_path.iterdir())


def recall_nbytes(model, ids):
    cache = recall(model)
    score(model, ids, cache)
    return cache.nbytes()


def test_a_store_without_room_says_so_and_keeps_what_it_holds(tmp_path, monkeypatch):
    store = opened(FolderStore(tmp_path))
    store.write(0, coded(64))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="bytes in .* are free: make room") as caught:
        store.write(64, coded(6400))
    assert caught.value.errno == errno.ENOSPC and store.tokens == 64
    rows, heads = torch.arange(3)[:, None, None], torch.arange(2)[:, None]
    assert torch.equal(store.read(rows, heads, torch.arange(64))["codes"], coded(64)["codes"])
    with pytest.raises(MemoryError, match="store='path'"):
        opened(HostStore())._resized(2**60)


@pytest.mark.parametrize("where", ["host", "folder"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_alone(llama, ids, where, copied, tmp_path):
    store = "host" if where == "host" else tmp_path
    cache, whole = recall(llama, store=store), recall(llama)
    expected = torch.cat(
        [llama(part, past_key_values=whole).logits for part in ids.split([70, *[1] * 30], 1)], 1
    )
    llama(ids[:, :70], past_key_values=cache)
    other = copied(cache)
    llama(ids[:, :70].flip(1), past_key_values=cache)  # what one reads is not what the other has read
    found = [llama(token, past_key_values=other).logits for token in ids[:, 70:].split(1, 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected[:, 70:], atol=1e-4, rtol=0)
    assert not (where == "folder" and os.listdir(tmp_path))


# Bytes and bad input


@pytest.mark.parametrize("bits", [None, (5, 4)])
def test_bytes_are_those_of_the_tensors_held(llama, ids, bits):
    cache = recall(llama, bits=bits)
    score(llama, ids, cache)
    told, layers = cache.nbytes(), cache.layers
    slots = sum(t.nbytes for layer in layers for t in layer.slots.tensors())
    shared = {id(t): t for layer in layers for t in layer.slots.codec.shared() + layer.index.shared()}
    index = sum(t.nbytes for layer in layers for t in layer.index.arrays.values())
    assert told["total"] == slots + index + sum(t.nbytes for t in shared.values())
    assert told["total"] == sum(told[kind] for kind in ("kv", "sketch", "policy", "index"))
    host = (t for layer in layers for t in (layer.store.pages, layer.store.table, layer.index.pending))
    assert told["host"] == sum(t.nbytes for t in host)
    assert layers[0].slots.capacity == 40
    row = layers[0].store.record
    moved = cache.traffic()
    assert moved["fetched"] == moved["missing"] * row
    settled = 32 if bits else 0  # tokens that are coded twice
    key = 16 * 2  # of each token, for the open block of the index
    assert moved["written"] == 2 * 2 * 2 * ((100 + settled) * row + 100 * key)


def test_a_folder_that_went_before_the_first_token_is_told(llama, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    cache = recall(llama, store=folder)
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match="folder is gone: make it again.*store"):
        llama(torch.ones(1, 30, dtype=torch.int64), past_key_values=cache)


def test_bad_combinations_are_told(llama):
    for changes, message in (
        (dict(max_cache_size=323), "4 sinks, a recent window of 64 and the top 256 .* raise it to 324"),
        (dict(recent_window=32), "raise recent_window to 64"),
        (dict(fine_window=65), "fine_window must be .* 64"),
        (dict(attend_topk=300), "index and attend_topk exclude"),
        (dict(prefill_chunk=64), "index and prefill_chunk exclude"),
        (dict(policy=Window()), "index and policy exclude"),
        (dict(store="/no/such/folder"), "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            SketchCache.recall(llama.config, **changes)
    with pytest.raises(TypeError, match="KeyIndex"):
        SketchCache(llama.config, 400, index=256)
    windows = transformers.MistralConfig(num_hidden_layers=2, sliding_window=4096)
    with pytest.raises(
        ValueError, match="all layers of this model have sliding windows.*take SketchCache.compact"
    ):
        SketchCache.recall(windows)
    SketchCache.recall(llama.config, max_cache_size=324)
    fine = recall(llama, codec=quantized((5, 4), newest=17))
    with pytest.raises(ValueError, match="raise recent_window to 17 or lower fine_window"):
        llama(torch.ones(1, 30, dtype=torch.int64), past_key_values=fine)


def test_a_model_in_float64_keeps_its_digits(llama, ids):
    llama, cache = llama.double(), SketchCache.recall(llama.config, 84, top=16, bits=None, summary=None)
    parts = [llama(part, past_key_values=cache).logits for part in (ids[:, :70], ids[:, 70:])]
    assert (torch.cat(parts, 1) - llama(ids).logits).abs().max() < 1e-10
