"""The package as others install it: a wheel, outside the checkout, beside nothing but what it asks for."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from sketchkv.loading import EMBEDDED

ROOT = Path(__file__).parent.parent
FORBID = """
import importlib.metadata as metadata, re, sys

def needed(name, found):
    if name not in found:
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            return found
        for requirement in requirements:
            if "extra ==" not in requirement:
                needed(re.match(r"[\\w.-]+", requirement)[0].lower().replace("_", "-"), found)
    return found

allowed = needed("sketchkv", set())
places = metadata.packages_distributions()
forbidden = {
    module for module, owners in places.items()
    if not {owner.lower().replace("_", "-") for owner in owners} & allowed
}
assert {"pandas", "scipy", "dask", "matplotlib", "pytest"} <= forbidden, "this environment proves nothing"
sys.modules |= dict.fromkeys(forbidden)  # import raises ModuleNotFoundError
"""


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "sketchkv", source / "sketchkv", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
    )
    run(*pip, built, source, cwd=built)
    (found,) = built.iterdir()
    return found


def test_the_wheel_holds_the_package_and_asks_for_five(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sketchkv"}
    assert "sketchkv/fast/cpu.c" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sketchkv").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    plain = [line for line in re.findall(r"^Requires-Dist: (.*)", metadata, re.M) if "extra ==" not in line]
    asked = {re.match(r"[\w-]+", line)[0] for line in plain}
    assert asked == {"torch", "transformers", "tokenizers", "safetensors", "numpy"}


@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded model is being trained"
)
def test_the_readmes_example_runs_with_what_the_wheel_asks_for(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "-q",
        wheel,
        cwd=tmp_path,
    )
    site = sysconfig.get_path("purelib", vars={"base": tmp_path / "venv", "platbase": tmp_path / "venv"})
    # This environment's packages, but not what its own .pth files add: an editable install of this checkout.
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert example.count('"embedded"') == 1
    example = example.replace('"embedded"', repr(str(EMBEDDED)))  # data/ is no part of a wheel
    place = "import sketchkv; assert 'venv' in sketchkv.__file__, sketchkv.__file__\n"
    (tmp_path / "example.py").write_text(FORBID + place + example)
    assert "tokens seen" in run(python, "-I", "example.py", cwd=tmp_path)
