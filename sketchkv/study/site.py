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
from nbconvert import HTMLExporter

import sketchkv
from sketchkv.study import explore, notebooks, record, sources, store
from sketchkv.study.results import load_table

REPORT = sources.ROOT / "report"
BAR = {
    "index.html": "Report",
    "explorer.html": "Explorer",
    "notebooks/index.html": "Notebooks",
    "api/sketchkv.html": "API",
    "models.html": "Models",
}
WATCHED = [{"name": name, "cap": cap} for cap in (64, 96) for name in explore.CACHES]
WIDGET = "application/vnd.jupyter.widget-view+json"


class SiteError(RuntimeError):
    """The site can't be made as it should be; the message says why."""


def build(folder=sources.ROOT / "build" / "site", watched=None):
    """Makes the site in `folder`, which is emptied; watched: the explorer's records, None to compute them.

    Raises SiteError for a link of the site that leads nowhere.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for part, pattern in (("figures", "*.svg"), ("data/results", "*.csv"), ("data/benchmarks", "*.csv")):
        (folder / part).mkdir(parents=True)
        for file in (sources.ROOT / part).glob(pattern):
            shutil.copy(file, folder / part)
    for name in ("report.md", "report.pdf", "site.css", "explore.css"):
        shutil.copy(REPORT / name, folder)
    _write(folder / "index.html", front((REPORT / "report.html").read_text(encoding="utf-8")))
    _notebooks(folder)
    models = pd.read_csv(sources.ROOT / "data" / "benchmarks" / "models.csv").fillna("")
    table = f'<div class="scroll">{models.to_html(index=False, border=0)}</div>'
    _page(folder, "models.html", "Which models work", f"<h1>Which models work</h1>{_counts(models)}{table}")
    data = {"watched": watched or _watched(), "states": explore.STATES}
    data["points"] = explore.points(load_table("baseline_front"))
    view = (REPORT / "explore.html").read_text(encoding="utf-8")
    style = '<link rel="stylesheet" href="explore.css">'
    filled = view.replace("%DATA%", json.dumps(data, separators=(",", ":")).replace("</", "<\\/"))
    _page(folder, "explorer.html", "Explorer", f"{style}<h1>Explorer</h1>{filled}")
    _api(folder / "api")
    if missing := broken(folder):
        raise SiteError(f"links that lead nowhere: {', '.join(missing[:10])}")
    return folder


def front(page):
    """The report as front page: its own page with the site's bar, each notebook that it names a link."""
    style = re.search(r"/\* bar \*/.*?/\* \*/", (REPORT / "site.css").read_text(encoding="utf-8"), re.S)[0]
    page = re.sub(
        r"(<body[^>]*>)", lambda found: f"<style>{style}</style>{found[0]}{_bar('')}", page, count=1
    )
    page = re.sub(
        r"<code>(notebooks/\w+)\.ipynb</code>", r'<a href="\1.html"><code>\1.ipynb</code></a>', page
    )
    return re.sub(
        r'href="\.\./([^"]*?)(\.ipynb)?"', lambda m: f'href="{m[1]}{".html" if m[2] else ""}"', page
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


def _counts(models):
    counted = ", ".join(f"{count} {outcome}" for outcome, count in models.outcome.value_counts().items())
    return f"<p>{len(models)} classes and variants: {html.escape(counted)}.</p>"


def _watched():
    points = sources.ROOT / "build" / "site-points"
    found = store.compute(
        "explore", explore.watched, WATCHED, folder=points, revision=sources.model_revision("embedded")
    )
    return [{"cache": asked["name"], "cap": asked["cap"], **each} for asked, each in zip(WATCHED, found)]


# Notebooks


def _notebooks(folder):
    exporter = HTMLExporter(template_name="folded", extra_template_basedirs=[str(REPORT)], embed_images=False)
    listed = []
    for path in notebooks.find(sources.ROOT):
        executed = sources.ROOT / "build" / "executed" / path.name
        there = executed.exists()
        book = nbformat.read(executed if there else path, as_version=4)
        made = (
            ""
            if there
            else '<p class="note">Not executed here: its figures are those of the committed results.</p>'
        )
        body, _ = exporter.from_notebook_node(_shown(book))
        body = re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', body)
        title = re.search(r"^# (.*)", book.cells[0].source)[1]
        _page(folder, f"notebooks/{path.stem}.html", title, made + body)
        listed.append(f'<li><a href="{path.stem}.html">{path.stem}</a>: {html.escape(title)}</li>')
    _page(folder, "notebooks/index.html", "Notebooks", f"<h1>Notebooks</h1><ul>{''.join(listed)}</ul>")


def _shown(book):
    """The notebook without widgets, which need a kernel, and with figures as the report has them."""
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        names = re.findall(r"""\.figure\(\s*["'](\w+)["']""", cell.source)
        left_out = {WIDGET} | ({"image/png"} if names else set())
        cell.outputs = [
            each
            for each in cell.outputs
            if not left_out & {*each.get("data", ())} and each.get("name") != "stderr"
        ]
        for name in names:
            if (sources.ROOT / "figures" / f"{name}.svg").exists():
                words = html.escape(
                    sources.read_json(record.Paths(sources.ROOT).figures / f"{name}.json")["caption"]
                )
                figure = f'<figure><img src="../figures/{name}.svg" alt=""><figcaption>{words}</figcaption></figure>'
                cell.outputs.append(nbformat.v4.new_output("display_data", {"text/html": figure}))
    return book


def _api(folder):
    """Pages of the package's docstrings, the study left out."""
    import pdoc

    for name in sketchkv.__all__:  # loaded when asked for, where pdoc does not look
        setattr(sketchkv, name, getattr(sketchkv, name))
    modules = [f"sketchkv.{file.stem}" for file in (sources.ROOT / "sketchkv").glob("[a-z]*.py")]
    pdoc.render.configure(
        docformat="markdown", template_directory=REPORT / "api", show_source=False, search=False
    )
    pdoc.pdoc("sketchkv", *modules, output_directory=folder)


# Links


def broken(folder):
    """Local links and sources in the pages of `folder` that lead to no file or to no id: sorted list of "page: link"."""
    pages = {path: path.read_text(encoding="utf-8") for path in Path(folder).rglob("*.html")}
    found = set()
    for path, text in pages.items():
        markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
        for _, link in re.findall(r"""\s(?:href|src)=(["'])(.+?)\1""", markup):
            parts = urlsplit(html.unescape(link))
            if parts.scheme or parts.netloc:
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            if not target.exists() or (
                parts.fragment
                and target in pages
                and f'id="{unquote(parts.fragment)}"' not in html.unescape(pages[target])
            ):
                found.add(f"{path.relative_to(folder)}: {link}")
    return sorted(found)


def main():
    try:
        folder = build()
    except (SiteError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder / 'index.html'}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
