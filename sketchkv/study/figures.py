"""One figure style: seaborn, colour-blind-safe, readable at half the width of a page, the same bytes every time."""

import io
import zlib

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib import rc_context, rcdefaults

PALETTE = sns.color_palette("colorblind").as_hex()
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*")
HALF = (5.2, 3.6)  # inches: a figure that shares a row
FULL = (10.4, 4.2)  # inches: panels side by side

# Seaborn's own error bars are a bootstrap without a seed: sns.lineplot(..., **figures.ERRORBAR)
ERRORBAR = {"errorbar": ("ci", 95), "n_boot": 2000, "seed": 0}

# A method keeps its colour and marker in every figure. The list only grows at its end.
METHODS = (
    "sketch", "h2o", "window", "streaming", "random", "lru", "key_norm", "tova", "decayed", "snapkv",
    "position", "oracle", "int8", "int4", "aggregate", "topk", "lsh", "token",
    "decayed_int4", "sketch_small", "sketch_int4", "h2o_half", "sketch_summary", "streaming_int4", "decayed_summary",
    "decayed_int8", "kivi4", "kivi2", "kivi8", "compact",
)  # fmt: skip
FULL_CACHE = {"color": "#333333", "marker": "o"}  # the reference, in no competitor's colour


def use_style():
    """Sets the style for every figure drawn afterwards, whatever the user's own matplotlibrc says."""
    rcdefaults()
    np.random.seed(0)  # seaborn's jitter draws from numpy's global generator
    sns.set_theme(
        context="notebook", style="ticks", palette=PALETTE, font_scale=1.15,
        rc={
            "figure.figsize": HALF, "figure.dpi": 100, "savefig.dpi": 200, "figure.constrained_layout.use": True,
            "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.8, "axes.spines.top": False,
            "axes.spines.right": False, "axes.titlesize": "medium", "legend.frameon": False, "lines.linewidth": 2.0,
            "lines.markersize": 7, "image.cmap": "cividis",
        },
    )  # fmt: skip


def method_style(name):
    """{"color", "marker"} of a method: the same for the same name in every figure, whatever else is drawn there."""
    if name == "full":
        return dict(FULL_CACHE)
    index = METHODS.index(name) if name in METHODS else zlib.crc32(name.encode())
    # The offset keeps two methods that share a colour apart by their marker.
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": MARKERS[(index + index // len(PALETTE)) % len(MARKERS)],
    }


def palette(names):
    """Colours for seaborn's `palette=`."""
    return {name: method_style(name)["color"] for name in names}


def markers(names):
    """Markers for seaborn's `markers=`."""
    return {name: method_style(name)["marker"] for name in names}


def render(fig, name):
    """(svg, png) bytes of a figure, free of dates, versions and random ids."""
    svg, png = io.BytesIO(), io.BytesIO()
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        fig.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        fig.savefig(png, format="png", bbox_inches="tight", dpi=200, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()


def show(fig):
    """Shows the figure below the cell, once, and closes it; does nothing outside a notebook."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = lambda: None  # noqa: E731
    if get_ipython() is not None:
        display(fig)
    plt.close(fig)
