"""Peers in their own code: prompts of SmolLM2 cut once, by kvpress in an environment of its own and by the caches here.

    python -m sketchkv.study.cut_once PYTHON        (`make bench-peers`; PYTHON has kvpress)

Both read the same token ids. What follows the prompt is scored with the tokens that were kept, all of it at full precision.
Takes an hour on one core, two minutes on a GPU.
"""

import subprocess
import sys

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache

from sketchkv import enable, load
from sketchkv.pretrained import model_folder
from sketchkv.study import sources
from sketchkv.study.measured import BENCHMARKS, TEXTS, digest
from sketchkv.study.methods import LABELS, make_cache
from sketchkv.study.stats import ENDS, intervals
from sketchkv.texts import documents as read_documents

DOCUMENTS, TOKENS, PROMPT, KEPT = 16, 2048, 1536, (384, 192)
AGREE = 0.01  # nats per token within which the same rule under the same protection must agree
SCRIPT = sources.ROOT / "sketchkv" / "study" / "extras" / "cut_by_kvpress.py"
# Protected as in kvpress: what a method there keeps in any case, first and newest tokens.
SAME: dict[str, dict] = {
    "snapkv": {"num_sinks": 0, "recent_window": 64, "kernel": 5, "observation_window": 64},
    "tova": {"num_sinks": 0, "recent_window": 1},
    "streaming": {"num_sinks": 4, "recent_window": 0},
    "key_norm": {"num_sinks": 0, "recent_window": 0},
    "expected": {"num_sinks": 4, "recent_window": 0},
}
OWN: dict[str, dict] = {"decayed": {}, "sketch": {"width": 512, "depth": 4}}
NAMES = LABELS | {"cur": "CUR", "kvzip": "KVzip"}
COLUMNS = {
    "code": "whose code: kvpress, or ours",
    "method": "eviction rule",
    "kept": f"tokens kept of a prompt of {PROMPT}, per layer and KV head; KVzip's are a mean over heads",
    "document": "held-out page of Django's documentation",
    "nll": f"nats per token, mean over the {TOKENS - PROMPT} tokens that follow the prompt",
    "nll_full": "the same with all of the prompt, by the same code",
}
LOSSES = {
    "method": "eviction rule",
    "kept": COLUMNS["kept"],
    "code": COLUMNS["code"],
    "loss": "nats per token above the full cache, mean over documents",
    **ENDS,
}


@torch.no_grad()
def follows(lm, ids, cache, prompt=PROMPT):
    """Mean loss of what follows the prompt, `ids` `[1, tokens]`, nats per token."""
    first = lm(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    after = lm(ids[:, prompt:-1], past_key_values=cache, use_cache=True).logits
    return torch.nn.functional.cross_entropy(torch.cat([first, after], 1)[0].float(), ids[0, prompt:]).item()


def cut(config, method, kept, prompt=PROMPT, **options):
    """A cache that cuts a prompt to `kept` tokens, once, and nothing after it."""
    return make_cache(config, method, max_cache_size=kept, evict_every=prompt - kept, **options)


def ours(lm, documents):
    """Rows (method, kept, number of the document, nll) of `documents` `[n, tokens]`: a DataFrame."""
    rows = []
    for number, ids in enumerate(documents):
        rows.append(("full", PROMPT, number, follows(lm, ids[None], DynamicCache(config=lm.config))))
        for name, options in (SAME | OWN).items():
            for kept in KEPT:
                cache = cut(lm.config, name, kept, **options)
                nll = follows(lm, ids[None], cache)
                assert cache.evicted_tokens == (PROMPT - kept) * len(cache.layers)
                rows.append((name, kept, number, nll))
        print("ours", number, flush=True)
    return pd.DataFrame(rows, columns=["method", "kept", "document", "nll"])


def joined(theirs, own, names):
    """The table (`COLUMNS`) of both sides' rows."""
    rows = pd.concat([theirs.assign(code="kvpress"), own.assign(code="ours")])
    full = rows[rows.method == "full"].set_index(["code", "document"]).nll
    rows = rows[rows.method != "full"].sort_values(
        ["kept", "method", "code", "document"], ascending=[False, True, True, True]
    )
    rows["nll_full"] = full.loc[list(zip(rows.code, rows.document))].to_numpy()
    rows["document"] = [names[number] for number in rows.document]
    return rows[list(COLUMNS)]


def losses(table):
    """Loss of each rule by each code (`LOSSES`), the least first at each size."""
    found = intervals(table.assign(loss=table.nll - table.nll_full), ["method", "kept", "code"], "loss")
    found = found.rename(columns={"mean": "loss"}).assign(method=found.method.map(NAMES))[list(LOSSES)]
    return found.sort_values(["kept", "loss"], ascending=[False, True], ignore_index=True)


def side_by_side(found):
    """The same losses, a row a rule and size: ours beside kvpress's, and the difference where both have the rule."""
    wide = found.pivot(index=["kept", "method"], columns="code", values="loss")
    wide["difference"] = wide.ours - wide.kvpress
    return wide.sort_values(["kept", "kvpress", "ours"], ascending=[False, True, True])


def by_kvpress(python, weights, ids, out):
    """Their rows, and the versions in their environment: {package: version}."""
    subprocess.run(list(map(str, (python, SCRIPT, ids, weights, out, PROMPT, *KEPT))), check=True)
    asked = (
        "import importlib.metadata as m; print(*(m.version(n) for n in ('kvpress', 'torch', 'transformers')))"
    )
    versions = subprocess.check_output([str(python), "-c", asked], text=True).split()
    return pd.read_csv(out), dict(zip(("kvpress", "torch", "transformers"), versions))


def main(python):
    weights, out, commit = model_folder("smollm2"), sources.ROOT / "build" / "peers", sources.commit()[0]
    lm, tokenizer = load(str(weights))
    docs = read_documents(TEXTS["prose"], tokenizer, "test", DOCUMENTS, TOKENS)
    np.save(out / "ids.npy", docs.input_ids.numpy())
    theirs, versions = by_kvpress(python, weights, out / "ids.npy", out / "kvpress.csv")
    own = ours(enable(lm), docs.input_ids.to(lm.device))
    versions = {"kvpress": versions, "ours": sources.versions()}
    keep(theirs, own, docs, versions | {"commit": commit, "device": device_name(lm.device)})


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def keep(theirs, own, docs, origin):
    """Writes `data/benchmarks/peers.csv`, and what it comes from beside it."""
    notes = {
        "model": "SmolLM2-135M-Instruct with Q4_1 weights, float32",
        "columns": COLUMNS,
        "documents": docs.names,
        "settings": digest(SAME, OWN, PROMPT, KEPT, docs.input_ids.tolist()),
    }
    table = joined(theirs, own, docs.names)
    sources.atomic_write(BENCHMARKS / "peers.csv", table.to_csv(index=False, lineterminator="\n"))
    sources.atomic_write(BENCHMARKS / "peers.json", sources.to_json(notes | origin))


if __name__ == "__main__":
    main(sys.argv[1])
