"""Documents to score: token ids of the embedded text, of prose, or of any local text, all of one length.

Long streams are the same thing with a larger `length`: each document is one uninterrupted text.
"""

import codecs
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from sketchkv import corpus, loading, prose
from sketchkv.checks import whole
from sketchkv.corpus import CorpusError

SPLITS = tuple(corpus.HELD_OUT)  # settings are chosen on "development", reported on "test"
WIKITEXT = "wikitext-2-raw-v1"
NAMED = ("embedded", prose.DATASET, WIKITEXT)
_CHUNK = 1 << 18  # bytes of a text file that are read and tokenized at a time
_ROOM = 4 * _CHUNK  # characters without a place to cut at that are held at most
_WIKITEXT_REPO = "Salesforce/wikitext"
_PARQUET_SPLIT = {"development": "validation", "test": "test"}


class Documents(NamedTuple):
    """`input_ids`: int64 `[count, length]`, on the CPU; `names`: one name per row, in the same order."""

    input_ids: torch.Tensor
    names: list


def documents(dataset, tokenizer, split="test", count=None, length=1024):
    """The first `count` documents (None: all) of `length` tokens, as `Documents`.

    `dataset` is
    - "embedded": one document per held-out file of the manifest, its bytes checked;
    - "django-docs": one document per page of Django's documentation, its prose alone; then, of the pages that
      are shorter, as many of one topic as make a document;
    - "wikitext-2-raw-v1": one document per article, from the hub at a pinned revision;
    - a folder in the layout of that hub repository (`wikitext-2-raw-v1/test-*.parquet`, or those files
      themselves);
    - a text file (UTF-8): cut into consecutive documents;
    - a folder of text files: one document per file, hidden files left out, in the order of their paths.
    The last two have the single split "test": the same text for both would tune settings on what is
    reported. They are read only as far as the documents asked for need.

    Every document begins with the tokenizer's BOS token, if it has one, counted in `length`. Special tokens
    spelled out in a text are read as plain text. Texts are cut to `length`; shorter ones are skipped.

    Raises `CorpusError` for a missing, altered, empty, undecodable or unknown text, and for too few
    documents.
    """
    if split not in SPLITS:
        raise CorpusError(f'Unknown split "{split}": allowed are {", ".join(SPLITS)}.')
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    try:
        length = whole("length", length, len(bos) + 1)
        count = None if count is None else whole("count", count, 1)
    except ValueError as error:
        raise CorpusError(f"{error} (count=None: all)") from None

    body = length - len(bos)
    rows, names, lengths = [], [], [0]
    short: dict[str, list] = {}
    in_pieces = dataset not in NAMED and _local(dataset).is_file()
    for topic, name, chunks in _read(dataset, split):
        for start, ids in _cut(tokenizer, chunks, body):
            lengths.append(start + len(ids) + len(bos))
            if len(ids) == body:
                rows.append(bos + ids)
                names.append(f"{name}[{start}:{start + body}]" if in_pieces else name)
            elif topic is not None and not start:
                short.setdefault(topic, []).append((name, ids))
            if not in_pieces or len(rows) == count:
                break
        if len(rows) == count:
            break
    for pages in short.values():
        joined: list[int] = []
        parts: list[str] = []
        for name, ids in pages:
            joined, parts = joined + ids, [*parts, name]
            if len(joined) >= body:
                rows.append(bos + joined[:body])
                names.append(" + ".join(parts))
                joined, parts = [], []
    if not rows or len(rows) < (count or 0):
        raise CorpusError(
            f'"{dataset}" ({split}) has {len(rows)} documents of {length} tokens, and '
            f"{count or 'at least 1'} were asked for: lower the length or the count, or take more text "
            f"(DATASET=embedded has enough). Its longest text has {max(lengths)} tokens."
        )
    return Documents(torch.tensor(rows[:count], dtype=torch.long), names[:count])


def _cut(tokenizer, chunks, body):
    """Yields `(start, ids)` of the pieces of `body` tokens that `chunks` (str, in order, cut where tokens may
    be) hold, the last one shorter; chunks are taken only as they are needed."""
    ids, start = [], 0
    for chunk in chunks:
        # The tokenizer's own special tokens stay off: whether it adds a BOS by itself must not matter.
        encoded = tokenizer(chunk, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids += encoded["input_ids"]
        while len(ids) >= body:
            yield start, ids[:body]
            ids, start = ids[body:], start + body
    yield start, ids


def text_revision(dataset="embedded"):
    """What identifies the bytes of a data set in results: the commit of a hub data set, else 12 hex digits of
    a sha256 over the manifest's entries, the archive or the local files. Raises `CorpusError` for an unknown
    data set."""
    if dataset == "embedded":
        entries = corpus.read_manifest()["files"]
        lines = [f"{split} {file['path']} {file['sha256']}\n" for split in SPLITS for file in entries[split]]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
    if dataset == prose.DATASET:
        return prose.SHA256[:12]
    if dataset == WIKITEXT:
        return loading.HUB_REVISIONS[_WIKITEXT_REPO]
    path = _local(dataset)
    if path.is_file():
        return loading.digest({path.name: path})
    files = _parquet_files(path, "*") or _text_files(path)
    return loading.digest({file.relative_to(path).as_posix(): file for file in files})


def _read(dataset, split):
    """Yields `(topic, name, chunks)` of a data set's texts: the str in `chunks` make the text. Short texts of
    one topic may be joined; where it is None, they may not."""
    if dataset == "embedded":
        yield from ((None, name, [text]) for name, text in corpus.held_out_texts(split))
        return
    if dataset == prose.DATASET:
        yield from ((topic, name, [text]) for topic, name, text in prose.documentation(split))
        return
    if dataset == WIKITEXT:
        files = _parquet_files(_wikitext_folder(split), _PARQUET_SPLIT[split])
        yield from ((None, name, [text]) for name, text in _articles(files))
        return
    path = _local(dataset)
    if path.is_dir() and _parquet_files(path, "*"):
        if not (files := _parquet_files(path, _PARQUET_SPLIT[split])):
            raise CorpusError(
                f"{path} has no {_PARQUET_SPLIT[split]}-*.parquet, which the split {split} is read from."
            )
        yield from ((None, name, [text]) for name, text in _articles(files))
    elif split != "test":
        raise CorpusError(
            f'"{dataset}" has the single split "test": for "{split}" take another text, such as '
            "DATASET=embedded."
        )
    elif path.is_file():
        yield None, path.name, _chunks(path, alone=True)
    else:
        for file in _text_files(path):
            yield None, file.relative_to(path).as_posix(), _chunks(file)


def _local(dataset):
    # The functions of `os.path`, since those of `Path` raise for names that no file can have.
    if not str(dataset) or not os.path.exists(path := os.path.expanduser(dataset)):
        raise CorpusError(
            f'Unknown data set "{dataset}": allowed are {", ".join(NAMED)}, or a text file or folder, '
            "and there is no such file or folder."
        )
    return Path(path)


def _text_files(folder):
    """Every file below a folder, hidden ones left out."""
    files = [
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(x.startswith(".") for x in p.relative_to(folder).parts)
    ]
    if not files:
        raise CorpusError(f"The folder {folder} holds no text files.")
    return sorted(files)


def _chunks(file, alone=False):
    """Yields a text file in pieces of about `_CHUNK` bytes, cut where tokens end in any case."""
    decoder, read, rest, is_blank = codecs.getincrementaldecoder("utf-8-sig")(), 0, "", True
    with open(file, "rb") as stream:
        while True:
            data, pending = stream.read(_CHUNK), len(decoder.getstate()[0])
            try:
                rest += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise CorpusError(
                    f"{file} is not UTF-8 text (byte {read - pending + error.start}): convert it, or take "
                    "it out of the data set."
                ) from error
            if "\0" in rest:
                raise CorpusError(
                    f"{file} holds NUL bytes, so it is no plain text: convert it, or take it out of the "
                    "data set."
                )
            read += len(data)
            is_blank = is_blank and not rest.strip()
            if not data:
                break
            # Tokenizers join white space to white space, newlines to punctuation and a space to the word
            # after it: but none joins what follows a letter or digit to it, if it is white space.
            lines, words = (re.finditer(rf"(?<=[^\W_])(?={space})", rest) for space in (r"\n", r"\s"))
            ends = [place.start() for place in lines] or [place.start() for place in words]
            if end := ends[-1] if ends else len(rest) * (len(rest) >= _ROOM):
                yield rest[:end]
                rest = rest[end:]
    if alone and is_blank:
        raise CorpusError(f"{file} is empty: take another text, such as DATASET=embedded.")
    if rest:
        yield rest


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
    rows: list[str] = []
    for file in files:
        try:
            from pyarrow import parquet  # of the study's extras: other texts are read without

            rows += parquet.read_table(file, columns=["text"])["text"].to_pylist()
        except Exception as error:  # each parquet reader has its own
            raise CorpusError(f"{file} can't be read as parquet with a column `text`: {error}") from error
    title = "untitled"
    article: list[str] = []
    for before, row, after in zip(["", *rows], rows, [*rows[1:], ""]):
        heading = re.fullmatch(r" = (?!= )(.+)(?<! =) = \n?", row)
        if heading and not before.strip() and not after.strip():
            if "".join(article).strip():
                yield title, "".join(article)
            title, article = heading[1], []
        article.append(row)
    if "".join(article).strip():
        yield title, "".join(article)
