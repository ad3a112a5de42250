"""``python -m pipeline classifier``: learn a classifier of nuclei from examples on slides that a run has finished.

A user names the examples by giving classes to objects in QuPath: a detection or a point names one nucleus, an area
names all nuclei in it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.slide_table import from_table
from pipeline.batch.stage import read_manifest, stub_text
from pipeline.errors import PipelineError
from pipeline.exchange.geojson import (
    CLASS_PROBABILITY,
    EXPORTED,
    MAX_COORDINATE,
    UNTYPED,
    class_names,
    iter_features,
    kind_of,
    nucleus_geometry,
    origin_of,
    reading,
    role,
    stated_origin,
)
from pipeline.kernels import classify as kernel
from pipeline.layout import RunLayout, SlideLayout
from pipeline.models.classifier import Classifier, Measured
from pipeline.models.package import NucleusClass
from pipeline.training.datasets.qupath import QUPATH, exports, polygon

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

LEAST = 10
"""Fewest named nuclei of a class."""

MOST = 2000
"""Most nuclei of a class to learn from, spread evenly over those named: more take longer and hardly help."""

FOLDS = 5
SQUARE_UM = 250.0
"""Side in µm of the squares whose nuclei are left out together in cross-validation, as neighbours are alike."""

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

NEAR_UM = 3.0
"""Largest distance in µm between a point and the nucleus that it names."""

PALETTE = (
    (200, 30, 60), (46, 110, 190), (60, 160, 70), (235, 150, 30), (140, 80, 170), (30, 160, 170), (230, 90, 160),
    (130, 130, 40),
)  # fmt: skip
"""Colours of classes that have none in QuPath."""


@dataclass(frozen=True, eq=False)
class Named:
    """The named nuclei of a slide.

    Parameters
    ----------
    slide : str
        Name of the slide.
    names : tuple of str
        Class of each nucleus.
    features : numpy.ndarray
        Features of the nuclei, float64 ``(n, f)``; see `pipeline.kernels.classify.features`.
    points : numpy.ndarray
        Centroids in µm, float64 ``(n, 2)``.
    patient : str
        Patient of the slide, as the slide table's column ``patient`` says; empty if it does not.
    """

    slide: str
    names: tuple[str, ...]
    features: np.ndarray
    points: np.ndarray
    patient: str = ""


@dataclass(frozen=True)
class _Objects:
    """Objects of an export that have a class: shapes (areas or outlines) and points, in level-0 pixels.

    `detected` says which shapes are detections. Those that the pipeline exported have a class even if the user has not
    changed it: the one that `exported` states, if QuPath has kept it, and otherwise, where `classified`, one of a
    classifier, or else the model's.
    """

    shapes: tuple[Any, ...]
    shape_names: tuple[str, ...]
    detected: tuple[bool, ...]
    exported: tuple[str | None, ...]
    classified: tuple[bool, ...]
    points: np.ndarray
    point_names: tuple[str, ...]


def read_objects(path: Path, colours: dict[str, tuple[int, int, int]], origin: tuple[int, int] = (0, 0)) -> _Objects:
    """Read the objects of an export that have a class.

    Parameters
    ----------
    path : pathlib.Path
        GeoJSON file from QuPath.
    colours : dict
        Colour of each class; those of new classes are added.
    origin : tuple of int
        Level-0 pixel from which coordinates count, unless the file states one.

    Raises
    ------
    PipelineError
        When the file is not GeoJSON from QuPath.
    """
    shapes, shape_names, detected, points, point_names = [], [], [], [], []
    exported, classified = [], []
    with reading(path, *QUPATH) as value:
        by = np.array(stated_origin(value, origin))
        for feature in iter_features(value):
            names = class_names(feature)
            if role(feature) != "nucleus" or not names or names[0] == UNTYPED:
                continue
            geometry = nucleus_geometry(feature)
            if geometry is None:
                continue
            if geometry["type"] in ("Point", "MultiPoint"):
                found = np.atleast_2d(np.array(geometry["coordinates"], np.float64))[:, :2]
                if not found.size:
                    continue
                found = found + by
                if not (np.abs(found) < MAX_COORDINATE).all():
                    raise ValueError("a point lies nowhere")
                points.append(found)
                point_names += [names[0]] * len(found)
            elif (shape := polygon(geometry)) is not None:
                shapes.append(_moved(shape, by))
                shape_names.append(names[0])
                detected.append(kind_of(feature) == "detection")
                exported.append((feature["properties"].get("metadata") or {}).get(EXPORTED))
                classified.append(_may_be_classified(feature["properties"].get("measurements") or {}))
            else:
                continue
            colour = _colour(feature["properties"]["classification"])
            if colour is not None and len(names) == 1:
                colours.setdefault(names[0], colour)
    where = np.concatenate([np.empty((0, 2)), *points])
    return _Objects(
        tuple(shapes),
        tuple(shape_names),
        tuple(detected),
        tuple(exported),
        tuple(classified),
        where,
        tuple(point_names),
    )


def _may_be_classified(measurements: Any) -> bool:
    """Whether a detection was exported from the results of a classifier, as it may be if it has no measurements."""
    if not measurements:
        return True
    if isinstance(measurements, dict):
        return CLASS_PROBABILITY in measurements
    return any(one.get("name") == CLASS_PROBABILITY for one in measurements)  # before version 0.4 of QuPath


def _colour(classification: Any) -> tuple[int, int, int] | None:
    """Return the RGB colour of a class, or None if it has none.

    QuPath writes it under ``color``, and before version 0.4 under ``colorRGB``.
    """
    if not isinstance(classification, dict):
        return None
    found = classification.get("color")
    if isinstance(packed := classification.get("colorRGB", found), int):
        found = [packed >> 16 & 255, packed >> 8 & 255, packed & 255]
    if not isinstance(found, list) or len(found) != 3:
        return None
    red, green, blue = (int(part) & 255 for part in found)
    return red, green, blue


def _moved(shape: Any, by: np.ndarray) -> Any:
    import shapely

    return shapely.transform(shape, lambda points: points + by) if by.any() else shape


def named_rows(
    nuclei: Path, centroids: np.ndarray, objects: _Objects, mpp: float, told: Sequence[pa.ChunkedArray] = ()
) -> tuple[dict[int, str], list[int]]:
    """Find the nuclei that the objects of an export name.

    A shape names the nuclei whose centroids it contains, or, if it contains none, the nucleus at its middle. A point
    names the nucleus that it lies in, or the nearest one within `NEAR_UM`. Where objects disagree about a nucleus, a
    smaller shape overrides a larger one, and a point overrides all shapes.

    Parameters
    ----------
    nuclei : pathlib.Path
        ``nuclei.parquet``.
    centroids : numpy.ndarray
        Centroids of the nuclei in level-0 pixels, float64 ``(n, 2)``.
    objects : _Objects
        Objects of the export.
    mpp : float
        µm per level-0 pixel.
    told : sequence of pyarrow.ChunkedArray
        Classes that the nuclei may have been exported with, first the model's, then a classifier's. A detection that
        still has the class with which it was exported names nothing.

    Returns
    -------
    names : dict of int to str
        Class of each named nucleus, by row.
    lost : list of int
        How many shapes, and how many points, lie on no nucleus.
    """
    import shapely

    shapes = np.array(objects.shapes, object)
    held: list[np.ndarray] = []
    if len(shapes):
        tree = shapely.STRtree(shapely.points(centroids))
        which, rows = tree.query(shapes, predicate="contains")
        held = np.split(rows, np.searchsorted(which, np.arange(1, len(shapes))))
    # A shape contains no centroid if it is a concave outline, or one of another run: take the nucleus at its middle.
    empty = [number for number, rows in enumerate(held) if not len(rows)]
    marks = [*shapely.point_on_surface(shapes[empty]), *shapely.points(objects.points)]
    found = _at(nuclei, centroids, np.array(marks, object), mpp) if marks else np.empty(0, np.int64)
    lost = [int((part < 0).sum()) for part in (found[: len(empty)], found[len(empty) :])]
    for number, row in zip(empty, found.tolist(), strict=False):
        held[number] = np.array([row] if row >= 0 else [], np.int64)

    def as_exported(number: int, row: int) -> bool:
        if (stated := objects.exported[number]) is not None:
            return stated == objects.shape_names[number]
        possible = told if objects.classified[number] else told[:1]
        return any(one[row].as_py() == objects.shape_names[number] for one in possible)

    names: dict[int, str] = {}
    for number in np.argsort(-shapely.area(shapes), kind="stable").tolist():
        name = objects.shape_names[number]
        for row in held[number].tolist():
            if not (objects.detected[number] and as_exported(number, row)):
                names[row] = name
    names |= {
        row: name for row, name in zip(found[len(empty) :].tolist(), objects.point_names, strict=True) if row >= 0
    }
    return names, lost


def _at(nuclei: Path, centroids: np.ndarray, marks: np.ndarray, mpp: float) -> np.ndarray:
    """Return the row of the nucleus nearest to each point, or -1 if none is within `NEAR_UM`."""
    import pyarrow as pa
    import shapely

    from pipeline.stores.nuclei import open_nuclei

    if not len(centroids):
        return np.full(len(marks), -1)
    reach = 30 / mpp  # 30 µm: no nucleus extends farther from its centroid
    near = shapely.STRtree(shapely.points(centroids)).query(shapely.buffer(marks, reach), predicate="contains")
    rows = np.unique(near[1])
    outlines: list[Any] = []
    start = 0
    with open_nuclei(nuclei) as file:
        for batch in file.iter_batches(columns=["geometry"]):
            here = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
            outlines += batch.column("geometry").take(pa.array(here)).to_pylist()
            start += batch.num_rows
    if not outlines:
        return np.full(len(marks), -1)
    tree = shapely.STRtree(shapely.from_wkb(outlines))
    result = np.full(len(marks), -1)
    found, nearest = tree.query_nearest(marks, max_distance=NEAR_UM / mpp, all_matches=False)
    result[found] = rows[nearest]
    return result


def gather(
    results: Path, annotations: Path, origin: str = "slide"
) -> tuple[list[Named], dict[str, str], dict[str, tuple[int, int, int]]]:
    """Read the named nuclei of all slides.

    Parameters
    ----------
    results : pathlib.Path
        Results folder of a run on the slides.
    annotations : pathlib.Path
        Folder with one QuPath export per annotated slide, named after the slide or its file.
    origin : {"slide", "bounds"}
        Corner from which coordinates in the exports count; see `pipeline.exchange.geojson.origin_of`.

    Returns
    -------
    named : list of Named
        Named nuclei of each slide that has any.
    model : dict
        ``name`` and ``sha256`` of the model that found the nuclei.
    colours : dict
        Colour by class, for classes that have one in QuPath.

    Raises
    ------
    PipelineError
        When a slide has no results or two exports, or the slides were run with different models.
    """
    from pipeline.stores.nuclei import about_nuclei, grid_of, open_nuclei

    layout = RunLayout(results)
    colours: dict[str, tuple[int, int, int]] = {}
    named: list[Named] = []
    model: dict[str, str] = {}
    if not layout.slide_table.is_file():
        raise PipelineError(f"{results} has no {layout.slide_table.name}", "give the results folder of a run")
    table_of_slides = from_table(layout.slide_table)
    known = {name: entry.name for entry in table_of_slides for name in (entry.path.name, entry.name)}
    patients = {entry.name: entry.extra.get("patient", "") for entry in table_of_slides}
    used: dict[str, Path] = {}
    for name, path in exports(annotations).items():
        slide = known.get(name, name)
        nuclei = layout.slide(slide).nuclei
        if not nuclei.is_file():
            raise PipelineError(
                f"{path.name}: {results} has no nuclei of a slide {slide!r}",
                "name the export as the slide in the run, capitals included, and run the slide first",
            )
        if (first := used.setdefault(slide, path)) != path:
            raise PipelineError(f"{first} and {path} are of one slide, {slide}", "keep one of them")
        objects = read_objects(path, colours, origin_of(read_manifest(layout.slide(slide).inspect), origin))
        if text := stub_text(nuclei):
            raise PipelineError(f"{path.name}: {text}", "fix the slide, or take the export away")
        with open_nuclei(nuclei) as file:
            table = file.read(columns=list(Measured.COLUMNS))
        here = about_nuclei(table.schema)["model"]
        if model and here["sha256"] != model["sha256"]:
            raise PipelineError(f"slide {slide!r} was run with another model than those before it", "run all with one")
        model = {"name": str(here["name"]), "sha256": str(here["sha256"])}
        measured, grid = Measured(table), grid_of(table)
        mpp = grid.mpp / np.sqrt(grid.scale_x * grid.scale_y)
        centroids = np.column_stack([table[f"centroid_{axis}"].to_numpy() for axis in "xy"])
        told = _classes_told(layout.slide(slide))
        names, (shapes, points) = named_rows(nuclei, centroids, objects, float(mpp), told)
        for lost, what in ((shapes, "outlines"), (points, "points")):
            if lost:
                log.warning("%s: %d %s lie on no nucleus that was found, and are left out", slide, lost, what)
        rows = np.array(sorted(names), np.int64)
        if not len(rows):
            log.warning("%s: the export names no nucleus", slide)
            continue
        kinds = tuple(names[row] for row in rows.tolist())
        named.append(Named(slide, kinds, measured.features(rows), measured.points[rows], patients.get(slide, "")))
        count = ", ".join(f"{name} {number}" for name, number in sorted(Counter(kinds).items()))
        log.info("%s: %s", slide, count)
    return named, model, colours


def _classes_told(paths: SlideLayout) -> list[pa.ChunkedArray]:
    """Return the classes with which the nuclei of a slide may have been exported: the model's and a classifier's."""
    import pyarrow.parquet as pq

    told = [pq.read_table(paths.nuclei, columns=["class"])["class"]]
    if paths.classified.is_file() and stub_text(paths.classified) is None:
        more = pq.read_table(paths.classified, columns=["class"])["class"]
        told += [more] if len(more) == len(told[0]) else []
    return told


def _divisions(named: Sequence[Named]) -> Iterator[tuple[np.ndarray, str]]:
    """Yield ways to group nuclei for cross-validation, the strictest first.

    Yields
    ------
    groups : numpy.ndarray
        Group of each nucleus, int64 ``(n,)``; the nuclei of a group are left out together.
    what : str
        What the groups are, in words.
    """
    sizes = [len(one.names) for one in named]
    patients = np.unique([one.patient or f"slide {one.slide}" for one in named], return_inverse=True)[1]
    if len(named) >= 3:
        if 2 <= len(set(patients)) < len(named):
            yield np.repeat(patients, sizes), "patients"
        yield np.repeat(np.arange(len(named)), sizes), "slides"
    places = np.floor(np.concatenate([one.points for one in named]) / SQUARE_UM)
    squares = np.column_stack([np.repeat(np.arange(len(named)), sizes), places])
    yield np.unique(squares, axis=0, return_inverse=True)[1].ravel(), f"squares of {SQUARE_UM:.0f} µm"


def _folds(named: Sequence[Named], kinds: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the fold of each nucleus, int64 ``(n,)``, and in words what a fold leaves out."""
    for groups, what in _divisions(named):
        if (fold := folds_of(groups, kinds)) is not None:
            return fold, what
    scattered = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        scattered[rows] = np.arange(len(rows)) % FOLDS
    return scattered, "scattered nuclei (one class lies in one place), which flatters"


def folds_of(groups: np.ndarray, kinds: np.ndarray) -> np.ndarray | None:
    """Distribute groups of nuclei over cross-validation folds of similar size.

    Parameters
    ----------
    groups, kinds : numpy.ndarray
        Group and class of each nucleus, int64 ``(n,)``.

    Returns
    -------
    numpy.ndarray or None
        Fold of each nucleus, int64 ``(n,)``. Groups are assigned from the largest on, each to the fold with the fewest
        nuclei. None if there is only one group, or leaving out a fold would leave a class without nuclei to learn from.
    """
    count = np.bincount(groups)
    folds = min(FOLDS, len(count))
    filled, fold_of = np.zeros(folds, np.int64), np.empty(len(count), np.int64)
    for group in np.argsort(-count, kind="stable").tolist():
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += count[group]
    fold = fold_of[groups]
    classes = len(np.unique(kinds))
    enough = folds > 1 and all(len(np.unique(kinds[fold != one])) == classes for one in range(folds))
    return fold if enough else None


def learn(matrix: np.ndarray, kinds: np.ndarray, classes: int, fold: np.ndarray) -> tuple[float, np.ndarray]:
    """Choose the penalty by cross-validation.

    Parameters
    ----------
    matrix : numpy.ndarray
        Features, float64 ``(n, f)``.
    kinds, fold : numpy.ndarray
        Class and fold of each nucleus, int64 ``(n,)``.
    classes : int
        Number of classes.

    Returns
    -------
    penalty : float
        The penalty of `PENALTIES` with the lowest log-loss, in which all classes have the same weight.
    found : numpy.ndarray
        Class probabilities of each nucleus, ``(n, classes)``, from the model that has not learned from its fold.
    """
    share = 1 / np.bincount(kinds)[kinds]
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in PENALTIES:
        found = np.empty((len(kinds), classes))
        for one in np.unique(fold):
            known = fold != one
            scale = kernel.scale_of(matrix[known])
            weights = kernel.fit_weights(kernel.design(matrix[known], *scale), kinds[known], classes, penalty)
            found[~known] = kernel.probabilities(kernel.design(matrix[~known], *scale), weights)
        loss = float(-(share * np.log(np.maximum(found[np.arange(len(kinds)), kinds], 1e-12))).sum())
        if best is None or loss < best[0]:
            best = (loss, penalty, found)
    assert best is not None
    return best[1], best[2]


def scores_of(kinds: np.ndarray, found: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Score predicted classes `found` against known classes `kinds`.

    Returns
    -------
    dict
        ``balanced_accuracy`` and ``accuracy``; ``classes`` with number of nuclei, recall and precision of each; and
        ``confusion``, with one row per known class and one column per predicted class.
    """
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (kinds, found), 1)
    right, known, told = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    recall, precision = right / np.maximum(known, 1), right / np.maximum(told, 1)
    return {
        "balanced_accuracy": round(float(recall.mean()), 4),
        "accuracy": round(float(right.sum() / max(known.sum(), 1)), 4),
        "classes": {
            name: {"nuclei": int(known[i]), "recall": round(recall[i], 4), "precision": round(precision[i], 4)}
            for i, name in enumerate(names)
        },
        "confusion": confusion.tolist(),
    }


def make_classifier(
    name: str, named: Sequence[Named], model: Mapping[str, str], colours: Mapping[str, tuple[int, int, int]]
) -> Classifier:
    """Learn a classifier and score it by cross-validation.

    Parameters
    ----------
    name : str
        Name of the classifier.
    named : sequence of Named
        The named nuclei of each slide.
    model : mapping
        ``name`` and ``sha256`` of the model that found the nuclei.
    colours : mapping
        Colour by class; classes without one get a colour of `PALETTE`.

    Raises
    ------
    PipelineError
        When there are fewer than two classes, or fewer than `LEAST` nuclei of a class.
    """
    named = _fewer(named)
    every = [one for slide in named for one in slide.names]
    count = Counter(every)
    names = sorted(count)
    if len(names) < 2:
        told = f"only {names[0]!r}" if names else "none"
        raise PipelineError(f"nuclei of two classes are needed, there are {told}", "set classes of nuclei in QuPath")
    for one in names:
        if count[one] < LEAST:
            raise PipelineError(
                f"class {one!r} has {count[one]} nuclei, at least {LEAST} are needed, some dozens are good",
                "name more of them, or take the class out",
            )
    kinds = np.array([names.index(one) for one in every])
    matrix = np.concatenate([one.features for one in named])
    fold, what = _folds(named, kinds)
    penalty, left_out = learn(matrix, kinds, len(names), fold)
    scores = scores_of(kinds, left_out.argmax(axis=1), names)
    scores = {"protocol": f"{len(np.unique(fold))} folds, leaving out {what}", "penalty": penalty} | scores
    mean, spread = kernel.scale_of(matrix)
    free = iter([colour for colour in PALETTE if colour not in colours.values()] * len(names))
    return Classifier(
        name=name,
        classes=tuple(NucleusClass(one, colours.get(one) or next(free, PALETTE[0])) for one in names),
        model=dict(model),
        mean=mean,
        spread=spread,
        weights=kernel.fit_weights(kernel.design(matrix, mean, spread), kinds, len(names), penalty),
        data=tuple({"slide": one.slide, "nuclei": dict(sorted(Counter(one.names).items()))} for one in named),
        scores=scores,
    )


def _fewer(named: Sequence[Named]) -> list[Named]:
    """Return at most `MOST` nuclei of each class, evenly spread over all slides."""
    every = np.array([one for slide in named for one in slide.names])
    kept = np.ones(len(every), bool)
    for name, count in sorted(Counter(every.tolist()).items()):
        if count > MOST:
            rows = np.flatnonzero(every == name)
            kept[rows] = False
            kept[rows[np.linspace(0, count - 1, MOST).astype(np.int64)]] = True
            log.info("%d of %d nuclei of class %r are learned from", MOST, count, name)
    parts = np.split(kept, np.cumsum([len(one.names) for one in named])[:-1]) if named else []
    return [
        replace(
            one,
            names=tuple(itertools.compress(one.names, some)),
            features=one.features[some],
            points=one.points[some],
        )
        for one, some in zip(named, parts, strict=True)
    ]


def table(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a text table of the scores."""
    names = list(scores["classes"])
    width = max(len(name) for name in (*names, "known as"))
    columns = [max(len(name), 7) for name in names]
    yield f"left out ({scores['protocol']}): balanced accuracy {scores['balanced_accuracy']:.3f}"
    head = "  ".join(name.rjust(size) for name, size in zip(names, columns, strict=True))
    yield f"{'known as'.ljust(width)}  {head}  recall  precision"
    for (name, one), row in zip(scores["classes"].items(), scores["confusion"], strict=True):
        cells = "  ".join(str(value).rjust(size) for value, size in zip(row, columns, strict=True))
        yield f"{name.ljust(width)}  {cells}  {one['recall']:6.3f}  {one['precision']:9.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline classifier``."""
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="results folder of a finished run")
    parser.add_argument(
        "--annotations", type=Path, required=True, metavar="DIR",
        help="QuPath's exports of slides on which nuclei were given classes: SLIDE.geojson",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="classifier to write (.json)")
    parser.add_argument(
        "--origin", choices=("slide", "bounds"), default="slide",
        help="corner from which the exports count: bounds for those of QuPath on MIRAX and Leica SCN (default: slide)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline classifier``."""
    if not args.annotations.is_dir():
        raise PipelineError(
            f"--annotations {str(args.annotations)!r} is not a folder", "give the folder of the exports"
        )
    made = make_classifier(args.out.stem, *gather(args.results, args.annotations, args.origin))
    made.save(args.out)
    print("\n".join(table(made.scores)))
    print(f"written: {args.out}; use it: snakemake --cores 8 --config slides=... results=... classifier={args.out}")
    return 0
