"""A slide that is bad at any stage is listed with that stage, in table and report; the others finish."""

from __future__ import annotations

import csv
import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from chain import STAGES, arguments, run_chain
from runs import write_slide

from pipeline import cli
from pipeline.batch.stage import manifest_failure, read_manifest
from pipeline.cohort import run_cohort
from pipeline.errors import SlideError
from pipeline.layout import RunLayout, SlideLayout
from pipeline.status import run_status, stage_manifests
from pipeline.stores.seal import SEAL

KERNELS = {
    "inspect": ("pipeline.slides.inspect", "probe"),
    "tissue": ("pipeline.tissue", "find_tissue"),
    "tiles": ("pipeline.tiles", "active_cells"),
    "stain": ("pipeline.stain", "sample_tissue"),
    "infer": ("pipeline.inference", "infer_slide"),
    "instances": ("pipeline.instances", "write_instances"),
    "measure": ("pipeline.measure", "write_measured"),
    "export": ("pipeline.export", "write_geojson"),
    "summary": ("pipeline.summary", "summarise"),
}
"""What does a stage's work."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, RunLayout]:
    """A finished slide and its run."""
    folder = tmp_path_factory.mktemp("good")
    write_slide(folder / "good.svs", seed=4)
    layout = RunLayout(folder / "results")
    run_chain(folder / "good.svs", layout.slide("good"), model)
    return folder / "good.svs", layout


@pytest.mark.parametrize("stage", ["stain", "infer", "instances", "measure", "summary"])
def test_store_without_its_seal_is_damaged(
    tmp_path: Path, good: tuple[Path, RunLayout], model: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, layout = good
    slide = SlideLayout(tmp_path / "slide")
    shutil.copytree(layout.slide("good").root, slide.root)
    store = slide.maps_zarr if stage == "instances" else slide.tiles_zarr
    (store / SEAL).unlink()
    assert cli.main(arguments(stage, path, slide, slide, model)) == 2
    assert f"{store} was damaged and has been removed: {SEAL} is missing" in capsys.readouterr().err
    assert not store.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_bad_at_a_stage(
    tmp_path: Path, good: tuple[Path, RunLayout], model: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layout = good
    bad = layout.slide(f"bad at {stage}")

    def fail(*_: Any, **__: Any) -> Any:
        raise SlideError(f"the data of {stage} <b>=1+1</b>", "look at it")

    before = STAGES[: STAGES.index(stage)]
    run_chain(path, bad, model, before)
    with monkeypatch.context() as patch:
        module, name = KERNELS[stage]
        patch.setattr(importlib.import_module(module), name, fail)
        assert cli.main(arguments(stage, path, bad, bad, model)) == 0
        # The other way to treat it: the job fails, and leaves nothing.
        alone = SlideLayout(tmp_path / "stopped")
        assert cli.main([*arguments(stage, path, bad, alone, model), "--on-bad-slide=stop"]) == 2
        assert list(alone.root.iterdir()) == []
    run_chain(path, bad, model, STAGES[STAGES.index(stage) + 1 :])

    failures = [manifest_failure(read_manifest(manifest)) for manifest in stage_manifests(bad)]
    assert failures[: len(before)] == [None] * len(before)
    assert {failure.stage for failure in failures[len(before) :] if failure is not None} == {stage}
    assert None not in failures[len(before) :]

    table = layout.slide_table
    table.write_text(f"slide\tpath\ngood\t{path}\nbad at {stage}\t{path}\n", encoding="utf-8")
    names = ("tsv", "parquet", "failed", "report", "manifest", "regions_tsv", "regions_parquet")
    out = {name: tmp_path / f"{name}.out" for name in names}
    record = run_cohort(layout.results, table, **out)
    assert (record["slides_ok"], record["slides_failed"], record["slides_waiting"]) == (1, 1, 0)
    with out["failed"].open(encoding="utf-8", newline="") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    assert row == {
        "slide": f"bad at {stage}",
        "stage": stage,
        "reason": f"the data of {stage} <b>=1+1</b>",
        "hint": "look at it",
    }
    report = out["report"].read_text(encoding="utf-8")
    assert f"bad at {stage}" in report
    assert f"the data of {stage} &lt;b&gt;=1+1&lt;/b&gt;" in report
    status = run_status(layout.results)
    assert (status.finished, status.failed, status.failures[0]["stage"]) == (1, 1, stage)
