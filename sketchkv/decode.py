"""The manual decode loop and streaming scores: what a user, the sweep and the benchmarks run."""

import torch
from transformers import DynamicCache
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sketchkv.cache import SketchCache
from sketchkv.compiled import compiled_step
from sketchkv.graph import StepGraphs


def _check(model, input_ids, cache, new_tokens=0):
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got shape {tuple(input_ids.shape)}")
    if cache.get_seq_length() > 0:
        raise ValueError("the cache already holds a text: call cache.reset() or make a new one")
    config = model.config.get_text_config(decoder=True)
    length, positions = input_ids.shape[1] + new_tokens, getattr(config, "max_position_embeddings", None)
    if positions and length > positions and getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"{length} tokens are more than the model's {positions} positions: shorten the text")


def _chunk_size(cache, chunk_size):
    return min(chunk_size, getattr(cache, "max_chunk_size", None) or chunk_size)


@torch.no_grad()
def generate(
    model, input_ids, cache=None, max_new_tokens=20, *, attention_mask=None, do_sample=False, temperature=1.0, top_k=None,
    top_p=None, eos_token_id=None, pad_token_id=None, chunk_size=512, graph=False, compile=False,
):  # fmt: skip
    """Continues `input_ids` (`[batch, tokens]`, padded on the left) by up to `max_new_tokens`: the decode loop, in the open.

    The prompt passes in chunks of `chunk_size`, then one token at a time. cache: an empty `SketchCache`, any other
    transformers cache, or None for the full one. attention_mask: `[batch, tokens]`, 0 for padding. Greedy, or sampling
    from torch's global generator with `do_sample`. A row that has produced `eos_token_id` is filled with `pad_token_id`
    (default: eos), and generation ends when all rows have. graph: record steps as CUDA graphs (`sketchkv.graph`), for a
    `SketchCache` and texts without padding; the recordings stay with the cache, and serve the next text after
    `cache.reset()`. compile: run the model's part of a step through torch.compile (`sketchkv.compiled`), for a `SketchCache`,
    on either device, with `graph` or without; compiling takes seconds to a minute, once for a model and a batch size. Returns
    int64 `[batch, tokens + new tokens]`.

    Raises ValueError for an empty prompt, a used cache, a text longer than the model's positions, or a cache or padding that
    `graph` or `compile` cannot take; RuntimeError where there is no compiler.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    _check(model, input_ids, cache, max_new_tokens - 1)
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    warp = LogitsProcessorList(warpers)
    padded = attention_mask is not None and not bool(attention_mask.all())
    mask = attention_mask if padded else None
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if padded else None
    if compile and not isinstance(cache, SketchCache):
        raise ValueError("compile=True takes a SketchCache: other caches grow, and the compiled step with them")
    compiled = compiled_step(model) if compile else None
    if graph:
        if padded or not isinstance(cache, SketchCache):
            raise ValueError("graph=True takes a SketchCache and texts without padding")
        if cache.steps is None or cache.steps.model is not model or cache.steps.compiled is not compiled:
            cache.steps = StepGraphs(model, cache, compiled)

    chunk_size = _chunk_size(cache, chunk_size)
    for start in range(0, input_ids.shape[1], chunk_size):  # prefill
        chunk = slice(start, start + chunk_size)
        logits = model(
            input_ids[:, chunk], past_key_values=cache, use_cache=True, logits_to_keep=1,
            attention_mask=mask[:, : chunk.stop] if padded else None,
            position_ids=positions[:, chunk] if padded else None,
        ).logits  # fmt: skip

    tokens = [input_ids]
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        scores = logits[:, -1].float()
        if do_sample:
            scores = warp(torch.cat(tokens, 1), scores) if warpers else scores
            token = torch.multinomial(scores.softmax(-1), 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        if eos_token_id is not None:
            token = token.masked_fill(finished[:, None], eos_token_id if pad_token_id is None else pad_token_id)
            finished |= token[:, 0] == eos_token_id
        tokens.append(token)
        if step + 1 == max_new_tokens or (eos_token_id is not None and bool(finished.all())):
            break
        if padded:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions[:, -1:] + 1
        if graph:
            logits = cache.steps(token)[:, None]
            continue
        if compile:
            logits = compiled(token, cache, positions)
            continue
        logits = model(token, past_key_values=cache, use_cache=True, attention_mask=mask, position_ids=positions).logits
    if isinstance(cache, SketchCache):
        cache.check()
    return torch.cat(tokens, 1)


@torch.no_grad()
def stream(model, input_ids, cache=None, chunk_size=512):
    """What the model predicts along a text, chunk by chunk: yields (start, logits), logits `[batch, n, vocabulary]` of the
    tokens from `start` on, each predicted from the cache as decoding would find it. Parameters and errors as of `score`."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    _check(model, input_ids, cache)
    if input_ids.shape[1] < 2:
        raise ValueError("a text of one token has nothing to predict: give at least two tokens")
    chunk_size = _chunk_size(cache, chunk_size)
    if getattr(cache, "prefill_chunk", None):  # what is scored is decoded, not a prompt
        chunk_size = min(chunk_size, cache.layers[0].evict_every)
    for start in range(0, input_ids.shape[1], chunk_size):
        chunk = input_ids[:, start : start + chunk_size]
        yield start, model(chunk, past_key_values=cache, use_cache=True).logits
    if isinstance(cache, SketchCache):
        cache.check()


@torch.no_grad()
def score(model, input_ids, cache=None, *, chunk_size=512, return_logits=False):
    """Negative log-likelihood of a text, each token predicted from the cache as decoding would find it.

    input_ids: `[batch, tokens]`, texts of equal length without padding. cache: an empty `SketchCache` (or other cache);
    None scores with the full cache. chunk_size: tokens per forward pass, a matter of memory and speed only: what a
    `SketchCache` evicts, and when, does not depend on it. Returns nll in nats, float32 `[batch, tokens - 1]`, entry t for
    token t + 1 given the tokens before it; with `return_logits`, (nll, logits) with logits `[batch, tokens, vocabulary]`.

    Raises ValueError for a text of fewer than two tokens, a used cache, or one longer than the model's positions.
    """
    nll, kept = [], []
    for start, logits in stream(model, input_ids, cache, chunk_size):
        if return_logits:
            kept.append(logits)
        targets = input_ids[:, start + 1 : start + 1 + logits.shape[1]]
        predicted = logits[:, : targets.shape[1]].float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(predicted, targets.flatten(), reduction="none")
        nll.append(loss.view(targets.shape))
    return (torch.cat(nll, 1), torch.cat(kept, 1)) if return_logits else torch.cat(nll, 1)
