"""Prompts cut once by kvpress, in its own environment: run as a script, without a word of ours.

    python cut_by_kvpress.py IDS.npy WEIGHTS OUT.csv PROMPT KEPT...

IDS.npy: int64 `[documents, tokens]`; the first PROMPT tokens are cut to each KEPT, the others are scored. Writes one row per
method, size and document: nats per token, mean over what follows the prompt. "full" is the model with all of the prompt.
"""

import csv
import sys
import tempfile

import numpy as np
import torch


def presses():
    import kvpress

    return {
        "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress,
        "streaming": kvpress.StreamingLLMPress,
        "key_norm": kvpress.KnormPress,
        "expected": kvpress.ExpectedAttentionPress,
        "cur": kvpress.CURPress,
        "kvzip": kvpress.KVzipPress,
    }


@torch.no_grad()
def follows(model, ids, prompt, press=None):
    """Mean loss of what follows the prompt, `ids` `[1, tokens]`."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if press is None:
        last = model.model(input_ids=ids[:, :prompt], past_key_values=cache).last_hidden_state[:, -1:]
    else:
        with press(model):
            last = model.model(input_ids=ids[:, :prompt], past_key_values=cache).last_hidden_state[:, -1:]
    positions = torch.arange(prompt, ids.shape[1] - 1, device=ids.device)[
        None
    ]  # the cache alone would number from what it kept
    after = model.model(input_ids=ids[:, prompt:-1], position_ids=positions, past_key_values=cache)
    logits = model.lm_head(torch.cat([last, after.last_hidden_state], 1))
    return torch.nn.functional.cross_entropy(logits[0], ids[0, prompt:]).item()


def main(ids_path, weights, out, prompt, *kept):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    # A chat template would make KVzip take the first tokens of a plain text for its frame, and evict them all.
    tokenizer, plain = transformers.AutoTokenizer.from_pretrained(weights), tempfile.mkdtemp()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    model.config.name_or_path = plain
    documents, prompt = torch.from_numpy(np.load(ids_path)).to(model.device), int(prompt)
    settings = [("full", prompt, None)]
    for size in map(int, kept):
        settings += [
            (name, size, kind(compression_ratio=1 - size / prompt)) for name, kind in presses().items()
        ]
    with open(out, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["method", "kept", "document", "nll"])
        for name, size, press in settings:
            for number, ids in enumerate(documents):
                rows.writerow([name, size, number, follows(model, ids[None], prompt, press)])
            file.flush()
            print("kvpress", name, size, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
