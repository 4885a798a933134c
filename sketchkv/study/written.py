"""What a real model writes under a bounded cache after a long prompt, in the eyes of the same model with its full cache."""

import torch
from transformers import DynamicCache

from sketchkv.study.generation import continuation, repetition
from sketchkv.study.methods import make_cache
from sketchkv.study.questions import frame

NEW = 512  # tokens that are written
QUESTION = "Summarize the text above in detail."
COLUMNS = {
    "kind": "text: a document that is cut off; chat: one of as many tokens, and a user's request to summarize it",
    "mode": "greedy or sampling (temperature 1, every cache draws the same random numbers)",
    "document": "held-out file",
    "first": f"tokens before the first that the full cache would not have chosen, of {NEW}; greedy texts alone",
    "chosen": "share of the text's tokens that the full cache would have chosen, given the text before them; greedy texts alone",
    "nll": "nats per token of the text, scored by the model with the full cache",
    "repeated": "share of the text's 4-grams of tokens that occurred in it before",
}


def prompts(tokenizer, documents):
    """Ids like `documents.input_ids` `[n, tokens]` and, for each row, (kind, name): the second half of them in a chat."""
    ids, names, half = documents.input_ids.clone(), documents.names, len(documents.names) // 2
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in frame(tokenizer, QUESTION, "", "chat", 0)
    )
    room = ids.shape[1] - len(before) - len(after)
    for row in range(half, len(names)):
        ids[row] = torch.tensor(before + ids[row, 1 : room + 1].tolist() + after)
    return ids, [["text" if row < half else "chat", name] for row, name in enumerate(names)]


@torch.no_grad()
def seen_by_full(lm, ids, start):
    """Of the tokens from `start` on, `[batch, n]`: (nll, whether the full cache finds it the most probable)."""
    cache = DynamicCache(config=lm.config)
    lm(ids[:, : start - 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    logprobs = (
        lm(ids[:, start - 1 : -1], past_key_values=cache, use_cache=True).logits.float().log_softmax(-1)
    )
    written = ids[:, start:]
    return -logprobs.gather(-1, written[..., None]).squeeze(-1), logprobs.argmax(-1) == written


def rows(lm, ids, names, method, new=NEW):
    """One row (`COLUMNS`) per prompt of `ids` `[batch, tokens]` and mode: a list of dict. method: None for the full cache."""
    found = []
    recorded = lm.device.type == "cuda" and method is not None and method["method"] != "recall"
    for mode in ("greedy", "sampling"):
        cache = (
            make_cache(lm.config, length=ids.shape[1] + new, **method)
            if method
            else DynamicCache(config=lm.config)
        )
        tokens = continuation(lm, ids, cache, new, do_sample=mode == "sampling", graph=recorded)
        assert method is None or getattr(cache, "evicted_tokens", 0) > 0
        nll, chosen = seen_by_full(lm, torch.cat([ids, tokens.to(ids.device)], 1), ids.shape[1])
        first = chosen.int().cumprod(-1).sum(-1)
        numbers = zip(
            first.tolist(),
            chosen.float().mean(-1).tolist(),
            nll.mean(-1).tolist(),
            repetition(tokens).tolist(),
        )
        for (kind, name), (until, share, loss, repeated) in zip(names, numbers, strict=True):
            own = {"first": until, "chosen": share} if mode == "greedy" else {}
            found.append(
                {"kind": kind, "mode": mode, "document": name, "nll": loss, "repeated": repeated} | own
            )
    return found
