"""Damaged slides: none crashes or hangs a run or takes its memory, and no wrong result passes for a good one."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import alone
from mutate import MPP, MUTATIONS, WRITERS, mutated, write_whole
from runs import ROOT, read_json, read_tsv, run

from pipeline.batch.stage import manifest_failure
from pipeline.slides.inspect import run_inspect
from pipeline.stores.tile_store import TileStore
from pipeline.summary import warnings_of
from pipeline.tiles import run_tiles
from pipeline.tissue import run_tissue

MINUTES = 2.0
"""Time of a stage's job; a stage over a slide of this size takes a second."""

PEAK_MB = 500
"""Most memory that a stage may take for a slide of this size, of which some 150 MB are libraries."""

SILENT = ("other pixels", "another size")
"""Verdicts over wrong results that pass for good ones."""

PYRAMIDS = ("svs", "tif", "ome.tif")
"""Formats with levels that can be compared."""

FEW, FAINT = 0.001, 24.0
"""Share of a slide's pixels, and grey levels of the mean of any square of 16 pixels: what is wrong of a slide with a
pyramid, and not warned of, exceeds one of them at most."""

SHORT, SHORT_SILENT = 40, {"svs": 1, "tif": 1, "ome.tif": 1, "dcm": 2}
"""The trials of `make test`, always the same ones, and how many wrong results among them pass for good ones."""

STATED = "| format | failed, listed |"
"""Head of the table in docs/reliability.md, which is of 300 trials from the seed 0."""


def most_silent(kind: str, count: int, seed: int) -> int:
    """How many of so many damaged slides of a format may be taken for good, as docs/reliability.md says.

    For other trials than those that it tells of: twice its share, and two standard deviations.
    """
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").split(STATED)[1]
    name = {"svs": "SVS", "tif": "tiled TIFF", "ome.tif": "OME-TIFF", "dcm": "DICOM"}[kind]
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    numbers = [int(cell) for cell in row.split("|")[2:-1]]
    silent, total = sum(numbers[-2:]), sum(numbers)
    if (count, seed) == (total, 0):
        return silent
    share = 2 * silent / total
    return math.floor(count * share + 2 * math.sqrt(count * share * (1 - share)))


def moved(pixels: np.ndarray, whole: np.ndarray) -> float:
    """Grey levels by which the mean of a square of 16 pixels differs at most."""
    difference = pixels.astype(np.float32) - whole
    height, width = (side // 16 * 16 for side in difference.shape[:2])
    squares = difference[:height, :width].reshape(height // 16, 16, width // 16, 16, 3)
    return float(np.abs(squares.mean(axis=(1, 3))).max(initial=0))


def stages(path: Path, out: Path, model: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """The stages that read a slide: the last manifest, with the warnings of all, and the pixels where it went well."""
    names = {name: out / f"{name}.json" for name in ("slide", "tissue", "tiles")}
    run_inspect("s", path, names["slide"], minutes=MINUTES)
    geojson, png = out / "tissue.geojson", out / "tissue.png"
    tissue = run_tissue("s", names["slide"], names["tissue"], geojson, png, minutes=MINUTES)
    record = run_tiles(
        "s", names["slide"], names["tissue"], geojson, model, names["tiles"], out / "tiles.zarr", workers=2,
        minutes=MINUTES,
    )  # fmt: skip
    if record["status"] != "ok":
        return record, None
    store = TileStore.open(out / "tiles.zarr")
    told = warnings_of({"tissue": tissue, "tiles": record})
    return record | {"warnings": told}, store.read(0, 0, store.grid.width, store.grid.height)


def judge(record: dict[str, Any], pixels: np.ndarray | None, whole: np.ndarray) -> str:
    """What became of a damaged slide, against the pixels of the whole one."""
    failure = manifest_failure(record)
    if failure is not None:
        assert "\n" not in failure.reason
        assert len(failure.reason) > 8
        assert "Traceback" not in failure.reason
        return "failed"
    assert pixels is not None
    if pixels.shape != whole.shape:
        return "warned of" if record["warnings"] else "another size"
    different = (pixels != whole).any(axis=2)
    if not different.any():
        return "the same pixels"
    for x, y, w, h in record["unreadable"]:
        different[y : y + h, x : x + w] = False
    if not different.any():
        return "tiles listed"
    return "warned of" if record["warnings"] else "other pixels"


def campaign(folder: Path, model: Path, count: int, seed: int) -> dict[str, Any]:
    """Try `count` damaged slides."""
    rng = random.Random(seed)
    table: Counter[tuple[str, str, str]] = Counter()
    stage_of: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    slowest, doubtful = 0.0, []
    wholes = {}
    for kind in WRITERS:
        path = write_whole(folder, kind)
        out = folder / f"out-{kind}"
        record, pixels = stages(path, out, model)
        assert pixels is not None, record
        assert record["warnings"] == [], record  # so that warnings mean damage
        wholes[kind] = (path.read_bytes(), pixels)
    for number in range(count):
        kind = list(WRITERS)[number % len(WRITERS)]
        data, whole = wholes[kind]
        damage, content = mutated(data, rng)
        alone_in = folder / str(number)  # OpenSlide looks for more of a DICOM series beside a file
        alone_in.mkdir()
        path, out = alone_in / f"{number}.{kind}", folder / f"out-{number}"
        path.write_bytes(content)
        start = time.monotonic()
        record, pixels = stages(path, out, model)
        slowest = max(slowest, time.monotonic() - start)
        verdict = judge(record, pixels, whole)
        table[kind, damage, verdict] += 1
        if record["status"] == "failed":
            stage_of[record["failure"]["stage"]] += 1
            reasons[record["failure"]["reason"][:60]] += 1
        if verdict in SILENT:
            assert pixels is not None
            alike = pixels.shape == whole.shape
            share = float((pixels != whole).any(axis=2).mean()) if alike else None
            doubtful.append((kind, path.name, damage, verdict, share, moved(pixels, whole) if alike else None))
        else:
            path.unlink()
    return {
        "table": table,
        "stages": stage_of,
        "reasons": reasons,
        "slowest": slowest,
        "doubtful": doubtful,
        "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000,
    }


def report(found: dict[str, Any]) -> None:
    verdicts = sorted({verdict for _, _, verdict in found["table"]})
    for group, index in (("format", 0), ("damage", 1)):
        print(f"{group:28}" + "".join(f"{verdict:>18}" for verdict in verdicts))
        for name in WRITERS if index == 0 else MUTATIONS:
            row = [sum(n for key, n in found["table"].items() if key[index] == name and key[2] == v) for v in verdicts]
            print(f"{name:28}" + "".join(f"{n:18}" for n in row))
    print("failed at:", dict(found["stages"]))
    for reason, count in found["reasons"].most_common(40):
        print(f"{count:5} {reason}")
    print(f"slowest slide {found['slowest']:.1f} s, peak memory of a stage {found['peak_mb']:.0f} MB")
    print("doubtful:", json.dumps(found["doubtful"]))


def check(found: dict[str, Any], count: int, most: dict[str, int]) -> None:
    """What must hold whatever the damage."""
    report(found)
    assert sum(found["table"].values()) == count
    assert found["peak_mb"] < PEAK_MB
    assert found["slowest"] < 3 * 60 * MINUTES
    silent = {kind: sum(n for (k, _, v), n in found["table"].items() if k == kind and v in SILENT) for kind in WRITERS}
    assert all(silent[kind] <= most[kind] for kind in WRITERS), (silent, most)
    for kind, name, damage, verdict, share, grey in found["doubtful"]:
        if kind in PYRAMIDS and verdict == "other pixels":
            assert share <= FEW or grey <= FAINT, (name, damage, share, grey)


@pytest.mark.timeout(1800)
def test_damaged_slides(tmp_path: Path, model: Path) -> None:
    check(alone(campaign, tmp_path, model, SHORT, 0), SHORT, SHORT_SILENT)


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_many_damaged_slides(tmp_path: Path, model: Path) -> None:
    count, seed = int(os.environ.get("FAULTS_SLIDES", "300")), int(os.environ.get("FAULTS_SEED", "0"))
    found = alone(campaign, tmp_path, model, count, seed)
    check(found, count, {kind: most_silent(kind, -(-count // len(WRITERS)), seed) for kind in WRITERS})


def test_wrong_results_would_be_counted() -> None:
    whole = np.full((64, 64, 3), 200, np.uint8)
    other = whole.copy()
    other[16:32, 16:32] -= 40
    good = {"status": "ok", "failure": None, "unreadable": [], "warnings": []}
    assert judge(good, whole, whole) == "the same pixels"
    assert judge(good, other, whole) == "other pixels"
    assert judge(good, other[1:], whole) == "another size"
    for pixels in (other, other[1:]):
        assert judge(good | {"warnings": ["levels differ"]}, pixels, whole) == "warned of"
    assert judge(good | {"unreadable": [(16, 16, 16, 16)]}, other, whole) == "tiles listed"
    assert moved(other, whole) == 40
    found = {
        "table": Counter({("svs", "block", "other pixels"): 1}), "stages": {}, "reasons": Counter(), "slowest": 1.0,
        "peak_mb": 100.0, "doubtful": [("svs", "0.svs", "block", "other pixels", 0.0625, 40.0)],
    }  # fmt: skip
    with pytest.raises(AssertionError, match=r"0\.svs"):
        check(found, 1, dict.fromkeys(WRITERS, 1))
    found["doubtful"] = []
    check(found, 1, dict.fromkeys(WRITERS, 1))
    with pytest.raises(AssertionError, match="'svs': 1"):
        check(found, 1, dict.fromkeys(WRITERS, 0))
    assert [most_silent(kind, 75, 0) for kind in WRITERS] == [4, 5, 3, 4]
    assert [most_silent(kind, 75, 1) for kind in WRITERS] == [13, 15, 10, 13]


@pytest.mark.workflow
@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_sample_goes_through_the_whole_run(tmp_path: Path, model: Path) -> None:
    rng = random.Random(7)
    (tmp_path / "in").mkdir()
    rows = ["slide\tpath"]  # in a folder, the two of a DICOM series would be one slide
    for number in range(8):
        kind = list(WRITERS)[number % len(WRITERS)]
        _, content = mutated(write_whole(tmp_path, kind).read_bytes(), rng)
        (tmp_path / "in" / f"{number}.{kind}").write_bytes(content)
        rows.append(f"{number}\tin/{number}.{kind}")
    (tmp_path / "slides.tsv").write_text("\n".join(rows))
    done = run(tmp_path, {"slides": "slides.tsv", "results": "out", "model": str(model), "mpp": MPP})
    assert done.code == 0, done.output
    failed = {row["slide"] for row in read_tsv(tmp_path / "out" / "failed.tsv")}
    good = {row["slide"] for row in read_tsv(tmp_path / "out" / "cohort.tsv")}
    assert len(failed | good) == 8
    assert not failed & good
    for number in range(8):
        status = read_json(tmp_path / "out" / "slides" / str(number) / "metrics.json")["status"]
        assert (status == "ok") == (str(number) in good)
    print(f"whole runs: {len(failed)} slides failed, {len(good)} finished, exit code {done.code}")
