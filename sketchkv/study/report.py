"""Renders the report from `report/template.md.j2` and the results: `report.md` for a repository's page, and through pandoc
`report.html` in one piece and `report.pdf` (Typst). Styles, script and page templates are files in `report/`.

The template's prose holds no number of its own. It asks for them:

    {{ figure("name") }}        picture, how to read it, and where it comes from
    {{ frame("name") }}         a result table, a DataFrame
    {{ word("sink") }}          a word of the glossary, explained on hover

What is missing stops the rendering with the name of the notebook that makes it.
"""

import re
from os.path import relpath
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd
import pypandoc
import typst
import yaml

from sketchkv.study import across, claims, measured, notebooks, record, sources

REPORT = sources.ROOT / "report"
TEMPLATE = REPORT / "template.md.j2"
WARNING = (
    "**Warning: this is a smoke run.** It shows that everything runs. Its numbers come from a few documents and say nothing "
    "about the methods; those of the study are made by `make reproduce`."
)
LAST = "17_report"
# Inputs that are told once, for all figures, or that say nothing.
COMMON = (*record.MAKE_DEFAULTS, "seed", "output", "package", "model_revision", "data_revision")
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # of the text in figures


class ReportError(RuntimeError):
    """The template asks for a result that is not there; the message names the notebook to run."""


class Results:
    """Every result under one root, by name: `facts`, `figures` and `tables` (their sidecars), `runs` (provenance)."""

    def __init__(self, root):
        self.root, self.paths = Path(root), record.Paths(root)
        read = {p.stem: sources.read_json(p) for p in sorted(self.paths.results.glob("*.json"))}
        self.runs = {
            name[4:]: run for name, run in read.items() if name.startswith("run_") and name[4:] != LAST
        }
        self.tables = {p.stem: read[p.stem] for p in sorted(self.paths.results.glob("*.csv"))}
        self.figures = {p.stem: sources.read_json(p) for p in sorted(self.paths.figures.glob("*.json"))}
        facts = (stored["facts"] for name, stored in read.items() if name.startswith("facts_"))
        self.facts = {name: value for found in facts for name, value in found.items()}
        files = [*self.paths.results.glob("*.*"), *self.paths.figures.glob("*.*")]
        self.files = sorted(f for f in files if f.name[0] != "." and f.stem != f"run_{LAST}")

    def frame(self, name):
        """A result table; raises KeyError where there is none."""
        if name not in self.tables:
            raise KeyError(name)
        return pd.read_csv(self.paths.results / f"{name}.csv")

    def missing(self, kind, name):
        made = (n for n in notebooks.find(sources.ROOT) if name in notebooks.makes(n, kind))
        how = next((f"python -m sketchkv.study.run --only {n.stem}" for n in made), "make reproduce")
        return ReportError(f"there is no {kind} {name!r} under {self.root}; run `{how}`")


class Functions:
    """What the template calls; `up` leads from the report to the results' root."""

    def __init__(self, found, up, words):
        self.found, self.up, self.words = found, up, words

    def frame(self, name):
        if name not in self.found.tables:
            raise self.found.missing("table", name)
        return self.found.frame(name)

    def word(self, word, shown=None):
        return f'<abbr title="{self.words[word]}">{shown or word}</abbr>'

    def figure(self, name):
        if name not in self.found.figures:
            raise self.found.missing("figure", name)
        sidecar = self.found.figures[name]
        finding, rest = record.split_caption(sidecar["caption"])
        alt = finding.replace("[", "(").replace("]", ")")
        picture = f"![{alt}]({self.up}/figures/{name}.svg)\n\n{rest}\n\n"
        return f'{picture}<div class="source">\n\n{self._source(sidecar)}\n\n</div>\n'

    def _source(self, sidecar):
        """One line: notebook, tables, the notebook's own parameters, commit, command."""
        given, name = sidecar["inputs"], sidecar["notebook"]
        tables = ", ".join(map(self._table, sidecar["tables"])) or "no table"
        own = [f"{k} {v}" for k, v in given.items() if k not in COMMON and v]  # 0: what the profile says
        own += [f"{k} {given[k]}" for k, v in record.MAKE_DEFAULTS.items() if given[k] != v]
        parameters = f" ({', '.join(own)})" if own else ""
        made = f"commit `{sidecar['commit']}`{', modified' if sidecar['dirty'] else ''}"
        return (
            f"Source: [notebooks/{name}.ipynb]({self.up}/notebooks/{name}.ipynb) from {tables}{parameters}; "
            f"{made}; reproduce with `{sidecar['command']}`"
        )

    def _table(self, name):
        """A link to a table; to what was measured on a GPU beside it, where it is made of that."""
        link = f"[{name}.csv]({self.up}/data/results/{name}.csv)"
        if name not in measured.SOURCES:
            return link
        source = measured.SOURCES[name]
        cards = pd.read_csv(measured.BENCHMARKS / f"{source}.csv", usecols=["card"]).card.unique()
        model = "Gemma 3" if source.startswith(measured.GEMMA.name) else "SmolLM2"
        return (
            f"{link} ({model} on {', '.join(cards)}: [{source}.csv]({self.up}/data/benchmarks/{source}.csv))"
        )


def compose(source, report_folder, template=TEMPLATE):
    """(Markdown, HTML, Typst markup) of the report over the results under `source`, to be written into `report_folder`."""
    found = Results(source)
    if not found.runs:
        raise ReportError(f"there are no results under {found.root}; run `make reproduce`")
    written = [
        _markdown(found, up, template) for up in (Path(relpath(found.root, report_folder)).as_posix(), "")
    ]
    title = next(line[2:] for line in written[0].splitlines() if line.startswith("# "))
    style, script = ((REPORT / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    page = _pandoc(
        written[0],
        "html5",
        "page.html",
        f"--variable=style:{style}",
        f"--variable=script:{script}",
        "--toc",
        "--toc-depth=2",
        f"--metadata=pagetitle:{title}",
    )
    paper = _pandoc(
        written[1],
        "typst",
        "paper.typ",
        f"--lua-filter={REPORT / 'paper.lua'}",
        "--shift-heading-level-by=-1",
    )
    return written[0], page, paper


def _markdown(found, up, template):
    text = Path(template).read_text(encoding="utf-8")
    cited = yaml.safe_load((sources.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    words = yaml.safe_load((REPORT / "words.yml").read_text(encoding="utf-8"))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    calls = Functions(found, up, words)
    functions = {name: getattr(calls, name) for name in ("frame", "word", "figure")}
    gathered = claims.gather(found)
    rendered = environment.from_string(text).render(
        functions,
        **gathered,
        title=claims.title(gathered),
        verdicts=across.verdicts(found),
        up=up,
        figures=found.figures,
        tables=found.tables,
        runs=found.runs,
        words=words,
        cited=cited,
    )
    if any(run["inputs"]["profile"] == "smoke" for run in found.runs.values()):
        rendered = re.sub(r"^# (.*)$", rf"# Smoke run: \1\n\n{WARNING}", rendered, count=1, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def _pandoc(markdown, to, template, *arguments):
    given = ["--standalone", f"--template={REPORT / template}", "--wrap=none", *arguments]
    return pypandoc.convert_text(markdown, to, format="gfm", extra_args=given)


def printed(paper, root):
    """The PDF's bytes, always the same; pictures are found from `root`. Raises RuntimeError with Typst's own message."""
    return typst.compile(paper.encode(), root=str(root), ignore_system_fonts=True, font_paths=[str(_FONTS)])


def render(run, template=TEMPLATE):
    """Writes `report/report.md`, `.html` and `.pdf` under the run's root and returns their paths.

    A notebook opened by hand renders the committed results.
    """
    source = sources.ROOT if run.paths.root == record.INTERACTIVE else run.paths.root
    for path in [*REPORT.glob("[!r]*.*"), *REPORT.glob("report.[cj]s*"), template, *Results(source).files]:
        run.read(path)
    if source != sources.ROOT:
        run.output("report/cache.svg", (REPORT / "cache.svg").read_text(encoding="utf-8"))
    markdown, page, paper = compose(source, run.paths.report, template)
    contents = {"md": markdown, "html": page, "pdf": printed(paper, source)}
    return [run.output(f"report/report.{kind}", content) for kind, content in contents.items()]


def problems(markdown_path, html_path):
    """What is unresolved in a rendered report, as a list of sentences: empty when all is well."""
    markdown, page = (Path(p).read_text(encoding="utf-8") for p in (markdown_path, html_path))
    visible = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    unfilled = [mark for mark in ("{{", "}}", "{%", "{#", "TODO") if mark in markdown or mark in visible]
    outside = re.findall(r'(?:src|<link [^>]*href)="https?:[^"]*"', visible)
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown) + re.findall(
        r'src="(?!https?:)([^"]+)"', visible
    )
    absent = [image for image in images if not (Path(markdown_path).parent / image).exists()]
    identifiers = set(re.findall(r'id="([^"]+)"', page))
    astray = [link for link in re.findall(r'href="#([^"]+)"', visible) if link not in identifiers]
    return (
        [f"unrendered {mark!r}" for mark in unfilled]
        + [f"{reference} would be fetched from elsewhere" for reference in outside]
        + [f"no picture at {image}" for image in absent]
        + [f"no target for #{link}" for link in astray]
    )
