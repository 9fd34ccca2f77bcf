"""The pictures of a run."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.harness.store import Row, Store
from bench.plans.roofline import flop, least_bytes, limits_of
from bench.report.tables import EXPANDED, GREEDY, OURS, Head, ran, rows_where, shapes_of, size, unique

_INK = "#1a1a1a"
_NOTE = "#6b6b6b"
_BLUE = "#2a6fbb"  # fastvq
_GREY = "#9a9a9a"  # the others, where their names stand beside them or their markers tell them apart
_COLOURS = (
    "#7a4b2a", "#5b7a3a", "#8a8a8a", "#a0527a", "#c08a2e", "#4a8a8a", "#6a5a9a", "#b05a4a", "#40506a", "#a8a040",
    "#503a20", "#c05a90", "#307050",
)  # fmt: skip
_MARKERS = "osD^vP*Xphd<>"
_COLUMNS = 4

_STYLE: dict[Any, Any] = {
    "figure.dpi": 110, "figure.constrained_layout.use": True, "figure.titlesize": 14, "figure.labelsize": 11,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "axes.labelsize": 11, "font.size": 9, "xtick.labelsize": 9, "ytick.labelsize": 9,
    "legend.fontsize": 9, "legend.frameon": False, "legend.borderaxespad": 0, "lines.markersize": 5,
}  # fmt: skip


@rc_context(_STYLE)
def pictures(store: Store) -> dict[str, bytes]:
    """A PNG of each picture whose benchmark has rows, by file name."""
    found = {}
    head, rows = store.latest("search")
    timed = [row for row in rows if ran(row)]
    if rows_where(timed, contender=EXPANDED):
        found["throughput.png"] = throughput(head, rows)
    if timed and (limits := limits_of(store, rows)):
        found["roofline.png"] = roofline(head, timed, limits)
    for name, draw in (("memory", memory), ("accuracy", accuracy), ("kmeans", kmeans)):
        head, rows = store.latest(name)
        if rows:
            found[f"{name}.png"] = draw(head, rows)
    return {name: _png(figure) for name, figure in found.items()}


def _png(figure: Figure) -> bytes:
    figure.savefig(stream := io.BytesIO())
    return stream.getvalue()


def throughput(head: Head, rows: Sequence[Row]) -> Figure:
    """A panel per shape: tokens per second of each contender over those of the expanded formula."""
    found = [{row["contender"]: row for row in shape} for shape in shapes_of(rows)]
    shapes = [shape for shape in found if ran(shape.get(EXPANDED, {}))]
    names = [name for name in unique(rows, "contender") if any(ran(shape.get(name, {})) for shape in shapes)]
    ratios = [shape[EXPANDED]["seconds"] / row["seconds"] for shape in shapes for row in shape.values() if ran(row)]
    columns = min(_COLUMNS, len(shapes))
    lines = math.ceil(len(shapes) / columns)
    title = f"Nearest code: throughput relative to the {EXPANDED}; N × K × D"
    figure = _figure(1.6 + 3.1 * columns, 1.3 + lines * (0.75 + 0.24 * len(names)), title, head)
    low, high = min(0.5, 0.9 * min(ratios)), max(2.0, max(ratios))
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, shape in zip(axes.flat, shapes, strict=False):
        for i, name in enumerate(names):
            row = shape.get(name, {"status": ""})
            if not ran(row):
                panel.text(1.05, i, row["status"], va="center", fontsize=8, color=_NOTE)
                continue
            value = shape[EXPANDED]["seconds"] / row["seconds"]
            panel.barh(i, value - 1, left=1, height=0.72, color=_BLUE if name == OURS else _GREY)
            weight = "bold" if name == OURS else "normal"
            # The label of a bar to the left of 1 stands to the right of 1.
            panel.text(1.05 * max(1.0, value), i, f"{value:.2g}×", va="center", weight=weight)
        panel.set_xscale("log")
        panel.set_xlim(low, high * (high / low) ** 0.22)
        panel.axvline(1, color=_INK, linewidth=0.9)
        panel.set_yticks(range(len(names)), names)
        panel.set_title(f"{shape[EXPANDED]['name']}\n{size(shape[EXPANDED])}", fontsize=10, loc="left")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.grid(visible=False, axis="y")
    axes[0, 0].invert_yaxis()
    for panel in axes.flat[len(shapes) :]:
        panel.set_visible(False)
    figure.supxlabel(f"times the throughput of the {EXPANDED} (logarithmic; right of 1 is faster)")
    return figure


def memory(head: Head, rows: Sequence[Row]) -> Figure:
    """Peak extra memory over K, a panel per operation, both axes logarithmic."""
    title = f"Peak extra memory, {rows[0]['tokens']:,} tokens, D = {rows[0]['dim']}"
    figure, panels = _panels(7.2, title, head, rows, "operation", "codes K", "MiB beyond tokens and codebook")
    codes = sorted(unique(rows, "codes"))
    for panel, here in panels:
        curves = {}
        for name in unique(here, "contender"):
            mine = sorted(rows_where(here, contender=name), key=lambda row: row["codes"])
            lacking = [row["codes"] for row in mine if row["status"] == "out of memory"]
            label = f"{name}, out of memory at {lacking[0]:,}" if lacking else name
            curves[label] = [(row["codes"], row["extra_bytes"] / 2**20) for row in mine if row.get("extra_bytes")]
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(codes, [f"{k:,}" for k in codes])
        panel.xaxis.set_minor_locator(NullLocator())
        _plain_numbers(panel.yaxis)
        _draw_curves(panel, curves, unique(rows, "contender"))
    return figure


def accuracy(head: Head, rows: Sequence[Row]) -> Figure:
    """Wrong indices over the offset, a panel per dtype; contenders with the same curve share it."""
    title = f"Indices that differ from float64, K = {rows[0]['codes']:,}, D = {rows[0]['dim']}"
    labels = "offset of tokens and codes, standard deviations", "wrong indices, % (linear below 0.1)"
    figure, panels = _panels(6.0, title, head, rows, "dtype", *labels)
    offsets = sorted(unique(rows, "offset"))
    for panel, here in panels:
        same: dict[tuple[tuple[float, float], ...], list[str]] = {}
        for name in unique(here, "contender"):
            found = {row["offset"]: row.get("wrong_share") for row in rows_where(here, contender=name)}
            shares = [(i, found.get(offset)) for i, offset in enumerate(offsets)]
            same.setdefault(tuple((i, 100 * share) for i, share in shares if share is not None), []).append(name)
        curves = {textwrap.fill(", ".join(names), 28): curve for curve, names in same.items()}
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set_ylim(-0.02, 160)
        panel.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        panel.set_xticks(range(len(offsets)), [f"{offset:g}" for offset in offsets])
        panel.yaxis.set_minor_locator(NullLocator())
        _draw_curves(panel, curves, unique(rows, "contender"))
    return figure


def kmeans(head: Head, rows: Sequence[Row]) -> Figure:
    """A line per set of tokens: inertia of every seed over the median of greedy k-means++, and seconds over ours."""
    rows = [row for row in rows if ran(row)]
    sets, names = unique(rows, "name"), unique(rows, "contender")
    figure = _figure(13, 1.8 + 0.55 * len(sets), "k-means: the same tokens, as many iterations, three seeds", head)
    quality, speed = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(names):
        colour, marker = (_BLUE if name == OURS else _COLOURS[i]), _MARKERS[i]
        for place, label in enumerate(sets):
            found = {row["contender"]: row for row in rows_where(rows, name=label)}
            y = place + 0.22 * (i - (len(names) - 1) / 2)
            style: dict[str, Any] = {"color": colour, "marker": marker, "label": "" if place else name}
            if name in found and GREEDY in found:
                ratios = [value / found[GREEDY]["inertia"] for value in found[name]["inertias"]]
                quality.scatter(ratios, [y] * len(ratios), s=34, **style)
            if name in found and OURS in found:
                speed.scatter(found[name]["seconds"] / found[OURS]["seconds"], y, s=44, **style)
    for axes in (quality, speed):
        axes.axvline(1, color=_INK, linewidth=0.9)
        axes.set_yticks(range(len(sets)), sets)
    quality.invert_yaxis()
    quality.set_xlabel(f"inertia over the median of {GREEDY} (left is better)")
    speed.set_xlabel(f"time over that of {OURS} (logarithmic; right is slower)")
    speed.set_xscale("log")
    low, high = (0.9 * speed.get_xlim()[0], 1.1 * speed.get_xlim()[1])
    speed.set_xticks([tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high])
    speed.xaxis.set_minor_locator(NullLocator())
    _plain_numbers(speed.xaxis)
    _legend(speed)
    return figure


def roofline(head: Head, rows: Sequence[Row], limits: dict[str, float]) -> Figure:
    """Rate of every search against the most that the product and the copy allow; fastvq's points bear numbers."""
    figure = _figure(13, 7.5, "Nearest code against the limits of the machine", head)
    axes = figure.subplots()
    points = [(flop(row) / least_bytes(row), flop(row) / row["seconds"] / 1e9) for row in rows]
    low, high = 0.6 * min(points)[0], 1.9 * max(points)[0]
    product, copy = limits["product"] / 1e9, limits["copy"] / 1e9
    corners = sorted({low, min(max(product / copy, low), high), high})
    label = f"matrix product {product:,.0f} GFLOP/s,\ncopy {copy:,.0f} GB/s, measured"
    axes.plot(corners, [min(product, copy * x) for x in corners], color=_INK, linewidth=1.6, label=label)
    for i, name in enumerate(unique(rows, "contender")):
        mine = [(point, row["name"]) for point, row in zip(points, rows, strict=True) if row["contender"] == name]
        if name != OURS:
            xs, ys = zip(*(point for point, _ in mine), strict=True)
            axes.scatter(xs, ys, s=26, marker=_MARKERS[i % len(_MARKERS)], color=_GREY, label=name)
            continue
        for number, ((x, y), shape) in enumerate(mine, 1):
            axes.scatter(x, y, s=90, marker=f"${number:02d}$", color=_BLUE, label=f"{OURS}, {shape}", zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0.6 * min(y for _, y in points), 1.6 * max(product, *(y for _, y in points)))
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("arithmetic intensity: 2NKD / bytes of tokens, codes and indices, FLOP/byte")
    axes.set_ylabel("rate of the search, 2NKD per second, GFLOP/s")
    _legend(axes)
    return figure


def _figure(width: float, height: float, title: str, head: Head) -> Figure:
    figure = Figure(figsize=(width, height))
    figure.suptitle(f"{title}\n{head['device']}")
    return figure


def _panels(
    width: float, title: str, head: Head, rows: Sequence[Row], column: str, x: str, y: str
) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """A figure with a panel for each value of a column, side by side, and the rows of each panel."""
    values = unique(rows, column)
    figure = _figure(width * len(values), 5.2, title, head)
    figure.supxlabel(x)
    figure.supylabel(y)
    panels = list(zip(figure.subplots(1, len(values), sharey=True, squeeze=False)[0], values, strict=True))
    for panel, value in panels:
        panel.set_title("training step" if value == "train" else value)
    return figure, [(panel, rows_where(rows, **{column: value})) for panel, value in panels]


def _plain_numbers(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    """To the right of a panel, in the order of drawing."""
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    for text in legend.get_texts():
        text.set_fontweight("bold" if text.get_text().startswith(OURS) else "normal")


def _draw_curves(axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], names: Sequence[str]) -> None:
    """Lines with markers, ours on top, and a legend in the order of their ends; a label begins with its contender.

    A contender looks the same in every panel.
    """
    drawn = {label: curve for label, curve in curves.items() if curve}
    for label, curve in sorted(drawn.items(), key=lambda item: item[1][-1][1], reverse=True):
        place = names.index(label.split(",")[0])
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 1.4}
        if label.startswith(OURS):
            style = {"color": _BLUE, "marker": "o", "linewidth": 2.6, "zorder": 3}
        xs, ys = zip(*curve, strict=True)
        axes.plot(xs, ys, label=label, **style)
    _legend(axes)
