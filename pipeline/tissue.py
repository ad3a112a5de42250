"""Stage ``tissue``: find where the slide holds tissue."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pipeline.batch.stage import add_origin_argument, add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.errors import PipelineError, SlideError
from pipeline.exchange.geojson import ORIGIN, enclosed, kind_of, no_areas, origin_of, read_areas, scanned
from pipeline.kernels.tissue import TissueMask, find_tissue, thumbnail_mpp
from pipeline.slides.inspect import reopen
from pipeline.slides.regions import OneLevel, best_level, read_region
from pipeline.slides.slide import Level, Slide
from pipeline.stores.grid import Grid

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

log = logging.getLogger(__name__)

_BLOCK_PIXELS = 16_000_000
_PNG_SIDE = 1600
_SMALL_PIXELS = 100_000_000


def read_view(slide: Slide, grid: Grid) -> tuple[np.ndarray, float, float]:
    """Read the whole slide on a coarse grid, in aligned blocks.

    Returns
    -------
    rgb : numpy.ndarray
        uint8, shape (grid.height, grid.width, 3). Parts of blocks that cannot be decoded are white.
    unreadable : float
        Share of blocks, counting parts of them, that could not be decoded from the best level or any finer one.
    finer : float
        Share of blocks, counting parts of them, that had to be read from a finer level.
    """
    index = best_level(slide.levels, grid)
    across = down = _block_side(slide.levels[index], grid)
    if slide.in_strips(index):  # wide blocks: each strip is decoded once for every block that it meets
        across, down = across * down // 32, 32
    rgb = np.full((grid.height, grid.width, 3), 255, np.uint8)
    blocks, bad, finer = 0, 0.0, 0.0
    for y in range(0, grid.height, down):
        for x in range(0, grid.width, across):
            w, h = min(across, grid.width - x), min(down, grid.height - y)
            blocks += 1
            try:
                rgb[y : y + h, x : x + w] = read_region(slide, grid, x, y, w, h)
            except SlideError:
                lost, found = _read_pieces(slide, grid, rgb, x, y, w, h)
                bad, finer = bad + lost, finer + found
    return rgb, bad / blocks, finer / blocks


def _block_side(level: Level, grid: Grid) -> int:
    """Side in grid pixels of the blocks that are read from a level at once."""
    native = grid.scale_x * grid.scale_y / (level.scale_x * level.scale_y)
    return max(32, int(math.sqrt(_BLOCK_PIXELS / max(native, 1e-9))) // 32 * 32)


def _read_pieces(slide: Slide, grid: Grid, rgb: np.ndarray, x: int, y: int, w: int, h: int) -> tuple[float, float]:
    """Read a block that cannot be decoded as a whole in 8 by 8 pieces, from finer levels where that is necessary.

    What one level of a pyramid has lost, a finer one may still have, so that a damaged overview costs no tissue.

    Returns
    -------
    unreadable, finer : float
        Share of the pieces that no level could show, and of those that only a finer level could.
    """
    own = slide.levels[best_level(slide.levels, grid)].scale_x
    finer = [i for i, level in enumerate(slide.levels) if level.usable and level.scale_x < own * (1 - 1e-6)]
    step_x, step_y = max(1, -(-w // 8)), max(1, -(-h // 8))
    pieces = bad = found = 0
    for py in range(y, y + h, step_y):
        for px in range(x, x + w, step_x):
            pw, ph = min(step_x, x + w - px), min(step_y, y + h - py)
            pieces += 1
            try:
                rgb[py : py + ph, px : px + pw] = read_region(slide, grid, px, py, pw, ph)
            except SlideError:
                shown = any(_read_level(slide, i, grid, rgb, px, py, pw, ph) for i in reversed(finer))
                bad, found = bad + (not shown), found + shown
    return bad / pieces, found / pieces


def _read_level(slide: Slide, level: int, grid: Grid, rgb: np.ndarray, x: int, y: int, w: int, h: int) -> bool:
    """Read a window of a view from one level; when it cannot be decoded, make it white and return False."""
    side = _block_side(slide.levels[level], grid)
    one = OneLevel(slide, level)
    try:
        for top in range(y, y + h, side):
            for left in range(x, x + w, side):
                width, height = min(side, x + w - left), min(side, y + h - top)
                rgb[top : top + height, left : left + width] = read_region(one, grid, left, top, width, height)
    except SlideError:
        rgb[y : y + h, x : x + w] = 255
        return False
    return True


def polygons_of(mask: np.ndarray, scale_x: float, scale_y: float, width: float, height: float) -> list[BaseGeometry]:
    """Outline a mask.

    Parameters
    ----------
    mask : numpy.ndarray
        bool, shape (h, w).
    scale_x, scale_y : float
        Level-0 pixels per pixel of the mask.
    width, height : float
        Size of level 0, at whose edges polygons are cut.

    Returns
    -------
    list of shapely polygons
        Valid, with holes, in level-0 pixels, ordered from the top by their bounding boxes.
    """
    import shapely
    from skimage.measure import find_contours

    # Marching squares give rings that never touch, not even where two pixels meet only at a corner. The mask is
    # continued beyond the slide, so that polygons that reach its edge are cut there and not rounded off before it.
    padded = np.pad(np.pad(mask, 1, mode="edge"), 1).astype(np.float32)
    rings = find_contours(padded, 0.5, fully_connected="low")
    if not rings:
        return []
    lines = shapely.multilinestrings([shapely.linestrings(ring[:, ::-1] - 1.5) for ring in rings])
    parts = shapely.get_parts(shapely.build_area(lines))
    # Contours stay 0.35 pixels or more away from all pixel centres, so no centre changes sides.
    simple = shapely.transform(shapely.simplify(parts, 0.17), lambda points: points * (scale_x, scale_y))
    return clean(simple, shapely.box(0, 0, width, height))


def clean(geometries: Any, box: BaseGeometry) -> list[BaseGeometry]:
    """Turn any polygonal geometries into valid, non-overlapping polygons inside a box, ordered from the top."""
    import shapely

    whole = enclosed(geometries)
    parts = shapely.get_parts(shapely.intersection(whole, box))
    polygons = [part for part in parts if part.geom_type == "Polygon" and part.area > 0]
    return sorted(polygons, key=lambda p: (p.bounds[1], p.bounds[0], p.bounds[3], p.bounds[2]))


def read_mask(path: Path, box: BaseGeometry, origin: tuple[int, int] = (0, 0)) -> list[BaseGeometry]:
    """Read a user's tissue mask.

    Parameters
    ----------
    path : pathlib.Path
        GeoJSON (``.gz`` too) in level-0 pixels, see `pipeline.exchange.geojson`. Only polygons are used. What QuPath
        objects of class ``Ignore*`` cover is not tissue. Its frames (tiles, TMA cores) are left out, and so are
        detections and cells, unless the file has no annotations.
    box : shapely geometry
        The scanned part of the slide; what lies outside is cut off.
    origin : tuple of int
        Level-0 pixel that is the origin of the file's coordinates, unless the file itself says which is.

    Returns
    -------
    list of shapely polygons
        Valid, non-overlapping, in level-0 pixels, ordered from the top.

    Raises
    ------
    SlideError
        When the file is missing, is no GeoJSON, or has no polygon on the slide.
    OSError
        When the disk or the file server failed.
    """
    found = read_areas(path, "tissue mask", origin=origin)
    if found and not any(parts for _, parts in found):
        raise no_areas("tissue mask", path, f"holds {found[0][0]['geometry']['type']} geometries, no polygons")
    kinds: dict[str, list[BaseGeometry]] = {"annotation": [], "detection": [], "ignored": [], "frame": []}
    for feature, parts in found:
        kinds[kind_of(feature)] += parts
    polygons = kinds["annotation"] or kinds["detection"]
    if found and not polygons:
        raise no_areas("tissue mask", path, "has no area that counts: tiles, TMA cores and class Ignore* do not")
    result = clean(polygons, box) if polygons else []
    if polygons and not result:
        raise no_areas("tissue mask", path, "no polygon lies on the slide")
    if kinds["ignored"] and result:
        result = clean(result, box.difference(enclosed(kinds["ignored"])))
        if not result:
            raise no_areas("tissue mask", path, "objects of class Ignore* cover all of it")
    return result


def read_tissue(path: Path) -> list[BaseGeometry]:
    """Read the polygons, in level-0 pixels, of a ``tissue.geojson``.

    Raises
    ------
    PipelineError
        When the file is missing or damaged.
    """
    import shapely
    from shapely.geometry import shape

    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        polygons = shapely.make_valid([shape(feature["geometry"]) for feature in features])
        return [part for part in shapely.get_parts(polygons) if part.geom_type == "Polygon"]
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing", "run the stage `tissue` first") from None
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{path} is damaged: {error}", "delete it and run again") from None


def _write_tissue(path: Path, polygons: list[BaseGeometry]) -> None:
    import shapely
    from shapely.geometry import mapping

    def rounded(value: Any) -> Any:
        return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else round(float(value), 2)

    # Snapped first, as rounding alone may make a polygon cross itself where a hole touches its edge.
    snapped = [part for one in polygons for part in shapely.get_parts(shapely.set_precision(one, 0.01))]
    features = []
    for number, polygon in enumerate((one for one in snapped if one.area > 0), 1):
        geometry = mapping(polygon)
        features.append(
            {
                "type": "Feature",
                "properties": {
                    "objectType": "annotation",
                    "name": f"tissue {number}",
                    "classification": {"name": "Tissue", "color": [0, 160, 60]},
                },
                "geometry": {"type": geometry["type"], "coordinates": rounded(geometry["coordinates"])},
            }
        )
    # The origin is stated, so that the file is read the same as a mask, whatever `export.origin` is.
    value = {"type": "FeatureCollection", ORIGIN: [0, 0], "features": features}
    path.write_text(json.dumps(value) + "\n", encoding="utf-8")


def bounds_view(bounds: Sequence[float], grid: Grid) -> tuple[slice, slice]:
    """Rows and columns of a view that cover `bounds`: the scanned part, ``x, y, width, height`` in level-0 pixels."""
    x, y, width, height = bounds
    slices = []
    for start, size, scale, limit in ((y, height, grid.scale_y, grid.height), (x, width, grid.scale_x, grid.width)):
        # Rounded outwards: what does not fill a pixel of the view may hold tissue too.
        first, last = math.floor(start / scale + 1e-6), math.ceil((start + size) / scale - 1e-6)
        first = min(max(first, 0), limit - 1)
        slices.append(slice(first, min(max(last, first + 1), limit)))
    return slices[0], slices[1]


def find_within(
    rgb: np.ndarray, part: tuple[slice, slice], mpp: float, min_area_um2: float, min_hole_um2: float
) -> TissueMask:
    """Run `find_tissue` on a part of a view only: what was not scanned is white, but no glass."""
    found = find_tissue(np.ascontiguousarray(rgb[part]), mpp, min_area_um2, min_hole_um2)
    masks = []
    for one in (found.mask, found.ink):
        whole = np.zeros(rgb.shape[:2], bool)
        whole[part] = one
        masks.append(whole)
    return replace(found, mask=masks[0], ink=masks[1])


def draw_outline(rgb: np.ndarray, polygons: list[BaseGeometry], scale_x: float, scale_y: float) -> np.ndarray:
    """Draw the view with outlines of the tissue, uint8 (h, w, 3), at most 1600 pixels wide and high.

    Parameters
    ----------
    rgb : numpy.ndarray
        uint8, shape (h, w, 3).
    polygons : list of shapely polygons
        In level-0 pixels.
    scale_x, scale_y : float
        Level-0 pixels per pixel of the view.
    """
    import shapely

    factor = min(_PNG_SIDE / max(rgb.shape[:2]), 1.0)
    size = (max(1, round(rgb.shape[1] * factor)), max(1, round(rgb.shape[0] * factor)))
    image = np.ascontiguousarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))
    to_image = np.array([size[0] / rgb.shape[1] / scale_x, size[1] / rgb.shape[0] / scale_y])
    rings = [
        np.round(shapely.get_coordinates(ring) * to_image * 16).astype(np.int32) for ring in shapely.get_rings(polygons)
    ]
    cv2.polylines(image, rings, True, (0, 160, 60), 2, cv2.LINE_AA, 4)
    return image


def _view_grid(info: Mapping[str, Any], mpp: float) -> Grid:
    """Grid of the whole slide for the view in which tissue is searched, with pixels of about `mpp` µm."""
    (mpp_x, mpp_y), width, height = info["mpp"], info["width"], info["height"]
    side = thumbnail_mpp(width * mpp_x, height * mpp_y, max(mpp_x, mpp_y), mpp)
    scale_x, scale_y = side / mpp_x, side / mpp_y
    # Rounded up, unlike other grids: a strip at the edge that does not fill a pixel may hold tissue too.
    return Grid(math.ceil(width / scale_x - 1e-6), math.ceil(height / scale_y - 1e-6), side, scale_x, scale_y)


def _picture(slide: Slide, info: Mapping[str, Any], grid: Grid, rgb: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Image for ``tissue.png``, and its grid: the view or, if the slide is small, a finer view of it."""
    (mpp_x, mpp_y), width, height = info["mpp"], info["width"], info["height"]
    if max(grid.width, grid.height) >= _PNG_SIDE // 2 or width * height > _SMALL_PIXELS:
        return rgb, grid
    side = max(mpp_x, mpp_y, max(width * mpp_x, height * mpp_y) / (_PNG_SIDE - 1))
    finer = Grid.for_slide(width, height, mpp_x, mpp_y, side)
    return read_view(slide, finer)[0], finer


def _warnings(unreadable: float, finer: float) -> list[str]:
    """Warnings about the shares that `read_view` returned."""
    warnings = []
    if unreadable:
        warnings.append(f"{100 * unreadable:.3g} % of the slide could not be decoded and counts as glass")
    if finer:
        warnings.append(
            f"{100 * finer:.3g} % of the overview could not be decoded and was read from finer levels: "
            "is the file damaged?"
        )
    return warnings


def _about_glass(found: TissueMask) -> dict[str, Any]:
    """Entries of the manifest about how tissue was separated from glass."""
    return {
        "background": [round(value, 1) for value in found.background],
        "background_found": found.background_found,
        "threshold": round(found.threshold, 4),
        "ink_fraction": round(float(found.ink.mean()), 6),
    }


def run_tissue(
    slide: str,
    inspect: Path,
    out: Path,
    geojson: Path,
    png: Path,
    *,
    mask: Path | None = None,
    origin: str = "slide",
    mpp: float = 8.0,
    min_area_um2: float = 10_000.0,
    min_hole_um2: float = 5_000.0,
    **how: Any,
) -> dict[str, Any]:
    """Find the tissue of a slide, or take a user's mask.

    Parameters
    ----------
    slide : str
        Name of the slide.
    inspect : pathlib.Path
        ``slide.json`` of the previous stage.
    out, geojson, png : pathlib.Path
        The outputs: manifest, polygons (level-0 pixels), picture.
    mask : pathlib.Path, optional
        GeoJSON of tissue drawn by a user, which is taken instead of searching for tissue.
    origin : {"slide", "bounds"}
        Origin of the mask's coordinates, unless its file says so itself; see `pipeline.exchange.geojson.origin_of`.
    mpp : float
        µm per pixel of the view in which tissue is searched.
    min_area_um2, min_hole_um2 : float
        Parts smaller than the first (µm²) are dropped, holes smaller than the second (µm²) are filled.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest.
    """
    if not (math.isfinite(mpp) and mpp > 0):
        raise PipelineError(f"mpp {mpp} of the tissue stage is not a size in µm", "give a positive number, say 8")

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        info = read_manifest(inspect)
        grid = _view_grid(info, mpp)
        with reopen(info) as handle:
            rgb, unreadable, finer = read_view(handle, grid)
            picture, picture_grid = _picture(handle, info, grid, rgb)
        if unreadable == 1:
            raise SlideError("no part of the slide decodes", "copy or export the slide again")
        box = scanned(info)
        found: TissueMask | None = None
        if mask is not None:
            polygons = read_mask(mask, box, origin_of(info, origin))
        else:
            bounds = info.get("bounds") or [0, 0, info["width"], info["height"]]
            found = find_within(rgb, bounds_view(bounds, grid), grid.mpp, min_area_um2, min_hole_um2)
            pieces = polygons_of(found.mask, grid.scale_x, grid.scale_y, info["width"], info["height"])
            polygons = clean(pieces, box) if pieces else []
        _write_tissue(staged["geojson"], polygons)
        image = draw_outline(picture, polygons, picture_grid.scale_x, picture_grid.scale_y)
        # Not `imwrite`, which does not report a full disk.
        staged["png"].write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
        if not polygons:
            log.warning("slide %r has no tissue", slide)
        area_px, (mpp_x, mpp_y) = float(sum(polygon.area for polygon in polygons)), info["mpp"]
        return {
            "area_mm2": round(area_px * mpp_x * mpp_y / 1e6, 6),
            "fraction": round(area_px / box.area, 6),
            "parts": len(polygons),
            "method": "mask" if found is None else "optical density",
            "mpp": grid.mpp,
            "unreadable_share": round(unreadable, 6),
            "warnings": _warnings(unreadable, finer),
            **({} if found is None else _about_glass(found)),
        }

    return run_stage(
        "tissue",
        slide,
        manifest=out,
        outputs={"geojson": geojson, "png": png},
        upstream=[inspect],
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's arguments."""
    add_stage_arguments(parser, reads_slide=True)
    parser.add_argument("--inspect", required=True, type=Path, metavar="SLIDE.JSON", help="manifest of stage inspect")
    parser.add_argument("--mask", type=Path, metavar="GEOJSON", help="tissue drawn by hand, level-0 pixels")
    add_origin_argument(parser)
    parser.add_argument("--mpp", type=float, default=8.0, help="µm per pixel to look at (default: 8)")
    parser.add_argument(
        "--min-area", dest="min_area_um2", type=float, default=10_000.0, metavar="UM2", help="smaller parts are dropped"
    )
    parser.add_argument(
        "--min-hole", dest="min_hole_um2", type=float, default=5_000.0, metavar="UM2", help="smaller holes are filled"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="TISSUE.JSON")
    parser.add_argument("--geojson", required=True, type=Path, metavar="TISSUE.GEOJSON")
    parser.add_argument("--png", required=True, type=Path, metavar="TISSUE.PNG")


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""
    run_tissue(**keywords(args))
    return 0
