"""What the explorer shows, and the site: from plain data, without a browser but in the last test."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from sketchkv import SketchCache, Window, enable
from sketchkv.oracle import decode_and_watch, full_cache_logits


def tiny(sliding_window=None):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=sliding_window,
        max_position_embeddings=512,
    )
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3)  # attention that is not uniform: a wrong mask shows
    return enable(model)


@pytest.mark.parametrize("window, cap", [(12, 40), (40, 24)])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_query_of_a_window_layer_sees_no_token_too_many(window, cap, chunk):
    model = tiny(window)
    ids = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))
    cache = SketchCache(model.config, cap, policy=Window())
    logits, visible = decode_and_watch(model, ids, cache, chunk_size=chunk)
    assert all(int(layer.sum(-1).max()) == min(window, cap) for layer in visible)
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-3, rtol=1e-3)


def test_a_query_of_a_layer_with_an_index_sees_what_it_asked_for():
    model = tiny()
    ids = torch.randint(97, (1, 100), generator=torch.Generator().manual_seed(1))
    cache = SketchCache(model.config, 48, recent_window=32, num_sinks=2, index=small_index())
    logits, visible = decode_and_watch(model, ids, cache)
    assert all((layer[:, :, -1].sum(-1) == 2 + 32 + 8).all() for layer in visible)
    torch.testing.assert_close(logits, full_cache_logits(model, ids, visible), atol=1e-3, rtol=1e-3)


def small_index():
    from sketchkv.index import KeyIndex

    return KeyIndex(top=8, block=32, num_sinks=2)
