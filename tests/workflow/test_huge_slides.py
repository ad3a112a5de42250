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
        done = run(tmp_path, settings)
        assert done.code == 0, done.output
        assert [done.counts.get(stage, 0) for stage in stages] == ([2, 2, 2] if parts else [0, 0, 0])
        folder = tmp_path / name / "slides" / "a"
        files[name] = [(folder / file).read_bytes() for file in ("nuclei.parquet", "nuclei.geojson.gz")]
        assert not list(folder.glob("parts/*")), "what parts leave is temporary"
        if parts:  # as when a run was killed while it removed them
            (folder / "parts" / "infer-1-of-2.zarr").mkdir(parents=True)
        assert run(tmp_path, settings).nothing
        assert not list(folder.glob("parts/*"))
    assert files["whole"] == files["parts"]
    assert len(files["whole"][0]) > 5000


def test_size_counts_all_files_of_a_slide(tmp_path: Path, toy_model: Path) -> None:
    names = ("a.mrxs", "b.vms", "c/1.dcm", "d/1.dcm", "d/2.dcm", "a/Data0000.dat", "b(1,0).jpg", "c/2.dcm", "d/3.dcm")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with (tmp_path / name).open("wb") as file:
            file.truncate(10 if name in names[:5] else 3 * 10**9)
    # Two slides in folder d: whose is the large file?
    rows = [f"{name.replace('/', ' ')}\t{name}" for name in names[:5]]
    (tmp_path / "slides.tsv").write_text("\n".join(["slide\tpath", *rows]))
    config = {"slides": "slides.tsv", "results": "r", "model": str(toy_model), "parts": {"from_gb": 2, "count": 2}}
    done = run(tmp_path, config, "-n")
    assert done.counts["tiles"] == 5
    assert done.counts["tiles_part"] == 3 * 2, done.output
