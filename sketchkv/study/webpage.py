"""The report as one web page: Markdown to HTML, with its contents list, styles and script inside."""

import html
import re

from markdown_it import MarkdownIt


def parse(markdown):
    """(parser, tokens) of Markdown, with an `id` for each heading."""
    parser = MarkdownIt("commonmark", {"html": True, "typographer": False}).enable("table")
    tokens, used = parser.parse(markdown), set()
    for heading, inline in zip(tokens, tokens[1:]):
        if heading.type == "heading_open":
            slug = re.sub(r"[^a-z0-9]+", "-", _plain(inline).lower()).strip("-")
            while slug in used:
                slug += "-"
            used.add(slug)
            heading.attrSet("id", slug)
    return parser, tokens


def _plain(inline):
    return "".join(child.content for child in inline.children)


def compose(markdown):
    """One HTML file from Markdown: contents list, styles and script inside."""
    parser, tokens = parse(markdown)
    title = "Report"
    sections: list[tuple] = []  # of the contents list: (link, [links of subsections])
    for heading, inline in zip(tokens, tokens[1:]):
        if heading.type != "heading_open":
            continue
        text = html.escape(_plain(inline))
        link = f'<a href="#{heading.attrs["id"]}">{text}</a>'
        if heading.tag == "h1":
            title = text
        elif heading.tag == "h2":
            sections.append((link, []))
        elif heading.tag == "h3" and sections:
            sections[-1][1].append(f"<li>{link}</li>")
    contents = "".join(
        f"<li><details open><summary>{link}</summary><ul>{''.join(inner)}</ul></details></li>"
        if inner
        else f"<li>{link}</li>"
        for link, inner in sections
    )
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll"><table class="sortable">').replace(
        "</table>\n", "</table></div>\n"
    )
    return _HTML.replace("%TITLE%", title).replace("%CONTENTS%", contents).replace("%BODY%", body)


_HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>%TITLE%</title>
<style>
:root { --ink: #1b1f24; --soft: #59636e; --paper: #fff; --line: #d5dae0; --tint: #f3f5f7; --accent: #0b62b0; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14181c; --line: #39414a; --tint: #1e242a; --accent: #7db8f2; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.6 system-ui, sans-serif; }
.layout { display: grid; grid-template-columns: 15rem minmax(0, 46rem); gap: 3rem; max-width: 68rem; margin: 0 auto;
  padding: 2rem 1.25rem 6rem; }
nav { position: sticky; top: 2rem; align-self: start; max-height: calc(100vh - 4rem); overflow-y: auto;
  font-size: .9rem; }
nav > details > summary { font-weight: 600; }
nav ul { list-style: none; margin: 0; padding: 0; }
nav ul ul { padding-left: 1.1rem; }
nav li { margin: .35rem 0; line-height: 1.35; }
nav summary { cursor: pointer; }
nav a { color: var(--soft); text-decoration: none; }
nav a:hover { color: var(--accent); }
a { color: var(--accent); }
h1 { font-size: 1.9rem; line-height: 1.2; margin-top: 0; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); line-height: 1.25; }
h3 { margin-top: 2rem; }
h1, h2, h3, figure { scroll-margin-top: 1rem; }
code { background: var(--tint); border-radius: 3px; padding: .1em .3em; font-size: .88em; overflow-wrap: anywhere; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
pre code { padding: 0; background: none; }
figure { margin: 2rem 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; padding: .6rem;
  border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .6rem; }
.source, .legend { color: var(--soft); font-size: .82rem; line-height: 1.45; margin: .4rem 0 0; }
.legend { margin-top: 2rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
.results { overflow: auto; max-height: 26rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 60%; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--tint); position: sticky; top: 0; }
.number { text-align: right; }
th, td code { white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
@media (max-width: 60rem) {
  .layout { grid-template-columns: minmax(0, 1fr); gap: 1rem; padding-top: 1rem; }
  nav { position: static; max-height: none; border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; }
}
@media print {
  nav { display: none; }
  .layout { display: block; }
  figure { break-inside: avoid; }
  .results { max-height: none; }
}
</style>
</head>
<body>
<div class="layout">
<nav aria-label="Contents"><details open><summary>Contents</summary><ul>%CONTENTS%</ul></details></nav>
<main>
%BODY%
</main>
</div>
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.innerHTML = `<button type="button">${head.innerHTML}</button>`;
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].textContent.trim();
      const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      const ordered = (a, b) => (a && b ? (down ? compare(b, a) : compare(a, b)) : (a === "") - (b === ""));
      body.append(...[...body.rows].sort((p, q) => ordered(value(p), value(q))));
    });
  });
}
</script>
</body>
</html>
"""
