"""Continuing prompts under bounded caches: how far the text strays from the full cache's, and whether it is worse."""

import pandas as pd
import sacrebleu
import torch
from sacrebleu.metrics import BLEU

from sketchkv import score
from sketchkv.decode import generate
from sketchkv.study import stats
from sketchkv.study.methods import LABELS

# Of one text against one other; a text without any 4-gram in common must not count as nothing at all.
_BLEU = BLEU(effective_order=True)

COLUMNS = {
    "method": "cache",
    "mode": "greedy or sampling",
    "document": "held-out file whose beginning is the prompt",
    "first": "tokens equal to the full cache's continuation before the first that differs",
    "equal": "share of positions with the token that the full cache's continuation has there",
    "bleu_full": f"BLEU, 0 to 100, against the full cache's continuation (sacreBLEU {sacrebleu.__version__}, effective order)",
    "bleu_true": "the same against the document's own text",
    "repeated": "share of the continuation's 4-grams of tokens that occurred in it before",
    "nll": "nats per token of the sampled continuation, scored by the model with the full cache",
}
INTERVAL_COLUMNS = {
    "method": "cache",
    "mean": "perplexity of sampled text for the full cache, over that of its own text, less 1, in %",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "first": "tokens equal to the full cache's before the first that differs, mean",
    "n": "prompts",
}


def continuation(model, prompts, cache, new_tokens, *, do_sample=False, seed=0, by_hand=True):
    """Continues `prompts` `[batch, tokens]`, all of one length, by exactly `new_tokens`: an end-of-text token ends nothing.
    Returns the new tokens, int64 `[batch, new_tokens]` on the CPU.

    Greedy, or sampled at temperature 1 after `seed`: each step draws the same random numbers whatever the cache, so that
    texts differ only where probabilities do. by_hand: through `sketchkv.decode.generate`; otherwise `model.generate`.
    """
    torch.manual_seed(seed)
    if by_hand:
        tokens = generate(model, prompts, cache, new_tokens, do_sample=do_sample, chunk_size=prompts.shape[1])
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
    return tokens[:, prompts.shape[1] :].cpu()


def agreement(tokens, reference):
    """Compares token sequences `[batch, n]` position by position: (share of equal tokens, tokens before the first that
    differs), float and int64 `[batch]`; sequences that never differ count n."""
    equal = tokens == reference
    return equal.double().mean(1), equal.cumprod(1).sum(1)


def bleu(tokenizer, tokens, reference):
    """BLEU (0 to 100) of each row's text against the other's: a list of float."""
    texts = (tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False) for ids in (tokens, reference))
    return [_BLEU.sentence_score(text, [true]).score for text, true in zip(*texts)]


def repetition(tokens, n=4):
    """Share of the n-grams of each row `[batch, tokens]` that have occurred in it before: float `[batch]`."""
    grams = [[tuple(gram) for gram in row.unfold(0, n, 1).tolist()] for row in tokens]
    return torch.tensor([1 - len(set(row)) / len(row) for row in grams], dtype=torch.float64)


def compared(lm, tokenizer, texts, prompts, truth, names):
    """One row (`COLUMNS`) per text of `texts`, {(method, mode): tokens}: a DataFrame."""
    rows: list = []
    count, start = len(names), prompts.shape[1] - 1
    for (method, mode), tokens in texts.items():
        reference = texts["full", mode]
        equal, first = agreement(tokens, reference)
        nll = torch.full([count], torch.nan)
        if mode == "sampling":
            nll = score(lm, torch.cat([prompts, tokens.to(lm.device)], 1))[:, start:].mean(1)
        columns = first, equal, bleu(tokenizer, tokens, reference), bleu(tokenizer, tokens, truth)
        numbers = (torch.as_tensor(each).tolist() for each in (*columns, repetition(tokens), nll))
        rows += zip([method] * count, [mode] * count, names, *numbers)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def worse(table, seed=0):
    """How much less probable each method's sampled text is than the full cache's own: a DataFrame (`INTERVAL_COLUMNS`)."""
    sampled = table[table["mode"] == "sampling"]
    nll = sampled.pivot(index="document", columns="method", values="nll")
    first = sampled.groupby("method")["first"].mean()
    rows = []
    for name in nll.columns.drop("full"):
        interval = torch.tensor(stats.paired_interval((nll[name] - nll["full"]).to_numpy(copy=True), seed))
        rows.append((name, *(100 * interval.expm1()).tolist(), first[name], len(nll)))
    return pd.DataFrame(rows, columns=list(INTERVAL_COLUMNS)).sort_values("mean", ignore_index=True)


def caption(found, cap, prompt_tokens, new_tokens):
    told = [row for row in found.itertuples() if row.low > 0]
    finding = (
        "A text that strays is no worse text: for no cache does the interval exclude zero"
        if not told
        else f"The model finds text written under {len(told)} of {len(found)} caches less likely than its own"
    )
    each = "; ".join(
        f"{LABELS[row.method]} {row.mean:+.0f} % ({row.low:+.0f} to {row.high:+.0f}), the same for "
        f"{row.first:.0f} tokens"
        for row in found.itertuples()
    )
    return (
        f"{finding}. Perplexity of sampled text in the eyes of the full cache, over that of its own text: {each}. "
        f"Bars: bootstrap 95 % intervals (n = {found.n.iloc[0]} prompts of {prompt_tokens} tokens, continued by "
        f"{new_tokens}, cap {cap})."
    )
