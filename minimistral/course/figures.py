"""show: the one door through which every figure goes into a page.

A figure becomes an image with a text alternative, on white so that dark themes cannot hide its
axes, with its data as a table one can open. The image is the same byte for byte each time.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

import torch

from .compare import short
from .panel import html_table

try:
    import matplotlib
except ImportError:  # the library works without; only figures need it
    matplotlib = None

SHORTEST_ALT = 30  # characters
SMALLEST_TEXT = 11  # points
LARGEST_ANNOTATED = 8  # rows and columns of a heat map with its numbers written in

BLACK, BLUE, ORANGE, GREEN, PINK = COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
GREY = "#767676"  # for what is there to be compared with, beside the five
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "--")

STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "viridis",
    "lines.linewidth": 2,
}

if matplotlib is not None:
    from cycler import cycler

    STYLE["axes.prop_cycle"] = cycler(color=COLOURS, linestyle=DASHES)
    matplotlib.rcParams.update(STYLE)


class Figure:
    """A figure as HTML for a page and as its alt text for a terminal."""

    def __init__(self, html_text: str, text: str):
        self.html, self.text = html_text, text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def show(fig, *, alt: str, data=None) -> None:
    """Show a figure with its text alternative, and close it.

    fig   a Matplotlib figure (or axes)
    alt   at least 30 characters that say the finding, for those who cannot see the picture
    data  what one can open below: {"column": values, ...} or (header, rows); for a matrix
          ``table_of(matrix, row_labels, column_labels)``

    Raises ValueError for an alt text that is too short or for text under 11 points.
    """
    figure = Figure(figure_html(fig, alt, data), alt)
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        print(alt)
        return
    if get_ipython() is None:
        print(alt)
    else:
        display(figure)


def figure_html(fig, alt: str, data=None) -> str:
    """The figure as HTML: an image with its alt text, and its data. Closes the figure."""
    from matplotlib import pyplot

    fig = getattr(fig, "figure", fig)
    buffer = io.BytesIO()
    try:
        if len(alt.strip()) < SHORTEST_ALT:
            raise ValueError(
                f"alt has {len(alt.strip())} characters, at least {SHORTEST_ALT} wanted: "
                f"say what the figure shows, the finding first; it is {alt!r}"
            )
        _refuse_small_text(fig)
        fig.savefig(buffer, format="png", bbox_inches=None, metadata={"Software": None})
    finally:
        pyplot.close(fig)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    style = "max-width:100%;background:#ffffff;padding:8px"
    picture = f'<img src="data:image/png;base64,{encoded}" alt="{html.escape(alt)}" style="{style}">'
    return f"<figure style=\"margin:0\">{picture}{_details(data)}</figure>"


def _refuse_small_text(fig) -> None:
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        if text.get_visible() and text.get_text().strip() and text.get_fontsize() < SMALLEST_TEXT:
            raise ValueError(
                f"the text {text.get_text()!r} has {text.get_fontsize():g} points, "
                f"at least {SMALLEST_TEXT} wanted; make the figure larger or the text shorter"
            )


def _details(data) -> str:
    if data is None:
        return ""
    header, rows = as_table(data)
    table = html_table(header, rows)
    return f"<details><summary>The numbers of this figure</summary>{table}</details>"


def as_table(data) -> tuple[list[str], list[list[str]]]:
    """{"column": values} or (header, rows) as header and rows of text."""
    if isinstance(data, Mapping):
        columns = [_values(column) for column in data.values()]
        lengths = {name: len(column) for name, column in zip(data, columns)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different length: {lengths}")
        header, rows = list(data), list(zip(*columns))
    else:
        header, rows = data
    return [str(name) for name in header], [[_cell(value) for value in row] for row in rows]


def table_of(matrix, row_labels: Sequence, column_labels: Sequence, corner: str = ""):
    """A matrix with labels as (header, rows) for ``show(..., data=...)``."""
    rows = [[label, *row] for label, row in zip(row_labels, torch.as_tensor(matrix).tolist())]
    return [corner, *column_labels], rows


def _values(column) -> list:
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _cell(value) -> str:
    return value if isinstance(value, str) else short(value)


# ---------------------------------------------------------------- the few kinds of figure


def new_figure(width: float = 7.0, height: float = 3.6, columns: int = 1, **options):
    """(figure, axes) in the course's style; ``columns`` panels side by side."""
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        return pyplot.subplots(1, columns, figsize=(width, height), **options)


def heatmap(
    ax, matrix, row_labels: Sequence = (), column_labels: Sequence = (), *,
    title: str = "", rows: str = "", columns: str = "", limits=None, digits: int = 2,
):
    """A matrix as colours; up to 8 x 8 its numbers are written in. NaN stays white.

    ``rows`` and ``columns`` name the axes; ``limits`` = (lowest, highest).
    """
    matrix = torch.as_tensor(matrix).detach().double().cpu()
    known = matrix[matrix.isfinite()]
    low, high = limits or (known.min().item(), known.max().item())
    image = ax.imshow(matrix.numpy(), cmap="viridis", vmin=low, vmax=high)
    if max(matrix.shape) <= LARGEST_ANNOTATED:
        _write_numbers(ax, image, matrix, digits)
    else:
        ax.figure.colorbar(image, ax=ax)
    if len(row_labels):
        ax.set_yticks(range(len(row_labels)), row_labels)
    if len(column_labels):
        turned = 90 if max(len(str(label)) for label in column_labels) > 3 else 0
        ax.set_xticks(range(len(column_labels)), column_labels, rotation=turned)
    ax.set(title=title, ylabel=rows, xlabel=columns)
    ax.spines[:].set_visible(False)
    return image


def _write_numbers(ax, image, matrix, digits):
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            if value == value:
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                ax.text(j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=SMALLEST_TEXT,
                        color="white" if dark else "black")


def lines_chart(ax, x, series: Mapping[str, Sequence], *, title="", xlabel="", ylabel="", markers=None):
    """Trends: one line for each entry of ``series``, told apart by colour, dash and marker."""
    if len(series) > len(COLOURS):
        raise ValueError(f"{len(series)} lines; at most {len(COLOURS)} can be told apart")
    x = _values(x)
    markers = len(x) <= 30 if markers is None else markers
    for n, (label, values) in enumerate(series.items()):
        ax.plot(x, _values(values), color=COLOURS[n], linestyle=DASHES[n],
                marker=MARKERS[n] if markers else None, label=label)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if len(series) > 1:
        ax.legend(frameon=False)


def bars_chart(ax, values: Mapping[str, float], *, title="", ylabel=""):
    """Up to six things as bars, with their numbers on top."""
    if len(values) > len(HATCHES):
        raise ValueError(f"{len(values)} bars; show at most {len(HATCHES)}, or a table")
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(values))]
    bars = ax.bar(list(values), list(values.values()), color=colours, edgecolor="white")
    for bar, hatch in zip(bars, HATCHES):
        bar.set_hatch(hatch)
    ax.bar_label(bars, fmt="%.2f", fontsize=SMALLEST_TEXT)
    ax.margins(y=0.15)
    ax.set(title=title, ylabel=ylabel)
