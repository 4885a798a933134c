"""Renders the report from `report/template.md.j2` and the results: `report.md` with links, `report.html` in one piece,
and `report.pdf`.

The template's prose holds no number of its own. It asks for them:

    {{ fact("name", ".2f") }}          one number
    {{ figure("name") }}               picture, caption, and where it comes from
    {{ table("name", rows=10) }}       a result table; `rows` and `columns` show less of it, and long ones are cut anyway

What is missing stops the rendering with the name of the notebook that makes it.
"""

import html
import os
import re
from pathlib import Path

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

from sketchkv.study import notebooks, pdf, record, sources, webpage

TEMPLATE = sources.ROOT / "report" / "template.md.j2"
WARNING = (
    "**Warning: this is a smoke run.** It shows that everything runs. Its numbers come from a few documents and say nothing "
    "about the methods; those of the study are made by `make reproduce`."
)
LARGEST = 3_000_000  # bytes of report.html, whose pictures lie beside it


class ReportError(RuntimeError):
    """The template asks for a result that is not there; the message names the notebook to run."""


class Results:
    """Every result under one root, by name: `facts`, `figures` and `tables` (their sidecars), `runs` (provenance)."""

    def __init__(self, root):
        self.root, self.paths = Path(root), record.Paths(root)
        finished = sorted(self.paths.results.glob("run_*.json"))
        self.runs = {p.stem.removeprefix("run_"): sources.read_json(p) for p in finished}
        self.figures = {p.stem: sources.read_json(p) for p in sorted(self.paths.figures.glob("*.json"))}
        self.tables = {
            p.stem: sources.read_json(p.with_suffix(".json")) for p in self.paths.results.glob("*.csv")
        }
        self.facts: dict[str, object] = {}
        owners: dict[str, str] = {}
        for path in sorted(self.paths.results.glob("facts_*.json")):
            stored = sources.read_json(path)
            for name, value in stored["facts"].items():
                if name in self.facts:
                    raise ReportError(
                        f"fact {name!r} is written by both {owners[name]} and {stored['notebook']}"
                    )
                self.facts[name], owners[name] = value, stored["notebook"]
        files = [*self.paths.results.glob("*.*"), *self.paths.figures.glob("*.*")]
        # Hidden files are temporary; the provenance of the report itself is written after it has been rendered.
        self.files = sorted(f for f in files if not f.name.startswith(".") and f.name != "run_08_report.json")

    def missing(self, kind, name):
        for notebook in notebooks.find(sources.ROOT):
            if name in notebooks.makes(notebook, kind):
                how = (
                    f"notebooks/{notebook.name} makes it: python -m sketchkv.study.run --only {notebook.stem}"
                )
                return ReportError(f"there is no {kind} {name!r} under {self.root}; {how}")
        return ReportError(
            f"there is no {kind} {name!r} under {self.root}, and no notebook makes one of that name"
        )


class Renderer:
    """The functions that the template calls, for Markdown; `link` leads from the report to the results' root."""

    # Of a table; the rest of it is in its file.
    most_rows = 12
    most_columns: int | None = None

    def __init__(self, found, link):
        self.found, self.link = found, link

    def fact(self, name, spec=""):
        if name not in self.found.facts:
            raise self.found.missing("fact", name)
        return format(self.found.facts[name], spec)

    def has_fact(self, name):
        return name in self.found.facts

    def finding(self, name):
        """The first sentence of a figure's caption, which states what it shows."""
        return re.split(r"(?<=[.!?])\s", self._sidecar("figure", name)["caption"], maxsplit=1)[0]

    def figure(self, name):
        sidecar = self._sidecar("figure", name)
        alt = self.finding(name).replace("[", "(").replace("]", ")")
        return (
            f'<a id="figure-{name}"></a>\n![{alt}]({self.link}/figures/{name}.svg)\n\n'
            f"**{name}.** {sidecar['caption']}\n\n{self._source(sidecar)}\n"
        )

    def table(self, name, rows=None, columns=None):
        frame, numeric, legend = self._frame(name, rows, columns)
        cells = frame.map(lambda value: value.replace("|", "\\|").replace("\n", " "))
        rules = [" ---: |" if column in numeric else " --- |" for column in frame.columns]
        lines = ["| " + " | ".join(frame.columns) + " |", "|" + "".join(rules)]
        lines += ["| " + " | ".join(row) + " |" for row in cells.itertuples(index=False)]
        return "\n".join([legend, "", *lines, ""])

    def functions(self):
        return {name: getattr(self, name) for name in ("fact", "has_fact", "finding", "figure", "table")}

    def _sidecar(self, kind, name):
        sidecars = self.found.figures if kind == "figure" else self.found.tables
        if name not in sidecars:
            raise self.found.missing(kind, name)
        return sidecars[name]

    def _source(self, sidecar):
        """One line: notebook, inputs, commit, command."""
        given = sidecar["inputs"]
        tables = ", ".join(f"`{name}.csv`" for name in sidecar["tables"]) or "no table"
        knobs = ", ".join(
            f"{k} {v}" for k, v in given.items() if k not in ("output", "package") and v is not None
        )
        return (
            f"*Source: `notebooks/{sidecar['notebook']}.ipynb` from {tables} ({knobs}); commit `{sidecar['commit']}`"
            f"{', modified' if sidecar['dirty'] else ''}; again with* `{sidecar['command']}`"
        )

    def _frame(self, name, rows, columns):
        """(the part of a table that is shown, as text; its numeric columns; what the columns mean, in Markdown)."""
        sidecar = self._sidecar("table", name)
        frame = pd.read_csv(self.found.paths.results / f"{name}.csv")
        unknown = set(columns or ()) - set(frame.columns)
        if unknown:
            has = ", ".join(frame.columns)
            raise ReportError(f"table {name!r} has no column {', '.join(sorted(unknown))}; it has: {has}")
        asked = frame[list(columns)] if columns else frame
        shown = asked.iloc[: rows or self.most_rows, : self.most_columns]
        extent = (
            f"{len(frame)} rows"
            if len(shown) == len(frame)
            else f"The first {len(shown)} of {len(frame)} rows"
        )
        if left_out := len(asked.columns) - len(shown.columns):
            extent += f", without {left_out} columns"
        meanings = "; ".join(f"`{column}`: {sidecar['columns'][column]}" for column in shown.columns)
        legend = f"**{name}.** {extent}, from `data/results/{name}.csv`. Columns: {meanings}."
        return shown.map(_shown), set(shown.select_dtypes("number").columns), legend


class HtmlRenderer(Renderer):
    """The same functions for HTML, with tables that sort."""

    def __init__(self, found, link):
        super().__init__(found, link)
        self.inline = MarkdownIt("commonmark", {"html": False}).renderInline

    def figure(self, name):
        sidecar = self._sidecar("figure", name)
        # One line: a blank one would end the block of HTML.
        return (
            f'<figure id="figure-{name}"><img alt="{html.escape(self.finding(name))}" '
            f'src="{self.link}/figures/{name}.svg">'
            f"<figcaption>{self.inline(f'**{name}.** ' + sidecar['caption'])}"
            f'<p class="source">{self.inline(self._source(sidecar))}</p></figcaption></figure>\n'
        )

    def table(self, name, rows=None, columns=None):
        frame, numeric, legend = self._frame(name, rows, columns)
        meanings, number = self._sidecar("table", name)["columns"], dict.fromkeys(numeric, ' class="number"')
        head = "".join(
            f'<th scope="col" title="{html.escape(meanings[c])}"{number.get(c, "")}>{html.escape(c)}</th>'
            for c in frame.columns
        )
        classes = [number.get(c, "") for c in frame.columns]
        body = "".join(
            "<tr>"
            + "".join(f"<td{kind}>{html.escape(value)}</td>" for kind, value in zip(classes, row))
            + "</tr>"
            for row in frame.itertuples(index=False)
        )
        return (
            f'<p class="legend">{self.inline(legend)}</p>'
            f'<div class="scroll results" tabindex="0" role="region" aria-label="Table {name}"><table class="sortable"><thead>'
            f"<tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
        )


class TypstRenderer(Renderer):
    """The same functions for the PDF: blocks of Typst markup, whose pictures are found from the results' root."""

    most_rows, most_columns = 5, 12

    def figure(self, name):
        sidecar = self._sidecar("figure", name)
        quoted = ", ".join(pdf.quote(text) for text in (f"/figures/{name}.svg", name, self.finding(name)))
        caption, source = (
            pdf.inline(text) for text in (f"**{name}.** {sidecar['caption']}", self._source(sidecar))
        )
        return f"```{{=typst}}\n#picture({quoted}, [{caption}], [{source}])\n```\n"

    def table(self, name, rows=None, columns=None):
        frame, numeric, legend = self._frame(name, rows, columns)
        size = 8.5 if len(frame.columns) <= 6 else 7 if len(frame.columns) <= 9 else 6
        # Left to itself Typst would narrow numbers and text alike, and break the numbers.
        needed = [min(max(map(len, [*c.split("_"), *frame[c]])), 20) + 1 for c in frame.columns]
        widths = "".join("auto, " if size > 7 else f"{n}fr, " for n in needed)
        aligned = "".join("right, " if c in numeric else "left, " for c in frame.columns)
        head = "".join(f"{pdf.quote(pdf.breakable(c))}, " for c in frame.columns)
        text = frame.apply(lambda column: column if column.name in numeric else column.map(pdf.breakable))
        body = "".join(f"{pdf.quote(value)}, " for value in text.to_numpy().ravel())
        cells = f"({widths}), ({aligned}), ({head}), {body}"
        return f"```{{=typst}}\n#results({size}pt, [{pdf.inline(legend)}], {cells})\n```\n"


def _shown(value):
    """A cell of a table as text."""
    if not isinstance(value, float):
        return str(value)
    return "" if pd.isna(value) else f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _notebooks(found):
    """What the template iterates over: the finished notebooks, in order, with title, introduction and results."""
    listed = []
    for name, run in found.runs.items():
        path = sources.ROOT / "notebooks" / f"{name}.ipynb"
        cells = notebooks.cells(path) if path.exists() else []
        text = next((cell.source for cell in cells if cell.cell_type == "markdown"), "").strip()
        title, _, rest = text.partition("\n")
        made = [Path(output) for output in run["outputs"]]
        listed.append(
            {
                "name": name,
                "title": title.lstrip("# ") or name,
                "introduction": rest.strip(),
                "figures": [p.stem for p in made if p.suffix == ".svg" and p.parent.name == "figures"],
                "tables": [p.stem for p in made if p.suffix == ".csv"],
                "run": run,
            }
        )
    return [notebook for notebook in listed if notebook["name"] != "08_report"]


def compose(source, report_folder, template=TEMPLATE):
    """(Markdown, HTML, Typst markup) of the report over the results under `source`, to be written into `report_folder`."""
    found = Results(source)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = Path(template).read_text(encoding="utf-8")
    context = {
        "notebooks": _notebooks(found),
        "facts": found.facts,
        "figures": found.figures,
        "tables": found.tables,
    }
    if not context["notebooks"]:
        raise ReportError(f"there are no results under {found.root}; run `make reproduce`")
    link = Path(os.path.relpath(found.root, report_folder)).as_posix()
    try:
        written = [
            environment.from_string(text).render(**context, **renderer.functions())
            for renderer in (Renderer(found, link), HtmlRenderer(found, link), TypstRenderer(found, link))
        ]
    except jinja2.UndefinedError as error:
        if absent := re.search(r"no attribute '(\w+)'", str(error)):  # the template reads `facts.NAME`
            raise found.missing("fact", absent[1]) from error
        raise
    if any(run["inputs"]["profile"] == "smoke" for run in found.runs.values()):
        written = [
            re.sub(r"^# (.*)$", rf"# Smoke run: \1\n\n{WARNING}", t, count=1, flags=re.M) for t in written
        ]
    markdown, page, paper = written
    return (
        re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n",
        webpage.compose(page),
        pdf.typeset(webpage.parse(paper)[1]),
    )


def render(run, template=TEMPLATE):
    """Writes `report/report.md`, `.html` and `.pdf` under the run's root and returns their paths.

    A notebook opened by hand renders the committed results.
    """
    source = sources.ROOT if run.paths.root == record.INTERACTIVE else run.paths.root
    for path in [template, *Results(source).files]:
        run.read(path)
    markdown, page, paper = compose(source, run.paths.report, template)
    contents = {"md": markdown, "html": page, "pdf": pdf.compile(paper, source)}
    return [run.output(f"report/report.{kind}", content) for kind, content in contents.items()]


def problems(markdown_path, html_path):
    """What is unresolved in a rendered report, as a list of sentences: empty when all is well."""
    markdown, page = (Path(p).read_text(encoding="utf-8") for p in (markdown_path, html_path))
    visible = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", page, flags=re.DOTALL)
    found = [
        f"unrendered {mark!r}"
        for mark in ("{{", "}}", "{%", "{#", "TODO")
        if mark in markdown or mark in visible
    ]
    outside = re.findall(r'(?:src|<link [^>]*href)="https?:[^"]*"', visible)
    found += [f"{reference} would be fetched from elsewhere" for reference in outside]
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", markdown) + re.findall(
        r'src="(?!https?:)([^"]+)"', visible
    )
    found += [
        f"no picture at {image}" for image in images if not (Path(markdown_path).parent / image).exists()
    ]
    identifiers = set(re.findall(r'id="([^"]+)"', page))
    found += [
        f"no target for #{link}"
        for link in re.findall(r'href="#([^"]+)"', visible)
        if link not in identifiers
    ]
    if len(page) > LARGEST:
        found.append(
            f"{Path(html_path).name} is {len(page) / 1e6:.0f} MB large: draw fewer points, or save figures smaller"
        )
    return found
