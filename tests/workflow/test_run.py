"""A whole run on small slides with known nuclei, and what a second run does."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runs import MPP, ROOT, Run, leaves, read_json, read_tsv, run, write_slide

from pipeline.batch.settings import CHANGES_RESULTS, load_schema
from pipeline.layout import RunLayout, folder_name

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


STAGES = ("inspect", "tissue", "tiles", "stain", "infer", "instances", "measure", "export", "summary")


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    own = shutil.copytree(model, tmp_path_factory.mktemp("models") / "own")
    return {"slides": "in/slides.tsv", "results": "out", "model": str(own), "tiles": {"keep": True}}


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
    tomorrow = time.time() + 86400  # as from a file server whose clock is wrong
    for later in (f"{PNG}.png", "2.geojson.gz"):
        os.utime(folder / "in" / later, (tomorrow, tomorrow))
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
        results = out / "slides" / folder_name(slide)
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
    # Had it gone later, it would be no slide's fault.
    assert (folder / "out" / ".unreadable").read_text() == f"{MISSING}\n"
    assert row["reason"]


@pytest.mark.parametrize("slide", GOOD)
def test_nuclei_are_the_known_ones(finished: tuple[Path, Run], slide: str) -> None:
    folder, _ = finished
    results = folder / "out" / "slides" / folder_name(slide)
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
        assert (folder / "out" / "logs" / stage / f"{folder_name(PNG)}.log").is_file()
        assert (folder / "out" / "benchmarks" / stage / f"{folder_name(PNG)}.tsv").stat().st_size > 0


def test_second_run_has_nothing_to_do(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    done = run(folder, config)
    assert done.code == 0
    assert done.nothing, done.output


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("nuclei.parquet", "measure"),
        ("nuclei.geojson.gz", "export"),
        ("metrics.json", "summary"),
        ("overview.png", "summary"),
    ],
)
def test_a_result_that_was_deleted_is_made_anew(
    finished: tuple[Path, Run], config: dict[str, Any], name: str, first: str
) -> None:
    folder, _ = finished
    result = folder / "out" / "slides" / folder_name(SVS) / name
    away = result.rename(folder / name)
    try:
        plan = run(folder, config, "-n").counts
    finally:
        away.rename(result)
    assert {"cohort", first} <= set(plan), plan


def test_what_a_removal_left_of_a_store_has_nothing_done_over(
    finished: tuple[Path, Run], config: dict[str, Any]
) -> None:
    """As of a run that was killed over it. Snakemake takes it for a newer store: the stages after it would fail."""
    folder, _ = finished
    slide = RunLayout(folder / "out").slide(SVS)
    before = slide.instances.read_bytes()
    slide.maps_zarr.mkdir()
    (slide.maps_zarr / "zarr.json").write_text("{}")
    done = run(folder, config)
    assert done.nothing, done.output
    assert not slide.maps_zarr.exists()
    assert slide.instances.read_bytes() == before


def test_touched_model_card_and_slide_table_change_nothing(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    card = Path(config["model"]) / "model.json"
    before = card.read_bytes()
    (folder / "in" / "slides.tsv").touch()
    for path in card.parent.iterdir():
        path.touch()
    assert run(folder, config, "-n").nothing
    card.write_text(json.dumps(json.loads(before) | {"description": "another one"}))
    plan = run(folder, config, "-n").counts
    card.write_bytes(before)
    assert next(stage for stage in STAGES if plan.get(stage)) == "tiles"


@pytest.mark.parametrize(
    ("name", "first"), [(f"{SVS}.svs", "inspect"), ("0.geojson.gz", "summary"), ("model.json", "tiles")]
)
def test_file_replaced_by_an_older_one_is_noticed(
    finished: tuple[Path, Run], config: dict[str, Any], name: str, first: str
) -> None:
    folder, _ = finished
    path = (Path(config["model"]) if name == "model.json" else folder / "in") / name
    kept = shutil.copy2(path, folder / "kept")
    old = path.read_bytes()
    path.write_bytes(old + b" " if name == "model.json" else old[:-1] + bytes([old[-1] ^ 1]))  # of the same size
    os.utime(path, (1, 1))  # as copies that keep their date have
    try:
        plan = run(folder, config, "-n").counts
    finally:
        shutil.copy2(kept, path)
    count = len(GOOD) + 1 if name == "model.json" else 1
    again = STAGES[STAGES.index(first) :]
    assert {stage: plan.get(stage, 0) for stage in STAGES} == {stage: count * (stage in again) for stage in STAGES}


@dataclass(frozen=True)
class Change:
    """A setting that is changed, and what a run does then.

    Parameters
    ----------
    value : object
        Another value than that of the finished run.
    rule : str, optional
        The rule that has the setting among its parameters; None where something else tells it, as a path.
    first : str
        The first stage to run again; all after it do too.
    slides : int
        Slides that it is of account to.
    """

    value: Any
    rule: str | None
    first: str
    slides: int = len(GOOD) + 1


SLIDE_SETTINGS = {
    "results": Change("elsewhere", None, "inspect"),
    "mpp": Change(0.25, "inspect", "inspect", len(GOOD)),  # the table states the PNG's
    "reader": Change("tiffslide", "inspect", "inspect"),
    "tissue.mpp": Change(4, "tissue", "tissue"),
    "tissue.min_area_um2": Change(9000, "tissue", "tissue"),
    "tissue.min_hole_um2": Change(4000, "tissue", "tissue"),
    "model": Change("the same at another place", None, "tiles"),
    "scratch": Change("scratch", None, "tiles"),
    "tiles.tile": Change(512, "tiles", "tiles"),
    "tiles.max_unreadable": Change(0.5, "tiles", "tiles"),
    "parts.from_gb": Change(0, None, "tiles", len(GOOD)),
    "stain.method": Change("macenko", "stain", "stain"),
    "stain.strength": Change(0.5, "stain", "stain"),
    "infer.device": Change("cpu", "infer", "infer"),
    "infer.precision": Change("bfloat16", "infer", "infer"),
    "infer.batch": Change(2, "infer", "infer"),
    # The maps have gone, so that they are made again first.
    "instances.block": Change(1024, "instances", "infer"),
    "instances.halo": Change(64, "instances", "infer"),
    "export.origin": Change("bounds", "export", "export"),
}
"""Settings on which the results of slides depend, or where they are."""

NO_SLIDE = {
    "slides": "in/the same.tsv",
    "licences": [],
    "on_bad_slide": "stop",
    "warm_start": True,
    "cluster.max_minutes": 60,
    "tiles.keep": False,
    "infer.keep": True,
    "instances.keep": True,
    "parts.count": 3,
}
"""Settings that rerun no slide when they are changed."""

OTHERS = {"export.labels", "classifier"}
"""Settings with a test of their own."""

TRAINING = ("train", "synthesis", "crossval", "compare", "transfer")
"""Sections that are of no account to slides."""


def changed(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Settings with others in some places."""
    result = copy.deepcopy(config)
    for name, value in values.items():
        *above, key = name.split(".")
        section = result
        for part in above:
            section = section.setdefault(part, {})
        section[key] = value
    return result


@pytest.fixture(scope="module")
def plans(finished: tuple[Path, Run], config: dict[str, Any]) -> dict[str, Run]:
    """What a run would do after each change, two dry runs at a time."""
    folder, _ = finished
    shutil.copy(folder / "in" / "slides.tsv", folder / "in" / "the same.tsv")
    other = shutil.copytree(config["model"], Path(config["model"]).with_name("other"))
    licence = json.loads((other / "model.json").read_text())["licence"]
    changes = {name: {name: change.value} for name, change in SLIDE_SETTINGS.items()}
    changes["model"] = {"model": str(other)}
    changes["none"] = NO_SLIDE | {"licences": [licence]}
    changes["labels"] = {"export.labels": True}
    changes["train"] = {"train.name": "mine", "train.seed": 5, "train.schedule.steps": 7}
    changes["protocols"] = {"crossval.folds": 3, "compare.name": "mine", "transfer.folds": 2, **changes["train"]}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda values: run(folder, changed(config, values), "-n"), changes.values())
        return dict(zip(changes, found, strict=True))


def test_every_setting_is_in_the_tables() -> None:
    schema = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    names = {name for name, _ in leaves(schema) if name.split(".")[0] not in TRAINING}
    assert names == SLIDE_SETTINGS.keys() | NO_SLIDE.keys() | OTHERS


@pytest.mark.parametrize("name", SLIDE_SETTINGS)
def test_changed_setting_runs_what_uses_it(plans: dict[str, Run], name: str) -> None:
    change, plan = SLIDE_SETTINGS[name], plans[name]
    if name != "results":  # there, nothing has run yet
        assert plan.changed == {"settings", change.rule} - {None}
    again = STAGES[STAGES.index(change.first) :]
    expected = {stage: change.slides * (stage in again) for stage in STAGES}
    assert {stage: plan.counts.get(stage, 0) for stage in STAGES} == expected
    parts = {rule: count for rule, count in plan.counts.items() if rule.endswith("_part")}
    parts_of = ("tiles_part", "infer_part", "instances_part") if name == "parts.from_gb" else ()
    assert parts == dict.fromkeys(parts_of, 4 * len(GOOD))


def test_settings_that_change_no_slide_rerun_none(plans: dict[str, Run]) -> None:
    assert plans["none"].counts == {"slide_table": 1, "settings": 1, "cohort": 1, "all": 1, "total": 4}
    assert plans["train"].nothing
    assert plans["protocols"].counts == {"settings": 1, "cohort": 1, "all": 1, "total": 3}


def test_label_maps_are_made_of_what_is_there(plans: dict[str, Run]) -> None:
    slides = len(GOOD) + 1
    assert plans["labels"].counts == {"labels": slides, "settings": 1, "cohort": 1, "all": 1, "total": slides + 3}


@pytest.mark.parametrize(
    ("column", "first"), [("mpp", "inspect"), ("tissue", "tissue"), ("truth", "summary"), ("group", None)]
)
def test_changed_column_runs_its_slide_alone(
    finished: tuple[Path, Run], config: dict[str, Any], column: str, first: str | None
) -> None:
    folder, _ = finished
    table = folder / "in" / "slides.tsv"
    before = table.read_text(encoding="utf-8")
    head, svs, *rest = before.splitlines()
    shutil.copy(folder / "in" / "0.geojson.gz", folder / "in" / "other.geojson.gz")
    value = {"mpp": "0.25", "tissue": "other.geojson.gz", "truth": "other.geojson.gz", "group": "G5"}[column]
    columns, cells = head.split("\t"), svs.split("\t")
    if column not in columns:
        columns, cells, rest = [*columns, column], [*cells, ""], [f"{line}\t" for line in rest]
    cells[columns.index(column)] = value
    table.write_text("\n".join(["\t".join(columns), "\t".join(cells), *rest]) + "\n", encoding="utf-8")
    try:
        plan = run(folder, config, "-n")
    finally:
        table.write_text(before, encoding="utf-8")
    again = STAGES[STAGES.index(first) :] if first else ()
    assert {stage: plan.counts.get(stage, 0) for stage in STAGES} == {stage: int(stage in again) for stage in STAGES}
    assert plan.counts["slide_table"] == plan.counts["cohort"] == 1


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


def test_finished_slides_that_cannot_be_read_keep_their_results(
    finished: tuple[Path, Run], config: dict[str, Any]
) -> None:
    folder, _ = finished
    (folder / "in").rename(folder / "unmounted")
    (folder / "in").mkdir()
    shutil.copy2(folder / "unmounted" / "slides.tsv", folder / "in")
    try:
        plan, other = run(folder, config, "-n"), run(folder, config | {"mpp": 0.3}, "-n")
    finally:
        shutil.rmtree(folder / "in")
        (folder / "unmounted").rename(folder / "in")
    assert plan.counts == {"cohort": 1, "all": 1, "total": 2}
    assert "warning: slides: 3 of the finished ones have files that cannot be read now: -dash" in plan.output
    assert other.code == 1
    assert "; and 'out' was made with mpp null, not 0.3 (check that" in other.output.splitlines()[-1]
    assert not run(folder, config, "-n").counts


def test_a_finished_slide_whose_known_nuclei_are_missing_keeps_its_results(
    finished: tuple[Path, Run], config: dict[str, Any]
) -> None:
    folder, _ = finished
    truth = folder / "in" / "0.geojson.gz"
    truth.rename(folder / "elsewhere")
    try:
        plan = run(folder, config, "-n")
    finally:
        (folder / "elsewhere").rename(truth)
    assert "summary" not in plan.counts
    assert f"warning: slides: 1 of the finished ones have files that cannot be read now: {SVS} ({truth})" in plan.output


def test_slide_that_turned_up_is_run_alone(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    found = folder / "in" / "not-there.svs"
    shutil.copy(folder / "in" / f"{SVS}.svs", found)
    try:
        plan = run(folder, config, "-n").counts
    finally:
        found.unlink()
    assert plan == {**dict.fromkeys((*STAGES, "cohort", "all"), 1), "total": 11}


def test_settings_changed_from_elsewhere_are_not_overlooked(
    finished: tuple[Path, Run], config: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = finished
    here = config | {"slides": str(folder / "in" / "slides.tsv"), "results": str(folder / "out")}
    assert run(tmp_path, here, "-n").code == 0
    other = run(tmp_path, here | {"stain": {"method": "none"}}, "-n")
    assert other.code != 0
    (line,) = [line for line in other.output.splitlines() if line.startswith("error: ")]
    assert 'was made with stain.method "model", not "none"' in line
    assert "Traceback" not in other.output
    assert run(tmp_path, here | {"stain": {"method": "none"}}, "-n", "--forceall").counts["stain"] == len(GOOD) + 1
    table = (folder / "in" / "slides.tsv").read_text(encoding="utf-8").replace(f'.png"\t{MPP}\t', '.png"\t0.25\t')
    (folder / "in" / "finer.tsv").write_text(table, encoding="utf-8")
    for options in (["-n"], []):  # before the table of the run is written again
        other = run(tmp_path, here | {"slides": str(folder / "in" / "finer.tsv")}, *options)
        assert other.code != 0
        (line,) = [line for line in other.output.splitlines() if line.startswith("error: ")]
        assert f"slide {PNG!r}: " in line
        assert f"was made with mpp {MPP}, not 0.25, and" in line


def test_copied_results_are_of_the_slides_of_now(
    finished: tuple[Path, Run], config: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    lines = (folder / "in" / "slides.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    fewer = folder / "in" / "fewer.tsv"
    fewer.write_text("".join(lines[:-1]), encoding="utf-8")
    done = run(tmp_path, config | {"slides": str(fewer)})
    assert done.code == 0, done.output
    assert f"{len(GOOD)} slides: {len(GOOD)} finished, 0 failed, 0 to go" in done.output
    assert f"no longer in the run, but still in its slides/: {MISSING}" in done.output
    assert len(read_tsv(tmp_path / "out" / "cohort.tsv")) == len(GOOD)


def test_settings_that_change_results_are_those_that_rerun_them() -> None:
    same_pixels = {"tiles.tile", "infer.device", "infer.batch", "instances.block", "instances.halo"}
    assert set(CHANGES_RESULTS) == SLIDE_SETTINGS.keys() - same_pixels - {"results", "scratch", "parts.from_gb"} | {
        "classifier"
    }


def test_snakemake_report(finished: tuple[Path, Run], config: dict[str, Any]) -> None:
    folder, _ = finished
    done = run(folder, config, "--report", "snakemake-report.html")
    assert done.code == 0, done.output
    assert (folder / "snakemake-report.html").stat().st_size > 100_000


def test_a_slide_out_of_focus_is_told_and_a_sharp_one_not(tmp_path: Path, model: Path) -> None:
    import cv2

    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "sharp.png", seed=5)
    image = cv2.imread(str(tmp_path / "in" / "sharp.png"))
    cv2.imwrite(str(tmp_path / "in" / "blurred.png"), cv2.GaussianBlur(image, (0, 0), 1.5 / MPP))
    done = run(tmp_path, {"slides": "in", "results": "out", "model": str(model), "mpp": str(MPP)})
    assert done.code == 0, done.output
    rows = {row["slide"]: row for row in read_tsv(tmp_path / "out" / "cohort.tsv")}
    assert float(rows["sharp"]["blurred_share"]) < 1 / 3 < float(rows["blurred"]["blurred_share"])
    assert float(rows["sharp"]["blur_um"]) < 0.6 < 1 < float(rows["blurred"]["blur_um"])
    told = {name: read_json(tmp_path / "out" / "slides" / name / "metrics.json")["warnings"] for name in rows}
    assert told["sharp"] == []
    assert [text.startswith("stain: out of focus: ") for text in told["blurred"]] == [True]
    assert (tmp_path / "out" / "report.html").read_text().count("out of focus: edges are wider") == 2
