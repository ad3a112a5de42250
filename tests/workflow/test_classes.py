"""A run with a classifier: nuclei that are there already are told apart, and nothing else is done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from runs import ROOT, read_json, run, write_slide

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]


def export(slide: Path, out: Path) -> None:
    """What QuPath would write when somebody had named the nuclei of a slide by their size, on its left half."""
    features = []
    table = pq.read_table(slide / "nuclei.parquet")
    half = table["centroid_x"].to_numpy().max() / 2
    middle = sorted(table["area_um2"].to_pylist())[len(table) // 2]
    for x, y, size in zip(*(table[name].to_pylist() for name in ("centroid_x", "centroid_y", "area_um2")), strict=True):
        if x < half:
            name = "small" if size < middle else "large <b>"
            properties = {"objectType": "annotation", "classification": {"name": name, "color": [200, 30, 60]}}
            point = {"type": "Point", "coordinates": [x, y]}
            features.append({"type": "Feature", "geometry": point, "properties": properties})
    out.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")


def test_classes_of_nuclei_that_are_there(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "ann").mkdir()
    for seed, name in enumerate(("a", "-b c")):
        write_slide(tmp_path / "in" / f"{name}.svs", seed=seed, size=(512, 448))
    (tmp_path / "in" / "bad.svs").write_text("no slide")
    config = {"slides": "in", "results": "r", "model": str(model)}
    first = run(tmp_path, config)
    assert first.code == 0, first.output
    for name in ("a", "-b c"):
        export(tmp_path / "r" / "slides" / name, tmp_path / "ann" / f"{name}.geojson")
    words = ["--results=r", "--annotations=ann", "--out=types.json"]
    subprocess.run(
        [sys.executable, "-m", "pipeline", "classifier", *words],
        cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    config["classifier"] = "types.json"
    plan = run(tmp_path, config, "-n")
    assert plan.counts == {"classify": 3, "settings": 1, "cohort": 1, "all": 1, "total": 6}, plan.output
    done = run(tmp_path, config)
    assert done.code == 0, done.output
    rows = {row["slide"]: row for row in pq.read_table(tmp_path / "r" / "cohort.parquet").to_pylist()}
    assert rows.keys() == {"a", "-b c"}
    for name, row in rows.items():
        slide = tmp_path / "r" / "slides" / name
        kinds = pq.read_table(slide / "classified.parquet")["class"].to_pylist()
        assert {*kinds} == {"small", "large <b>"}
        assert row["nuclei"] == len(kinds)
        assert row["nuclei:small"] == kinds.count("small")
        shown = read_json(slide / "classified.geojson.gz")["features"]
        assert [one["properties"]["classification"]["name"] for one in shown] == kinds
    report = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "Classes of -b c" in report
    assert "large &lt;b&gt;" in report
    assert "large <b>" not in report
    assert read_json(tmp_path / "r" / "manifest.json")["classifier"]["name"] == "types"
    assert read_json(tmp_path / "r" / "slides" / "bad" / "classify.json")["failure"]["stage"] == "inspect"
    assert run(tmp_path, config, "-n").nothing
    # A result that was deleted.
    away = (tmp_path / "r" / "slides" / "a" / "classified.parquet").rename(tmp_path / "away")
    plan = run(tmp_path, config, "-n")
    assert plan.counts == {"classify": 1, "cohort": 1, "all": 1, "total": 3}, plan.output
    away.rename(tmp_path / "r" / "slides" / "a" / "classified.parquet")
    # Another classifier under the same name and date.
    before = (tmp_path / "types.json").stat()
    text = (tmp_path / "types.json").read_text(encoding="utf-8").replace("small", "tiny!")
    (tmp_path / "types.json").write_text(text, encoding="utf-8")
    os.utime(tmp_path / "types.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(tmp_path, config, "-n").counts == {"classify": 3, "cohort": 1, "all": 1, "total": 5}
    # Without one, all is as it was.
    del config["classifier"]
    assert run(tmp_path, config, "-n").counts == {"settings": 1, "cohort": 1, "all": 1, "total": 3}
    # Regions are counted by the classes that there are.
    config |= {"classifier": "types.json", "slides": "slides.tsv"}
    (tmp_path / "slides.tsv").write_text("slide\tpath\tregions\na\tin/a.svs\tdrawn.geojson\n", encoding="utf-8")
    ring = [[0, 0], [256, 0], [256, 448], [0, 448], [0, 0]]
    (tmp_path / "drawn.geojson").write_text(
        json.dumps({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}})
    )
    counted = run(tmp_path, config)
    assert counted.code == 0, counted.output
    (whole,) = pq.read_table(tmp_path / "r" / "cohort.parquet").to_pylist()
    half, rest = pq.read_table(tmp_path / "r" / "regions.parquet").to_pylist()
    for name in ("tiny!", "large <b>"):
        assert half[f"nuclei:{name}"] + rest[f"nuclei:{name}"] == whole[f"nuclei:{name}"] > half[f"nuclei:{name}"] > 0
    del config["classifier"]
    plan = run(tmp_path, config, "-n")
    assert plan.counts == {"regions": 1, "settings": 1, "cohort": 1, "all": 1, "total": 4}, plan.output


def test_a_classifier_that_does_not_fit_ends_before_anything_runs(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=0, size=(128, 128))
    config = {"slides": "in", "results": "r", "model": str(model), "classifier": "types.json"}
    missing = run(tmp_path, config)
    assert missing.code != 0
    assert "error: classifier 'types.json' is missing (make one: python -m pipeline classifier)" in missing.output
    (tmp_path / "types.json").write_text(json.dumps({"kind": "nucleus classifier", "model": {"sha256": "0"}}))
    assert "error: classifier 'types.json' is damaged: 'features' (make it again" in run(tmp_path, config).output
    assert not (tmp_path / "r" / "slides").exists()
