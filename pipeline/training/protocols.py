"""Joint results of the trainings of a protocol: tables for cross-validation, comparison and transfer."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.stage import whole_files
from pipeline.errors import PipelineError
from pipeline.evaluation.means import bootstrap_interval, patients_of, summarise
from pipeline.report.training import write_protocol_report
from pipeline.training.files import read_json, save_json

COLUMNS = ("aji", "aji_plus", "pq", "sq", "dq", "f1", "dice", "iou", "pixel_accuracy", "loss")
"""Scores that are columns of the tables."""


def read_runs(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Read the results of each training: ``evaluation``, ``experiment``, ``split`` and ``folder``, by name.

    Raises
    ------
    PipelineError
        When a training is not finished, or was scored by an incompatible older version of the pipeline.
    """
    runs = {}
    for name, folder in folders.items():
        evaluation = read_json(folder / "evaluation.json")
        counts = [image.get("type_counts", {}).get("classes", {}) for image in evaluation["images"].values()]
        if any(len(row) != 4 for classes in counts for row in classes.values()):
            raise PipelineError(
                f"{folder}/evaluation.json: an older version of the pipeline has counted the classes",
                "delete evaluation*.json in that folder and run again: the network is scored again, not trained",
            )
        runs[name] = {
            "evaluation": evaluation,
            "experiment": read_json(folder / "experiment.json"),
            "split": read_json(folder / "split.json"),
            "folder": str(folder),
        }
    return runs


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a tab-separated table, whole or not at all; columns are in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_files(path) as (staged,), staged.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _scores(mean: Mapping[str, Any], interval: Mapping[str, Any] | None = None) -> dict[str, Any]:
    row = {}
    for name in COLUMNS:
        if name in mean:
            row[name] = mean[name]
            if interval and name in interval:
                row[f"{name}_low"], row[f"{name}_high"] = interval[name]
    return row


def crossval_summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the folds into one evaluation, in which each field was tested once.

    Parameters
    ----------
    runs : mapping of str to mapping
        Results of the folds in their order, see `read_runs`.

    Returns
    -------
    dict
        As for a single evaluation: ``mean`` and ``interval_95`` over all fields, ``organs``, ``images``, ``rules``
        (medians over the folds), ``batchwise`` (means over the folds), ``protocol``. Also ``spread`` (standard
        deviations over the folds) and ``rows`` (one for each fold, then one for all fields).

    Raises
    ------
    PipelineError
        When a field was tested twice.
    """
    images: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        evaluation = run["evaluation"]
        twice = sorted(images.keys() & evaluation["images"].keys())
        if twice:
            raise PipelineError(f"crossval: field {twice[0]} is tested in two folds", "delete the folds' folders")
        images |= evaluation["images"]
        patients = len(run["split"]["patients"]["test"])
        rows.append(
            {"fold": name, "patients": patients, "fields": len(evaluation["images"]), **_scores(evaluation["mean"])}
        )
    summary = summarise(images)
    interval = summary["interval_95"]
    total = {"fold": "all", "patients": sum(row["patients"] for row in rows), "fields": len(images)}
    rows.append(total | _scores(summary["mean"], interval))
    spread = {
        name: round(float(np.std([row[name] for row in rows[:-1]], ddof=len(rows) > 2)), 4)
        for name in COLUMNS
        if name in rows[0]
    }
    rules = [run["evaluation"]["rules"] for run in runs.values()]
    middle = {
        key: value if isinstance(value, (str, bool)) else type(value)(np.median([rule[key] for rule in rules]))
        for key, value in rules[0].items()
    }
    batchwise = [run["evaluation"]["batchwise"] for run in runs.values()]
    first = next(iter(runs.values()))
    how = first["evaluation"]["protocol"].partition("; ")[2]  # the first part says who was held out
    return {
        **summary,
        "spread": spread,
        "images": images,
        "rules": middle,
        "batchwise": {key: round(float(np.mean([b[key] for b in batchwise])), 4) for key in batchwise[0]},
        "protocol": f"{len(runs)} folds by patient, each field tested once by a network that has not seen its patient "
        f"(seed {first['experiment']['seed']}); in the first fold {how}; the scores are those of the folds' networks",
        "rows": rows,
    }


def budget(run: Mapping[str, Any]) -> dict[str, Any]:
    """Resources of a training: network, steps, pixels seen, numbers of fields, time and device."""
    experiment, schedule = run["experiment"], run["experiment"]["schedule"]
    steps = run["evaluation"].get("steps", schedule["steps"])
    seen = steps * schedule["batch"] * schedule.get("devices", 1) * schedule["size"] ** 2
    times = run["evaluation"].get("time", {})
    return {
        "network": experiment["network"],
        "heads": "+".join(experiment["heads"]),
        "parameters_m": run["evaluation"].get("parameters_m"),
        "mpp": experiment["mpp"],
        "steps": steps,
        "megapixels_seen": round(seen / 1e6, 1),
        "train_fields": len(run["split"]["train"]),
        "test_fields": len(run["split"]["test"]),
        "minutes": None if not times else round(times["seconds"] / 60, 1),
        "device": times.get("device"),
    }


def compare_summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare experiments, the best AJI first.

    Returns
    -------
    dict
        ``rows`` (one for each experiment) and ``notes`` (differences in fields or budget that limit the comparison).
    """
    rows = []
    for name, run in runs.items():
        evaluation = run["evaluation"]
        batchwise = {f"batchwise_{key}": evaluation["batchwise"][key] for key in ("loss", "dice", "accuracy", "iou")}
        rows.append(
            {"experiment": name, **budget(run), **_scores(evaluation["mean"], evaluation["interval_95"]), **batchwise}
        )
    notes = []
    first = next(iter(runs.values()))
    for part, what in (("test", "tested on"), ("train", "trained on")):
        different = [n for n, run in runs.items() if set(run["split"][part]) != set(first["split"][part])]
        if different:
            notes.append(f"{', '.join(different)} and {next(iter(runs))} were not {what} the same fields")
    seen = {row["megapixels_seen"] for row in rows}
    if max(seen) > 1.01 * min(seen):
        notes.append(f"budgets differ: {min(seen):g} to {max(seen):g} megapixels seen in training")
    return {"rows": sorted(rows, key=lambda row: -row["aji"]), "notes": notes}


def transfer_summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compare, on the target's fields, pre-training alone, training from scratch and fine-tuning after pre-training.

    Parameters
    ----------
    runs : mapping of str to mapping
        See `read_runs` and `pipeline.training.plan.plan_transfer`.

    Returns
    -------
    dict
        ``rows`` (one for each way of training), ``gain`` (mean of the scores after fine-tuning minus those from
        scratch on the same fields, with its 95 % interval) and ``fields`` (names of these fields).
    """
    arms: dict[str, dict[str, Any]] = {"zero-shot": {}, "scratch": {}, "finetune": {}}
    for name, run in runs.items():
        arm = name if name == "zero-shot" else name.rpartition("-")[0]
        if arm in arms:
            arms[arm] |= run["evaluation"]["images"]
    fields = sorted(set.intersection(*(set(images) for images in arms.values())))
    titles = {
        "zero-shot": "pre-trained, not trained on the target",
        "scratch": "trained on the target, without pre-training",
        "finetune": "pre-trained, then trained on the target",
    }
    rows: list[dict[str, Any]] = []
    for arm, title in titles.items():
        summary = summarise({name: arms[arm][name] for name in fields})
        rows.append(
            {"arm": arm, "what": title, "fields": len(fields), **_scores(summary["mean"], summary["interval_95"])}
        )
    before = runs["pretrain"]["evaluation"]
    rows.append(
        {
            "arm": "pretrain",
            "what": "the pre-trained network on its own held-out fields",
            "fields": len(before["images"]),
            **_scores(before["mean"], before["interval_95"]),
        }
    )
    gain = {}
    patients = patients_of({field: arms["finetune"][field] for field in fields})
    for name in ("aji", "pq", "dice", "iou"):
        difference = np.array([arms["finetune"][f][name] - arms["scratch"][f][name] for f in fields])
        gain[name] = [round(float(v), 4) for v in (difference.mean(), *bootstrap_interval(difference, patients))]
    return {"rows": rows, "gain": gain, "fields": fields}


def write_summary(kind: str, folders: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write table, summary and report of a protocol: ``KIND.tsv``, ``KIND.json``, ``KIND.html``, ``KIND.png``.

    Parameters
    ----------
    kind : str
        ``crossval``, ``compare`` or ``transfer``.
    folders : mapping of str to pathlib.Path
        Folder of each training of the protocol, by name.
    out : pathlib.Path
        Folder to write to.

    Returns
    -------
    dict
        The summary.

    Raises
    ------
    PipelineError
        See `read_runs` and `crossval_summary`.
    """
    runs = read_runs(folders)
    summary = {"crossval": crossval_summary, "compare": compare_summary, "transfer": transfer_summary}[kind](runs)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / f"{kind}.tsv", summary["rows"])
    save_json(out / f"{kind}.json", summary)
    write_protocol_report(kind, summary, runs, out)
    return summary
