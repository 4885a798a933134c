"""What the README says is so: its example prints what it says, its numbers are those of the results, its links lead somewhere."""

import inspect
import json
import re
from pathlib import Path

import pandas as pd
import pytest

import sketchkv
from sketchkv import Sketch, SketchCache
from sketchkv.loading import EMBEDDED

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    not (EMBEDDED / "model.safetensors").exists(), reason="the embedded model is being trained"
)
def test_the_example_prints_what_it_says(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (printed,) = re.findall(r"```text\n(.*?)```", README, re.S)
    assert len(example.strip().splitlines()) <= 10
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert capsys.readouterr().out == printed
    config, seen = names["model"].config, names["cache"].seen_tokens
    full = seen * config.n_layer * 2 * config.n_embd * 4  # keys and values in float32
    assert f"would hold {full} bytes" in README


def test_the_numbers_are_those_of_the_results():
    losses = pd.read_csv(ROOT / "data" / "results" / "pretrained_losses.csv")
    losses = losses[losses["share"].between(0.12, 0.1251)].set_index(["text", "method"]).percent
    rows = re.findall(r"^\|[^|]*\| `SketchCache([^`]*)` \| (-?[\d.]+) \| (-?[\d.]+) \|$", README, re.M)
    names = {
        ".compact": "compact",
        ".recall": "recall",
        "AttentionMass": "exact scores",
        "policy=Sketch": "sketch 512x4",
        "Window": "StreamingLLM",
    }
    assert len(rows) == len(names)
    for code, *told in rows:
        (method,) = (name for word, name in names.items() if word in code)
        for text, number in zip(("prose", "code"), told):
            digits = len(number.partition(".")[2])
            assert round(losses[text, method], digits) == float(number), (method, text)
    finding = (ROOT / "report" / "report.md").read_text(encoding="utf-8").splitlines()[0][2:].lower()
    assert finding in " ".join(README.lower().split())


def test_links_and_commands_exist():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z]+)", README, re.M):
        assert re.search(rf"^{target}\b.*:", makefile, re.M), target
    for name in re.findall(r"policy=(\w+)\(", README):
        assert name in sketchkv.__all__


def test_the_first_result_is_on_the_first_screen():
    first = README.split("## How do I choose?")[0].splitlines()
    assert len(first) <= 46 and any(line.startswith("![") for line in first[:10])


def test_docstrings_name_every_parameter():
    for kind in (SketchCache, Sketch):
        told = f"{kind.__doc__}{kind.__init__.__doc__}"
        for name, parameter in inspect.signature(kind).parameters.items():
            assert name in told or parameter.kind is inspect.Parameter.VAR_KEYWORD, (kind.__name__, name)


def test_the_citation_has_what_the_report_says():
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    report = (ROOT / "report" / "report.md").read_text(encoding="utf-8")
    for key in ("date-released", "license", "version"):
        assert re.search(rf"^{key}: (.*)$", cited, re.M)[1] in report
    assert json.loads((ROOT / "data/results/run_17_report.json").read_text())["notebook"] == "17_report"
