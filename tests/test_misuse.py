"""Caches used again, by other models, with padding, pictures or odd settings: the right result, or an error that helps."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from test_failing import COMMON, tiny
from transformers import GenerationConfig

from sketchkv import AttentionMass, SketchCache, Window, enable, generate, score
from sketchkv.index import KeyIndex
from sketchkv.loading import LoadError, _check_files
from sketchkv.policies import exposure
from sketchkv.sketch import CountMinSketch
from sketchkv.tail import Tail

WIDE = dict(head_dim=16)


@pytest.fixture(scope="module")
def model():
    return enable(tiny(**WIDE))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (1, 400), generator=torch.Generator().manual_seed(1))


def steps(model, ids, cache, mask=None, at_once=1):
    """Logits of a text that passes in parts."""
    found = []
    with torch.no_grad():
        for end in range(at_once, ids.shape[1] + 1, at_once):
            own = {} if mask is None else {"attention_mask": mask[:, :end]}
            found.append(model(ids[:, end - at_once : end], past_key_values=cache, **own).logits)
    return torch.cat(found, 1)


def test_pictures_that_are_seen_both_ways_are_refused(ids):
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**COMMON, **WIDE, layer_types=["full_attention"] * 2),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        mm_tokens_per_image=4,
    )
    model = enable(tf.Gemma3ForConditionalGeneration(config).eval())
    kinds = torch.zeros(1, 60, dtype=torch.long)
    with torch.no_grad():
        model(ids[:, :60], token_type_ids=kinds, past_key_values=SketchCache(config, 128))
        kinds[:, 10:30] = 1
        with pytest.raises(ValueError, match="leave the pictures out"):
            model(ids[:, :60], token_type_ids=kinds, past_key_values=SketchCache(config, 128))


def test_another_text_is_refused_after_a_call_that_failed_early(model, ids):
    cache = SketchCache(model.config, 64)
    new = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    model(ids[:, :50], past_key_values=cache)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids[:, 50:51], inputs_embeds=torch.zeros(1, 1, 64), past_key_values=cache)
    with pytest.raises(ValueError, match="another text"):
        model.generate(ids[:, 100:180], past_key_values=cache, **new)
    with pytest.raises(ValueError, match="1 rows, and this prompt with its beams has 2"):
        model.generate(ids[:, :60], past_key_values=cache, num_beams=2, **new)
    assert model.generate(ids[:, :60], past_key_values=cache, **new).shape == (1, 65)


def test_an_index_that_was_used_before_is_of_no_consequence(model, ids):
    def made(index):
        return SketchCache(model.config, 96, index=index, summary=Tail(), bits=(6, 5), recent_window=32)

    used = KeyIndex(top=16, block=32)
    used.add(torch.randn(1, 2, 10, 16))
    fresh, cache = made(KeyIndex(top=16, block=32)), made(used)
    assert torch.equal(steps(model, ids[:, :150], cache), steps(model, ids[:, :150], fresh))
    half = copy.deepcopy(model).to(torch.bfloat16)
    again = made(KeyIndex(top=16, block=32))
    steps(half, ids[:, :100], again)
    again.reset()
    fresh.reset()
    assert torch.equal(steps(model, ids[:, :150], again), steps(model, ids[:, :150], fresh))


@pytest.mark.parametrize("num_sinks", (0, 1))
def test_padding_does_not_centre_keys(model, ids, num_sinks):
    text, mask = ids[0, :240].view(2, 120), torch.ones(2, 120, dtype=torch.long)
    mask[0, :70] = 0

    def found(at_once):
        cache = SketchCache(model.config, 100, num_sinks=num_sinks, policy=Window(), bits=4)
        return steps(model, text, cache, mask, at_once)[mask.bool()]

    torch.testing.assert_close(found(1), found(120), atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", (16, 31, 32, 40))
def test_a_small_window_in_few_bits_does_not_depend_on_chunks(ids, window):
    model = enable(tiny(tf.MistralForCausalLM, tf.MistralConfig, sliding_window=window, **WIDE))
    found = [
        steps(model, ids[:, :100], SketchCache(model.config, 200, bits=4), at_once=count)
        for count in (1, 100)
    ]
    # Sums in another order may move a centre, in float16, by a digit.
    torch.testing.assert_close(*found, atol=1e-3, rtol=0)


def test_a_cache_of_another_model(model, ids):
    cache = SketchCache(model.config, 64)
    for changes in (dict(num_key_value_heads=1), dict(num_key_value_heads=4), dict(head_dim=32)):
        other = enable(tiny(**WIDE | changes))
        cache.reset()
        found = steps(other, ids[:, :100], cache)
        assert torch.equal(found, steps(other, ids[:, :100], SketchCache(other.config, 64)))
        with pytest.raises(ValueError, match="use a new cache for another model"):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize(
    "more",
    (
        *(dict(repetition_penalty=5.0), dict(num_beams=2), dict(min_p=0.1), dict(no_repeat_ngram_size=2)),
        *(dict(max_time=1.0), dict(exponential_decay_length_penalty=(1, 5.0)), dict(use_cache=False)),
        *(dict(cache_implementation="static"), dict(return_dict_in_generate=True)),
    ),
)
def test_a_configuration_that_asks_for_more_is_refused(model, ids, more):
    with pytest.raises(ValueError, match=f"{next(iter(more))}=.*model.generate"):
        generate(model, ids[:, :9], generation_config=GenerationConfig(**more))


def test_a_configuration_is_taken(model, ids):
    config = GenerationConfig(max_new_tokens=7, temperature=0.6)  # greedy: the temperature is without effect
    assert generate(model, ids[:, :9], generation_config=config).shape == (1, 16)
    assert generate(model, ids[:, :9], max_new_tokens=3, generation_config=config).shape == (1, 12)


@pytest.mark.parametrize("decay", (0.99995, 1 - 1e-8))
def test_a_decay_whose_sums_lose_their_digits_is_refused(decay):
    with pytest.raises(ValueError, match="decay must be 1 or at most 0.9999"):
        AttentionMass(decay)
    exact = (1 - 0.9999**1000) / (1 - 0.9999)
    assert exposure(torch.tensor(1000), 0.9999).item() == pytest.approx(exact, rel=2e-3)


def test_padding_takes_no_position_and_one_token_may_be_asked_for(ids):
    gpt2 = enable(
        tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        ).eval()
    )
    mask = torch.ones(1, 80, dtype=torch.long)
    mask[:, :40] = 0
    given = {"input_ids": ids[:, :80], "attention_mask": mask}
    for count in (1, 5):
        assert generate(gpt2, given, SketchCache(gpt2.config, 64), count).shape == (1, 80 + count)
    with pytest.raises(ValueError, match="84 tokens are more than the model's 64"):
        generate(gpt2, ids[:, :80], SketchCache(gpt2.config, 64), 5)
    with pytest.raises(ValueError, match="padding can't be scored"):
        score(gpt2, given, SketchCache(gpt2.config, 64))


def test_a_step_that_failed_before_any_layer_may_be_made_again(model, ids):
    cache, want = SketchCache(model.config, 64), SketchCache(model.config, 64)
    for each in (cache, want):
        model(ids[:, :50], past_key_values=each)
    with pytest.raises(KeyError), cache.passes.announced(ids[:, 50:51], model):
        raise KeyError
    for part in (slice(51, 52), slice(52, 57)):
        found = [model(ids[:, part], past_key_values=each).logits for each in (cache, want)]
        assert torch.equal(*found)


def test_finer_settings_that_cannot_be(model):
    SketchCache.recall(model.config, 4096, index=KeyIndex(block=32), recent_window=32)
    with pytest.raises(ValueError, match="max_cache_size"):
        SketchCache.compact(model.config, [])
    with pytest.raises(ValueError, match="recent_window must be"):
        SketchCache.recall(model.config, 512, recent_window="64")
    with pytest.raises(ValueError, match="num_sinks must be"):
        SketchCache.compact(model.config, 256, num_sinks="4")


def test_sums_of_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    good = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    (tmp_path / "SHA256SUMS").write_text(f"\n{good} *config.json\n{good}  config.json\n")
    _check_files(tmp_path, "a")
    for wrong in ("0" * 64 + " *config.json", good + "  missing.json", good):
        (tmp_path / "SHA256SUMS").write_text(wrong)
        with pytest.raises(LoadError):
            _check_files(tmp_path, "a")


def test_operations_of_a_copy_may_be_replaced_as_its_own(model, ids):
    cache = SketchCache.compact(model.config, 64)
    model(ids[:, :40], past_key_values=cache)
    for each in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert all(layer.ops.suits for layer in each.layers)


def test_messages_name_what_to_do(ids):
    model = enable(tiny(frozen=False))
    with pytest.raises(RuntimeError, match="call the model as it is"):
        torch.compile(model, backend="eager")(ids, past_key_values=SketchCache(model.config, 64))
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(ids, past_key_values=SketchCache(model.config, 64))


def test_memory_is_of_all_layers(model, ids, monkeypatch):
    one = SketchCache(model.config, 64)
    model(ids[:, :2], past_key_values=one)
    held = one.layers[0].nbytes()
    need = held["kv"] + held["policy"]
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(1.2 * need)}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    with pytest.raises(ValueError, match="lower max_cache_size"):
        model(ids[:, :2], past_key_values=SketchCache(model.config, 64))


@pytest.mark.parametrize("weights", (torch.tensor([True, False]), True, torch.tensor([1j, 1j])))
def test_weights_that_are_no_numbers(weights):
    with pytest.raises(TypeError, match="weights must be"):
        CountMinSketch(16, 2).update(torch.tensor([1, 2]), weights)


def test_double_precision_stays_double(ids):
    model = tiny(**WIDE).double()
    with torch.no_grad():
        want = model(ids[:, :60]).logits
    found = steps(enable(model), ids[:, :60], SketchCache(model.config, 64))
    torch.testing.assert_close(found, want, atol=1e-9, rtol=0)
    assert score(model, ids[:, :100], SketchCache.compact(model.config, 64)).isfinite().all()


@pytest.mark.parametrize("windows", [(24, None), (None, 24), (24, 32)])
def test_a_cache_of_a_model_with_other_windows_is_refused(ids, windows):
    """Of as many layers: it would see too little, or too much, without a word."""

    def config(window):
        shape = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
        return tf.MistralConfig(vocab_size=97, intermediate_size=32, sliding_window=window, **shape)

    model, other = enable(tf.MistralForCausalLM(config(windows[0])).eval()), config(windows[1])
    with torch.no_grad():
        model(ids[:, :60], past_key_values=SketchCache(model.config, 64))
        with pytest.raises(ValueError, match=r"windows \[.*SketchCache\(model.config"):
            model(ids[:, :60], past_key_values=SketchCache(other, 64))


def test_max_length_of_a_configuration_counts_the_prompt(model, ids):
    for length, expected in ((16, 16), (5, 9)):
        config = GenerationConfig(max_length=length)
        assert generate(model, ids[:, :9], generation_config=config).shape == (1, expected)
        assert generate(model, ids[:, :9], max_new_tokens=3, generation_config=config).shape == (1, 12)


def test_cache_position_changes_nothing(model, ids):
    with torch.no_grad():
        found, expected = (
            model(ids, past_key_values=SketchCache(model.config, 300), **more).logits
            for more in ({"cache_position": torch.arange(ids.shape[1])}, {})
        )
    assert torch.equal(found, expected)
