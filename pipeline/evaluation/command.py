"""Command ``evaluate``: compare predicted nuclei with known ones, file by file or folder by folder."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.batch.stage import stub_text, write_json
from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import METRICS, class_scores, score_overlaps
from pipeline.evaluation.readers import (
    SUFFIXES,
    count_classes,
    load,
    on_same_part,
    overlay,
    same_nuclei,
    slide_box,
    stem,
    told_outside,
)
from pipeline.layout import folder_name

log = logging.getLogger(__name__)

TITLES = {
    "aji": "AJI",
    "aji_plus": "AJI+",
    "pq": "PQ",
    "sq": "SQ",
    "dq": "DQ",
    "dice": "Dice",
    "iou": "IoU",
    "f1": "F1",
}
"""Column titles of the scores in the table."""


def files_by_stem(path: Path) -> dict[str, Path]:
    """Find the files with nuclei at a path.

    Parameters
    ----------
    path : pathlib.Path
        A file or a folder.

    Returns
    -------
    dict of str to pathlib.Path
        The file by its stem. Of a folder: its files by their stems, and the ``nuclei.parquet`` (or its GeoJSON) in each
        of its folders by the name of that folder, as in ``results/slides``.

    Raises
    ------
    PipelineError
        When there is nothing to read, or two files have the same name.
    """
    if not path.exists():
        raise PipelineError(f"{path} is missing", "give a file or a folder of them")
    if not path.is_dir():
        if failed := stub_text(path):
            raise PipelineError(f"{path} holds no nuclei: {failed}", "give a slide that is finished")
        return {stem(path): path}
    found: dict[str, Path] = {}
    for entry in sorted(path.iterdir()):
        name = entry.name
        if name.startswith("."):
            continue
        if entry.is_dir():
            name, target = _of_slide(entry)
        else:
            name, target = stem(entry), entry if entry.name.lower().endswith(SUFFIXES) else None
        if target is None:
            continue
        if failed := stub_text(target):
            log.warning("%s holds no nuclei and is left out: %s", target, failed)
            continue
        if name in found:
            raise PipelineError(f"{found[name]} and {target} have one name", "keep one of them in the folder")
        found[name] = target
    if not found:
        raise PipelineError(f"{path} holds nothing to compare", f"known are {', '.join(SUFFIXES)}")
    return found


def _of_slide(folder: Path) -> tuple[str, Path | None]:
    """Name of the slide whose results a folder holds, and the file with its nuclei, by a classifier if there is one."""
    name = str(_metrics(folder).get("slide", folder.name))
    name = name if folder_name(name) == folder.name else folder.name  # a copy, say
    nuclei, classified = folder / "nuclei.parquet", folder / "classified.parquet"
    if all(file.is_file() and not stub_text(file) for file in (nuclei, classified)):
        if same_nuclei(classified, nuclei):
            return name, classified
        log.warning("%s is of other nuclei than nuclei.parquet, and is left out", classified)
    inside = (nuclei, folder / "nuclei.geojson.gz", folder / "nuclei.geojson")
    return name, next((file for file in inside if file.is_file()), None)


def _metrics(folder: Path) -> dict[str, Any]:
    """Return ``metrics.json`` of the slide whose results a folder holds; empty if there is none."""
    try:
        found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _origin(prediction: Path) -> tuple[int, int]:
    """Level-0 pixel from which a slide's files for QuPath count, and so its known nuclei; (0, 0) if it is not known."""
    x, y = _metrics(prediction.parent).get("geojson_origin") or (0, 0)
    return int(x), int(y)


def pairs(pred: Path, truth: Path) -> tuple[dict[str, tuple[Path, Path]], dict[str, list[str]]]:
    """Pair predictions with truths.

    Two files are paired whatever their names; files in folders are paired by their stems.

    Returns
    -------
    pairs : dict of str to tuple of pathlib.Path
        Prediction and truth by name.
    alone : dict of str to list of str
        Names that are left out because they have no partner, of ``pred`` and of ``truth``.

    Raises
    ------
    PipelineError
        When nothing matches.
    """
    predictions, truths = files_by_stem(pred), files_by_stem(truth)
    if not pred.is_dir() and not truth.is_dir():
        return {stem(truth): (pred, truth)}, {"pred": [], "truth": []}
    common = sorted(predictions.keys() & truths.keys())
    if not common:
        raise PipelineError(
            f"{pred} and {truth} share no name: {next(iter(predictions))!r} ..., {next(iter(truths))!r} ...",
            "name them alike but for the suffix",
        )
    alone = {
        "pred": sorted(predictions.keys() - truths.keys()),
        "truth": sorted(truths.keys() - predictions.keys()),
    }
    for folder, names in ((pred, alone["pred"]), (truth, alone["truth"])):
        if names:
            more = ", ..." if len(names) > 5 else ""
            log.warning(
                "%d of %s have no partner and are left out: %s", len(names), folder, ", ".join(names[:5]) + more
            )
    return {name: (predictions[name], truths[name]) for name in common}, alone


def evaluate(pred: Path, truth: Path, within: int = 0) -> dict[str, Any]:
    """Compare predicted nuclei with known ones.

    Parameters
    ----------
    pred, truth : pathlib.Path
        Files, or folders of them.
    within : int
        Only nuclei that have a pixel in the central square of this side (in pixels) are counted for R²; 0 counts all.

    Returns
    -------
    dict
        ``images``: the scores of each image by its name; ``mean``: the mean of each score over the images;
        ``left_out``: names without a partner, of ``pred`` and of ``truth``. Where there are classes to compare (two or
        more in all, and at least one on both sides) also ``types``, see `pipeline.evaluation.metrics.class_scores`, and
        in ``images`` the ``type_counts`` from which they are computed.

    Raises
    ------
    PipelineError
        When something cannot be read or compared.
    """
    images: dict[str, dict[str, Any]] = {}
    counts: dict[str, dict[str, Any]] = {}
    matched, alone = pairs(pred, truth)
    for name, (prediction, known) in matched.items():
        try:
            box = slide_box(prediction)
            truth_nuclei = load(known, _origin(prediction))
            both = truth_nuclei, load(prediction) if box is None else on_same_part(truth_nuclei, prediction, box)
            overlaps, outside = overlay(*both, box)
            images[name] = row = score_overlaps(overlaps) | {"n_outside": outside}
            if (classes := count_classes(*both, overlaps, within)) is not None:
                counts[name] = classes
        except PipelineError as error:
            if str(prediction) in str(error) or str(known) in str(error):
                raise
            raise PipelineError(f"{prediction} and {known}: {error}") from None
        if row["n_outside"]:
            log.warning("%s: %s", known, told_outside(row["n_outside"], row["n_truth"]))
    mean = {metric: sum(row[metric] for row in images.values()) / len(images) for metric in METRICS}
    result: dict[str, Any] = {"images": images, "mean": mean, "left_out": alone}
    types = class_scores(list(counts.values()))
    there, found = ({n for n, row in types["classes"].items() if row[key]} for key in ("n_truth", "n_pred"))
    if len(there | found) < 2 or not found:
        return result
    if there & found:
        for name, classes in counts.items():
            images[name]["type_counts"] = classes
        return result | {"types": types}
    if len(there) > 1 and len(found) > 1:
        log.warning(
            "classes are not scored, for no name is in both: %s (known), %s (found); name them alike",
            *(", ".join(sorted(names)) for names in (there, found)),
        )
    return result


def table(result: dict[str, Any]) -> str:
    """Format the scores as text: one image per line, the mean last."""
    rows = [("image", *TITLES.values(), "truth", "found")]
    for name, row in result["images"].items():
        rows.append((name, *(f"{row[metric]:.4f}" for metric in TITLES), str(row["n_truth"]), str(row["n_pred"])))
    totals = (str(sum(row[key] for row in result["images"].values())) for key in ("n_truth", "n_pred"))
    rows.append(("mean", *(f"{result['mean'][metric]:.4f}" for metric in TITLES), *totals))
    return _aligned(rows)


def types_table(types: dict[str, Any]) -> str:
    """Format the scores of the classes as text: one class per line, the means last."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    rows = [("class", "PQ", "SQ", "F1", "R2", "truth", "found")]
    for name, row in sorted(types["classes"].items()):
        scores = (text(row[key]) for key in ("pq", "sq", "f1", "r2"))
        rows.append((name, *scores, str(row["n_truth"]), str(row["n_pred"])))
    means = (("mPQ+", "mpq_plus"), ("R2", "r2"), (f"right of {types['matched']} matched nuclei", "accuracy"))
    return "\n".join([_aligned(rows), ", ".join(f"{title} {text(types[key])}" for title, key in means)])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if index == 0 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline evaluate``."""
    parser.add_argument(
        "pred", type=Path, metavar="PRED", help="nuclei found: GeoJSON(.gz), parquet, PNG, TIFF, npy, or a folder"
    )
    parser.add_argument("truth", type=Path, metavar="TRUTH", help="nuclei known: the same kinds; folders match by name")
    parser.add_argument(
        "--count-within", type=int, default=0, metavar="PIXELS",
        help="R2 is about nuclei with a pixel in the central square of this side (CoNIC: 224)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file too")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline evaluate``."""
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.count_within < 0:
        raise PipelineError(f"--count-within {args.count_within}", "give a number of pixels, or 0 for all")
    result = evaluate(args.pred, args.truth, args.count_within)
    print(table(result))
    if "types" in result:
        print("", types_table(result["types"]), sep="\n")
    if args.json is not None:
        write_json(args.json, result)
    return 0
