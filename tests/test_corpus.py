"""The embedded text and its manifest, and documents of every kind of data set."""

import hashlib
import json
import shutil

import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sketchkv import corpus, texts
from sketchkv.corpus import HELD_OUT, CorpusError
from sketchkv.loading import EMBEDDED, HUB_REVISIONS, load
from sketchkv.texts import SPLITS, documents, text_revision

WORDS = "def score(model, input_ids, cache):\n    return model(input_ids)\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="module")
def manifest():
    return corpus.read_manifest()


@pytest.fixture(scope="module")
def training_texts():
    return corpus.training_texts()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- held-out text ------------------------------------------------------------------------------------------


def test_held_out_text_was_not_trained_on(training_texts, manifest):
    """By content, not by package: packages vendor copies of each other."""
    trained_lines = set()
    for text in training_texts:
        trained_lines |= corpus._long_lines(text)
    trained = {hashlib.sha256(text.encode()).digest() for text in training_texts}
    for split in SPLITS:
        for path, text in corpus.held_out_texts(split):
            lines = corpus._long_lines(text)
            assert hashlib.sha256(text.encode()).digest() not in trained, path
            assert len(lines & trained_lines) / len(lines) <= 0.15, path


def test_training_leaves_held_out_packages_out(training_texts):
    trained = set(training_texts)
    for package in ("networkx", "tornado"):
        assert not trained & {path.read_text(encoding="utf-8") for path in corpus._source_files(package)}


def test_splits_are_disjoint_and_of_their_packages(manifest):
    sums = {split: {file["sha256"] for file in manifest["files"][split]} for split in SPLITS}
    assert not sums["development"] & sums["test"]
    for split in SPLITS:
        files = manifest["files"][split]
        assert len(sums[split]) == len(files) and 64 <= len(files) <= 96
        assert (
            {file["path"].split("/")[0] for file in files}
            == set(manifest["packages"][split])
            <= set(HELD_OUT[split])
        )
        assert not any("tests" in file["path"].split("/") for file in files)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("length", "at_least"), [(4096, 64), (8192, 24)])
def test_enough_documents_for_the_study(tokenizer, split, length, at_least):
    found = documents("embedded", tokenizer, split, count=at_least, length=length)
    assert found.input_ids.shape == (at_least, length) and found.input_ids.dtype == torch.int64
    assert len(set(found.names)) == at_least
    assert (found.input_ids[:, 0] == tokenizer.bos_token_id).all() and (found.input_ids[:, 1:] != 0).all()


def test_first_documents_come_from_every_test_package(tokenizer):
    found = documents("embedded", tokenizer, count=16, length=1024)
    assert {name.split("/")[0] for name in found.names} == set(HELD_OUT["test"])


def test_same_bytes_same_tokens(tokenizer):
    first, second = (documents("embedded", tokenizer, count=4, length=300) for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids) and first.names == second.names
    text = corpus.installed(first.names[3])[0].read_bytes().decode()
    assert first.input_ids[3].tolist() == [0, *ids_of(tokenizer, text)[:299]]
    longer = documents("embedded", tokenizer, count=4, length=400)
    assert torch.equal(longer.input_ids[:, :300], first.input_ids)


@pytest.fixture
def copied_packages(tmp_path, monkeypatch, manifest):
    """The development files in a folder of their own, where they may be spoilt."""
    for entry in manifest["files"]["development"]:
        target = tmp_path / entry["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(corpus.installed(entry["path"])[0], target)
    monkeypatch.setattr(corpus, "_package_folders", lambda: [tmp_path])
    return tmp_path


@pytest.mark.parametrize("spoil", ["one byte", "line endings", "missing"])
def test_altered_file_is_named(copied_packages, tokenizer, manifest, spoil):
    entry = manifest["files"]["development"][2]
    file, package = copied_packages / entry["path"], entry["path"].split("/")[0]
    content = file.read_bytes()
    documents("embedded", tokenizer, "development", count=3, length=64)
    if spoil == "missing":
        file.unlink()
        found = "no file"
    else:
        content = content.replace(b"\n", b"\r\n") if spoil == "line endings" else b"#" + content[1:]
        file.write_bytes(content)
        found = hashlib.sha256(content).hexdigest()
    with pytest.raises(CorpusError) as caught:
        documents("embedded", tokenizer, "development", count=3, length=64)
    for part in (
        entry["path"],
        entry["sha256"],
        found,
        f"{package} {manifest['packages']['development'][package]}",
        "make env",
    ):
        assert part in str(caught.value)


def test_files_are_found_in_every_layer_of_an_environment(copied_packages, monkeypatch, tokenizer, manifest):
    """A package may lie in the second folder of packages, and another version of it in the first."""
    first, second = (manifest["files"]["development"][i]["path"] for i in (0, 1))
    upper = copied_packages / "upper"
    for path, content in ((first, None), (second, "another version")):
        (upper / path).parent.mkdir(parents=True)
        (upper / path).write_text(content or (copied_packages / path).read_text())
    (copied_packages / first).unlink()
    monkeypatch.setattr(corpus, "_package_folders", lambda: [upper, copied_packages])
    assert documents("embedded", tokenizer, "development", count=3, length=64).names[:2] == [first, second]


def test_packages_are_looked_for_on_the_whole_path(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "a.py").write_text("x = 1")
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        corpus.installed("some/a.py") == [tmp_path / "some" / "a.py"] and corpus.installed("some/b.py") == []
    )


def test_missing_manifest_says_how_it_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus, "MANIFEST", tmp_path / "manifest.json")
    with pytest.raises(CorpusError, match="python -m sketchkv.corpus"):
        text_revision("embedded")


def test_manifest_is_made_by_its_rules(tmp_path, monkeypatch, tokenizer):
    """Over made-up packages: which files are taken, and that what is written is read back."""

    def source(seed, functions, size):
        """Text of its own, with a number of functions, of about `size` bytes."""
        lines = [f"def function_{seed}_{i}(argument_{i}):\n    return {i}" for i in range(functions)]
        while sum(map(len, lines)) < size:
            lines.append(f"value_{seed}_{len(lines)} = compute_something({seed}, {len(lines)})")
        return "\n".join(lines) + "\n"

    vendored = source("vendored", 20, 12_000)
    files = {
        "trained/a.py": source("trained", 20, 30_000),
        "trained/_copy.py": vendored,
        "dev/a.py": source("dev", 20, 12_000),
        "dev/broken.py": "é".encode("latin-1") * 12_000,
        "one/long.py": source("long", 20, 25_000),
        "one/middle.py": source("middle", 20, 10_000),
        "one/short.py": source("short", 20, 5_000),
        "one/table.py": source("table", 0, 12_000),
        "one/tests/test_one.py": source("tests", 20, 12_000),
        "one/vendor/b.py": source("b", 20, 12_000),
        "two/compat.py": vendored,
        "two/last.py": source("last", 20, 30_000),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(corpus, "SITE_PACKAGES", tmp_path)
    monkeypatch.setattr(corpus, "_package_folders", lambda: [tmp_path])
    monkeypatch.setattr(corpus, "HELD_OUT", {"development": ("dev",), "test": ("one", "two")})
    monkeypatch.setattr(corpus, "MANIFEST", tmp_path / "manifest.json")

    assert corpus.training_texts() == [vendored, files["trained/a.py"]]
    corpus.main()
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written == corpus.build_manifest()
    paths = {split: [file["path"] for file in written["files"][split]] for split in SPLITS}
    assert paths["development"] == ["dev/a.py"]
    assert sorted(paths["test"]) == ["one/long.py", "one/middle.py", "two/last.py"]
    assert written["packages"]["test"] == {"one": "none", "two": "none"}
    assert dict(corpus.held_out_texts("test")) == {path: files[path] for path in paths["test"]}

    # With room for fewer files, long ones go first and packages take turns.
    monkeypatch.setattr(corpus, "_FILES", 2)
    assert sorted(file["path"] for file in corpus.build_manifest()["files"]["test"]) == [
        "one/long.py",
        "two/last.py",
    ]


# --- the BOS token ------------------------------------------------------------------------------------------


def test_bos_is_never_doubled(tokenizer):
    """A tokenizer that adds the BOS token by itself gives the same documents."""
    adding = AutoTokenizer.from_pretrained(EMBEDDED)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert adding("x")["input_ids"][0] == 0
    expected = documents("embedded", tokenizer, count=2, length=64).input_ids
    assert torch.equal(documents("embedded", adding, count=2, length=64).input_ids, expected)


def test_model_without_bos_gets_none(tmp_path):
    plain = AutoTokenizer.from_pretrained(EMBEDDED)
    plain.bos_token = None
    (tmp_path / "a.txt").write_text(WORDS * 9)
    found = documents(tmp_path / "a.txt", plain, count=1, length=20)
    assert found.input_ids[0].tolist() == ids_of(plain, WORDS)[:20]


def test_special_token_spelled_out_in_a_text_is_plain_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text('BOS = "<|endoftext|>"\n' * 20)
    found = documents(tmp_path / "a.txt", tokenizer, count=1, length=100)
    assert (found.input_ids[0] == 0).sum() == 1


# --- local text ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.text("abc dé\n", min_size=40, max_size=400), st.integers(2, 12))
def test_file_is_cut_into_consecutive_documents(tmp_path_factory, tokenizer, text, length):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(("x" + text).encode())
    ids = ids_of(tokenizer, "x" + text)
    if len(ids) < length - 1:
        return
    found = documents(str(file), tokenizer, length=length)
    assert len(found.names) == len(ids) // (length - 1) == len(found.input_ids)
    assert (found.input_ids[:, 0] == 0).all()
    assert found.input_ids[:, 1:].flatten().tolist() == ids[: len(found.names) * (length - 1)]
    first = documents(str(file), tokenizer, count=1, length=length)
    assert first.names == found.names[:1] and torch.equal(first.input_ids, found.input_ids[:1])


def test_folder_gives_one_document_per_file_and_skips_short_ones(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("# Heading\n" * 60)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + WORDS.encode() * 20)
    (tmp_path / "b.txt").write_text("short")
    (tmp_path / ".hidden").write_bytes(b"\xff\xfe")
    found = documents(tmp_path, tokenizer, length=100)
    assert found.names == ["a.txt", "deep/c.md"] and found.input_ids.shape == (2, 100)
    assert found.input_ids[0, 1:].tolist() == ids_of(tokenizer, WORDS * 20)[:99]


def test_too_few_documents_says_how_many_there_are(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(WORDS * 10)
    available = 1 + len(ids_of(tokenizer, WORDS * 10))
    with pytest.raises(
        CorpusError,
        match=f"0 documents of 5000 tokens.*lower the length.*longest text has {available} tokens",
    ):
        documents(tmp_path / "a.txt", tokenizer, length=5000)
    (tmp_path / "b.txt").write_text(WORDS * 20)
    with pytest.raises(CorpusError, match=r"has 2 documents of 100 tokens, and 3 were asked for: lower"):
        documents(tmp_path, tokenizer, count=3, length=100)


@pytest.mark.parametrize("chunk", [3, 1 << 18])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc \xff\xfe", r"not UTF-8 text \(byte 4\)"),
        (b"ab\xc3\xa9 \xc3", r"not UTF-8 text \(byte 5\)"),
        ("a b c\n".encode("utf-16-le"), "NUL bytes"),
    ],
)
def test_unusable_file_is_named(tmp_path, monkeypatch, tokenizer, content, told, chunk):
    monkeypatch.setattr(texts, "_CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=f"a.txt.*{told}"):
        documents(tmp_path / "a.txt", tokenizer)


@settings(max_examples=100, deadline=None)
@given(st.text("ab1é_.'  \n\n\r\t", min_size=30, max_size=300), st.integers(1, 40))
def test_reading_in_pieces_gives_the_tokens_of_the_whole(tmp_path_factory, tokenizer, text, chunk):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_CHUNK", chunk)
        # Four pieces without a place to cut at are cut anyway: not with this much room for one of them.
        patch.setattr(texts, "_ROOM", 10**9)
        pieces = list(texts._chunks(file))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in ids_of(tokenizer, piece)] == ids_of(tokenizer, text)


@pytest.mark.parametrize("line", [WORDS, WORDS.replace("\n", " "), "words" * 20])
def test_a_file_is_read_only_as_far_as_needed(tmp_path, monkeypatch, tokenizer, line):
    """With its end undecodable, or in lines that never end."""
    monkeypatch.setattr(texts, "_CHUNK", 4096)
    monkeypatch.setattr(texts, "_ROOM", 16384)
    file = tmp_path / "a.txt"
    file.write_bytes(line.encode() * 3000 + b"\xff")
    assert len(documents(file, tokenizer, count=3, length=200).names) == 3
    assert documents(tmp_path, tokenizer, length=200).names == ["a.txt"]
    with pytest.raises(CorpusError, match="not UTF-8"):
        documents(file, tokenizer, length=200)


def test_undecodable_file_in_a_folder_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(WORDS * 100)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(CorpusError, match="picture.png is not UTF-8"):
        documents(tmp_path, tokenizer, length=64)


def test_folder_without_text(tmp_path, tokenizer):
    with pytest.raises(CorpusError, match="no text files"):
        documents(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "name", ["wikitext-103", "./no-such-file.txt", "~nobodyhere/a.txt", "x" * 5000, "a\0b", ""]
)
def test_unknown_data_set_lists_the_allowed(tokenizer, name):
    for ask in (lambda: documents(name, tokenizer), lambda: text_revision(name)):
        with pytest.raises(
            CorpusError,
            match="Unknown data set.*embedded, django-docs, wikitext-2-raw-v1, or a text file or folder",
        ):
            ask()


@pytest.mark.parametrize(
    "wrong",
    [{"split": "train"}, {"split": "validation"}, {"length": 1}, {"length": 0}, {"count": 0}, {"count": -1}],
)
def test_impossible_requests(tokenizer, wrong):
    with pytest.raises(CorpusError, match="allowed are development, test|at least"):
        documents("embedded", tokenizer, **wrong)


def test_local_text_has_a_single_split(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(WORDS * 100)
    assert len(documents(tmp_path, tokenizer, "test", length=64).names) == 1
    with pytest.raises(CorpusError, match='single split "test"'):
        documents(tmp_path, tokenizer, "development", length=64)


# --- WikiText-2 ---------------------------------------------------------------------------------------------


def article(title, sentences):
    """Rows as the hub's parquet files have them."""
    body = f" {title} is a robin of the family <unk> , and 3 @,@ 000 of them live here . \n" * sentences
    return [
        "",
        f" = {title} = \n",
        "",
        body,
        "",
        " = = Range = = \n",
        "",
        body,
        " = not a heading = \n",
        body,
        "",
    ]


def write_wikitext(folder, test, validation=None):
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    for split, rows in {"test": test, "validation": validation}.items():
        if rows is not None:
            pd.DataFrame({"text": rows}).to_parquet(
                folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
            )
    return folder


def test_wikitext_folder_gives_one_document_per_article(tmp_path, tokenizer):
    first, second = article("Erithacus", 9), article("Turdus = Merula", 12)
    write_wikitext(tmp_path, [*first, *second, *article("Stub", 1)], article("Larus", 9))
    found = documents(tmp_path, tokenizer, length=200)
    assert found.names == ["Erithacus", "Turdus = Merula"]
    rows = [*first, *second]
    assert found.input_ids[0, 1:].tolist() == ids_of(tokenizer, "".join(rows[1:]))[:199]
    assert documents(tmp_path, tokenizer, "development", length=200).names == ["Larus"]
    # The folder that holds the parquet files itself will do as well.
    inner = documents(tmp_path / "wikitext-2-raw-v1", tokenizer, length=200)
    assert torch.equal(inner.input_ids, found.input_ids)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from(["", " = A = \n", " = = B = = \n", " text \n", " = C \n", " = D = e \n"]), max_size=30
    )
)
def test_articles_keep_every_row_in_order(tmp_path_factory, rows):
    """Whatever the rows: nothing is lost or moved, and each article but the first opens with its heading."""
    folder = write_wikitext(tmp_path_factory.mktemp("wikitext"), rows)
    found = list(texts._articles(texts._parquet_files(folder, "test")))
    assert "".join(text for _, text in found) == "".join(rows)
    assert all(title == "untitled" or text.startswith(f" = {title} = \n") for title, text in found)
    assert {title for title, _ in found} <= {"untitled", "A"}


def test_wikitext_folder_without_the_split_or_the_column(tmp_path, tokenizer):
    write_wikitext(tmp_path / "a", article("Erithacus", 9))
    with pytest.raises(CorpusError, match="no validation-"):
        documents(tmp_path / "a", tokenizer, "development")
    folder = write_wikitext(tmp_path / "b", article("Erithacus", 9)) / "wikitext-2-raw-v1"
    pd.DataFrame({"line": ["x"]}).to_parquet(folder / "test-00000-of-00001.parquet")
    with pytest.raises(
        CorpusError, match="test-00000-of-00001.parquet can't be read as parquet with a column `text`"
    ):
        documents(tmp_path / "b", tokenizer)


def test_wikitext_from_the_hubs_cache_and_without_it(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CorpusError, match="Salesforce/wikitext.*DATASET=embedded") as caught:
        documents("wikitext-2-raw-v1", tokenizer)
    assert caught.value.__cause__ is not None
    snapshot = (
        tmp_path / "datasets--Salesforce--wikitext" / "snapshots" / HUB_REVISIONS["Salesforce/wikitext"]
    )
    write_wikitext(snapshot, article("Erithacus", 9))
    assert documents("wikitext-2-raw-v1", tokenizer, length=200).names == ["Erithacus"]
    with pytest.raises(CorpusError, match="hub's cache"):  # the other split is not cached
        documents("wikitext-2-raw-v1", tokenizer, "development", length=200)


# --- revisions ----------------------------------------------------------------------------------------------


def test_text_revision_follows_the_bytes(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    seen = [text_revision(tmp_path), text_revision(tmp_path / "a.txt")]
    (tmp_path / "b.txt").write_text("two")
    seen.append(text_revision(tmp_path))
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(text_revision(tmp_path))
    (tmp_path / "a.txt").write_text("One")
    seen += [text_revision(tmp_path), text_revision(tmp_path / "a.txt")]
    assert (
        len(set(seen)) == 5 and seen[0] == seen[1]
    )  # one file, alone or in its folder: the same name and bytes
    write_wikitext(tmp_path / "w", article("Erithacus", 3))
    before = text_revision(tmp_path / "w")
    shutil.rmtree(tmp_path / "w")
    write_wikitext(tmp_path / "w", article("Erithacus", 4))
    assert text_revision(tmp_path / "w") != before
    assert text_revision("wikitext-2-raw-v1") == HUB_REVISIONS["Salesforce/wikitext"]

    embedded, changed = text_revision(), corpus.read_manifest()
    changed["files"]["test"][5]["sha256"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(changed))
    monkeypatch.setattr(corpus, "MANIFEST", tmp_path / "manifest.json")
    assert len(embedded) == 12 and text_revision() != embedded


def test_embedded_model_predicts_held_out_text():
    model, tokenizer = load(device="cpu")
    assert tokenizer.padding_side == "left"  # as `generate` needs
    assert model.dtype == torch.float32 and model.config.max_position_embeddings >= 1024
    assert model.config.hidden_size // model.config.num_attention_heads == 64
    ids = documents("embedded", tokenizer, count=2, length=256).input_ids
    loss = model(ids, labels=ids).loss.item()
    assert loss < 5.0  # a guess over the vocabulary costs log(4096) = 8.3 nats
