"""Models of the package index: their tokenizers beside llama.cpp's, their conversion, and what is told
without them."""

import hashlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sketchkv import corpus, loading, pretrained
from sketchkv.loading import LoadError, load

LLAMA = json.loads((Path(__file__).parent / "data" / "llama_ids.json").read_text(encoding="utf-8"))


def is_here(name):
    converted = corpus.cache_folder("models") / f"{name}-{pretrained.FORMAT}"
    return converted.is_dir() or all(corpus.installed(part) for part in pretrained.MODELS[name].parts)


@pytest.fixture(scope="module", params=loading.PACKAGED)
def loaded(request):
    if not is_here(request.param):
        pytest.skip(f"the packages are not installed: `make {request.param}`")
    load(request.param, device="cpu")  # converts it, the first time
    began = time.process_time()
    model, tokenizer = load(request.param, device="cpu")
    return request.param, model, tokenizer, time.process_time() - began


def test_ids_are_those_of_llama_cpp(loaded):
    name, _, tokenizer, _ = loaded
    for kind, text in LLAMA["texts"].items():
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == LLAMA["ids"][name][kind], kind
        if "▁" not in text:  # in Gemma's vocabulary this is the space
            assert tokenizer.decode(ids) == text


def test_loss_is_that_of_llama_cpp_and_loading_is_quick(loaded):
    name, model, tokenizer, seconds = loaded
    assert seconds < 5 and model.dtype == torch.float32
    ids = torch.tensor([LLAMA["ids"][name]["dialogue"]])
    start = torch.tensor([[tokenizer.bos_token_id]])
    ids = torch.cat([start, ids], dim=1)
    # llama.cpp rounds activations to 8 bits: hence the tolerance.
    assert model(ids, labels=ids).loss.item() == pytest.approx(LLAMA["nll"][name], abs=0.02)


def test_special_tokens_and_chat(loaded):
    name, model, tokenizer, _ = loaded
    assert (
        tokenizer.bos_token_id == model.config.bos_token_id
        and tokenizer.eos_token_id == model.config.eos_token_id
    )
    if name == "gemma3":
        assert tokenizer("a")["input_ids"] == [2, *tokenizer("a", add_special_tokens=False)["input_ids"]]
        assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [212]
        assert tokenizer("<start_of_turn>", add_special_tokens=False)["input_ids"] == [105]
        assert model.config.layer_types.count("full_attention") == 3 and model.config.sliding_window == 512
    else:
        assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[
            "input_ids"
        ]
        assert tokenizer.decode(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert chat[0] == tokenizer.bos_token_id and chat.count(tokenizer.eos_token_id) == 2


def test_card_tells_name_and_licence(loaded):
    card = (pretrained.model_folder(loaded[0]) / "README.md").read_text()
    assert {"smollm2": "Apache-2.0", "gemma3": "Gemma Terms of Use"}[loaded[0]] in card
    assert {"smollm2": "SmolLM2-135M-Instruct with Q4_1 weights", "gemma3": "Gemma 3 270M"}[loaded[0]] in card


# --- without the packages -----------------------------------------------------------------------------------


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    monkeypatch.setenv("SKETCHKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "_package_folders", lambda: [tmp_path / "packages"])
    return tmp_path


@pytest.mark.parametrize("name", loading.PACKAGED)
def test_missing_package_names_the_command(nothing_here, name):
    with pytest.raises(
        LoadError, match=f"{pretrained.MODELS[name].requirements[0]}.*not installed.*`make {name}`"
    ):
        load(name, device="cpu")
    assert loading.revision(name) == pretrained.MODELS[name].sha256[:12]


def test_altered_weights_are_refused_and_leave_nothing(nothing_here):
    part = nothing_here / "packages" / pretrained.MODELS["smollm2"].parts[0]
    part.parent.mkdir(parents=True)
    part.write_bytes(b"GGUF")
    with pytest.raises(LoadError, match="sha256.*instead of b179c952.*remove the packages"):
        load("smollm2", device="cpu")
    assert not list((nothing_here / "cache" / "models").iterdir())


def test_missing_reader_names_the_command(nothing_here, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (part := nothing_here / "part").write_bytes(b"GGUF")
    made = pretrained.MODELS["smollm2"]._replace(sha256=hashlib.sha256(b"GGUF").hexdigest())
    with pytest.raises(LoadError, match="pip install --no-deps gguf=="):
        pretrained.convert(made, [part], nothing_here / "model")


def spm(pieces, **fields):
    """A reader of a GGUF file with a SentencePiece vocabulary: (token, score, type)."""
    tokens, scores, types = zip(*pieces)
    fields |= dict(
        model="llama",
        tokens=list(tokens),
        scores=list(scores),
        token_type=list(types),
        bos_token_id=0,
        eos_token_id=1,
        unknown_token_id=2,
        padding_token_id=1,
        add_bos_token=True,
    )
    return SimpleNamespace(
        fields={
            f"tokenizer.ggml.{name}": SimpleNamespace(contents=lambda value=value: value)
            for name, value in fields.items()
        }
    )


def test_sentencepiece_merges_follow_the_scores():
    pieces = [
        ("<bos>", -1000, 3),
        ("<eos>", -1000, 3),
        ("<unk>", -1000, 3),
        ("\n\n", -1000, 4),
        ("<0xC3>", 0, 6),
        ("<0xA9>", 0, 6),
        ("<0x0A>", 0, 6),
        ("ab", -5, 1),
        ("bc", -4, 1),
        ("abc", -9, 1),
        ("▁a", -6, 1),
        ("a", -10, 1),
        ("b", -11, 1),
        ("c", -12, 1),
        ("▁", -13, 1),
    ]
    tokenizer = pretrained._tokenizer(spm(pieces))

    def tokens(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert tokens("abc") == ["<bos>", "abc"]  # "bc" first, then "a" + "bc"
    assert tokens("ab a") == ["<bos>", "ab", "▁a"] and tokens(" ab") == [
        "<bos>",
        "▁",
        "ab",
    ]  # the better score first
    assert tokens("é\n") == ["<bos>", "<0xC3>", "<0xA9>", "<0x0A>"] and tokens("\n\n\n") == [
        "<bos>",
        "\n\n",
        "<0x0A>",
    ]
    assert tokenizer.decode(tokenizer("a é\n\nb")["input_ids"], skip_special_tokens=True) == "a é\n\nb"
    assert tokenizer("<bos>", split_special_tokens=True)["input_ids"][1:] != [0]
