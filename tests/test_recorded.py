"""Steps that `model.generate` records by itself. Without a GPU the same steps run one by one."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from conftest import VOCABULARY, build, named
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CompileConfig,
    DynamicCache,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from sketchkv import (
    H2O,
    AttentionMass,
    Random,
    Sketch,
    SketchCache,
    Summary,
    Window,
    continued,
    disable,
    enable,
)
from sketchkv.fast import recorded
from sketchkv.fast.graphs import StepGraphs
from sketchkv.fast.recorded import Waits, pretended, state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture
def steps(monkeypatch):
    """Counts recorded steps; on a CPU models and caches are taken for those of a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(recorded, "on_one_gpu", lambda model: True)
        monkeypatch.setattr(continued, "records", lambda device: True)
    with mock.patch.object(StepGraphs, "__call__", autospec=True, side_effect=StepGraphs.__call__) as count:
        yield count


@pytest.fixture
def llama():
    return enable(build("llama")).to(DEVICE)


def cache_of(model, **settings):
    return SketchCache(model.config, 40, **{"evict_every": 4} | settings)


def written(model, ids, cache, new=20, **settings):
    """What `model.generate` writes."""
    given = dict(attention_mask=torch.ones_like(ids)) | GREEDY | settings
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, **given)


def as_it_is(model, ids, cache, new=20, **settings):
    return written(model, ids, cache, new, disable_compile=True, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(policy=Sketch(key="token")),
        dict(policy=H2O()),
        dict(policy=Window()),
        dict(attend_topk=30),
        dict(bits=(5, 4), summary=Summary(), policy=AttentionMass(value_norm=True)),
    ],
    ids=named,
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_same_tokens_text_after_text(architecture, ids, steps, settings):
    model, ids = enable(build(architecture)).to(DEVICE), ids.to(DEVICE)
    caches = [cache_of(model, **settings) for _ in range(2)]
    for length in (50, 36, 36):  # before the first eviction, too
        expected = as_it_is(model, ids[:, :length], caches[0])
        assert not steps.called
        assert torch.equal(written(model, ids[:, :length], caches[1]), expected)
        assert steps.call_count == 19
        for layer in range(2):
            kept = [cache.kept_positions(layer).sort(-1).values for cache in caches]
            assert torch.equal(*kept) and caches[0].evicted_tokens == caches[1].evicted_tokens > 0
        # The text goes on, and another one is told from it.
        longer = torch.cat([expected, ids[:, :3]], 1)
        told = [
            go_on(model, longer, cache, 5) for go_on, cache in zip((as_it_is, written), caches, strict=True)
        ]
        assert torch.equal(*told)
        other = told[0].clone()
        other[0, length + 5] += 1
        with pytest.raises(ValueError, match="another text"):
            written(model, torch.cat([other, ids[:, :2]], 1), caches[1])
        for cache in caches:
            cache.reset()
        steps.reset_mock()
    assert DEVICE == "cpu" or caches[1].recordings.graphs


def test_recall(steps):
    model = enable(build("llama")).to(DEVICE)
    ids = torch.randint(1, VOCABULARY, (2, 200), device=DEVICE)
    caches = [SketchCache.recall(model.config, 100, top=12) for _ in range(2)]
    assert torch.equal(written(model, ids, caches[1]), as_it_is(model, ids, caches[0]))
    assert steps.call_count == 19


def test_sampling_beams_streams_and_what_is_asked_for(llama, ids, steps):
    ids = ids[:, :50].to(DEVICE)
    for given, count in (
        (dict(do_sample=True, top_k=20), 19),
        (dict(num_beams=3), 0),
        (dict(return_dict_in_generate=True, output_scores=True, output_logits=True), 19),
        (dict(return_dict_in_generate=True, output_hidden_states=True), 0),
        (dict(new=1), 0),
        (dict(stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[:, -1] > 90])), None),
        (dict(prefill_chunk_size=16), 19),
    ):
        found = []
        for run in (as_it_is, written):
            torch.manual_seed(0)
            found.append(run(llama, ids, cache_of(llama), **given))
        assert count is None or steps.call_count == count, given
        steps.reset_mock()
        if not isinstance(found[0], torch.Tensor):
            assert [len(each) for each in found[0].values() if isinstance(each, tuple)] == [
                len(each) for each in found[1].values() if isinstance(each, tuple)
            ]
            for scores in zip(*(each.scores or () for each in found), strict=True):
                torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
            found = [each.sequences for each in found]
        assert torch.equal(*found), given


def test_padded_texts_run_as_they_are(llama, padding, steps):
    ids, mask = (x[:, :60].to(DEVICE) for x in padding)
    expected = as_it_is(llama, ids, cache_of(llama), attention_mask=mask)
    assert torch.equal(written(llama, ids, cache_of(llama), attention_mask=mask), expected)
    assert not steps.called


def test_positions_that_are_given(llama, ids, steps):
    """Any that the model takes."""
    ids = ids[:, :50].to(DEVICE)
    position_ids = 7 + torch.arange(50, device=DEVICE).expand(2, -1)
    expected = as_it_is(llama, ids, cache_of(llama), position_ids=position_ids)
    assert torch.equal(written(llama, ids, cache_of(llama), position_ids=position_ids), expected)
    assert steps.called


def test_what_is_switched_off_or_drawn_or_made_elsewhere_is_not_recorded(llama, ids, steps):
    class Own(Window):
        pass

    ids = ids[:, :50].to(DEVICE)
    for cache in (cache_of(llama, policy=Random()), cache_of(llama, policy=Own())):
        twin = copy.deepcopy(cache)
        assert torch.equal(written(llama, ids, cache), as_it_is(llama, ids, twin))
    written(llama, ids, DynamicCache(config=llama.config), disable_compile=True)
    assert not steps.called


def test_a_model_that_changes(llama, ids, steps):
    """In place, weight by weight, by a number in a module; and another model."""
    ids, cache = ids[:, :50].to(DEVICE), cache_of(llama)
    layer, norm = llama.model.layers[0].mlp.up_proj, llama.model.layers[1].input_layernorm
    other = enable(build("llama")).to(DEVICE)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.neg_()

    def negate():
        layer.weight.neg_()

    def replace():
        layer.weight = torch.nn.Parameter(layer.weight.roll(1), requires_grad=False)

    def scale():
        norm.variance_epsilon = 3.0

    def configure():  # of a Llama it changes nothing, others read it in each pass
        llama.config.logits_scaling = 2.0

    texts = []
    for change, model in (
        (lambda: None, llama),
        (negate, llama),
        (replace, llama),
        (scale, llama),
        (lambda: None, other),
    ):
        with torch.no_grad():
            change()
        cache.reset()
        texts.append(as_it_is(model, ids, cache_of(model)))
        assert torch.equal(written(model, ids, cache), texts[-1])
    assert len({str(text.tolist()) for text in texts}) == 5
    before = state(llama)
    assert state(llama) == before
    configure()
    assert state(llama) != before
    llama.to(torch.float64)
    assert state(llama) != before


def test_hooks_are_called_at_each_step(llama, ids, steps):
    ids, calls, mlp = ids[:, :50].to(DEVICE), [], llama.model.layers[0].mlp
    expected = as_it_is(llama, ids, cache_of(llama))
    for begin in (
        lambda: mlp.register_forward_hook(lambda *_: calls.append(1)),
        lambda: mlp.register_forward_pre_hook(lambda *_: calls.append(1)),
        lambda: torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(1) if module is mlp else None
        ),
    ):
        calls.clear()
        hook = begin()
        assert torch.equal(written(llama, ids, cache_of(llama)), expected) and len(calls) == 20
        hook.remove()
    own = mlp.forward
    mlp.forward = lambda x: calls.append(1) or own(x)
    calls.clear()
    assert torch.equal(written(llama, ids, cache_of(llama)), expected) and len(calls) == 20
    assert not steps.called


def test_modules_that_others_wrote_run_at_each_step(llama, ids, steps):
    class Steered(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.seen = inner, []

        def forward(self, x):
            self.seen.append(x)
            return self.inner(x)

    llama.model.layers[1].mlp = Steered(llama.model.layers[1].mlp)
    written(llama, ids[:, :50].to(DEVICE), cache_of(llama))
    assert len(llama.model.layers[1].mlp.seen) == 20 and not steps.called


def test_recordings_keep_no_cache_alive(llama, ids, steps):
    cache = cache_of(llama)
    written(llama, ids[:, :50].to(DEVICE), cache)
    assert steps.called and cache.recordings is not None
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        steps.reset_mock()  # holds what it was called with
        assert gone() is None
    finally:
        gc.enable()


def test_an_inner_model_that_generates():
    """transformers makes no masks of its own, as it would for a cache that can be compiled."""
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    text = dict(model_type="opt", ffn_dim=48, vocab_size=VOCABULARY, word_embed_proj_dim=32) | small
    config = Blip2Config(
        vision_config=small | dict(image_size=16, patch_size=8),
        qformer_config=small | dict(encoder_hidden_size=32),
        text_config=text,
        num_query_tokens=4,
        image_token_index=VOCABULARY - 1,
    )
    model = enable(Blip2ForConditionalGeneration(config).eval().to(DEVICE))
    ids, cache = torch.randint(1, 90, (1, 60), device=DEVICE), SketchCache(config, 40)
    ids[:, :4] = VOCABULARY - 1
    assert not cache.is_compileable
    given = dict(pixel_values=torch.randn(1, 3, 16, 16, device=DEVICE), input_ids=ids, past_key_values=cache)
    model.generate(**given, attention_mask=torch.ones_like(ids), max_new_tokens=20, **GREEDY)
    assert cache.evicted_tokens > 0


def test_a_model_gets_what_it_prepares(llama, ids):
    class Prepares(type(llama)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs) | {"attention_mask": None}

    llama.__class__, got = Prepares, []
    llama.register_forward_pre_hook(
        lambda module, args, given: got.append(given["attention_mask"]), with_kwargs=True
    )
    written(llama, ids[:, :50].to(DEVICE), cache_of(llama))
    assert got == 20 * [None]


def test_a_model_that_makes_the_host_wait_is_not_recorded(llama, ids, steps):
    class Looks(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) if x.abs().max().item() < 1e9 else x

    Looks.__module__ = "transformers"  # what others wrote is not recorded
    ids = ids[:, :50].to(DEVICE)
    llama.model.layers[1].mlp = Looks(llama.model.layers[1].mlp)
    cache = cache_of(llama)
    assert torch.equal(written(llama, ids, cache), as_it_is(llama, ids, cache_of(llama)))
    assert not cache.recordings.graphs and (cache.recordings.waits or DEVICE == "cpu")


def test_what_waits():
    x = torch.arange(4.0, device=DEVICE)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool((x > 3).any()), lambda: x[x > 2]):
        with Waits() as waits:
            x + 1, x.clone(), x.to(torch.float64), torch.zeros(3, device=DEVICE)
            assert not waits.found
            wait()
        assert waits.found
    with Waits() as waits:
        x[torch.tensor([0, 2], device=DEVICE)]  # an index, no mask
    assert not waits.found
    with Waits() as waits:
        x.to("meta")
    assert waits.found


def test_checks_that_a_recording_leaves_out_do_not_count(gpt2, ids):
    """GPT-2 looks for padding where it is given no mask, but not while it is recorded."""
    model, token = gpt2.to(DEVICE), ids[:, :1].to(DEVICE)
    with torch.no_grad(), Waits() as waits:
        model(token)
    assert waits.found
    with torch.no_grad(), pretended(), Waits() as waits:
        model(token)
    assert not waits.found and torch.cuda.is_current_stream_capturing.__module__.startswith("torch")


def test_an_error_in_the_middle(llama, ids, steps):
    """A streamer that fails between two steps leaves the cache whole; an error within a step is told, and `reset` helps."""

    class Fails(BaseStreamer):
        left = 8

        def put(self, value):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        def end(self):
            pass

    ids, cache = ids[:1, :50].to(DEVICE), cache_of(llama)
    expected = as_it_is(llama, ids, cache_of(llama))
    with pytest.raises(KeyboardInterrupt):
        written(llama, ids, cache, streamer=Fails())
    seen = cache.seen_tokens
    assert torch.equal(written(llama, expected[:, : seen + 1], cache, 69 - seen), expected)
    for reset in (True, False):
        if reset:
            cache.reset()
            with (
                mock.patch.object(StepGraphs, "_run", side_effect=MemoryError),
                pytest.raises(MemoryError),
            ):
                written(llama, ids, cache)
            cache.reset()
        else:
            cache = cache_of(llama)
        assert torch.equal(written(llama, ids, cache), expected)


def test_a_text_that_is_as_long_as_the_one_before_was_at_its_end(llama, ids, steps):
    """The device's count of slots is right even where the count of tokens seen is the same by chance."""
    ids, cache = ids.to(DEVICE), cache_of(llama, evict_every=16, prefill_chunk=64)
    written(llama, ids[:, :45], cache, 10)
    cache.reset()
    twin = cache_of(llama, evict_every=16, prefill_chunk=64)
    assert torch.equal(written(llama, ids[:, :54], cache), as_it_is(llama, ids[:, :54], twin))


def test_copies_of_a_cache_record_for_themselves(llama, ids, steps):
    ids, cache = ids[:, :50].to(DEVICE), cache_of(llama)
    longer = torch.cat([written(llama, ids, cache), ids[:, :4]], 1)
    twin, third = copy.deepcopy(cache), pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    assert cache.recordings is not None and twin.recordings is None
    expected = written(llama, longer, cache)
    assert torch.equal(written(llama, longer, twin), expected)
    assert torch.equal(written(llama, longer, third), expected)


def test_inference_mode_and_autocast(llama, ids, steps):
    ids, cache = ids[:, :50].to(DEVICE), cache_of(llama)
    expected = as_it_is(llama, ids, cache_of(llama))
    with torch.inference_mode():
        assert torch.equal(written(llama, ids, cache), expected)
    cache.reset()
    assert torch.equal(written(llama, ids, cache), expected)
    if DEVICE == "cuda":
        steps.reset_mock()
        with torch.autocast("cuda", torch.bfloat16):
            written(llama, ids, cache_of(llama))
        assert not steps.called


def test_nan_importance_is_told(llama, ids, steps):
    cache = cache_of(llama, policy=Window())
    ids = ids[:, :50].to(DEVICE)
    with pytest.raises(ValueError, match="NaN importance"):
        with mock.patch("sketchkv.layer.BoundedLayer.check", side_effect=ValueError("NaN importance")):
            written(llama, ids, cache, 256)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_other_caches_and_a_compile_config(llama, ids, steps):
    """Those of transformers are compiled as transformers has it; a `CompileConfig` compiles ours."""
    ids = ids[:, :50].to(DEVICE)
    expected = as_it_is(llama, ids, cache_of(llama))
    assert torch.equal(written(llama, ids, cache_of(llama), compile_config=CompileConfig()), expected)
    assert steps.called
    with mock.patch("torch.compile") as compiled:
        plain = disable(copy.deepcopy(llama))
        full = written(plain, ids, DynamicCache(config=plain.config))
        assert torch.equal(written(llama, ids, DynamicCache(config=llama.config)), full)
        assert torch.equal(written(llama, ids, cache_of(llama)), expected)
    assert not compiled.called


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_threads(llama, ids, steps):
    texts = [ids[:, start : start + 50].to(DEVICE) for start in range(0, 32, 8)]
    expected = [as_it_is(llama, text, cache_of(llama), 40) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: written(llama, text, cache_of(llama), 40), texts))
    assert all(map(torch.equal, found, expected))
