"""One figure style: seaborn, colour-blind-safe, readable at half the width of a page, the same bytes every time."""

import io
import re
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import rc_context, rcdefaults, rcParams

PALETTE = sns.color_palette("colorblind").as_hex()
SIZE = (7.0, 4.4)  # inches: one size for all, whose smallest type is 8 pixels high on a phone
FONTS = ["DejaVu Sans", "Verdana"]  # the second is as wide, where a reader lacks that of matplotlib
HEAVY = 300_000  # bytes of an SVG above which its points and lines become a picture inside it

# A method keeps its colour (an index into PALETTE) and marker in every figure: one colour a family, one marker each.
METHODS = {
    "compact": (0, "*"),
    "streaming": (1, "D"),
    "streaming_int4": (1, "s"),
    "window": (1, "^"),
    "recall": (2, "*"),
    "recall_alone": (9, "*"),
    "sketch": (3, "o"),
    "sketch_small": (3, ">"),
    "sketch_int4": (3, "p"),
    "sketch_summary": (3, "P"),
    "decayed": (4, ">"),
    "decayed_int8": (4, "D"),
    "decayed_int4": (4, "<"),
    "decayed_summary": (4, "^"),
    "plain_sums": (4, "h"),
    "h2o": (5, "s"),
    "lru": (5, "P"),
    "int4": (5, "v"),
    "kivi2": (5, "p"),
    "key_norm": (6, "X"),
    "kivi4": (6, "v"),
    "expected": (6, "P"),
    "tova": (7, "<"),
    "int8": (7, "s"),
    "random": (7, "v"),
    "oracle": (8, "*"),
    "kivi8": (8, "X"),
    "snapkv": (9, "h"),
}
FULL_CACHE = {"color": "#333333", "marker": "o"}  # the reference, in no competitor's colour


def use_style():
    """Sets the style for every figure drawn afterwards, whatever the user's own matplotlibrc says."""
    rcdefaults()
    np.random.seed(0)  # seaborn's jitter draws from numpy's global generator
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=PALETTE,
        font_scale=1.15,
        rc={
            "figure.figsize": SIZE,
            "figure.dpi": 100,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "grid.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "figure.labelsize": "medium",
            "legend.frameon": False,
            "lines.linewidth": 2.0,
            "lines.markersize": 7,
            "image.cmap": "cividis",
            "font.sans-serif": FONTS,
        },
    )


def method_style(name):
    """{"color", "marker"} of a method: the same for the same name in every figure, whatever else is drawn there."""
    if name == "full":
        return dict(FULL_CACHE)
    colour, marker = METHODS[name]
    return {"color": PALETTE[colour], "marker": marker}


def head(fig, finding):
    """Draws the finding as the figure's title: left, as wide as the figure, above all else."""
    size = rcParams["font.size"] * 1.1
    letters = int(72 * fig.get_figwidth() / (0.6 * size))
    words = textwrap.fill(finding.strip().rstrip("."), letters)
    fig.suptitle(words, x=0.01, ha="left", fontsize=size, fontweight="bold")


def mark(fig, words):
    """Writes `words` into the lower right corner, below all else."""
    fig.text(1, -0.01, words, ha="right", va="top", color="#b22222", fontsize=12)


def render(fig, name):
    """The SVG of a figure, bytes: its text is text, to be searched and read aloud; free of dates, versions and random ids."""
    svg = _draw(fig, name)
    if len(svg) > HEAVY:
        for artist in (artist for ax in fig.axes for artist in (*ax.collections, *ax.lines)):
            artist.set_rasterized(True)
        svg = _draw(fig, name)
    return svg.encode()


def _draw(fig, name):
    file = io.StringIO()
    absent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        fig.savefig(file, format="svg", bbox_inches="tight", metadata=absent)
    svg = re.sub(r'<g id="[^"]*">', "<g>", re.sub(r"\n\s+", "\n", file.getvalue()))
    # A hundredth of a point is enough for any coordinate.
    return re.sub(r'(?<= )(?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)


def show(fig, words=""):
    """Shows the figure below the cell, once, `words` (Markdown) below it, and closes it; only closes it outside a notebook."""
    from IPython import get_ipython
    from IPython.display import Markdown, display

    if get_ipython() is not None:
        display(fig, *[Markdown(words)] * bool(words))
    plt.close(fig)
