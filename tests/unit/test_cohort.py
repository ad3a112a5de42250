from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import cohort, demo, summary, testing
from pipeline.batch import provenance
from pipeline.batch.settings import file_sha256
from pipeline.errors import PipelineError
from pipeline.layout import RunLayout

NAMES = ('a "b" <i>', "=1+1", "日本 $x$")


def write_slides(results: Path, names: tuple[str, ...], extra: str = "group") -> Path:
    results.mkdir(exist_ok=True)
    table = results / "slides.tsv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(["slide", "path", extra])
        writer.writerows([name, f"/data/{index}.svs", f"-g{index}"] for index, name in enumerate(names))
    return table


def summarise(results: Path, slide: str, **more: int) -> None:
    paths = testing.write_slide(results, slide, **more)
    summary.run_summary(
        slide,
        {name: getattr(paths, name) for name in summary.MANIFESTS},
        nuclei=paths.nuclei,
        tissue_geojson=paths.tissue_geojson,
        tiles_zarr=paths.tiles_zarr,
        out=paths.metrics,
        png=paths.overview,
    )


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Leave the pictures out: drawing them would take most of the time."""

    def draw(path: Path, *rest: object) -> None:
        Image.new("RGB", (300, 200), "pink").save(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary, "draw_overview", draw)
        yield


def run(results: Path, **more: Path) -> dict:
    layout = RunLayout(results)
    made = cohort.run_cohort(
        results,
        layout.slide_table,
        tsv=layout.cohort_tsv,
        parquet=layout.cohort_parquet,
        failed=layout.failed,
        report=layout.report,
        manifest=layout.manifest,
        regions_tsv=layout.regions_tsv,
        regions_parquet=layout.regions_parquet,
        **more,
    )
    return dict(made)


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_slides(folder, (*NAMES, "bad", "late"))
    for seed, name in enumerate(NAMES):
        summarise(folder, name, count=(200, 0, 50)[seed], seed=seed, width=1200, height=1000)
    metrics = RunLayout(folder).slide(NAMES[2]).metrics
    scores = dict.fromkeys(cohort.SCORES, 0.75)
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"evaluation": scores}))
    testing.write_failed_slide(folder, "bad", "inspect", "cut short\tat 30 %", "=copy it again")
    (folder / "settings.json").write_text('{"stain": {"method": "model"}}')
    run(folder, config=folder / "settings.json")
    return folder


def test_tables(results: Path) -> None:
    layout = RunLayout(results)
    table = pq.read_table(layout.cohort_parquet)
    assert table["slide"].to_pylist() == list(NAMES)
    assert table["group"].to_pylist() == ["-g0", "-g1", "-g2"]
    assert table["nuclei"].to_pylist() == [200, 0, 50]
    assert table["nuclei:tumour"][0].as_py() + table["nuclei:other <&>"][0].as_py() == 200
    assert table["area_um2_median"].to_pylist()[1] is None
    assert "orientation_median" not in table.column_names
    assert table["aji"].to_pylist() == [None, None, 0.75]
    assert table["seconds"][0].as_py() > 32  # eight stages of 0.5 to 7.5 s, and the last
    rows = read_tsv(layout.cohort_tsv)
    assert list(rows[0]) == table.column_names
    assert [row["slide"] for row in rows] == ['a "b" <i>', "'=1+1", "日本 $x$"]
    assert [row["group"] for row in rows] == ["'-g0", "'-g1", "'-g2"]
    assert rows[1]["area_um2_median"] == ""
    assert float(rows[0]["tissue_mm2"]) == pytest.approx(table["tissue_mm2"][0].as_py())


def test_failed(results: Path) -> None:
    rows = read_tsv(RunLayout(results).failed)
    assert list(rows[0]) == ["slide", "stage", "reason", "hint"]
    assert rows[0] == {
        "slide": "bad", "stage": "inspect", "reason": "cut short at 30 %", "hint": "'=copy it again"
    }  # fmt: skip
    assert len(rows) == 1


def test_manifest(results: Path) -> None:
    layout = RunLayout(results)
    manifest = json.loads(layout.manifest.read_text())
    assert manifest["config"] == {"stain": {"method": "model"}}
    assert manifest["model"] == {"name": "default", "sha256": "ab" * 32}
    assert (manifest["slides_ok"], manifest["slides_failed"], manifest["slides_waiting"]) == (3, 1, 1)
    assert [item["status"] for item in manifest["slides"]] == ["ok"] * 3 + ["failed", "waiting"]
    assert manifest["slides"][0]["quick_hash"] == "hash-0"
    assert manifest["slides"][3]["quick_hash"] is None
    assert [item["code"] for item in manifest["slides"]] == [provenance.code_of(manifest)] * 3 + [None] * 2
    for name, digest in manifest["outputs"].items():
        assert file_sha256(results / name) == digest
    assert not list(results.glob(".part-*"))


def test_demo_table(results: Path, tmp_path: Path) -> None:
    lines = demo.results_table(results).splitlines()
    assert lines[0].split() == ["slide", "tissue", "mm²", "nuclei", "nuclei/mm²", "F1", "seconds"]
    assert lines[1].startswith('a "b" <i>')
    assert lines[3].split()[-2] == "0.750"
    assert "bad: failed at inspect: cut short at 30 %" in [line.replace("\t", " ") for line in lines]
    assert lines[-1] == f"results: {results}   report: {results / 'report.html'}"
    with pytest.raises(PipelineError, match="holds no results"):
        demo.results_table(tmp_path)


def test_a_slide_that_is_there_twice_is_told(tmp_path: Path) -> None:
    names = ("a", "a copy", "b")
    write_slides(tmp_path, names)
    for name, seed in zip(names, (1, 1, 2), strict=True):
        summarise(tmp_path, name, seed=seed)
    run(tmp_path)
    assert [row["warnings"] for row in cohort.gather(tmp_path, tmp_path / "slides.tsv").good] == [
        [],
        ["cohort: holds the same data as slide 'a', and counts beside it"],
        [],
    ]
    assert (tmp_path / "report.html").read_text().count("holds the same data as slide &#39;a&#39;") == 2


def test_quality_of_slides_of_this_version_and_an_older_one(tmp_path: Path) -> None:
    write_slides(tmp_path, ("new", "old", "pale"))
    focus = {"cells": 99, "blur_um": 0.9, "blurred_share": 0.625}
    unknown = {"cells": 3, "blur_um": None, "blurred_share": None}
    for seed, (name, found) in enumerate((("new", focus), ("old", None), ("pale", unknown))):
        summarise(tmp_path, name, seed=seed)
        path = RunLayout(tmp_path).slide(name).metrics
        metrics = json.loads(path.read_text())
        if found is None:
            for key in ("focus", "doubtful_cells", "ink_fraction", "git"):
                del metrics[key]
        else:
            warnings = ["stain: out of focus"] if found is focus else []
            metrics |= {"focus": found, "doubtful_cells": 2, "ink_fraction": 0.25, "warnings": warnings}
        path.write_text(json.dumps(metrics))
    run(tmp_path)
    columns = ("blur_um", "blurred_share", "unreadable_share", "doubtful_cells", "ink_fraction", "warnings")
    table = pq.read_table(RunLayout(tmp_path).cohort_parquet, columns=list(columns)).to_pydict()
    assert [table[name] for name in columns] == [
        [0.9, None, None], [0.625, None, None], [0, 0, 0], [2, None, 2], [0.25, None, 0.25], [1, 0, 0]
    ]  # fmt: skip
    assert [row["blurred_share"] for row in read_tsv(tmp_path / "cohort.tsv")] == ["0.625", "", ""]
    assert "stain: out of focus" in (tmp_path / "report.html").read_text()


def test_no_good_slide(tmp_path: Path) -> None:
    write_slides(tmp_path, ("bad",))
    testing.write_failed_slide(tmp_path, "bad", "inspect", "empty", "")
    run(tmp_path)
    layout = RunLayout(tmp_path)
    assert pq.read_table(layout.cohort_parquet).num_rows == 0
    assert layout.cohort_tsv.read_text().startswith("slide\tgroup\ttissue_mm2\tnuclei\t")
    assert "data:image/jpeg" not in layout.report.read_text()
    assert "No slide was finished" in layout.report.read_text()


def test_no_failure_leaves_the_header(tmp_path: Path) -> None:
    write_slides(tmp_path, ("good",))
    summarise(tmp_path, "good", count=4, width=1000, height=800)
    run(tmp_path)
    assert RunLayout(tmp_path).failed.read_text() == "slide\tstage\treason\thint\n"


def test_a_further_column_may_bear_any_name(tmp_path: Path) -> None:
    write_slides(tmp_path, ("good",), extra="nuclei")
    summarise(tmp_path, "good", count=4, width=1000, height=800)
    run(tmp_path)
    table = pq.read_table(RunLayout(tmp_path).cohort_parquet)
    assert table["table:nuclei"].to_pylist() == ["-g0"]
    assert table["nuclei"].to_pylist() == [4]


def test_a_damaged_manifest_or_card_is_an_error(tmp_path: Path) -> None:
    write_slides(tmp_path, ("bad",))
    paths = testing.write_failed_slide(tmp_path, "bad", "inspect", "empty", "")
    with pytest.raises(PipelineError, match="model card"):
        run(tmp_path, model=tmp_path)
    paths.inspect.write_text("{")
    with pytest.raises(PipelineError, match="damaged"):
        run(tmp_path)
    assert not list(tmp_path.glob(".part-*"))
    assert not RunLayout(tmp_path).cohort_tsv.exists()


def test_what_a_killed_job_has_left_goes(tmp_path: Path) -> None:
    write_slides(tmp_path, ("a",))
    for name in ("cohort.tsv", "cohort.parquet", "failed.tsv", "report.html", "manifest.json"):
        (tmp_path / f".part-4711-{name}").write_text("half")
    (tmp_path / ".part-4711-of another").write_text("its own")
    run(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".part-4711-of another"]


@given(st.text())
def test_cells_are_no_formulas_and_one_line(text: str) -> None:
    cell = cohort.cell(text)
    assert not {"\t", "\n", "\r"} & set(cell)
    if cell.lstrip()[:1] in ("=", "+", "-", "@"):
        assert math.isfinite(float(cell)) or "inf" in cell.lower() or "nan" in cell.lower()


def test_demo_slides(tmp_path: Path) -> None:
    table = demo.write_demo_slides(tmp_path / "slides", 0.15)
    rows = read_tsv(table)
    assert [row["slide"] for row in rows] == ["demo-1", "demo 2", "demo-3"]
    for row in rows:
        assert (table.parent / row["path"]).stat().st_size > 1000
        assert (table.parent / row["truth"]).read_bytes()[:2] == b"\x1f\x8b"
    assert sorted(path.name for path in table.parent.iterdir()) == [
        "demo 2.tiff", "demo-1.svs", "demo-3.ome.tiff", "slides.tsv", "truth"
    ]  # fmt: skip
    before = {path: path.read_bytes() for path in table.parent.rglob("*") if path.is_file()}
    demo.write_demo_slides(tmp_path / "slides", 0.15)
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(PipelineError, match="--size"):
        demo.write_demo_slides(tmp_path, 0)


def test_provenance() -> None:
    versions = provenance.versions()
    assert {"pipeline", "python", "numpy"} <= set(versions)
    git = provenance.git_state()
    assert git is None or len(git["commit"]) == 40
    assert provenance.now().endswith("+00:00")


def test_classes_by_a_classifier(results: Path, tmp_path: Path) -> None:
    layout = RunLayout(results)
    made = tmp_path / "types.json"
    made.write_text("one")
    composition = {"A": {"count": 3, "share": 1.0, "per_mm2": 2.0, "color": [1, 2, 3]}}
    for name, sha, good in ((NAMES[0], file_sha256(made), "ok"), (NAMES[1], "0" * 64, "ok"), (NAMES[2], "", "failed")):
        content = {"status": good, "composition": composition, "classifier": {"name": "types", "sha256": sha}}
        content |= {"stage": "classify", "seconds": 1000.0, "peak_rss_mb": 9000.0}
        layout.slide(name).classify.write_text(
            json.dumps(content if good == "ok" else {"status": good, "failure": None})
        )
    found = cohort.gather(results, layout.slide_table, str(made))
    # The others have classes by another one, or none yet.
    assert [row["slide"] for row in found.good] == [NAMES[0]]
    assert found.good[0]["composition"] == composition
    without = cohort.gather(results, layout.slide_table)
    assert found.good[0]["total_seconds"] == pytest.approx(without.good[0]["total_seconds"] + 1000)
    assert cohort.cohort_table(found)["peak_rss_mb"].to_pylist() == [9000.0]
    assert {NAMES[1], NAMES[2]} <= {*found.waiting}
    assert {"A"} & {*without.good[0]["composition"]} == set()


def write_regions(results: Path, slide: str, drawn: Path, **more: object) -> Path:
    paths = RunLayout(results).slide(slide)
    metrics = json.loads(paths.metrics.read_text())
    names = ("tissue_mm2", "nuclei", "nuclei_per_mm2", "composition", "quantiles")
    one = {"area_mm2": 2.5} | {name: metrics[name] for name in names}
    found = [{"region": name} | one for name in ("=A <b>", "(elsewhere)")]
    record = {"status": "ok", "regions": found, "sha256": file_sha256(drawn), "classifier": None, "warnings": ["odd"]}
    paths.regions.write_text(json.dumps(record | more))
    return paths.regions


def test_tables_of_regions(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    drawn = tmp_path / "drawn.geojson"
    drawn.write_text("one")
    rows = ("a\t/data/a.svs\tdrawn.geojson\tx", "b\t/data/b.svs\t\ty")
    layout.slide_table.write_text("\n".join(("slide\tpath\tregions\tregion", *rows)) + "\n", encoding="utf-8")
    for seed, name in enumerate("ab"):
        summarise(tmp_path, name, count=20, seed=seed, width=1200, height=1000)
    # Not counted yet: the slide waits, and there is a table without rows.
    assert run(tmp_path)["slides_waiting"] == 1
    assert read_tsv(layout.regions_tsv) == []
    manifest = write_regions(tmp_path, "a", drawn)
    made = run(tmp_path)
    assert (made["slides_ok"], made["outputs"]["regions.tsv"]) == (2, file_sha256(layout.regions_tsv))
    table, whole = pq.read_table(layout.regions_parquet), pq.read_table(layout.cohort_parquet)
    assert table.column_names[:7] == [
        "slide", "table:region", "region", "area_mm2", "tissue_mm2", "nuclei", "nuclei_per_mm2"
    ]  # fmt: skip
    assert {*table.column_names[4:]} < {*whole.column_names}
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["slide"], first["table:region"], first["region"], first["area_mm2"]) == ("a", "x", "=A <b>", 2.5)
    assert {name: whole[name][0].as_py() for name in table.column_names[4:]} == dict(list(first.items())[4:])
    assert [row["region"] for row in read_tsv(layout.regions_tsv)] == ["'=A <b>", "(elsewhere)"]
    assert whole["warnings"].to_pylist() == [1, 0]
    page = layout.report.read_text(encoding="utf-8")
    assert "=A &lt;b&gt;" in page
    assert "=A <b>" not in page
    assert "regions: odd" in page
    assert "regions.parquet" in page
    # Of other annotations, or other classes.
    drawn.write_text("other")
    assert cohort.gather(tmp_path, layout.slide_table).waiting == ["a"]
    drawn.write_text("one")
    write_regions(tmp_path, "a", drawn, classifier={"name": "types", "sha256": "0"})
    assert cohort.gather(tmp_path, layout.slide_table).waiting == ["a"]
    failure = {"stage": "regions", "reason": "no JSON", "hint": "draw"}
    manifest.write_text(json.dumps({"status": "failed", "failure": failure}))
    assert cohort.gather(tmp_path, layout.slide_table).failed == [{"slide": "a"} | failure]
    # No longer in the table.
    layout.slide_table.write_text("slide\tpath\na\t/data/a.svs\nb\t/data/b.svs\n", encoding="utf-8")
    assert run(tmp_path)["slides_ok"] == 2
    assert not layout.regions_tsv.exists()
    assert not layout.regions_parquet.exists()
    assert "regions.parquet" not in layout.report.read_text(encoding="utf-8")
