"""Documents to score: token ids of the embedded text, of WikiText-2, or of any local text, all of one length.

Long streams are the same thing with a larger `length`: each document is one uninterrupted text.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from sketchkv import corpus, loading
from sketchkv.corpus import CorpusError

SPLITS = tuple(corpus.HELD_OUT)  # settings are chosen on "development", reported on "test"
WIKITEXT = "wikitext-2-raw-v1"
_WIKITEXT_REPO = "Salesforce/wikitext"
_PARQUET_SPLIT = {"development": "validation", "test": "test"}


class Documents(NamedTuple):
    """`input_ids`: int64 `[count, length]`, on the CPU; `names`: one name per row, in the same order."""

    input_ids: torch.Tensor
    names: list


def documents(dataset, tokenizer, split="test", count=None, length=1024):
    """The first `count` documents (None: all) of at least `length` tokens, cut to `length`, as `Documents`.

    `dataset` is
    - "embedded": one document per held-out file of the manifest, its bytes checked;
    - "wikitext-2-raw-v1": one document per article, from the hub at a pinned revision;
    - a folder in the layout of that hub repository (`wikitext-2-raw-v1/test-*.parquet`, or those files themselves);
    - a text file (UTF-8): cut into consecutive documents;
    - a folder of text files: one document per file, hidden files left out, in the order of their paths.
    The last two have the single split "test": the same text for both would tune settings on what is reported.

    Every document begins with the tokenizer's BOS token, if it has one, counted in `length`. Special tokens spelled out
    in a text are read as plain text. Shorter texts are skipped.

    Raises `CorpusError` for a missing, altered, empty, undecodable or unknown text, and for too few documents.
    """
    if split not in SPLITS:
        raise CorpusError(f'Unknown split "{split}": allowed are {", ".join(SPLITS)}.')
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if length <= len(bos) or (count is not None and count < 1):
        raise CorpusError(
            f"length={length}, count={count}: length must be at least {len(bos) + 1}, count at least 1 (None: all)."
        )

    body = length - len(bos)
    rows, names, texts, longest = [], [], 0, 0
    in_pieces = dataset not in ("embedded", WIKITEXT) and _local(dataset).is_file()
    for name, text in _read(dataset, split):
        # The tokenizer's own special tokens stay off: whether it adds a BOS by itself must not matter.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        texts, longest = texts + 1, max(longest, len(ids) + len(bos))
        starts = range(0, len(ids) - body + 1, body)
        for start in starts if in_pieces else starts[:1]:
            rows.append(bos + ids[start : start + body])
            names.append(f"{name}[{start}:{start + body}]" if in_pieces else name)
        if count is not None and len(rows) >= count:
            break
    if not rows or len(rows) < (count or 0):
        raise CorpusError(
            f'"{dataset}" ({split}) has {len(rows)} documents of {length} tokens, and {count or "at least 1"} were '
            f"asked for: lower the length or the count, or take more text (DATASET=embedded has enough). "
            f"It holds {texts} texts, the longest of {longest} tokens."
        )
    return Documents(torch.tensor(rows[:count], dtype=torch.long), names[:count])


def text_revision(dataset="embedded"):
    """What identifies the bytes of a data set in results: the commit of a hub data set, else 12 hex digits of a sha256
    over the manifest's entries or over the local files. Raises `CorpusError` for an unknown data set."""
    if dataset == "embedded":
        entries = corpus.read_manifest()["files"]
        lines = [f"{split} {file['path']} {file['sha256']}\n" for split in SPLITS for file in entries[split]]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    if dataset == WIKITEXT:
        return loading.HUB_REVISIONS[_WIKITEXT_REPO]
    path = _local(dataset)
    if path.is_file():
        return loading.digest({path.name: path})
    files = _parquet_files(path, "*") or _text_files(path)
    return loading.digest({file.relative_to(path).as_posix(): file for file in files})


def _read(dataset, split):
    """Yields (name, text) of a data set's texts."""
    if dataset == "embedded":
        yield from corpus.held_out_texts(split)
        return
    if dataset == WIKITEXT:
        yield from _articles(_parquet_files(_wikitext_folder(split), _PARQUET_SPLIT[split]))
        return
    path = _local(dataset)
    if path.is_dir() and _parquet_files(path, "*"):
        if not (files := _parquet_files(path, _PARQUET_SPLIT[split])):
            raise CorpusError(f"{path} has no {_PARQUET_SPLIT[split]}-*.parquet, which the split {split} is read from.")
        yield from _articles(files)
    elif split != "test":
        raise CorpusError(
            f'"{dataset}" has the single split "test": for "{split}" take another text, such as DATASET=embedded.'
        )
    else:
        for file in [path] if path.is_file() else _text_files(path):
            yield (file.name if path.is_file() else file.relative_to(path).as_posix()), _decode(file, path.is_file())


def _local(dataset):
    path = Path(dataset).expanduser()
    if not path.exists():
        raise CorpusError(
            f'Unknown data set "{dataset}": allowed are embedded, {WIKITEXT}, or a text file or folder, '
            "and there is no such file or folder."
        )
    return path


def _text_files(folder):
    """Every file below a folder, hidden ones left out."""
    files = [
        p for p in folder.rglob("*") if p.is_file() and not any(x.startswith(".") for x in p.relative_to(folder).parts)
    ]
    if not files:
        raise CorpusError(f"The folder {folder} holds no text files.")
    return sorted(files)


def _decode(file, alone):
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file} is not UTF-8 text (byte {error.start}): convert it, or take it out of the data set."
        ) from error
    if alone and not text.strip():
        raise CorpusError(f"{file} is empty: take another text, such as DATASET=embedded.")
    return text


def _wikitext_folder(split):
    """The hub repository's folder with the parquet file of one split."""
    try:
        return loading.hub_folder(
            _WIKITEXT_REPO,
            [f"{WIKITEXT}/{_PARQUET_SPLIT[split]}-*.parquet"],
            kind="dataset",
            complete=lambda cached: _parquet_files(cached, _PARQUET_SPLIT[split]),
            instead="Offline, use DATASET=embedded, or DATASET=<text file or folder>.",
        )
    except loading.LoadError as error:
        raise CorpusError(str(error)) from error


def _parquet_files(folder, split):
    root = folder / WIKITEXT if (folder / WIKITEXT).is_dir() else folder
    return sorted(root.glob(f"{split}-*.parquet"))


def _articles(files):
    """Splits rows of text into (title, article) at the top-level headings ` = Title = `.

    A heading stands between blank rows: formulas and tables with the same look don't.
    """
    rows = []
    for file in files:
        try:
            rows += pd.read_parquet(file, columns=["text"])["text"].tolist()
        except Exception as error:  # each parquet reader has its own
            raise CorpusError(f"{file} can't be read as parquet with a column `text`: {error}") from error
    title, article = "untitled", []
    for before, row, after in zip(["", *rows], rows, [*rows[1:], ""]):
        heading = re.fullmatch(r" = (?!= )(.+)(?<! =) = \n?", row)
        if heading and not before.strip() and not after.strip():
            if "".join(article).strip():
                yield title, "".join(article)
            title, article = heading[1], []
        article.append(row)
    if "".join(article).strip():
        yield title, "".join(article)
