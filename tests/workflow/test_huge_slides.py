"""Huge slides in parts, as the workflow takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import run, write_slide

pytestmark = pytest.mark.workflow


def test_a_slide_in_parts_has_the_nuclei_of_the_whole(tmp_path: Path, model: Path) -> None:
    (tmp_path / "slides").mkdir()
    write_slide(tmp_path / "slides" / "a.svs", 1)
    config = {"slides": "slides", "model": str(model), "instances": {"block": 128, "keep": True}}
    files = {}
    for name, parts in (("whole", {}), ("parts", {"parts": {"from_gb": 0, "count": 2}})):
        settings = {**config, **parts, "results": name}
        stages = ("tiles_part", "infer_part", "instances_part")
        planned = run(tmp_path, settings, "--dry-run").counts
        assert [planned.get(stage, 0) for stage in stages] == ([2, 2, 2] if parts else [0, 0, 0])
        done = run(tmp_path, settings)
        assert done.code == 0, done.output
        folder = tmp_path / name / "slides" / "a"
        files[name] = [(folder / file).read_bytes() for file in ("nuclei.parquet", "nuclei.geojson.gz")]
        assert not list(folder.glob("parts/*")), "what parts leave is temporary"
        assert run(tmp_path, settings).nothing
    assert files["whole"] == files["parts"]
    assert len(files["whole"][0]) > 5000
