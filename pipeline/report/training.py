"""Reports of trainings as self-contained pages: of an experiment, a cross-validation, a comparison or a transfer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.batch.stage import whole_files
from pipeline.evaluation.errors import ERRORS
from pipeline.progress import duration
from pipeline.report.curves import Curve, compared_charts, draw_charts, read_curves, training_charts
from pipeline.report.page import environment, nice_ticks, number, shrink_picture

PICTURE_BYTES = 900_000
"""Maximum bytes of an experiment's picture; up to four pictures on a page share them, more get a quarter each."""

TITLES = {
    "aji": "AJI", "aji_plus": "AJI+", "pq": "PQ", "sq": "SQ", "dq": "DQ", "f1": "F1", "dice": "Dice", "iou": "IoU",
    "pixel_accuracy": "Accuracy", "pixel_dice": "Dice of pixels", "pixel_iou": "IoU of pixels", "loss": "Loss",
}  # fmt: skip
"""Titles of the scores, in the order of the tables."""

WORDS = {
    "fold": "Fold", "experiment": "Experiment", "arm": "Arm", "what": "Training", "fields": "Fields",
    "patients": "Patients", "network": "Network", "heads": "Heads", "parameters_m": "Parameters, M", "mpp": "µm/px",
    "steps": "Steps", "megapixels_seen": "Mpx seen", "train_fields": "Trained on", "test_fields": "Tested on",
    "minutes": "Minutes", "model": "Model", "device": "Device", "organ": "Organ", "field": "Field", "n_truth": "Nuclei",
    "n_pred": "Found", "accuracy": "Accuracy", "batches": "Batches", "class": "Class", "r2": "R²",
    "missed": "Missed", "merged": "Merged", "split": "Split", "outline": "Outline", "false": "Made up",
    "batchwise_loss": "Loss, batch-wise", "batchwise_dice": "Dice, batch-wise",
    "batchwise_accuracy": "Accuracy, batch-wise", "batchwise_iou": "IoU, batch-wise", **TITLES,
}  # fmt: skip
"""Column titles of the tables."""

IN_FIELDS = ("aji", "aji_plus", "pq", "f1", "dice", "iou", "pixel_accuracy", "loss", "n_truth", "n_pred", *ERRORS)
"""Scores and counts in the table of fields."""

MAIN = ("aji", "pq", "dice", "pixel_accuracy")


def _cell(value: Any, low: Any, high: Any) -> dict[str, Any]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = number(value, 0 if isinstance(value, int) else 3)
        return {"value": value, "text": text, "small": f"{low:.3f}–{high:.3f}" if low is not None else ""}
    return {"value": None, "text": "–" if value is None else str(value), "small": ""}


def table(title: str, rows: Sequence[Mapping[str, Any]], text: str = "") -> dict[str, Any]:
    """Build a table for the template; ``X_low`` and ``X_high`` are shown in the cell of ``X``."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    keys = [k for k in keys if not k.endswith(("_low", "_high"))]
    columns = [
        {"title": WORDS.get(key, key), "numeric": any(isinstance(row.get(key), (int, float)) for row in rows)}
        for key in keys
    ]
    cells = [[_cell(row.get(k), row.get(f"{k}_low"), row.get(f"{k}_high")) for k in keys] for row in rows]
    return {"title": title, "text": text, "columns": columns, "rows": cells}


def types_table(types: Mapping[str, Any]) -> dict[str, Any]:
    """Build the table of the scores of each class of nuclei."""
    text = "All fields together, nuclei of known class. F1, SQ and PQ want the class right; R² is of counts by field."
    if types["accuracy"] is not None:
        text += f" {types['accuracy']:.1%} of {types['matched']} matched nuclei are right."
    means = (("mPQ+", types.get("mpq_plus")), ("R²", types.get("r2")))
    if told := ", ".join(f"{title} {value:.3f}" for title, value in means if value is not None):
        text += f" Means over classes: {told}."
    return table("Classes", [{"class": name, **row} for name, row in types["classes"].items()], text)


def interval_chart(rows: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any] | None:
    """Geometry of the chart of means with their intervals, one line per row; None for fewer than two rows."""
    if len(rows) < 2:
        return None
    scores = ("aji", "pq", "dice")
    left, width, line, head = 190.0, 1080.0, 24.0, 34.0
    gap = 40.0
    panel = (width - left - 24 - gap * (len(scores) - 1)) / len(scores)
    bottom = head + line * len(rows)
    groups = []
    for index, score in enumerate(scores):
        start = left + index * (panel + gap)
        top = nice_ticks(max(max(row.get(f"{score}_high", row[score]) for row in rows), 0.05), 4)

        def place(value: float, start: float = start, top: float = top[-1]) -> float:
            return round(start + panel * value / top, 1)

        marks = []
        for number_, row in enumerate(rows):
            low, high = row.get(f"{score}_low"), row.get(f"{score}_high")
            text = f"{row[label]}: {TITLES[score]} {row[score]:.3f}"
            marks.append(
                {
                    "y": head + line * (number_ + 0.5),
                    "at": place(row[score]),
                    "low": None if low is None else place(low),
                    "high": None if high is None else place(high),
                    "text": text if low is None else f"{text} ({low:.3f} to {high:.3f})",
                }
            )
        ticks = [{"at": place(t), "label": f"{t:g}"} for t in top]
        groups.append({"title": TITLES[score], "left": start, "ticks": ticks, "marks": marks})
    labels = [{"y": head + line * (i + 0.5), "text": str(row[label])} for i, row in enumerate(rows)]
    return {
        "width": width, "height": bottom + 26, "bottom": bottom, "left": left, "groups": groups, "labels": labels,
    }  # fmt: skip


def _facts(mean: Mapping[str, Any], interval: Mapping[str, Any], note: str) -> list[tuple[str, str, str]]:
    facts = []
    for name in MAIN:
        if name in mean:
            low, high = interval.get(name, (None, None))
            facts.append((f"{mean[name]:.3f}", TITLES[name], note if low is None else f"95 %: {low:.3f} to {high:.3f}"))
    return facts


def _picture(path: Path, caption: str, limit: int) -> list[dict[str, str]]:
    uri = shrink_picture(path, limit) if path.is_file() else None
    return [] if uri is None else [{"uri": uri, "caption": caption}]


def _render(**content: Any) -> str:
    defaults: dict[str, Any] = {
        "notes": [], "intervals": None, "charts": [], "charts_title": "Training", "pictures": [], "texts": [],
        "footer": "",
    }  # fmt: skip
    return environment().get_template("training.html.j2").render(**(defaults | content))


def write_training_report(work: Path, area: float | None = None) -> None:
    """Write ``report.html`` and ``curves.png`` of one experiment into its folder.

    Parameters
    ----------
    work : pathlib.Path
        Folder of the experiment, with ``evaluation.json``, ``experiment.json``, ``split.json``, ``heldout/`` and
        ``panel.png``.
    area : float, optional
        Pixels of all training fields together at the model's pixel size; an epoch is as many pixels.
    """
    evaluation, experiment, split = (_read(work / f"{name}.json") for name in ("evaluation", "experiment", "split"))
    schedule = experiment["schedule"]
    epoch = area / (schedule["batch"] * schedule["devices"] * schedule["size"] ** 2) if area else None
    charts = training_charts(read_curves(work / "heldout"), epoch)
    if charts:
        draw_charts(charts, work / "curves.png")
    notes = []
    if model := evaluation.get("scores_of"):
        notes = [f"nobody was held out: all scores here are those of {model}, from which this training went on"]
    html = _render(
        notes=notes,
        title=f"Training of {experiment['name']}",
        subtitle=experiment.get("description", ""),
        facts=_facts(evaluation["mean"], evaluation.get("interval_95", {}), "mean over fields"),
        tables=_training_tables(evaluation, experiment["name"]),
        charts=charts,
        pictures=_picture(work / "panel.png", "Best, median and worst field by AJI.", PICTURE_BYTES),
        details=_training_details(evaluation, experiment, split, epoch),
        texts=[("Settings", json.dumps(experiment, indent=1)), ("Split", json.dumps(split, indent=1))],
        footer="The same numbers are in evaluation.json, the curves in heldout/log-*/metrics.csv.",
    )
    _write(work / "report.html", html)


def _training_tables(evaluation: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Tables of the report of the experiment called `name`."""
    tables: list[dict[str, Any]] = []
    if before := evaluation.get("before"):
        sides = [(before["model"], before["mean"]), (name, evaluation["mean"])]
        rows = [{"model": model, **{k: mean[k] for k in TITLES if k in mean}} for model, mean in sides]
        text = f"Of the test fields: {before['model']}, from which this training went on, and what came out."
        tables.append(table("Before and after", rows, text))
    fields = [
        {"field": field, "organ": row.get("organ") or None, **{k: row[k] for k in IN_FIELDS if k in row}}
        for field, row in sorted(evaluation["images"].items(), key=lambda item: item[1]["aji"])
    ]
    text = "The worst first. Nuclei without a match (IoU above 0.5): missed, merged with another, split, badly outlined"
    tables.append(table("Scores of each field", fields, f"{text}; and found ones that are none."))
    organs = [
        {"organ": organ or "–", "fields": row["fields"], **{k: row[k] for k in TITLES if k in row}}
        for organ, row in evaluation.get("organs", {}).items()
    ]
    if len(organs) > 1:
        tables.append(table("Mean of each organ", organs))
    if "types" in evaluation:
        tables.append(types_table(evaluation["types"]))
    if batchwise := evaluation.get("batchwise"):
        row = {k: batchwise[k] for k in ("loss", "accuracy", "dice", "iou", "batches")}
        text = "Fields stretched to 1024 × 1024, cut into patches of 256, summed over batches of 8 patches, averaged"
        tables.append(table("Batch-wise scores", [row], f"{text} over batches. Not comparable with means over fields."))
    return tables


def _training_details(
    evaluation: Mapping[str, Any], experiment: Mapping[str, Any], split: Mapping[str, Any], epoch: float | None
) -> list[tuple[str, str]]:
    """Description of an experiment as pairs of title and text; `epoch` is the number of steps in an epoch."""
    schedule, times = experiment["schedule"], evaluation.get("time")
    spent = "–"
    if times:
        step = times["seconds"] / max(times["steps"], 1)
        spent = f"{duration(times['seconds'])} on {times['device']}, {1000 * step:.0f} ms a step"
        spent += f", {duration(step * epoch)} an epoch" if epoch else ""
    return [
        ("Protocol", evaluation["protocol"]),
        ("Data", ", ".join(source.get("name", source["kind"]) for source in experiment["data"])),
        ("Fields", f"{len(split['train'])} for training, {len(split['validation'])} for validation, "
                   f"{len(split['test'])} for testing"),
        ("Network", f"{experiment['network']}, {evaluation.get('parameters_m', 0):.2f} M parameters, heads "
                    f"{', '.join(experiment['heads'])}, {experiment['mpp']} µm/px"),
        ("Training", f"{evaluation.get('steps', schedule['steps'])} steps of {schedule['batch']} crops of "
                     f"{schedule['size']} pixels"),
        ("Time", spent),
        ("Thresholds", ", ".join(f"{k} {v}" for k, v in evaluation["rules"].items())),
    ]  # fmt: skip


def write_protocol_report(
    kind: str, summary: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]], out: Path
) -> None:
    """Write ``KIND.html`` and ``KIND.png`` of a cross-validation, comparison or transfer.

    Parameters
    ----------
    kind : str
        ``crossval``, ``compare`` or ``transfer``.
    summary : mapping
        Result of the protocol, see `pipeline.training.protocols`.
    runs : mapping of str to mapping
        By name of each training, its ``experiment`` and its ``folder``.
    out : pathlib.Path
        Folder to write to.
    """
    rows = summary["rows"]
    curves: dict[str, dict[str, Curve]] = {n: read_curves(Path(run["folder"]) / "heldout") for n, run in runs.items()}
    charts = compared_charts({name: found for name, found in curves.items() if found})
    label = {"crossval": "fold", "compare": "experiment", "transfer": "arm"}[kind]
    title = {"crossval": "Cross-validation", "compare": "Comparison of experiments", "transfer": "Transfer"}[kind]
    first = next(iter(runs.values()))["experiment"]
    best = rows[-1] if kind == "crossval" else rows[0]
    facts = _facts(best, {k: (best[f"{k}_low"], best[f"{k}_high"]) for k in MAIN if f"{k}_low" in best}, "")
    details: list[tuple[str, str]] = [("Trainings", ", ".join(runs))]
    tables = [table({"crossval": "Folds", "compare": "Experiments", "transfer": "Arms"}[kind], rows)]
    if kind == "crossval":
        subtitle = summary["protocol"]
        organs = [{"organ": k or "–", **v} for k, v in summary["organs"].items()]
        if len(organs) > 1:
            tables.append(table("Mean of each organ", organs))
        if "types" in summary:
            tables.append(types_table(summary["types"]))
        details.append(
            ("Standard deviation over folds", ", ".join(f"{TITLES[k]} {v}" for k, v in summary["spread"].items()))
        )
        details.append(("Middle thresholds", ", ".join(f"{k} {v}" for k, v in summary["rules"].items())))
    elif kind == "compare":
        subtitle = f"The best by AJI: {best['experiment']}"
    else:
        gain, low, high = summary["gain"]["aji"]
        subtitle = f"Pre-training adds {gain:+.3f} AJI on the same fields (95 %: {low:+.3f} to {high:+.3f})"
        details += [
            (f"{TITLES[k]}, pre-trained minus from scratch", f"{v[0]:+.4f} ({v[1]:+.4f} to {v[2]:+.4f})")
            for k, v in summary["gain"].items()
        ]
    pictures = []
    for name, run in runs.items():
        limit = PICTURE_BYTES // min(len(runs), 4)
        pictures += _picture(Path(run["folder"]) / "panel.png", f"{name}: best, median and worst field by AJI.", limit)
    if charts:
        draw_charts(charts, out / f"{kind}.png")
    html = _render(
        title=f"{title}: {first['name'].rpartition('-fold-')[0] or first['name']}" if kind == "crossval" else title,
        subtitle=subtitle,
        facts=facts,
        notes=summary.get("notes", []),
        tables=tables,
        intervals=interval_chart([row for row in rows if "aji_low" in row], label),
        charts=charts,
        charts_title="Validation during training",
        pictures=pictures,
        details=details,
        texts=[(f"Settings of {name}", json.dumps(run["experiment"], indent=1)) for name, run in runs.items()],
        footer=f"The same numbers are in {kind}.tsv and {kind}.json.",
    )
    _write(out / f"{kind}.html", html)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    with whole_files(path) as (staged,):
        staged.write_text(text, encoding="utf-8")
