"""Pictures of the demo and of the example, as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

_INK = "#1a1a1a"
_NOTE = "#6b6b6b"
_LINE = "#2a6fbb"
# Of 255. Above it an error is plain to see, and the colour no longer grows.
_ERROR_SCALE = 64
_PANELS = ("commitment loss", "codes in use", "perplexity (effective number of codes)")


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """One row of :func:`reconstruction_png`: pictures are uint8 ``[H, W, 3]``, ``label`` stands to their left."""

    label: str
    original: Tensor
    decoded: Tensor


def reconstruction_png(rows: Sequence[Reconstruction], decoded_title: str) -> bytes:
    """Original, reconstruction and error of every photograph, one row each.

    The error is the mean over red, green and blue of the absolute difference, of 255.
    """
    panel_width = 5.0  # inches
    heights = [panel_width * row.original.shape[0] / row.original.shape[1] for row in rows]
    left, right, top, gap, bottom = 0.35, 0.75, 0.5, 0.12, 0.12  # inches
    width = left + 3 * panel_width + 2 * gap + right
    height = top + sum(heights) + gap * (len(rows) - 1) + bottom
    figure = Figure(figsize=(width, height), dpi=128, facecolor="white")

    y = height - top
    for i, (row, panel_height) in enumerate(zip(rows, heights, strict=True)):
        y -= panel_height
        error = (row.original.float() - row.decoded.float()).abs().mean(2)
        for j, picture in enumerate((row.original, row.decoded, error)):
            x = left + j * (panel_width + gap)
            axes = figure.add_axes((x / width, y / height, panel_width / width, panel_height / height))
            drawn = axes.imshow(picture.numpy(), cmap="magma", vmin=0, vmax=_ERROR_SCALE if j == 2 else None)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if i == 0:
                title = ("original", decoded_title, "error, |original − reconstruction|")[j]
                axes.set_title(title, fontsize=17, color=_INK, pad=9)
            if j == 0:
                axes.set_ylabel(row.label, fontsize=15, color=_INK, labelpad=6)
        bar_x = left + 3 * panel_width + 2 * gap + 0.1
        bar = figure.colorbar(
            drawn,
            cax=figure.add_axes((bar_x / width, y / height, 0.14 / width, panel_height / height)),
            ticks=range(0, _ERROR_SCALE + 1, 16),
            extend="max",
            extendfrac=0.04,
        )
        bar.ax.tick_params(labelsize=12, colors=_INK, length=3)
        bar.ax.set_title("of 255", fontsize=12, color=_INK, pad=4) if i == 0 else None
        y -= gap
    return _png(figure)


def pairs_png(originals: Tensor, decoded: Tensor, title: str) -> bytes:
    """Each of ``originals [n, H, W, 3]`` above its reconstruction in ``decoded [n, H, W, 3]``, uint8."""
    n, height, width = originals.shape[:3]
    figure = Figure(figsize=(1.8 * n, 3.6 * height / width + 0.6), dpi=128, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=14, color=_INK)
    rows = figure.subplots(2, n, squeeze=False)
    for axes_of_row, pictures, label in zip(rows, (originals, decoded), ("original", "reconstruction"), strict=True):
        for axes, picture in zip(axes_of_row, pictures, strict=True):
            axes.imshow(picture.numpy())
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        axes_of_row[0].set_ylabel(label, fontsize=13, color=_INK)
    return _png(figure)


def training_png(curves: Tensor, title: str, names: Sequence[str] = _PANELS) -> bytes:
    """Values against the training step: by default loss, usage and perplexity.

    Args:
        curves: ``[steps, panels]``.
        title: above the panels.
        names: of the panels, one for each column of ``curves``.
    """
    figure = Figure(figsize=(13 / 3 * len(names), 4), dpi=128, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=14, color=_INK)
    for axes, name, values in zip(figure.subplots(1, len(names)), names, curves.t(), strict=True):
        # Markers, so that a run of one or two steps shows too.
        marker = "o" if len(values) < 30 else None
        axes.plot(range(1, len(values) + 1), values.numpy(), color=_LINE, linewidth=1.8, marker=marker, markersize=3)
        axes.set_title(name, fontsize=13, color=_INK)
        axes.set_xlabel("training step", fontsize=12, color=_INK)
        axes.tick_params(labelsize=11, colors=_INK)
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


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
