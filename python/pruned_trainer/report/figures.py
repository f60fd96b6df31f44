"""The figures of a report, each as SVG that takes its colours from the page around it, and as PNG.

The colours are based on Okabe and Ito's. Under simulated protanopia, deuteranopia and tritanopia
(Machado et al., 2009) any two colours of series are at least 12 apart in CIELAB. Five series of ours differ
in marker, too; others' are hollow, on dotted lines.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from pruned_ops.files import write_whole

# Inches. A figure is as wide as a phone, where a point of type is then about a CSS pixel.
WIDTH = 4.4
# Name in the page's CSS -> colour on a light and on a dark page. The light values all differ, because
# `_inline` finds the colours of an SVG by value.
LIGHT = {
    "ink": "#1c1e21",
    "muted": "#5b6169",
    "grid": "#d3d7dc",
    "track": "#e6e8eb",
    "first": "#0072b2",
    "second": "#d55e00",
    "third": "#99416d",
    "fourth": "#009e73",
    "fifth": "#5c4a13",
}
DARK = {
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "grid": "#3d434b",
    "track": "#31363d",
    "first": "#56b4e9",
    "second": "#f0883e",
    "third": "#fbb6e9",
    "fourth": "#2fd0a0",
    "fifth": "#f5cc50",
}
# Colours and markers of series, in turn: ours from the first on, others' from the last.
_COLOURS, _MARKERS = ("first", "second", "third", "fourth", "fifth"), "osD^v"
# Axes of speed and of score are at least so long, so that what is the same is not drawn as a difference.
_LEAST_SPEEDS, _LEAST_POINTS = 1.0, 2.0
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 9.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "grid.color": LIGHT["grid"],
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "pruned",
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure. name: the stem of its PNG. alt: what it shows, in words."""

    name: str
    alt: str
    svg: str
    png: bytes

    def save(self, folder: Path) -> Path:
        """Write NAME.png into the folder; its path. The file is there whole, or as it was before."""
        path = folder / f"{self.name}.png"
        write_whole(path, self.png)
        return path


@dataclass(frozen=True)
class Line:
    """Points (x, y) to draw. ends: the bar (low, high) at each point, if any. own: ours, not others'."""

    label: str
    points: Sequence[tuple[float, float]]
    ends: Sequence[tuple[float, float]] = ()
    own: bool = True

    @property
    def x(self) -> list[float]:
        return [x for x, _ in self.points]

    @property
    def y(self) -> list[float]:
        return [y for _, y in self.points]


def draw(name: str, alt: str, height: float, fill: Callable[[Figure], None]) -> Drawing:
    """The figure that `fill` draws, `height` inches high."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        fill(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not again for each format
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=180, facecolor="white")
        no_metadata = {key: None for key in ("Creator", "Date", "Format", "Type")}
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    return Drawing(name, alt, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """The SVG for a page that holds others: with colours by name, ids of its own, and no size of its own."""
    head, _, body = svg[svg.index("<svg") :].partition(">")
    head = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r"<style .*?</style>", "", body, flags=re.DOTALL)  # rules for the whole page
    svg = f"{head}>{body}"
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for role, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg


def layers(name: str, kept: Sequence[tuple[int, int]], dense: Sequence[tuple[int, int]]) -> Drawing:
    """The heads and the FFN width that each layer keeps, on bars as long as the dense model's.

    kept, dense: (heads, FFN width) of each layer.
    """
    heads, ffn = (max(layer[column] for layer in dense) for column in (0, 1))

    def fill(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        panels = (left, "heads", heads, "first"), (right, "FFN width", ffn, "second")
        for column, (axes, what, full, colour) in enumerate(panels):
            values, tracks = ([layer[column] for layer in layers] for layers in (kept, dense))
            rows = range(len(kept))
            axes.barh(rows, tracks, color=LIGHT["track"], height=0.72)
            axes.barh(rows, values, color=LIGHT[colour], height=0.72)
            for row, value in zip(rows, values, strict=True):
                axes.text(full * 1.04, row, str(value), va="center", fontsize=8.5)
            axes.set_title(f"{what}: {sum(values)} of {sum(tracks)}")
            axes.set_xlim(0, max(full, 1) * 1.3)
            axes.set_xticks([0, full])
            axes.spines["left"].set_visible(False)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(length=0)
        left.set_yticks(rows)
        left.set_ylim(len(kept) - 0.4, -0.6)
        left.set_ylabel("layer")

    by_layer = "; ".join(f"layer {i}: {h} heads, FFN width {f}" for i, (h, f) in enumerate(kept))
    alt = f"Kept of {heads} heads and FFN width {ffn}: {by_layer}"
    return draw(name, alt, 0.75 + 0.24 * len(kept), fill)


def openness(name: str, panels: Sequence[tuple[str, Sequence[float], Sequence[Sequence[float]]]]) -> Drawing:
    """The share of each layer's gates that is open, over the training.

    panels: (title, steps, a row for each layer with a share for each step).
    """

    def fill(figure: Figure) -> None:
        ratios = [max(len(rows), 2) for _, _, rows in panels]
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
        colours = matplotlib.colormaps["cividis"].resampled(10)
        for axes, (title, steps, rows) in zip(grid, panels, strict=True):
            edges = range(len(rows) + 1)
            cells = axes.pcolormesh([0.0, *steps], edges, rows, cmap=colours, vmin=0, vmax=1)
            cells.set_edgecolor("face")
            axes.invert_yaxis()
            axes.set_title(title)
            axes.set_ylabel("layer" if len(rows) > 1 else "model")
            labelled = range(0, len(rows), 1 + len(rows) // 13)
            axes.set_yticks([row + 0.5 for row in labelled], [str(row) for row in labelled])
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        grid[-1].set_xlabel("step of the gate training")
        bar = figure.colorbar(cells, ax=list(grid), label="share of the gates open", aspect=30)
        bar.set_ticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])

    last = "; ".join(
        f"{title} at the end: {', '.join(f'{row[-1]:.2f}' for row in rows)}" for title, _, rows in panels
    )
    height = 0.7 + sum(0.55 + min(0.17 * len(rows), 2.4) for _, _, rows in panels)
    return draw(name, f"Share of open gates in each layer. {last}", height, fill)


def target(name: str, what: str, wanted: Line, expected: Line, decided: Sequence[float]) -> Drawing:
    """The cost that the training asked of the gates and the cost they had, as shares of the dense model's.

    what: what the cost counts. decided: the costs of the models that were made of these gates.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(wanted.x, wanted.y, color=LIGHT["second"], linestyle="--", label=wanted.label)
        axes.plot(expected.x, expected.y, color=LIGHT["first"], marker=".", label=expected.label)
        label = f"decided: {', '.join(f'{share:.3f}' for share in decided)}"
        for share in decided:
            axes.axhline(share, color=LIGHT["fourth"], linestyle=":", label=label)
            label = ""
        axes.set_title(f"share of the dense {what}")
        axes.set_xlabel("step of the gate training")
        axes.set_ylim(0, max(1.05, *wanted.y, *expected.y, *decided))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.7)
        figure.legend(loc="outside lower center", ncols=1, alignment="left")

    alt = f"At the end {expected.y[-1]:.3f} of the dense {what}, {wanted.y[-1]:.3f} wanted"
    return draw(name, alt, 3.3, fill)


def against_speed(name: str, y_label: str, lines: Sequence[Line], joined: bool) -> Drawing:
    """Scores over measured speed-up: ours as filled points with bars, others' as hollow ones.

    joined: each of our lines is a curve, not single points.
    """

    def fill(figure: Figure) -> None:
        axes = figure.subplots()
        own_lines = [line for line in lines if line.own]
        handles: list[Any] = []
        for number, line in enumerate(own_lines):
            handles.append(_draw_own(axes, line, joined, number))
        for number, line in enumerate([line for line in lines if not line.own]):
            colour, marker = style(-1 - number)
            handles += axes.plot(
                line.x, line.y, marker=marker, color=LIGHT[colour], label=line.label, linestyle=":",
                linewidth=1, markerfacecolor="none", markeredgewidth=1.4,
            )  # fmt: skip
        axes.autoscale_view()
        for limits, set_limits, least in (
            (axes.get_xlim(), axes.set_xlim, _LEAST_SPEEDS), (axes.get_ylim(), axes.set_ylim, _LEAST_POINTS),
        ):  # fmt: skip
            wider = max(0.0, least - (limits[1] - limits[0])) / 2
            set_limits(limits[0] - wider, limits[1] + wider)
        axes.set_xlabel("times as fast as the same system's dense model")
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.7)
        figure.legend(handles=handles, loc="outside lower center", ncols=1, alignment="left")

    def points(line: Line) -> str:
        return ", ".join(f"{x:.2f}x {y:.2f}" for x, y in line.points)

    alt = "; ".join(f"{line.label}: {points(line)}" for line in lines)
    rows = sum(1 + line.label.count("\n") for line in lines)
    return draw(name, f"{y_label}, over speed-up. {alt}", 2.9 + 0.19 * rows, fill)


def style(number: int) -> tuple[str, str]:
    """The colour and the marker of a series; those of 25 series differ in one of the two."""
    rounds, place = divmod(number, len(_COLOURS))
    return _COLOURS[place], _MARKERS[(place + rounds) % len(_MARKERS)]


def _draw_own(axes: Axes, line: Line, joined: bool, number: int) -> ErrorbarContainer:
    """Draw one of our lines; number: its place among them."""
    colour, marker = style(number)
    ends = line.ends or [(y, y) for y in line.y]
    # A point may lie outside of its interval, and a bar has no negative length.
    below = [max(y - low, 0.0) for y, (low, _) in zip(line.y, ends, strict=True)]
    above = [max(high - y, 0.0) for y, (_, high) in zip(line.y, ends, strict=True)]
    # A model's scores share one speed: the two lines are moved aside, so that no bar hides the other. Moved
    # artists do not count for the axes' limits by themselves.
    aside = ScaledTranslation((4 * number - 2) / 72, 0, axes.figure.dpi_scale_trans)
    corners = [(x, end) for x, pair in zip(line.x, ends, strict=True) for end in pair]
    axes.update_datalim([*line.points, *corners])
    return axes.errorbar(
        line.x, line.y, [below, above], fmt=marker, linestyle="-" if joined else "none", capsize=3,
        color=LIGHT[colour], label=line.label, transform=axes.transData + aside,
    )  # fmt: skip
