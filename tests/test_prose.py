"""The prose of Django's documentation: what is kept of a page, and documents out of the pinned archive."""

import shutil

import pytest
from transformers import AutoTokenizer

from sketchkv import corpus, prose
from sketchkv.corpus import CorpusError
from sketchkv.loading import EMBEDDED
from sketchkv.texts import SPLITS, documents, text_revision

ARCHIVE = corpus.cache_folder("texts") / prose.ARCHIVE
needs_archive = pytest.mark.skipif(
    not ARCHIVE.is_file(), reason="the archive is not here: `make django-docs`"
)

PAGE = """
==============
Making queries
==============

.. currentmodule:: django.db.models

Once you've created your :doc:`data models </topics/db/models>`, call
:meth:`~django.db.models.Model.save`, ``filter(**kwargs)`` or :class:`Blog`\\s.

.. code-block:: python

    from django.db import models

See `Field lookups`_ and `the site <https://example.org/>`_::

    >>> b.save()

* A list is kept.

===== =====
a     b
===== =====

  An indented note.

A line without an end

Caching
-------

It is :setting:`CACHES`.
"""


def test_headings_paragraphs_and_lists_are_kept_without_markup():
    assert prose.prose(PAGE) == (
        "Making queries\n\n"
        "Once you've created your data models, call save, filter(**kwargs) or Blogs.\n\n"
        "See Field lookups and the site:\n\n"
        "* A list is kept.\n\n"
        "Caching\n\n"
        "It is CACHES.\n\n"
    )


def test_missing_and_altered_archives_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SKETCHKV_CACHE", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    with pytest.raises(CorpusError, match="django-5.2.19.tar.gz is not in .*`make django-docs`"):
        documents("django-docs", tokenizer)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / prose.ARCHIVE).write_bytes(b"another")
    with pytest.raises(CorpusError, match="sha256 .* instead of ad03d8ab.*remove it"):
        documents("django-docs", tokenizer)
    assert text_revision("django-docs") == prose.SHA256[:12]


@needs_archive
def test_splits_share_no_page_and_hold_enough():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    pages = {split: {path for _, path, _ in prose.documentation(split)} for split in SPLITS}
    assert not pages["development"] & pages["test"] and min(map(len, pages.values())) > 60
    for split in SPLITS:
        for length, count in ((4096, 16), (8192, 8)):
            found = documents("django-docs", tokenizer, split, count=count, length=length)
            assert found.input_ids.shape == (count, length)
            used = [path for name in found.names for path in name.split(" + ")]
            assert len(set(used)) == len(used) and set(used) <= pages[split]  # no page twice
            assert all(
                len({path.rpartition("/")[0] for path in name.split(" + ")}) == 1 for name in found.names
            )


@needs_archive
def test_same_pages_elsewhere(tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    expected = documents("django-docs", tokenizer, count=2, length=512)
    (tmp_path / "texts").mkdir()
    shutil.copy(ARCHIVE, tmp_path / "texts")
    monkeypatch.setenv("SKETCHKV_CACHE", str(tmp_path))
    assert documents("django-docs", tokenizer, count=2, length=512).input_ids.equal(expected.input_ids)
