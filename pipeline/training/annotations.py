"""Annotation files as instance label maps."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pipeline.errors import PipelineError


def read_imagescope_xml(path: Path) -> list[np.ndarray]:
    """Polygons of an Aperio ImageScope annotation file.

    Parameters
    ----------
    path : pathlib.Path
        The XML file, one ``Region`` a nucleus.

    Returns
    -------
    list of numpy.ndarray
        One float64 array ``(n, 2)`` of x, y in level-0 pixels a region, in file order; regions of fewer than three
        points are left out.

    Raises
    ------
    PipelineError
        When the file is no such XML.
    """
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, parse

    try:
        root = parse(path).getroot()
    except (ParseError, DefusedXmlException, OSError) as error:
        raise PipelineError(f"annotation {path.name}: {error}", "give an ImageScope XML file") from None
    polygons = []
    try:
        for region in root.iter("Region"):
            points = [(float(v.attrib["X"]), float(v.attrib["Y"])) for v in region.iter("Vertex")]
            if len(points) >= 3:
                polygons.append(np.array(points))
    except (KeyError, ValueError) as error:
        raise PipelineError(f"annotation {path.name}: a vertex is damaged: {error}", "export it again") from None
    return polygons


def rasterise(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Draw polygons as instances; a pixel keeps the first polygon that covers it.

    Parameters
    ----------
    polygons : list of numpy.ndarray
        ``(n, 2)`` arrays of x, y in pixels; what lies outside the image is cut off.
    shape : (int, int)
        Height and width.

    Returns
    -------
    numpy.ndarray
        int32 labels; polygon ``i`` is ``i + 1``.
    """
    labels = np.zeros(shape, np.int32)
    height, width = shape
    for index, polygon in enumerate(polygons, start=1):
        x0, y0 = np.floor(polygon.min(axis=0)).astype(int) - 1
        x1, y1 = np.ceil(polygon.max(axis=0)).astype(int) + 2
        x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
        if x0 >= x1 or y0 >= y1:
            continue
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        # Vertices are pixel coordinates with pixel centres at whole numbers, in 1/16 of a pixel.
        cv2.fillPoly(mask, [np.round((polygon - (x0, y0)) * 16).astype(np.int32)], 1, shift=4)
        window = labels[y0:y1, x0:x1]
        window[(window == 0) & (mask > 0)] = index
    return labels
