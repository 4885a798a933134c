"""What the study must know about a model before it compresses its cache, and the card of the embedded one."""

import jinja2
import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy

from sketchkv.loading import EMBEDDED
from sketchkv.study.evaluate import TOKENS
from sketchkv.study.sources import ROOT, read_json

CONTEXT = {
    "context": "tokens of context, the predicted ones included",
    "document": "held-out file",
    "nll": "mean nats per token over the document's last 64 tokens",
}


@torch.no_grad()
def by_context(model, docs, lengths, targets=64):
    """How much a longer context helps: a DataFrame (`CONTEXT`), one row per length and document.

    The last `targets` tokens of each document are predicted from a window that ends with it and holds `length` tokens, the
    document's first token (its BOS) moved to the front. Raises ValueError unless targets < every length <= the documents'.
    """
    rows, longest = [], docs.input_ids.shape[1]
    if min(lengths) <= targets or max(lengths) > longest:
        raise ValueError(
            f"contexts must be longer than the {targets} targets and fit {longest} tokens: {lengths}"
        )
    for length in lengths:
        names = iter(docs.names)
        for ids in docs.input_ids.split(max(1, TOKENS // length)):
            window = torch.cat([ids[:, :1], ids[:, -(length - 1) :]], 1).to(model.device)
            logits = model(window, use_cache=False, logits_to_keep=targets + 1).logits[:, :-1].float()
            nll = cross_entropy(logits.transpose(1, 2), window[:, -targets:], reduction="none").mean(1)
            rows += [(length, name, each) for each, name in zip(nll.tolist(), names)]
    return pd.DataFrame(rows, columns=list(CONTEXT))


def card(run, model, context, collapse):
    """The text of the embedded model's card. context, collapse: tables of the notebook that writes it."""
    template = run.read(ROOT / "report" / "model_card.md.j2").read_text(encoding="utf-8")
    return jinja2.Template(template, trim_blocks=True, keep_trailing_newline=True).render(
        run=run,
        config=model.config,
        parameters=sum(p.numel() for p in model.parameters()),
        training=read_json(run.read(EMBEDDED / "training.json")),
        packages=read_json(run.read(EMBEDDED.parent / "manifest.json"))["packages"],
        perplexity=np.exp(context.groupby("context").nll.mean()).to_dict(),
        documents=context.document.nunique(),
        lost=collapse.groupby("cache").loss.mean(),
    )
