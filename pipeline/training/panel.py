"""Picture of the fields that a network predicts best, worst and in between: input, truth, prediction, mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.batch.stage import whole_files
from pipeline.evaluation.metrics import Overlaps
from pipeline.training.field import Field

SIDE = 420
"""Side in pixels of the part of a field that is shown."""

TRUTH, FOUND = (0, 235, 120), (0, 215, 255)
MISSED, MADE_UP = (235, 140, 10), (210, 30, 140)
"""RGB colours of the outlines, and of annotated and predicted nuclei without a match."""


def chosen_fields(images: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the best, median and worst field by AJI with their titles; fewer when there are fewer than three fields.

    >>> chosen_fields({"a": {"aji": 0.5}, "b": {"aji": 0.7}, "c": {"aji": 0.6}})
    {'b': 'best', 'c': 'median', 'a': 'worst'}
    """
    order = sorted(images, key=lambda name: (-images[name]["aji"], name))
    chosen = {"best": order[0], "worst": order[-1], "median": order[len(order) // 2]}
    names: dict[str, str] = {}
    for title in ("best", "median", "worst"):
        names.setdefault(chosen[title], title)
    return names


def crowded_window(labels: np.ndarray, side: int = SIDE) -> tuple[slice, slice]:
    """Return the square window of a label map that contains the most foreground, cropped to the map's size."""
    height, width = labels.shape
    rows, columns = min(side, height), min(side, width)
    table = cv2.integral((labels > 0).astype(np.uint8))
    sums = table[rows:, columns:] - table[:-rows, columns:] - table[rows:, :-columns] + table[:-rows, :-columns]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return slice(int(top), int(top) + rows), slice(int(left), int(left) + columns)


def outlined(image: np.ndarray, labels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return a copy of an RGB image with the outlines of the instances in `labels` drawn in `color`."""
    values = labels.astype(np.float32)
    kernel = np.ones((3, 3), np.uint8)
    edge = (cv2.dilate(values, kernel) != cv2.erode(values, kernel)) & (labels > 0)
    result = image.copy()
    result[edge] = color
    return result


def mistakes(image: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return a grey version of an RGB image with all nuclei outlined and those without a match (IoU > 0.5) filled."""
    overlaps = Overlaps.of(truth, found)
    over = overlaps.iou > 0.5
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    result = (0.5 * grey + 110).astype(np.uint8)
    for labels, matched, color in (
        (truth, overlaps.truth_index[over], MISSED),
        (found, overlaps.pred_index[over], MADE_UP),
    ):
        values, first = np.unique(labels[labels > 0], return_index=True)
        alone = np.delete(values[np.argsort(first)], matched)
        inside = np.isin(labels, alone)
        result[inside] = (0.45 * result[inside] + 0.55 * np.array(color)).astype(np.uint8)
    return outlined(outlined(result, truth, TRUTH), found, FOUND)


def write_panel(
    path: Path, fields: Sequence[Field], found: Mapping[str, np.ndarray], images: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the picture as a PNG file.

    Parameters
    ----------
    path : pathlib.Path
        File to write.
    fields : sequence of Field
        The fields that were scored.
    found : mapping of str to numpy.ndarray
        Label maps of the nuclei found, at the fields' own size, by field name.
    images : mapping of str to mapping
        Scores of the fields, by field name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    by_name = {one.name: one for one in fields}
    chosen = chosen_fields(images)
    figure = Figure(figsize=(13.2, 3.45 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, title) in enumerate(chosen.items()):
        one, labels = by_name[name], found[name]
        window = crowded_window(one.labels)
        image, truth, prediction = one.image[window], one.labels[window], labels[window]
        pictures = {
            "input": image,
            "truth": outlined(image, truth, TRUTH),
            "prediction": outlined(image, prediction, FOUND),
            "without a match: truth orange, prediction pink": mistakes(image, truth, prediction),
        }
        scores = images[name]
        caption = f"{title}: {name}" + (f" ({scores['organ']})" if scores.get("organ") else "")
        numbers = f"AJI {scores['aji']:.3f}, PQ {scores['pq']:.3f}, Dice {scores['dice']:.3f}"
        for column, (what, picture) in enumerate(pictures.items()):
            axes = figure.add_subplot(len(chosen), len(pictures), row * len(pictures) + column + 1)
            axes.imshow(picture)
            axes.set_axis_off()
            text = {0: f"{caption}\n{what}", 2: f"{numbers}\n{what}"}.get(column, f"\n{what}")
            axes.set_title(text.replace("$", r"\$"), fontsize=8, loc="left")
    with whole_files(path) as (staged,):
        figure.savefig(staged, dpi=110, format="png")
