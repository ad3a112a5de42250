"""Command ``status``: report how far a run has come, while it is under way or after it has ended."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.batch.lock import RUN_LOCK
from pipeline.batch.slide_table import resolve_slides
from pipeline.batch.stage import manifest_failure, read_manifest
from pipeline.errors import PipelineError
from pipeline.layout import STAGES, RunLayout, SlideLayout
from pipeline.progress import duration

RATE_SLIDES = 100
"""Number of most recently finished slides over which the rate is measured."""

FAILURES_TOLD = 10
"""Largest number of failed slides that a run lists at its end."""

SO_FAR = "so-far"
"""Folder, in the results folder, for the tables and the report of an unfinished run."""


@dataclass(frozen=True)
class Status:
    """How far a run has come.

    Parameters
    ----------
    slides, finished, failed : int
        Numbers of slides in the run, of slides with all of their results, and of slides that cannot be processed.
    stages : dict of str to int
        Numbers of all other slides by the last stage that they have completed; ``waiting`` counts those without any.
    per_hour : float or None
        Slides, finished or failed, per hour, over the last `RATE_SLIDES` of the run that is or was last under way; None
        before there are two.
    eta_seconds : float or None
        Time for the remaining slides at that rate.
    idle_seconds : float or None
        Time since a stage of any slide last ended.
    failures : tuple of dict
        ``slide``, ``stage``, ``reason`` and ``hint`` of each failed slide.
    strangers : tuple of str
        Names of results folders of slides that are no longer in the run.
    """

    slides: int
    finished: int
    failed: int
    stages: dict[str, int]
    per_hour: float | None
    eta_seconds: float | None
    idle_seconds: float | None
    failures: tuple[dict[str, str], ...]
    strangers: tuple[str, ...]


def stage_manifests(paths: SlideLayout) -> list[Path]:
    """Return the manifests of a slide's `STAGES`, in order."""
    own = {"infer": paths.maps, "summary": paths.metrics}
    return [own.get(stage) or getattr(paths, stage) for stage in STAGES]


def stages_done(paths: SlideLayout) -> tuple[int, float | None]:
    """Return how many stages a slide has completed, and when the last of them ended (seconds since the epoch).

    A manifest that is older than that of the stage before is from an earlier run and will be made again.
    """
    ended: float | None = None
    for count, path in enumerate(stage_manifests(paths)):
        try:
            changed = path.stat().st_mtime
        except OSError:
            return count, ended
        if ended is not None and changed < ended:
            return count, ended
        ended = changed
    return len(STAGES), ended


def _begun(results: Path) -> float:
    """Time at which the last run began, in seconds since the epoch, as its lock file says; 0 if it does not."""
    try:
        told = re.search(r"since (\S+)", (results / RUN_LOCK).read_text(encoding="utf-8"))
        return datetime.fromisoformat(told[1]).timestamp() if told else 0.0
    except (OSError, ValueError):
        return 0.0


def run_status(results: Path, slides: str | None = None, now: float | None = None) -> Status:
    """Return the status of a run from its results folder. Nothing is written.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.
    slides : str, optional
        The run's ``slides`` setting; by default, the table that the run wrote.
    now : float, optional
        Current time in seconds since the epoch.

    Raises
    ------
    PipelineError
        When the folder is not a results folder, or a manifest is damaged.
    """
    layout = RunLayout(results)
    if slides is None and not layout.slide_table.is_file():
        raise PipelineError(
            f"{results} has no {layout.slide_table.name}", "give a results folder, or the run's slides: --slides PATH"
        )
    table = resolve_slides(layout.slide_table if slides is None else slides)
    now = time.time() if now is None else now
    settings = _read_json(layout.settings) if layout.settings.is_file() else {}
    optional = [("classify", settings.get("classifier")), ("labels", settings.get("export", {}).get("labels"))]
    stages: Counter[str] = Counter()
    failures, ends, latest = [], [], None
    for entry in table:
        paths = layout.slide(entry.name)
        done, ended = stages_done(paths)
        if ended is not None:
            latest = max(latest or ended, ended)
        failure = manifest_failure(read_manifest(stage_manifests(paths)[done - 1])) if done else None
        further = [getattr(paths, stage) for stage, wanted in (*optional, ("regions", entry.regions)) if wanted]
        if failure is None and done == len(STAGES) and entry.regions is not None and paths.regions.exists():
            failure = manifest_failure(read_manifest(paths.regions))
        if failure is not None:
            failures.append({"slide": entry.name, **asdict(failure)})
        if done == len(STAGES) and failure is None and not all(path.exists() for path in further):
            stages[STAGES[-1]] += 1
        elif done == len(STAGES):
            ends.append(ended or now)
        elif failure is None:
            stages[STAGES[done - 1] if done else "waiting"] += 1
    own, folder = {layout.slide(entry.name).root.name for entry in table}, results / "slides"
    strangers = {path.name for path in folder.iterdir() if path.is_dir()} - own if folder.is_dir() else set()
    finished = len(table) - len(failures) - stages.total()
    begun = _begun(results)
    ends = sorted(end for end in ends if end >= begun)[-RATE_SLIDES:]
    per_hour = None
    if len(ends) > 1 and ends[-1] > ends[0]:
        per_hour = (len(ends) - 1) / (ends[-1] - ends[0]) * 3600
    left = stages.total()
    return Status(
        slides=len(table),
        finished=finished,
        failed=len(failures),
        stages={name: stages[name] for name in ("waiting", *STAGES) if stages[name]},
        per_hour=per_hour,
        eta_seconds=left / per_hour * 3600 if per_hour else None,
        idle_seconds=None if latest is None else max(0.0, now - latest),
        failures=tuple(failures),
        strangers=tuple(sorted(strangers)),
    )


def describe(status: Status, most: int | None = None) -> str:
    """Return the status as lines for a terminal, listing at most `most` failures."""
    left = status.slides - status.finished - status.failed
    total = "1 slide" if status.slides == 1 else f"{status.slides} slides"
    lines = [f"{total}: {status.finished} finished, {status.failed} failed, {left} to go"]
    if status.stages:
        parts = [
            f"{count} {'waiting' if name == 'waiting' else f'after {name}'}" for name, count in status.stages.items()
        ]
        lines.append("under way: " + ", ".join(parts))
    if left and status.per_hour is not None and status.eta_seconds is not None:
        rate = f"{status.per_hour:,.0f}" if status.per_hour >= 100 else f"{status.per_hour:.3g}"
        lines.append(f"rate: {rate} slides/h, about {duration(status.eta_seconds)} left")
    if left and status.idle_seconds is not None:
        lines.append(f"last change: {duration(status.idle_seconds)} ago")
    for item in status.failures[:most]:
        hint = f" ({item['hint']})" if item["hint"] else ""
        lines.append(f"failed: {item['slide']} at {item['stage']}: {item['reason']}{hint}")
    more = len(status.failures[most:]) if most is not None else 0
    if more:
        lines.append(f"failed: {more} more")
    if status.strangers:
        lines.append(f"no longer in the run, but still in its slides/: {some(status.strangers)}")
    return "\n".join(lines)


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise PipelineError(f"{path} is damaged", "delete it and run again")
    return value


def closing_words(results: Path, failed: bool) -> str:
    """Return the last message of a run: how far it has come, what to do next, and where to look.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.
    failed : bool
        Whether a job failed, or the run was interrupted.

    Raises
    ------
    PipelineError
        When the folder is not a results folder, or a manifest is damaged.
    """
    layout, now = RunLayout(results), time.time()
    status = run_status(results, now=now)
    lines = [describe(status, most=FAILURES_TOLD)]
    if failed:
        lines.append("not finished: run the same command again to continue")
        lines.append(f"logs of its jobs: {os.path.abspath(results / 'logs')}")
        return "\n".join(lines)
    if status.failed:
        lines.append("fix the cause and run the same command again: only the failed slides are processed")
        lines.append(f"all that failed: {os.path.abspath(layout.failed)}")
    # A report that is older than the last stage is from an earlier run, as when this one was asked for other outputs.
    if layout.report.is_file() and now - layout.report.stat().st_mtime <= (status.idle_seconds or 0):
        lines.append(f"report: {os.path.abspath(layout.report)}")
    return "\n".join(lines)


def write_so_far(results: Path, slides: str | None = None) -> Path:
    """Write tables and report of the slides that are finished so far, separate from those of the whole run.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.
    slides : str, optional
        See `run_status`.

    Returns
    -------
    pathlib.Path
        The folder with ``cohort.tsv``, ``cohort.parquet``, ``failed.tsv``, ``report.html`` and ``manifest.json``, and
        with ``regions.tsv`` and ``regions.parquet`` if slides have regions.
    """
    from pipeline.batch.slide_table import write_table
    from pipeline.cohort import run_cohort

    layout = RunLayout(results)
    out = results / SO_FAR
    out.mkdir(parents=True, exist_ok=True)
    table = layout.slide_table
    entries = resolve_slides(table if slides is None else slides)
    if slides is not None:
        table = out / layout.slide_table.name
        write_table(entries, table)
    run_cohort(
        results,
        table,
        tsv=out / layout.cohort_tsv.name,
        parquet=out / layout.cohort_parquet.name,
        regions_tsv=out / layout.regions_tsv.name,
        regions_parquet=out / layout.regions_parquet.name,
        failed=out / layout.failed.name,
        report=out / layout.report.name,
        manifest=out / layout.manifest.name,
        config=layout.settings if layout.settings.is_file() else None,
        under_way=[one.name for one in entries if stages_done(layout.slide(one.name))[0] < len(STAGES)],
    )
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline status``."""
    parser.add_argument(
        "results", type=Path, nargs="?", default=Path("results"), metavar="RESULTS",
        help="results folder of a run (default: results)",
    )  # fmt: skip
    parser.add_argument("--slides", metavar="PATH", help="the run's slides, where it has not written their table yet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--report", action="store_true", help=f"write tables and report of the finished slides to RESULTS/{SO_FAR}"
    )


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline status``."""
    status = run_status(args.results, args.slides)
    report: dict[str, Any] = {}
    if args.report:
        report = {"report": os.path.abspath(write_so_far(args.results, args.slides) / "report.html")}
    if args.json:
        print(json.dumps(asdict(status) | report, indent=1))
    else:
        print(describe(status))
        if report:
            print(f"so far: {report['report']}")
    return 0
