"""The data set "django-docs": prose out of the documentation in Django's source distribution (BSD-3-Clause).

`python -m sketchkv.prose` fetches the pinned archive into the cache folder through pip. It is read from
there, and checked against its sha256 each time; nothing in it is run, but for what pip does to learn the
archive's metadata.
"""

import functools
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from sketchkv.corpus import CorpusError, cache_folder

DATASET = "django-docs"
ARCHIVE = "django-5.2.19.tar.gz"
SHA256 = "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1"

# Release notes stay out: they are lists of changes, and repeat each other.
_SECTIONS = ("faq", "howto", "internals", "intro", "misc", "ref", "topics")
_RULE = re.compile(r"""([=\-~^"'`#*+])\1{2,}""")  # what headings are underlined with
# :ref:`text <target>`, :class:`~a.b.C`, of which C is shown, and `text <target>`_
_ROLE = re.compile(r":[\w:+-]+:`(?:~(?:\w+\.)*)?!?([^`<]+?)(?:\s*<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)(?:\s*<[^`]*>)?`__?")


def documentation(split):
    """Yields `(topic, path, text)` of the pages in `split`: "development" (two fifths of them) or "test".

    A topic is a folder of the documentation. Pages come in the order of a hash of their paths, so that the
    first ones are a fair sample. Raises `CorpusError` where the archive is missing or altered.
    """
    archive = cache_folder("texts") / ARCHIVE
    if not archive.is_file():
        raise CorpusError(
            f"{ARCHIVE} is not in {archive.parent}: `make {DATASET}` (or `python -m sketchkv.prose`) "
            "fetches it."
        )
    if (found := _sha256(archive)) != SHA256:
        raise CorpusError(
            f"{archive} has the sha256 {found} instead of {SHA256}: remove it, and run `make {DATASET}` "
            "again."
        )
    pages = _pages(archive)
    ranks = {path: hashlib.sha256(path.as_posix().encode()).digest() for path in pages}
    for path in sorted(pages, key=ranks.__getitem__):
        if (ranks[path][0] % 5 < 2) == (split == "development"):
            yield path.parent.as_posix(), path.as_posix(), prose(pages[path])


@functools.lru_cache(maxsize=1)
def _pages(archive):
    """Path below docs and text of every page, in reStructuredText."""
    pages = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/docs/")  # the first folder is the archive's own
            is_page = member.isfile() and name.endswith(".txt") and name.split("/")[0] in _SECTIONS
            if is_page and (page := tar.extractfile(member)):
                pages[PurePosixPath(name)] = page.read().decode("utf-8")
    return pages


def prose(text):
    """The running text of a page of reStructuredText: headings, paragraphs and lists that are not indented.

    Code, tables, directives and what belongs to them are left out, as is markup that names its target.
    """
    kept = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip("\n").splitlines()]
        if not lines or block.strip("\n").startswith((" ", "..", ">>>", "+-", "|", "__")):
            continue
        words = [line for line in lines if not _RULE.fullmatch(line)]
        is_heading = len(words) == 1 and len(lines) > 1
        if is_heading or (len(words) == len(lines) and re.search(r"[.:!?)][\"'`*]*$", lines[-1])):
            plain = _LINK.sub(r"\1", _ROLE.sub(r"\1", " ".join(words)))
            kept.append(re.sub(r"\\ ?", "", plain.replace("``", "").replace("::", ":")))
    return "\n\n".join(kept) + "\n\n"


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main():
    folder = cache_folder("texts")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ARCHIVE).is_file():
        with tempfile.TemporaryDirectory(prefix=".django-", dir=folder) as aside:
            name = ARCHIVE.removesuffix(".tar.gz").replace("-", "==")
            pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--no-binary", ":all:", "--dest", aside, name], check=True)
            (Path(aside) / ARCHIVE).rename(folder / ARCHIVE)
    pages = list(documentation("test"))
    print(f"{folder / ARCHIVE}: {len(pages)} pages are held out")


if __name__ == "__main__":
    main()
