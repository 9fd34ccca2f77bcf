"""Colours, frames and labels of the pictures: labels stand beside what they name and never on each other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1a1a1a"
NOTE = "#6b6b6b"
OURS = "#2a6fbb"
PLAIN = "#9a9a9a"
# Of the others, where they have to be told apart.
COLOURS = (
    "#7a4b2a", "#5b7a3a", "#8a8a8a", "#a0527a", "#c08a2e", "#4a8a8a", "#6a5a9a", "#b05a4a", "#40506a", "#a8a040",
    "#503a20", "#c05a90", "#307050",
)  # fmt: skip
MARKERS = "osD^vP*Xphd<>"
_POINTS = 9  # size of labels


def png(figure: Figure) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def tidy(axes: Axes, grid: Literal["both", "x", "y"]) -> None:
    """Light grid, no frame above and to the right."""
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)


def label_ends(axes: Axes) -> None:
    """The label of each line right of its last point, moved up or down where two would touch."""
    dpi = _settle(axes)
    line_height = _POINTS * 1.3 * dpi / 72
    ends = []
    for line in axes.get_lines():
        label = str(line.get_label())
        if not label.startswith("_"):
            _, y = axes.transData.transform(np.asarray(line.get_xydata()))[-1]
            ends.append((float(y), label, line.get_color()))
    ends.sort(key=lambda end: end[0])
    heights = [line_height * (label.count("\n") + 1) for _, label, _ in ends]
    centres = spread([y for y, _, _ in ends], heights)
    right = axes.transAxes.transform((1, 0))[0]
    for (_, label, colour), y in zip(ends, centres, strict=True):
        place = axes.transAxes.inverted().transform((right, y))
        weight = "bold" if label.startswith("fastvq") else "normal"
        axes.annotate(
            label, (1, place[1]), (5, 0), xycoords="axes fraction", textcoords="offset points",
            va="center", fontsize=_POINTS, color=colour, weight=weight, annotation_clip=False,
        )  # fmt: skip


def _settle(axes: Axes) -> float:
    """Dots per inch of the figure, whose positions are final after this."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("axes must belong to a figure")
    figure.draw_without_rendering()
    return figure.dpi


def spread(centres: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Ascending centres moved as little as a few rounds of pushing need, so that neighbours do not overlap."""
    moved = list(centres)
    for _ in range(200):
        still = True
        for i in range(len(moved) - 1):
            lacking = (heights[i] + heights[i + 1]) / 2 - (moved[i + 1] - moved[i])
            if lacking > 0.01:
                moved[i] -= lacking / 2
                moved[i + 1] += lacking / 2
                still = False
        if still:
            break
    return moved


def label_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]] = ()
) -> None:
    """A label at each point, at the first place around it that no label and no point, of ``others`` neither, takes."""
    scale = _settle(axes) / 72
    height = _POINTS * 1.2 * scale
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    marks = [*centres, *(axes.transData.transform(point) for point in others)]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in marks]
    for (x, y), (_, _, label) in zip(centres, points, strict=True):
        width = 0.7 * _POINTS * scale * len(label)
        places = [
            (x + dx if dx > 0 else x + dx - width if dx < 0 else x - width / 2, y + dy - height / 2)
            for distance in (1.0, 2.0, 3.0, 4.5)
            for dx, dy in (
                (8, 0), (0, 13 * distance), (0, -13 * distance), (-8, 0), (8, 11 * distance), (8, -11 * distance),
                (-8, 11 * distance), (-8, -11 * distance),
            )
        ]  # fmt: skip
        boxes = [(left, bottom, left + width, bottom + height) for left, bottom in places]
        box = next((box for box in boxes if not any(_touch(box, other) for other in taken)), boxes[0])
        taken.append(box)
        place = axes.transData.inverted().transform((box[0], box[1] + height / 2))
        axes.text(place[0], place[1], label, fontsize=_POINTS, color=OURS, va="center", weight="bold")


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
