"""Every causal class of transformers is right with a `SketchCache`, or `enable` refuses it and says why.

There is no third outcome. `MODELS=all` (`make test-models`) goes through all of them and writes the table
`data/benchmarks/models.csv`; otherwise a few of each kind are run, and the table is checked. Errors and differences
are in standard deviations of the model's logits.
"""

import contextlib
import csv
import json
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from model_oracle import causal, masked_logits
from models import NOT_BUILT, OTHERS, PEFT, VOCABULARY, build, names, rows
from transformers import DynamicCache

import sketchkv
from sketchkv import SketchCache, fast
from sketchkv.oracle import decode_and_watch

TABLE = Path(__file__).parent.parent / "data/benchmarks/models.csv"
LENGTH, CAP, SINKS, RECENT, EVERY = 64, 24, 2, 8, 4
LARGEST_ERROR, LEAST_DIFFERENCE = 1e-4, 1e-2


@dataclass
class Row:
    """One line of the table.

    error: the largest of all runs that must agree.
    difference: what eviction changes, the oracle's bounded run against its full one.
    mutant: the error if one head of one layer kept one token more.
    """

    model: str
    variant: str
    outcome: str = "right"
    error: float = 0.0
    difference: float = 0.0
    mutant: float = 0.0
    reason: str = ""


def made(name, variant, prepare=lambda model: model):
    """A model of the table, `prepare`d before it is wrapped or after."""
    if variant not in PEFT:
        return prepare(build(name, variant))
    peft = pytest.importorskip("peft")
    model = build(name)
    model = prepare(model) if variant == PEFT[1] else model
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings).eval().requires_grad_(False)
    return prepare(model) if variant == PEFT[0] else model


def windows(model):
    """Per layer how many tokens a query may see, as transformers' own cache reads it; None: all."""
    layers = DynamicCache(config=model.config).layers
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


def in_steps(model, ids, cache):
    steps = [model(ids[:, [i]], past_key_values=cache, use_cache=True).logits for i in range(ids.shape[1])]
    return torch.cat(steps, 1)


def watched(model, ids, cap, limits):
    """(logits in one pass, logits in steps, what each layer saw, stored tokens per layer) of a bounded run."""

    def fresh():
        return SketchCache(model.config, cap, num_sinks=SINKS, recent_window=RECENT, evict_every=EVERY)

    cache = fresh()
    logits, visible = decode_and_watch(model, ids, cache)
    for layer, limit in enumerate(limits):
        if limit is not None:  # a token sees itself and those before it, as many as the window holds
            visible[layer] &= causal(1, 1, LENGTH).triu(1 - min(limit, cap))
    return model(ids, past_key_values=fresh(), use_cache=True).logits, logits, visible, cache.stored_tokens()


def with_one_more(visible, limits):
    """A copy of `visible` in which one head of one layer sees one token that was evicted."""
    layers = sorted(range(len(visible)), key=lambda layer: limits[layer] is not None)
    for layer in layers:
        shown = causal(1, 1, LENGTH)[0, 0].triu(1 - (limits[layer] or LENGTH))
        hidden = shown & ~visible[layer][0, 0]
        if hidden.any():
            token = int(hidden.any(0).nonzero()[0])
            mutant = [each.clone() for each in visible]
            mutant[layer][0, 0, :, token] |= shown[:, token]
            return mutant
    raise AssertionError("nothing was evicted")


def refused(name, variant, plain, error):
    """The row of a model that `enable` refused, which must leave it as it was."""
    model = made(name, variant)
    with contextlib.suppress(ValueError):
        sketchkv.enable(model)
    if model.config._attn_implementation != plain.config._attn_implementation or any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    ):
        return Row(name, variant, "changed", reason="refused, but not left as it was")
    if type(model).__name__ not in str(error):
        return Row(name, variant, "unclear", reason=str(error))
    return Row(name, variant, "refused", reason=str(error))


@torch.no_grad()
def examine(name, variant):
    """The row of one model: what came of it is looked at, whatever it is."""
    plain = made(name, variant)
    try:
        try:
            model = made(name, variant, sketchkv.enable)
        except ValueError as error:
            return refused(name, variant, plain, error)
        return compared(Row(name, variant), plain, model)
    except Exception as error:
        return Row(name, variant, "crash", reason=f"{type(error).__name__}: {error}")


def compared(row, plain, model):
    ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    if not torch.equal(plain(ids).logits, model(ids).logits):
        row.outcome, row.reason = "wrong", "another result without a SketchCache"
        return row
    if getattr(plain.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        plain.set_attn_implementation("eager")  # SDPA leaves the softcap out
    limits = windows(plain)
    cap = CAP if any(limit is None or limit > CAP for limit in limits) else CAP // 2
    want, want_in_steps = plain(ids).logits, in_steps(plain, ids, DynamicCache(config=plain.config))
    roomy = [SketchCache(model.config, LENGTH + 16) for _ in range(2)]
    at_once, logits, visible, stored = watched(model, ids, cap, limits)
    bounded = masked_logits(plain, ids, visible)
    unit = want.std()
    errors = {
        "one pass": model(ids, past_key_values=roomy[0], use_cache=True).logits - want,
        "steps": in_steps(model, ids, roomy[1]) - want_in_steps,
        "bounded steps": logits - bounded,
        "bounded in one pass": at_once - bounded,
    }
    errors = {run: float(difference.abs().max() / unit) for run, difference in errors.items()}
    row.error = max(errors.values())
    row.difference = float((bounded - want).abs().max() / unit)
    row.mutant = float(
        (masked_logits(plain, ids, with_one_more(visible, limits)) - logits).abs().max() / unit
    )
    held = [min(limit, cap) if limit is not None else cap + EVERY for limit in limits]
    if not row.error < LARGEST_ERROR:
        row.outcome = "wrong"
        row.reason = ", ".join(
            f"{run}: {error:.1e}" for run, error in errors.items() if not error < LARGEST_ERROR
        )
    elif any(count > most for count, most in zip(stored, held, strict=True)):
        row.outcome, row.reason = "wrong", f"layers hold {stored} tokens, of {held} at most"
    elif row.difference < LEAST_DIFFERENCE or row.mutant < 10 * LARGEST_ERROR:
        row.outcome, row.reason = "blind", "random weights that do not show what is evicted"
    return row


# Rows that CI runs.
FEW = [
    ("LlamaForCausalLM", ""),
    ("LlamaForCausalLM", "MQA"),
    ("LlamaForCausalLM", "dynamic NTK"),
    ("LlamaForCausalLM", "PEFT, wrapped first"),
    ("LlamaForCausalLM", "PEFT, enabled first"),
    ("GPT2LMHeadModel", ""),
    ("GPT2LMHeadModel", "cross-attention"),
    ("MistralForCausalLM", ""),
    ("MistralForCausalLM", "wide window"),
    ("MixtralForCausalLM", "window"),
    ("Phi3ForCausalLM", "longrope"),
    ("Qwen2ForCausalLM", "window"),
    ("Gemma2ForCausalLM", "strong softcap"),
    ("Gemma3ForCausalLM", ""),
    ("Gemma3ForCausalLM", "bidirectional"),
    ("Gemma3nForCausalLM", "shared layers"),
    ("GptOssForCausalLM", ""),
    ("OPTForCausalLM", ""),
    ("BartForCausalLM", ""),
    ("RobertaForCausalLM", "decoder"),
    ("BertLMHeadModel", ""),
    ("BertLMHeadModel", "decoder"),
    ("GPTJForCausalLM", ""),
    ("DeepseekV3ForCausalLM", ""),
    ("DiffLlamaForCausalLM", ""),
    ("MiMoV2FlashForCausalLM", ""),
    ("MambaForCausalLM", ""),
    ("Llama4ForCausalLM", ""),
    ("JambaForCausalLM", ""),
    ("GitForCausalLM", ""),
    ("T5ForConditionalGeneration", ""),
]
ROWS = rows() if os.environ.get("MODELS") == "all" else FEW
# Configurations that must be right: refusing is no way out.
AS_THEY_ARE = """
    ApertusForCausalLM ArceeForCausalLM AriaTextForCausalLM BartForCausalLM BigBirdPegasusForCausalLM
    BioGptForCausalLM BitNetForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM
    Cohere2MoeForCausalLM CohereCompassForCausalLM CTRLLMHeadModel CwmForCausalLM DbrxForCausalLM
    Emu3ForCausalLM Ernie4_5_MoeForCausalLM Ernie4_5ForCausalLM ExaoneMoeForCausalLM FlexOlmoForCausalLM
    FuyuForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM Gemma4ForConditionalGeneration
    Gemma4UnifiedForCausalLM Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM
    Glm4MoeForCausalLM GlmForCausalLM GotOcr2ForConditionalGeneration GPTNeoXForCausalLM
    GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM GraniteMoeSWAForCausalLM
    HeliumForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HyperCLOVAXForCausalLM
    HYV3ForCausalLM Jais2ForCausalLM MarianForCausalLM MBartForCausalLM MiMoV2FlashForCausalLM
    MiniMaxM2ForCausalLM MiniMaxM3VLForCausalLM Ministral3ForCausalLM MllamaForCausalLM
    MusicgenForCausalLM MusicgenMelodyForCausalLM NanoChatForCausalLM NemotronForCausalLM Olmo2ForCausalLM
    OlmoeForCausalLM PegasusForCausalLM Phi4MultimodalForCausalLM PLBartForCausalLM RoCBertForCausalLM
    SeedOssForCausalLM SolarOpenForCausalLM WhisperForCausalLM XmodForCausalLM
""".split()
REQUIRED = dict.fromkeys(AS_THEY_ARE, ("",)) | {
    "AfmoeForCausalLM": ("", "no window"),
    "BertGenerationDecoder": ("decoder",),
    "BertLMHeadModel": ("decoder",),
    "CamembertForCausalLM": ("decoder",),
    "Cohere2ForCausalLM": ("", "no window"),
    "CohereForCausalLM": ("", "query-key norm"),
    "Data2VecTextForCausalLM": ("decoder",),
    "Dots1ForCausalLM": ("", "window"),
    "ElectraForCausalLM": ("decoder",),
    "ErnieForCausalLM": ("decoder",),
    "Exaone4ForCausalLM": ("", "no window"),
    "Gemma2ForCausalLM": ("", "strong softcap", "no softcap", "no window"),
    "Gemma3ForCausalLM": ("", "no window", "softcap"),
    "Gemma4ForCausalLM": ("", "no window"),
    "GPT2LMHeadModel": ("", "scaled by layer", "unscaled", "upcast"),
    "GPTBigCodeForCausalLM": ("", "MHA"),
    "GptOssForCausalLM": ("", "no window"),
    "GraniteSWAForCausalLM": ("", "no window"),
    "LagunaForCausalLM": ("", "window"),
    "Llama4ForCausalLM": ("no chunks",),
    "LlamaForCausalLM": (
        "",
        "MHA",
        "MQA",
        "bias",
        "wide heads",
        "linear rotation",
        "llama3 rotation",
        "yarn rotation",
        "PEFT, wrapped first",
        "PEFT, enabled first",
    ),
    "MellumForCausalLM": ("", "window"),
    "MinistralForCausalLM": ("", "mixed"),
    "MistralForCausalLM": ("", "no window", "wide window"),
    "MixtralForCausalLM": ("", "window"),
    "ModernBertDecoderForCausalLM": ("", "no window"),
    "Olmo3ForCausalLM": ("", "no window"),
    "OlmoForCausalLM": ("", "clipped"),
    "OPTForCausalLM": ("", "projected", "norm after"),
    "PersimmonForCausalLM": ("", "no query-key norm"),
    "Phi3ForCausalLM": ("", "window"),
    "PhiForCausalLM": ("", "query-key norm"),
    "PhimoeForCausalLM": ("", "window"),
    "Qwen2ForCausalLM": ("", "window", "all windows"),
    "Qwen2MoeForCausalLM": ("", "window"),
    "Qwen3ForCausalLM": ("", "window"),
    "Qwen3MoeForCausalLM": ("", "window"),
    "RobertaForCausalLM": ("decoder",),
    "RobertaPreLayerNormForCausalLM": ("decoder",),
    "SmolLM3ForCausalLM": ("", "window"),
    "StableLmForCausalLM": ("", "query-key norm", "parallel"),
    "Starcoder2ForCausalLM": ("", "window"),
    "VaultGemmaForCausalLM": ("", "strong softcap"),
    "XLMRobertaForCausalLM": ("decoder",),
    "XLMRobertaXLForCausalLM": ("decoder",),
}


REQUIRED_PAIRS = {(name, variant) for name, variants in REQUIRED.items() for variant in variants}


@pytest.fixture(scope="module")
def table():
    """Rows as they come; written when they are all there."""
    done = []
    yield done
    if {(row.model, row.variant) for row in done} == set(rows()):
        write(done)


def write(done):
    done = done + [Row(name, "", "not built", reason=reason) for name, reason in NOT_BUILT.items()]
    facts = {"transformers": transformers.__version__, "torch": torch.__version__}
    TABLE.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
    with open(TABLE, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        for row in sorted(done, key=lambda row: (row.model.lower(), row.variant)):
            writer.writerow(
                f"{value:.1e}" if isinstance(value, float) and value else value or ""
                for value in astuple(row)
            )


@pytest.mark.parametrize("name, variant", ROWS, ids=lambda each: each or "default")
def test_right_or_refused(name, variant, table):
    row = examine(name, variant)
    table.append(row)
    assert row.outcome in ("right", "refused"), row
    assert row.outcome == "right" or (name, variant) not in REQUIRED_PAIRS, row


@pytest.fixture(scope="module")
def committed():
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name, variant", ROWS)
def test_a_step_to_be_compiled_is_right_or_refused(name, variant):
    """What `torch.compile` is given, as it is: without the cache, told of its position."""
    ids = torch.randint(1, VOCABULARY, (2, 61))
    try:
        model = sketchkv.enable(build(name, variant))
    except ValueError:
        return  # refused whole: `test_right_or_refused`
    logits = []
    with torch.no_grad(), mock.patch.object(torch, "compile", lambda function, **_: function):
        for compile in (False, True):
            cache = SketchCache(model.config, 40)
            try:
                run = fast.step(model, cache, compile=True) if compile else model
            except ValueError as error:
                assert "counts positions itself" in str(error)
                return
            model(ids[:, :-1], past_key_values=cache)
            try:
                if compile:
                    logits.append(run(ids[:, -1:], None, None)[:, -1])
                else:
                    logits.append(run(ids[:, -1:], past_key_values=cache).logits[:, -1])
            except RuntimeError as error:
                assert "does not take the keys" in str(error)
                return
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_committed_table_has_a_row_for_every_class(committed):
    facts = json.loads(TABLE.with_suffix(".json").read_text())
    if facts["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {facts['transformers']}")
    found = {(row["model"], row["variant"]) for row in committed}
    assert found == set(rows()) | {(name, "") for name in NOT_BUILT}
    built = {row["model"] for row in committed if row["outcome"] != "not built"} - set(OTHERS)
    assert len(built) >= 120 and built | set(NOT_BUILT) == set(names())


def test_committed_table_knows_no_third_outcome(committed):
    for row in committed:
        assert row["outcome"] in ("right", "refused", "not built"), row
        assert row["outcome"] == "right" or row["reason"], row
        if row["outcome"] == "refused":
            assert row["model"] in row["reason"], row
        elif row["outcome"] == "right":
            assert float(row["error"] or 0) < LARGEST_ERROR and float(row["difference"]) > LEAST_DIFFERENCE, (
                row
            )
            assert float(row["mutant"]) > 10 * LARGEST_ERROR, row


def test_required_models_are_right(committed):
    outcomes = {(row["model"], row["variant"]): row["outcome"] for row in committed}
    assert len(REQUIRED_PAIRS) >= 90
    assert {pair for pair in REQUIRED_PAIRS if outcomes[pair] != "right"} == set()
    assert set(FEW) <= set(rows())
