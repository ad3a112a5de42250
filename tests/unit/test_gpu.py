"""Inference on a GPU, where there is one; what of it can be tried on a CPU is tried there."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline import testing as fabricated  # noqa: E402
from pipeline.errors import PipelineError  # noqa: E402
from pipeline.inference import infer_slide, run_infer  # noqa: E402
from pipeline.kernels.blend import Blender, PatchGrid  # noqa: E402
from pipeline.kernels.stain import StainTransform  # noqa: E402
from pipeline.models.package import ModelPackage  # noqa: E402
from pipeline.models.weights import load_network  # noqa: E402
from pipeline.networks.outputs import Outputs  # noqa: E402
from pipeline.prediction import batches  # noqa: E402
from pipeline.prediction.batches import BatchPredictor, DeviceBlender  # noqa: E402
from pipeline.prediction.predictors import Strip, WindowPredictor, channel_names  # noqa: E402
from pipeline.stores.maps import MapStore  # noqa: E402
from pipeline.stores.tile_store import TileStore  # noqa: E402
from pipeline.testing import digest, stained, write_inputs  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


def predictor(folder: Path, device: str, batch: int) -> BatchPredictor:
    """A small network that computes in batches."""
    fabricated.write_package(folder, "resunet", {"widths": [4, 6, 8]}, patch=96, overlap=24)
    package = ModelPackage.load(folder)
    return BatchPredictor(load_network(package), device, batch, Outputs(channel_names(package)), torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_device_blends_as_numpy_does(device: str, largest: bool, seed: int) -> None:
    grid = PatchGrid(200 + 60 * seed, 170, 64, 20)
    rng = np.random.default_rng(seed)
    ours, theirs = Blender(grid, largest), DeviceBlender(grid, largest, torch.device(device))
    places = [(row, column) for row in range(grid.rows) for column in range(grid.columns) if rng.random() < 0.8]
    while places:
        count = int(rng.integers(1, 9))
        batch, places = places[:count], places[count:]
        maps = rng.integers(0, 256, (len(batch), 2, 64, 64), np.uint8)
        found = theirs.add(batch, torch.from_numpy(maps).to(device))
        for place, one, blended in zip(batch, maps, found.cpu().numpy(), strict=True):
            np.testing.assert_array_equal(blended, ours.add(*place, one))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_that_are_under_way_at_once_do_not_mix(tmp_path: Path, device: str) -> None:
    one = predictor(tmp_path / "model", device, 3)
    grid = PatchGrid(500, 96, 96, 24)
    rng = np.random.default_rng(2)
    places = [(0, column) for column in range(7)]
    patches = rng.integers(0, 256, (7, 96, 96, 3), np.uint8)
    slide, expected = one.slide(grid, StainTransform()), Blender(grid)
    strips = [Strip(*place, 1, pixels) for place, pixels in zip(places, patches, strict=True)]
    ready = [slide.prepare(strips[i : i + 3]) for i in (6, 3, 0)]
    begun = [begin() for begin in reversed(ready)]
    found = [pixels for finish in begun for pixels in finish()]
    maps = np.concatenate([one(patches[i : i + 3]) for i in (0, 3, 6)])
    for place, ours, alone in zip(places, found, maps, strict=True):
        np.testing.assert_array_equal(ours, expected.add(*place, alone))
    assert (one.busy is None) == (device == "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_batches_halve_when_memory_runs_out(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = predictor(tmp_path / "model", device, 4)
    patches = np.random.default_rng(3).integers(0, 256, (4, 96, 96, 3), np.uint8)
    whole, forward = one(patches), one.forward

    def short(x: Any, colours: Any) -> Any:
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, colours)

    monkeypatch.setattr(one, "forward", short)
    np.testing.assert_allclose(one(patches).astype(int), whole, atol=1)
    assert one.batch == one.per_pass == 2
    assert "batches of 2" in caplog.text


def test_full_batches_are_cut_into_two_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = predictor(tmp_path / "model", "cpu", 5)
    forward, passes = one.forward, []

    def short(x: Any, colours: Any) -> Any:
        if len(x) > 3:
            raise RuntimeError("GET was unable to find an engine to execute this computation")  # cuDNN without memory
        passes.append(len(x))
        return forward(x, colours)

    monkeypatch.setattr(one, "forward", short)
    one(np.zeros((5, 96, 96, 3), np.uint8))
    assert passes == [3, 2]

    def broken(x: Any, colours: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(one, "forward", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        one(np.zeros((5, 96, 96, 3), np.uint8))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_blending_without_memory_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    one = predictor(tmp_path / "model", "cpu", 8)

    def short(*_: Any) -> Any:
        raise kind("out of memory")

    monkeypatch.setattr(DeviceBlender, "add", short)
    begin = one.slide(PatchGrid(700, 96, 96, 24), StainTransform()).prepare(
        [Strip(0, 0, 8, np.zeros((96, 7 * 72 + 96, 3), np.uint8))]
    )
    with pytest.raises(PipelineError, match=r"cpu is out of memory: 8 windows .* \(set infer.batch to 2"):
        begin()


def test_a_slides_colours_are_made_on_the_threads_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int | None] = []

    class Noted(ThreadPoolExecutor):
        def __init__(self, workers: int | None = None) -> None:
            used.append(workers)
            super().__init__(workers)

    package = fabricated.write_package(tmp_path / "model", "resunet", {"widths": [4, 6]}, patch=96, overlap=24)
    one = BatchPredictor(load_network(package), "cpu", 2, Outputs(channel_names(package)), torch.float32, threads=3)
    monkeypatch.setattr(batches, "ThreadPoolExecutor", Noted)
    one.slide(PatchGrid(96, 96, 96, 24), TRANSFORMS["lut"])
    assert used == [3]


class RedAndGreen:
    """In the place of `Outputs`: the windows' own colours as maps, so that nothing rounds."""

    def predict(self, network: Any, images: Any) -> Any:
        return images[:, :2]


class Watched(BatchPredictor):
    """As on a GPU, so that threads read, hash and write."""

    busy = 0.0  # type: ignore[assignment]


TRANSFORMS = {
    "none": StainTransform(),
    "matrix": StainTransform(
        "matrix", ((0.78, 0.11, 0.06), (0.21, 0.88, -0.07), (0.01, 0.1, 0.98)), white=(0.05, 0.03, 0)
    ),
    "lut": StainTransform("lut", lut=(tuple(range(256)), tuple(range(128)) * 2, (9,) * 256)),
    "reinhard": StainTransform("reinhard", source=((60, 20, -10), (10, 5, 5)), target=((65, 22, -12), (12, 5, 5))),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", TRANSFORMS)
def test_a_device_sees_the_windows_that_a_cpu_sees(tmp_path: Path, device: str, method: str) -> None:
    store = TileStore.open(write_inputs(tmp_path / "in", stained(700, 900, 1))["zarr"])
    package = fabricated.write_package(tmp_path / "model", "resunet", {"widths": [4, 6]}, patch=96, overlap=24)
    network, outputs = load_network(package), RedAndGreen()
    predictors = {
        "windows": WindowPredictor(lambda window: window.transpose(2, 0, 1)[:2], 2),
        "batches": BatchPredictor(network, device, 7, outputs, torch.float32),  # type: ignore[arg-type]
        "threads": Watched(network, device, 7, outputs, torch.float32),  # type: ignore[arg-type]
    }
    found = set()
    for name, one in predictors.items():
        maps = tmp_path / f"{name}.zarr"
        about = infer_slide(store, TRANSFORMS[method], one, package, maps, threads=3)
        found.add((about["maps_sha256"], digest(maps)))
    assert len(found) == 1


@gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_runs_on_a_gpu_give_equal_bytes(tmp_path: Path, precision: str) -> None:
    inputs = write_inputs(tmp_path / "in", stained(700, 900, 1))
    fabricated.write_package(tmp_path / "model", "resunet", {"widths": [16, 32]}, patch=96, overlap=24)
    options: dict[str, Any] = {**inputs, "model": tmp_path / "model", "batch": 16, "precision": precision}
    digests = set()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        zarr = tmp_path / name / "maps.zarr"
        run_infer("s", **options, device="cuda", out=tmp_path / name / "maps.json", zarr_out=zarr)
        digests.add(digest(zarr))
    assert len(digests) == 1
    manifest = json.loads((tmp_path / "first/maps.json").read_text())
    assert 0 < manifest["gpu_busy"] <= 1
    (tmp_path / "cpu").mkdir()
    run_infer("s", **options, device="cpu", out=tmp_path / "cpu/maps.json", zarr_out=tmp_path / "cpu/maps.zarr")
    maps = [MapStore.open(tmp_path / name / "maps.zarr").read(0, 0, 900, 700).astype(int) for name in ("first", "cpu")]
    tolerance = 1 if precision == "float32" else 12
    assert np.abs(maps[0] - maps[1]).max() <= tolerance
