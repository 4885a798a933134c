"""How the cache works, drawn: a strip of tokens as boxes for the full cache and for two bounded ones, as an SVG."""

from html import escape

TOKENS = "Code 417 . Rain fell , and we read . Code ?".split()
WIDTH, BOX, HEIGHT, LEFT = 360, 29, 22, 6
COLORS = {
    "kept": ("#cfe3f7", "#1b1f24"),
    "sink": ("#f7d9a8", "#1b1f24"),
    "recent": ("#d5ecd0", "#1b1f24"),
    "evicted": ("#f3f3f3", "#9a9a9a"),
    "summary": ("#c9b8e8", "#1b1f24"),
    "recalled": ("#f5b8b0", "#1b1f24"),
}
# Each row: what it shows, and a letter a token: f(ull), s(ink), k(ept), e(victed), r(ecent), a(sked for, and recalled).
ROWS = (
    ("Full cache: a key and a value of every token", "kkkkkkkkkkkk"),
    ("compact: few tokens in few bits, one slot for the rest", "seekeekeerrr"),
    ("recall: the query asks an index of all keys", "saaeeeeeerrr"),
)
LETTERS = {"k": "kept", "s": "sink", "e": "evicted", "r": "recent", "a": "recalled"}


def strip():
    """The drawing: SVG text, the same every time."""
    parts, top = [], 4
    for words, kinds in ROWS:
        parts.append(_text(LEFT, top + 11, words, "#1b1f24", "start", bold=True))
        for place, (token, letter) in enumerate(zip(TOKENS, kinds)):
            parts.append(_box(LEFT + place * BOX, top + 17, token, LETTERS[letter]))
        top += 17 + HEIGHT
        if "e" in kinds and "a" not in kinds:
            slot = LEFT + 5 * BOX
            for place in (number for number, letter in enumerate(kinds) if letter == "e"):
                x = LEFT + (place + 0.5) * BOX
                ends = f"M{x:g} {top} Q{x:g} {top + 13} {slot + BOX:g} {top + 18}"
                parts.append(f'<path d="{ends}" fill="none" stroke="#8a6fc0"/>')
            parts.append(_box(slot, top + 18, "their mean", "summary", 2 * BOX))
            top += 18 + HEIGHT
        top += 12
    for number, kind in enumerate(COLORS):
        x, y = LEFT + number % 3 * 115, top + number // 3 * 19
        parts.append(_box(x, y, "", kind, 14, 14))
        parts.append(_text(x + 19, y + 11, LEGEND[kind], "#1b1f24", "start"))
    alt = "Three caches of twelve tokens: " + "; ".join(words for words, _ in ROWS)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 38}" width="{WIDTH * 2}" role="img" '
        f'aria-label="{escape(alt)}">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


LEGEND = {
    "kept": "kept by its score",
    "sink": "sink: the first",
    "recent": "recent window",
    "evicted": "evicted",
    "summary": "summary slot",
    "recalled": "recalled by a query",
}


def _box(x, y, words, kind, width=BOX, height=HEIGHT):
    fill, ink = COLORS[kind]
    dashed = ' stroke-dasharray="2 2"' if kind == "evicted" else ""
    shape = f'<rect x="{x + 1:g}" y="{y}" width="{width - 2:g}" height="{height}" rx="3" fill="{fill}" stroke="#8c959f"{dashed}/>'
    return shape + (_text(x + width / 2, y + height / 2 + 3.5, words, ink, "middle") if words else "")


def _text(x, y, words, color, anchor, bold=False):
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}"{weight} '
        f"style=\"font: {'bold ' * bold}9.5px 'DejaVu Sans', Verdana, sans-serif\">{escape(words)}</text>"
    )
