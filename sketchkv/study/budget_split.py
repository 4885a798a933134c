"""One total of slots, split over layers in different ways: what each way loses."""

from functools import lru_cache

import torch

from sketchkv.decode import score
from sketchkv.study.evaluate import BATCH, _model
from sketchkv.study.methods import make_cache
from sketchkv.texts import documents as read_documents

COLUMNS = {
    "document": "held-out file",
    "nll": "mean negative log-likelihood of its tokens, nats per token",
    "nll_full": "the same with the full cache",
    "bytes_total": "bytes held for one sequence, in the model's dtype",
    "caps": "tokens kept per KV head, one number per layer, at the end of the document",
    "history": "[tokens seen, caps of all layers] after each change of the split",
}


@lru_cache(maxsize=2)
def _reference(model, dataset, device, part, documents, length):
    """Ids `[documents, length]`, names, and what the full cache loses: nats per token, one number per document."""
    lm, tokenizer = _model(model, device)
    texts = read_documents(dataset, tokenizer, part, documents, length)
    full = [score(lm, ids.to(lm.device)).mean(1) for ids in texts.input_ids.split(BATCH)]
    return texts.input_ids, texts.names, torch.cat(full).tolist()


@torch.no_grad()
def losses(
    method,
    *,
    model="embedded",
    dataset="embedded",
    device="cpu",
    documents=16,
    length=1024,
    text=None,
    part="test",
):
    """Rows (list of dict, `COLUMNS`), one per document. A split that moves is one for all rows of a batch: it gets each
    document alone. text: revision of the text, among what names a grid point; part: of the held-out text."""
    lm, _ = _model(model, device)
    texts, names, full = _reference(model, dataset, device, part, documents, length)
    rows: list[dict] = []
    for ids in texts.split(1 if method["method"] == "adaptive" else BATCH):
        cache = make_cache(lm.config, **method)
        nll = score(lm, ids.to(lm.device), cache, chunk_size=64).mean(1).tolist()
        assert cache.evicted_tokens > 0
        caps = getattr(cache, "caps", None) or [layer.max_cache_size for layer in cache.layers]
        for loss in nll:
            rows.append(
                {
                    "document": names[len(rows)],
                    "nll": loss,
                    "nll_full": full[len(rows)],
                    "bytes_total": cache.nbytes()["total"] // len(ids),
                    "caps": caps,
                    "history": [[seen, split] for seen, split in getattr(cache, "history", [])],
                }
            )
    return rows
