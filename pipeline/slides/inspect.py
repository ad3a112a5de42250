"""Stage ``inspect``: check that a slide can be read, and find its size and pixel size."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.slide_table import could_be_read
from pipeline.batch.stage import add_stage_arguments, keywords, run_stage
from pipeline.errors import SlideError
from pipeline.kernels.tissue import find_tissue
from pipeline.slides.open import READERS, open_slide, resolve_mpp
from pipeline.slides.slide import Slide

log = logging.getLogger(__name__)

MAGNIFIED_UM = (3.0, 16.0)
"""Usual range of mpp times magnification, the size of a pixel on the sensor in µm: 10 for most scanners."""

MPP_TOLERANCE = 0.1
"""Relative difference up to which a given pixel size may deviate from the file's without a warning."""

_PROBES = 9
_PROBE_SIDE = 256
_LOOK_PIXELS = 16_000_000


def probe_places(slide: Slide, mpp: float) -> list[tuple[int, int]]:
    """Level-0 corners of test windows, spread over the tissue.

    Parameters
    ----------
    slide : Slide
        The slide.
    mpp : float
        µm per level-0 pixel.

    Returns
    -------
    list of tuple of int
        x and y; spread over the whole slide if no small level shows the tissue.
    """
    x0, y0, width, height = slide.bounds or (0, 0, slide.width, slide.height)
    number = max(i for i, level in enumerate(slide.levels) if level.usable)
    level = slide.levels[number]
    tissue = np.ones((3, 3), bool)
    if level.width * level.height <= _LOOK_PIXELS:
        try:
            look = slide.read(
                number,
                int(x0 / level.scale_x),
                int(y0 / level.scale_y),
                max(1, int(width / level.scale_x)),
                max(1, int(height / level.scale_y)),
            )
        except SlideError:
            look = None
        if look is not None:
            step = max(1, min(round(8 / (mpp * level.scale_x)), min(look.shape[:2]) // 32))
            found = find_tissue(np.ascontiguousarray(look[::step, ::step]), mpp * level.scale_x * step).mask
            tissue = found if found.any() else tissue
    rows, columns = np.nonzero(tissue)
    # Evenly spaced in raster order, so that every part of the tissue is met.
    chosen = np.unique(np.linspace(0, len(rows) - 1, _PROBES).round().astype(int))
    places = []
    for i in chosen:
        x = x0 + (columns[i] + 0.5) / tissue.shape[1] * width - _PROBE_SIDE / 2
        y = y0 + (rows[i] + 0.5) / tissue.shape[0] * height - _PROBE_SIDE / 2
        places.append(
            (
                int(np.clip(x, 0, max(0, slide.width - _PROBE_SIDE))),
                int(np.clip(y, 0, max(0, slide.height - _PROBE_SIDE))),
            )
        )
    return places


def like_ycbcr(pixels: np.ndarray) -> bool:
    """Whether the pixels of a slide, uint8 ``(n, 3)``, look like YCbCr shown as RGB.

    Luma takes the place of red then, and the colour differences that of green and blue. White becomes (255, 128, 128):
    all bright pixels have this colour, and no pixel is far from it in green and blue.
    """
    luma, differences = pixels[:, 0], np.abs(pixels[:, 1:].astype(np.int16) - 128).max(axis=1)
    bright = luma >= 235
    if np.count_nonzero(bright) < max(100, len(pixels) // 100):
        return False
    return bool(np.percentile(differences[bright], 99) <= 12 and np.percentile(differences, 99) <= 60)


def described_size(comment: str) -> tuple[int, int] | None:
    """Width and height of the scan by the description of an Aperio slide; None if it does not tell them.

    >>> described_size("Aperio Image Library v11.2.1\\r\\n46000x32914 [42673,5576 2220x2967] (240x240) JPEG/RGB Q=30")
    (2220, 2967)
    """
    found = re.search(r"\[\d+,\d+ (\d+)x(\d+)\]", comment) or re.search(r"\n\s*(\d+)x(\d+)\b", comment)
    return (int(found[1]), int(found[2])) if found else None


def size_doubts(slide: Slide) -> list[str]:
    """Warning about an Aperio slide whose size is not the one that its description tells, and so its pixel size."""
    comment = str(slide.properties.get("openslide.comment") or slide.properties.get("tiffslide.comment") or "")
    told = described_size(comment) if slide.vendor == "aperio" else None
    if told is None or told == (slide.width, slide.height):
        return []
    return [
        f"the file's description is of an image of {told[0]} x {told[1]} pixels, not {slide.width} x {slide.height}: "
        "was it rescaled, and is the pixel size right?"
    ]


def probe(slide: Slide, mpp: float) -> dict[str, int]:
    """Decode a few windows of tissue to see whether the slide can be read.

    Returns
    -------
    dict
        Numbers of windows ``tried`` and ``failed``. Single failures are left to stage ``tiles``.

    Raises
    ------
    SlideError
        When more than half of the windows fail, or their colours are not those of a slide.
    """
    places = probe_places(slide, mpp)
    failed: list[SlideError] = []
    seen: list[np.ndarray] = []
    for x, y in places:
        try:
            pixels = slide.read(0, x, y, min(_PROBE_SIDE, slide.width - x), min(_PROBE_SIDE, slide.height - y))
            seen.append(pixels.reshape(-1, 3))
        except SlideError as error:
            failed.append(error)
    if 2 * len(failed) > len(places):
        raise SlideError(
            f"{len(failed)} of {len(places)} tiles tried cannot be decoded, the first: {failed[0].reason}",
            "copy or export the slide again",
        )
    if seen and like_ycbcr(np.concatenate(seen)):
        raise SlideError(
            "its glass has the colour of YCbCr that is shown as RGB",
            "try another `reader`, or convert it to RGB with the program that wrote it",
        )
    if failed:
        log.warning("%s: %d of %d tiles tried cannot be decoded", slide.path.name, len(failed), len(places))
    return {"tried": len(places), "failed": len(failed)}


def mpp_doubts(
    mpp: float, source: str, objective: float | None, metadata: tuple[float, float] | None = None
) -> list[str]:
    """Warnings about a pixel size, µm per level-0 pixel from `source`, that contradicts the file's own metadata."""
    doubts = []
    if objective is not None and not MAGNIFIED_UM[0] <= mpp * objective <= MAGNIFIED_UM[1]:
        doubts.append(
            f"{mpp:g} µm/px of the {source} are unusual for the {objective:g}x objective that the file names, which "
            f"gives some {10 / objective:.2g}: is the pixel size right?"
        )
    if metadata is not None and abs(mpp / max(metadata) - 1) > MPP_TOLERANCE:
        doubts.append(
            f"{mpp:g} µm/px of the {source} are taken instead of the {max(metadata):.4g} that the file states: is that "
            "right?"
        )
    return doubts


def reopen(info: Mapping[str, Any]) -> Slide:
    """Open the slide that a ``slide.json`` describes, with the reader that stage ``inspect`` chose.

    Raises
    ------
    SlideError
        When the slide cannot be read, or its file is not the one that was inspected.
    PipelineError
        When the file is gone.
    """
    path = Path(info["path"])
    slide = open_slide(path, info["backend"], before=True)
    if path.stat().st_size != info["bytes"] or (slide.width, slide.height) != (info["width"], info["height"]):
        slide.close()
        raise SlideError(f"{path} has changed since it was inspected", "delete the slide's results and run again")
    return slide


def run_inspect(
    slide: str,
    path: Path,
    out: Path,
    *,
    mpp: float | None = None,
    mpp_source: str = "table",
    reader: str = "auto",
    **how: Any,
) -> dict[str, Any]:
    """Inspect a slide.

    Parameters
    ----------
    slide : str
        Name of the slide.
    path : pathlib.Path
        File of the slide.
    out : pathlib.Path
        Manifest to write, ``slide.json``.
    mpp : float, optional
        µm per level-0 pixel; takes precedence over the file's metadata.
    mpp_source : {"table", "config"}
        Where `mpp` comes from.
    reader : {"auto", "openslide", "tiffslide", "image"}
        See `pipeline.slides.open.open_slide`.
    **how : Any
        Arguments `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest.
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        with open_slide(path, reader, before=could_be_read(slide)) as handle:
            (mpp_x, mpp_y), source = resolve_mpp(handle, mpp, mpp_source)
            tiles = probe(handle, (mpp_x + mpp_y) / 2)
            warnings = [*handle.warnings, *mpp_doubts(max(mpp_x, mpp_y), source, handle.objective, handle.mpp)]
            warnings += size_doubts(handle) if source == "metadata" else []
            for warning in warnings:
                log.warning("slide %r: %s", slide, warning)
            return {
                "path": str(path.absolute()),
                "backend": handle.backend,
                "vendor": handle.vendor,
                "width": handle.width,
                "height": handle.height,
                "levels": [asdict(level) for level in handle.levels],
                "bounds": list(handle.bounds) if handle.bounds else None,
                "mpp": [mpp_x, mpp_y],
                "mpp_source": source,
                "objective": handle.objective,
                "quick_hash": handle.quick_hash,
                "bytes": path.stat().st_size,
                "tiles_tried": tiles,
                "warnings": warnings,
            }

    return run_stage("inspect", slide, manifest=out, body=body, **how)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command-line arguments of the stage to a parser."""
    add_stage_arguments(parser, reads_slide=True)
    parser.add_argument("--path", required=True, type=Path, metavar="FILE", help="the slide's file")
    parser.add_argument("--mpp", type=float, help="µm per level-0 pixel, before the file's own")
    parser.add_argument("--mpp-source", choices=("table", "config"), default="table", help="where --mpp comes from")
    parser.add_argument("--reader", choices=READERS, default="auto", help="what reads the file (default: auto)")
    parser.add_argument("--out", required=True, type=Path, metavar="SLIDE.JSON")


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""
    run_inspect(**keywords(args))
    return 0
