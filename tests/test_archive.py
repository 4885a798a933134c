"""What left the package is told from files that are what they were."""

import shutil

import numpy as np
import pandas as pd
import pytest

from sketchkv.study import archive, record, sources, stats

FILES = sorted(sources.read_json(archive.FOLDER / "manifest.json")["files"])


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(archive.FOLDER, tmp_path / "archive")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_an_error(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(archive.ArchiveError, match=name):
        archive.table(copied)


def test_a_missing_or_unlisted_file_is_an_error(copied):
    (copied / FILES[0]).rename(copied / "other.csv")
    with pytest.raises(archive.ArchiveError, match=f"{FILES[0]}, other.csv"):
        archive.table(copied)


# Name of the raw table, its column of differences, and which rows: the mean of a claim is theirs.
RAW = [
    (
        "precision that falls with age",
        "6.25% of the bytes",
        "precision",
        "over",
        {"setting": "age", "budget": 1 / 16},
    ),
    (
        "decay and window that each head sets",
        "128 slots",
        "self_tuned",
        "over_fixed",
        {"method": "self_tuned", "max_cache_size": 128},
    ),
    (
        "heads that compete for a layer's slots",
        "64 slots",
        "budget_split",
        "over_uniform",
        {"split": "ada_kv", "max_cache_size": 64},
    ),
    (
        "a summary that fades",
        "bytes of 64 slots",
        "summaries",
        "over_one",
        {"kind": "decay", "model": "gpt2", "budget": 64},
    ),
    (
        "a sketched prior of the token beside exact scores",
        "long stream",
        "sketches_regimes",
        "loss",
        {"method": "exact with a sketched prior", "group": "long stream"},
    ),
    (
        "a sketch keyed by bigrams",
        "equal slots",
        "sketches_keys",
        "loss",
        {"method": "bigram", "group": "equal slots"},
    ),
    (
        "one sketch of key directions for all layers",
        "equal bytes",
        "sketches_shapes",
        "loss",
        {"method": "64x2, one for all layers", "group": "equal bytes"},
    ),
]


@pytest.mark.parametrize("what, where, name, column, at", RAW)
def test_a_claim_is_the_mean_of_its_documents(what, where, name, column, at):
    found = archive.table()[0].set_index(["what", "where"]).loc[(what, where)]
    raw = pd.read_csv(archive.FOLDER / f"{name}.csv")
    if "loss" == column:  # of the method and of exact scores, on the same documents
        exact = raw[(raw.method == "exact") & (raw.group == at["group"])].set_index("document").loss
        raw = raw.join(exact.rename("exact"), on="document")
        raw["loss"] -= raw.exact
    own = raw[(raw[list(at)] == pd.Series(at)).all(axis=1)]
    assert found.n == len(own) and found.effect == pytest.approx(own[column].mean(), abs=1e-12)
    assert found.low < found.effect < found.high
    assert found.verdict == (
        "better than" if found.high < 0 else "worse than" if found.low > 0 else "not distinguishable from"
    )


def test_each_row_is_in_the_table_that_it_names():
    rows = archive.table()[0].query("unit == 'nats per token more'")
    for row in rows.itertuples():
        raw = pd.read_csv(archive.FOLDER / row.file)
        assert np.isclose(raw["mean"].abs(), abs(row.effect), rtol=1e-12).any(), row
        assert row.verdict == stats.against((row.effect, -row.high, -row.low))


def test_the_report_tells_of_the_archive():
    told = record.load_table("tried")
    pd.testing.assert_frame_equal(told, archive.table()[0])
    listed = archive.manifest()["files"]
    assert told.commit.tolist() == [listed[name]["commit"] for name in told.file]
    drawn = {path.stem for path in (sources.ROOT / "figures").glob("*.json")}
    assert drawn.isdisjoint(
        {"self_tuned", "self_tuned_heads", "budget_heads", "precision_falling", "speed_scaling"}
    )
