"""How far a run has come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline import cli, status, testing
from pipeline.batch.lock import RUN_LOCK
from pipeline.errors import PipelineError
from pipeline.layout import STAGES, RunLayout

NAMES = ("done 1", "done 2", "under way", "bad", "new", "stale")
START = 1_000_000.0
ROOT = Path(__file__).parents[2]


def finish(results: Path, slide: str, stages: int, start: float) -> None:
    """Write the manifests of a slide's first stages, a minute apart."""
    paths = RunLayout(results).slide(slide)
    paths.root.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(status.stage_manifests(paths)[:stages]):
        path.write_text(json.dumps({"status": "ok", "failure": None}))
        os.utime(path, (start + 60 * number,) * 2)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = [f"{name}\t/data/{name}.svs" for name in NAMES]
    (tmp_path / "slides.tsv").write_text("\n".join(["slide\tpath", *rows]) + "\n", encoding="utf-8")
    finish(tmp_path, "done 1", len(STAGES), START)
    finish(tmp_path, "done 2", len(STAGES), START + 1800)
    finish(tmp_path, "under way", 4, START + 1800)
    testing.write_failed_slide(tmp_path, "bad", "inspect", "file is empty", "copy it again")
    # Its later stages are of a run before the slide was replaced.
    finish(tmp_path, "stale", len(STAGES), START)
    os.utime(RunLayout(tmp_path).slide("stale").inspect, (START + 5000,) * 2)
    return tmp_path


def test_slides_are_counted_by_stage(results: Path) -> None:
    found = status.run_status(results, now=START + 6000)
    assert (found.slides, found.finished, found.failed) == (6, 2, 1)
    assert found.stages == {"waiting": 1, "inspect": 1, "stain": 1}
    assert [item["slide"] for item in found.failures] == ["bad"]
    assert found.failures[0]["reason"] == "file is empty"


def test_folders_of_slides_that_the_run_no_longer_has_are_named(results: Path) -> None:
    assert "no longer" not in status.describe(status.run_status(results))
    for name in ("e", "c", "d", "a~7Bb~7D"):
        (results / "slides" / name).mkdir()
    text = status.describe(status.run_status(results))
    assert text.splitlines()[-1] == "no longer in the run, but still in its slides/: a~7Bb~7D, c, d and 1 more"


@pytest.mark.parametrize(("form", "name"), [("", "ü \\u7ec6"), ("--json", "\\u00fc \\u7ec6")])
def test_names_that_a_terminal_cannot_show(results: Path, form: str, name: str) -> None:
    (results / "slides" / "ü 细").mkdir()
    command = [sys.executable, "-m", "pipeline", "status", str(results), *filter(None, [form])]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONIOENCODING": "latin-1"}, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert name in done.stdout.decode("latin-1")


def test_rate_is_that_of_the_finished_slides(results: Path) -> None:
    found = status.run_status(results, now=START + 6000)
    assert found.per_hour == pytest.approx(2)
    assert found.eta_seconds == pytest.approx(3 * 1800)
    assert "rate: 2 slides/h" in status.describe(found)
    assert "rate: 2,520 slides/h" in status.describe(replace(found, per_hour=2520.4))


def test_the_rate_is_that_of_the_last_run(results: Path) -> None:
    # Broken off on Friday, gone on with on Monday.
    finish(results, "stale", len(STAGES), START + 3 * 86400)
    finish(results, "under way", len(STAGES), START + 3 * 86400 + 360)
    begun = datetime.fromtimestamp(START + 3 * 86400 - 60, UTC)
    (results / RUN_LOCK).write_text(f"process 1 on here since {begun.isoformat()}\n")
    assert status.run_status(results).per_hour == pytest.approx(10)


def test_text_and_json(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(results)]) == 0
    text = capsys.readouterr().out
    assert "6 slides: 2 finished, 1 failed, 3 to go" in text
    assert "under way: 1 waiting, 1 after inspect, 1 after stain" in text
    assert "failed: bad at inspect: file is empty (copy it again)" in text
    assert cli.main(["status", str(results), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] == 2


def test_results_is_the_folder_where_none_is_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "results").symlink_to(results)
    monkeypatch.chdir(results)
    assert cli.main(["status"]) == 0
    assert "6 slides: 2 finished" in capsys.readouterr().out


def test_run_without_a_slide_table(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"slides\.tsv"):
        status.run_status(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_bytes(b"")
    found = status.run_status(tmp_path, str(tmp_path / "in"))
    assert (found.slides, found.stages, found.per_hour, found.eta_seconds) == (1, {"waiting": 1}, None, None)


def test_nothing_is_left_of_a_finished_run(tmp_path: Path) -> None:
    (tmp_path / "slides.tsv").write_text("slide\tpath\na\t/data/a.svs\n", encoding="utf-8")
    finish(tmp_path, "a", len(STAGES), START)
    text = status.describe(status.run_status(tmp_path, now=START + 600))
    assert text == "1 slide: 1 finished, 0 failed, 0 to go"


@pytest.mark.parametrize(
    ("settings", "stage"), [('{"classifier": "types.json"}', "classify"), ('{"export": {"labels": true}}', "labels")]
)
def test_a_slide_that_waits_for_what_the_settings_ask_for_is_not_finished(
    tmp_path: Path, settings: str, stage: str
) -> None:
    (tmp_path / "slides.tsv").write_text("slide\tpath\na\t/data/a.svs\n", encoding="utf-8")
    (tmp_path / "settings.json").write_text(settings)
    finish(tmp_path, "a", len(STAGES), START)
    found = status.run_status(tmp_path, now=START + 600)
    assert (found.finished, found.stages) == (0, {"summary": 1})
    getattr(RunLayout(tmp_path).slide("a"), stage).write_text("{}")
    assert status.run_status(tmp_path, now=START + 600).finished == 1
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(PipelineError, match="is damaged"):
        status.run_status(tmp_path)


def write_report(results: Path, when: float) -> str:
    report = RunLayout(results).report
    report.write_text("report")
    os.utime(report, (when,) * 2)
    return f"report: {report}"


def test_a_run_ends_with_what_there_is_to_do(results: Path) -> None:
    told = write_report(results, START + 9000)
    text = status.closing_words(results, failed=True)
    assert text.startswith("6 slides: 2 finished, 1 failed, 3 to go\n")
    assert "run the same command again to continue" in text
    assert told not in text
    # Some targets alone were asked for, or all is there but a manifest that nothing needs.
    text = status.closing_words(results, failed=False)
    assert text.startswith("6 slides: 2 finished, 1 failed, 3 to go\n")
    assert "not finished" not in text


def test_a_finished_run_ends_with_its_failures_and_its_report(tmp_path: Path) -> None:
    names = [f"bad {number}" for number in range(status.FAILURES_TOLD + 2)]
    rows = [f"{name}\t/data/{name}.svs" for name in ("good", *names)]
    (tmp_path / "slides.tsv").write_text("\n".join(["slide\tpath", *rows]) + "\n", encoding="utf-8")
    finish(tmp_path, "good", len(STAGES), START)
    for name in names:
        testing.write_failed_slide(tmp_path, name, "inspect", "file is empty", "copy it again")
    told = write_report(tmp_path, 2e9)
    lines = status.closing_words(tmp_path, failed=False).splitlines()
    assert lines[0] == "13 slides: 1 finished, 12 failed, 0 to go"
    assert lines[1 + status.FAILURES_TOLD] == "failed: 2 more"
    assert lines[-2:] == [f"all that failed: {tmp_path / 'failed.tsv'}", told]


def test_a_report_older_than_a_slide_is_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "slides.tsv").write_text("slide\tpath\na\t/data/a.svs\n", encoding="utf-8")
    finish(tmp_path, "a", len(STAGES), START)
    told = write_report(tmp_path, START + 60)
    assert told not in status.closing_words(tmp_path, failed=False)
    write_report(tmp_path, START + 600)
    assert status.closing_words(tmp_path, failed=False) == f"1 slide: 1 finished, 0 failed, 0 to go\n{told}"


def test_report_of_what_is_finished(tmp_path: Path) -> None:
    paths = [testing.write_slide(tmp_path, name, count=20) for name in ("whole", "half")]
    rows = [f"{name}\t/data/{name}.svs" for name in ("whole", "half", "new")]
    (tmp_path / "slides.tsv").write_text("\n".join(["slide\tpath", *rows]) + "\n", encoding="utf-8")
    from pipeline import summary

    summary.run_summary(
        "whole",
        {name: getattr(paths[0], name) for name in summary.MANIFESTS},
        nuclei=paths[0].nuclei,
        tissue_geojson=paths[0].tissue_geojson,
        tiles_zarr=paths[0].tiles_zarr,
        out=paths[0].metrics,
        png=paths[0].overview,
    )
    out = status.write_so_far(tmp_path)
    assert [row.split("\t")[0] for row in (out / "cohort.tsv").read_text().splitlines()] == ["slide", "whole"]
    assert (out / "failed.tsv").read_text().splitlines() == ["slide\tstage\treason\thint"]
    assert "2 not finished yet" in (out / "report.html").read_text()
    assert json.loads((out / "manifest.json").read_text())["slides_waiting"] == 2
    assert not RunLayout(tmp_path).cohort_tsv.exists()
    # It is processed again, with other settings: what is there is not of this run.
    os.utime(paths[0].inspect, (paths[0].metrics.stat().st_mtime + 60,) * 2)
    status.write_so_far(tmp_path)
    assert (out / "cohort.tsv").read_text().count("\n") == 1
    assert json.loads((out / "manifest.json").read_text())["slides_waiting"] == 3


def test_a_slide_that_waits_for_its_regions_or_whose_regions_are_bad(tmp_path: Path) -> None:
    (tmp_path / "slides.tsv").write_text("slide\tpath\tregions\na\t/data/a.svs\t/data/a.geojson\n", encoding="utf-8")
    finish(tmp_path, "a", len(STAGES), START)
    found = status.run_status(tmp_path, now=START + 600)
    assert (found.finished, found.stages) == (0, {"summary": 1})
    manifest = RunLayout(tmp_path).slide("a").regions
    manifest.write_text('{"status": "ok"}')
    assert status.run_status(tmp_path, now=START + 600).finished == 1
    failure = {"stage": "regions", "reason": "no JSON", "hint": ""}
    manifest.write_text(json.dumps({"status": "failed", "failure": failure}))
    found = status.run_status(tmp_path, now=START + 600)
    assert (found.finished, found.failed, found.stages) == (0, 1, {})
    assert found.failures == ({"slide": "a"} | failure,)
