from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.kernels import focus
from pipeline.kernels.focus import edge_blur
from pipeline.kernels.stain import RUIFROK, od_to_rgb
from pipeline.slides.synthetic import make_field


def discs(mpp: float, blur_um: float, strength: float = 1.0, side_um: float = 32) -> np.ndarray:
    """Discs of hematoxylin on eosin, whose edges are Gaussian ramps of a known width; drawn fine, seen at `mpp`."""
    fine = 0.05
    y, x = np.mgrid[: round(side_um / fine), : round(side_um / fine)] * fine
    amount = np.zeros(x.shape, np.float32)
    for centre_x, centre_y, radius in ((9, 9, 5), (23, 10, 4.5), (10, 24, 4), (24, 24, 6)):
        amount[np.hypot(x - centre_x, y - centre_y) < radius] = 1
    if blur_um:
        amount = cv2.GaussianBlur(amount, (0, 0), blur_um / fine)
    side = round(side_um / mpp)
    amount = cv2.resize(amount, (side, side), interpolation=cv2.INTER_AREA)
    return od_to_rgb(np.stack([0.8 * strength * amount, np.full_like(amount, 0.2)], axis=-1) @ RUIFROK)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("blur_um", [0.5, 0.75, 1.0, 1.5, 2.0])
def test_known_blur_is_found_at_any_pixel_size(mpp: float, blur_um: float) -> None:
    assert edge_blur(discs(mpp, blur_um), mpp) == pytest.approx(blur_um, rel=0.13, abs=0.12)


@pytest.mark.parametrize("blur_um", [0.5, 1.0, 1.5])
def test_neither_stain_nor_noise_nor_compression_counts(blur_um: float) -> None:
    rgb = discs(0.5, blur_um)
    expected = edge_blur(rgb, 0.5)
    noisy = np.clip(rgb + np.random.default_rng(0).normal(0, 4, rgb.shape), 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=50)
    for other in (discs(0.5, blur_um, strength=0.4), noisy, np.array(Image.open(stream))):
        assert edge_blur(other, 0.5) == pytest.approx(expected, abs=0.12)


def test_a_turned_image_is_as_sharp() -> None:
    rgb = discs(0.5, 0.8)
    for turned in (np.rot90(rgb), rgb[:, ::-1]):
        assert edge_blur(np.ascontiguousarray(turned), 0.5) == pytest.approx(edge_blur(rgb, 0.5), abs=1e-4)


@pytest.mark.parametrize("value", [0, 128, 255])
@pytest.mark.parametrize("shape", [(0, 0), (1, 1), (1, 64), (31, 64), (32, 32), (64, 64)])
def test_without_edges_nothing_is_judged(value: int, shape: tuple[int, int]) -> None:
    assert edge_blur(np.full((*shape, 3), value, np.uint8), 0.5) is None


def test_what_is_too_small_or_too_coarse_or_too_pale_is_not_judged() -> None:
    rgb = discs(0.5, 0.5)
    assert edge_blur(rgb, 0.5) is not None
    assert edge_blur(rgb[:31], 0.5) is None
    assert edge_blur(rgb, focus.COARSEST_MPP + 0.01) is None
    assert edge_blur(discs(0.5, 0.5, strength=0.05), 0.5) is None
    noise = np.random.default_rng(1).integers(243, 250, (64, 64, 3)).astype(np.uint8)
    assert edge_blur(noise, 0.5) is None


def test_slow_shading_is_a_wide_edge() -> None:
    shade = np.broadcast_to(np.linspace(0, 3, 64)[:, None], (64, 64))
    width = edge_blur(od_to_rgb(np.stack([shade, 0 * shade], axis=-1) @ RUIFROK), 0.5)
    assert width is not None
    assert 3 < width <= focus.LARGEST_UM


def test_real_fields_as_they_are_and_blurred(shared_data: Path) -> None:
    paths = [*sorted((shared_data / "monuseg" / "images").glob("*.tif"))[::3]]
    for mpp in (0.25, 0.5):
        for blur_um, low, high in ((0, 0.2, 0.55), (1, 0.8, 1.0), (2, 1.3, 1.8)):
            found = []
            for path in paths:
                with Image.open(path) as image:
                    rgb = np.array(image.convert("RGB"))
                rgb = cv2.GaussianBlur(rgb, (0, 0), blur_um / 0.25) if blur_um else rgb
                side = round(rgb.shape[0] * 0.25 / mpp)
                rgb = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
                found += [edge_blur(rgb[y : y + 64, 192:256], mpp) for y in range(0, side - 63, 64)]
            known = [value for value in found if value is not None]
            assert len(known) > 0.9 * len(found)
            assert low < float(np.median(known)) < high
            assert (np.mean(np.array(known) > focus.BLURRED_UM) > 1 / 3) == (blur_um > 0)


def test_width_does_not_depend_on_where_arrays_lie_in_memory() -> None:
    rgb, _ = make_field(512, 512, 0.5, 1)
    rng = np.random.default_rng(0)
    for y in range(0, 512, 64):
        for x in range(0, 512, 64):
            widths = set()
            for _ in range(20):
                room = [np.empty(size) for size in rng.integers(1, 5000, 5)]  # so that what comes next lies elsewhere
                widths.add(edge_blur(rgb[y : y + 64, x : x + 64], 0.5))
                del room
            assert len(widths) == 1
