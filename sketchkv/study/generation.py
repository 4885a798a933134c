"""Continuing prompts under bounded caches: how far the text strays from the full cache's, how fast, in how many bytes."""

import time
from contextlib import contextmanager

import torch
from sacrebleu.metrics import BLEU

from sketchkv.decode import generate
from sketchkv.study.integration import held_bytes

# Of one text against one other; a text without any 4-gram in common must not count as nothing at all.
_BLEU = BLEU(effective_order=True)


@contextmanager
def forward_times(model):
    """Collects the moment, in seconds, at which each forward pass of the model ends; CUDA is waited for."""
    moments = []

    def note(*_):
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        moments.append(time.perf_counter())

    handle = model.register_forward_hook(note)
    try:
        yield moments
    finally:
        handle.remove()


def continuation(model, prompts, cache, new_tokens, *, do_sample=False, seed=0, by_hand=True):
    """Continues `prompts` `[batch, tokens]`, all of one length, by exactly `new_tokens`: an end-of-text token ends nothing.

    Greedy, or sampled at temperature 1 after `seed`: each step draws the same random numbers whatever the cache, so that
    texts differ only where probabilities do. by_hand: through `sketchkv.decode.generate`; otherwise `model.generate`.

    Returns a dict: "tokens" int64 `[batch, new_tokens]` on the CPU; "seconds" of the decode steps, `[new_tokens - 1]`, the
    prompt's pass left out; "held", bytes of the cache's tensors in the end; "peak", bytes allocated at most beside the
    weights (on the CPU, where nothing counts them: "held").
    """
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    torch.manual_seed(seed)
    with forward_times(model) as moments:
        if by_hand:
            tokens = generate(
                model, prompts, cache, new_tokens, do_sample=do_sample, chunk_size=prompts.shape[1]
            )
        else:
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                past_key_values=cache,
                max_new_tokens=new_tokens,
                do_sample=do_sample,
                top_k=0,
                eos_token_id=None,
                pad_token_id=0,
            )
    held = held_bytes(cache)["total"]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "tokens": tokens[:, prompts.shape[1] :].cpu(),
        "seconds": torch.tensor(moments, dtype=torch.float64).diff()[-(new_tokens - 1) :],
        "held": held,
        "peak": torch.cuda.max_memory_allocated(model.device) - weights if cuda else held,
    }


def agreement(tokens, reference):
    """Compares token sequences `[batch, n]` position by position: (share of equal tokens, tokens before the first that
    differs), float and int64 `[batch]`; sequences that never differ count n."""
    equal = tokens == reference
    return equal.double().mean(1), equal.cumprod(1).sum(1)


def bleu(tokenizer, tokens, reference):
    """BLEU (0 to 100) of each row's text against the other's: a list of float. `bleu_signature` says which BLEU."""
    texts = (tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) for ids in (tokens, reference))
    return [_BLEU.sentence_score(text, [true]).score for text, true in zip(*texts)]


def bleu_signature():
    """sacreBLEU's signature: tokenization, smoothing, case, version."""
    return str(_BLEU.get_signature())


def repetition(tokens, n=4):
    """Share of the n-grams of each row `[batch, tokens]` that have occurred in it before: float `[batch]`."""
    grams = [[tuple(gram) for gram in row.unfold(0, n, 1).tolist()] for row in tokens]
    return torch.tensor([1 - len(set(row)) / len(row) for row in grams], dtype=torch.float64)
