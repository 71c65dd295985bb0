"""The roofline plot: flop per byte against GFLOP/s, one panel a dtype, under the measured limits."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from benchmarks.report import Point, Report

ROOF, COLOURS = "#444444", plt.get_cmap("tab10").colors
# Where a label may stand beside its point, nearest first: offset in typographic points.
PLACES = [
    (far * math.cos(angle), far * math.sin(angle))
    for far in (10, 15, 22, 30, 40, 52, 70, 90)
    for angle in (0, math.pi, *(n * math.pi / 8 for n in range(16) if n % 8))
]
NEAR = 16  # a label farther than that has a line to its point


def draw(report: Report, path: Path) -> None:
    """Write the plot of a report as PNG."""
    dtypes = list(dict.fromkeys(point.dtype for point in report.points))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(7.2 * len(dtypes), 6), sharex=True, sharey=True, squeeze=False
    )
    ops = list(dict.fromkeys(point.op for point in report.points))
    colours = {op: COLOURS[n % len(COLOURS)] for n, op in enumerate(ops)}
    bandwidth = next(value for name, value in report.limits.items() if name.startswith("copy"))
    x = [point.intensity for point in report.points]
    xlim = (min(x) / 3, max(x) * 30)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        points = [point for point in report.points if point.dtype == dtype]
        _roof(ax, points[0].gflops / points[0].share_of_peak, bandwidth, xlim)
        ax.set(xscale="log", yscale="log", xlim=xlim, xlabel="flop per byte that must be moved", title=dtype)
        for point in points:
            ax.plot(point.intensity, point.gflops, "o", color=colours[point.op], markersize=7, zorder=3)
        ax.grid(True, which="major", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    low = min(point.gflops for point in report.points)
    peaks = [point.gflops / point.share_of_peak for point in report.points]
    axes[0][0].set(ylabel="GFLOP/s", ylim=(min(low, bandwidth * xlim[0]) / 2, max(peaks) * 2.5))
    processor, isa = report.machine["processor"], report.machine["instruction_set"]
    figure.suptitle(
        f"{processor}, {isa}, {report.machine['threads']} threads; per cent: of the roof above the point"
    )
    figure.tight_layout()
    figure.canvas.draw()
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        _name_slope(ax, bandwidth)
        _label(ax, [point for point in report.points if point.dtype == dtype], colours)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _roof(ax: Axes, peak: float, bandwidth: float, xlim: tuple[float, float]) -> None:
    x = np.geomspace(*xlim, 400)
    ax.plot(x, np.minimum(peak, bandwidth * x), color=ROOF, linewidth=1.6, zorder=2)
    ax.annotate(
        f"register tile: {peak:.0f} GFLOP/s",
        (xlim[1], peak),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color=ROOF,
        fontsize=9,
    )


def _name_slope(ax: Axes, bandwidth: float) -> None:
    """Write the bandwidth along its roof, near the lower end; the panel has its final size by now."""
    at = ax.get_xlim()[0] * 2
    (x0, y0), (x1, y1) = ax.transData.transform([(at, bandwidth * at), (2 * at, 2 * bandwidth * at)])
    angle = math.atan2(y1 - y0, x1 - x0)
    ax.annotate(
        f"copy: {bandwidth:.0f} GB/s",
        (at, bandwidth * at),
        xytext=(-6 * math.sin(angle), 6 * math.cos(angle)),
        textcoords="offset points",
        rotation=math.degrees(angle),
        rotation_mode="anchor",
        color=ROOF,
        fontsize=9,
    )


def _label(ax: Axes, points: list[Point], colours: dict[str, tuple]) -> None:
    """Put each label at the first place where it hides nothing: no point, no label, no roof."""
    renderer = ax.figure.canvas.get_renderer()
    pixels = ax.figure.dpi / 72
    centres = ax.transData.transform([(point.intensity, point.gflops) for point in points])
    taken = [Bbox.from_bounds(x - 5 * pixels, y - 5 * pixels, 10 * pixels, 10 * pixels) for x, y in centres]
    roof = ax.transData.transform(ax.lines[0].get_xydata())
    taken += [text.get_window_extent(renderer) for text in ax.texts]
    inside = ax.get_window_extent(renderer)
    for n in sorted(range(len(points)), key=lambda n: -centres[n][1]):
        point, best = points[n], None
        for dx, dy in PLACES:
            far = math.hypot(dx, dy) > NEAR
            text = ax.annotate(
                f"{point.label} {max(point.share_of_peak, point.share_of_bandwidth):.0%}",
                (point.intensity, point.gflops),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 4 else "right" if dx < -4 else "center",
                va="center",
                fontsize=9,
                color=colours[point.op],
                arrowprops=dict(arrowstyle="-", color="#999999", linewidth=0.7) if far else None,
            )
            box = text.get_window_extent(renderer)
            hidden = 3 * sum(box.overlaps(other) for other in taken) + any(box.contains(*at) for at in roof)
            hidden += 100 * (not (inside.x0 < box.x0 and box.x1 < inside.x1))
            if best is None or hidden < best[0]:
                if best:
                    best[1].remove()
                best = (hidden, text, box)
            else:
                text.remove()
            if hidden == 0:
                break
        taken.append(best[2])
