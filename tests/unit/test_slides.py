"""Opening and checking slides: readers, pixel sizes, and every kind of broken file."""

from __future__ import annotations

import errno
import logging
import os
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.batch.slide_table import UNREADABLE
from pipeline.batch.stage import read_manifest
from pipeline.errors import PipelineError, SlideError
from pipeline.slides import open as open_module
from pipeline.slides.inspect import like_ycbcr, reopen, run_inspect
from pipeline.slides.integrity import check_tiff
from pipeline.slides.open import open_slide, resolve_mpp
from pipeline.slides.openslide_reader import OpenSlideReader
from pipeline.slides.slide import level_of, over_white, premultiplied_over_white
from pipeline.slides.synthetic import make_field, write_ome_tiff, write_svs, write_tiff
from pipeline.slides.tiff_reader import TiffSlideReader

WRITERS = {"svs": write_svs, "tiff": write_tiff, "ome.tiff": write_ome_tiff}


def picture(width: int = 900, height: int = 700, seed: int = 0) -> np.ndarray:
    """A smooth random picture, which JPEG keeps closely."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(60, 256, (height // 50 + 2, width // 50 + 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def slide_file(folder: Path, kind: str = "svs", mpp: float = 0.25, **size: int) -> Path:
    path = folder / f"slide.{kind}"
    WRITERS[kind](path, picture(**size), mpp)
    return path


def spoil_tiles(path: Path, which: list[int], level: int = 0) -> None:
    """Overwrite tiles of a TIFF file with zeros, which no decoder takes."""
    with tifffile.TiffFile(path) as tif:
        page = tif.series[0].levels[level].pages[0]
        spots = [(page.dataoffsets[i], page.databytecounts[i]) for i in which]
    with path.open("r+b") as file:
        for offset, count in spots:
            file.seek(offset)
            file.write(bytes(count))


def set_tags(path: Path, **values: int) -> None:
    """Make the first image of a TIFF file claim other values."""
    with tifffile.TiffFile(path) as tif:
        tags = [(tif.pages[0].tags[name], value) for name, value in values.items()]
        order, big = tif.byteorder, tif.is_bigtiff
        places = [(tag.offset, value) for tag, value in tags]
    with path.open("r+b") as file:
        for offset, value in places:
            file.seek(offset + 2)
            head = struct.pack(order + "HQ" if big else order + "HI", 4, 1)
            file.write(head + struct.pack(order + "I", value))


@pytest.mark.parametrize("kind", WRITERS)
def test_formats(tmp_path: Path, kind: str) -> None:
    path = slide_file(tmp_path, kind)
    with open_slide(path) as slide:
        assert (slide.width, slide.height) == (900, 700)
        assert slide.mpp is not None
        assert slide.mpp == pytest.approx((0.25, 0.25), rel=1e-3)
        assert all(level.scale_x == int(level.scale_x) for level in slide.levels)
        assert slide.backend == "tiffslide"
        assert len(slide.quick_hash) == 64
        close = np.abs(slide.read(0, 0, 0, 900, 700).astype(int) - picture())
        assert close.mean() < 3


def test_ome_levels_that_openslide_does_not_see(tmp_path: Path) -> None:
    path = slide_file(tmp_path, "ome.tiff", width=2500, height=2100)
    with open_slide(path) as slide:
        assert len(slide.levels) > 1
        assert slide.mpp == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
@pytest.mark.parametrize("kind", ["svs", "tiff"])
def test_windows(tmp_path: Path, kind: str, reader: str) -> None:
    path = slide_file(tmp_path, kind, width=1500, height=1100)
    with open_slide(path, reader) as slide:
        for number, level in enumerate(slide.levels):
            whole = slide.read(number, 0, 0, level.width, level.height)
            padded = np.pad(whole, ((50, 400), (50, 400), (0, 0)), constant_values=255)
            for x, y, w, h in ((-20, -30, 100, 90), (37, 11, 64, 300), (level.width - 40, level.height - 40, 80, 70)):
                window = slide.read(number, x, y, w, h)
                np.testing.assert_array_equal(window, padded[y + 50 : y + 50 + h, x + 50 : x + 50 + w])
            assert (slide.read(number, level.width + 5, 0, 10, 10) == 255).all()


def test_readers_agree(shared_data: Path) -> None:
    for path in sorted((shared_data / "slides").glob("*.svs")):
        with open_slide(path, "openslide") as one, open_slide(path, "tiffslide") as two:
            assert [(v.width, v.height) for v in one.levels] == [(v.width, v.height) for v in two.levels]
            np.testing.assert_array_equal(one.read(0, 700, 800, 600, 500), two.read(0, 700, 800, 600, 500))


def test_dicom(shared_data: Path) -> None:
    with open_slide(shared_data / "slides" / "dicom" / "sm_image.dcm") as slide:
        assert (slide.backend, slide.width, slide.height) == ("openslide", 50, 50)
        assert slide.mpp == pytest.approx((0.499, 0.499))


def test_level_scales() -> None:
    assert level_of(462, 387, 7400, 6200).scale_x == 16
    assert level_of(2221, 1783, 4443, 3567).scale_y == 2
    assert level_of(463, 388, 7400, 6200).scale_x == 16  # rounded up
    odd = level_of(1000, 1000, 2700, 2600)
    assert (odd.scale_x, odd.scale_y) == (2.7, 2.6)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_plain_images(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"field.{suffix}"
    Image.fromarray(picture(300, 200)).save(path)
    with open_slide(path) as slide:
        assert (slide.backend, slide.mpp) == ("image", None)
        assert np.abs(slide.read(0, 10, 20, 100, 50).astype(int) - picture(300, 200)[20:70, 10:110]).mean() < 4
        with pytest.raises(SlideError, match=r"no pixel size .*`mpp` column"):
            resolve_mpp(slide, None)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_image_modes(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.slides.image_reader._ROWS", 32)
    path = tmp_path / ("field.tif" if mode == "CMYK" else "field.png")
    Image.fromarray(picture(120, 90)).convert(mode).save(path)
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, 0, 120, 90)
    expected = np.asarray(Image.open(path).convert("RGBA"))[..., :3]
    assert pixels.shape == (90, 120, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("options", [{}, {"rowsperstrip": 7}, {"tile": (64, 64)}, {"compression": "zlib"}])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_plain_tiffs(tmp_path: Path, options: dict[str, Any], samples: int) -> None:
    image = picture(300, 200)
    image = image[..., 0] if samples == 1 else image
    if samples == 4:
        image = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    path = tmp_path / "field.tif"
    kind = {1: "minisblack", 3: "rgb", 4: "rgb"}[samples]
    extra = {"extrasamples": ["unassalpha"]} if samples == 4 else {}
    tifffile.imwrite(path, image, photometric=kind, **extra, **options)
    with open_slide(path) as slide:
        pixels = slide.read(0, 0, 0, 300, 200)
        expected = np.repeat(image[..., None], 3, axis=2) if samples == 1 else image[..., :3]
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(slide.read(0, 33, 44, 100, 99), expected[44:143, 33:133])


@pytest.mark.parametrize("compression", [None, "lzw"])
@pytest.mark.parametrize("options", [{}, {"tile": (128, 128)}])
def test_ycbcr_without_jpeg_is_no_rgb(tmp_path: Path, compression: str | None, options: dict[str, Any]) -> None:
    shades = np.random.default_rng(0).integers(60, 250, (6, 8, 3), dtype=np.uint8)
    rgb = cv2.resize(shades, (200, 150), interpolation=cv2.INTER_CUBIC)
    stored = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="ycbcr", compression=compression, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert np.abs(slide.read(0, 0, 0, 200, 150).astype(int) - rgb).max() <= 3


def test_planar_and_16_bit_tiffs(tmp_path: Path) -> None:
    planar = tmp_path / "planar.tif"
    tifffile.imwrite(planar, picture(300, 200).transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    with open_slide(planar) as slide:
        np.testing.assert_array_equal(slide.read(0, 5, 6, 70, 80), picture(300, 200)[6:86, 5:75])
    deep = tmp_path / "deep.tif"
    for tile in (None, (128, 128)):  # OpenSlide opens those of tiles
        tifffile.imwrite(deep, picture(300, 200).astype(np.uint16) * 16, photometric="rgb", tile=tile)
        with pytest.raises(SlideError, match=r"holds 3 x uint16 a pixel, where 8-bit .* \(convert .* vips msb"):
            open_slide(deep)


def test_alpha() -> None:
    straight = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 128]]], np.uint8)
    np.testing.assert_array_equal(over_white(straight)[0], [[255, 255, 255], [10, 20, 30], [132, 137, 142]])
    multiplied = np.array([[[0, 0, 0, 0], [10, 20, 30, 255], [5, 10, 15, 128]]], np.uint8)
    np.testing.assert_array_equal(
        premultiplied_over_white(multiplied)[0], [[255, 255, 255], [10, 20, 30], [132, 137, 142]]
    )


@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {}])
@pytest.mark.parametrize(("kind", "shown"), [("unspecified", True), ("assocalpha", False), ("unassalpha", False)])
def test_a_fourth_sample_counts_as_transparency_where_the_file_says_so(
    tmp_path: Path, options: dict[str, Any], kind: str, shown: bool
) -> None:
    rgb = picture(300, 200)
    four = np.dstack([rgb if kind != "assocalpha" else np.zeros_like(rgb), np.zeros(rgb.shape[:2], np.uint8)])
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, four, photometric="rgb", extrasamples=[kind], **options)
    for reader in ("auto", "tiffslide", "image"):
        with open_slide(path, reader) as slide:
            expected = rgb if shown else np.full_like(rgb, 255)
            np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), expected)
    if options and shown:
        planes = tmp_path / "planes.tif"  # which no reader but OpenSlide reads
        tifffile.imwrite(
            planes, np.moveaxis(four, 2, 0), photometric="rgb", extrasamples=[kind], planarconfig="separate", **options
        )
        for name, reader in ((path, "openslide"), (planes, "auto")):
            with pytest.raises(
                SlideError, match=r"fourth sample that it does not call transparency.*vips extract_band"
            ):
                open_slide(name, reader)


def tiff_of(path: Path, *images: tuple[np.ndarray, dict[str, Any]], ome: bool = False) -> Path:
    """A TIFF of several images, each with its options."""
    with tifffile.TiffWriter(path, ome=ome) as tif:
        for pixels, options in images:
            tif.write(pixels, photometric="rgb", **({} if ome else {"metadata": None}) | options)
    return path


TILED = {"tile": (128, 128), "resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}


@pytest.mark.parametrize("options", [{"tile": (128, 128)}, {}, {"tile": (128, 128), "subfiletype": 1}])
def test_a_thumbnail_that_comes_first(tmp_path: Path, options: dict[str, Any]) -> None:
    main = picture(900, 700)
    path = tiff_of(
        tmp_path / "x.tif",
        (picture(200, 150, seed=1), {"resolution": (72, 72), **options}),
        (main, TILED),
        (np.ascontiguousarray(main[::2, ::2]), {**TILED, "subfiletype": 1}),
    )
    with open_slide(path) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(900, 700), (450, 350)]
        assert (slide.mpp, slide.warnings) == (pytest.approx((0.25, 0.25)), [])
        np.testing.assert_array_equal(slide.read(0, 0, 0, 900, 700), main)
        np.testing.assert_array_equal(slide.read(1, 0, 0, 450, 350), main[::2, ::2])
    told = r"image shows one of 200 x 150 pixels, not the main one of 900 x 700 \(.*vips copy 'OLD.tif\[page=1\]'"
    with pytest.raises(SlideError, match=told):
        open_slide(path, "image")
    if options.get("tile"):
        with pytest.raises(SlideError, match=r"openslide shows one of .*reader: auto"):
            open_slide(path, "openslide")


def test_a_thumbnail_before_planes_is_refused(tmp_path: Path) -> None:
    # Colours in planes are read by tiffslide, which reads the first image alone.
    planes = np.moveaxis(picture(900, 700), 2, 0)
    path = tiff_of(tmp_path / "x.tif", (picture(200, 150), TILED), (planes, {**TILED, "planarconfig": "separate"}))
    for reader in ("auto", "tiffslide"):
        with pytest.raises(SlideError, match="shows one of 200 x 150 pixels, not the main one of 900 x 700"):
            open_slide(path, reader)


def ome_image(name: str, mpp: float, **options: Any) -> dict[str, Any]:
    sizes = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
    return {"tile": (128, 128), "metadata": {"axes": "YXS", "Name": name, **sizes}, **options}


def test_an_ome_tiff_whose_first_image_is_the_macro(tmp_path: Path) -> None:
    main = picture(900, 700)
    path = tiff_of(
        tmp_path / "x.ome.tif",
        (picture(1300, 800, seed=1), ome_image("macro image", 8)),
        (main, ome_image("scan", 0.5, subifds=1)),
        (np.ascontiguousarray(main[::2, ::2]), {"tile": (128, 128), "subfiletype": 1}),
        (picture(300, 320, seed=2), ome_image("Label", 8)),
        ome=True,
    )
    with open_slide(path) as slide:
        assert [(level.width, level.height) for level in slide.levels] == [(900, 700), (450, 350)]
        assert (slide.mpp, slide.warnings) == ((0.5, 0.5), [])
        np.testing.assert_array_equal(slide.read(0, 0, 0, 900, 700), main)


def test_an_ome_tiff_of_several_regions(tmp_path: Path) -> None:
    images = [(picture(400, 600), "a", 0.5), (picture(900, 700), "b", 0.25), (picture(300, 500), "c", 0.5)]
    path = tiff_of(tmp_path / "x.ome.tif", *((rgb, ome_image(name, mpp)) for rgb, name, mpp in images), ome=True)
    info = run_inspect("s", path, tmp_path / "slide.json")
    assert (info["width"], info["height"], info["mpp"]) == (900, 700, [0.25, 0.25])
    (warning,) = info["warnings"]
    assert warning.startswith("the file holds 2 more images beside the one of 900 x 700 pixels that is read")


def test_an_ome_tiff_that_names_the_images_of_another_file(tmp_path: Path) -> None:
    pictures = {"a": picture(300, 200), "b": picture(900, 700, seed=1)}
    images = "".join(
        f'<Image ID="Image:{n}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8" SizeX="{rgb.shape[1]}" '
        f'SizeY="{rgb.shape[0]}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.{n}" PhysicalSizeY="0.{n}">'
        f'<Channel ID="Channel:{n}:0" SamplesPerPixel="3"/><TiffData><UUID FileName="{name}.ome.tif">urn:uuid:{name}'
        "</UUID></TiffData></Pixels></Image>"
        for n, (name, rgb) in enumerate(pictures.items(), start=3)
    )
    for name, rgb in pictures.items():
        xml = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{name}">{images}</OME>'
        tiff_of(tmp_path / f"{name}.ome.tif", (rgb, {"tile": (128, 128), "description": xml}))
    for (name, rgb), mpp in zip(pictures.items(), (0.3, 0.4), strict=True):
        with open_slide(tmp_path / f"{name}.ome.tif") as slide:
            assert (slide.width, slide.mpp, slide.warnings) == (rgb.shape[1], (mpp, mpp), [])
            np.testing.assert_array_equal(slide.read(0, 0, 0, rgb.shape[1], rgb.shape[0]), rgb)


def test_pages_of_one_size_are_told(tmp_path: Path) -> None:
    path = tiff_of(tmp_path / "x.tif", *[(picture(300, 200, seed=n), TILED) for n in range(3)])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), picture(300, 200))
        assert slide.warnings[0].startswith("the file holds 2 more images")


def write_scn(path: Path, regions: list[tuple[np.ndarray, int, int, int]]) -> None:
    """A Leica SCN of a macro image, and of regions at x and y in nm with pixels of so many nm."""
    images, pages = [], []
    for pixels, x, y, nm in [(picture(200, 300, seed=9), 0, 0, 8000), *regions]:
        height, width = pixels.shape[:2]
        images.append(
            f'<image name="i" uuid="i"><creationDate>2011</creationDate><device model="m" version="1"/>'
            f'<pixels sizeX="{width}" sizeY="{height}"><dimension sizeX="{width}" sizeY="{height}" r="0" '
            f'ifd="{len(pages)}"/></pixels><view sizeX="{width * nm}" sizeY="{height * nm}" offsetX="{x}" '
            f'offsetY="{y}" spacingZ="0"/><scanSettings>'
            "<objectiveSettings><objective>20</objective></objectiveSettings>"
            "<illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>brightfield"
            "</illuminationSource></illuminationSettings></scanSettings></image>"
        )
        pages.append((pixels, {"tile": (128, 128), "resolution": (1e7 / nm, 1e7 / nm), "resolutionunit": "CENTIMETER"}))
    pages[0][1]["description"] = (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="u">'
        f'<collection name="c" uuid="c" sizeX="1600000" sizeY="2400000"><barcode/>{"".join(images)}</collection></scn>'
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for pixels, options in pages:
            tif.write(pixels, photometric="rgb", metadata=None, **options)


def test_regions_of_a_leica_scn(tmp_path: Path) -> None:
    path = tmp_path / "x.scn"
    one, two = picture(900, 700), picture(500, 400, seed=1)
    write_scn(path, [(one, 100_000, 200_000, 500), (two, 700_000, 900_000, 500)])
    with open_slide(path) as slide:  # both are parts of one level 0
        assert (slide.vendor, slide.bounds, slide.mpp) == ("leica", (200, 400, 1700, 1800), pytest.approx((0.5, 0.5)))
        np.testing.assert_array_equal(slide.read(0, 200, 400, 900, 700), one)
        np.testing.assert_array_equal(slide.read(0, 1400, 1800, 500, 400), two)
    write_scn(path, [(one, 100_000, 200_000, 500), (two, 700_000, 900_000, 250)])
    with pytest.raises(SlideError, match="image shows one of 200 x 300 pixels, not the main one of 900 x 700"):
        open_slide(path)  # the readers want one pixel size for all, and Pillow opens the macro image


@pytest.mark.parametrize(
    ("unit", "dots", "mpp"),
    [
        ("INCH", 72, None),
        ("INCH", 96, None),
        ("INCH", 300, None),
        ("CENTIMETER", 40000, 0.25),
        ("INCH", 101600, 0.25),
        ("NONE", 1, None),
    ],
)
def test_resolution_tags(tmp_path: Path, unit: str, dots: int, mpp: float | None) -> None:
    for name, options in (("tiled", {"tile": (64, 64)}), ("strips", {})):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(
            path, picture(300, 200), photometric="rgb", resolution=(dots, dots), resolutionunit=unit, **options
        )
        with open_slide(path) as slide:
            assert slide.mpp == (pytest.approx((mpp, mpp)) if mpp else None)
            if mpp is None:
                told = (
                    rf"metadata; its resolution tags say {25400 / dots:.4g} µm/px" if unit == "INCH" else r"metadata \("
                )
                with pytest.raises(SlideError, match=f"no pixel size .mpp. in the file's {told}.*`mpp` column"):
                    resolve_mpp(slide, None)


@pytest.mark.parametrize(
    ("unit", "per_unit", "mpp"),
    [
        ("um", 4, 0.25),
        ("micron", 4, 0.25),
        ("\\u00B5m", 2, 0.5),
        ("µm", 2, 0.5),
        ("mm", 2000, 0.5),
        ("pixel", 1, None),
        ("inch", 72, None),
    ],
)
def test_imagej_units(tmp_path: Path, unit: str, per_unit: int, mpp: float | None) -> None:
    path = tmp_path / "x.tif"
    text = f"ImageJ=1.54f\nunit={unit}\nmin=0.0\n"
    options: dict[str, Any] = {"resolution": (per_unit, per_unit), "resolutionunit": "NONE", "metadata": None}
    tifffile.imwrite(path, picture(300, 200), photometric="rgb", description=text.encode("latin-1"), **options)
    for reader in ("auto", "image"):
        with open_slide(path, reader) as slide:
            assert slide.mpp == ((mpp, mpp) if mpp else None)


@pytest.mark.parametrize(("size", "unit"), [(0.5, "µm"), (500, "nm"), (0.0005, "mm")])
def test_ome_units(tmp_path: Path, size: float, unit: str) -> None:
    path = tmp_path / "x.ome.tif"
    metadata = {"PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": size, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(path, picture(300, 200), photometric="rgb", metadata={"axes": "YXS", **metadata})
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.5))


def test_ome_of_planes_keeps_its_pixel_size(tmp_path: Path) -> None:
    planes = picture(300, 200).transpose(2, 0, 1)
    metadata = {"axes": "SYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    for name, options in (("strips", {}), ("tiles", {"tile": (128, 128)})):
        path = tmp_path / f"{name}.ome.tif"
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", metadata=metadata, **options)
        with open_slide(path) as slide:
            assert (slide.width, slide.height, slide.mpp) == (300, 200, (0.25, 0.25))


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("options", [{"ome": True}, {"ome": True, "tile": (128, 128)}, {"imagej": True}])
def test_channels_as_pictures_of_their_own_are_refused(tmp_path: Path, count: int, options: dict[str, Any]) -> None:
    # The readers would show the first of them as grey, or take four for RGBA.
    path = tmp_path / "x.ome.tif"
    channels = np.repeat(picture(300, 200)[None, ..., 0], count, axis=0)
    tifffile.imwrite(path, channels, photometric="minisblack", metadata={"axes": "CYX"}, **options)
    with pytest.raises(SlideError, match=f"holds {count} channels as pictures of their own.*save it as RGB"):
        open_slide(path)


def test_mpp_policy(tmp_path: Path) -> None:
    with open_slide(slide_file(tmp_path)) as slide:
        assert resolve_mpp(slide, None) == (pytest.approx((0.25, 0.25)), "metadata")
        assert resolve_mpp(slide, 0.3, "config") == ((0.3, 0.3), "config")
        with pytest.raises(SlideError, match=r"mpp 400 µm/px of the table is not plausible"):
            resolve_mpp(slide, 400.0)
        slide.mpp = (0.25, 0.0)
        with pytest.raises(SlideError, match="mpp 0 µm/px of the metadata"):
            resolve_mpp(slide, None)
        slide.mpp = (0.25, 0.3)
        assert resolve_mpp(slide, None) == ((0.25, 0.3), "metadata")
        slide.mpp = (0.25, 10.0)
        with pytest.raises(SlideError, match=r"pixels of 0\.25 x 10 µm by the metadata"):
            resolve_mpp(slide, None)
        assert resolve_mpp(slide, 0.25) == ((0.25, 0.25), "table")


def test_a_pixel_size_that_does_not_go_with_the_objective(tmp_path: Path) -> None:
    path = slide_file(tmp_path)
    assert run_inspect("s", path, tmp_path / "a.json")["warnings"] == []
    unusual, other = run_inspect("s", path, tmp_path / "b.json", mpp=0.5)["warnings"]
    assert unusual.startswith("0.5 µm/px of the table are unusual for the 40x objective")
    assert other.startswith("0.5 µm/px of the table are taken instead of the 0.25 that the file states")


def test_a_pixel_size_that_is_given_instead_of_the_files_own(tmp_path: Path) -> None:
    path = slide_file(tmp_path)
    assert run_inspect("s", path, tmp_path / "a.json", mpp=0.26, mpp_source="config")["warnings"] == []
    (warning,) = run_inspect("s", path, tmp_path / "b.json", mpp=0.3, mpp_source="config")["warnings"]
    assert warning.startswith("0.3 µm/px of the config are taken instead of the 0.25")


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_tiff_stored_turned(tmp_path: Path, orientation: int) -> None:
    rgb = picture(500, 400)
    for name, tile in (("tiles.tif", (128, 128)), ("strips.tif", None)):
        path = tmp_path / name
        tifffile.imwrite(path, rgb, tile=tile, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        with open_slide(path, "tiffslide") as slide:
            np.testing.assert_array_equal(slide.read(0, 0, 0, 500, 400), rgb)
    with pytest.raises(SlideError, match=f"orientation tag is {orientation}"):
        open_slide(tmp_path / "tiles.tif")


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.6, 0.9, 0.99])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    path = cut(slide_file(tmp_path, kind), share)
    with pytest.raises(SlideError, match=r"truncated|is not a slide") as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_real(tmp_path: Path, shared_data: Path, share: float) -> None:
    for source in sorted((shared_data / "slides").glob("*.svs")):
        path = tmp_path / source.name
        path.write_bytes(source.read_bytes())
        with pytest.raises(SlideError, match="file is truncated"):
            open_slide(cut(path, share))


def test_good_files_are_whole(shared_data: Path) -> None:
    for path in [*(shared_data / "slides").glob("*.svs"), *(shared_data / "monuseg" / "images").glob("*.tif")]:
        check_tiff(path)


def test_offsets_of_large_ndpi_files_are_not_judged(tmp_path: Path) -> None:
    path = tmp_path / "a.ndpi"
    # Its first directory lies beyond 4 GiB, which a classic TIFF cannot say: here 64 bits do, as NDPI has it.
    path.write_bytes(b"II*\0" + (2**32 + 8).to_bytes(8, "little") + bytes(100))
    os.truncate(path, 2**32 + 1000)  # nearly all of it a hole
    check_tiff(path)
    path.write_bytes(b"II*\0" + (2**31 + 8).to_bytes(8, "little") + bytes(100))
    with pytest.raises(SlideError, match="file is truncated"):
        check_tiff(path)


def test_memory_that_runs_out_while_a_slide_is_opened_is_no_fault_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")

    def full(path: Path) -> Any:
        raise PipelineError("there is not enough memory to read the slide", "give the job more memory")

    monkeypatch.setitem(open_module._CLASSES, "image", full)
    with pytest.raises(PipelineError, match="not enough memory") as caught:
        open_slide(tmp_path / "a.png", reader="image")
    assert not isinstance(caught.value, SlideError)


def test_not_a_slide(tmp_path: Path) -> None:
    def reason(path: Path) -> str:
        with pytest.raises(SlideError) as caught:
            open_slide(path)
        assert "\n" not in str(caught.value)
        return caught.value.reason

    empty = tmp_path / "empty.svs"
    empty.touch()
    assert reason(empty) == "file is empty"
    text = tmp_path / "text.svs"
    text.write_text("This is not a slide.\n" * 100)
    assert "not a slide that OpenSlide, tiffslide or Pillow can read" in reason(text)
    folder = tmp_path / "folder.svs"
    folder.mkdir()
    assert reason(folder) == "folder.svs is a folder, not a slide file"
    assert "does not exist" in reason(tmp_path / "missing.svs")
    link = tmp_path / "link.svs"
    link.symlink_to("gone.svs")
    assert reason(link) == f"{link} is a link to gone.svs, which does not exist"
    pipe = tmp_path / "pipe.svs"
    os.mkfifo(pipe)
    assert "not a regular file" in reason(pipe)
    noise = tmp_path / "noise.svs"
    noise.write_bytes(b"II*\x00" + np.random.default_rng(0).bytes(5000))
    reason(noise)
    half = tmp_path / "half.png"
    Image.fromarray(picture()).save(half)
    cut(half, 0.5)
    reason(half)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_permissions(tmp_path: Path) -> None:
    path = slide_file(tmp_path)
    path.chmod(0)
    with pytest.raises(SlideError, match="no permission to read"):
        open_slide(path)


def test_permissions_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = slide_file(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SlideError, match="no permission to read"):
        open_slide(path)


@pytest.mark.parametrize("kind", WRITERS)
def test_claimed_size(tmp_path: Path, kind: str) -> None:
    path = slide_file(tmp_path, kind)
    set_tags(path, ImageWidth=1_000_000, ImageLength=1_000_000)
    with pytest.raises(SlideError, match="claims 1000000 x 1000000 pixels"):
        open_slide(path)
    set_tags(path, ImageWidth=100_000, ImageLength=100_000)
    with pytest.raises(SlideError, match=r"claims 100000 x 100000 pixels but holds \d+ of \d+ tiles"):
        open_slide(path)


def test_sizes_of_some_tiles_alone(tmp_path: Path) -> None:
    path = slide_file(tmp_path, "svs")
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags["TileByteCounts"]
        count, order = tag.count, tif.byteorder
    assert count > 2
    with path.open("r+b") as file:
        file.seek(tag.offset + 4)
        file.write((2).to_bytes(4, "little" if order == "<" else "big"))
    with pytest.raises(SlideError, match=rf"claims \d+ x \d+ pixels but states the size of 2 of {count} tiles"):
        open_slide(path)


def test_claimed_tile_size(tmp_path: Path) -> None:
    # OpenSlide would abort the whole process when it cannot have the memory for one.
    path = slide_file(tmp_path, "tiff")
    set_tags(path, TileWidth=1 << 20, TileLength=1 << 20)
    with pytest.raises(SlideError, match="claims tiles of 1048576 x 1048576 pixels"):
        open_slide(path)


@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_plain_image_of_16_bits_is_refused(tmp_path: Path, suffix: str, samples: int) -> None:
    """Its upper eight bits are nearly black where a camera fills twelve."""
    deep = np.repeat(picture(40, 30)[..., :1].astype(np.uint16) * 16, samples, axis=2)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "png":
        cv2.imwrite(str(path), deep)
    else:
        tifffile.imwrite(path, deep.squeeze(), photometric="rgb" if samples > 1 else "minisblack", byteorder=">")
    for reader in ("auto", "image"):
        with pytest.raises(SlideError, match=rf"holds {samples} x uint16 a pixel, .* \(convert it to 8-bit RGB"):
            open_slide(path, reader)


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG")])
def test_a_plain_image_that_is_cut_short(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(picture(300, 200)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = rf"is a {kind} of 300 x 200 pixels that is damaged or cut short: .* \(copy or export the image again\)"
    with pytest.raises(SlideError, match=told):
        open_slide(path)


def test_a_mirax_slide_without_its_folder_is_no_image(tmp_path: Path) -> None:
    """The file itself is a JPEG of the overview."""
    path = tmp_path / "a 1.MRXS"
    Image.fromarray(picture(300, 200)).save(path, format="JPEG")
    for made in (False, True):
        if made:
            (tmp_path / "a 1").mkdir()
        with pytest.raises(SlideError, match=r"MIRAX slide whose folder 'a 1' is missing or damaged \(copy the folder"):
            open_slide(path)


def test_huge_plain_image(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(SlideError, match="too large to decode whole"):
        open_slide(path)


@pytest.mark.parametrize("reader", [OpenSlideReader, TiffSlideReader])
def test_tiles_that_do_not_decode(tmp_path: Path, reader: type[OpenSlideReader]) -> None:
    path = slide_file(tmp_path)
    with reader(path) as slide:
        across, down = slide.tile_size(0)
    spoil_tiles(path, [0])
    with reader(path) as slide:
        with pytest.raises(SlideError, match="cannot decode"):
            slide.read(0, 0, 0, 10, 10)
        # The handle still serves the rest.
        assert slide.read(0, across, down, 100, 100).std() > 5


def test_errors_of_the_machine_are_not_the_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = []

    def read(*args: Any, **options: Any) -> None:
        raise errors.pop()

    with OpenSlideReader(slide_file(tmp_path)) as slide:
        slide.read(0, 0, 0, 10, 10)
        monkeypatch.setattr(type(slide._slide), "read_region", read)
        for error, expected in (
            (OSError(errno.ESTALE, "Stale file handle"), OSError),
            (MemoryError(), PipelineError),
            (OSError("image file is truncated"), SlideError),
        ):
            errors.append(error)
            with pytest.raises(expected) as raised:
                slide.read(0, 0, 0, 10, 10)
            assert isinstance(raised.value, SlideError) == (expected is SlideError)


def test_a_slide_that_goes_is_not_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its file system is no longer mounted: another run shall read it again."""
    path, out = slide_file(tmp_path), tmp_path / "slide.json"
    with OpenSlideReader(path) as slide:
        slide.close()  # as after any error: it is opened once more
        path.rename(tmp_path / "away")
        with pytest.raises(PipelineError, match=r"could be read before, and now: No such file .* is mounted") as raised:
            slide.read(0, 0, 0, 10, 10)
        assert not isinstance(raised.value, SlideError)
    noted = tmp_path / "noted"
    monkeypatch.setenv(UNREADABLE, str(noted))
    for names, status in (("a b\nb\n", "failed"), ("a\nb", None), ("", None)):
        noted.write_text(names)
        if status is None:
            with pytest.raises(PipelineError, match="could be read before, and now: No such file"):
                run_inspect("a b", path, out)
            assert not out.exists()
        else:
            assert run_inspect("a b", path, out)["status"] == status
            out.unlink()
    (tmp_path / "away").rename(path)
    info = run_inspect("a b", path, out)
    path.unlink()
    with pytest.raises(PipelineError, match="could be read before, and now: No such file") as raised:
        reopen(info)
    assert not isinstance(raised.value, SlideError)


def test_a_file_server_that_fails_when_a_slide_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(self: Path, *args: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    path = slide_file(tmp_path)
    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        open_slide(path)


@pytest.mark.parametrize("planar", [False, True])
def test_a_file_server_that_fails_while_a_tiff_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planar: bool
) -> None:
    """Else a slide would have no pixel size, or a 16-bit one would be read, for good."""
    path = tmp_path / "slide.ome.tif"
    pixels = np.moveaxis(picture(300, 200), 2, 0) if planar else picture(300, 200)
    options: dict[str, Any] = {"metadata": {"axes": "SYX" if planar else "YXS"}}
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), planarconfig=1 + planar, **options)
    errors: list[Exception] = []
    reads = 0

    class File(tifffile.TiffFile):
        def __init__(self, *args: Any, **options: Any) -> None:
            nonlocal reads
            reads += 1
            if errors and (error := errors.pop()):
                raise error
            super().__init__(*args, **options)

    open_slide(path).close()
    monkeypatch.setattr(tifffile, "TiffFile", File)
    open_slide(path).close()
    assert reads == 1
    errors.append(OSError(errno.ESTALE, "Stale file handle"))
    with pytest.raises(OSError, match="Stale file handle"):
        open_slide(path)


def test_the_libraries_loggers_are_left_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("tifffile", "tiffslide", "PIL")
    for name in names:
        caplog.set_level(logging.WARNING, name)  # the command line, which others test, silences them
    open_slide(slide_file(tmp_path)).close()
    for name in names:
        logging.getLogger(name).warning("of %s", name)
    assert caplog.messages == ["of tifffile", "of tiffslide", "of PIL"]


def test_wrong_reader(tmp_path: Path) -> None:
    path = tmp_path / "field.png"
    Image.fromarray(picture(50, 50)).save(path)
    with pytest.raises(SlideError, match="openslide cannot read this file"):
        open_slide(path, "openslide")
    with pytest.raises(PipelineError, match="no reader 'pil'"):
        open_slide(path, "pil")


@pytest.fixture(scope="module")
def good_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for kind in WRITERS:
        slide_file(folder, kind, width=300, height=260)
    return folder


# Mostly the header and the directories, where a byte does most harm.
PLACES = st.one_of(st.integers(0, 999), st.integers(1000, 10**6))


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(WRITERS)), damage=st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=6))
def test_any_damage_is_a_slide_error(
    good_files: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    damage: list[tuple[int, int]],
) -> None:
    content = bytearray((good_files / f"slide.{kind}").read_bytes())
    for at, value in damage:
        content[at % len(content)] = value
    path = tmp_path_factory.mktemp("damaged") / f"slide.{kind}"
    path.write_bytes(content)
    try:
        with open_slide(path) as slide:
            slide.read(0, 0, 0, 64, 64)
            assert slide.quick_hash
            resolve_mpp(slide, None)
    except SlideError as error:
        assert "\n" not in str(error)


def test_inspect(tmp_path: Path) -> None:
    path = slide_file(tmp_path)
    out = tmp_path / "out" / "slide.json"
    run_inspect("s", path, out)
    info = read_manifest(out)
    assert (info["status"], info["width"], info["height"], info["mpp_source"]) == ("ok", 900, 700, "metadata")
    assert info["tiles_tried"]["failed"] == 0
    assert info["bytes"] == path.stat().st_size
    with reopen(info) as slide:
        assert slide.backend == info["backend"]
    run_inspect("s", path, out, mpp=0.5, mpp_source="config")
    assert (read_manifest(out)["mpp"], read_manifest(out)["mpp_source"]) == ([0.5, 0.5], "config")
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SlideError, match="has changed"):
        reopen(info)


def test_inspect_of_a_slide_that_does_not_decode(tmp_path: Path) -> None:
    path = slide_file(tmp_path)
    with tifffile.TiffFile(path) as tif:
        count = len(tif.pages[0].dataoffsets)
    spoil_tiles(path, list(range(count)))
    out = tmp_path / "slide.json"
    run_inspect("s", path, out)
    manifest = read_manifest(out)
    assert manifest["status"] == "failed"
    assert "of 9 tiles tried cannot be decoded" in manifest["failure"]["reason"]
    with pytest.raises(SlideError, match="slide 's', inspect:"):
        run_inspect("s", path, out, on_bad_slide="stop")


def jpeg_tiles(rgb: np.ndarray, side: int, left_out: frozenset[tuple[int, int]] = frozenset()) -> Any:
    """JPEGs in JFIF, which are YCbCr, of the tiles of an image; empty for those that are left out."""
    for y in range(0, rgb.shape[0], side):
        for x in range(0, rgb.shape[1], side):
            tile = np.full((side, side, 3), 255, np.uint8)
            part = rgb[y : y + side, x : x + side]
            tile[: part.shape[0], : part.shape[1]] = part
            found = cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
            yield b"" if (y // side, x // side) in left_out else found


def test_ycbcr_that_is_tagged_rgb(tmp_path: Path) -> None:
    rgb, path = picture(512, 512), tmp_path / "a.tif"
    form = {"shape": rgb.shape, "dtype": "uint8", "tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    tifffile.imwrite(path, jpeg_tiles(rgb, 256), compressionargs={"outcolorspace": "rgb"}, metadata=None, **form)
    with open_slide(path) as slide:
        assert slide.backend == "tiffslide"
        assert np.abs(slide.read(0, 0, 0, 512, 512).astype(int) - rgb).mean() < 4
    with pytest.raises(SlideError, match="is tagged RGB, but holds YCbCr, which OpenSlide shows in wrong colours"):
        open_slide(path, "openslide")


def test_tiles_that_a_reduced_level_leaves_out(tmp_path: Path) -> None:
    # OpenSlide fills them in from the finer level, tiffslide would show them white.
    rgb, path = picture(1920, 1920), tmp_path / "a.svs"
    form: dict[str, Any] = {
        "dtype": "uint8", "tile": (128, 128), "photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg",
        "metadata": None,
    }  # fmt: skip
    small = np.ascontiguousarray(rgb[::4, ::4])
    with tifffile.TiffWriter(path) as file:
        text = "Aperio Image Library v11\r\n1920x1920|AppMag = 20|MPP = 0.5"
        file.write(jpeg_tiles(rgb, 128), shape=rgb.shape, description=text, **form)
        file.write(rgb[::8, ::8].copy(), photometric="rgb", metadata=None, description="Aperio Image Library v11\r\nx")
        gaps = frozenset({(1, 1), (1, 2)})
        file.write(jpeg_tiles(small, 128, gaps), shape=small.shape, description="Aperio Image Library v11\r\n", **form)
    with open_slide(path) as slide:
        assert slide.backend == "openslide"
        assert np.abs(slide.read(1, 0, 0, 480, 480).astype(int) - small).mean() < 6


def test_an_image_in_one_large_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.slides.tiff_reader.MAX_SEGMENT_PIXELS", 100 * 100)
    rgb = picture(300, 200)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb", rowsperstrip=200)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.backend == "image"
        np.testing.assert_array_equal(slide.read(0, 0, 0, 300, 200), rgb)


@pytest.mark.parametrize("vendor", ["ventana", "trestle", "dicom", "zeiss"])
def test_openslides_reason_is_told(tmp_path: Path, vendor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bif"
    if vendor in ("ventana", "trestle"):  # which tiffslide would read with the overlaps of the tiles
        tifffile.imwrite(path, picture(300, 200), photometric="rgb")
    else:
        path.write_bytes(b"no image")

    def fail(self: Any, path: Path) -> None:
        raise ValueError("Bad direction\n attribute LEFT")

    monkeypatch.setattr(OpenSlideReader, "__init__", fail)
    monkeypatch.setattr(open_module, "_vendor", lambda path: vendor)
    told = f"is a slide of format '{vendor}' that OpenSlide cannot open: Bad direction attribute LEFT"
    with pytest.raises(SlideError, match=told):
        open_slide(path)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
@settings(max_examples=20, deadline=None)
def test_ycbcr_shown_as_rgb_is_recognised(seed: int, glass: float) -> None:
    rgb, _ = make_field(96, 96, 0.5, seed)
    rgb = np.where(np.arange(96)[:, None, None] < 96 * glass, np.uint8(246), rgb).astype(np.uint8)
    ycbcr = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    assert like_ycbcr(ycbcr.reshape(-1, 3))
    assert not like_ycbcr(rgb.reshape(-1, 3))
    assert not like_ycbcr(np.full((1000, 3), 255, np.uint8))
    assert not like_ycbcr(np.tile(np.array([240, 130, 150], np.uint8), (1000, 1)))  # eosin without glass


def test_a_slide_that_was_rescaled(tmp_path: Path) -> None:
    for name, told, doubt in (
        ("a", "46000x32914 [10,20 512x512] (240x240) JPEG/RGB Q=30", False),
        ("b", "1024x1024 (240x240) JPEG/RGB Q=30", True),
        ("c", "no size", False),
    ):
        path = tmp_path / f"{name}.svs"
        text = f"Aperio Image Library v11\r\n{told}|AppMag = 20|MPP = 0.5"
        rgb = picture(512, 512)
        tifffile.imwrite(path, rgb, photometric="rgb", tile=(256, 256), description=text, metadata=None)
        warnings = run_inspect("x", path, tmp_path / f"{name}.json")["warnings"]
        assert [one.startswith("the file's description is of an image of 1024 x 1024") for one in warnings] == [
            True
        ] * doubt
