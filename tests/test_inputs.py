"""Wrong input by surface: what is given, the error that must come, and words of its remedy."""

import copy
import types

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import build, named
from transformers import DynamicCache, GenerationConfig

import sketchkv
from sketchkv import (
    AttentionMass,
    CountMinSketch,
    Policy,
    Random,
    Sketch,
    SketchCache,
    SnapKV,
    Summary,
    Window,
    disable,
    enable,
    generate,
    score,
)
from sketchkv.index import KeyIndex
from sketchkv.store import HostStore
from sketchkv.tail import Tail

NAN, INF = float("nan"), float("inf")
HUGE = 10**12
WHOLE, UNIT, BOOLEAN = (
    "must be a whole number, at least",
    r"must be a number in \(0, 1\]",
    "must be True or False",
)
BITS = r"bits must be one of \(16, 8, 6, 5, 4, 3, 2\), or a pair"
GIVEN = r"must be a tensor \[batch, tokens\] or a tokenizer's output with return_tensors='pt'"
MASK_SHAPE = "must be a tensor of the shape of input_ids"
MASK_VALUES = "must be 0 for padding, 1 for tokens, and padding must be on the left"


@pytest.fixture(scope="module")
def world():
    """A model, a text of two rows, and short names for what the cases do."""
    model = enable(build("gpt2"))
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(1))

    def cache(cap=32, **settings):
        return SketchCache(model.config, cap, **({"recent_window": 8, "evict_every": 5} | settings))

    def used():
        full = cache()
        score(model, ids, full)
        return full

    return types.SimpleNamespace(
        model=model,
        ids=ids,
        cache=cache,
        used=used,
        ones=torch.ones_like(ids),
        config=model.config,
        rotary=enable(build("llama")),
    )


def cases(surface, call, *rows):
    """Rows of (what is given, error, words); `call` is a function of (world, what is given)."""
    return [pytest.param(call, *row, id=f"{surface}: {_short(row[0])}") for row in rows]


def _short(given):
    if isinstance(given, torch.Tensor):
        return f"{str(given.dtype)[6:]} {list(given.shape)}"
    return "".join(letter for letter in named(repr(given)) if letter.isprintable())[:48]


def whole_numbers(name, least=1, none=True, bounded=True):
    """What is no whole number of at least `least`. none: None, too; bounded: what is too large, too."""
    given = [
        least - 1,
        -HUGE,
        1.5,
        float(least + 40),
        NAN,
        INF,
        "40",
        True,
        np.True_,
        torch.tensor(True),
        {},
        b"4",
    ]
    given += ([None] if none else []) + ([HUGE * HUGE] if bounded else [])
    return [(each, ValueError, f"{name}.* {WHOLE}") for each in given]


def numbers_to_one(name):
    given = (0, -0.5, 1.5, NAN, INF, "0.9", None, True, np.True_, [0.9], 1e-40, 0.5j)
    return [(each, ValueError, f"{name} {UNIT}") for each in given]


def flags(name):
    return [
        (each, ValueError, f"{name} {BOOLEAN}")
        for each in ("false", 0, 1, None, 1.0, [True], torch.tensor([True, False]))
    ]


def recall(world, **settings):
    given = dict(max_cache_size=64, index=KeyIndex(16, block=16), num_sinks=4, recent_window=16) | settings
    return SketchCache(world.config, **given)


class Wrong(Policy):
    """A user's own policy that gives whatever it is told."""

    def __init__(self, scores):
        self.scores = scores

    def score(self, slots, seen):
        return self.scores(slots)


def table(name):
    return f"Wrong.score.. must return one number per stored token.*got.*{name}"


NO_CONFIGURATION = "must be a transformers configuration such as model.config"
ENABLE = "takes a transformers model, such as AutoModelForCausalLM gives"
CAUSAL = "must be a causal language model of transformers"
TAKES_A_CACHE = "must be a SketchCache or another transformers cache"

SETTINGS = [
    *cases(
        "cap",
        lambda w, given: w.cache(given),
        *whole_numbers("max_cache_size"),
        ([], ValueError, "list of 2, one per layer"),
        ([40], ValueError, "list of 2, one per layer"),
        ([40, 40, 40], ValueError, "list of 2, one per layer"),
        ([40, "40"], ValueError, WHOLE),
        ([40, None], ValueError, WHOLE),
        (range(2), ValueError, WHOLE),
        (12, ValueError, "leaves nothing to choose.*raise the cap above 12"),
        ([40, 12], ValueError, "raise the cap above 12"),
        (HUGE, ValueError, "at most 2147483647"),
        (torch.tensor([40, 40]), ValueError, WHOLE),
        (np.array([40, 40]), ValueError, WHOLE),
    ),
    *cases(
        "num_sinks",
        lambda w, given: w.cache(num_sinks=given),
        *whole_numbers("num_sinks", 0),
        (24, ValueError, "lower num_sinks"),
        (40, ValueError, "lower num_sinks"),
    ),
    *cases(
        "recent_window",
        lambda w, given: w.cache(recent_window=given),
        *whole_numbers("recent_window", 0),
        (28, ValueError, "lower num_sinks, recent_window"),
    ),
    *cases(
        "evict_every",
        lambda w, given: w.cache(evict_every=given),
        *whole_numbers("evict_every"),
        (10**15, ValueError, "at most 2147483647"),
    ),
    *cases(
        "fine_window",
        lambda w, given: SketchCache.compact(w.config, 64, fine_window=given),
        *whole_numbers("fine_window", 0, False),
        (65, ValueError, "at most"),
    ),
    *cases(
        "prefill_chunk",
        lambda w, given: w.cache(prefill_chunk=given),
        *whole_numbers("prefill_chunk", 5, False),
        (4, ValueError, "at least 5"),
        (0, ValueError, "at least 5"),
        (HUGE, ValueError, "at most 2147483647"),
    ),
    *cases(
        "attend_topk",
        lambda w, given: w.cache(attend_topk=given),
        *whole_numbers("attend_topk", 1, False),
        (12, ValueError, "raise it above 12"),
        (33, ValueError, "more than max_cache_size=32.*lower it, or leave it out"),
        (HUGE, ValueError, "at most 2147483647"),
    ),
    *cases(
        "bits",
        lambda w, given: w.cache(bits=given),
        *[
            (each, ValueError, BITS)
            for each in (
                0,
                1,
                7,
                9,
                32,
                -4,
                4.0,
                "4",
                True,
                [4],
                [4, 4, 4],
                (4, None),
                (None, 4),
                (4, 4.0),
                {},
                NAN,
                "int4",
                torch.float16,
                np.array([4, 4]),
                torch.tensor([4, 4]),
                (),
                HUGE,
            )
        ],
    ),
    *cases(
        "codec",
        lambda w, given: w.cache(codec=given),
        *[
            (each, TypeError, "codec must be a function of")
            for each in (3, "plain", {}, True, int, len, lambda: 0)
        ],
    ),
    *cases(
        "bits and codec",
        lambda w, given: w.cache(bits=4, codec=given),
        (sketchkv.slots.Plain, TypeError, "either bits= or codec="),
    ),
    *cases(
        "summary",
        lambda w, given: w.cache(summary=given),
        *[
            (each, TypeError, r"must be a sketchkv.summary.Summary, such as Summary\(1\), or None")
            for each in (1, True, "mean", Summary, Tail, [Summary()], {}, Window())
        ],
        (Tail(), TypeError, "what an index leaves out.*take SketchCache.recall or give index="),
    ),
    *cases(
        "policy",
        lambda w, given: w.cache(policy=given),
        *[
            (each, TypeError, "policy must be a sketchkv Policy|one per layer")
            for each in (
                "window",
                Window,
                3,
                [Window()],
                [Window(), None],
                [Window] * 2,
                [],
                {"policy": Window()},
                Summary(),
                True,
            )
        ],
    ),
    *cases(
        "config",
        lambda w, given: SketchCache(given, 40),
        *[
            (each, TypeError, NO_CONFIGURATION)
            for each in (None, {}, 3, "gpt2", torch.nn.Linear(2, 2), tf.GPT2Config, [], DynamicCache())
        ],
    ),
    *cases(
        "unknown",
        lambda w, given: w.cache(**given),
        ({"widht": 3}, TypeError, "no parameter 'widht'"),
        *[
            ({name: 3}, TypeError, f"no parameter '{name}': write policy=Sketch")
            for name in ("width", "depth", "key", "decay", "mean", "lsh_bits", "seed")
        ],
        ({"summary_slots": HUGE}, TypeError, r"write summary=Summary\("),
        ({"quantizer": "kivi"}, TypeError, "write bits="),
        *[
            ({name: 3}, TypeError, f"no parameter '{name}': write")
            for name in ("kind", "counters", "coarse_bits", "fine", "demote", "shared")
        ],
        ({"max_size": 3, "widht": 3}, TypeError, "no parameter 'max_size'"),
        ({"widht": 3}, TypeError, "did you mean 'width'"),
        *[
            ({name: 3}, TypeError, rf"no parameter '{name}': write .*{taker}\({given}{name}=...\)")
            for taker, given, names in (
                ("SketchCache.compact", "..., ", ["fine_window"]),
                ("SketchCache.recall", "..., ", ["fine_window", "top", "store"]),
                ("policy=AttentionMass", "", ["decay", "mean", "value_norm"]),
                ("summary=Summary", "", ["count", "spread", "protects"]),
                ("index=KeyIndex", "", ["top", "store", "pooling", "block", "exact_prompts"]),
                ("codec=quantized", "", ["newest", "finer"]),
            )
            for name in names
        ],
    ),
    *cases(
        "compact",
        lambda w, given: SketchCache.compact(w.config, 64, **given),
        ({"foo": 3}, TypeError, "no parameter 'foo'"),
        ({"bits": 7}, ValueError, BITS),
        ({"width": 3}, TypeError, "write policy=Sketch"),
        ({"summary": 1}, TypeError, "such as Summary"),
        ({"policy": "sketch"}, TypeError, "must be a sketchkv Policy"),
        ({"top": 3}, TypeError, r"write SketchCache.recall\(..., top=...\)"),
        ({"store": "host"}, TypeError, r"write SketchCache.recall\(..., store=...\)"),
        ({"summary": Tail()}, TypeError, "take SketchCache.recall"),
        ({"index": KeyIndex(16), "summary": None}, ValueError, "SketchCache.recall has what fits"),
    ),
    *cases(
        "recall",
        lambda w, given: SketchCache.recall(w.config, 400, index=KeyIndex(16), **given),
        ({"top": 8}, TypeError, "give either index= or top=, store="),
        ({"store": HostStore()}, TypeError, "give either index= or top=, store="),
    ),
    *cases(
        "compact config",
        lambda w, given: SketchCache.compact(*given),
        ((None, 64), TypeError, NO_CONFIGURATION),
        ((tf.GPT2Config(), "64"), ValueError, WHOLE),
    ),
    *cases(
        "Summary",
        lambda w, given: Summary(given),
        *whole_numbers("summary slots"),
        (HUGE, ValueError, "at most"),
    ),
    *cases("Summary(spread)", lambda w, given: Summary(spread=given), *flags("spread")),
    *cases("Summary(protects)", lambda w, given: Summary(protects=given), *flags("protects")),
    *cases(
        "exact_prompts",
        lambda w, given: recall(w, index=KeyIndex(16, block=16, exact_prompts=given)),
        *flags("exact_prompts"),
    ),
    *cases(
        "index",
        lambda w, given: w.cache(index=given),
        *[
            (each, TypeError, r"such as KeyIndex\(top=256\), or None")
            for each in (3, True, "signs", {}, KeyIndex, Window())
        ],
    ),
    *cases(
        "store",
        lambda w, given: recall(w, index=KeyIndex(16, block=16, store=given)),
        *[
            (each, ValueError, "is no folder: make it first, or write store='host'")
            for each in ("nowhere", 3, None, True, HostStore, b"host", ["host"], "HOST", "README.md")
        ],
    ),
    *cases(
        "index and",
        lambda w, given: recall(w, **given),
        *[
            (each, ValueError, "exclude each other")
            for each in (
                {"policy": Window()},
                {"attend_topk": 50},
                {"prefill_chunk": 50},
            )
        ],
        *[
            ({"summary": each}, TypeError, r"give summary=sketchkv.tail.Tail\(\)")
            for each in (Summary(), Tail, 1, "mean")
        ],
        ({"recent_window": 8}, ValueError, "raise recent_window to 16"),
        ({"max_cache_size": 30}, ValueError, "can't hold .* raise it to 36"),
    ),
    *cases("KeyIndex(top)", lambda w, given: KeyIndex(given), *whole_numbers("top", bounded=False)),
    *cases(
        "KeyIndex(block)", lambda w, given: KeyIndex(block=given), *whole_numbers("block", 16, bounded=False)
    ),
    *cases(
        "KeyIndex(num_sinks)",
        lambda w, given: KeyIndex(num_sinks=given),
        *whole_numbers("num_sinks", 0, bounded=False),
    ),
    *cases(
        "KeyIndex",
        lambda w, given: KeyIndex(**given),
        *[
            (each, ValueError, "bits 1, 2 or 4, pooling one of .* block a multiple of 16")
            for each in ({"bits": 3}, {"bits": 8}, {"pooling": "mean"}, {"pooling": None}, {"block": 24})
        ],
        ({"bits": "1"}, ValueError, f"bits {WHOLE}"),
        ({"bits": 1.0}, ValueError, f"bits {WHOLE}"),
    ),
    *cases(
        "pyramid",
        lambda w, given: sketchkv.pyramid(*given),
        ((64, 4, 1), ValueError, "between -1 and 1"),
        ((64, 4, NAN), ValueError, "between -1 and 1"),
        ((64, 4, "1"), ValueError, "between -1 and 1"),
        ((64, 4, True), ValueError, "between -1 and 1"),
        ((64, 0), ValueError, f"layers {WHOLE}"),
        ((64.5, 4), ValueError, f"max_cache_size {WHOLE}"),
        (("64", 4), ValueError, f"max_cache_size {WHOLE}"),
        ((64, None), ValueError, f"layers {WHOLE}"),
    ),
]

POLICIES = [
    *cases("AttentionMass(decay)", lambda w, given: AttentionMass(given), *numbers_to_one("decay")),
    *cases("AttentionMass(mean)", lambda w, given: AttentionMass(mean=given), *flags("mean")),
    *cases(
        "AttentionMass(value_norm)", lambda w, given: AttentionMass(value_norm=given), *flags("value_norm")
    ),
    *cases(
        "Sketch(width)",
        lambda w, given: Sketch(width=given),
        *whole_numbers("width"),
        (2**31, ValueError, "at most 2147483647"),
    ),
    *cases(
        "Sketch(depth)",
        lambda w, given: Sketch(depth=given),
        *whole_numbers("depth"),
        (10**9, ValueError, "at most 65536"),
    ),
    *cases("Sketch(decay)", lambda w, given: Sketch(decay=given), *numbers_to_one("decay")),
    *cases("Sketch(mean)", lambda w, given: Sketch(mean=given), *flags("mean")),
    *cases(
        "Sketch(lsh_bits)",
        lambda w, given: Sketch(lsh_bits=given),
        *whole_numbers("lsh_bits"),
        (31, ValueError, "at most 30"),
    ),
    *cases(
        "Sketch(key)",
        lambda w, given: Sketch(key=given),
        *[
            (each, ValueError, "choose one of lsh, token, position")
            for each in ("LSH", "", None, 3, ["lsh"], b"lsh", "bigram")
        ],
    ),
    *cases(
        "Sketch(seed)",
        lambda w, given: Sketch(seed=given),
        *[(each, ValueError, f"seed {WHOLE}") for each in ("a", None, 1.5, True, 2**70, -(2**70), [], NAN)],
    ),
    *cases(
        "Random(seed)",
        lambda w, given: Random(seed=given),
        *[(each, ValueError, f"seed {WHOLE}") for each in ("a", None, 1.5, True, 2**70, [], NAN)],
    ),
    *cases(
        "SnapKV(kernel)",
        lambda w, given: SnapKV(kernel=given),
        *whole_numbers("kernel", bounded=False),
        (4, ValueError, "must be odd"),
    ),
    *cases(
        "SnapKV(observation_window)",
        lambda w, given: SnapKV(observation_window=given),
        *whole_numbers("observation_window", bounded=False),
    ),
    *cases(
        "own policy",
        lambda w, given: score(w.model, w.ids, w.cache(policy=Wrong(given))),
        (lambda slots: torch.ones(3), ValueError, table(r"\[3\]")),
        (lambda slots: slots["positions"][:1].float(), ValueError, table(r"\[1, 4, 37\]")),
        (lambda slots: slots["positions"][..., :-1].float(), ValueError, table("36")),
        (lambda slots: None, ValueError, table("NoneType")),
        (lambda slots: 3.0, ValueError, table("float")),
        (lambda slots: slots["positions"].tolist(), ValueError, table("list")),
        (lambda slots: slots["positions"].numpy(), ValueError, table("ndarray")),
        (lambda slots: slots["positions"].to(torch.complex64), ValueError, table("complex64")),
        (lambda slots: slots["positions"] * torch.nan, ValueError, "Wrong gave NaN importance"),
    ),
    *cases(
        "policy without score",
        lambda w, given: score(w.model, w.ids, w.cache(policy=given)),
        (Policy(), NotImplementedError, "must define score"),
        (type("Mine", (Policy,), {})(), NotImplementedError, "Mine must define score"),
    ),
    *cases(
        "key='token' without ids",
        lambda w, given: w.model(inputs_embeds=given, past_key_values=w.cache(policy=Sketch(key="token"))),
        (torch.zeros(1, 5, 64), ValueError, 'use key="lsh"'),
    ),
]


def built(cls, config, **settings):
    return cls(config(**settings))


ENABLING = [
    *cases(
        "enable",
        lambda w, given: enable(given),
        *[
            (each, TypeError, ENABLE)
            for each in (
                None,
                3,
                "gpt2",
                {},
                torch.nn.Linear(2, 2),
                torch.nn.Sequential(),
                tf.GPT2Config(),
                tf.GPT2LMHeadModel,
                DynamicCache(),
                [],
            )
        ],
    ),
    *cases(
        "disable",
        lambda w, given: disable(given),
        *[
            (each, TypeError, "a transformers model")
            for each in (None, 3, torch.nn.Linear(2, 2), tf.GPT2Config())
        ],
    ),
    *cases(
        "enable pipeline",
        lambda w, given: enable(given(w)),
        (lambda w: types.SimpleNamespace(model=w.model, task="text-generation"), TypeError, ENABLE),
    ),
    *cases(
        "enable",
        lambda w, given: enable(given()),
        *[
            (make, ValueError, rf"can't bound a {name}: .* [a-z]+")
            for name, make in {
                "BertLMHeadModel": lambda: built(tf.BertLMHeadModel, tf.BertConfig, **SMALL),
                "BertModel": lambda: built(tf.BertModel, tf.BertConfig, **SMALL),
                "ViTModel": lambda: built(tf.ViTModel, tf.ViTConfig, **SMALL),
                "T5ForConditionalGeneration": lambda: built(
                    tf.T5ForConditionalGeneration,
                    tf.T5Config,
                    d_model=32,
                    d_ff=32,
                    num_layers=1,
                    num_heads=2,
                    vocab_size=97,
                ),
                "MptForCausalLM": lambda: built(
                    tf.MptForCausalLM, tf.MptConfig, d_model=32, n_heads=2, n_layers=1, vocab_size=97
                ),
                "BloomForCausalLM": lambda: built(
                    tf.BloomForCausalLM, tf.BloomConfig, hidden_size=32, n_head=2, n_layer=1, vocab_size=97
                ),
                "MambaForCausalLM": lambda: built(
                    tf.MambaForCausalLM, tf.MambaConfig, hidden_size=32, num_hidden_layers=1, vocab_size=97
                ),
            }.items()
        ],
    ),
]
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def prompt_rows(surface, call, one_token=True):
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    rows = [
        *[
            (each, TypeError, GIVEN)
            for each in (
                None,
                "a text",
                b"text",
                3,
                [1, 2],
                [[1, 2]],
                ids.numpy(),
                {},
                {"input_ids": [[1, 2]]},
                {"ids": ids},
                tf.BatchEncoding({}),
            )
        ],
        *[
            (ids.to(dtype), TypeError, r"must be int64 or int32.*input_ids.long\(\)")
            for dtype in (torch.float32, torch.bool, torch.int8, torch.uint8, torch.int16, torch.float16)
        ],
        *[
            (each, ValueError, "with at least one token")
            for each in (ids[0], ids[None], ids[:0], ids[:, :0], torch.tensor(3))
        ],
        *[
            (each, ValueError, "the model's vocabulary: is this its tokenizer")
            for each in (ids + 97, ids - 97, ids + 2**40)
        ],
        (torch.full((1, 600), 3), ValueError, "shorten the text"),
    ]
    if one_token:
        rows.append((ids[:, :1], ValueError, "at least two tokens"))
    return cases(surface, call, *rows)


def cache_rows(surface, call):
    return cases(
        surface,
        call,
        *[
            (each, TypeError, TAKES_A_CACHE)
            for each in ("x", 3, DynamicCache, SketchCache, {}, [], (), torch.ones(2), True)
        ],
    )


def model_rows(surface, call):
    return cases(
        surface,
        call,
        *[
            (each, TypeError, CAUSAL)
            for each in (None, "gpt2", 3, {}, torch.nn.Linear(2, 2), tf.GPT2LMHeadModel, tf.GPT2Config(), len)
        ],
    )


def mask_rows(least=MASK_SHAPE):
    ones = torch.ones(2, 60, dtype=torch.long)
    right, hole = ones.clone(), ones.clone()
    right[1, 50:] = 0
    hole[0, 20:30] = 0
    return [
        *[
            (each, ValueError, MASK_SHAPE)
            for each in (
                ones[:, 1:],
                ones[:1],
                ones[0],
                torch.ones(2, 61),
                torch.ones(2, 1, 60, 60),
                ones.tolist(),
                ones.numpy(),
                3,
                "mask",
                {},
                torch.ones(0),
                torch.ones(2, 60, 1),
            )
        ],
        *[
            (each, ValueError, MASK_VALUES)
            for each in (-ones, 2 * ones, ones * NAN, 0.5 * ones, right, hole, right.bool(), ones * INF)
        ],
    ]


DECODING = [
    *prompt_rows("score", lambda w, given: score(w.model, given, w.cache())),
    *prompt_rows("score without cache", lambda w, given: score(w.model, given)),
    *prompt_rows("generate", lambda w, given: generate(w.model, given, w.cache(), 2), one_token=False),
    *cache_rows("score cache", lambda w, given: score(w.model, w.ids, given)),
    *cache_rows("generate cache", lambda w, given: generate(w.model, w.ids, given)),
    *model_rows("score model", lambda w, given: score(given, w.ids)),
    *model_rows("generate model", lambda w, given: generate(given, w.ids)),
    *cases(
        "score chunk_size",
        lambda w, given: score(w.model, w.ids, w.cache(), chunk_size=given),
        *whole_numbers("chunk_size", bounded=False),
    ),
    *cases(
        "generate chunk_size",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, chunk_size=given),
        *whole_numbers("chunk_size", bounded=False),
    ),
    *cases(
        "score return_logits",
        lambda w, given: score(w.model, w.ids, return_logits=given),
        *flags("return_logits"),
    ),
    *cases(
        "max_new_tokens",
        lambda w, given: generate(w.model, w.ids, w.cache(), given),
        *whole_numbers("max_new_tokens", 0, bounded=False),
        (500, ValueError, "shorten the text"),
        (HUGE * HUGE, ValueError, "shorten the text"),
    ),
    *cases(
        "attention_mask",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, attention_mask=given),
        *mask_rows(),
    ),
    *cases(
        "attention_mask without cache",
        lambda w, given: generate(w.model, w.ids, None, 2, attention_mask=given),
        *mask_rows(),
    ),
    *cases(
        "tokenizer's mask",
        lambda w, given: generate(w.model, {"input_ids": w.ids, "attention_mask": given}, w.cache(), 2),
        *mask_rows(),
    ),
    *cases(
        "do_sample",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, do_sample=given),
        *flags("do_sample"),
    ),
    *cases(
        "temperature",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, do_sample=True, temperature=given),
        *[
            (each, ValueError, "temperature must be a positive number.*do_sample=False is greedy")
            for each in (0, -1.0, NAN, INF, "1", None, True, [1.0], 1j)
        ],
    ),
    *cases(
        "top_p",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, do_sample=True, top_p=given),
        *[row for row in numbers_to_one("top_p") if row[0] is not None],
    ),
    *cases(
        "top_k",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, do_sample=True, top_k=given),
        *whole_numbers("top_k", 0, False, bounded=False),
    ),
    *cases(
        "greedy",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, **given),
        *[
            (each, ValueError, "of sampling: set do_sample=True, or leave them out")
            for each in (
                {"temperature": 0.5},
                {"top_k": 5},
                {"top_p": 0.9},
                {"top_p": NAN},
                {"temperature": None},
                {"temperature": "1"},
            )
        ],
    ),
    *cases(
        "eos_token_id",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, eos_token_id=given),
        *[
            (each, ValueError, f"eos_token_id {WHOLE} 0 and at most 96")
            for each in (
                -1,
                97,
                10**9,
                "</s>",
                1.0,
                True,
                [1, -1],
                [1, None],
                ["</s>"],
                NAN,
                torch.tensor([1.0]),
                torch.tensor([[1, 2]]),
                {3: 4},
                HUGE * HUGE,
            )
        ],
        ([], ValueError, "give None if nothing ends a text"),
        (torch.ones(0), ValueError, "give None"),
    ),
    *cases(
        "pad_token_id",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, eos_token_id=1, pad_token_id=given),
        *[
            (each, ValueError, f"pad_token_id {WHOLE} 0 and at most 96")
            for each in (-1, 97, 10**9, "<pad>", 1.0, True, [1], NAN)
        ],
    ),
    *cases(
        "pad_token_id alone",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, pad_token_id=given),
        ("<pad>", ValueError, "pad_token_id"),
        (97, ValueError, "pad_token_id"),
    ),
    *cases(
        "generation_config",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, generation_config=given),
        *[
            (each, TypeError, r"must be a transformers.GenerationConfig.*GenerationConfig\(\*\*")
            for each in ({}, {"do_sample": True}, 3, "greedy", GenerationConfig, tf.GPT2Config())
        ],
        (GenerationConfig(eos_token_id=50256), ValueError, "eos_token_id"),
    ),
    *cases(
        "streamer",
        lambda w, given: generate(w.model, w.ids, w.cache(), 2, streamer=given),
        *[
            (each, TypeError, "must be a transformers streamer")
            for each in (3, "x", print, tf.TextStreamer, object())
        ],
    ),
    *cases("graph", lambda w, given: generate(w.model, w.ids, w.cache(), 2, graph=given), *flags("graph")),
    *cases(
        "compile", lambda w, given: generate(w.model, w.ids, w.cache(), 2, compile=given), *flags("compile")
    ),
    *cases(
        "graph, compile with a full cache",
        lambda w, given: generate(w.model, w.ids, None, 2, **given),
        ({"graph": True}, ValueError, "takes a SketchCache"),
        ({"compile": True}, ValueError, "takes a SketchCache"),
    ),
    *cases(
        "used",
        lambda w, given: given(w, w.used()),
        (
            lambda w, cache: score(w.model, w.ids, cache),
            ValueError,
            r"call cache.reset\(\) or make a new one",
        ),
        (lambda w, cache: generate(w.model, w.ids, cache), ValueError, r"call cache.reset\(\)"),
        (lambda w, cache: generate(w.model, w.ids.flip(1), cache), ValueError, r"call cache.reset\(\)"),
        (
            lambda w, cache: w.model.generate(w.ids, past_key_values=cache, max_new_tokens=3),
            ValueError,
            r"cache.reset\(\)",
        ),
        (
            lambda w, cache: w.model.generate(w.ids[:, :9], past_key_values=cache, max_new_tokens=3),
            ValueError,
            r"cache.reset\(\)",
        ),
        (
            lambda w, cache: w.model(w.ids[:1, :1], past_key_values=cache),
            ValueError,
            r"cache.reset\(\) between them or a new cache",
        ),
        (
            lambda w, cache: w.rotary(w.ids[:, :1].repeat(3, 1), past_key_values=cache),
            ValueError,
            "new cache",
        ),
    ),
    *cases(
        "beams",
        lambda w, given: w.used().reorder_cache(given),
        *[
            (each, ValueError, r"rows must be an int64 tensor \[2\] of numbers from 0 to 1")
            for each in (
                torch.tensor([1]),
                torch.tensor([0, 1, 1]),
                torch.tensor([], dtype=torch.int64),
                torch.tensor([0, 2]),
                torch.tensor([-1, 0]),
                torch.tensor([0.0, 1.0]),
                [0, 1],
                None,
                torch.tensor([[0, 1]]),
                torch.tensor(0),
            )
        ],
    ),
    *cases(
        "kept_positions",
        lambda w, given: w.used().kept_positions(given),
        *[
            (each, ValueError, f"layer {WHOLE} -2 and at most 1")
            for each in (2, -3, None, "0", 0.0, True, HUGE)
        ],
    ),
    *cases(
        "kept_positions of nothing",
        lambda w, given: w.cache().kept_positions(given),
        (0, RuntimeError, "no text has passed"),
    ),
    *cases(
        "crop",
        lambda w, given: w.used().crop(given),
        (-1, NotImplementedError, "use greedy search, sampling or beam search"),
    ),
    *cases(
        "offload",
        lambda w, given: w.used().offload(given),
        (0, NotImplementedError, "stays on its device"),
    ),
    *cases(
        "another batch",
        lambda w, given: getattr(w.used(), given[0])(given[1]),
        (("batch_repeat_interleave", 2), NotImplementedError, "has one batch: reset"),
        (("batch_select_indices", torch.tensor([1])), NotImplementedError, "has one batch: reset"),
    ),
]

MODEL_CALLS = [
    *cases(
        "model mask",
        lambda w, given: w.model(w.ids, attention_mask=given, past_key_values=w.cache()),
        *[
            (each, ValueError, "2-D attention_mask")
            for each in (
                torch.ones(2, 1, 60, 60),
                torch.ones(60),
                [[1] * 60],
                {},
                torch.ones(2, 60, 60).bool(),
            )
        ],
        *[
            (each, ValueError, r"must be \[batch, tokens so far\], here \[2, 60\]")
            for each in (
                torch.ones(2, 61),
                torch.ones(2, 59),
                torch.ones(1, 60),
                torch.ones(3, 60),
                torch.ones(0, 60),
                torch.ones(2, 0),
            )
        ],
        *[
            (each, ValueError, "pad on the left")
            for each in (
                -torch.ones(2, 60),
                2 * torch.ones(2, 60),
                torch.full((2, 60), NAN),
                torch.ones(2, 60).tril(),
                torch.ones(2, 60).cumsum(1),
            )
        ],
    ),
    *cases(
        "model.generate mask",
        lambda w, given: w.model.generate(
            w.ids, attention_mask=given, past_key_values=w.cache(), max_new_tokens=2
        ),
        *[
            (each, ValueError, "pad on the left|attention_mask")
            for each in (
                -torch.ones(2, 60).long(),
                torch.ones(2, 61).long(),
                torch.ones(2, 59).long(),
                torch.ones(2, 60).long().tril(),
            )
        ],
    ),
    *cases(
        "model ids",
        lambda w, given: w.model(given, past_key_values=w.cache()),
        *[
            (each, ValueError, r"must be a tensor \[batch, tokens\]")
            for each in (
                torch.tensor([1, 2, 3]),
                torch.ones(2, 0, dtype=torch.long),
                torch.ones(0, 5, dtype=torch.long),
                [[1, 2]],
                "text",
                torch.ones(2, 3, 4, dtype=torch.long),
            )
        ],
    ),
    *cases(
        "model embeddings",
        lambda w, given: w.model(inputs_embeds=given, past_key_values=w.cache()),
        *[
            (each, ValueError, r"inputs_embeds \[batch, tokens, width\]")
            for each in (torch.ones(5, 64), torch.ones(1, 0, 64), torch.ones(64))
        ],
    ),
    *cases(
        "model position_ids",
        lambda w, given: w.model(w.ids, position_ids=given, past_key_values=w.cache()),
        *[
            (each, ValueError, r"position_ids must be in \[0, 512\)")
            for each in (torch.full((2, 60), 512), torch.full((2, 60), -1), torch.full((1, 60), 10**9))
        ],
    ),
    *cases(
        "model use_cache",
        lambda w, given: w.model(w.ids, past_key_values=w.cache(), use_cache=given),
        (False, ValueError, "use_cache=False and a SketchCache exclude each other: leave one of them out"),
    ),
    *[
        case
        for surface, call in (
            ("model", lambda w, given: w.model(w.ids, past_key_values=given)),
            ("decoder", lambda w, given: w.rotary.model(w.ids, past_key_values=given)),
            ("model.generate", lambda w, given: w.model.generate(w.ids, past_key_values=given)),
        )
        for case in cases(
            f"{surface} cache", call, (SketchCache, TypeError, r"hand in a cache, SketchCache\(")
        )
    ],
    *cases(
        "model.generate use_cache",
        lambda w, given: w.model.generate(w.ids, past_key_values=w.cache(), use_cache=given),
        (False, ValueError, "exclude each other"),
    ),
    *cases(
        "too long",
        lambda w, given: w.model(given, past_key_values=w.cache()),
        (
            torch.ones(1, 600, dtype=torch.long),
            ValueError,
            "shorten the text or use a model with rotary positions",
        ),
    ),
    *cases(
        "model not enabled",
        lambda w, given: given(build("gpt2"), w),
        *[
            (call, RuntimeError, r"sketchkv.enable\(model\)")
            for call in (
                lambda model, w: score(model, w.ids, w.cache()),
                lambda model, w: generate(model, w.ids, w.cache()),
                lambda model, w: model(w.ids, past_key_values=w.cache()),
                lambda model, w: model.generate(w.ids, past_key_values=w.cache(), max_new_tokens=2),
                lambda model, w: disable(enable(model))(w.ids, past_key_values=w.cache()),
            )
        ],
    ),
    *cases(
        "attention set after enable",
        lambda w, given: given(enable(build("gpt2")), w),
        (
            lambda model, w: [model.set_attn_implementation("eager"), score(model, w.ids, w.cache())],
            RuntimeError,
            r"call sketchkv.enable\(model\) again",
        ),
    ),
    *cases(
        "model in train mode",
        lambda w, given: given(enable(tf.GPT2LMHeadModel(w.config)).train()),
        (
            lambda model: score(model, torch.ones(1, 9, dtype=torch.long), SketchCache(model, 40)),
            ValueError,
            r"call model.eval\(\)",
        ),
    ),
    *cases(
        "meta",
        lambda w, given: given(w, copy.deepcopy(w.model).to("meta")),
        (
            lambda w, model: score(model, w.ids, w.cache()),
            ValueError,
            r"has no weights: load it, or move it with model.to_empty\(\)",
        ),
        (lambda w, model: generate(model, w.ids, w.cache()), ValueError, "has no weights"),
    ),
    *cases(
        "cache of another model",
        lambda w, given: score(w.model, w.ids, SketchCache(given, 40)),
        (tf.GPT2Config(n_layer=3), ValueError, r"for 3 layers.*has 2 layers.*SketchCache\(model.config"),
    ),
    *cases(
        "used with another dtype",
        lambda w, given: copy.deepcopy(w.model).to(given)(w.ids[:, :1], past_key_values=w.used()),
        (torch.bfloat16, ValueError, "use a new cache after converting or moving a model"),
    ),
    *cases(
        "head_dim",
        lambda w, given: score(
            enable(
                tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=given * 2, n_head=2, n_layer=1, vocab_size=97)).eval()
            ),
            w.ids,
            SketchCache(tf.GPT2Config(n_embd=given * 2, n_head=2, n_layer=1), 40, bits=4),
        ),
        (12, ValueError, "multiple of 8.*bits=16"),
    ),
]


def sketch(**settings):
    return CountMinSketch(**dict(width=16, depth=2) | settings)


ITEMS = torch.arange(5)
SKETCHES = [
    *cases(
        "CountMinSketch(width)",
        lambda w, given: sketch(width=given),
        *whole_numbers("width"),
        (2**31, ValueError, "at most 2147483647"),
    ),
    *cases(
        "CountMinSketch(depth)",
        lambda w, given: sketch(depth=given),
        *whole_numbers("depth"),
        (10**9, ValueError, "at most 65536"),
        (2.5, ValueError, WHOLE),
    ),
    *cases(
        "CountMinSketch(seed)",
        lambda w, given: sketch(seed=given),
        *[(each, ValueError, f"seed {WHOLE}") for each in (2**70, -(2**70), None, "a", 1.5, True)],
    ),
    *cases(
        "CountMinSketch(batch_shape)",
        lambda w, given: sketch(batch_shape=given),
        *[
            (each, ValueError, r"batch_shape must be a")
            for each in (3, None, "2", (0,), (2, -1), (1.5,), (True,), {2: 3}, torch.ones(2))
        ],
    ),
    *cases(
        "CountMinSketch(dtype)",
        lambda w, given: sketch(dtype=given),
        *[
            (each, TypeError, "such as torch.float32")
            for each in (
                "float32",
                float,
                int,
                None,
                np.float32,
                torch.bool,
                torch.int8,
                torch.int16,
                torch.uint8,
                torch.complex64,
            )
        ],
    ),
    *cases(
        "CountMinSketch(device)",
        lambda w, given: sketch(device=given),
        *[
            (each, ValueError, "device must be one of torch's, such as 'cpu'")
            for each in ("foo", "", "gpu", [], "cpu:x")
        ],
    ),
    *cases(
        "CountMinSketch, huge",
        lambda w, given: sketch(**given),
        (dict(width=2**31 - 1, depth=65536), ValueError, "GiB are needed.*lower width, depth or batch_shape"),
        (dict(batch_shape=(HUGE,)), ValueError, "lower width, depth or batch_shape"),
        (dict(batch_shape=(10**6, 10**6)), ValueError, "lower width, depth or batch_shape"),
    ),
    *cases(
        "update items",
        lambda w, given: sketch().update(given),
        *[
            (each, TypeError, r"use items.long\(\) or torch.tensor\(items\)")
            for each in ([1, 2], 3, "ab", ITEMS.numpy(), ITEMS.float(), ITEMS.bool(), (1,))
        ],
        (torch.tensor(3), ValueError, r"use items\[None\]"),
        (-ITEMS, ValueError, "must not be negative"),
        (None, ValueError, "give either items or indices"),
    ),
    *cases(
        "query items",
        lambda w, given: sketch().query(given),
        *[
            (each, TypeError, r"use items.long\(\) or torch.tensor\(items\)")
            for each in ([1, 2], 3, ITEMS.numpy(), ITEMS.half())
        ],
        (None, ValueError, "give either items or indices"),
        (-ITEMS, ValueError, "must not be negative"),
    ),
    *cases(
        "update items in a batch",
        lambda w, given: sketch(batch_shape=(2, 3)).update(given),
        (torch.ones(4, 3, 5).long(), ValueError, r"do not broadcast to \[2, 3, 5\]"),
        (torch.ones(2, 5).long(), ValueError, "do not broadcast"),
    ),
    *cases(
        "update weights",
        lambda w, given: sketch().update(ITEMS, given),
        *[
            (each, ValueError, "must be finite and not negative")
            for each in (
                -1,
                NAN,
                INF,
                torch.tensor([1.0, NAN, 1, 1, 1]),
                torch.full((5,), INF),
                -torch.ones(5),
            )
        ],
        *[
            (each, TypeError, r"use torch.tensor\(weights\)")
            for each in ("a", [1, 1, 1, 1, 1], np.ones(5), {}, object())
        ],
        *[(each, ValueError, "do not broadcast") for each in (torch.ones(4), torch.ones(2, 5))],
        (1e300, ValueError, "use torch.float64"),
        (torch.full((5,), 3e38), ValueError, "use torch.float64"),
    ),
    *cases(
        "integer counters",
        lambda w, given: sketch(dtype=torch.int32).update(ITEMS, given),
        (0.5, TypeError, "use a float dtype"),
        (torch.ones(5), TypeError, "use a float dtype"),
        (2**40, ValueError, "torch.int64"),
        (torch.full((5,), 2**31 - 1), ValueError, "torch.int64"),
        (-1, ValueError, "not negative"),
    ),
    *cases(
        "filled counters",
        lambda w, given: [sketch(dtype=given[0]).update(ITEMS, given[1]), twice(given)],
        ((torch.int32, 2**30), ValueError, "torch.int64"),
        ((torch.float32, 6e37), ValueError, "use torch.float64"),
    ),
    *cases(
        "indices",
        lambda w, given: sketch().update(indices=given),
        *[
            (each, ValueError, r"must be in \[0, 16\)")
            for each in (torch.full((2, 5), 16), torch.full((2, 5), -1), torch.full((2, 5), 10**9))
        ],
        *[(each, TypeError, r"as hash\(\) returns them") for each in (torch.ones(2, 5), [[1]], 3)],
        (torch.ones(3, 5).long(), ValueError, "do not broadcast"),
    ),
    *cases(
        "items and indices",
        lambda w, given: sketch().update(ITEMS, indices=given),
        (torch.ones(2, 5).long(), ValueError, "give either"),
    ),
    *cases(
        "topk k",
        lambda w, given: sketch().topk(ITEMS, given),
        *whole_numbers("k, the number of candidates asked for,"),
        (6, ValueError, "at most 5"),
    ),
    *cases(
        "topk candidates",
        lambda w, given: sketch().topk(given, 1),
        *[
            (each, TypeError, r"use torch.tensor\(|use items.long")
            for each in ([1, 2], 3, None, ITEMS.numpy(), ITEMS.float(), torch.tensor(3))
        ],
    ),
    *cases("decay", lambda w, given: sketch().decay(given), *numbers_to_one("factor")),
    *cases(
        "decay of integers",
        lambda w, given: sketch(dtype=torch.int64).decay(given),
        (0.5, TypeError, "make the sketch with dtype=torch.float32"),
    ),
    *cases(
        "merge",
        lambda w, given: sketch().merge(given),
        *[
            (each, TypeError, "only sketches of one kind")
            for each in (None, 3, ITEMS, "x", [], CountMinSketch)
        ],
        (CountMinSketch(8, 2), ValueError, "same width"),
        (CountMinSketch(16, 3), ValueError, "same depth"),
        (CountMinSketch(16, 2, seed=1), ValueError, "same seed"),
        (CountMinSketch(16, 2, (2,)), ValueError, "same batch_shape"),
        (CountMinSketch(16, 2, dtype=torch.int64), TypeError, "of one dtype"),
    ),
    *cases(
        "reorder",
        lambda w, given: sketch(batch_shape=(2,)).reorder(given),
        *[
            (each, ValueError, "from 0 to 1")
            for each in (torch.tensor([2]), torch.tensor([-1]), [0], None, torch.tensor([0.0]))
        ],
    ),
    *cases(
        "reorder without a batch",
        lambda w, given: sketch().reorder(given),
        (torch.tensor([0]), ValueError, "give batch_shape"),
    ),
]


def twice(given):
    table = sketch(dtype=given[0])
    for _ in range(9):
        table.update(ITEMS[:1], given[1])


@pytest.mark.parametrize(
    "call, given, error, words", SETTINGS + POLICIES + ENABLING + DECODING + MODEL_CALLS + SKETCHES
)
def test_wrong_input(world, call, given, error, words):
    with pytest.raises(error, match=words) as caught:
        call(world, given)
    assert type(caught.value) is error and len(str(caught.value)) < 400


def test_after_wrong_input_the_model_is_as_it_was(world):
    """All cases share one model: none of them left a trace on it."""
    fresh = enable(build("gpt2"))
    assert torch.equal(world.model(world.ids).logits, fresh(world.ids).logits)
    assert torch.equal(score(world.model, world.ids, world.cache()), score(fresh, world.ids, world.cache()))


HUGE_SIZES = {
    "cap": (dict(max_cache_size=2**31 - 1), "lower max_cache_size"),
    "evict_every": (dict(max_cache_size=40, evict_every=2**31 - 1), "lower max_cache_size, evict_every"),
    "quantized": (dict(max_cache_size=2**31 - 1, bits=4), "lower max_cache_size"),
    "sketch": (dict(max_cache_size=40, policy=Sketch(width=2**31 - 1, depth=60000)), "lower width, depth"),
}


@pytest.mark.parametrize("name", HUGE_SIZES)
def test_sizes_beyond_memory(world, name):
    """What would be needed, what there is, and what to lower; the cache is as empty as before."""
    settings, remedy = HUGE_SIZES[name]
    cache = SketchCache(world.config, **settings)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"GiB are needed, cpu has .* GiB of memory: {remedy}"):
            world.model(world.ids, past_key_values=cache)
        assert cache.stored_tokens() == [0, 0] and cache.nbytes()["total"] == 0
    cache.reset()


def test_summary_slots_beyond_memory(monkeypatch, world):
    monkeypatch.setattr(sketchkv.checks.os, "sysconf", lambda name: 2**10)  # a machine of 1 MiB
    with pytest.raises(ValueError, match="lower the number of summary slots, 1048576"):
        score(world.model, world.ids, world.cache(summary=Summary(2**20)))


def test_sizes_that_are_right(world):
    """The edges of what is allowed."""
    for settings in (
        dict(cap=13),
        dict(num_sinks=0, recent_window=0, cap=1),
        dict(evict_every=1),
        dict(prefill_chunk=5),
        dict(attend_topk=13),
        dict(attend_topk=32),
        dict(bits=(16, 2)),
        dict(bits=[8, 8]),
    ):
        assert score(world.model, world.ids, world.cache(**settings)).isfinite().all()
    for policy in (
        AttentionMass(1.0),
        AttentionMass(1),
        AttentionMass(np.float64(0.5), np.True_),
        Sketch(1, 1, lsh_bits=1),
        Sketch(seed=-5),
        Random(-(2**63) // 2000),
        SnapKV(1, 1),
    ):
        assert score(world.model, world.ids, world.cache(policy=policy)).isfinite().all()
    assert generate(world.model, world.ids, world.cache(), 0).shape == (2, 60)
    assert generate(world.model, world.ids, world.cache(), 2, do_sample=True, top_k=0, top_p=1.0).shape == (
        2,
        62,
    )
    integers = world.cache(
        policy=Wrong(lambda slots: slots["positions"])
    )  # whole numbers and truth values are scores
    assert score(world.model, world.ids, integers).isfinite().all()
    truths = world.cache(policy=Wrong(lambda slots: slots["positions"] % 2 == 0))
    assert score(world.model, world.ids, truths).isfinite().all()
