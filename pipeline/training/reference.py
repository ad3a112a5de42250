"""Choice of the stain reference: the field to whose stain the others are normalised.

The reference is the field nearest to the median of all fields in colour and stain, among those that are sharp, full of
tissue and rich in nuclei. When several references are wanted, they are the medoids of as many groups of fields.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pipeline import staintools_backend
from pipeline.errors import PipelineError
from pipeline.kernels.stain import (
    Extractor,
    StainFitError,
    extract_macenko,
    fit_lab,
    fit_reference,
    fit_stains,
    fit_transform,
    tissue_mask,
    tissue_pixels,
    white_level,
)
from pipeline.training.data import load_fields, source_name
from pipeline.training.field import Field, at_mpp

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

FOCUS_MPP = 0.5
"""Pixel size in µm at which sharpness is measured."""

MIN_TISSUE = 0.7
"""Minimum share of tissue in a reference."""

QUANTILE = 0.25
"""Quantile of sharpness and of nuclear area that a reference must reach."""

THUMBNAIL = 176


class NoReferenceError(PipelineError):
    """The stain of the fields cannot be fitted."""


@dataclass(frozen=True)
class Look:
    """Measurements of a field from which references are chosen.

    Parameters
    ----------
    lab_mean, lab_std : tuple of float
        Mean and standard deviation of L*, a* and b* over tissue.
    matrix : tuple of float
        Stain vectors by Macenko's method, hematoxylin then eosin.
    strengths : tuple of float
        99th percentiles of the concentrations of both stains.
    focus : float
        Variance of the Laplacian of the grey image at `FOCUS_MPP`, over tissue.
    tissue : float
        Share of tissue pixels.
    nuclei_per_mm2, nuclear_share : float
        Annotated nuclei per mm², and their share of the field's area.
    """

    lab_mean: tuple[float, ...]
    lab_std: tuple[float, ...]
    matrix: tuple[float, ...]
    strengths: tuple[float, ...]
    focus: float
    tissue: float
    nuclei_per_mm2: float
    nuclear_share: float

    @property
    def colour(self) -> np.ndarray:
        """Colour and stain as one vector, float64 ``(14,)``."""
        return np.r_[self.lab_mean, self.lab_std, self.matrix, np.log(self.strengths)]


@dataclass(frozen=True)
class Candidate:
    """A field that was considered as a reference, and the result.

    Parameters
    ----------
    name : str
        Name of the field.
    look : Look or None
        Its measurements; None when the stain cannot be fitted.
    refused : tuple of str
        Reasons why it cannot be a reference; empty when it can.
    distance : float or None
        Distance to the median of all fields, see `colour_space`; None when the stain cannot be fitted.
    nearest : str or None
        Name of the nearest reference; None when the stain cannot be fitted.
    """

    name: str
    look: Look | None
    refused: tuple[str, ...]
    distance: float | None = None
    nearest: str | None = None


@dataclass(frozen=True)
class Selection:
    """The references of a set of fields.

    Parameters
    ----------
    chosen : tuple of str
        Names of the references, the one that is nearest to most fields first.
    candidates : tuple of Candidate
        All fields, in the order in which they were given.
    limits : dict of str to float
        Minimum values that a reference had to reach, by attribute of `Look`.
    """

    chosen: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    limits: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the selection as plain JSON values."""
        return {
            "chosen": list(self.chosen),
            "rule": "nearest to the median of colour and stain among sharp fields with much tissue and many nuclei"
            if len(self.chosen) == 1
            else "medoids of colour and stain among sharp fields with much tissue and many nuclei",
            "limits": {name: round(value, 5) for name, value in self.limits.items()},
            "fields": [asdict(one) for one in self.candidates],
        }


def look_at(one: Field) -> Look:
    """Measure a field's colour, stain, sharpness and content.

    Raises
    ------
    StainFitError
        When the field's stain cannot be fitted.
    """
    pixels = tissue_pixels(one.image)
    stains, lab = fit_stains(pixels, extract_macenko), fit_lab(pixels)
    small = at_mpp(one.image, one.mpp, FOCUS_MPP)
    edges = cv2.Laplacian(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), cv2.CV_32F)[tissue_mask(small)]
    count = len(np.unique(one.labels[one.labels > 0]))
    return Look(
        lab_mean=tuple(lab["mean"]),
        lab_std=tuple(lab["std"]),
        matrix=tuple(np.ravel(stains["matrix"]).tolist()),
        strengths=tuple(stains["max_concentrations"]),
        focus=round(float(edges.var()) if edges.size else 0.0, 4),
        tissue=round(float(tissue_mask(one.image).mean()), 5),
        nuclei_per_mm2=round(count / (one.labels.size * one.mpp**2) * 1e6, 2),
        nuclear_share=round(float((one.labels > 0).mean()), 5),
    )


def colour_space(looks: Sequence[Look]) -> np.ndarray:
    """Return coordinates of fields whose Euclidean distances are Mahalanobis distances, with the median at the origin.

    Features are standardised; their correlation matrix is shrunk towards the identity by ``d / (d + n)`` for ``d``
    features of ``n`` fields, so that distances are defined for few fields as well.

    Returns
    -------
    numpy.ndarray
        float64 ``(n, d)``.
    """
    table = np.array([look.colour for look in looks])
    n, d = table.shape
    spread = table.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    centred = (table - table.mean(axis=0)) / scale
    share = d / (d + n)
    correlation = (1 - share) * (centred.T @ centred / n) + share * np.eye(d)
    root = np.linalg.cholesky(correlation)
    return np.linalg.solve(root, ((table - np.median(table, axis=0)) / scale).T).T


def medoids(distances: np.ndarray, allowed: np.ndarray, k: int) -> list[int]:
    """Choose up to `k` points that minimise the summed distance of all points to the nearest chosen one.

    Points are added greedily, then swapped as long as this lowers the sum.

    Parameters
    ----------
    distances : numpy.ndarray
        Distances between all points, ``(n, n)``.
    allowed : numpy.ndarray
        bool ``(n,)``: which points may be chosen.
    k : int
        Number of points to choose.

    Returns
    -------
    list of int
        Indices of the chosen points; ties go to the first.

    References
    ----------
    Kaufman and Rousseeuw, Clustering by means of medoids, 1987.
    """
    options = np.flatnonzero(allowed).tolist()
    chosen: list[int] = []

    def cost(points: list[int]) -> float:
        return float(distances[points].min(axis=0).sum())

    for _ in range(min(k, len(options))):
        chosen.append(min((i for i in options if i not in chosen), key=lambda i: cost([*chosen, i])))
    improved = True
    while improved:
        improved = False
        for place in range(len(chosen)):
            for i in options:
                tried = [*chosen[:place], i, *chosen[place + 1 :]]
                if i not in chosen and cost(tried) < cost(chosen) - 1e-12:
                    chosen, improved = tried, True
    return chosen


def select_references(fields: Sequence[Field], k: int = 1) -> Selection:
    """Choose the references of a set of fields.

    Parameters
    ----------
    fields : sequence of Field
        Training fields; must not include fields that are held out.
    k : int
        Number of references.

    Raises
    ------
    PipelineError
        When no field's stain can be fitted.
    """
    looks: list[Look | None] = []
    notes: list[list[str]] = []
    for one in fields:
        try:
            looks.append(look_at(one))
            notes.append([])
        except StainFitError as error:
            looks.append(None)
            notes.append([str(error)])
    fitted = [i for i, look in enumerate(looks) if look is not None]
    known = [look for look in looks if look is not None]
    if not known:
        raise NoReferenceError("no training field's stain can be fitted", "use stain: none")
    limits = {
        "tissue": MIN_TISSUE,
        "focus": float(np.quantile([look.focus for look in known], QUANTILE)),
        "nuclear_share": float(np.quantile([look.nuclear_share for look in known], QUANTILE)),
    }
    for i, look in zip(fitted, known, strict=True):
        for name, least in limits.items():
            value = getattr(look, name)
            if value < least:
                notes[i].append(f"{name.replace('_', ' ')} {value:.3g} below {least:.3g}")
    allowed = np.array([not notes[i] for i in fitted])
    if not allowed.any():
        log.warning("no field passes the limits of a reference; the medoid of all is taken")
        allowed[:] = True
    points = colour_space(known)
    middle = np.linalg.norm(points, axis=1)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    picked = [int(np.where(allowed, middle, np.inf).argmin())] if k == 1 else medoids(distances, allowed, k)
    served = distances[picked].argmin(axis=0)
    # The reference that is nearest to most fields comes first.
    order = sorted(range(len(picked)), key=lambda p: (-int((served == p).sum()), picked[p]))
    names = [fields[fitted[picked[p]]].name for p in range(len(picked))]
    place = {i: position for position, i in enumerate(fitted)}
    candidates = tuple(
        Candidate(
            one.name,
            looks[i],
            tuple(notes[i]),
            round(float(middle[place[i]]), 4) if i in place else None,
            names[served[place[i]]] if i in place else None,
        )
        for i, one in enumerate(fields)
    )
    return Selection(tuple(names[p] for p in order), candidates, limits)


def _extractors(method: str) -> dict[str, Extractor]:
    found: dict[str, Extractor] = {"macenko": extract_macenko}
    if method == "vahadane":
        staintools_backend.check_method(method)
        found[method] = staintools_backend.vahadane
    return found


def stain_reference(one: Field, method: str = "macenko") -> dict[str, Any]:
    """Return a field's stain as it is stored in a model package, for `method` and all methods without extra libraries.

    Raises
    ------
    PipelineError
        When the field's stain cannot be fitted, or `method` is not installed.
    """
    try:
        return fit_reference(one.image, _extractors(method))
    except StainFitError as error:
        raise NoReferenceError(f"{one.name} is not a stain reference: {error}", "choose another field") from None


def choose_reference(
    fields: Sequence[Field], name: str = "auto", method: str = "macenko", folder: Path | None = None
) -> tuple[Field, dict[str, Any]]:
    """Choose the field to whose stain the others are normalised.

    Parameters
    ----------
    fields : sequence of Field
        Candidates.
    name : str
        ``auto``, or the name of the field to take.
    method : str
        Stain method that the reference is for.
    folder : pathlib.Path, optional
        Folder for the explanation of the choice by ``auto``, see `write_selection`.

    Returns
    -------
    chosen : Field
        The field.
    reference : dict
        Its stain, see `stain_reference`.

    Raises
    ------
    PipelineError
        When there is no field called `name` or no stain can be fitted.
    """
    if name == "auto":
        selection = select_references(fields)
        if folder is not None:
            write_selection(fields, selection, folder)
        name = selection.chosen[0]
    chosen = next((one for one in fields if one.name == name), None)
    if chosen is None:
        raise PipelineError(f"the stain reference {name!r} is not a training field", "give a field's name, or auto")
    return chosen, stain_reference(chosen, method)


def normalise(image: np.ndarray, method: str, reference: dict[str, Any], strength: float = 1.0) -> np.ndarray | None:
    """Return an image in the stain of a reference, or None when its own stain cannot be fitted.

    Parameters
    ----------
    image : numpy.ndarray
        uint8 ``(H, W, 3)``.
    method : str
        One of `pipeline.kernels.stain.METHODS`; None is returned for ``none``.
    reference : dict
        Stain of the reference, from `stain_reference`.
    strength : float
        How far to move towards the reference, 0 to 1, see `pipeline.kernels.stain.fit_transform`.

    Returns
    -------
    numpy.ndarray or None
        uint8 ``(H, W, 3)``.
    """
    if method == "none":
        return None
    try:
        transform, _ = fit_transform(
            tissue_pixels(image), method, reference, _extractors(method), strength, white_level(image), adapt=True
        )
    except StainFitError:
        return None
    return transform.apply(image)


# --- contact sheet ---------------------------------------------------------------------------------------------------


def contact_sheet(fields: Sequence[Field], selection: Selection) -> Image:
    """Return a picture of all candidates.

    Chosen ones come first, framed in green, then the others by distance to the median; captions of refused ones are
    grey.

    Parameters
    ----------
    fields : sequence of Field
        The fields of `selection`.
    selection : Selection
        The selection to show.

    Returns
    -------
    PIL.Image.Image
        RGB image.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = {one.name: one.image for one in fields}

    def rank(one: Candidate) -> tuple[bool, float]:
        return one.name not in selection.chosen, float("inf") if one.distance is None else one.distance

    ordered = sorted(selection.candidates, key=rank)
    columns = min(6, len(ordered))
    margin, gap, text, head = 18, 14, 44, 48
    rows = -(-len(ordered) // columns)
    width = max(2 * margin + columns * (THUMBNAIL + gap) - gap, 560)
    sheet = Image.new("RGB", (width, head + rows * (THUMBNAIL + text + gap) + margin), (250, 250, 252))
    draw = ImageDraw.Draw(sheet)
    title, small = ImageFont.load_default(16), ImageFont.load_default(11)
    draw.text((margin, 14), f"Stain reference: {', '.join(selection.chosen)}", (34, 34, 40), title)
    for index, one in enumerate(ordered):
        x = margin + index % columns * (THUMBNAIL + gap)
        y = head + index // columns * (THUMBNAIL + text + gap)
        crop = images[one.name]
        side = min(crop.shape[:2])
        top, left = (crop.shape[0] - side) // 2, (crop.shape[1] - side) // 2
        thumbnail = cv2.resize(
            crop[top : top + side, left : left + side], (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA
        )
        sheet.paste(Image.fromarray(thumbnail), (x, y))
        if one.name in selection.chosen:
            draw.rectangle((x - 4, y - 4, x + THUMBNAIL + 3, y + THUMBNAIL + 3), outline=(30, 140, 60), width=4)
        quiet = (150, 150, 158) if one.refused else (34, 34, 40)
        distance = "no distance" if one.distance is None else f"distance {one.distance:.2f}"
        for line, caption in enumerate((one.name, distance, *one.refused[:1])):
            draw.text((x, y + THUMBNAIL + 4 + 13 * line), _fit(draw, caption, small), quiet, small)
    return sheet


def _fit(draw: Any, text: str, font: Any) -> str:
    while draw.textlength(text, font) > THUMBNAIL and len(text) > 4:
        text = text[:-2].rstrip("…") + "…"
    return text


def write_selection(fields: Sequence[Field], selection: Selection, folder: Path) -> None:
    """Write a selection to a folder: ``reference.json`` and the contact sheet ``reference.png``."""
    from pipeline.batch.stage import whole_files
    from pipeline.training.files import save_json

    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / "reference.json", selection.to_json())
    with whole_files(folder / "reference.png", shared=True) as (staged,):
        contact_sheet(fields, selection).save(staged)


# --- command ---------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline reference``."""
    parser.add_argument("data", nargs="*", metavar="KIND=FOLDER", help="annotated fields, as in labels=data/mine")
    parser.add_argument("--config-json", type=Path, metavar="FILE", help="a train section: its data, or its holdout's")
    parser.add_argument("--split", type=Path, metavar="FILE", help="split.json of a training: only its training fields")
    parser.add_argument("--count", type=int, default=1, metavar="K", help="how many references (default: 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for reference.json, reference.png")


def _sources(args: argparse.Namespace) -> list[dict[str, Any]]:
    from pipeline.training.files import read_json

    if args.config_json is not None:
        section = read_json(args.config_json)
        sources = list(section.get("data", ())) if isinstance(section, dict) else []
        sources = [one for one in sources if source_name(one) == section.get("holdout")] or sources
    else:
        pairs = [text.partition("=") for text in args.data]
        wrong = next(
            (text for text, (kind, _, path) in zip(args.data, pairs, strict=True) if not (kind and path)), None
        )
        if wrong is not None:
            raise PipelineError(f"{wrong!r} is not a data source", "write KIND=FOLDER, as in labels=data/mine")
        sources = [{"kind": kind, "path": path, "name": Path(path).name or kind} for kind, _, path in pairs]
    if not sources:
        raise PipelineError("no data source is given", "write KIND=FOLDER, or --config-json FILE")
    return sources


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline reference``."""
    from pipeline.training.files import read_json

    if args.count < 1:
        raise PipelineError(f"--count {args.count} is not a number of references", "at least 1")
    fields = load_fields(_sources(args))
    if args.split is not None:
        split = read_json(args.split)
        names = set(split.get("train") or ()) if isinstance(split, dict) else set()
        fields = [one for one in fields if one.name in names]
        if not fields:
            raise PipelineError(f"{args.split} has none of these fields for training", "is it of the same data?")
    selection = select_references(fields, args.count)
    write_selection(fields, selection, args.out)
    for name in selection.chosen:
        served = sum(one.nearest == name for one in selection.candidates)
        print(f"{name}: nearest to {served} of {len(fields)} fields")
    refused = sum(bool(one.refused) for one in selection.candidates)
    print(f"{refused} of {len(fields)} fields are not candidates; reasons in {args.out / 'reference.json'}")
    return 0
