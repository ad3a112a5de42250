"""Inference: maps that depend on the slide and the model alone, with a network and without."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import inference
from pipeline import testing as fabricated
from pipeline.errors import PipelineError
from pipeline.inference import CHUNK_COLUMNS, MapWriter, active_windows, run_infer
from pipeline.kernels.blend import Blender, PatchGrid, blend_weights, weight_sum
from pipeline.kernels.hematoxylin import HematoxylinRules, hematoxylin_density, hematoxylin_maps
from pipeline.kernels.instances import InstanceRules, segment
from pipeline.kernels.stain import RUIFROK, od_to_rgb
from pipeline.models.package import ModelPackage
from pipeline.networks.registry import build_method, needs_torch
from pipeline.prediction.predictors import choose_predictor, one_result
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL
from pipeline.stores.maps import MapStore
from pipeline.testing import digest, stained, write_inputs

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "models/hematoxylin"


def run(inputs: dict[str, Path], model: Path, out: Path, **options: Any) -> tuple[str, str]:
    """The hash of the maps by the manifest and that of their files."""
    found = run_infer("s", **inputs, model=model, out=out / "maps.json", zarr_out=out / "maps.zarr", **options)
    assert found["maps_sha256"] == json.loads((out / "maps.json").read_text())["maps_sha256"]
    return found["maps_sha256"], digest(out / "maps.zarr")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_but_slide_and_model_changes_the_maps(tmp_path: Path, precision: str) -> None:
    inputs = write_inputs(tmp_path / "in", stained(300, 420, 1))
    args = {"widths": [4, 6, 8]}
    fabricated.write_package(tmp_path / "model", "resunet", args, patch=96, overlap=24)
    results = {
        run(
            inputs,
            tmp_path / "model",
            tmp_path / f"{batch}-{threads}",
            device="cpu",
            precision=precision,
            batch=batch,
            threads=threads,
        )
        for batch, threads in ((1, 1), (1, 1), (3, 2), (50, 1), (0, 4))
    }
    assert len(results) == 1
    assert json.loads((tmp_path / "1-1" / "maps.json").read_text())["precision"] == precision
    other = write_inputs(tmp_path / "tiles", stained(300, 420, 1), chunk=320)
    assert run(other, tmp_path / "model", tmp_path / "o", device="cpu", precision=precision, threads=1) in results
    fabricated.write_package(tmp_path / "second", "resunet", args, patch=96, overlap=24, seed=1)
    assert run(inputs, tmp_path / "second", tmp_path / "p", device="cpu", threads=1) not in results


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the machine does not keep processes to cores")
def test_all_cores_are_those_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def noted(package: ModelPackage, device: str, batch: int, threads: int, precision: str) -> Any:
        taken.append(threads)
        return choose_predictor(package, device, batch, threads, precision)

    monkeypatch.setattr(inference, "choose_predictor", noted)
    inputs = write_inputs(tmp_path / "in", stained(200, 260, 2))
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        run(inputs, BASELINE, tmp_path / "out")
    finally:
        os.sched_setaffinity(0, mine)
    assert taken == [1]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_written_maps_are_the_blended_windows(data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, 12))
    patch = 2 * overlap + data.draw(st.integers(0, 30))
    width, height = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 300))
    grid = PatchGrid(width, height, patch, overlap)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    active = rng.random((-(-height // CELL), -(-width // CELL))) < data.draw(st.sampled_from([0, 0.2, 0.6, 1]))
    windows = list(active_windows(grid, active))
    predictions = rng.integers(0, 256, (len(windows), 2, patch, patch), np.uint8)

    total = np.zeros((2, height + 2 * patch, width + 2 * patch), np.int64)
    for (row, column), prediction in zip(windows, predictions, strict=True):
        x, y = (value + patch for value in grid.origin(row, column))
        total[:, y : y + patch, x : x + patch] += prediction * blend_weights(patch, overlap)
    blended = (total[:, patch:-patch, patch:-patch] + weight_sum(overlap) // 2) // weight_sum(overlap)
    mask = np.kron(active, np.ones((CELL, CELL), bool))[:height, :width]

    first = data.draw(st.integers(0, grid.rows))
    rows = range(first, data.draw(st.integers(first, grid.rows)))
    with tempfile.TemporaryDirectory() as folder:
        chunk = grid.stride, CHUNK_COLUMNS * grid.stride
        store = MapStore.create(Path(folder, "maps"), Grid(width, height, 0.5, 1, 1), ("a", "b"), active, chunk)
        blender, writer = Blender(grid), MapWriter(store, grid, rows)
        for window, prediction in zip(windows, predictions, strict=True):
            if rows.start <= window[0] <= rows.stop:
                writer.add(*window, blender.add(*window, prediction))
        writer.close()
        found = MapStore.open(store.path).read(0, 0, width, height)
    inside = np.zeros(height, bool)
    inside[rows.start * grid.stride : rows.stop * grid.stride] = True
    np.testing.assert_array_equal(found, blended * mask * inside[:, None])


def test_what_is_held_grows_with_the_tissue_not_with_the_slide(tmp_path: Path) -> None:
    grid = PatchGrid(200_000, 400, 128, 16)
    active = np.zeros((-(-400 // CELL), 200_000 // CELL), bool)
    active[:, 1000:1010] = True
    chunk = grid.stride, CHUNK_COLUMNS * grid.stride
    store = MapStore.create(tmp_path / "maps", Grid(200_000, 400, 0.5, 1, 1), ("a", "b"), active, chunk)
    prediction = np.ones((2, 128, 128), np.uint8)
    windows = list(active_windows(grid, active))
    tracemalloc.start()
    blender, writer = Blender(grid), MapWriter(store, grid)
    for window in windows:
        writer.add(*window, blender.add(*window, prediction))
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(windows) > 20
    assert peak < 10e6  # a row of windows across the slide would hold 70 MB


def test_chunks_are_written_as_zarr_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 4, (3, 100, 150), np.uint8) * 60
    pixels[:, :48, 64:128] = 0  # a chunk of nothing
    stores = [
        MapStore.create(tmp_path / name, Grid(150, 100, 0.5, 1, 1), ("a", "b", "c"), np.ones((2, 3), bool), (48, 64))
        for name in ("ours", "zarr")
    ]
    stores[1].array[:] = pixels
    for y in range(0, 100, 48):
        for x in range(0, 150, 64):
            stores[0].write(x, y, pixels[:, y : y + 48, x : x + 64])
    for x, y, width, height in ((32, 0, 64, 48), (0, 24, 64, 48), (0, 0, 128, 48), (128, 96, 64, 48), (0, 0, 64, 40)):
        with pytest.raises(ValueError, match="not a whole chunk"):
            stores[0].write(x, y, np.ones((3, height, width), np.uint8))
    assert digest(tmp_path / "ours") == digest(tmp_path / "zarr")
    assert len([path for path in (tmp_path / "ours/maps/c").rglob("*") if path.is_file()]) == 8
    np.testing.assert_array_equal(MapStore.open(tmp_path / "ours").read(0, 0, 150, 100), pixels)


def test_one_result_leaves_torch_as_it_was() -> None:
    import torch

    def state() -> tuple[Any, ...]:
        memory: Any = torch.utils.deterministic
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            torch.get_num_threads(),
            memory.fill_uninitialized_memory,
        )

    before = state()
    with pytest.raises(KeyError), one_result():
        assert state()[:3] == (True, False, 1)
        raise KeyError
    assert state() == before


def test_weights_are_loaded_on_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pipeline.models import weights

    folder = tmp_path / "model"
    fabricated.write_package(folder, "resunet", {"widths": [4, 6, 8]}, patch=96, overlap=24)
    load, threads = weights.load_network, []

    def noted(package: ModelPackage) -> torch.nn.Module:
        threads.append(torch.get_num_threads())
        return load(package)

    monkeypatch.setattr(weights, "load_network", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_result():
            choose_predictor(ModelPackage.load(folder), "cpu", 0, 2)
        assert threads == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_is_held_at_once_has_a_limit_whatever_the_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fabricated.write_package(tmp_path / "model", "resunet", {"widths": [4, 6, 8]}, patch=320, overlap=64)
    for folder, threads, most in ((tmp_path / "model", 2, 64), (tmp_path / "model", 20, 80), (BASELINE, 2, 8)):
        package = ModelPackage.load(folder)
        assert choose_predictor(package, "cpu", most, threads)[0].batch == most
        assert not caplog.messages
        assert choose_predictor(package, "cpu", 4096, threads)[0].batch == most
        assert caplog.messages == [f"batch 4096: no more than {most} windows are taken at once"]
        caplog.clear()


def test_one_result_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
from pipeline.prediction.predictors import choose_predictor, one_result
with one_result():
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
sys.exit("torch._inductor" in sys.modules and "the compiler was imported")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="for glibc on Linux")
def test_threads_share_what_others_have_freed() -> None:
    code = """
import sys, threading
from pathlib import Path
from pipeline.machine.allocator import share_heap
assert sys.argv[1] != "share" or share_heap()
turn, done = threading.Semaphore(1), threading.Event()
def work():
    with turn:
        pieces = [bytearray(100_000) for _ in range(300)]
        last = bytearray(100_000)  # above them, so that the heap cannot shrink
        del pieces
    done.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
    with turn:
        pass
with turn:
    done.set()
for thread in threads:
    thread.join()
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""

    def most(how: str) -> int:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", code, how], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert most("alone") - most("share") > 80_000  # kB


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="for glibc on Linux")
def test_freed_memory_is_kept() -> None:
    code = """
import resource, sys
import numpy as np
from pipeline.machine.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(5_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    faults = [
        int(subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, capture_output=True, check=True).stdout)
        for word in ("keep", "give back")
    ]
    assert faults[0] * 5 < faults[1]


class TestHematoxylin:
    def test_runs_without_torch(self, tmp_path: Path) -> None:
        inputs = write_inputs(tmp_path / "in", stained(200, 260, 2))
        code = f"""
import sys
from pipeline.cli import main
folder = {str(tmp_path)!r}
status = main(["infer", "--slide=s", "--tiles", folder + "/in/tiles.json", "--zarr", folder + "/in/tiles.zarr",
    "--stain", folder + "/in/stain.json", "--model", {str(BASELINE)!r}, "--threads=1",
    "--out", folder + "/maps.json", "--zarr-out", folder + "/maps.zarr"])
status = status or main(["instances", "--slide=s", "--maps", folder + "/maps.zarr", "--model", {str(BASELINE)!r},
    "--out", folder + "/nuclei.parquet"])
sys.exit(status or ("torch" in sys.modules and "torch was imported"))
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        again = run(inputs, BASELINE, tmp_path / "again", threads=3)[0]
        assert again == json.loads((tmp_path / "maps.json").read_text())["maps_sha256"]

    def test_batches_and_threads_change_nothing(self, tmp_path: Path) -> None:
        inputs = write_inputs(tmp_path / "in", stained(300, 420, 3))
        card = json.loads((BASELINE / "model.json").read_text())
        small = tmp_path / "model"
        small.mkdir()
        (small / "weights.safetensors").write_bytes((BASELINE / "weights.safetensors").read_bytes())
        (small / "model.json").write_text(json.dumps(card | {"patch": 96, "overlap": 24}))
        results = {run(inputs, small, tmp_path / str(b), batch=b, threads=t) for b, t in ((1, 1), (4, 2), (7, 1))}
        assert len(results) == 1
        maps = MapStore.open(tmp_path / "1" / "maps.zarr").read(0, 0, 420, 300)
        assert (maps[0] >= 128).mean() > 0.05
        assert not maps[:, :128, :128].any(), "outside the tissue"

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5))
    def test_values_depend_on_what_is_within_reach(self, seed: int, surround: int, peak: int) -> None:
        rules = HematoxylinRules(smooth=0.5, surround=surround, depth_smooth=0.5, peak=peak)
        random = np.random.default_rng(seed)
        rgb = stained(160, 160, seed)
        y, x = random.integers(0, 160, 2)
        other = rgb.copy()
        other[y, x] ^= 255
        changed = np.argwhere((hematoxylin_maps(rgb, rules) != hematoxylin_maps(other, rules)).any(axis=0))
        assert np.abs(changed - (y, x)).max(initial=0) <= rules.reach

    def test_finds_discs_and_divides_them(self) -> None:
        rows, columns = np.mgrid[:120, :200]
        density = np.zeros((120, 200, 2))
        density[..., 1] = 0.4
        for y, x in ((30, 40), (60, 120), (60, 138), (100, 180)):
            density[(rows - y) ** 2 + (columns - x) ** 2 <= 10**2, 0] = 1.5
        rgb = od_to_rgb(density @ RUIFROK)
        np.testing.assert_allclose(hematoxylin_density(rgb)[30, 40], 1.5, atol=0.05)
        rules = ModelPackage.load(BASELINE, verify=True).thresholds
        found = segment(hematoxylin_maps(rgb, HematoxylinRules()), rules)
        assert found.max() == 4
        np.testing.assert_allclose(np.bincount(found.ravel())[1:], 314, rtol=0.25)

    def test_plain_tissue_has_none(self) -> None:
        rgb = od_to_rgb(np.full((64, 64, 2), (0.2, 0.5)) @ RUIFROK)
        assert segment(hematoxylin_maps(rgb, HematoxylinRules()), InstanceRules()).max() == 0

    def test_wrong_rules(self) -> None:
        with pytest.raises(PipelineError, match="smooth must be positive, got 0"):
            build_method("hematoxylin", {"smooth": 0})
        with pytest.raises(ValueError, match="peak must be at least 1"):
            HematoxylinRules(peak=0)
        assert not needs_torch("hematoxylin")
        assert needs_torch("resunet")
