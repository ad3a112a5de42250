from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline import stain, staintools_backend
from pipeline.batch.stage import write_json
from pipeline.errors import PipelineError
from pipeline.kernels import stain as kernel
from pipeline.kernels.focus import BLURRED_UM
from pipeline.kernels.measure import StainSums
from pipeline.slides.synthetic import make_field
from pipeline.stores.grid import Grid
from pipeline.stores.tile_store import TileStore
from pipeline.testing import write_inputs


def tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Eosin with spots of hematoxylin, uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    spots = np.clip(1.6 * np.cos(x / 5) * np.cos(y / 5), 0, 1)
    noise = random.normal(0, 0.03, (height, width, 3))
    amounts = np.stack([0.1 + 1.2 * spots, 0.6 - 0.4 * spots + 0.2 * np.sin(x / 23)], axis=-1)
    return kernel.od_to_rgb(np.maximum(amounts @ kernel.RUIFROK + noise, 0))


class ArrayTiles:
    """Tiles that are an array."""

    def __init__(self, rgb: np.ndarray, active: np.ndarray | None = None) -> None:
        self.rgb = rgb
        self.grid = Grid(rgb.shape[1], rgb.shape[0], 0.5, 2.0, 2.0)
        self.active = np.ones((-(-rgb.shape[0] // 64), -(-rgb.shape[1] // 64)), bool) if active is None else active
        self.reads: list[tuple[int, int, int, int]] = []

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        assert 0 <= x <= x + width <= self.grid.width
        assert 0 <= y <= y + height <= self.grid.height
        self.reads.append((x, y, width, height))
        return self.rgb[y : y + height, x : x + width]


def model(method: str = "macenko", names: tuple[str, ...] | None = None) -> Any:
    reference = kernel.fit_reference(np.minimum(tissue(400, 400, seed=5), 235), staintools_backend.extractors())
    reference = {name: value for name, value in reference.items() if names is None or name in names}
    return SimpleNamespace(name="toy", stain={"method": method, "reference": reference})


def test_every_beginning_of_the_order_is_spread() -> None:
    order = stain.spread_order(1000)
    assert sorted(order) == list(range(1000))
    for count in (10, 64, 333):
        gaps = np.diff(np.sort(order[:count]))
        assert gaps.max() <= 3 * 1000 / count
    assert stain.spread_order(0).shape == (0,)


def test_sampling_is_bounded_deterministic_and_looks_at_active_cells_only() -> None:
    rgb = tissue(1000, 1500)
    active = np.zeros((16, 24), bool)
    active[3:9, 5:20] = True
    active[5, 8:12] = False
    elsewhere = np.array([120, 40, 130], np.uint8)  # looks like tissue
    rgb[~np.kron(active, np.ones((64, 64), bool))[:1000, :1500]] = elsewhere
    tiles = ArrayTiles(rgb, active)
    sample = stain.sample_tissue(tiles, 5000)
    assert sample.rgb.shape == (5000, 3)
    assert sample.cells == active.sum()
    assert np.array_equal(
        sample.white,
        kernel.white_level(
            np.concatenate([rgb[64 * y : 64 * y + 64, 64 * x : 64 * x + 64] for y, x in np.argwhere(active)])
        ),
    )
    assert len(tiles.reads) == 2  # blocks of 1024 pixels
    everything = stain.sample_tissue(tiles, 10**6).rgb
    assert not (everything == elsewhere).all(axis=1).any()
    one_by_one = [rgb[64 * y : 64 * y + 64, 64 * x : 64 * x + 64] for y, x in np.argwhere(active)]
    assert np.array_equal(everything, np.concatenate([kernel.tissue_pixels(cell) for cell in one_by_one]))
    assert len(sample.blur) == active.sum()
    again = stain.sample_tissue(ArrayTiles(rgb, active), 5000)
    assert np.array_equal(sample.rgb, again.rgb)
    assert sample.blur == again.blur
    nothing = stain.sample_tissue(ArrayTiles(rgb, np.zeros_like(active)))
    assert (len(nothing.rgb), nothing.blur) == (0, [])


def test_focus_is_judged_in_cells_of_tissue_and_few_of_them() -> None:
    half = tissue(640, 640)
    half[:, :320] = 250
    half[:, 300:352] = 250  # cells that are glass for the greater part
    assert len(stain.sample_tissue(ArrayTiles(half)).blur) == 10 * 4
    assert stain.sample_tissue(ArrayTiles(np.full((640, 640, 3), 200, np.uint8))).blur == []  # tissue without edges
    edge = stain.sample_tissue(ArrayTiles(tissue(65, 64 + 31)))  # rests of cells at the slide's edge
    assert (edge.cells, len(edge.blur)) == (4, 1)
    large = stain.sample_tissue(ArrayTiles(tissue(64 * 40, 64 * 40)))
    assert large.cells == len(large.blur) == 256


def test_the_focus_of_a_slide_of_coarse_pixels_is_not_judged() -> None:
    tiles = ArrayTiles(tissue(640, 640))
    tiles.grid = Grid(640, 640, 0.5, 0.65, 0.65)
    assert len(stain.sample_tissue(tiles).blur) == 100
    tiles.grid = Grid(640, 640, 0.5, 0.65, 0.5)  # pixels of 0.77 x 1 µm, seen as if they had 0.5
    assert stain.sample_tissue(tiles).blur == []


def test_tiles_of_any_size_show_the_same(tmp_path: Path) -> None:
    rgb, _ = make_field(900, 700, 0.5, 1)
    stores = (write_inputs(tmp_path / str(tile), rgb, tile)["zarr"] for tile in (1024, 64))
    few, many = (stain.sample_tissue(TileStore.open(store)) for store in stores)
    assert few.blur == many.blur
    assert len(few.blur) > stain.LEAST_JUDGED
    assert np.array_equal(few.rgb, many.rgb)


def test_focus_of_a_slide() -> None:
    unknown = {"cells": 19, "blur_um": None, "blurred_share": None}
    assert stain.judge_focus([2.0] * 19) == (unknown, [])
    assert stain.judge_focus([])[0]["cells"] == 0
    assert stain.judge_focus([0.4] * 20 + [1.0] * 10) == ({"cells": 30, "blur_um": 0.4, "blurred_share": 0.3333}, [])
    assert stain.judge_focus([BLURRED_UM] * 30)[0]["blurred_share"] == 0
    focus, (warning,) = stain.judge_focus([0.4] * 19 + [1.0] * 11)
    assert focus["blurred_share"] == 0.3667
    assert warning.startswith("out of focus: edges are wider than 0.75 µm in 37 % of 30 places (median 0.40 µm)")
    assert "scan the slide again" in warning


@pytest.mark.parametrize("method", ["model", "none", "macenko", "reinhard", "histogram"])
def test_methods(method: str) -> None:
    pixels = stain.sample_tissue(ArrayTiles(tissue(500, 500))).rgb
    transform, payload = stain.fit_slide(pixels, method, model())
    expected = "macenko" if method == "model" else method
    assert (payload["requested"], payload["method"], payload["warnings"]) == (method, expected, [])
    assert kernel.StainTransform.from_json(json.loads(json.dumps(payload))["transform"]) == transform
    assert stain.stain_matrix(payload)[2] == "slide"
    assert kernel.angle(stain.stain_matrix(payload)[0][0], kernel.RUIFROK[0]) < 12


@pytest.mark.parametrize("method", ["none", "macenko", "reinhard", "histogram"])
def test_what_is_measured_depends_on_neither_method_nor_glass(method: str) -> None:
    clear = tissue(500, 500)
    clear[:100] = 254
    tinted = kernel.od_to_rgb(kernel.rgb_to_od(clear) + np.array([0.05, 0.08, 0.1], np.float32))
    means = []
    for rgb, way in ((clear, "macenko"), (tinted, method)):
        tiles = ArrayTiles(rgb)
        sample = stain.sample_tissue(tiles)
        matrix, white, _ = stain.stain_matrix(stain.fit_slide(sample.rgb, way, model(), white=sample.white)[1])
        sums = StainSums(1, matrix, white)
        sums.add(rgb, np.zeros(500, int), np.arange(500), np.zeros(500, int), np.full(500, 500))
        means.append([values[0] for values in sums.columns().values()])
    np.testing.assert_allclose(means[1], means[0], rtol=0.03)


def test_strength_is_the_models_unless_stated() -> None:
    pixels = stain.sample_tissue(ArrayTiles(tissue(500, 500))).rgb
    whole = model()
    half = SimpleNamespace(name="toy", stain={**whole.stain, "strength": 0.5})
    found = {
        (name, stated): stain.fit_slide(pixels, "model", package, stated)
        for name, package in (("whole", whole), ("half", half))
        for stated in (None, 1.0, 0.5)
    }
    assert found["whole", None][0] == found["half", 1.0][0] != found["half", None][0] == found["whole", 0.5][0]
    assert found["half", None][1]["strength"] == 0.5
    assert found["whole", None][1]["strength"] == 1
    # A method that is asked for by name goes all the way, whatever the card says.
    assert stain.fit_slide(pixels, "macenko", half)[0] == found["whole", None][0]


def test_strength_nought_leaves_colours_and_still_finds_the_stains() -> None:
    pixels = stain.sample_tissue(ArrayTiles(tissue(500, 500))).rgb
    package = model()
    package.stain["strength"] = 0
    transform, payload = stain.fit_slide(pixels, "model", package)
    assert transform == kernel.StainTransform()
    assert (payload["method"], payload["warnings"]) == ("none", [])
    assert stain.stain_matrix(payload)[2] == "slide"


@pytest.mark.parametrize("method", ["macenko", "reinhard", "histogram", "none"])
def test_white_slide_is_left_as_it_is(method: str) -> None:
    tiles = ArrayTiles(np.full((200, 300, 3), 245, np.uint8))
    pixels = stain.sample_tissue(tiles).rgb
    transform, payload = stain.fit_slide(pixels, method, model())
    assert transform == kernel.StainTransform()
    assert payload["method"] == "none"
    assert len(payload["warnings"]) == (method != "none")
    assert stain.stain_matrix(payload)[2] == "ruifrok"


def test_wrong_settings_are_told() -> None:
    pixels = tissue(100, 100).reshape(-1, 3)
    with pytest.raises(PipelineError, match="carries no stain reference for histogram"):
        stain.fit_slide(pixels, "histogram", model(names=("macenko",)))
    with pytest.raises(PipelineError, match="no such stain method: 'mystery'"):
        stain.fit_slide(pixels, "model", model("mystery"))


def test_vahadane_needs_staintools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staintools_backend, "_module", lambda name: None)
    pixels = tissue(200, 200).reshape(-1, 3)
    with pytest.raises(PipelineError, match="pip install --no-deps staintools spams-bin"):
        stain.fit_slide(pixels, "vahadane", model())
    with pytest.raises(PipelineError, match="pip install --no-deps staintools spams-bin"):
        staintools_backend.vahadane(pixels)
    payload = stain.fit_slide(pixels, "macenko", model())[1]
    assert (payload["method"], payload["extractor"]) == ("macenko", "own")
    assert set(staintools_backend.extractors()) == {"macenko"}


@pytest.fixture
def staintools() -> None:
    if not staintools_backend.available():
        pytest.skip("staintools and spams-bin (extra `stain`) are not installed")


@pytest.mark.usefixtures("staintools")
def test_staintools_finds_what_we_find() -> None:
    pixels = kernel.tissue_pixels(tissue(300, 300))
    before = pixels.copy()
    own, theirs = kernel.extract_macenko(pixels), staintools_backend.macenko(pixels)
    assert max(kernel.angle(a, b) for a, b in zip(own, theirs, strict=True)) < 4
    assert np.array_equal(pixels, before)


@pytest.mark.usefixtures("staintools")
def test_vahadane_gives_the_same_twice() -> None:
    pixels = kernel.tissue_pixels(tissue(300, 300))
    first = staintools_backend.vahadane(pixels)
    assert np.array_equal(first, staintools_backend.vahadane(pixels))
    kernel.check_matrix(first)
    payload = stain.fit_slide(pixels, "vahadane", model(names=("macenko",)))[1]
    assert (payload["method"], payload["target"], payload["warnings"]) == ("vahadane", "macenko", [])


@pytest.mark.usefixtures("staintools")
def test_what_staintools_raises_is_a_fit_that_failed() -> None:
    for extract in (staintools_backend.macenko, staintools_backend.vahadane):
        with pytest.raises(kernel.StainFitError, match="Empty tissue mask"):
            extract(np.full((2000, 3), 250, np.uint8))


@pytest.mark.parametrize("shape", [(40, 50), (300, 1000)])
def test_preview(shape: tuple[int, int]) -> None:
    package = model()
    for rgb in (tissue(*shape), np.full((*shape, 3), 255, np.uint8)):
        tiles = ArrayTiles(rgb)
        transform, payload = stain.fit_slide(stain.sample_tissue(tiles).rgb, "model", package)
        image = np.asarray(stain.draw_preview(tiles, transform, payload, package))
        assert image.ndim == 3
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > (100 if rgb.min() < 255 else 3)


def test_previews_differ() -> None:
    for shape, most in (((300, 300), 4), ((200, 2000), 6), ((3000, 3000), 6)):
        tiles = ArrayTiles(tissue(*shape))
        windows, pixels = zip(*stain.preview_windows(tiles), strict=True)
        assert 1 <= len(windows) <= most
        for index, (x, y, *_) in enumerate(windows):
            np.testing.assert_array_equal(pixels[index], tiles.read(*windows[index]))
            assert all(max(abs(x - left), abs(y - top)) >= 128 for left, top, *_ in windows[:index])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the stage on an array."""

    def call(rgb: np.ndarray, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(TileStore, "open", lambda path: ArrayTiles(rgb))
        monkeypatch.setattr(stain.ModelPackage, "load", lambda folder: model())
        write_json(tmp_path / "tiles.json", {"status": "ok", "failure": None})
        paths = [tmp_path / name for name in ("tiles.json", "tiles.zarr", "model", "stain.json", "stain.png")]
        return stain.run_stain("a slide", *paths, **options)

    return call


def test_stage(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    manifest = run(tissue(300, 300))
    assert manifest["status"] == "ok"
    assert manifest["samples"]["pixels"] > 10_000
    assert json.loads((tmp_path / "stain.json").read_text()) == manifest
    assert (tmp_path / "stain.png").stat().st_size > 10_000


def test_stage_warns_of_a_white_slide(run: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    manifest = run(np.full((300, 300, 3), 255, np.uint8))
    assert manifest["status"] == "ok"
    assert manifest["transform"] == {"method": "none"}
    assert "left as it is" in caplog.text


def test_stage_warns_of_a_blurred_slide_and_not_of_a_sharp_one(
    run: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    sharp, _ = make_field(640, 640, 0.5, 3, background=False)
    manifest = run(sharp)
    assert manifest["warnings"] == []
    assert manifest["focus"]["blur_um"] < 0.6
    blurred = sharp.copy()
    blurred[:, :320] = cv2.GaussianBlur(sharp, (0, 0), 1.5 / 0.5)[:, :320]
    manifest = run(blurred)
    assert manifest["focus"]["cells"] >= stain.LEAST_JUDGED
    assert 0.4 < manifest["focus"]["blurred_share"] < 0.8
    (warning,) = manifest["warnings"]
    assert "out of focus" in warning
    assert warning in caplog.text
