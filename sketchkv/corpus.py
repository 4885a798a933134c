"""The embedded text: Python source of the packages that the environment pins.

Training text is read from the packages as they are installed. Evaluation text comes from whole packages that
training never sees, file by file through `data/manifest.json`, whose sha256 sums make every machine score the
same bytes. `python -m sketchkv.corpus` writes the manifest again, which is needed when the pin of a held-out
package changes.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
from itertools import chain, zip_longest
from pathlib import Path

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
DATA = Path(__file__).resolve().parent.parent / "data"
MANIFEST = DATA / "manifest.json"

# Whole packages are held out. `development` documents are for choosing settings, `test` documents for
# reporting.
HELD_OUT = {
    "development": ("tornado", "rich", "jinja2", "click", "sacrebleu", "papermill", "nbconvert"),
    "test": ("networkx", "distributed", "hypothesis", "seaborn"),
}
_SKIPPED_FOLDERS = {"_vendor", "vendor", "_vendored", "extern", "externals", "third_party", "__pycache__"}
_MAX_FILE_BYTES = 150_000  # larger files are mostly generated tables
_MAX_PACKAGE_BYTES = 6_000_000  # keeps one package from being the whole corpus

# Which held-out files the manifest takes.
_TEST_FOLDERS = {"tests", "test"}
_MIN_BYTES = 9_000  # about 2048 tokens and more
_LONG_BYTES = 20_000  # about 4096 tokens and more: 16 times a cap of 256
_LONG_FILES, _FILES = 64, 96  # long files, then all files, at most, in each split
_MAX_SHARED_LINES = 0.15  # above: a copy of what training saw, whatever package it came in


class CorpusError(RuntimeError):
    """The text that was asked for is missing, altered or too short."""


def installed(path):
    """Where `path` (relative to the installed packages) is: a list, since a layered environment has several
    folders of packages, all of them on `sys.path`."""
    return [found for folder in _package_folders() if (found := Path(folder, path)).is_file()]


def _package_folders():
    return dict.fromkeys([SITE_PACKAGES, *map(Path, filter(None, sys.path))])


def cache_folder(kind):
    """Where what was fetched or converted lies, `kind` being "models" or "texts": below `$SKETCHKV_CACHE`,
    else below `build` of a checkout, else below `~/.cache/sketchkv`."""
    checkout = DATA.parent / "build" if (DATA.parent / "pyproject.toml").is_file() else None
    return Path(os.environ.get("SKETCHKV_CACHE") or checkout or "~/.cache/sketchkv").expanduser() / kind


def _read_source(path):
    """Text of a hand-written source file, or None for a generated or undecodable one."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    lines = text.count("\n") + 1
    return text if 400 <= len(text) <= _MAX_FILE_BYTES and len(text) / lines < 80 else None


def _source_files(package):
    """Python files of one installed package, vendored copies of other packages left out, in a fixed order."""
    root = SITE_PACKAGES / package
    files = [root] if root.suffix == ".py" else root.rglob("*.py")
    return sorted(p for p in files if not _SKIPPED_FOLDERS & set(p.relative_to(SITE_PACKAGES).parts))


def training_texts():
    """Texts of all installed packages that are not held out: a list of str, neighbours in a package side by
    side."""
    held_out = {name for names in HELD_OUT.values() for name in names}
    packages = sorted(
        p.name
        for p in SITE_PACKAGES.iterdir()
        if (p.is_dir() or p.suffix == ".py") and not p.name.endswith("-info")
    )
    texts, seen = [], set()
    for package in packages:
        if package in held_out or "sketchkv" in package:  # an editable installation leaves a finder behind
            continue
        # A package over its share is thinned by the hash of the file's name: the same files on every machine.
        by_hash = sorted(_source_files(package), key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
        chosen, total = {}, 0
        for path in by_hash:
            text = _read_source(path)
            digest = hashlib.sha256(text.encode()).digest() if text else None
            if text and digest not in seen and total + len(text) <= _MAX_PACKAGE_BYTES:
                seen.add(digest)
                total += len(text)
                chosen[path] = text
        texts += [chosen[path] for path in sorted(chosen)]
    return texts


def held_out_texts(split):
    """Yields `(path, text)` of the manifest's files in `split` ("development" or "test"), in the manifest's
    order.

    `path` is relative to the installed packages, in whichever folder of `sys.path` they lie. Each file's raw
    bytes are checked against its sha256. Raises `CorpusError` naming the file, what was expected and what was
    found.
    """
    manifest = read_manifest()
    for entry in manifest["files"][split]:
        contents = [path.read_bytes() for path in installed(entry["path"])]
        by_sum = {hashlib.sha256(content).hexdigest(): content for content in contents}
        if entry["sha256"] not in by_sum:
            found = ", ".join(by_sum)
            package = entry["path"].split("/")[0]
            expected = manifest["packages"][split][package]
            raise CorpusError(
                f"Held-out file {entry['path']}: expected sha256 {entry['sha256']}, found "
                f"{found or 'no file'}. It belongs to {package} {expected}; installed is "
                f"{_version(package)}. `make env` installs the pinned packages; if the version agrees, the "
                f"file was changed: remove {package} and run `make env` again."
            )
        yield entry["path"], by_sum[entry["sha256"]].decode("utf-8")


def read_manifest():
    """The manifest as a dict: `packages` (versions) and `files` (path, sha256, bytes), both by split."""
    if not MANIFEST.is_file():
        raise CorpusError(f"The manifest {MANIFEST} is missing: `python -m sketchkv.corpus` writes it.")
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def build_manifest():
    """Chooses the held-out files by fixed rules and returns the manifest as a dict.

    Candidates are hand-written files of at least 9 kB outside test folders that define a function (tables
    don't) and share few lines with the training texts: held-out packages contain vendored copies, and others
    vendor copies of them. Packages take turns, long files first; inside a package the order is by the hash of
    the path, and so is the order in the manifest, so that its first n files are a fair sample.
    """
    trained = set(chain.from_iterable(map(_long_lines, training_texts())))
    manifest: dict[str, dict] = {"packages": {}, "files": {}}
    for split, packages in HELD_OUT.items():
        queues = [sorted(_candidates(package, trained), key=_path_hash) for package in packages]
        turns = [path for turn in zip_longest(*queues) for path in turn if path]
        long = [path for path in turns if path.stat().st_size >= _LONG_BYTES][:_LONG_FILES]
        chosen = (long + [path for path in turns if path not in long])[:_FILES]
        manifest["files"][split] = [
            {
                "path": _relative(path),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in sorted(chosen, key=_path_hash)
        ]
        used = {_relative(path).split("/")[0] for path in chosen}
        manifest["packages"][split] = {package: _version(package) for package in packages if package in used}
    return manifest


def _candidates(package, trained):
    """Files of a held-out package that may be evaluated on; `trained` is the set of long lines seen in
    training."""
    for path in _source_files(package):
        if _TEST_FOLDERS & set(path.relative_to(SITE_PACKAGES).parts) or path.stat().st_size < _MIN_BYTES:
            continue
        text = _read_source(path)
        if text and re.search(r"^\s*(async )?def ", text, re.MULTILINE):
            lines = _long_lines(text)
            if len(lines & trained) <= _MAX_SHARED_LINES * len(lines):
                yield path


def _long_lines(text):
    """The distinct lines of a text that are long enough (30 characters) to be recognized elsewhere."""
    return {stripped for line in text.splitlines() if len(stripped := line.strip()) >= 30}


def _relative(path):
    return path.relative_to(SITE_PACKAGES).as_posix()


def _path_hash(path):
    return hashlib.sha256(_relative(path).encode()).hexdigest()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def main():
    manifest = build_manifest()
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for split, files in manifest["files"].items():
        print(f"{split}: {len(files)} files, {sum(file['bytes'] for file in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
