"""Small random models of every supported architecture, built from their configurations."""

import os
import re
import subprocess
import sys
from functools import lru_cache
from unittest import mock

import pytest
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sketchkv
from sketchkv.logits import Form
from sketchkv.passes import Tokens

transformers.logging.set_verbosity_error()
VOCABULARY = 97
ARCHITECTURES = ["gpt2", "llama", "qwen2", "qwen3"]


@pytest.fixture(autouse=True, scope="session")
def interpreter_takes_numpy():
    """Triton's interpreter makes loop bounds of arrays with one element, which numpy 2.4 no longer converts."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with mock.patch.object(interpreter, "_patch_lang_tensor", patched):
        yield


def build(architecture, positions=512, head_dim=16):
    torch.manual_seed(0)
    common = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    grouped = common | dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=positions,
    )
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_positions=positions, n_embd=64, n_layer=2, n_head=4, **common))
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**grouped))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**grouped))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**grouped))
    # Freshly initialised attention is almost uniform, and a wrong mask would go unnoticed: sharpen it.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    """An enabled model of each architecture."""
    return sketchkv.enable(build(request.param))


@pytest.fixture
def gpt2():
    return sketchkv.enable(build("gpt2"))


@pytest.fixture
def ids():
    return torch.randint(1, VOCABULARY, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padding(ids):
    """A left-padded batch: (input_ids, attention_mask); row 0 is whole, row 1 lacks its first 23 tokens."""
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    return ids * mask, mask


@pytest.fixture
def quickly(monkeypatch):
    """C is compiled in a third of the time, for what is compiled for a single test."""
    # Not where `conftest` is imported: a test looks at what a CPU loads.
    from sketchkv.fast import cpu, native

    monkeypatch.setattr(native, "FLAGS", ("-O1", *native.FLAGS[1:]))
    monkeypatch.setattr(cpu, "library", lru_cache(native.library.__wrapped__))


def attended(layer, query, keys, values, softcap=None):
    """(what a bounded layer gives for a text at once, the same of a full cache); query: `[1, num_heads, n, head_dim]`, keys and
    values: `[1, 1, n, head_dim]`; logits are scaled by 1/2."""
    layer.update(keys, values)
    positions = torch.arange(keys.shape[2], dtype=torch.int32)[None]
    output = layer.attend(query, keys, values, Tokens(None, positions), Form(0.5, softcap))
    logits = query @ keys.mT / 2
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    later = torch.ones_like(logits, dtype=torch.bool).triu(1)
    return output, logits.masked_fill(later, -torch.inf).softmax(-1) @ values


def interpreted(path, *arguments):
    """Runs the tests of a file in Triton's interpreter: that must be chosen before triton is first imported, hence another
    process."""
    plugins = "-p", "no:cacheprovider", "-p", "no:nbval", "-p", "no:xdist"  # each takes its time to be loaded
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugins, *arguments, path]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def with_fault(source, folder, old, new):
    """A copy of the C file `source` in `folder`, with `new` in place of `old` there or in what it includes."""
    for file in source.parent.glob("*.c"):
        (folder / file.name).write_text(file.read_text())
    faulty = [file for file in folder.glob("*.c") if old in file.read_text()]
    assert faulty, old
    for file in faulty:
        file.write_text(file.read_text().replace(old, new, 1))
    return folder / source.name


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.name != "test_with_the_interpreter")


def named(settings):
    """A test's name from its settings, the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(settings))
