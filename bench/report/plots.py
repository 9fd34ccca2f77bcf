"""The pictures of a run, as PNG files in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.harness.store import Row, Store
from bench.plans.roofline import flop, least_bytes, limits_of
from bench.report.drawing import COLOURS, INK, MARKERS, NOTE, OURS, PLAIN, label_ends, label_points, png, tidy

_EXPANDED = "expanded formula"
_COLUMNS = 4


def pictures(store: Store) -> dict[str, bytes]:
    """Each picture whose benchmark has rows, by file name."""
    found = {}
    head, rows = store.latest("search")
    limits = limits_of(store, rows)
    if any(row["contender"] == _EXPANDED and row.get("seconds") for row in rows):
        found["throughput.png"] = png(throughput(head, rows))
    if limits and any(row.get("seconds") for row in rows):
        found["roofline.png"] = png(roofline(head, rows, limits))
    for name, draw in (("memory", memory), ("accuracy", accuracy)):
        head, rows = store.latest(name)
        if rows:
            found[f"{name}.png"] = png(draw(head, rows))
    return found


def throughput(head: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """A panel per shape: tokens per second of each contender over those of the expanded formula."""
    shapes: dict[str, dict[str, Row]] = {}
    for row in rows:
        label = f"{row['name']}\n{row['tokens']:,} × {row['codes']:,} × {row['dim']:,}"
        shapes.setdefault(label, {})[row["contender"]] = row
    shapes = {label: found for label, found in shapes.items() if found.get(_EXPANDED, {}).get("seconds")}
    ratios = {
        label: {name: found[_EXPANDED]["seconds"] / row["seconds"] for name, row in found.items() if row.get("seconds")}
        for label, found in shapes.items()
    }
    names = [name for name in _names(rows) if any(name in found for found in ratios.values())]
    columns = min(_COLUMNS, len(shapes))
    lines = math.ceil(len(shapes) / columns)
    size = (1.6 + 3.1 * columns, 1.3 + lines * (0.75 + 0.24 * len(names)))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    title = f"Nearest code: throughput relative to the {_EXPANDED}; N × K × D\n{head['device']}"
    figure.suptitle(title, fontsize=14, color=INK)
    every = [value for found in ratios.values() for value in found.values()]
    low, high = min(0.5, 0.9 * min(every)), max(2.0, max(every))
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, (label, found) in zip(axes.flat, ratios.items(), strict=False):
        for i, name in enumerate(names):
            value = found.get(name)
            if value is None:
                status = shapes[label].get(name, {}).get("status", "")
                panel.text(1.05, i, status, va="center", fontsize=8, color=NOTE)
                continue
            panel.barh(i, value - 1, left=1, height=0.72, color=OURS if name == "fastvq" else PLAIN)
            weight = "bold" if name == "fastvq" else "normal"
            # Bars to the left of 1 have their label to the right of it.
            panel.text(1.05 * max(1.0, value), i, f"{value:.2g}×", va="center", fontsize=9, color=INK, weight=weight)
        panel.set_xscale("log")
        panel.set_xlim(low, high * (high / low) ** 0.22)
        panel.axvline(1, color=INK, linewidth=0.9)
        panel.set_yticks(range(len(names)), names)
        panel.set_title(label, fontsize=10, color=INK, loc="left")
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_tick_params(labelbottom=True)
        tidy(panel, grid="x")
    axes[0, 0].invert_yaxis()
    for panel in axes.flat[len(ratios) :]:
        panel.set_visible(False)
    figure.supxlabel(
        f"times the throughput of the {_EXPANDED} (logarithmic; right of 1 is faster)", fontsize=11, color=INK
    )
    return figure


def memory(head: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Peak extra memory over K, a panel per operation, both axes logarithmic."""
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure = Figure(figsize=(7.2 * len(operations), 5.6), dpi=110, layout="constrained")
    title = f"Peak extra memory, {rows[0]['tokens']:,} tokens, D = {rows[0]['dim']}\n{head['device']}"
    figure.suptitle(title, fontsize=14, color=INK)
    panels = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    for panel, operation in zip(panels, operations, strict=True):
        here = [row for row in rows if row["operation"] == operation]
        codes = sorted({row["codes"] for row in here})
        curves = {}
        for name in _names(here):
            of_name = {row["codes"]: row for row in here if row["contender"] == name}
            points = [(k, row["extra_bytes"] / 2**20) for k, row in of_name.items() if row.get("extra_bytes")]
            short = [k for k in codes if of_name.get(k, {}).get("status") == "out of memory"]
            if points:
                curves[f"{name}, out of memory at {short[0]:,}" if short else name] = sorted(points)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        _draw_curves(panel, curves, _names(rows))
        panel.set_xticks(codes, [f"{k:,}" for k in codes])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title({"search": "search", "train": "training step"}[operation], fontsize=12, color=INK)
        panel.set_xlabel("codes K", fontsize=11, color=INK)
        tidy(panel, grid="both")
    panels[0].set_ylabel("MiB beyond tokens and codebook", fontsize=11, color=INK)
    for panel in panels:
        label_ends(panel)
    return figure


def accuracy(head: dict[str, Any], rows: Sequence[Row]) -> Figure:
    """Wrong indices over the offset, a panel per dtype; contenders with the same curve share it."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    offsets = sorted({row["offset"] for row in rows})
    figure = Figure(figsize=(5.6 * len(dtypes), 5.0), dpi=110, layout="constrained")
    title = f"Indices that differ from float64, K = {rows[0]['codes']:,}, D = {rows[0]['dim']}\n{head['device']}"
    figure.suptitle(title, fontsize=14, color=INK)
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for panel, dtype in zip(panels, dtypes, strict=True):
        same: dict[tuple[tuple[int, float], ...], list[str]] = {}
        here = [row for row in rows if row["dtype"] == dtype]
        for name in _names(here):
            found = {row["offset"]: row.get("wrong_share") for row in here if row["contender"] == name}
            shares = ((i, found.get(x)) for i, x in enumerate(offsets))
            curve = tuple((i, 100 * share) for i, share in shares if share is not None)
            if curve:
                same.setdefault(curve, []).append(name)
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set_ylim(-0.02, 160)
        _draw_curves(panel, {_in_lines(names): list(curve) for curve, names in same.items()}, _names(rows))
        panel.set_xticks(range(len(offsets)), [f"{x:g}" for x in offsets])
        panel.set_yticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(dtype, fontsize=12, color=INK)
        panel.set_xlabel("offset of tokens and codes, standard deviations", fontsize=11, color=INK)
        tidy(panel, grid="both")
    panels[0].set_ylabel("wrong indices, % (linear below 0.1)", fontsize=11, color=INK)
    for panel in panels:
        label_ends(panel)
    return figure


def roofline(head: dict[str, Any], rows: Sequence[Row], limits: dict[str, float]) -> Figure:
    """Rate of every search against the most that the product and the copy allow at its arithmetic intensity."""
    figure = Figure(figsize=(12, 7.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    ran = [row for row in rows if row.get("seconds")]
    points = [(flop(row) / least_bytes(row), flop(row) / row["seconds"] / 1e9, row) for row in ran]
    low, high = 0.6 * min(x for x, _, _ in points), 1.9 * max(x for x, _, _ in points)
    product, copy = limits["product"] / 1e9, limits["copy"] / 1e9
    corners = sorted({low, min(max(product / copy, low), high), high})
    axes.plot(corners, [min(product, copy * x) for x in corners], color=INK, linewidth=1.6)
    text = f"matrix product {product:,.0f} GFLOP/s, copy {copy:,.0f} GB/s, measured"
    corner = (max(low, product / copy), product)
    axes.annotate(text, corner, (0, 6), textcoords="offset points", fontsize=10, color=INK)
    for i, name in enumerate(_names(rows)):
        mine = [(x, y) for x, y, row in points if row["contender"] == name]
        if mine and name != "fastvq":
            xs, ys = zip(*mine, strict=True)
            axes.scatter(xs, ys, s=26, marker=MARKERS[i % len(MARKERS)], color=PLAIN, label=name)
    ours = [(x, y, row["name"]) for x, y, row in points if row["contender"] == "fastvq"]
    if ours:
        axes.scatter([x for x, _, _ in ours], [y for _, y, _ in ours], s=46, color=OURS, label="fastvq", zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(0.6 * min(y for _, y, _ in points), 1.6 * max(product, *(y for _, y, _ in points)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(
        "arithmetic intensity: 2NKD / bytes of tokens, codes and indices, FLOP/byte", fontsize=11, color=INK
    )
    axes.set_ylabel("rate of the search, 2NKD per second, GFLOP/s", fontsize=11, color=INK)
    axes.set_title(f"Nearest code against the limits of the machine\n{head['device']}", fontsize=14, color=INK)
    tidy(axes, grid="both")
    axes.legend(loc="lower right", fontsize=10, frameon=True, edgecolor="none", labelcolor=INK)
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    roof = [(x, min(product, copy * x)) for x in steps]
    label_points(axes, ours, [*roof, *((x, y) for x, y, row in points if row["contender"] != "fastvq")])
    return figure


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def _in_lines(names: Sequence[str]) -> str:
    """Names in lines of at most two; fastvq comes first, as in the list of contenders."""
    return ",\n".join(", ".join(names[i : i + 2]) for i in range(0, len(names), 2))


def _draw_curves(axes: Axes, curves: dict[str, list[tuple[float, float]]], names: Sequence[str]) -> None:
    """Lines with markers, ours on top; a contender looks the same in every panel. A label begins with its name."""
    for label, points in curves.items():
        xs, ys = zip(*points, strict=True)
        place = names.index(label.split(",")[0])
        style: dict[str, Any] = {"color": OURS, "linewidth": 2.6, "zorder": 3, "marker": "o"}
        if not label.startswith("fastvq"):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            style = {"color": colour, "linewidth": 1.4, "marker": marker}
        axes.plot(xs, ys, markersize=5, label=label, **style)
