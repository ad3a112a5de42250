"""A whole run on small slides with known nuclei, and what a second run does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import MPP, Run, read_json, read_tsv, run, write_slide

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]

# Names that a shell or Snakemake could trip over, one for each format.
SVS, TIFF, PNG = "-dash $(touch pwned)", "q'uo\"te {slide}", "ünïcödé 细胞; a,b=c.v2"
GOOD = (SVS, TIFF, PNG)
MISSING = "not there"

FILES = (
    "slide.json",
    "tissue.json",
    "tissue.geojson",
    "tissue.png",
    "tiles.json",
    "stain.json",
    "stain.png",
    "maps.json",
    "instances.json",
    "measure.json",
    "nuclei.parquet",
    "export.json",
    "nuclei.geojson.gz",
    "metrics.json",
    "overview.png",
)
"""What scripts of others rely on, by its name."""


@pytest.fixture(scope="module")
def config(model: Path) -> dict[str, Any]:
    return {"slides": "in/slides.tsv", "results": "out", "model": str(model), "tiles": {"keep": True}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> tuple[Path, Run]:
    """A run over three slides in three formats, of three looks, and one that is not there."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "in").mkdir()
    lines = ["slide\tpath\tmpp\ttruth\tgroup"]
    for number, (name, suffix, stain) in enumerate(
        ((SVS, ".svs", "classic"), (TIFF, ".tif", "rose"), (PNG, ".png", "violet"))
    ):
        truth = write_slide(folder / "in" / f"{name}{suffix}", seed=number, stain=stain)
        (folder / "in" / f"{number}.geojson.gz").write_bytes(truth)
        quoted = '"' + f"{name}".replace('"', '""') + '"'
        path = '"' + f"{name}{suffix}".replace('"', '""') + '"'
        lines.append(f"{quoted}\t{path}\t{MPP if suffix == '.png' else ''}\t{number}.geojson.gz\tG{number}")
    lines.append(f"{MISSING}\tnot-there.svs\t\t\tG9")
    (folder / "in" / "slides.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run(folder, config)
    assert done.code == 0, done.output
    return folder, done


def test_all_outputs_are_there(finished: tuple[Path, Run]) -> None:
    folder, _ = finished
    out = folder / "out"
    for name in ("cohort.tsv", "cohort.parquet", "failed.tsv", "report.html", "manifest.json", "slides.tsv"):
        assert (out / name).stat().st_size > 0
    for slide in GOOD:
        results = out / "slides" / slide.replace("{", "%7B").replace("}", "%7D")
        for name in FILES:
            assert (results / name).stat().st_size > 0, (slide, name)
        assert (results / "tiles.zarr").is_dir()
        assert not (results / "maps.zarr").exists()
        assert not (results / "instances.parquet").exists()
        assert not list(results.glob(".part-*"))


def test_names_were_never_run_as_commands(finished: tuple[Path, Run]) -> None:
    folder, _ = finished
    assert not list(folder.rglob("pwned"))


def test_cohort_has_the_slides_and_their_columns(finished: tuple[Path, Run]) -> None:
    import pyarrow.parquet

    folder, _ = finished
    expected = {slide: f"G{number}" for number, slide in enumerate(GOOD)}
    table = pyarrow.parquet.read_table(folder / "out" / "cohort.parquet").to_pydict()
    found = dict(zip(table["slide"], table["group"], strict=True))
    assert {slide: group for slide, group in found.items() if slide != MISSING} == expected
    # In the text table, a name that a spreadsheet would take for a formula has an apostrophe before it.
    rows = read_tsv(folder / "out" / "cohort.tsv")
    found = {row["slide"].removeprefix("'"): row["group"] for row in rows}
    assert {slide: group for slide, group in found.items() if slide != MISSING} == expected


def test_missing_slide_is_listed_as_failed(finished: tuple[Path, Run]) -> None:
    folder, _ = finished
    (row,) = read_tsv(folder / "out" / "failed.tsv")
    assert (row["slide"], row["stage"]) == (MISSING, "inspect")
    assert row["reason"]


@pytest.mark.parametrize("slide", GOOD)
def test_nuclei_are_the_known_ones(finished: tuple[Path, Run], slide: str) -> None:
    folder, _ = finished
    results = folder / "out" / "slides" / slide.replace("{", "%7B").replace("}", "%7D")
    metrics = read_json(results / "metrics.json")
    assert metrics["status"] == "ok"
    (f1,) = set(find(metrics, "f1"))
    print(f"{slide}: F1 {f1:.3f}")
    assert f1 >= 0.9
    assert len(read_json(results / "nuclei.geojson.gz")["features"]) > 50


def find(value: Any, key: str) -> list[Any]:
    """Values of `key` anywhere in plain JSON."""
    if isinstance(value, dict):
        return [found for k, v in value.items() for found in ([v] if k == key else find(v, key))]
    return [found for item in value for found in find(item, key)] if isinstance(value, list) else []


def test_logs_and_benchmarks_are_beside_the_results(finished: tuple[Path, Run]) -> None:
    folder, _ = finished
    for stage in ("inspect", "infer", "summary"):
        assert (folder / "out" / "logs" / stage / f"{PNG}.log").is_file()
        assert (folder / "out" / "benchmarks" / stage / f"{PNG}.tsv").stat().st_size > 0


def test_second_run_has_nothing_to_do(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    done = run(folder, config)
    assert done.code == 0
    assert done.nothing, done.output


def test_touched_model_card_and_slide_table_change_nothing(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    (folder / "in" / "slides.tsv").touch()
    assert run(folder, config, "-n").nothing


def test_changed_stain_runs_stain_and_what_follows_but_not_tiles(
    finished: tuple[Path, Run], config: dict[str, Any]
) -> None:
    folder, _ = finished
    plan = run(folder, {**config, "stain": {"method": "macenko"}}, "-n").counts
    slides = len(GOOD) + 1
    assert plan == {
        **dict.fromkeys(("stain", "infer", "instances", "measure", "export", "summary"), slides),
        **dict.fromkeys(("settings", "cohort", "all"), 1),
        "total": 6 * slides + 3,
    }


@pytest.mark.parametrize(
    ("change", "first", "spared"),
    [
        ({"tissue": {"mpp": 4}}, "tissue", "inspect"),
        ({"tiles": {"keep": True, "max_unreadable": 0.5}}, "tiles", "tissue"),
        ({"infer": {"precision": "bfloat16"}}, "infer", "tissue"),
        ({"reader": "tiffslide"}, "inspect", "slide_table"),
        ({"mpp": 0.25}, "inspect", "slide_table"),
        ({"export": {"labels": True}}, "labels", "measure"),
    ],
)
def test_changed_setting_runs_what_uses_it(
    finished: tuple[Path, Run], config: dict[str, Any], change: dict[str, Any], first: str, spared: str
) -> None:
    folder, _ = finished
    plan = run(folder, {**config, **change}, "-n").counts
    assert plan.get(first), plan
    assert spared not in plan


def test_what_a_bad_slide_does_reruns_no_slide(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    plan = run(folder, {**config, "on_bad_slide": "stop"}, "-n").counts
    assert plan == {"settings": 1, "cohort": 1, "all": 1, "total": 3}


@pytest.mark.parametrize(("retries", "status"), [(0, "failed"), (1, "ok")])
def test_time_that_is_over_fails_the_slide_in_the_last_attempt_alone(
    tmp_path: Path, config: dict[str, Any], retries: int, status: str
) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=1)
    more = ["--retries", str(retries), "--set-resources", "inspect:runtime=30 * (attempt > 1)"]
    done = run(tmp_path, config | {"slides": "in", "results": "r"}, "r/slides/a/slide.json", *more)
    assert done.code == 0, done.output
    assert ("error: the slide was not finished in 0 minutes" in done.output) == (retries > 0)
    assert read_json(tmp_path / "r" / "slides" / "a" / "slide.json")["status"] == status


def test_slide_that_turned_up_is_run_alone(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    found = folder / "in" / "not-there.svs"
    shutil.copy(folder / "in" / f"{SVS}.svs", found)
    try:
        plan = run(folder, config, "-n").counts
    finally:
        found.unlink()
    stages = ("inspect", "tissue", "tiles", "stain", "infer", "instances", "measure", "export", "summary")
    assert plan == {**dict.fromkeys((*stages, "cohort", "all"), 1), "total": 11}


def test_snakemake_report(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    done = run(folder, config, "--report", "snakemake-report.html")
    assert done.code == 0, done.output
    assert (folder / "snakemake-report.html").stat().st_size > 100_000
