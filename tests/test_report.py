"""The report: what it may hold, that it follows the results, and that it can be read on any screen."""

import json
import re
import shutil

import pandas as pd
import pytest
import typst
import yaml
from scipy.stats import beta
from test_explore import browser

from sketchkv.study import claims, methods, pretrained_tables, record, report, sources

ROOT = sources.ROOT
NUMBER = r"\d[\d.,]*"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A copy of the committed results and figures."""
    folder = tmp_path_factory.mktemp("committed")
    for name in ("data/results", "figures", "report"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("points"))
    return folder


@pytest.fixture
def committed(results, tmp_path):
    return shutil.copytree(results, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def written(results):
    return report.compose(results, results / "report")


def plain(markdown):
    """The words that a reader sees."""
    return re.sub(r"\]\([^)]*\)|<[^>]*>|[`*#\[]", " ", markdown)


def sections(markdown):
    """{title: text} of the claims."""
    return {t: body for t, body in re.findall(r"^## (\d\. .*)\n((?:(?!^## ).*\n)*)", markdown, re.M)}


def test_the_committed_report_is_that_of_the_committed_results(written, results):
    assert written[0] == (ROOT / "report" / "report.md").read_text(encoding="utf-8"), "run `make reproduce`"
    assert report.problems(ROOT / "report" / "report.md", ROOT / "report" / "report.html") == []


def test_the_box_is_short(written):
    box = plain(written[0].split("</div>")[0])
    assert len(box.split()) <= 350 and len(re.findall(NUMBER, box)) <= 40
    assert (
        re.findall(r"^ *\*\*(?:<[^>]*>)?(\w+)", written[0].split("</div>")[0], re.M)
        == "Question Answer Sketch Price Limits".split()
    )


def test_a_claim_says_of_what_and_how_sure(written):
    found = sections(written[0])
    assert 1 <= len(found) <= 7
    for title, text in found.items():
        assert re.search(r"n = \d+", text) and re.search(r"SmolLM2|Embedded model|GPT-2", text), title
        assert "95 %" in text and len(re.findall(r"^!\[", text, re.M)) == 1, title
        assert len(title) <= 90
    assert not re.search(r"\b0(\.0)?( %)? to 0(\.0)?\b", plain(written[0])), "an interval without width"
    assert "nats" not in plain(written[0].split("## What we tried")[0].split("\n## 2.")[0])


def test_no_name_is_used_before_it_is_explained(written):
    words = yaml.safe_load((ROOT / "report" / "words.yml").read_text(encoding="utf-8"))
    front = re.sub(
        r'"[^"]*"', "", written[0].partition("\n")[2].split("## 1. ")[0]
    )  # without the explanations themselves
    for word in words:
        if first := re.search(rf"(?<![\w.]){word}s?(?!\w)", front, re.I):
            assert re.search(r"<abbr title=>`?$", front[: first.start()]), (
                f"{word} is used before it is explained"
            )
    names = {*pretrained_tables.LABELS.values(), *methods.CACHES, "KIVI", "H2O"} - {"full", "full cache"}
    unexplained = [n for n in names if re.search(rf"\b{re.escape(n)}\b", plain(front)) and n not in words]
    assert set(unexplained) <= {"near"}


def test_the_paper_is_short(written, results):
    _, _, paper = written
    out = report.printed(paper, results)
    assert out.startswith(b"%PDF") and out == report.printed(paper, results)
    marked = paper.replace("= What we tried", "#metadata(0)<main>\n= What we tried", 1)
    where = "#context [#metadata(query(<main>).first().location().page())<page>]"
    page = typst.query(f"{marked}\n{where}".encode(), "<page>", field="value", one=True, root=str(results))
    assert 2 <= int(page) <= 8
    drawn = json.loads(typst.query(paper.encode(), "image", root=str(results)))
    assert len(drawn) == 8 and all(image["alt"] for image in drawn)


@pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")), reason="no Chromium here"
)
@pytest.mark.parametrize("width", [1280, 390])
def test_a_screen_of_any_width_shows_all_of_it(written, results, width, tmp_path):
    (results / "report" / "report.html").write_text(written[1], encoding="utf-8")
    with browser(width, tmp_path) as (call, run):
        call("url", url=(results / "report" / "report.html").as_uri())
        assert run("return document.documentElement.scrollWidth") <= width
        assert run("return [...document.images].every(image => image.naturalWidth)")
        assert run("return document.querySelector('nav details').open") == (width > 960)
        first = "return document.querySelector('tbody tr').textContent"
        before = run(first)
        run("document.querySelector('th button').click()")
        assert width < 640 or run(first) != before


def test_a_smoke_report_begins_with_its_warning(committed):
    path = committed / "data" / "results" / "run_16_tried.json"
    run = sources.read_json(path)
    run["inputs"]["profile"] = "smoke"
    path.write_text(sources.to_json(run))
    markdown, page, paper = report.compose(committed, committed / "report")
    assert markdown.startswith("# Smoke run: ") and markdown.splitlines()[2].startswith(
        "**Warning: this is a smoke run."
    )
    assert page.index("Warning: this is") < page.index("Question.") and paper.index("Warning") < paper.index(
        "Question."
    )


def change_facts(root, name, **changes):
    path = root / "data" / "results" / f"facts_{name}.json"
    stored = sources.read_json(path)
    assert changes.keys() <= stored["facts"].keys()
    path.write_text(sources.to_json(stored | {"facts": stored["facts"] | changes}))


def test_changed_results_change_title_and_verdicts(committed):
    def title():
        return report.compose(committed, committed / "report")[0].splitlines()[0]

    assert title() == "# Do not sketch what attention was; sketch the keys and let the query ask"
    change_facts(committed, "11_pretrained", pretrained_code_recall_over_decayed_high=0.1)
    assert "exact scores do at least as well" in title()
    gains = committed / "data/results/sketch_gains_regimes.csv"
    table = pd.read_csv(gains)
    table.loc[table.index[table.method == "equal bytes"][:2], "verdict"] = "better than"
    table.to_csv(gains, index=False)
    assert "can beat exact scores" in title()
    markdown = report.compose(committed, committed / "report")[0]
    assert (
        "better than" in markdown
        and "in 2 of" in markdown
        and "## 2. A sketch of past attention can beat" in markdown
    )


def test_answers_of_recall_are_told_once_they_are_there(committed):
    path = committed / "data" / "results" / "pretrained_answers.csv"
    table = pd.read_csv(path)
    table = table[table.method != "recall"]
    table.to_csv(path, index=False)
    assert "`recall` was not asked yet" in report.compose(committed, committed / "report")[0]
    asked = table[(table.task == "needle") & (table.method == "compact")].assign(method="recall", right=29)
    pd.concat([table, asked]).to_csv(path, index=False)
    markdown = report.compose(committed, committed / "report")[0]
    assert (
        "was not asked" not in markdown
        and "far facts matter" in markdown
        and f"`recall` {29 * len(asked)}" in markdown
    )


def test_four_keys_are_told_in_the_words_of_the_table(written):
    table = pd.read_csv(ROOT / "data" / "results" / "pretrained_answers.csv")
    counted = table[table.counts & (table.task == "four_keys")].groupby("method")[["right", "n"]].sum()
    full, compact = counted.loc["full cache"], counted.loc["compact"]
    recall, alone = (counted.right[name] for name in ("recall", "recall without its tail"))
    said = f"the full cache answers {full.right} of {full.n}, `recall` {recall} ({alone} without its tail), "
    assert said in written[0] and f"`compact` {compact.right}." in written[0]


def test_what_the_tail_adds_is_told_once_it_was_measured(committed):
    said = "Without the tail it is"
    path = committed / "data" / "results" / "facts_11_pretrained.json"
    stored = sources.read_json(path)
    facts = {name: value for name, value in stored["facts"].items() if "recall_alone" not in name}
    path.write_text(sources.to_json(stored | {"facts": facts}))
    assert said not in report.compose(committed, committed / "report")[0]
    for text, size in (("prose", 1), ("code", 2)):
        ends = {"mean": size, "low": size / 2, "high": 2 * size}
        facts |= {f"pretrained_{text}_recall_alone_over_recall_{end}": value for end, value in ends.items()}
    path.write_text(sources.to_json(stored | {"facts": facts}))
    markdown = report.compose(committed, committed / "report")[0]
    assert f"{said} 1.0 % (0.5 to 2.0) higher on prose and 2.0 % (1.0 to 4.0) higher on code" in markdown


def test_what_was_measured_elsewhere_says_so(written):
    lines = re.findall(r"^Source: .*$", written[0], re.M)
    measured = [line for line in lines if "/11_pretrained.ipynb" in line]
    assert len(lines) == 7 and len(measured) == 3
    assert all(re.search(r"SmolLM2 on [^(]*: \[pretrained_\w+\.csv\]", line) for line in measured)
    assert not any("embedded" in line for line in lines)


def test_prompts_are_told_with_and_without_chunks():
    table = pd.DataFrame({"row": ["prompt of 1024, compact / prompt of 1024, DynamicCache"], "median": [3.5]})
    chunked = table.assign(
        row="prompt of 1024, compact, once per 512 / prompt of 1024, DynamicCache", median=1.5
    )
    step = table.assign(row="compact, 1024 seen / DynamicCache, 1024 seen", median=0.5)

    class Found:
        def frame(self, name):
            return pd.concat([step, table, chunked], ignore_index=True)

    found = claims.prompts(Found())
    assert (found.tokens, found.ratio, found.chunk) == (1024, {"compact": 3.5}, {"compact": (512, 1.5)})


def test_percent_is_spelled_in_one_way():
    """With a space, as in the report: Python's own format has none."""
    written = [*(ROOT / "sketchkv" / "study").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert not [
        path.name for path in written if re.search(r":[a-z]?(\.\d)?%\}", path.read_text(encoding="utf-8"))
    ]


def test_what_was_not_measured_is_said(committed):
    for path in (committed / "data" / "results").glob("*"):
        if path.name.startswith(("facts_", "pretrained", "speed", "why", "summ")) and path.is_file():
            path.unlink()
    markdown, page, _ = report.compose(committed, committed / "report")
    assert "# What should a bounded KV cache remember?" in markdown
    assert markdown.count("was not measured in this run") >= 7 and len(sections(markdown)) == 7


def test_intervals_are_exact_and_differences_are_in_words():
    for right, n in ((0, 48), (48, 48), (13, 150)):  # Clopper and Pearson's formula
        share = claims._binomial(right, n)
        low = 100 * beta.ppf(0.025, right, n - right + 1) if right else 0
        high = 100 * beta.ppf(0.975, right + 1, n - right) if right < n else 100
        assert (
            share.low == pytest.approx(low) and share.high == pytest.approx(high) and share.low < share.high
        )
    assert claims.Found(-3.94, -4.6, -3.31).than() == "3.9 % (3.3 to 4.6) lower"
    assert claims.Found(3.94, 3.31, 4.6).than() == "3.9 % (3.3 to 4.6) higher"
    assert claims.Found(0.2, -0.5, 0.5).than() == "not measurably different (-0.5 to +0.5 %)"
    assert claims.Found(51.2, 43.9, 61.9).won() == "51 % (44 to 62)"
    assert claims.Found(0.4, 0.3, 0.5).added() == "0.4 %"
    assert claims.Found(0.1, -0.1, 0.3).added() == "nothing measurable"
    assert claims.Found(-0.2, -0.3, -0.1).added() == "nothing"


def test_summary_slots_are_worse_only_where_every_shape_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(claims.measured, "BENCHMARKS", tmp_path)
    cap, documents = min(claims.sweep.CAPS), [f"{i}.py" for i in range(8)]

    def told(more):
        """Of two shapes, one of which loses `more` with four slots than with none."""
        rows = [
            (document, f"{use} w{width} cap {cap}", 3 + i / 10 + (use == "aggregate") * extra)
            for i, document in enumerate(documents)
            for width, extra in ((64, 0.2), (128, more * (1 + i)))
            for use in ("aggregate", f"topk{cap}")
        ]
        pd.DataFrame(rows, columns=["document", "name", "nll"]).to_csv(tmp_path / "pretrained_sweep.csv")
        return claims.swept(None)

    assert told(0.1).worse and not told(-0.1).worse and not told(0.0).worse
    assert (told(0.1).cap, told(0.1).n) == (cap, 8)


def test_a_generated_text_is_timed_as_committed():
    found = claims.generated(None)
    for ratio, name, row in (
        (found.cpu, "cpu", ("generate, compact", "generate, DynamicCache")),
        (found.gpu, "h100", ("generate, compact, step by step", "generate, DynamicCache")),
    ):
        table = pd.read_csv(claims.measured.BENCHMARKS / f"speed_{name}.csv").set_index("row")
        times = [table["median"][each] for each in row]
        assert ratio[0] == pytest.approx(times[0] / times[1], rel=0.25)  # medians of ratios, and of times
        assert ratio[1] == table.n[row[0]]


def test_a_paired_difference_is_that_of_the_documents():
    """By hand: geometric mean of the ratios of perplexity."""
    table = pd.read_csv(pretrained_tables.BENCHMARKS / "pretrained_quality.csv")
    at = table[(table.text == "code") & (table.share == 0.125) & (table.tokens == 4096)].pivot(
        index="document", columns="name", values="nll"
    )
    mean, low, high = pretrained_tables.compared("code", "recall", "compact")
    assert mean == pytest.approx(100 * (2.718281828459045 ** (at.recall - at.compact).mean() - 1))
    assert low < mean < high


PHONE = 366  # pixels that a figure has on a screen of 390: `report/report.css` leaves 12 on either side


def smallest_type(svg):
    """Height of the smallest letters of an SVG's text, in pixels, where the picture is `PHONE` pixels wide."""
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    sizes = re.findall(r"font(?:-size)?: ?[^;\"]*?([\d.]+)px", svg)
    return min(map(float, sizes)) * PHONE / width


def test_the_drawing_shows_every_kind_of_token():
    svg = (ROOT / "report" / "cache.svg").read_text(encoding="utf-8")
    kinds = (
        "kept by its score|sink: the first|recent window|evicted|summary slot|recalled by a query|their mean"
    )
    assert all(f">{words}<" in svg for words in kinds.split("|"))
    assert smallest_type(svg) >= 8
    boxes = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', svg)
    assert len(boxes) > 36 and max(float(x) + float(width) for x, width in boxes) <= 360


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "figures").glob("*.svg")))
def test_a_picture_can_be_read_on_a_phone_and_its_title_is_short(name):
    caption = sources.read_json(ROOT / "figures" / f"{name}.json")["caption"]
    finding, rest = record.split_caption(caption)
    assert len(finding) <= record.LONGEST and rest, finding
    assert smallest_type((ROOT / "figures" / f"{name}.svg").read_text(encoding="utf-8")) >= 8


def test_missing_result_names_the_notebook_to_run(committed):
    template = committed / "template.md.j2"
    for asked, named in (
        ('frame("tried_nothing")', "make reproduce"),
        ('figure("pretrained_needles")', "make reproduce"),
    ):
        template.write_text(f"# Title\n\n{{{{ {asked} }}}}")
        with pytest.raises(report.ReportError, match=named):
            report.compose(committed, committed / "report", template)
    (committed / "data" / "results" / "tried.csv").unlink()
    template.write_text('# Title\n\n{{ frame("tried") }}')
    with pytest.raises(report.ReportError, match="--only 16_tried"):
        report.compose(committed, committed / "report", template)
    with pytest.raises(report.ReportError, match="make reproduce"):
        report.compose(committed / "empty", committed / "report", template)


def test_what_is_unresolved_is_found(written, committed):
    paths = [committed / "report" / f"report.{kind}" for kind in ("md", "html")]
    for path, text in zip(paths, written):
        path.write_text(text, encoding="utf-8")
    assert report.problems(*paths) == []
    paths[1].write_text(written[1] + '<img src="https://example.org/x.png"> {{ fact }} <a href="#gone">')
    (committed / "figures" / "pretrained_loss.svg").unlink()
    assert len(report.problems(*paths)) == 6
