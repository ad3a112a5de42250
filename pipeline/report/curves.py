"""Training curves: read them from the trainer's logs, and draw them as SVG for a page and as PNG."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.stage import whole_files
from pipeline.report.page import PALETTE, nice_ticks

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values of a curve."""

MOST_POINTS = 400
"""Maximum number of points of a line on a page."""

CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", "Loss", (("train/loss", "training"), ("val/loss", "validation"))),
    ("accuracy", "Accuracy of pixels", (("val/accuracy", "validation"),)),
    ("dice", "Dice", (("val/dice", "nuclei"), ("val/pixel_dice", "pixels"))),
    ("iou", "IoU", (("val/iou", "nuclei"), ("val/pixel_iou", "pixels"))),
    ("aji", "AJI and PQ", (("val/aji", "AJI"), ("val/pq", "PQ"))),
)
"""Charts of a training: name, title, and for each line the name of the logged value and its label."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Read all values that a training logged, by name.

    Parameters
    ----------
    folder : pathlib.Path
        Folder with a ``log-STEP/metrics.csv`` of each run, where STEP is the step at which the run started or resumed.
        A run replaces what earlier runs logged after its STEP.

    Returns
    -------
    dict of str to tuple of numpy.ndarray
        Steps (int64) and values (float64), in the order of the steps.
    """
    points: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("log*/metrics.csv")):
        start = int(path.parent.name.partition("-")[2] or 0)
        for values in points.values():
            for step in [s for s in values if s > start]:
                del values[step]
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                for name, text in row.items():
                    if "/" in (name or "") and text:
                        points.setdefault(name, {})[int(row["step"]) + 1] = float(text)
    return {
        name: (np.array(sorted(values)), np.array([values[s] for s in sorted(values)]))
        for name, values in points.items()
        if values
    }


def smoothed(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Exponential moving average over about `share` of the points, without bias at the beginning."""
    decay = 1 - 1 / max(1.0, share * len(values))
    result, mean, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        result[index] = mean / weight
    return result


def thin(curve: Curve) -> Curve:
    """Reduce a curve to at most `MOST_POINTS` points, evenly spread, including the last."""
    steps, values = curve
    if len(steps) <= MOST_POINTS:
        return curve
    keep = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
    return steps[keep], values[keep]


def line_chart(
    name: str, title: str, lines: Sequence[tuple[str, Curve]], per_epoch: float | None = None, smooth: bool = False
) -> dict[str, Any] | None:
    """Geometry of a line chart over steps.

    Parameters
    ----------
    name, title : str
        Name and title of the chart.
    lines : sequence of (str, Curve)
        Label and points of each line.
    per_epoch : float, optional
        Steps in an epoch, shown below the axis.
    smooth : bool
        Draw the first line as a running mean, with its points behind it.

    Returns
    -------
    dict or None
        Numbers for the template, in pixels; None if no line has points.
    """
    lines = [(label, curve) for label, curve in lines if len(curve[0])]
    if not lines:
        return None
    width, height, left, right, top, foot = 520.0, 270.0, 46.0, 14.0, 12.0, 40.0
    last = max(int(curve[0][-1]) for _, curve in lines)
    # A few extreme values at the beginning of a training must not flatten the rest.
    highest = max(float(np.percentile(curve[1], 98)) for _, curve in lines)
    ticks_y = nice_ticks(highest) if highest > 1 else nice_ticks(max(highest, 0.05), 5)
    ticks_x = [t for t in nice_ticks(last, 5) if t <= last * 1.001]

    def x_of(step: float) -> float:
        return left + (width - left - right) * step / max(last, 1)

    def y_of(value: float) -> float:
        share = min(max(value / ticks_y[-1], 0.0), 1.0)
        return height - foot - (height - foot - top) * share

    def path(curve: Curve) -> str:
        return " ".join(f"{x_of(s):.1f},{y_of(v):.1f}" for s, v in zip(*thin(curve), strict=True))

    drawn = []
    for index, (label, curve) in enumerate(lines):
        mean = (curve[0], smoothed(curve[1])) if smooth and index == 0 else curve
        steps, values = thin(mean)
        drawn.append(
            {
                "label": label,
                "color": PALETTE[index % len(PALETTE)],
                "points": path(mean),
                "behind": path(curve) if mean is not curve else "",
                "dot": {"x": round(x_of(steps[-1]), 1), "y": round(y_of(values[-1]), 1)} if len(steps) == 1 else None,
                "data": {"steps": steps.tolist(), "values": [round(float(v), 4) for v in values]},
            }
        )
    return {
        "name": name,
        "title": title,
        "width": width,
        "height": height,
        "left": left,
        "right": width - right,
        "bottom": height - foot,
        "top": top,
        "last": last,
        "per_epoch": per_epoch,
        "below": f"step ({per_epoch:.3g} an epoch)" if per_epoch else "step",
        "x": [{"at": round(x_of(t), 1), "label": f"{t:,.0f}".replace(",", "\u202f")} for t in ticks_x if t == int(t)],
        "y": [{"at": round(y_of(t), 1), "label": f"{t:g}"} for t in ticks_y],
        "lines": drawn,
    }


def training_charts(curves: Mapping[str, Curve], per_epoch: float | None = None) -> list[dict[str, Any]]:
    """The charts of one training."""
    charts = [
        line_chart(
            name, title, [(label, curves[key]) for key, label in keys if key in curves], per_epoch, name == "loss"
        )
        for name, title, keys in CHARTS
    ]
    return [chart for chart in charts if chart is not None]


def compared_charts(runs: Mapping[str, Mapping[str, Curve]]) -> list[dict[str, Any]]:
    """Charts that compare several trainings, with one line for each."""
    wanted = (("val/aji", "AJI"), ("val/pixel_dice", "Dice of pixels"), ("val/pixel_iou", "IoU of pixels"),
              ("val/accuracy", "Accuracy of pixels"), ("val/loss", "Validation loss"))  # fmt: skip
    charts = [
        line_chart(key, title, [(name, curves[key]) for name, curves in runs.items() if key in curves])
        for key, title in wanted
    ]
    return [chart for chart in charts if chart is not None]


def draw_charts(charts: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write charts as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(charts), 3)
    rows = math.ceil(len(charts) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, index + 1)
        for line in chart["lines"]:
            data = line["data"]
            axes.plot(data["steps"], data["values"], color=line["color"], lw=1.6, label=line["label"],
                      marker="o" if len(data["steps"]) == 1 else None)  # fmt: skip
        axes.set_title(chart["title"], fontsize=10)
        axes.set_ylim(0, float(chart["y"][-1]["label"]))
        axes.set_xlabel(chart["below"], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    with whole_files(path) as (staged,):
        figure.savefig(staged, dpi=130, format="png")
