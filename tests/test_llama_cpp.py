"""llama.cpp beside ours: the weights that it is given, read by another reader; what is asked of its process."""

import sys

import pytest
import torch
from conftest import build
from transformers import AutoModelForCausalLM

from sketchkv.study.extras import llama_cpp


@torch.no_grad()
def test_gguf_holds_the_models_weights(tmp_path):
    """As transformers reads them, which turns rotated pairs back in its own way."""
    pytest.importorskip("gguf", reason="it comes with the pretrained models")
    model, ids = build("llama"), torch.arange(1, 25)[None]
    for weight in model.parameters():
        weight.copy_(weight.half())
    llama_cpp.write_gguf(model, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(read(ids).logits, model(ids).logits)


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A function that has a program of Python stand in for node."""

    def stand_in(program):
        path = tmp_path / "node"
        path.write_text(f"#!{sys.executable}\n{program}")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        return llama_cpp.LlamaCpp("model.gguf", 2, 8, modules=tmp_path)

    return stand_in


def test_answers_come_with_the_time_that_they_took(node):
    echo = 'for line in open(0): print(f\'{{"cpu": 1500, "found": {line.strip()}}}\', flush=True)'
    with node(echo) as peer:
        assert peer.ask(steps=[1, 2]) == {"steps": [1, 2]} and peer.ask(read=[3]) == {"read": [3]}
        assert peer.cpu == 3.0
    assert peer.process.returncode is not None


def test_a_process_that_ended_is_told(node):
    with node("") as peer, pytest.raises(RuntimeError, match="llama.cpp does not run here"):
        peer.ask(read=[1])
