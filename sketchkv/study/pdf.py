"""Markdown to PDF through Typst: `typeset` writes Typst's markup, `compile` the file; both always give the same bytes.

A fenced block whose language is `{=typst}` is passed on as it is.
"""

import re
from pathlib import Path

import matplotlib
import typst
from markdown_it import MarkdownIt

_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # of the text in figures

_MARKUP = {
    "paragraph_open": "\n",
    "paragraph_close": "\n",
    "heading_close": "]\n",
    "softbreak": " ",
    "hardbreak": "#linebreak()",
    "strong_open": "#strong[",
    "strong_close": "]",
    "em_open": "#emph[",
    "em_close": "]",
    "link_close": "]",
    "bullet_list_open": "\n#list(",
    "bullet_list_close": ")\n",
    "ordered_list_open": "\n#enum(",
    "ordered_list_close": ")\n",
    "list_item_open": "[",
    "list_item_close": "],",
    "blockquote_open": "\n#quote(block: true)[",
    "blockquote_close": "]\n",
    "hr": "\n#line(length: 100%)\n",
    "table_close": ")\n",
    "thead_open": "table.header(",
    "thead_close": "),",
    "tbody_open": "",
    "tbody_close": "",
    "tr_open": "",
    "tr_close": "",
    "th_open": "[",
    "th_close": "],",
    "td_open": "[",
    "td_close": "],",
}


def quote(text):
    """A Typst string: whatever `text` holds, none of it is read as markup."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def inline(markdown):
    """Typst markup of one line of Markdown."""
    return _markup(MarkdownIt("commonmark", {"html": False}).parseInline(markdown))


def typeset(tokens):
    """Typst markup of markdown-it's `tokens`, whose headings carry an `id`; the level-1 heading becomes the title.

    Raises ValueError for what has no place on paper, such as HTML.
    """
    title = next((text.content for head, text in zip(tokens, tokens[1:]) if head.tag == "h1"), "Report")
    return f"{_STYLE}\n#show: report.with({quote(title)})\n{_markup(tokens)}"


def compile(markup, root):
    """The PDF's bytes; pictures are named by their paths from `root`. Raises RuntimeError with Typst's own message."""
    return typst.compile(markup.encode(), root=str(root), ignore_system_fonts=True, font_paths=[str(_FONTS)])


def _markup(tokens):
    return "".join(_token(token, tokens[index:]) for index, token in enumerate(tokens))


def _token(token, following):
    if token.type == "inline":
        return _markup(token.children)
    if token.type == "text":
        return f"#{quote(token.content)}" if token.content else ""
    if token.type == "code_inline":
        return f"#raw({quote(token.content)})"
    if token.type in ("fence", "code_block"):
        return (
            f"\n{token.content}\n"
            if token.info == "{=typst}"
            else f"\n#raw(block: true, {quote(token.content)})\n"
        )
    if token.type == "heading_open":
        level = int(token.tag[1]) - 1  # level 0 is the title
        return f"\n#marked({level}, label({quote(token.attrs['id'])}))["
    if token.type == "link_open":
        href = token.attrs["href"]
        return f"#link({f'label({quote(href[1:])})' if href.startswith('#') else quote(href)})["
    if token.type == "table_open":
        head = following[: [t.type for t in following].index("thead_close")]
        return f"\n#table(columns: {sum(t.type == 'th_open' for t in head)}, "
    if token.type in ("paragraph_open", "paragraph_close") and token.hidden:
        return ""
    if token.type not in _MARKUP:
        raise ValueError(f"the PDF has no markup for {token.type} {token.content!r}")
    return _MARKUP[token.type]


def breakable(text):
    """`text` with places to break at, for the narrow cells of a table: after each mark, and in long words."""
    return re.sub(r"([\W_]|[^\W_]{12})(?=.)", "\\1\u200b", text)


_STYLE = r"""
#let small(body) = block(above: 0.7em, text(7.5pt, fill: luma(90), par(justify: false, body)))
#let picture(path, name, alt, caption, source) = [
  #let below = caption + small(source)
  #figure(
    context {
      let (width, height) = measure(image(path))
      let room = 240mm - measure(width: 166mm, text(9.5pt, below)).height  // of the page's 249mm, the rest lies between
      image(path, alt: alt, width: calc.min(0.6 * width, 166mm, room * (width / height)))
    },
    caption: below,
  )
  #label("figure-" + name)
]
#let results(size, legend, widths, aligned, head, ..cells) = block(above: 2em, breakable: false, {
  small(legend)
  set text(size)
  table(columns: widths, align: aligned, inset: (x: 0.35em, y: 0.3em), table.header(..head), ..cells)
})
#let marked(level, name, body) = if level > 0 [#heading(level: level, body) #name]
#let report(title, body) = {
  set document(title: title, date: none)
  set page(paper: "a4", margin: (x: 22mm, y: 24mm), numbering: "1 / 1")
  set text(font: "Libertinus Serif", size: 10.5pt, lang: "en")
  set par(justify: true)
  set table(stroke: (_, y) => (bottom: if y == 0 { 0.6pt } else { 0.3pt + luma(200) }), inset: (x: 0.4em, y: 0.35em))
  set table(align: left)
  set enum(spacing: 0.9em)
  set list(spacing: 0.8em)
  set figure(numbering: none, supplement: none)
  show table: set par(justify: false)
  show table: set text(9pt)
  show table.cell.where(y: 0): strong
  show figure: set block(above: 1.8em, below: 1.8em)
  show figure.caption: it => align(left, text(9.5pt, it.body))
  show raw: set text(font: "DejaVu Sans Mono", size: 0.95em)
  show raw.where(block: true): it => block(fill: luma(245), inset: 0.6em, width: 100%, it)
  show link: set text(fill: rgb("#0b5394"))
  show heading: set block(above: 1.7em, below: 0.9em, sticky: true)
  show heading.where(level: 1): set text(15pt)
  show heading.where(level: 2): set text(12pt)
  block(below: 1.5em, text(19pt, weight: "bold", par(justify: false, title)))
  {
    show outline.entry.where(level: 1): set block(above: 0.9em)
    show link: set text(fill: black)
    outline(depth: 2, indent: 1.2em)
  }
  body
}
"""
