"""Stage ``cohort``: write the tables, report and provenance of a run, and the list of failed slides."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.batch import provenance
from pipeline.batch.lock import held
from pipeline.batch.settings import file_sha256
from pipeline.batch.slide_table import SlideTable, from_table
from pipeline.batch.stage import keywords, manifest_failure, read_manifest, stage_costs, whole_files, write_json
from pipeline.errors import PipelineError
from pipeline.export import RANKED
from pipeline.layout import RunLayout, SlideLayout

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

SCORES = ("aji", "aji_plus", "pq", "sq", "dq", "dice", "iou", "f1")
"""Scores of ``metrics.json`` that become columns if any slide has a truth."""

FAILED_COLUMNS = ("slide", "stage", "reason", "hint")


@dataclass(frozen=True)
class Cohort:
    """Results of the slides of a run.

    Parameters
    ----------
    table : SlideTable
        The slides in order.
    good : list of dict
        ``metrics.json`` of each finished slide, with ``extra`` (further columns of the slide table) and
        ``total_seconds``. With a classifier, ``composition`` is by its classes and ``classifier`` says which it is; a
        slide with regions also has ``regions``, see `pipeline.regions.count_regions`.
    failed : list of dict
        ``slide``, ``stage``, ``reason`` and ``hint`` of each slide that cannot be processed.
    waiting : list of str
        Names of the other slides, which have not been finished yet.
    hashes : dict of str to str
        Quick hash of each slide that could be opened.
    """

    table: SlideTable
    good: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    hashes: dict[str, str | None] = field(default_factory=dict)


def gather(results: Path, slides: Path, classifier: str | None = None, under_way: Collection[str] = ()) -> Cohort:
    """Read the results of every slide of a run.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.
    slides : pathlib.Path
        The run's slide table.
    classifier : str, optional
        File of the run's classifier, if it has one. A slide is then finished only if the stage ``classify`` has
        processed it with this classifier (with any, if the file does not exist).
    under_way : collection of str
        Slides that are being processed. What an earlier run has left of them does not count.

    Returns
    -------
    Cohort
        The results.

    Raises
    ------
    PipelineError
        When the slide table or a manifest is damaged.
    """
    layout = RunLayout(results)
    cohort = Cohort(from_table(slides))
    by = file_sha256(Path(classifier)) if classifier is not None and Path(classifier).is_file() else None
    first_of: dict[str, str] = {}
    for entry in cohort.table:
        paths = layout.slide(entry.name)
        first = read_manifest(paths.inspect) if paths.inspect.exists() else {}
        cohort.hashes[entry.name] = first.get("quick_hash")
        done = paths.metrics.exists() and entry.name not in under_way
        last = read_manifest(paths.metrics) if done else first
        failure = manifest_failure(last) if last else None
        kinds = {} if classifier is None else _classes(paths, by)
        drawn = {} if entry.regions is None else _regions(paths, entry.regions, (kinds or {}).get("classifier"))
        if failure is None and drawn is not None and done:
            failure = drawn.pop("failure", None)
        if failure is not None:
            record = {"stage": failure.stage, "reason": failure.reason, "hint": failure.hint}
            cohort.failed.append({"slide": entry.name} | record)
        elif not done or kinds is None or drawn is None:
            cohort.waiting.append(entry.name)
        else:
            last["stages"] |= kinds.pop("stages", {})
            last["warnings"] += drawn.pop("warnings", [])
            seconds = sum(stage["seconds"] for stage in last["stages"].values()) + last["seconds"]
            known = cohort.hashes[entry.name]
            twin = entry.name if known is None else first_of.setdefault(known, entry.name)
            if twin != entry.name:
                warning = f"cohort: holds the same data as slide {twin!r}, and counts beside it"
                log.warning("slide %r: %s", entry.name, warning)
                last["warnings"].append(warning)
            more = {"slide": entry.name, "extra": dict(entry.extra), "total_seconds": round(seconds, 3)}
            cohort.good.append(last | more | kinds | drawn)
    return cohort


def _classes(paths: SlideLayout, by: str | None) -> dict[str, Any] | None:
    """Composition, classifier and costs from the stage ``classify``.

    None if the stage has not finished, or has used another classifier than the one with the hash `by`.
    """
    made: dict[str, Any] = read_manifest(paths.classify) if paths.classify.exists() else {"status": "failed"}
    if made["status"] != "ok" or (by is not None and made["classifier"]["sha256"] != by):
        return None
    return {name: made[name] for name in ("composition", "classifier")} | {"stages": stage_costs([made])}


def _regions(paths: SlideLayout, path: Path, classifier: dict[str, str] | None) -> dict[str, Any] | None:
    """Regions and warnings from the stage ``regions``, or its failure.

    None if the stage has not finished, or has used another file of regions than `path` or another classifier.
    """
    made: dict[str, Any] = read_manifest(paths.regions) if paths.regions.exists() else {"status": "missing"}
    if made["status"] == "failed":
        return {"failure": manifest_failure(made)}
    if made["status"] == "missing" or made["classifier"] != classifier:
        return None
    if path.is_file() and file_sha256(path) != made["sha256"]:
        return None
    return {"regions": made["regions"], "warnings": [f"regions: {text}" for text in made["warnings"]]}


def cohort_table(cohort: Cohort) -> pa.Table:
    """Make the table of finished slides, one row each.

    Parameters
    ----------
    cohort : Cohort
        The run.

    Returns
    -------
    pyarrow.Table
        Columns: ``slide``; the further columns of the slide table as text; ``tissue_mm2``, ``nuclei``,
        ``nuclei_per_mm2``; count, density and share of each class (``nuclei:NAME`` …); the median of each measurement
        except the orientation (``area_um2_median`` …); the scores if any slide has a truth; ``mpp``; ``blur_um``,
        ``blurred_share``, ``unreadable_share``, ``doubtful_cells``, ``ink_fraction`` and ``warnings`` (count), some of
        which are missing for slides processed by older versions; ``seconds``, ``peak_rss_mb``. A column of the slide
        table whose name is already taken is prefixed with ``table:``.
    """
    import pyarrow as pa

    good, real, whole = cohort.good, pa.float64(), pa.int64()
    scores, focus = ([row.get(key) or {} for row in good] for key in ("evaluation", "focus"))
    peaks = [max(one["peak_rss_mb"] for one in (row, *row["stages"].values())) for row in good]
    own = _counts(good)
    if any(scores):
        own |= {name: pa.array([one.get(name) for one in scores], real) for name in SCORES}
    own |= {
        "mpp": pa.array([(row.get("mpp") or [None])[0] for row in good], real),
        "blur_um": pa.array([one.get("blur_um") for one in focus], real),
        "blurred_share": pa.array([one.get("blurred_share") for one in focus], real),
        "unreadable_share": pa.array([row.get("unreadable_share") for row in good], real),
        "doubtful_cells": pa.array([row.get("doubtful_cells") for row in good], whole),
        "ink_fraction": pa.array([row.get("ink_fraction") for row in good], real),
        "warnings": pa.array([len(row["warnings"]) for row in good], whole),
        "seconds": pa.array([row["total_seconds"] for row in good], real),
        "peak_rss_mb": pa.array(peaks, real),
    }
    return _with_slides(cohort, good, own)


def region_table(cohort: Cohort) -> pa.Table:
    """Make the table of regions of finished slides.

    It has one row for each region, and for each slide with regions one more for everything that lies in none of them.

    Returns
    -------
    pyarrow.Table
        Columns: ``slide``, the further columns of the slide table, ``region``, ``area_mm2``, and the columns of
        `cohort_table` for tissue, nuclei, classes and medians.
    """
    import pyarrow as pa

    rows = [
        {"slide": row["slide"], "extra": row["extra"]} | one for row in cohort.good for one in row.get("regions", ())
    ]
    own = {
        "region": pa.array([row["region"] for row in rows], pa.string()),
        "area_mm2": pa.array([row["area_mm2"] for row in rows], pa.float64()),
    }
    return _with_slides(cohort, rows, own | _counts(rows))


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """Columns for tissue, nuclei, classes and medians; rows are slides or regions."""
    import pyarrow as pa

    real, whole = pa.float64(), pa.int64()
    own: dict[str, pa.Array] = {
        "tissue_mm2": pa.array([row["tissue_mm2"] for row in rows], real),
        "nuclei": pa.array([row["nuclei"] for row in rows], whole),
        "nuclei_per_mm2": pa.array([row["nuclei_per_mm2"] for row in rows], real),
    }
    for name in dict.fromkeys(name for row in rows for name in row["composition"]):
        found = [row["composition"].get(name, {}) for row in rows]
        own[f"nuclei:{name}"] = pa.array([one.get("count", 0) for one in found], whole)
        own[f"nuclei_per_mm2:{name}"] = pa.array([one.get("per_mm2") for one in found], real)
        own[f"share:{name}"] = pa.array([one.get("share") for one in found], real)
    for name in RANKED:
        own[f"{name}_median"] = pa.array([(row["quantiles"].get(name) or {}).get("50") for row in rows], real)
    return own


def _with_slides(cohort: Cohort, rows: Sequence[Mapping[str, Any]], own: dict[str, pa.Array]) -> pa.Table:
    """Make a table of the slides' names, the further columns of the slide table, and the columns `own`."""
    import pyarrow as pa

    columns = {"slide": pa.array([row["slide"] for row in rows], pa.string())}
    for name in cohort.table.columns:
        shown = f"table:{name}" if name in own or name == "slide" else name
        columns[shown] = pa.array([row["extra"].get(name) for row in rows], pa.string())
    return pa.table(columns | own)


def cell(value: Any) -> str:
    """Format a value as the text of a TSV cell.

    Missing values are empty; line breaks and tabs become spaces. Text that a spreadsheet would interpret as a formula
    is prefixed with an apostrophe, unless it is a number.

    >>> [cell(value) for value in (None, 2.5, "-2.5", "=1+1", "a\\tb")]
    ['', '2.5', '-2.5', "'=1+1", 'a b']
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return f"{value:.10g}" if isinstance(value, float) else str(value)
    text = " ".join(value.splitlines()).replace("\t", " ")
    if text.lstrip()[:1] in ("=", "+", "-", "@"):
        try:
            float(text)
        except ValueError:
            return f"'{text}"
    return text


def write_tsv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table as TSV, see `cell`. Text with quotes is quoted, as spreadsheets and pandas expect it."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow([cell(name) for name in header])
        writer.writerows([cell(value) for value in row] for row in rows)


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PipelineError(f"{what} {str(path)!r} cannot be read: {error}") from None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def run_manifest(
    cohort: Cohort, results: Path, *, settings: dict[str, Any] | None, model: Path | None
) -> dict[str, Any]:
    """Return the provenance of a run: versions, settings, model card, and the slides with their hashes.

    Parameters
    ----------
    cohort : Cohort
        The run.
    results : pathlib.Path
        The results folder.
    settings : dict or None
        The settings.
    model : pathlib.Path or None
        Folder of the model package. Without it, only the model's name and hash are given, from the slides' metrics.

    Returns
    -------
    dict
        The content of ``manifest.json``, except the hashes of the outputs.
    """
    card: dict[str, Any] = {}
    if model is not None:
        card = _read_json(model / "model.json", "model card")
    elif cohort.good:
        first = cohort.good[0]
        card = {"name": first.get("model"), "sha256": first["hashes"].get("model")}
    good = {row["slide"]: row for row in cohort.good}
    waiting = set(cohort.waiting)

    def status(slide: str) -> str:
        return "ok" if slide in good else "waiting" if slide in waiting else "failed"

    return {
        "created": provenance.now(),
        "platform": platform.platform(),
        "results": os.path.abspath(results),
        "versions": provenance.versions(),
        "git": provenance.git_state(),
        "config": settings,
        "model": card,
        "classifier": next((row["classifier"] for row in cohort.good if "classifier" in row), None),
        "slides": [
            {
                "slide": entry.name,
                "path": str(entry.path),
                "status": status(entry.name),
                "quick_hash": cohort.hashes[entry.name],
                "bytes": _size(entry.path),
                "nuclei": good[entry.name]["nuclei"] if entry.name in good else None,
                "code": provenance.code_of(good[entry.name]) if entry.name in good else None,
            }
            for entry in cohort.table
        ],
        "slides_ok": len(cohort.good),
        "slides_failed": len(cohort.failed),
        "slides_waiting": len(cohort.waiting),
    }


def run_cohort(
    results: Path,
    slides: Path,
    *,
    tsv: Path,
    parquet: Path,
    failed: Path,
    report: Path,
    manifest: Path,
    regions_tsv: Path,
    regions_parquet: Path,
    config: Path | None = None,
    model: Path | None = None,
    under_way: Collection[str] = (),
) -> Mapping[str, Any]:
    """Run the stage. The outputs are moved into place together, the manifest last.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.
    slides : pathlib.Path
        The run's slide table.
    tsv, parquet, failed, report, manifest : pathlib.Path
        ``cohort.tsv``, ``cohort.parquet``, ``failed.tsv``, ``report.html`` and ``manifest.json`` to write.
    regions_tsv, regions_parquet : pathlib.Path
        ``regions.tsv`` and ``regions.parquet``, written if the slide table has regions, removed otherwise.
    config : pathlib.Path or None
        The settings as JSON.
    model : pathlib.Path or None
        See `run_manifest`.
    under_way : collection of str
        See `gather`.

    Returns
    -------
    mapping
        The manifest.
    """
    import pyarrow.parquet as pq

    from pipeline.report.page import write_report

    settings = None if config is None else _read_json(config, "settings")
    cohort = gather(results, slides, (settings or {}).get("classifier"), under_way)
    table = cohort_table(cohort)
    record = run_manifest(cohort, results, settings=settings, model=model)
    of_regions = [regions_tsv, regions_parquet] if any(entry.regions for entry in cohort.table) else []
    finals = [tsv, parquet, failed, *of_regions, report, manifest]
    layout = RunLayout(results)
    for path in finals:
        path.parent.mkdir(parents=True, exist_ok=True)
    with held(manifest.with_name(f".lock-{manifest.name}")), whole_files(*finals) as parts:
        write_tsv(parts[0], table.column_names, zip(*table.to_pydict().values(), strict=True))
        pq.write_table(table, parts[1], compression="zstd")
        write_tsv(parts[2], FAILED_COLUMNS, ([item[name] for name in FAILED_COLUMNS] for item in cohort.failed))
        if of_regions:
            regions = region_table(cohort)
            write_tsv(parts[3], regions.column_names, zip(*regions.to_pydict().values(), strict=True))
            pq.write_table(regions, parts[4], compression="zstd")
        write_report(
            parts[-2],
            rows=cohort.good,
            failed=cohort.failed,
            extra=cohort.table.columns,
            manifest=record,
            folders={row["slide"]: layout.slide(row["slide"]).root for row in cohort.good},
        )
        record["outputs"] = {path.name: file_sha256(part) for path, part in zip(finals[:-2], parts[:-2], strict=True)}
        write_json(parts[-1], record)
    if not of_regions:  # may be left from a run with regions
        regions_tsv.unlink(missing_ok=True)
        regions_parquet.unlink(missing_ok=True)
    log.info(
        "%d slides finished, %d failed, %d not finished yet", len(cohort.good), len(cohort.failed), len(cohort.waiting)
    )
    for item in cohort.failed:
        log.warning("slide %r failed at %s: %s", item["slide"], item["stage"], item["reason"])
    return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline cohort``."""
    parser.add_argument("--results", type=Path, required=True, metavar="DIR", help="results folder")
    parser.add_argument("--slides", type=Path, required=True, metavar="FILE", help="the run's slide table (slides.tsv)")
    for name, what in (
        ("tsv", "cohort.tsv"),
        ("parquet", "cohort.parquet"),
        ("failed", "failed.tsv"),
        ("report", "report.html"),
        ("manifest", "manifest.json"),
        ("regions_tsv", "regions.tsv, where slides have regions,"),
        ("regions_parquet", "regions.parquet, where slides have regions,"),
    ):
        flag = f"--out-{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, type=Path, required=True, metavar="FILE", help=f"{what} to write")
    parser.add_argument(
        "--config-json", dest="config", type=Path, metavar="FILE", help="the settings, for the provenance"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model package, for the provenance")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline cohort``."""
    run_cohort(**keywords(args))
    return 0
