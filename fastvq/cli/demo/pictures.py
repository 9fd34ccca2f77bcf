"""Pictures of the demo and of the example, as PNG files in memory."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter
from torch import Tensor

_INK = "#1a1a1a"
_NOTE = "#6b6b6b"
_LINE = "#2a6fbb"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 128,
    "figure.facecolor": "white",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
# Of 255. A larger error is plain to see, so the colour stays the same above it.
_ERROR_SCALE = 64
_PANELS = ("commitment loss", "codes in use", "perplexity (effective number of codes)")


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One row of :func:`reconstruction_png`: two uint8 pictures ``[H, W, 3]``, and a label to their left."""

    label: str
    original: Tensor
    decoded: Tensor


@rc_context(_STYLE)
def reconstruction_png(rows: Sequence[Reconstruction], decoded_title: str) -> bytes:
    """Original, reconstruction and error of every photograph, one row each.

    The error is the mean over red, green and blue of the absolute difference, of 255.
    """
    panel_width = 5.0  # inches
    heights = [panel_width * row.original.shape[0] / row.original.shape[1] for row in rows]
    left, right, top, gap, bottom = 0.35, 0.75, 0.5, 0.12, 0.12  # inches
    width = left + 3 * panel_width + 2 * gap + right
    height = top + sum(heights) + gap * (len(rows) - 1) + bottom
    figure = Figure(figsize=(width, height))

    y = height - top
    for i, (row, panel_height) in enumerate(zip(rows, heights, strict=True)):
        y -= panel_height
        error = (row.original.float() - row.decoded.float()).abs().mean(2)
        for j, picture in enumerate((row.original, row.decoded, error)):
            x = left + j * (panel_width + gap)
            axes = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
            drawn = _show(axes, picture, cmap="magma", vmin=0, vmax=_ERROR_SCALE if j == 2 else None)
            if i == 0:
                axes.set_title(("original", decoded_title, "error, |original − reconstruction|")[j], fontsize=17, pad=9)
            if j == 0:
                axes.set_ylabel(row.label, fontsize=15, labelpad=6)
        bar_x = left + 3 * panel_width + 2 * gap + 0.1
        bar = figure.colorbar(
            drawn,
            cax=figure.add_axes((bar_x / width, y / height, 0.14 / width, panel_height / height)),
            ticks=range(0, _ERROR_SCALE + 1, 16),
            extend="max",
            extendfrac=0.04,
        )
        bar.ax.tick_params(labelsize=12, length=3)
        if i == 0:
            bar.ax.set_title("of 255", fontsize=12, pad=4)
        y -= gap
    return _png(figure)


@rc_context(_STYLE)
def pairs_png(originals: Tensor, decoded: Tensor, title: str) -> bytes:
    """Each of ``originals [n, H, W, 3]`` above its reconstruction in ``decoded [n, H, W, 3]``, uint8."""
    n, height, width = originals.shape[:3]
    figure = Figure(figsize=(1.8 * n, 3.6 * height / width + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=14)
    rows = figure.subplots(2, n, squeeze=False)
    for axes_of_row, pictures, label in zip(rows, (originals, decoded), ("original", "reconstruction"), strict=True):
        for axes, picture in zip(axes_of_row, pictures, strict=True):
            _show(axes, picture)
        axes_of_row[0].set_ylabel(label, fontsize=13)
    return _png(figure)


@rc_context(_STYLE)
def training_png(curves: Tensor, title: str, names: Sequence[str] = _PANELS) -> bytes:
    """Plot each column of ``curves [steps, panels]`` against the training step, in a panel named by ``names``."""
    figure = Figure(figsize=(13 / 3 * len(names), 4), layout="constrained")
    figure.suptitle(title, fontsize=14)
    for axes, name, values in zip(figure.subplots(1, len(names)), names, curves.t(), strict=True):
        # Markers show a run of one or two steps.
        marker = "o" if len(values) < 30 else None
        axes.plot(range(1, len(values) + 1), values.numpy(), color=_LINE, linewidth=1.8, marker=marker, markersize=3)
        axes.set_title(name, fontsize=13)
        axes.set_xlabel("training step", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
        if name == "commitment loss" and len(values) > 1:
            note = "in step 1 the codes are tokens of its batch"
            axes.text(0.99, 0.98, note, transform=axes.transAxes, fontsize=10, color=_NOTE, ha="right", va="top")
        if name == "codes in use":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None))
            low = min(0.9, float(values.min()))
            axes.set_ylim(low - 0.02, 1 + 0.1 * (1.02 - low))
    return _png(figure)


def _show(axes: Axes, picture: Tensor, **options: Any) -> AxesImage:
    """Draw a picture without ticks and frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes.imshow(picture.numpy(), **options)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
