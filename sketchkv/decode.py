"""The manual decode loop and streaming scores: what a user, the sweep and the benchmarks run."""

from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sketchkv.checks import flag, real, share, told, whole
from sketchkv.support import text_config


@torch.no_grad()
def generate(
    model,
    input_ids,
    cache=None,
    max_new_tokens=20,
    *,
    attention_mask=None,
    do_sample=False,
    temperature=1.0,
    top_k=None,
    top_p=None,
    eos_token_id=None,
    pad_token_id=None,
    generation_config=None,
    streamer=None,
    chunk_size=512,
    graph=False,
    compile=False,
):
    """Continues a prompt: the decode loop, in the open. The prompt passes in chunks, then one token at a time.

    model: a causal language model, enabled where the cache is a `SketchCache`.
    input_ids: int64 `[batch, tokens]`, padded on the left, or what a tokenizer returns.
    cache: an empty `SketchCache`, any other transformers cache, or None for the full one.
    max_new_tokens: at most so many are added.
    attention_mask: `[batch, tokens]`, 0 for padding; None: the tokenizer's, if there is one.
    do_sample: draw from torch's global generator, else greedy; temperature, top_k, top_p: of the draw.
    eos_token_id: one id or a list; a row that has produced one is filled with pad_token_id (default: the first of them),
        and generation ends when all rows have. None: generation does not end early.
    generation_config: a transformers `GenerationConfig`, such as `model.generation_config`, from which max_new_tokens
        (or max_length), do_sample, temperature, top_k, top_p, eos_token_id and pad_token_id are taken where they are left
        at their defaults; one that asks for more, such as beams or a penalty, is refused.
    streamer: a transformers streamer, given the prompt and each token as it comes.
    chunk_size: at most so many tokens of the prompt per forward pass: a matter of memory and speed, and of a cache with
        `prefill_chunk` or an index, which takes a prompt otherwise than steps, also of when it evicts.
    graph: record steps as CUDA graphs (`sketchkv.fast.graphs`), for a `SketchCache` and texts without padding.
    compile: run the model's part of a step through torch.compile (`sketchkv.fast.compiled`), for a `SketchCache`.
    Returns int64 `[batch, tokens + new tokens]`.

    Raises ValueError for an empty prompt, a used cache, a text longer than a table of positions that were learned (rotary
    ones go on beyond those of the training, with a warning), a value out of range, or what `graph` or `compile` cannot take; TypeError for
    what is no model, prompt or cache; RuntimeError without a compiler.
    """
    if generation_config is not None:
        given = dict(do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p)
        given |= dict(eos_token_id=eos_token_id, pad_token_id=pad_token_id, max_new_tokens=max_new_tokens)
        filled = _filled(given, generation_config, _ids(input_ids)[0].shape[1])
        do_sample, temperature, top_k, top_p, eos_token_id, pad_token_id, max_new_tokens = filled
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
    chunk_size = whole("chunk_size", chunk_size, 1)
    input_ids, attention_mask, cache = _checked(model, input_ids, cache, max_new_tokens - 1, attention_mask)
    pick = (
        _sampler(temperature, top_k, top_p)
        if flag("do_sample", do_sample)
        else _greedy(temperature, top_k, top_p)
    )
    ends, pad = _ends(eos_token_id, pad_token_id, text_config(model.config).vocab_size, input_ids.device)
    for method in () if streamer is None else ("put", "end"):
        if isinstance(streamer, type) or not callable(getattr(streamer, method, None)):
            raise TypeError(f"streamer must be a transformers streamer with {method}(), got {streamer!r}")
    mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
    positions: Any = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    step = _step(model, cache, mask is not None, graph, compile)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    # The remainder comes first: a last chunk of one token would be a step, to a cache that tells prompts from steps.
    stops = range(input_ids.shape[1] % chunk_size or chunk_size, input_ids.shape[1] + 1, chunk_size)
    for stop in stops if max_new_tokens else ():
        chunk = slice(max(0, stop - chunk_size), stop)
        padding = (
            {}
            if mask is None
            else {"attention_mask": mask[:, : chunk.stop], "position_ids": positions[:, chunk]}
        )
        logits = model(
            input_ids[:, chunk], past_key_values=cache, use_cache=True, logits_to_keep=1, **padding
        ).logits
    tokens, finished = input_ids, torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
    for count in range(1, max_new_tokens + 1):
        token = pick(tokens, logits[:, -1].float())
        if ends is not None:
            token = token.masked_fill(finished, pad)
            finished |= torch.isin(token, ends)
        tokens = torch.cat([tokens, token], 1)
        if streamer is not None:
            streamer.put(token[:, 0].cpu())
        if count == max_new_tokens or (ends is not None and bool(finished.all())):
            break
        if mask is not None:
            mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
        logits = step(token, mask, positions)
    if streamer is not None:
        streamer.end()
    _check(cache)
    return tokens


@torch.no_grad()
def stream(model, input_ids, cache=None, chunk_size=512):
    """What the model predicts along a text, chunk by chunk: yields (start, logits), logits `[batch, n, vocabulary]` of the
    tokens from `start` on, each predicted from the cache as decoding would find it. Parameters and errors as of `score`."""
    chunk_size = whole("chunk_size", chunk_size, 1)
    input_ids, mask, cache = _checked(model, input_ids, cache)
    if mask is not None and not mask.all():
        raise ValueError("texts with padding can't be scored: give texts of equal length")
    if input_ids.shape[1] < 2:
        raise ValueError("a text of one token has nothing to predict: give at least two tokens")
    # What is scored is decoded, not a prompt: a cache whose prompts pass otherwise gets no more than decoding may bring.
    limit = getattr(cache, "max_chunk_size", None) or chunk_size
    if getattr(cache, "prefill_chunk", None):
        limit = min(limit, cache.evict_every)
    chunk_size = min(chunk_size, limit)
    for start in range(0, input_ids.shape[1], chunk_size):
        yield (
            start,
            model(input_ids[:, start : start + chunk_size], past_key_values=cache, use_cache=True).logits,
        )
    _check(cache)


@torch.no_grad()
def score(model, input_ids, cache=None, *, chunk_size=512, return_logits=False):
    """Negative log-likelihood of a text, each token predicted from the cache as decoding would find it.

    model: a causal language model, enabled where the cache is a `SketchCache`.
    input_ids: int64 `[batch, tokens]`, texts of equal length without padding, or what a tokenizer returns.
    cache: an empty `SketchCache` (or other cache); None scores with the full cache.
    chunk_size: tokens per forward pass, a matter of memory and speed only: what is evicted does not depend on it.
    return_logits: return (nll, logits), logits `[batch, tokens, vocabulary]`.
    Returns nll in nats, float32 `[batch, tokens - 1]`, entry t for token t + 1 given the tokens before it.

    Raises ValueError for a text of fewer than two tokens, padding, a used cache, or a text longer than the model's
    positions, TypeError for what is no model, text or cache.
    """
    ids, nll, kept, return_logits = _ids(input_ids)[0], [], [], flag("return_logits", return_logits)
    for start, logits in stream(model, input_ids, cache, chunk_size):
        targets = ids[:, start + 1 : start + 1 + logits.shape[1]].long()
        predicted = logits[:, : targets.shape[1]].float().flatten(0, 1)
        nll.append(
            torch.nn.functional.cross_entropy(predicted, targets.flatten(), reduction="none").view(
                targets.shape
            )
        )
        kept += [logits] if return_logits else []
    return (torch.cat(nll, 1), torch.cat(kept, 1)) if return_logits else torch.cat(nll, 1)


def _ids(given):
    """(input_ids, attention_mask or None) of a tensor or of what a tokenizer returns."""
    mask = None
    if hasattr(given, "keys") and "input_ids" in given:
        given, mask = given["input_ids"], given.get("attention_mask")
    if not isinstance(given, torch.Tensor):
        raise TypeError(
            f"input_ids must be a tensor [batch, tokens] or a tokenizer's output with return_tensors='pt', got {told(given)}"
        )
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids must be int64 or int32, got {given.dtype}: use input_ids.long()")
    if given.ndim != 2 or 0 in given.shape:
        raise ValueError(
            f"input_ids must be [batch, tokens] with at least one token, got shape {tuple(given.shape)}"
        )
    return given.long(), mask


def _checked(model, input_ids, cache, new_tokens=0, attention_mask=None):
    """Token ids, mask and cache (a full one for None), once they are found to fit each other and the model."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(
            f"model must be a causal language model of transformers, as from_pretrained() gives; got {told(model)}"
        )
    ids, mask = _ids(input_ids)
    mask = mask if attention_mask is None else attention_mask
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise ValueError(
            f"attention_mask must be a tensor of the shape of input_ids, {list(ids.shape)}; got {told(mask)}"
        )
    if mask is not None:
        mask = mask.to(ids.device)
        if not bool(((mask == 0) | (mask == 1)).all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
            raise ValueError(
                "attention_mask must be 0 for padding, 1 for tokens, and padding must be on the left"
            )
    config = text_config(model.config)
    if ids.device.type != "meta" and (bool((ids < 0).any()) or bool((ids >= config.vocab_size).any())):
        raise ValueError(
            f"input_ids must be in [0, {config.vocab_size}), the model's vocabulary: is this its tokenizer?"
        )
    if next(model.parameters()).device.type == "meta":
        raise ValueError(
            "the model is on the meta device and has no weights: load it, or move it with model.to_empty()"
        )
    cache = DynamicCache(config=config) if cache is None else cache
    if not isinstance(cache, Cache):
        raise TypeError(
            f"cache must be a SketchCache or another transformers cache, made with (...); got {told(cache)}"
        )
    if cache.get_seq_length() > 0:
        raise ValueError("the cache already holds a text: call cache.reset() or make a new one")
    text = ids.shape[1] if mask is None else int(mask.sum(-1).max())  # padding on the left takes no position
    length, positions = text + max(new_tokens, 0), getattr(config, "max_position_embeddings", None)
    if positions and length > positions and getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"{length} tokens are more than the model's {positions} positions: shorten the text")
    return ids, mask, cache


# What a `GenerationConfig` may ask for that `generate` does not do, and the value that asks for nothing.
BEYOND = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "repetition_penalty", "typical_p"), 1),
    **dict.fromkeys(
        ("no_repeat_ngram_size", "min_length", "min_new_tokens", "min_p", "epsilon_cutoff", "eta_cutoff"), 0
    ),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings"), None
    ),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "penalty_alpha", "guidance_scale"), None),
    **dict.fromkeys(("max_time", "exponential_decay_length_penalty", "watermarking_config", "top_h"), None),
    **dict.fromkeys(("cache_implementation", "prompt_lookup_num_tokens", "assistant_early_exit"), None),
    **dict.fromkeys(("return_dict_in_generate", "token_healing"), False),
    "use_cache": True,
}


def _filled(given, config, tokens):
    """Values of `given`, those at their defaults from a GenerationConfig; `tokens` of the prompt count in its max_length."""
    if not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config must be a transformers.GenerationConfig, got {told(config)}: use GenerationConfig(**...)"
        )
    asked = {name: getattr(config, name, None) for name in BEYOND}
    more = [f"{name}={value}" for name, value in asked.items() if value not in (None, BEYOND[name])]
    if more:
        raise ValueError(
            f"generation_config asks for {', '.join(more)}, which this loop does not do: set it to None, or use "
            "model.generate(..., past_key_values=cache)"
        )
    defaults = dict(do_sample=False, temperature=1.0, max_new_tokens=20)
    own = {name: getattr(config, name, None) for name in given}
    if own["max_new_tokens"] is None and config.max_length is not None:
        own["max_new_tokens"] = max(0, config.max_length - tokens)
    filled = given | {
        name: value for name, value in own.items() if value is not None and given[name] == defaults.get(name)
    }
    # As in transformers, what a greedy configuration says of sampling is without effect.
    if not filled["do_sample"]:
        filled |= {name: given[name] for name in ("temperature", "top_k", "top_p")}
    return list(filled.values())


def _sampler(temperature, top_k, top_p):
    """A function of (tokens so far, logits) -> next token, drawn from torch's global generator."""
    if isinstance(temperature, bool) or not real(temperature) or not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be a positive number, got {temperature!r}: do_sample=False is greedy"
        )
    top_p = top_p if top_p is None else share("top_p", top_p)
    top_k = top_k if top_k is None else whole("top_k", top_k, 0)  # 0: all, as in transformers
    warpers: list[LogitsProcessor] = (
        [TemperatureLogitsWarper(float(temperature))] if temperature != 1.0 else []
    )
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p else []
    warp = LogitsProcessorList(warpers)
    return lambda tokens, logits: torch.multinomial(warp(tokens, logits).softmax(-1), 1)


def _greedy(temperature, top_k, top_p):
    if temperature != 1.0 or top_p is not None or top_k is not None:
        raise ValueError(
            "temperature, top_k and top_p are of sampling: set do_sample=True, or leave them out"
        )
    return lambda tokens, logits: logits.argmax(-1, keepdim=True)


def _ends(eos_token_id, pad_token_id, vocabulary, device):
    """(ids that end a row as a tensor or None, what fills it then)."""
    pad = pad_token_id if pad_token_id is None else whole("pad_token_id", pad_token_id, 0, vocabulary - 1)
    if eos_token_id is None:
        return None, None
    several = isinstance(eos_token_id, (list, tuple, set)) or getattr(eos_token_id, "ndim", 0) > 0
    ends = [
        whole("eos_token_id", each, 0, vocabulary - 1)
        for each in (eos_token_id if several else [eos_token_id])
    ]
    if not ends:
        raise ValueError("eos_token_id is an empty list: give None if nothing ends a text")
    return torch.tensor(ends, device=device), ends[0] if pad is None else pad


def _step(model, cache, padded, graph, compile):
    """What runs one decode step: a function of (token, mask, positions) that returns logits `[batch, 1, vocabulary]`."""
    if flag("graph", graph) | flag("compile", compile):
        from sketchkv import fast

        return fast.step(model, cache, padded, graph, compile)

    def plain(token, mask, positions):
        padding = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        return model(token, past_key_values=cache, use_cache=True, **padding).logits

    return plain


def _check(cache):
    if hasattr(cache, "check"):
        cache.check()
