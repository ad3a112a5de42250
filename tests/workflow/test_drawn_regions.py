"""A run with regions in its slide table: they are counted in the nuclei that are there, nothing else is done again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from runs import ROOT, read_json, read_tsv, run, write_slide

from pipeline.batch.slide_table import FILE_COLUMNS

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]

NAMES = ("a", "-b c", "plain")


def write_table(folder: Path, regions: dict[str, str], column: bool = True) -> None:
    lines = ["slide\tpath\tgroup" + "\tregions" * column]
    lines += [f"{name}\tin/{name}.svs\tG" + f"\t{regions.get(name, '')}" * column for name in (*NAMES, "bad")]
    (folder / "slides.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_regions(path: Path, *names: str) -> None:
    """Boxes side by side, of which the first begins at the slide's corner."""
    features: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        x = 200 * number
        ring = [[x, 0], [x + 200, 0], [x + 200, 400], [x, 400], [x, 0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        properties = {"objectType": "annotation", "name": name}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def digests(results: Path) -> dict[str, str]:
    """SHA-256 of what a run has made of its slides but for regions."""
    found = sorted(path for path in (results / "slides").glob("*/*") if path.is_file() and "regions" not in path.name)
    return {str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_regions_come_change_and_go(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(NAMES):
        write_slide(tmp_path / "in" / f"{name}.svs", seed=seed, size=(512, 448))
    (tmp_path / "in" / "bad.svs").write_text("no slide")
    for name in ("a", "-b c", "bad"):
        write_regions(tmp_path / f"{name}.geojson", "Tumour <b>", "=Stroma")
    config = {"slides": "slides.tsv", "results": "r", "model": str(model)}
    results = tmp_path / "r"
    write_table(tmp_path, {}, column=False)
    first = run(tmp_path, config)
    assert first.code == 0, first.output
    assert not list(results.rglob("regions*"))
    before, table = digests(results), (results / "cohort.parquet").read_bytes()

    # Two good slides, and one that failed before.
    write_table(tmp_path, {name: f"{name}.geojson" for name in ("a", "-b c", "bad")})
    plan = run(tmp_path, config, "-n")
    assert plan.counts == {"regions": 3, "slide_table": 1, "cohort": 1, "all": 1, "total": 6}, plan.output
    done = run(tmp_path, config)
    assert done.code == 0, done.output
    assert digests(results) == before
    assert (results / "cohort.parquet").read_bytes() == table
    found = pq.read_table(results / "regions.parquet").to_pylist()
    assert [(row["slide"], row["region"]) for row in found] == [
        (name, region) for name in ("a", "-b c") for region in ("Tumour <b>", "=Stroma", "(elsewhere)")
    ]
    assert [row["region"] for row in read_tsv(results / "regions.tsv")][:2] == ["Tumour <b>", "'=Stroma"]
    counts = {row["slide"]: row["nuclei"] for row in pq.read_table(results / "cohort.parquet").to_pylist()}
    for name in ("a", "-b c"):
        own = [row for row in found if row["slide"] == name]
        assert sum(row["nuclei"] for row in own) == counts[name] > 0
        assert own[0]["area_mm2"] == pytest.approx(200 * 400 * 0.25e-6)
        assert own[0]["group"] == "G"
        assert own[0]["nuclei"] == own[0]["nuclei:Nucleus"]
    report = (results / "report.html").read_text(encoding="utf-8")
    assert "Regions of -b c" in report
    assert "Regions of plain" not in report
    assert "Tumour &lt;b&gt;" in report
    assert "Tumour <b>" not in report
    assert {*read_json(results / "manifest.json")["outputs"]} >= {"regions.tsv", "regions.parquet"}
    assert read_json(results / "slides" / "bad" / "regions.json")["failure"]["stage"] == "inspect"
    assert not (results / "slides" / "plain" / "regions.json").exists()
    assert run(tmp_path, config, "-n").nothing

    # Others in the same file with the same date.
    path = tmp_path / "a.geojson"
    stat = path.stat()
    write_regions(path, "Margin", "=Stroma")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(tmp_path, config, "-n").counts == {"regions": 1, "cohort": 1, "all": 1, "total": 3}
    # A file that is none fails its slide, and says so; mended, the slide is there again.
    path.write_text("nonsense")
    bad = run(tmp_path, config)
    assert bad.code == 0, bad.output
    assert "failed: a at regions: regions" in bad.output
    failed = {row["slide"]: row for row in read_tsv(results / "failed.tsv")}
    assert failed["a"]["stage"] == "regions"
    assert [row["slide"] for row in read_tsv(results / "cohort.tsv")] == ["'-b c", "plain"]
    assert {row["slide"] for row in read_tsv(results / "regions.tsv")} == {"'-b c"}
    path.unlink()
    missing = run(tmp_path, config)
    assert missing.code == 0, missing.output
    assert "does not exist (check the path in the slide table)" in missing.output
    write_regions(path, "Margin")
    plan = run(tmp_path, config, "-n")
    assert plan.counts == {"regions": 1, "cohort": 1, "all": 1, "total": 3}, plan.output
    mended = run(tmp_path, config)
    assert "4 slides: 3 finished, 1 failed, 0 to go" in mended.output
    assert read_tsv(results / "regions.tsv")[0]["region"] == "Margin"

    # A slide is not finished whose regions have changed since.
    write_regions(path, "Other")
    words = [sys.executable, "-m", "pipeline", "status", "r", "--report"]
    subprocess.run(words, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert {row["slide"] for row in read_tsv(results / "so-far" / "regions.tsv")} == {"'-b c"}
    assert read_json(results / "so-far" / "manifest.json")["slides_waiting"] == 1

    # Without regions, all is as it was.
    write_table(tmp_path, {}, column=False)
    plan = run(tmp_path, config, "-n")
    assert plan.counts == {"slide_table": 1, "cohort": 1, "all": 1, "total": 3}, plan.output
    assert run(tmp_path, config).code == 0
    assert digests(results) == before
    assert (results / "cohort.parquet").read_bytes() == table
    assert not (results / "regions.tsv").exists()
    assert not (results / "regions.parquet").exists()
    assert "Regions of" not in (results / "report.html").read_text(encoding="utf-8")


def test_the_table_of_the_run_names_each_file(tmp_path: Path, toy_model: Path) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=0, size=(128, 128))
    (tmp_path / "in" / "slides.csv").write_text("slide,path,regions\na,a.svs,drawn/a.geojson\n", encoding="utf-8")
    config = {"slides": "in/slides.csv", "results": "r", "model": str(toy_model)}
    assert run(tmp_path, config, "r/slides.tsv").code == 0
    (row,) = read_tsv(tmp_path / "r" / "slides.tsv")
    assert {column: row[column] for column in FILE_COLUMNS} == {
        "tissue": "", "truth": "", "regions": str(tmp_path / "in" / "drawn" / "a.geojson")
    }  # fmt: skip


def test_drawn_files_count_from_where_the_nuclei_for_qupath_do(tmp_path: Path, toy_model: Path) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=0, size=(128, 128))
    (tmp_path / "slides.csv").write_text("slide,path,tissue,truth,regions\na,in/a.svs,t.geojson,k.geojson,r.geojson\n")
    config = {"slides": "slides.csv", "results": "r", "model": str(toy_model)}
    for origin, expected in (("slide", 0), ("bounds", 3)):
        plan = run(tmp_path, config | {"export": {"origin": origin}}, "-n", "-p")
        assert plan.code == 0, plan.output
        told = [line for line in plan.output.splitlines() if "geojson --origin=bounds" in line]
        assert len(told) == expected, plan.output
