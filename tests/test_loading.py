"""Loading: the embedded model, local folders and the hub's cache in hub layout, pinned revisions, and clear
errors."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from sketchkv import loading
from sketchkv.loading import EMBEDDED, HUB_REVISIONS, LoadError, load, resolve_device, revision

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
needs_weights = pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(),
    reason="the embedded model is not trained yet: `make model`",
)


def write_model(folder, arch="gpt2", **changes):
    """A tiny untrained model with the embedded tokenizer, written as a hub folder; returns the model."""
    torch.manual_seed(0)
    common = dict(vocab_size=4096, bos_token_id=0, eos_token_id=0) | changes
    if arch == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **common))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                tie_word_embeddings=True,
                **common,
            )
        )
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / name, folder)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The hub's cache is an empty folder, and nothing answers at the hub's address."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


# --- local folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_local_folder_gives_the_saved_model_ready_for_inference(tmp_path, arch):
    saved = write_model(tmp_path / "m", arch)
    model, tokenizer = load(str(tmp_path / "m"), device="cpu")
    ids = torch.tensor([tokenizer("def f(x):\n    return x\n")["input_ids"]])
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert type(model) is type(saved) and not model.training
    assert not any(p.requires_grad for p in model.parameters()) and not model(ids).logits.requires_grad


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_half_precision_file_without_the_tied_head_loads_as_float32(tmp_path, arch):
    """The embedded model's form on disk: fp16, and the output head only as the embedding it is tied to."""
    saved = write_model(tmp_path, arch)
    halves = {name: p.detach().half().contiguous() for name, p in saved.named_parameters()}
    assert not any("lm_head" in name for name in halves)
    save_file(halves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = load(tmp_path, device="cpu")
    expected = saved.half().float()
    for name, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, expected.get_parameter(name))
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("given", ["float16", "torch.float16", torch.float16])
def test_dtype_by_name_or_by_object(folder, given):
    assert load(folder, device="cpu", dtype=given)[0].dtype == torch.float16


@pytest.mark.parametrize("given", ["int8", "half precision", torch.int64, ""])
def test_unknown_dtype_lists_the_allowed(folder, given):
    with pytest.raises(LoadError, match="Unknown dtype .*float32, float16, bfloat16"):
        load(folder, dtype=given)


@pytest.mark.parametrize(
    ("missing", "named"),
    [("config.json", "config.json"), ("model.safetensors", "weights"), ("tokenizer.json", "a tokenizer")],
)
def test_incomplete_folder_names_what_it_lacks(folder, missing, named):
    (folder / missing).unlink()
    with pytest.raises(LoadError, match=f"lacks {named}.*save_pretrained"):
        load(folder)
    with pytest.raises(LoadError, match=f"lacks {named}"):
        revision(folder)


def test_weights_that_lack_a_parameter_are_refused_rather_than_randomized(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="1 parameters are missing.*h.1.mlp.c_fc.weight"):
        load(folder)


def test_weights_of_another_shape_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:32].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match="can't be read"):
        load(folder)


def test_truncated_weights_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(LoadError, match="can't be read") as caught:
        load(folder)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("broken", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_never_run(folder, monkeypatch, broken):
    """Not even if the terminal says yes: transformers asks there."""
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((folder / broken).read_text())
    own = "own.Own" if broken == "config.json" else ["own.Own", None]
    config["auto_map"] = {"AutoConfig": own, "AutoModelForCausalLM": own, "AutoTokenizer": own}
    (folder / broken).write_text(json.dumps(config | {"model_type": "own"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(
        LoadError, match=f"{broken} asks for code of the model's own .auto_map.*never run.*remove"
    ):
        load(folder)
    assert not ran.exists()


def test_pickled_weights_are_never_read(folder):
    """A file that only looks like the weights does not open the way to pytorch_model.bin."""
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "extra.safetensors")
    with pytest.raises(LoadError, match="can't be read"):
        load(folder)


def test_flipped_bytes_are_found_where_a_folder_has_checksums(folder):
    loading.write_sums(folder)
    assert load(folder, device="cpu")[0].config.n_embd == 32
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-64:] = bytes(byte ^ 255 for byte in content[-64:])
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(
        LoadError, match="model.safetensors is not the file that SHA256SUMS tells of.*save_pretrained"
    ):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="lacks weights"):
        load(folder)


def test_embedded_model_has_checksums():
    names = {line.split()[1] for line in (EMBEDDED / loading.SUMS).read_text().splitlines()}
    assert names >= {"model.safetensors", "config.json", *TOKENIZER_FILES}


def test_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    write_model(tmp_path, vocab_size=4000)
    with pytest.raises(LoadError, match="tokenizer in .* has 4096 ids, and the model embeds 4000"):
        load(tmp_path, device="cpu")


def test_gemma_in_float16_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma3_text"}))
    with pytest.raises(LoadError, match="Gemma.*overflow float16.*bfloat16 or float32"):
        load(folder, dtype="float16")


@pytest.mark.parametrize(
    "name",
    ["./no-such-folder", "~/no/such/folder", "no/such/folder", "~nobodyhere/x", "./" + "x" * 5000, "./a\0b"],
)
def test_absent_folder(name):
    with pytest.raises(LoadError, match="no model folder"):
        load(name)


# --- the embedded model -------------------------------------------------------------------------------------


def test_missing_embedded_weights_name_make_model(tmp_path, monkeypatch):
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / name, tmp_path)
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    with pytest.raises(LoadError, match=r"embedded model lacks config.json, weights .*`make model`"):
        load()
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path / "none")
    with pytest.raises(LoadError, match="`make model`"):
        load("embedded")


def test_embedded_is_the_folder_in_the_repository(folder, monkeypatch):
    monkeypatch.setattr(loading, "EMBEDDED", folder)
    assert load(device="cpu")[0].config.n_embd == 32
    assert revision() == revision("embedded") == revision(folder)


@needs_weights
def test_embedded_model_fits_its_size_limit():
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir() if file.is_file()) <= 32e6


# --- revisions ----------------------------------------------------------------------------------------------


def test_revision_of_a_folder_follows_all_that_is_loaded_and_nothing_else(folder):
    seen = [revision(folder)]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        with open(folder / name, "ab") as file:
            file.write(b" ")
        seen.append(revision(folder))
    assert len(set(seen)) == 4 and all(len(one) == 12 for one in seen)
    (folder / "README.md").write_text("a card")
    assert revision(folder) == seen[-1]


def test_revision_of_a_hub_model_is_its_commit(empty_cache):
    assert revision("gpt2") == HUB_REVISIONS["gpt2"]
    assert revision("someone/model@0123abc") == "0123abc"


def test_pins_are_full_commits():
    assert all(
        len(commit) == 40 and set(commit) <= set("0123456789abcdef") for commit in HUB_REVISIONS.values()
    )


def test_pinned_name_is_never_a_folder(tmp_path, monkeypatch, empty_cache):
    write_model(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match="hub's cache"):
        load("gpt2")
    assert load("./gpt2", device="cpu")[0].config.n_embd == 32


# --- the hub ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["someone/model", "x" * 5000, ""])
def test_unpinned_hub_name_says_how_to_pin(empty_cache, name):
    with pytest.raises(LoadError, match=f"{name or 'name'}@<commit>.*MODEL=embedded"):
        load(name)


def test_unreachable_hub_is_told_quickly_with_the_offline_way(empty_cache):
    began = time.monotonic()
    with pytest.raises(LoadError, match="gpt2.*607a30d783df.*MODEL=embedded.*local folder") as caught:
        load("gpt2")
    assert time.monotonic() - began < 5
    assert caught.value.__cause__ is not None


def test_silent_hub_is_told_quickly(empty_cache, monkeypatch):
    """A line that accepts and never answers: the hub's client alone would wait for minutes."""
    monkeypatch.setattr(loading, "HUB_TIMEOUT", 1.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(LoadError, match="Timeout.*MODEL=embedded"):
            load("gpt2")
        assert time.monotonic() - began < 4


def test_partly_cached_model_is_not_taken_for_whole(empty_cache):
    snapshot = empty_cache / "models--gpt2" / "snapshots" / HUB_REVISIONS["gpt2"]
    write_model(snapshot)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="can't be fetched"):
        load("gpt2")


def test_hub_cache_serves_the_pinned_revision_offline(tmp_path):
    """In a process of its own, since the hub's client reads these variables once: gpt2 is cached, distilgpt2
    isn't."""
    cache = tmp_path / "models--gpt2"
    write_model(cache / "snapshots" / HUB_REVISIONS["gpt2"])
    write_model(cache / "snapshots" / ("f" * 40), n_inner=8)  # what another revision holds must not be taken
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("f" * 40)
    script = """
from sketchkv import loading
model, tokenizer = loading.load("gpt2", device="cpu")
print(model.config.n_inner, len(tokenizer), loading.revision("gpt2"))
try:
    loading.load("distilbert/distilgpt2")
except loading.LoadError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded, told = done.stdout.splitlines()
    assert loaded == f"None 4096 {HUB_REVISIONS['gpt2']}"
    assert "MODEL=embedded" in told and "OfflineModeIsEnabled" in told


# --- devices ------------------------------------------------------------------------------------------------


def test_device_auto_takes_what_is_there():
    assert resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:", "cuda:x", "cuda:-1", "cpu:0", ""])
def test_unknown_device_lists_the_allowed(name):
    with pytest.raises(LoadError, match="Unknown device .*auto, cpu, cuda"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("count", "name", "fits"), [(0, "cuda", 0), (0, "cuda:0", 0), (1, "cuda:1", 0), (2, "cuda:1", 1)]
)
def test_absent_cuda_device_is_told(monkeypatch, count, name, fits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if fits:
        assert resolve_device(name) == torch.device(name)
        assert resolve_device("auto") == torch.device("cuda")
    else:
        with pytest.raises(LoadError, match=f"{count} CUDA devices .*DEVICE=auto"):
            resolve_device(name)
