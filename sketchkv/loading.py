"""Loading a model and its tokenizer: the embedded one, a pretrained one of the package index
(`pretrained.py`), a local folder in hub layout, or a pinned hub model."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PACKAGED = ("smollm2", "gemma3")  # from the package index: `pretrained.MODELS`
EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "model"

# Commits on the hub: a repository there may change under its name. Any other model is pinned as
# "name@commit".
HUB_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "openai-community/gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "openai-community/gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "distilbert/distilgpt2": "2290a62682d06624634c1f46a6ad5be0f47f38aa",
    "Qwen/Qwen2.5-0.5B": "060db6499f32faf8b98477b0a26969ef7d8b9987",
    "Salesforce/wikitext": "b08601e04326c79dfdd32d625aee71d232d685c3",
}
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
HUB_TIMEOUT = 4.0  # seconds within which the hub must give a sign of life, before anything is asked of it

# What `from_pretrained` reads, and so what `revision` hashes. A tokenizer is one file, or a vocabulary and
# merges.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_OTHERS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_MODEL_FILES = (*_WEIGHTS, *_TOKENIZER, *_OTHERS)
SUMS = "SHA256SUMS"  # in a folder, in the form of the tool sha256sum: what its files must be


class LoadError(RuntimeError):
    """A model, its tokenizer or a device can't be had as asked; the message says what to do instead."""


def load(name_or_path="embedded", device="auto", dtype=None):
    """Returns `(model, tokenizer)`: a causal language model in eval mode, its parameters without gradients, and a tokenizer
    that pads on the left.

    `name_or_path` is
    - "embedded": `data/model` of this repository;
    - "smollm2" or "gemma3": a pretrained model of the package index (`pretrained.MODELS`);
    - a local folder in hub layout (config.json, *.safetensors, tokenizer files); if it has a file SHA256SUMS,
      its files are checked;
    - a hub name: one of `HUB_REVISIONS`, or "name@commit". What is in the hub's cache needs no network.
    `device` is "auto" (CUDA if there is one), "cpu", "cuda", "cuda:N" or a `torch.device`.
    `dtype` is one of `DTYPES`, by name or as `torch.dtype`; None means float32 whatever the files hold, since
    quality is measured against a float32 reference.

    Code that comes with a model is never run. Raises `LoadError` for a missing, incomplete or damaged model,
    one that needs code of its own, an unreachable hub, an absent device, an unknown dtype or one that the
    model overflows.
    """
    device, dtype = resolve_device(device), _resolve_dtype(dtype)
    if not isinstance(name_or_path, str | os.PathLike):
        raise LoadError(f"load() takes the name or the folder of a model, as a string; got {name_or_path!r}")
    folder = _model_folder(name_or_path)
    _check_files(folder, name_or_path)
    _check_config(folder, dtype)
    try:
        tokenizer = _tokenizer(folder, name_or_path)
        tokenizer.padding_side = "left"  # as texts must be padded that are to be continued
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, info = loaded
    except Exception as error:  # transformers raises whatever its parsers raise
        raise LoadError(f"{_shown(name_or_path)} can't be read from {folder}: {error}") from error
    # transformers only warns about these, and fills them with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise LoadError(
            f"The weights in {folder} don't fit its config.json: {len(missing)} parameters are missing, "
            f"first {missing[0]}. {_remedy(name_or_path)}"
        )
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise LoadError(
            f"The tokenizer in {folder} has {len(tokenizer)} ids, and the model embeds {rows}: they don't "
            f"belong together. {_remedy(name_or_path)}"
        )
    return model.to(device).eval().requires_grad_(False), tokenizer


def revision(name_or_path="embedded"):
    """What identifies the model in results: the commit of a hub model, else 12 hex digits of a sha256 over
    every file in its folder that `load` reads (weights, configuration, tokenizer); of "smollm2" and "gemma3",
    12 digits of their GGUF file's sha256, installed or not. Raises `LoadError` as `load` does."""
    if name_or_path in PACKAGED:
        from sketchkv import pretrained  # only where asked for

        return pretrained.MODELS[name_or_path].sha256[:12]
    name, commit = _pinned(name_or_path)
    if commit and not _is_local(name_or_path):
        return commit
    folder = _model_folder(name_or_path)
    return digest({path.name: path for pattern in _MODEL_FILES for path in folder.glob(pattern)})


def digest(files, digits=12):
    """`digits` hex digits of a sha256 over the names and raw bytes of `files`: a dict of name to path, in any
    order."""
    total = hashlib.sha256()
    for name in sorted(files):
        with open(files[name], "rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:digits]


def write_sums(folder):
    """Writes the sha256 of every file that `load` reads in `folder`: from then on `load` checks them."""
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def resolve_device(device="auto"):
    """The `torch.device` meant by "auto", "cpu", "cuda", "cuda:N" or a `torch.device`; `LoadError` if it is
    absent."""
    name, count = str(device), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (index and not index.isdecimal()) or name.endswith(":")):
        raise LoadError(
            f'Unknown device "{name}": allowed are auto, cpu, cuda and cuda:N (DEVICE=auto takes what is '
            "there)."
        )
    if kind == "cuda" and int(index or 0) >= count:
        raise LoadError(
            f'Device "{name}" was asked for, but {count} CUDA devices are usable here: take DEVICE=auto or '
            "cpu."
        )
    return torch.device(name)


def hub_folder(repo, patterns, complete, instead, kind="model", commit=None):
    """Local folder of a hub repository at its pinned commit, downloaded only if the hub's cache lacks it.

    `patterns` names the files wanted, `complete(folder)` says whether a cached folder holds enough of them,
    `instead` is the way out that the error names. Raises `LoadError` with its cause, within seconds when the
    hub is out of reach.
    """
    commit = commit or HUB_REVISIONS[repo]
    wanted = dict(
        repo_id=repo,
        repo_type=kind,
        revision=commit,
        allow_patterns=list(patterns),
        ignore_patterns=["onnx/*"],
    )
    try:
        folder = Path(snapshot_download(**wanted, local_files_only=True))
        if complete(folder):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        # The hub's client retries for 20 s and more, so a dead line is found out first.
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(**wanted))
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise LoadError(
            f"The {kind} \"{repo}\" at revision {commit[:12]} is not in the hub's cache and can't be "
            f"fetched from {constants.ENDPOINT} ({type(error).__name__}). {instead}"
        ) from error


def _resolve_dtype(dtype):
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise LoadError(f'Unknown dtype "{name}": allowed are {", ".join(DTYPES)}.')
    return DTYPES[name]


def _pinned(name_or_path):
    """Hub name and commit (None if neither pinned here nor given as "name@commit")."""
    name, _, commit = str(name_or_path).partition("@")
    return name, commit or HUB_REVISIONS.get(name)


def _is_local(name_or_path):
    """Whether a folder is meant. A pinned hub name is never one, so that `gpt2` means the same in every
    folder."""
    if isinstance(name_or_path, Path) or str(name_or_path) == "embedded":
        return True
    name = str(name_or_path)
    looks_like_path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    return looks_like_path or (name not in HUB_REVISIONS and os.path.exists(name))


def _model_folder(name_or_path):
    """Folder with everything `load` needs, converted or fetched from the hub where it is not there yet."""
    if name_or_path in PACKAGED:
        from sketchkv import pretrained

        return pretrained.model_folder(name_or_path)
    if not _is_local(name_or_path):
        name, commit = _pinned(name_or_path)
        if not commit:
            known = ", ".join(repo for repo in HUB_REVISIONS if "wikitext" not in repo)
            raise LoadError(
                f'"{name}" is neither "embedded", "smollm2" or "gemma3", nor a folder here, nor a hub '
                "model with a "
                f'pinned revision ({known}). Pin another hub model as "{name or "name"}@<commit>", or use '
                "MODEL=embedded."
            )
        folder = hub_folder(
            name,
            _MODEL_FILES,
            commit=commit,
            complete=lambda cached: not _missing(cached),
            instead="Offline, use MODEL=embedded, or MODEL=<local folder in hub layout>.",
        )
    else:
        # The functions of `os.path`, since those of `Path` raise for names that no file can have.
        folder = EMBEDDED if str(name_or_path) == "embedded" else Path(os.path.expanduser(name_or_path))
        if not os.path.isdir(folder):
            raise LoadError(f"There is no model folder {folder}. {_remedy(name_or_path)}")
    if missing := _missing(folder):
        raise LoadError(
            f"{_shown(name_or_path)} lacks {', '.join(missing)} in {folder}. {_remedy(name_or_path)}"
        )
    return folder


def _check_files(folder, name_or_path):
    """Raises `LoadError` if a file differs from what the folder's own SHA256SUMS, if it has one, says."""
    sums = folder / SUMS
    for line in filter(str.strip, sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else ()):
        expected, _, name = line.partition(" ")
        name = name.lstrip(" *")  # `sha256sum -b` writes an asterisk
        if not (folder / name).is_file():
            raise LoadError(
                f"{folder} lacks {name or 'the file'!r} that {SUMS} tells of. {_remedy(name_or_path)}"
            )
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise LoadError(
                    f"{folder / name} is not the file that {SUMS} tells of: it is damaged, or was changed "
                    f"afterwards. {_remedy(name_or_path)}"
                )


def _check_config(folder, dtype):
    """Raises `LoadError` if a configuration names code to run, or if the model's activations overflow
    `dtype`."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # absent, or for transformers to complain about
        if "auto_map" in config:
            raise LoadError(
                f"{folder / name} asks for code of the model's own (auto_map), and such code is never run. "
                "If transformers has a class of its own for the model, remove this entry; else take "
                "another model."
            )
        if (
            name == "config.json"
            and dtype == torch.float16
            and str(config.get("model_type")).startswith("gemma")
        ):
            raise LoadError("Gemma's activations overflow float16: take dtype bfloat16 or float32.")


def _tokenizer(folder, name_or_path):
    if name_or_path not in PACKAGED:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # As `from_pretrained` does, which copies a vocabulary of 262,144 tokens three times over: 7 s instead of
    # 2.
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **config)


def _missing(folder):
    """The parts of a model that `folder` lacks, in words."""
    parts = {
        "config.json": ["config.json"],
        "weights (*.safetensors)": ["*.safetensors"],
        "a tokenizer (tokenizer.json, or vocabulary and merges)": _TOKENIZER,
    }
    return [part for part, patterns in parts.items() if not any(any(folder.glob(p)) for p in patterns)]


def _shown(name_or_path):
    return "The embedded model" if str(name_or_path) == "embedded" else f'The model "{name_or_path}"'


def _remedy(name_or_path):
    if name_or_path in PACKAGED:
        return "Remove the folder: it is made again."
    if str(name_or_path) == "embedded":
        return "`make model` trains the embedded model again; a fresh clone of the repository has it."
    return "Write the folder with `save_pretrained` of the model and of its tokenizer, or use MODEL=embedded."
