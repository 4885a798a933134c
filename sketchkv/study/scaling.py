"""What a decode step costs on a GPU that no one has here: a model fitted to measured kernels.

A step is, per layer, a block of norms and matrix products, and the cache's own work. Each kind of work costs a constant (its
launches) plus what grows with bytes moved, operations or sketches; the coefficients are not negative and fitted to the
relative error of the pieces that the benchmark measures (`speed_gpu`), so the model is monotone in all it depends on.

Not in it: the exchange between GPUs under tensor parallelism, prompts, sampling, rotary embeddings, the scheduler.
"""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls
from transformers import GPT2Config, LlamaConfig

from sketchkv.study.methods import full_nbytes, nbytes

KINDS = ("attention", "layer", "compact layer", "block")
LARGEST_BATCH = 256  # that the blocks were measured with
GPU_BYTES = 80e9
WEIGHT = 2  # bytes of a bfloat16 weight


def _features(kind, batch=1, kv_heads=1, group=1, head_dim=1, slots=1, nbytes=0):
    """What a piece's time grows with: [constant, bytes, operations or sketches], in units that keep the numbers small."""
    if kind == "block":
        return [1.0, nbytes / 1e6, batch * nbytes / WEIGHT * 2 / 1e9]
    return [1.0, 4 * batch * kv_heads * slots * head_dim / 1e6, 0.0 if kind == "attention" else batch * kv_heads / 1e3]


def pieces(frame):
    """The measured pieces of a benchmark's table: a DataFrame with kind, us, and what `_features` takes."""
    found = []
    for row in frame.itertuples():
        kind, _, rest = row.row.partition(": ")
        if kind in KINDS:
            numbers = {key: int(value) for key, value in re.findall(r"(batch|kv_heads|group|head_dim|slots|bytes) (\d+)", rest)}
            if "bytes" in numbers:
                numbers["nbytes"] = numbers.pop("bytes")
            found.append({"kind": kind, "piece": rest, "us": row.median, "numbers": numbers})
    return pd.DataFrame(found)


def fit(measured):
    """{kind: coefficients} by non-negative least squares on relative errors. Raises ValueError where a kind is missing."""
    model = {}
    for kind in KINDS:
        rows = measured[measured.kind == kind] if len(measured) else measured
        if len(rows) < 3:
            raise ValueError(f"the benchmark has {len(rows)} pieces of kind {kind!r}, too few to fit: run `make bench` on a GPU")
        matrix = np.array([_features(kind, **numbers) for numbers in rows.numbers])
        model[kind] = nnls(matrix / rows.us.to_numpy()[:, None], np.ones(len(rows)))[0]
    return model


def predict(model, kind, **numbers):
    """Microseconds of a piece."""
    return float(np.dot(model[kind], _features(kind, **numbers)))


def residuals(model, measured):
    """`measured` with what the model says ("predicted") and the relative error ("error")."""
    predicted = [predict(model, row.kind, **row.numbers) for row in measured.itertuples()]
    return measured.assign(predicted=predicted, error=np.array(predicted) / measured.us - 1)


@dataclass(frozen=True)
class Shape:
    """A model by what a step depends on, on `gpus` GPUs that share every layer (tensor parallelism)."""

    name: str
    config: object
    layer_weights: int  # parameters of one layer
    other_weights: int  # of embeddings and the output layer
    read_weights: int  # of these, what a step reads
    gpus: int = 1

    @property
    def heads(self):
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    @property
    def head_dim(self):
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def weight_bytes(self):
        return WEIGHT * (self.config.num_hidden_layers * self.layer_weights + self.other_weights)


def _llama(name, hidden, layers, feed_forward, heads, gpus=1):
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=feed_forward, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    layer = 2 * hidden * hidden + 2 * hidden * 8 * 128 + 3 * hidden * feed_forward
    return Shape(name, config, layer, 2 * 128256 * hidden, 128256 * hidden, gpus)


SHAPES = (
    Shape("GPT-2 small", GPT2Config(), 12 * 768**2, (50257 + 1024) * 768, 50257 * 768),
    _llama("Llama-3.1-8B", 4096, 32, 14336, 32),
    _llama("Llama-3.1-70B", 8192, 80, 28672, 64, gpus=4),
)


def cache_bytes(shape, cache, tokens, cap):
    """Bytes of one sequence's cache: "full" in 16 bits, "bounded" (`SketchCache`) in 16 bits, or "compact"."""
    if cache == "full":
        return full_nbytes(shape.config, tokens)
    one = type(shape.config)(**shape.config.to_dict() | {"num_hidden_layers": 1, "layer_types": None})
    method = {"method": "sketch", "bits": 16} if cache == "bounded" else {"method": "compact"}
    return shape.config.num_hidden_layers * nbytes(one, max_cache_size=cap, **method)["total"]


def step(model, shape, cache, batch, slots):
    """Microseconds of one decode step of `batch` sequences with `slots` tokens stored each."""
    kind = {"full": "attention", "bounded": "layer", "compact": "compact layer"}[cache]
    heads, nbytes = shape.heads / shape.gpus, WEIGHT * shape.layer_weights / shape.gpus
    held = predict(model, kind, batch=batch, kv_heads=heads, head_dim=shape.head_dim, slots=slots)
    block = predict(model, "block", batch=batch, nbytes=nbytes)
    last = predict(model, "block", batch=batch, nbytes=WEIGHT * shape.read_weights / shape.gpus)
    return shape.config.num_hidden_layers * (held + block) + last


COLUMNS = {
    "model": "shape of the model",
    "gpus": "GPUs of 80 GB that share it by tensor parallelism",
    "cache": "full (16 bits), bounded (SketchCache, 16 bits) or compact (SketchCache.compact)",
    "slots": "tokens stored per sequence, layer and KV head",
    "bytes": "bytes of the cache of one sequence, sketches and scores included",
    "sequences": "sequences whose caches fit beside the weights in all GPUs together",
    "batch": f"of these, how many decode together: at most {LARGEST_BATCH}, the largest batch measured",
    "step": "milliseconds of a decode step at that batch, by the model",
    "tokens_per_second": "tokens per second and GPU at that batch, by the model",
}


def table(model, tokens=131072, share=16):
    """Rows (`COLUMNS`) for every shape and cache; bounded caches keep one token in `share`."""
    found = []
    for shape in SHAPES:
        for cache in ("full", "bounded", "compact"):
            slots = tokens if cache == "full" else tokens // share
            held = cache_bytes(shape, cache, tokens, slots)
            sequences = max(0, int((GPU_BYTES * shape.gpus - shape.weight_bytes) // held))
            batch = min(sequences, LARGEST_BATCH)
            took = step(model, shape, cache, max(batch, 1), slots)
            found.append([shape.name, shape.gpus, cache, slots, int(held), sequences, batch, took / 1e3,
                          batch / took * 1e6 / shape.gpus])  # fmt: skip
    return pd.DataFrame(found, columns=list(COLUMNS))
