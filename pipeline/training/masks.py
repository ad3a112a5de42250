"""Command ``masks``: convert ImageScope annotations to binary masks and instance label maps."""

from __future__ import annotations

import argparse
import logging
import re
import warnings
from pathlib import Path

import numpy as np

from pipeline.batch.stage import whole_files
from pipeline.errors import PipelineError
from pipeline.training.annotations import DrawingReport, rasterise, read_imagescope_xml

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".svs")
"""Suffixes of annotated images, whose size the masks take, in the order in which they are tried."""

MAX_PIXELS = 400_000_000
"""Largest image, in pixels, for which label maps are drawn."""

MAX_LABEL = np.iinfo(np.uint16).max


def annotation_files(path: Path) -> list[Path]:
    """Return the XML files that a path stands for: the file itself, or those in the folder.

    Raises
    ------
    PipelineError
        When there is none.
    """
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".xml" and not p.name.startswith("."))
        if not found:
            raise PipelineError(f"no annotations in {path}", "give a folder with ImageScope XML files")
        return found
    if not path.is_file():
        raise PipelineError(f"{path} is missing", "give an ImageScope XML file or a folder of them")
    return [path]


def image_size(annotation: Path, images: Path | None) -> tuple[int, int]:
    """Height and width of the image that belongs to an annotation.

    Parameters
    ----------
    annotation : pathlib.Path
        The XML file.
    images : pathlib.Path or None
        The image, or a folder with an image of the annotation's stem. By default the annotation's folder is searched,
        then the folder ``images`` beside that folder.

    Raises
    ------
    PipelineError
        When there is no such image, or it is too large or cannot be read.
    """
    folders = [images] if images is not None else [annotation.parent, annotation.parent.parent / "images"]
    candidates = [images] if images is not None and images.is_file() else []
    candidates += [folder / f"{annotation.stem}{suffix}" for folder in folders for suffix in IMAGE_SUFFIXES]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise PipelineError(
            f"{annotation.name}: no image {annotation.stem}.* in {' or '.join(map(str, folders))}",
            "say where with --images, or give --size WIDTHxHEIGHT",
        )
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:  # reads only the header
                width, height = image.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise PipelineError(f"image {path} cannot be read: {error}", "or give --size WIDTHxHEIGHT") from None
    return height, width


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``WIDTHxHEIGHT`` into height and width.

    Raises
    ------
    PipelineError
        When the text is not a size.
    """
    match = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", text.strip())
    if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
        raise PipelineError(f"--size {text!r} is not a size", "write WIDTHxHEIGHT, as in 1000x1000")
    return int(match[2]), int(match[1])


def convert(annotation: Path, out: Path, shape: tuple[int, int]) -> DrawingReport:
    """Write the binary mask and the label map of one annotation file.

    Parameters
    ----------
    annotation : pathlib.Path
        The XML file.
    out : pathlib.Path
        Folder for ``masks/STEM.png`` (0 and 255) and ``labels/STEM.png`` (16 bit; region ``i`` of the file is ``i``,
        0 is background).
    shape : (int, int)
        Height and width.

    Raises
    ------
    PipelineError
        When the image is too large, the annotation cannot be read, or it has more regions than 16 bits can number.
    """
    from PIL import Image

    if shape[0] * shape[1] > MAX_PIXELS:
        raise PipelineError(f"{annotation.name}: {shape[1]} x {shape[0]} pixels are too many", "cut fields out of it")
    regions = read_imagescope_xml(annotation)
    if len(regions) > MAX_LABEL:
        raise PipelineError(f"{annotation.name} has {len(regions)} regions, 16 bits number {MAX_LABEL}", "divide it")
    labels, report = rasterise(regions, shape)
    for name, pixels in (("masks", (labels > 0).astype(np.uint8) * 255), ("labels", labels.astype(np.uint16))):
        target = out / name / f"{annotation.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_files(target, shared=True) as (staged,):
            Image.fromarray(pixels).save(staged)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline masks``."""
    parser.add_argument(
        "annotations", type=Path, metavar="ANNOTATIONS", help="ImageScope XML file, or a folder of them"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write: masks/ and labels/, PNGs by stem")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--images", type=Path, metavar="PATH", help="the image, or a folder of images of the same stems")
    size.add_argument("--size", metavar="WIDTHxHEIGHT", help="size of all images, where they are not at hand")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline masks``."""
    files = annotation_files(args.annotations)
    given = None if args.size is None else parse_size(args.size)
    failed = []
    for path in files:
        try:
            report = convert(path, args.out, given or image_size(path, args.images))
        except PipelineError as error:
            if len(files) == 1:
                raise
            log.error("%s", error)
            failed.append(path.name)
            continue
        print(f"{path.name}: {report}")
    if failed:
        raise PipelineError(f"{len(failed)} of {len(files)} annotations were not converted", ", ".join(failed[:5]))
    return 0
