"""What went wrong once, as kinds: passes that break off, threads, masks, precision, gradients, wrappers."""

import copy
import itertools
import threading

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import named
from transformers import DynamicCache

import sketchkv
from sketchkv import AttentionMass, Random, SketchCache, Summary, Window, disable, enable, generate, score
from sketchkv.index import KeyIndex
from sketchkv.ops import Eager

COMMON = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
NEW = dict(max_new_tokens=24, do_sample=False, eos_token_id=None)


def tiny(cls=tf.LlamaForCausalLM, config=tf.LlamaConfig, frozen=True, **changes):
    torch.manual_seed(0)
    model = cls(config(**COMMON | changes)).eval()
    with torch.no_grad():  # attention that chooses, so that a wrong token shows
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.requires_grad_(not frozen)


@pytest.fixture
def llama():
    return enable(tiny())


@pytest.fixture
def text():
    return torch.randint(1, 97, (1, 100), generator=torch.Generator().manual_seed(1))


def small(model, cap=32, **settings):
    return SketchCache(model.config, cap, **({"recent_window": 8, "evict_every": 5} | settings))


def close(one, other, atol=1e-4):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# A pass that breaks off, at any point, for any reason


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt is none."""


def stop_at(model, cache, point, error, monkeypatch):
    """Lets the next pass break off at `point`; returns what takes that back."""

    def stop(*args, **kwargs):
        raise error

    decoder = model.model
    modules = {
        "embedding": decoder.embed_tokens,
        "first layer": decoder.layers[0],
        "keys": decoder.layers[0].self_attn.k_proj,
        "output of attention": decoder.layers[0].self_attn.o_proj,
        "second layer": decoder.layers[1],
        "keys of the second layer": decoder.layers[1].self_attn.k_proj,
        "output of the last attention": decoder.layers[1].self_attn.o_proj,
        "last norm": decoder.norm,
        "head": model.lm_head,
    }
    if point in modules:
        return modules[point].register_forward_pre_hook(stop).remove
    layer = cache.layers[1]
    name, owner = {
        "update": ("update", layer),
        "storing": ("append", layer.ops),
        "attention": ("attend", layer.ops),
        "eviction": ("evict", layer.ops),
        "score": ("score", layer.policy),
        "memory": ("lazy_initialization", layer),
        "memory of the policy": ("allocate", layer.policy),
    }[point]
    with_instance = vars(owner).get(name)

    def restore():
        if with_instance is None:
            delattr(owner, name)
        else:
            setattr(owner, name, with_instance)

    setattr(owner, name, stop)
    return restore


POINTS = (
    "embedding",
    "first layer",
    "keys",
    "output of attention",
    "second layer",
    "keys of the second layer",
    "output of the last attention",
    "last norm",
    "head",
    "update",
    "storing",
    "attention",
    "eviction",
    "score",
    "memory",
    "memory of the policy",
)
NOTHING_STORED = {"embedding", "first layer", "keys"}


@pytest.mark.parametrize("begun", [0, 50])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), torch.OutOfMemoryError("x")], ids=type
)
def test_a_pass_that_breaks_off(llama, text, monkeypatch, point, begun, error):
    if begun and point.startswith("memory"):
        pytest.skip("memory is taken in the first pass")
    plain, bounded = llama(text).logits, llama(text, past_key_values=small(llama)).logits
    cache = small(llama)
    if begun:
        llama(text[:, :begun], past_key_values=cache)
    restore = stop_at(llama, cache, point, error, monkeypatch)
    with pytest.raises(type(error)):
        llama(text[:, begun:], past_key_values=cache)
    restore()
    # The model is as it was, for calls without a cache and with any other.
    assert torch.equal(llama(text).logits, plain)
    assert torch.equal(llama(text, past_key_values=small(llama)).logits, bounded)
    close(llama(text, past_key_values=DynamicCache(config=llama.config)).logits, plain)
    # Trying again stores no token twice: it goes well if none was stored, and is refused otherwise.
    if point in NOTHING_STORED:
        close(llama(text[:, begun:], past_key_values=cache).logits, bounded[:, begun:])
        assert cache.seen_tokens == 100
    else:
        for again in (llama, llama.model, llama):
            with pytest.raises(RuntimeError, match="reset"):
                again(text[:, begun:], past_key_values=cache)
        with pytest.raises((RuntimeError, ValueError), match="reset"):
            generate(llama, text, cache)
        with pytest.raises(RuntimeError, match="reset"):
            llama.generate(text, past_key_values=cache, **NEW)
    cache.reset()
    assert torch.equal(llama(text, past_key_values=cache).logits, bounded)


@pytest.mark.parametrize("point", sorted(NOTHING_STORED))
def test_after_a_break_what_comes_is_announced_anew(llama, text, point, monkeypatch):
    """The ids, the mask and the module of a pass that broke off before it stored anything are forgotten."""
    fresh = small(llama, policy=sketchkv.Sketch(key="token", width=4096))
    expected = [
        llama.model(text, past_key_values=fresh).last_hidden_state,
        llama(text[:, :1], past_key_values=fresh).logits,
    ]
    for outer in (llama, llama.model):
        cache = small(llama, policy=sketchkv.Sketch(key="token", width=4096))
        restore = stop_at(llama, cache, point, KeyboardInterrupt(), None)
        with pytest.raises(KeyboardInterrupt):
            outer(text.flip(1), past_key_values=cache)
        restore()
        close(llama.model(text, past_key_values=cache).last_hidden_state, expected[0])
        close(llama(text[:, :1], past_key_values=cache).logits, expected[1])
        assert cache.seen_tokens == 101


def test_retrying_a_failed_step_of_generate(llama, text):
    calls = itertools.count()

    def stop(*args):
        if next(calls) == 7:
            raise torch.OutOfMemoryError("x")

    expected = llama.generate(text, past_key_values=small(llama), **NEW)
    hook, cache = llama.lm_head.register_forward_pre_hook(stop), small(llama)
    with pytest.raises(torch.OutOfMemoryError):
        llama.generate(text, past_key_values=cache, **NEW)
    hook.remove()
    with pytest.raises(RuntimeError, match="reset"):
        llama.generate(text, past_key_values=cache, **NEW)
    cache.reset()
    assert torch.equal(llama.generate(text, past_key_values=cache, **NEW), expected)


def test_interrupt_in_a_widened_prompt_and_in_reset(llama, text):
    cache = small(llama, prefill_chunk=48, bits=4)
    expected = llama(text, past_key_values=cache).logits
    cache.reset()
    restore = stop_at(llama, cache, "eviction", Stop(), None)
    with pytest.raises(Stop):
        llama(text, past_key_values=cache)
    restore()
    with pytest.raises(RuntimeError, match="reset"):
        llama(text, past_key_values=cache)
    cache.layers[1].policy.reset = lambda slots: (_ for _ in ()).throw(Stop())
    with pytest.raises(Stop):
        cache.reset()
    del cache.layers[1].policy.reset
    cache.reset()
    assert torch.equal(llama(text, past_key_values=cache).logits, expected)


class Breaking:
    """Raises in the call number `when` of a method of `owner`."""

    def __init__(self, owner, name, when):
        self.calls, self.when, self.owner, self.name, self.real = 0, when, owner, name, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.when:
            delattr(self.owner, self.name)
            raise Stop
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("point", ["open", "write", "read", "add", "choose", "reserve"])
@pytest.mark.parametrize("begun", [0, 70])
def test_a_pass_of_a_cache_with_an_index_that_breaks_off(llama, text, point, begun):
    def make():
        index = KeyIndex(16, block=16)
        cache = SketchCache(llama.config, 48, index=index, num_sinks=4, recent_window=16, bits=4)
        if point in ("write", "read", "choose"):  # what compiled steps do by themselves
            for layer in cache.layers:
                layer.ops = Eager()
        return cache

    def run(cache, start):
        steps = [text[:, start:70]] * (start == 0) + list(text[:, max(start, 70) :].split(1, 1))
        return torch.cat([llama(step, past_key_values=cache).logits for step in steps], 1)

    expected, cache = run(make(), 0), make()
    if begun:
        if point == "open":
            pytest.skip("a store is opened in the first pass")
        llama(text[:, :begun], past_key_values=cache)
    layer = cache.layers[1]
    Breaking(layer.index if point in ("add", "choose") else layer.store, point, 1)
    with pytest.raises(Stop):
        run(cache, begun)
    with pytest.raises(RuntimeError, match="reset"):
        run(cache, begun)
    cache.reset()
    assert torch.equal(run(cache, 0), expected)


# Threads


def caches(model):
    return {
        "bounded": lambda: small(model),
        "quantized": lambda: small(model, bits=4, summary=Summary()),
        "full": lambda: DynamicCache(config=model.config),
        "none": lambda: None,
        "recall": lambda: SketchCache(
            model.config, 48, index=KeyIndex(16, block=16), num_sinks=4, recent_window=16
        ),
    }


@pytest.mark.parametrize(
    "one, other", [("bounded", "quantized"), ("bounded", "full"), ("bounded", "none"), ("recall", "bounded")]
)
def test_two_threads_give_what_each_gives_alone(llama, text, one, other):
    kinds = caches(llama)
    prompts = {one: text[:, :50], other: text[:, 40:70]}
    new = NEW | dict(max_new_tokens=8)
    alone = {
        name: llama.generate(prompts[name], past_key_values=kinds[name](), **new) for name in (one, other)
    }
    rounds, wrong, start = 20, [], threading.Barrier(2)

    def work(name):
        for _ in range(rounds):
            start.wait(60)
            try:
                if not torch.equal(
                    llama.generate(prompts[name], past_key_values=kinds[name](), **new), alone[name]
                ):
                    wrong.append(name)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(name,)) for name in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_passes_interleaved_in_the_middle(llama, text):
    """A pass of another cache, or none, inside of a pass: as two threads do it at the worst moment."""
    expected = {name: llama(text, past_key_values=make()).logits for name, make in caches(llama).items()}
    for outer, inner in itertools.product(expected, expected):
        seen, depth = [], []

        def inside(*args, inner=inner, seen=seen, depth=depth):
            if not depth:
                depth.append(1)
                seen.append(llama(text, past_key_values=caches(llama)[inner]()).logits)

        hook = llama.model.layers[1].self_attn.k_proj.register_forward_pre_hook(inside)
        around = llama(text, past_key_values=caches(llama)[outer]()).logits
        hook.remove()
        assert torch.equal(around, expected[outer]) and torch.equal(seen[0], expected[inner]), (outer, inner)


# Without a SketchCache, an enabled model is what it was


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attentions", [False, True])
def test_enabled_model_is_bit_equal(text, implementation, attentions):
    plain = tiny()
    plain.set_attn_implementation(implementation)
    enabled = enable(copy.deepcopy(plain))
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :30] = 0
    block = torch.ones(100, 100, dtype=torch.bool).tril()
    block[:30, :30] = True
    calls = [
        {},
        dict(use_cache=False),
        dict(attention_mask=mask),
        dict(attention_mask=block.expand(2, 1, 100, 100)),
        dict(output_hidden_states=True),
    ]
    for given in calls:
        answers = []
        for model in (plain, enabled):
            try:
                answers.append(model(text.repeat(2, 1), output_attentions=attentions, **given))
            except Exception as error:
                answers.append(repr(error))
        if isinstance(answers[0], str):
            assert answers[0] == answers[1]
            continue
        assert torch.equal(answers[0].logits, answers[1].logits)
        for name in ("attentions", "hidden_states"):
            one, other = (answer.get(name) for answer in answers)
            assert (one is None) == (other is None) and len(one or ()) == len(other or ())
            assert all(
                a is b is None or torch.equal(a, b) for a, b in zip(one or (), other or (), strict=True)
            )
    if implementation == "eager" and attentions:
        assert len(enabled(text, output_attentions=True).attentions) == 2
    assert torch.equal(enabled.generate(text, **NEW), plain.generate(text, **NEW))
    assert disable(enabled).config._attn_implementation == implementation


def test_enabled_model_trains_as_before(text):
    plain = tiny(frozen=False)
    enabled = enable(copy.deepcopy(plain))
    for model in (plain, enabled):
        model(text, labels=text).loss.backward()
    for one, other in zip(plain.parameters(), enabled.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# Gradients and inference mode


def test_weights_that_require_gradients(text):
    model = enable(tiny(frozen=False))
    with torch.no_grad():
        expected = model(text, past_key_values=small(model)).logits
    for settings in ({}, dict(bits=4), dict(summary=Summary())):
        cache = small(model, **settings)
        logits = [model(text[:, start : start + 1], past_key_values=cache).logits for start in range(100)]
        assert torch.cat(logits, 1).shape == (1, 100, 97)
        if not settings:
            close(torch.cat(logits, 1), expected)
    assert score(model, text, small(model)).isfinite().all()


@pytest.mark.parametrize("cap", [32, 512])
def test_training_through_the_cache_is_refused(text, cap):
    model = enable(tiny(frozen=False))
    with pytest.raises(RuntimeError, match="trained through.*without past_key_values"):
        model(text, labels=text, past_key_values=small(model, cap)).loss.backward()
    model(text, labels=text).loss.backward()
    embeds = model.get_input_embeddings()(text).detach().requires_grad_()
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="trained through"):
        model(inputs_embeds=embeds, past_key_values=small(model, cap)).logits.sum().backward()


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(bits=(5, 4), summary=Summary(4, True, True)),
        dict(prefill_chunk=20, bits=4),
        dict(attend_topk=20),
        dict(policy=Random()),
        dict(bits=(5, 4), index=KeyIndex(top=8, block=16), recent_window=16),
    ],
    ids=named,
)
@pytest.mark.parametrize("order", list(itertools.permutations(MODES, 2)))
def test_modes_may_change(text, settings, order):
    model = enable(tiny(frozen=False))
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[0, :7] = 0
    cache, answers = small(model, **settings), []
    for mode in (*order, *order):
        with MODES[mode]():
            out = model(text.repeat(2, 1), attention_mask=mask, past_key_values=cache).logits
            answers.append(model(text[:, :1].repeat(2, 1), past_key_values=cache).logits.detach().clone())
            assert out.isfinite().all()
        cache.reset()
    assert all(torch.equal(answer, answers[0]) for answer in answers[1:])
    with MODES[order[0]]():
        model(text[:, :50], past_key_values=cache)
    with MODES[order[1]]():  # in the middle of a text
        assert model(text[:, 50:], past_key_values=cache).logits.isfinite().all()


# Reset


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(bits=(5, 4), summary=Summary(4, True, True)),
        dict(prefill_chunk=48),
        dict(attend_topk=20),
        dict(policy=Random()),
    ],
    ids=named,
)
def test_reset_allows_another_batch_and_dtype(llama, text, settings):
    cache = small(llama, **settings)
    rows = text.repeat(3, 1)
    rows[1] = text.flip(1)
    for batch in (2, 1, 3, 3):
        expected = llama(rows[:batch], past_key_values=small(llama, **settings)).logits
        assert torch.equal(llama(rows[:batch], past_key_values=cache).logits, expected)
        cache.reset()
        assert cache.seen_tokens == 0 and cache.evicted_tokens == 0 and cache.stored_tokens() == [0, 0]
    half = copy.deepcopy(llama).to(torch.bfloat16)
    assert half(text, past_key_values=cache).logits.dtype == torch.bfloat16


# Half precision, and keys that are not finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [{}, dict(summary=Summary()), dict(bits=16)], ids=named)
def test_large_queries_and_keys_are_finite_where_sdpa_is(dtype, settings):
    model = (
        tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON | dict(num_hidden_layers=1, head_dim=64)))
        .eval()
        .to(dtype)
    )
    model.requires_grad_(False)
    attention = model.model.layers[0].self_attn
    for projection in (
        attention.q_proj,
        attention.k_proj,
    ):  # |q| = |k| = 400: their product passes float16's 65504
        weight = projection.weight.view(-1, 64, 64)
        weight.copy_(torch.eye(64, dtype=dtype).expand_as(weight) * 400 / 8)
    text = torch.randint(1, 97, (1, 60))
    expected = model(text).logits
    assert expected.isfinite().all()
    enable(model)
    got = model(text, past_key_values=small(model, 64, **settings)).logits
    assert got.isfinite().all()
    assert (got - expected).abs().max() < 0.1 * expected.abs().max()
    assert model(text, past_key_values=small(model, **settings)).logits.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "settings",
    [
        dict(bits=4),
        dict(bits=(16, 4)),
        dict(bits=16),
        dict(summary=Summary()),
        dict(summary=Summary(4, True)),
        dict(bits=(5, 4), summary=Summary(protects=True)),
        {},
    ],
    ids=named,
)
@pytest.mark.parametrize("where", ["k_proj", "v_proj"])
def test_what_is_not_finite_leaves_no_trace(llama, text, bad, settings, where):
    """Once the token is evicted, output is finite: neither centre nor summary remembers it."""

    def spoil(module, args, output):
        if output.shape[1] > 1:
            output[:, 10, 3] = bad
        return output

    cache = small(llama, policy=Window(), **settings)
    hook = getattr(llama.model.layers[1].self_attn, where).register_forward_hook(spoil)
    llama(text[:, :60], past_key_values=cache)
    hook.remove()
    assert (cache.kept_positions(1) != 10).all()
    assert llama(text[:, 60:], past_key_values=cache).logits.isfinite().all()
    slots = cache.layers[1].slots
    assert all(tensor.isfinite().all() for tensor in (slots["keys"], slots["values"], *slots.codec.tensors()))
    if cache.layers[1].summary:
        assert all(tensor.isfinite().all() for tensor in cache.layers[1].summary.tensors())


# Masks


def test_masks_of_four_dimensions_are_refused(llama, text):
    block = torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()
    for mask in (
        block,
        block.float(),
        torch.zeros(1, 1, 100, 100),
        block[0],
        {"full_attention": block},
        [1] * 100,
    ):
        with pytest.raises(ValueError, match="2-D attention_mask"):
            llama(text, attention_mask=mask, past_key_values=small(llama, 128))


@pytest.mark.parametrize("begun", [0, 60])
def test_masks_that_cannot_be(llama, text, begun):
    """Right padding, holes, hidden tokens: refused, and the cache goes on as if nothing had come."""
    expected = llama(text, past_key_values=small(llama)).logits
    cache, ones = small(llama), torch.ones(1, 100, dtype=torch.long)
    if begun:
        llama(text[:, :begun], past_key_values=cache)
    masks = []
    for hidden in (slice(80, 100), slice(70, 75), slice(10, 30), slice(0, 5) if begun else slice(99, 100)):
        mask = ones.clone()
        mask[:, hidden] = 0
        masks.append(mask)
    for mask in masks:
        with pytest.raises(ValueError, match="pad on the left"):
            llama(text[:, begun:], attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="pad on the left"):
            llama(text[:, begun:], attention_mask=mask.bool(), past_key_values=cache)
    for wrong in (ones[:, 1:], torch.ones(1, 101), torch.ones(2, 100), ones[:, begun + 1 :], ones[:, :0]):
        with pytest.raises(ValueError, match=r"must be \[batch, tokens so far\]"):
            llama(text[:, begun:], attention_mask=wrong, past_key_values=cache)
    for values in (-ones, 2 * ones, torch.full((1, 100), torch.nan), 0.5 * ones):
        with pytest.raises(ValueError, match="0 for padding"):
            llama(text[:, begun:], attention_mask=values, past_key_values=cache)
    close(llama(text[:, begun:], attention_mask=ones, past_key_values=cache).logits, expected[:, begun:])


def test_a_mask_of_padding_must_stay_what_it_was(llama, text):
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[1, :9] = 0
    rows, cache = text.repeat(2, 1), small(llama)
    llama(rows[:, :60], attention_mask=mask[:, :60], past_key_values=cache)
    for wrong in (torch.ones_like(mask), mask.flip(0)):
        with pytest.raises(ValueError, match="pad on the left"):
            llama(rows[:, 60:61], attention_mask=wrong, past_key_values=cache)
    with_mask = llama(rows[:, 60:61], attention_mask=mask, past_key_values=cache).logits
    assert with_mask.isfinite().all()


# Callers' arguments


class Tokenized(dict):
    """What a tokenizer returns: keys as attributes, too."""

    __getattr__ = dict.__getitem__


def tokenized(ids, mask=None):
    return tf.BatchEncoding({"input_ids": ids} | ({} if mask is None else {"attention_mask": mask}))


def test_a_tokenizers_output(llama, text):
    expected = generate(llama, text, small(llama))
    ones = torch.ones_like(text)
    for given in (
        tokenized(text),
        tokenized(text, ones),
        {"input_ids": text},
        Tokenized(input_ids=text, attention_mask=ones),
    ):
        assert torch.equal(generate(llama, given, small(llama)), expected)
        assert torch.equal(score(llama, given, small(llama)), score(llama, text, small(llama)))
    rows, mask = text.repeat(2, 1), torch.ones(2, 100, dtype=torch.long)
    mask[1, :40] = 0
    both = generate(llama, tokenized(rows, mask), small(llama, 128))
    assert torch.equal(both, generate(llama, rows, small(llama, 128), attention_mask=mask))
    assert torch.equal(both[1, 100:], generate(llama, text[:, 40:], small(llama, 128))[0, 60:])
    with pytest.raises(ValueError, match="padding can't be scored"):
        score(llama, tokenized(rows, mask), small(llama))
    with pytest.raises(ValueError, match="on the left"):
        generate(llama, tokenized(rows, mask.flip(1)), small(llama))


def test_ends_of_text(llama, text):
    free = generate(llama, text, small(llama), 12)[0, 100:].tolist()
    later = free[4]
    first = free.index(later)
    for given in (
        later,
        [later],
        (later, 96),
        [96, later],
        torch.tensor([later]),
        np.int64(later),
        np.array([later, 96]),
    ):
        ended = generate(llama, text, small(llama), 12, eos_token_id=given)
        assert ended[0, 100:].tolist() == free[: first + 1]
    rows = torch.cat([text, text.flip(1)])
    ended = generate(llama, rows, small(llama), 12, eos_token_id=[later], pad_token_id=5)
    tail = ended[0, 100 + first + 1 :]
    assert (tail == 5).all()
    config = tf.GenerationConfig(eos_token_id=[later, 96], pad_token_id=5)
    assert torch.equal(generate(llama, rows, small(llama), 12, generation_config=config), ended)
    assert generate(llama, text, small(llama), 5, eos_token_id=[2, 3]).shape[1] <= 105


def test_generation_config(llama, text):
    config = tf.GenerationConfig(do_sample=True, temperature=0.7, top_k=5, top_p=0.9)
    torch.manual_seed(3)
    expected = generate(llama, text, small(llama), 12, do_sample=True, temperature=0.7, top_k=5, top_p=0.9)
    torch.manual_seed(3)
    assert torch.equal(generate(llama, text, small(llama), 12, generation_config=config), expected)
    torch.manual_seed(3)  # transformers' own loop draws the same
    settings = dict(generation_config=config, max_new_tokens=12)
    assert torch.equal(llama.generate(text, past_key_values=small(llama), **settings), expected)
    greedy = generate(llama, text, small(llama), 6)
    assert torch.equal(
        generate(llama, text, small(llama), 6, generation_config=llama.generation_config), greedy
    )


def test_streamer(llama, text):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value)

        def end(self):
            self.ended = True

    own, theirs = Streamer(), Streamer()
    out = generate(llama, text, small(llama), 6, streamer=own)
    llama.generate(text, past_key_values=small(llama), streamer=theirs, **NEW | dict(max_new_tokens=6))
    assert own.ended and torch.equal(torch.cat([part.flatten() for part in own.got]), out[0])
    assert [part.tolist() for part in own.got] == [part.tolist() for part in theirs.got]


@pytest.mark.parametrize(
    "kind", [np.int64, np.int32, np.uint8, torch.tensor, np.array], ids=lambda kind: kind.__name__
)
def test_whole_numbers_of_other_libraries(llama, text, kind):
    settings = dict(num_sinks=4, recent_window=8, evict_every=5, prefill_chunk=20, attend_topk=20, bits=4)
    policies = dict(width=64, depth=3, lsh_bits=12, seed=5)
    expected = SketchCache(
        llama.config, 32, policy=sketchkv.Sketch(**policies), summary=Summary(4), **settings
    )
    given = {name: kind(value) for name, value in settings.items()}
    policy = sketchkv.Sketch(**{name: kind(value) for name, value in policies.items()})
    cache = SketchCache(llama.config, kind(32), policy=policy, summary=Summary(kind(4)), **given)
    ids = generate(llama, text, cache, kind(12), eos_token_id=kind(96), chunk_size=kind(30))
    assert torch.equal(ids, generate(llama, text, expected, 12, eos_token_id=96, chunk_size=30))
    assert cache.nbytes() == expected.nbytes()
    score(
        llama,
        text,
        SketchCache(llama.config, [kind(32), kind(40)], policy=Random(kind(3))),
        chunk_size=kind(9),
    )
    sampled = generate(
        llama, text, small(llama), 3, do_sample=True, top_k=kind(5), temperature=np.float32(0.5)
    )
    assert sampled.shape == (1, 103)
    decayed = AttentionMass(np.float32(0.5), mean=np.bool_(True))
    score(llama, text, small(llama, policy=decayed))


def test_use_cache_false_excludes_our_cache(llama, text):
    for call in (
        lambda: llama(text, past_key_values=small(llama), use_cache=False),
        lambda: llama.model(text, past_key_values=small(llama), use_cache=False),
        lambda: llama.generate(text, past_key_values=small(llama), use_cache=False, **NEW),
    ):
        with pytest.raises(ValueError, match="use_cache=False and a SketchCache exclude each other"):
            call()
    llama.config.use_cache = False  # a default of the configuration forbids nothing
    assert llama(text, past_key_values=small(llama)).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_maps_are_refused_with_our_cache(text, implementation):
    model = tiny()
    model.set_attn_implementation(implementation)
    enable(model)
    maps = dict(output_attentions=True)
    for call in (
        lambda: model(text, past_key_values=small(model), **maps),
        lambda: model.model(text, past_key_values=small(model), **maps),
        lambda: model.generate(
            text, past_key_values=small(model), return_dict_in_generate=True, **maps, **NEW
        ),
    ):
        with pytest.raises(ValueError, match="can't give attention maps.*leave output_attentions out"):
            call()
    out = model(text, past_key_values=small(model), output_attentions=False, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and "attentions" not in out


def test_attention_maps_that_the_configuration_asks_for(text):
    model = tiny()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert len(enable(model)(text).attentions) == 2
    with pytest.raises(ValueError, match="can't give attention maps"):
        model(text, past_key_values=small(model))
    assert model(text, past_key_values=small(model), output_attentions=False).logits.isfinite().all()


def test_a_used_cache_is_refused(llama, text):
    cache = small(llama)
    llama.generate(text[:, :60], past_key_values=cache, **NEW)
    other = text.flip(1)
    with pytest.raises(ValueError, match="reset"):
        generate(llama, other, cache)
    with pytest.raises(ValueError, match="reset"):
        score(llama, other, cache)
    for length in (10, 60, 80):
        with pytest.raises(ValueError, match="reset"):
            llama.generate(other[:, :length], past_key_values=cache, **NEW)


def test_chunks_of_a_prompt_do_not_matter(llama, text):
    for settings in ({}, dict(attend_topk=20), dict(bits=4), dict(summary=Summary())):
        expected = generate(llama, text, small(llama, **settings))
        for chunk_size in (1, 7, 48, 100):
            assert torch.equal(
                generate(llama, text, small(llama, **settings), chunk_size=chunk_size), expected
            )


# Models that can't be bounded are refused, those that can are right

MODELS = {
    "sliding Mistral": lambda: tiny(tf.MistralForCausalLM, tf.MistralConfig, sliding_window=16),
    "sliding Phi-3": lambda: tiny(tf.Phi3ForCausalLM, tf.Phi3Config, sliding_window=16, pad_token_id=0),
    "sliding Starcoder2": lambda: tiny(tf.Starcoder2ForCausalLM, tf.Starcoder2Config, sliding_window=16),
    "sliding Mixtral": lambda: tiny(
        tf.MixtralForCausalLM, tf.MixtralConfig, sliding_window=16, num_local_experts=4
    ),
    "OPT": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=97,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
        )
    ).eval(),
    "GPT-J": lambda: tf.GPTJForCausalLM(
        tf.GPTJConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    ).eval(),
    "DeepSeek V3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **COMMON | dict(num_key_value_heads=4),
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
        )
    ).eval(),
    "gpt-oss": lambda: with_sinks(
        tiny(
            tf.GptOssForCausalLM,
            tf.GptOssConfig,
            head_dim=16,
            num_local_experts=4,
            layer_types=["full_attention"] * 2,
        )
    ),
    "Gemma 2": lambda: with_eager(
        tiny(
            tf.Gemma2ForCausalLM, tf.Gemma2Config, head_dim=16, sliding_window=16, attn_logit_softcapping=5.0
        )
    ),
    "Falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).eval(),
    "BLOOM": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=2, n_head=4)
    ).eval(),
    "MPT": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4)).eval(),
    "GPT-Neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]
        )
    ).eval(),
}


def with_eager(model):  # SDPA, their default, leaves softcap and sinks out
    model.set_attn_implementation("eager")
    return model


def with_sinks(model):
    with_eager(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_are_right_or_refused(text, name):
    model = MODELS[name]().requires_grad_(False)
    expected = model(text).logits
    try:
        enable(model)
    except ValueError as error:
        assert type(model).__name__ in str(error)
        assert name not in (
            "sliding Mistral",
            "sliding Phi-3",
            "sliding Starcoder2",
            "sliding Mixtral",
            "gpt-oss",
            "Gemma 2",
        )
        return
    assert torch.equal(model(text).logits, expected)
    try:
        close(model(text, past_key_values=SketchCache(model.config, 128)).logits, expected)
    except ValueError as error:
        pytest.fail(f"enable() let it through, then: {error}")
    cache = SketchCache(model.config, 128)
    close(torch.cat([model(part, past_key_values=cache).logits for part in text.split(9, 1)], 1), expected)


NO_DECODERS = {
    "encoder": lambda: tf.BertModel(tf.BertConfig(**BERT)),
    "encoder with a head": lambda: tf.BertLMHeadModel(tf.BertConfig(**BERT)),
    "masked model": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "vision": lambda: tf.ViTModel(
        tf.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    ),
    "encoder-decoder": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=97,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
        )
    ),
}
BERT = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}


@pytest.mark.parametrize("name", NO_DECODERS)
def test_what_is_no_decoder_is_refused(name):
    model = NO_DECODERS[name]()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=type(model).__name__):
        enable(model)
    assert model.config._attn_implementation == before and not model._forward_pre_hooks


# Wrapped models


@pytest.mark.parametrize("first", ["enabled", "wrapped"])
def test_peft(text, first):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    plain = tiny()
    torch.manual_seed(1)
    expected = peft.get_peft_model(copy.deepcopy(plain), adapter).eval()
    reference = expected(text).logits
    torch.manual_seed(1)
    if first == "enabled":
        wrapped = peft.get_peft_model(enable(plain), adapter).eval()
    else:
        wrapped = enable(peft.get_peft_model(plain, adapter).eval())
    assert (
        torch.equal(wrapped(text).logits, reference) and (reference - tiny()(text).logits).abs().max() > 0.1
    )
    close(wrapped(text, past_key_values=SketchCache(wrapped.config, 128)).logits, reference)
    new = dict(input_ids=text, **NEW)
    assert torch.equal(
        wrapped.generate(past_key_values=SketchCache(wrapped.config, 128), **new), expected.generate(**new)
    )
    bounded = generate(wrapped, text, small(wrapped))
    assert torch.equal(
        bounded,
        wrapped.generate(input_ids=text, past_key_values=small(wrapped), **NEW | {"max_new_tokens": 20}),
    )
    assert torch.equal(disable(wrapped)(text).logits, reference)


def test_a_module_around_the_model(text):
    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model = tiny()
    expected = enable(copy.deepcopy(model))(text, past_key_values=small(model)).logits
    around = enable(Around(model))
    assert torch.equal(around(text, past_key_values=small(around)).logits, expected)


def test_least_recently_used_beyond_float32():
    """Whole numbers of float32 end at 2^24: ages, not places in the text, decide."""
    from sketchkv.slots import Plain, Slots

    slots = Slots((1, 1), 4, (8, 8), Plain(torch.float32, "cpu"))
    policy, seen = sketchkv.LRU(), 2**30 + 4
    policy.allocate(slots)
    keys = torch.zeros(1, 1, 4, 8)
    positions = torch.arange(2**30, 2**30 + 4, dtype=torch.int32)[None]
    policy.enter(slots, slots.append(keys, keys, positions), None)
    scores = policy.score(slots, seen)[0, 0]
    assert scores.argsort().tolist() == [0, 1, 2, 3] and len(scores.unique()) == 4


def test_positions_end_in_words(llama, text):
    cache = small(llama)
    llama(text[:, :5], past_key_values=cache)
    for layer in cache.layers:
        layer.seen = 2**31 - 3
    with pytest.raises(ValueError, match="int32"):
        llama(text, past_key_values=cache)
