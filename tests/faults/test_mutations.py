"""Damaged slides: none crashes or hangs a run or takes its memory, and no wrong result passes for a good one."""

from __future__ import annotations

import json
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
from runs import read_json, read_tsv, run

from pipeline.slides.inspect import run_inspect
from pipeline.stage import manifest_failure
from pipeline.tiles import TileStore, run_tiles
from pipeline.tissue import run_tissue

MINUTES = 2.0
"""Time of a stage's job; a stage over a slide of this size takes a second."""

PEAK_MB = 1500
"""Most memory that a stage may take for a slide of this size, of which some 250 MB are libraries."""


def stages(path: Path, out: Path, model: Path) -> tuple[dict[str, Any], np.ndarray | None]:
    """The stages that read a slide: the last manifest, and the pixels where it went well."""
    names = {name: out / f"{name}.json" for name in ("slide", "tissue", "tiles")}
    run_inspect("s", path, names["slide"], minutes=MINUTES)
    geojson, png = out / "tissue.geojson", out / "tissue.png"
    run_tissue("s", names["slide"], names["tissue"], geojson, png, minutes=MINUTES)
    record = run_tiles(
        "s", names["slide"], names["tissue"], geojson, model, names["tiles"], out / "tiles.zarr", workers=2,
        minutes=MINUTES,
    )  # fmt: skip
    if record["status"] != "ok":
        return record, None
    store = TileStore.open(out / "tiles.zarr")
    return record, store.read(0, 0, store.grid.width, store.grid.height)


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
        return "another size"
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
        wholes[kind] = (path.read_bytes(), pixels)
    for number in range(count):
        kind = list(WRITERS)[number % len(WRITERS)]
        data, whole = wholes[kind]
        damage, content = mutated(data, rng)
        path, out = folder / f"{number}.{kind}", folder / f"out-{number}"
        path.write_bytes(content)
        start = time.monotonic()
        record, pixels = stages(path, out, model)
        slowest = max(slowest, time.monotonic() - start)
        verdict = judge(record, pixels, whole)
        table[kind, damage, verdict] += 1
        if record["status"] == "failed":
            stage_of[record["failure"]["stage"]] += 1
            reasons[record["failure"]["reason"][:60]] += 1
        if verdict in ("other pixels", "another size"):
            share = float((pixels != whole).any(axis=2).mean()) if pixels.shape == whole.shape else None  # type: ignore[union-attr]
            doubtful.append((path.name, damage, verdict, share))
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


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "count", [16, pytest.param(int(os.environ.get("FAULTS_SLIDES", "300")), marks=pytest.mark.faults_long)]
)
def test_damaged_slides(tmp_path: Path, model: Path, count: int) -> None:
    found = alone(campaign, tmp_path, model, count, int(os.environ.get("FAULTS_SEED", "0")))
    report(found)
    assert sum(found["table"].values()) == count
    assert found["peak_mb"] < PEAK_MB
    assert found["slowest"] < 3 * 60 * MINUTES


@pytest.mark.workflow
@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_a_sample_goes_through_the_whole_run(tmp_path: Path, model: Path) -> None:
    rng = random.Random(7)
    (tmp_path / "in").mkdir()
    for number in range(8):
        kind = list(WRITERS)[number % len(WRITERS)]
        _, content = mutated(write_whole(tmp_path, kind).read_bytes(), rng)
        (tmp_path / "in" / f"{number}.{kind}").write_bytes(content)
    done = run(tmp_path, {"slides": "in", "results": "out", "model": str(model), "mpp": MPP})
    assert done.code == 0, done.output
    failed = {row["slide"] for row in read_tsv(tmp_path / "out" / "failed.tsv")}
    good = {row["slide"] for row in read_tsv(tmp_path / "out" / "cohort.tsv")}
    assert len(failed | good) == 8
    assert not failed & good
    for number in range(8):
        status = read_json(tmp_path / "out" / "slides" / str(number) / "metrics.json")["status"]
        assert (status == "ok") == (str(number) in good)
    print(f"whole runs: {len(failed)} slides failed, {len(good)} finished, exit code {done.code}")
