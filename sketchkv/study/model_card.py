"""What the study must know about a model before it compresses its cache, and the card of the embedded one."""

import numpy as np
import pandas as pd
import torch

from sketchkv.loading import EMBEDDED
from sketchkv.study.evaluate import TOKENS
from sketchkv.study.sources import read_json

CONTEXT = {
    "context": "tokens of context, the predicted ones included",
    "document": "held-out file",
    "nll": "mean nats per token over the document's last 64 tokens",
}


@torch.no_grad()
def nll_by_context(model, input_ids, lengths, targets=64):
    """How much a longer context helps: the same tokens predicted from contexts of different length.

    input_ids: `[documents, tokens]`, tokens >= max(lengths). The last `targets` tokens of each document are predicted
    from a window that ends with it and holds `length` tokens, the document's first token (its BOS) moved to the front.
    Returns {length: nll}, nll float32 `[documents, targets]` in nats. Raises ValueError unless targets < every length.
    """
    if min(lengths) <= targets or max(lengths) > input_ids.shape[1]:
        raise ValueError(
            f"contexts must be longer than the {targets} targets and fit {input_ids.shape[1]} tokens: {lengths}"
        )
    found = {}
    for length in lengths:
        rows = []
        for ids in input_ids.split(max(1, TOKENS // length)):
            window = torch.cat([ids[:, :1], ids[:, -(length - 1) :]], 1).to(model.device)
            logits = model(window, use_cache=False, logits_to_keep=targets + 1).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), window[:, -targets:], reduction="none"
            )
            rows.append(nll.cpu())
        found[length] = torch.cat(rows)
    return found


def by_context(model, docs, lengths):
    """The same as a DataFrame (`CONTEXT`), one row per length and document."""
    rows = [
        (length, document, nll[row].mean().item())
        for length, nll in nll_by_context(model, docs.input_ids, lengths).items()
        for row, document in enumerate(docs.names)
    ]
    return pd.DataFrame(rows, columns=list(CONTEXT))


def card(run, model, context, collapse):
    """The text of the embedded model's card. context, collapse: tables of the notebook that writes it."""
    training = read_json(run.read(EMBEDDED / "training.json"))
    packages = read_json(run.read(EMBEDDED.parent / "manifest.json"))["packages"]
    held_out = "; ".join(
        f"{split}: " + ", ".join(f"{package} {version}" for package, version in named.items())
        for split, named in packages.items()
    )
    config, lost = model.config, collapse.groupby("cache").loss.mean()
    rows = "\n".join(
        f"| {n} | {np.exp(nll):.2f} |" for n, nll in context.groupby("context").nll.mean().items()
    )
    return f"""# The embedded model

A decoder of GPT-2's architecture (`GPT2LMHeadModel`), small enough to live in a repository. Written by
`notebooks/{run.notebook}.ipynb` from its results; profile `{run.profile}`.

- **Shape**: {config.num_hidden_layers} layers, {config.num_attention_heads} heads of {config.n_embd // config.n_head}, {config.n_positions} positions, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, stored in half precision.
- **Tokenizer**: byte-level BPE of its own, {config.vocab_size} tokens; token 0, `<|endoftext|>`, opens every text.
- **Data**: Python source (code, comments, docstrings) of the packages pinned in `requirements.lock`, {training["corpus_tokens"] / 1e6:.1f} M tokens after removing vendored copies, duplicates and generated tables, at most 6 MB a package.
- **Held out, whole**: {held_out}. Files and sha256 sums: `data/manifest.json`.
- **Training**: `make model`; {training["tokens"] / 1e6:.1f} M tokens in steps of {training["batch_tokens"]}, windows of 1024 and then 2048 tokens, peak learning rate {training["lr"]}, seed {training["seed"]}, on {training["device"]}. The loss curve is `data/model/loss.csv`.
- **Use**: for this study of KV caches. It writes text that looks like Python and knows nothing.

| tokens of context | held-out perplexity of the same tokens (n = {context.document.nunique()} documents) |
| --- | --- |
{rows}

Sinks: a window of {run.params["max_cache_size"]} tokens loses {lost["0 sinks"]:.2f} nats per token without the first tokens and {lost["4 sinks"]:.2f} with four of them.
"""
