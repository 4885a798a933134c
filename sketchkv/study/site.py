"""One static folder that opens from disk: `python -m sketchkv.study.site` (or `make site`) makes `build/site` of the
committed results, of executed notebooks where there are any, and of docstrings. Templates and styles are in `report/`."""

import html
import json
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2
import nbformat
import pandas as pd
import pypandoc
from nbconvert import HTMLExporter

import sketchkv
from sketchkv.study import explore, notebooks, record, sources, store

REPORT = sources.ROOT / "report"
BAR = {
    "index.html": "Report",
    "explorer.html": "Explorer",
    "notebooks/index.html": "Notebooks",
    "api/sketchkv.html": "API",
    "models.html": "Models",
}
WATCHED = [{"name": name, "cap": cap} for cap in (64, 96) for name in explore.CACHES]
COPIED = ("figures/*.svg", "data/*/*.csv", "report/report.[mp]*", "report/*.css", "report/*.svg")
LARGEST = 15_000_000
WIDGET = "application/vnd.jupyter.widget-view+json"


class SiteError(RuntimeError):
    """The site can't be made as it should be; the message says why."""


def build(folder=sources.ROOT / "build" / "site", watched=None):
    """Makes the site in `folder`, which is emptied; watched: the explorer's records, None to compute them.

    Returns its bytes. Raises SiteError for a link that leads nowhere and for more than `LARGEST` bytes.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in COPIED:
        for file in sources.ROOT.glob(pattern):
            target = folder / file.relative_to(sources.ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    _write(folder / "index.html", front((REPORT / "report.html").read_text(encoding="utf-8")))
    _notebooks(folder)
    models = pd.read_csv(sources.ROOT / "data" / "benchmarks" / "models.csv", keep_default_na=False)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in models.outcome.value_counts().items())
    table = f'<p>{counts}.</p><div class="scroll">{models.to_html(index=False, border=0)}</div>'
    _page(folder, "models.html", "Which models work", f"<h1>Which models work</h1>{table}")
    data = {"watched": watched or _watched(), "states": explore.STATES}
    data["points"] = explore.points(record.load_table("baseline_front"))
    filled = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    view = (REPORT / "explore.html").read_text(encoding="utf-8").replace("%DATA%", filled)
    _page(folder, "explorer.html", "Explorer", view)
    _api(folder / "api")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    missing = broken(folder)
    if missing or size > LARGEST:
        raise SiteError(f"{size:,} bytes, at most {LARGEST:,}; links that lead nowhere: {missing[:10]}")
    return size


def front(page):
    """The report as front page: its own page with the site's bar, each notebook that it names a link."""
    style = '<link rel="stylesheet" href="report/bar.css">'
    page = re.sub(r"<body[^>]*>", lambda m: f"{style}{m[0]}{_bar('')}", page, count=1)
    page = re.sub(r'href="(report\.\w+)"', r'href="report/\1"', page)
    return re.sub(
        r'(href|src)="\.\./([^"]*?)(\.ipynb)?"', lambda m: f'{m[1]}="{m[2]}{".html" * bool(m[3])}"', page
    )


def _bar(up):
    links = "".join(f'<a href="{up}{path}">{words}</a>' for path, words in BAR.items())
    return f'<header class="bar"><b>sketchkv</b>{links}</header>'


def _page(folder, path, title, body):
    template = jinja2.Template((REPORT / "site.html.j2").read_text(encoding="utf-8"))
    up = "../" * path.count("/")
    _write(folder / path, template.render(title=title, up=up, bar=_bar(up), body=body))


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _watched():
    points, revision = sources.ROOT / "build" / "site-points", sources.model_revision("embedded")
    found = store.compute("explore", explore.watched, WATCHED, folder=points, revision=revision)
    return [asked | {"cache": asked["name"]} | each for asked, each in zip(WATCHED, found)]


# Notebooks


class _Folded(HTMLExporter):
    """Formulas become MathML, which needs no script from elsewhere."""

    @jinja2.pass_context
    def markdown2html(self, context, source):
        if "$" not in source:
            return super().markdown2html(context, source)
        arguments = ["--mathml", "--wrap=none"]
        return pypandoc.convert_text(source, "html5", format="gfm+tex_math_dollars", extra_args=arguments)


def _notebooks(folder):
    exporter, listed = _Folded(template_name="folded", extra_template_basedirs=[str(REPORT)]), ""
    for path in notebooks.find(sources.ROOT):
        executed = sources.ROOT / "build" / "executed" / path.name
        book = nbformat.read(executed if executed.exists() else path, as_version=4)
        body, _ = exporter.from_notebook_node(_shown(book))
        body = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', body)
        title = book.cells[0].source.partition("\n")[0].lstrip("# ")
        _page(folder, f"notebooks/{path.stem}.html", title, body)
        listed += f'<li><a href="{path.stem}.html">{path.stem}</a>: {html.escape(title)}</li>'
    _page(folder, "notebooks/index.html", "Notebooks", f"<h1>Notebooks</h1><ul>{listed}</ul>")


def _shown(book):
    """The notebook without widgets, which need a kernel, and with figures as the report has them, so that one that was
    not executed shows them, too."""
    for cell in (each for each in book.cells if each.cell_type == "code"):
        names = re.findall(r"""\.figure\(\s*["'](\w+)["']""", cell.source)
        left_out = {WIDGET, "image/png", "text/markdown"} if names else {WIDGET}
        shown = (each for each in cell.outputs if not left_out & {*each.get("data", ())})
        cell.outputs = [each for each in shown if each.get("name") != "stderr"]
        for name in names:
            sidecar = sources.ROOT / "figures" / f"{name}.json"
            if sidecar.exists():
                words = html.escape(sources.read_json(sidecar)["caption"])
                figure = f'<img src="../figures/{name}.svg" alt=""><figcaption>{words}</figcaption>'
                data = {"text/html": f"<figure>{figure}</figure>"}
                cell.outputs.append(nbformat.v4.new_output("display_data", data))
    return book


def _api(folder):
    """Pages of the package's docstrings, the study left out."""
    import pdoc

    for name in sketchkv.__all__:  # loaded when asked for, where pdoc does not look
        setattr(sketchkv, name, getattr(sketchkv, name))
    modules = [f"sketchkv.{file.stem}" for file in (sources.ROOT / "sketchkv").glob("[a-z]*.py")]
    pdoc.render.configure(template_directory=REPORT / "api", show_source=False, search=False)
    pdoc.pdoc("sketchkv", *modules, output_directory=folder)


# Links


def broken(folder):
    """Local links and sources in the pages of `folder` that lead to no file or to no id: sorted list of "page: link"."""
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.html")}
    found = set()
    for path, text in pages.items():
        markup = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)
        for _, link in re.findall(r"""\s(?:href|src)=(["'])(.+?)\1""", markup):
            to = urlsplit(html.unescape(link))
            target = (path.parent / unquote(to.path)).resolve() if to.path else path
            named = f'id="{unquote(to.fragment)}"' in html.unescape(pages.get(target, ""))
            if not to.scheme and not (target.exists() and (named or not to.fragment)):
                found.add(f"{path.name}: {link}")
    return sorted(found)


if __name__ == "__main__":
    try:
        print(f"build/site/index.html: {build() / 1e6:.1f} MB")
    except (SiteError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
