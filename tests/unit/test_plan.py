"""Which trainings the protocols are made of, and what they say together."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.batch.settings import check_settings, load_schema
from pipeline.errors import PipelineError
from pipeline.training.experiment import Experiment
from pipeline.training.plan import merged, plan_compare, plan_crossval, plan_synthesis, plan_transfer
from pipeline.training.protocols import crossval_summary, read_runs, transfer_summary, write_summary

ROOT = Path(__file__).parents[2]
SCHEMA = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
TRAIN = SCHEMA["properties"]["train"]


def settings(**section: Any) -> dict[str, Any]:
    sources = [{"kind": "monuseg", "path": "m"}, {"kind": "tnbc", "path": "t"}]
    return check_settings({"train": {"name": "x", "data": sources, **section}}, SCHEMA)


def test_merging_leaves_both_sides_alone() -> None:
    base, over = {"a": {"b": [1]}}, {"a": {"c": {"d": 1}}}
    result = merged(base, over)
    result["a"]["b"].append(2)
    result["a"]["c"]["d"] = 2
    assert (base, over) == ({"a": {"b": [1]}}, {"a": {"c": {"d": 1}}})


def test_synthetic_fields_depend_on_whose_fields_are_for_training() -> None:
    own = {"kind": "labels", "path": "made", "weight": 2.0}
    train = {
        "data": [{"kind": "tnbc", "path": "x", "weight": 0.5}, own],
        "mpp": 0.5,
        "seed": 3,
        "split": {},
        "patch": 9,
        "start_from": "m",
    }
    planned = plan_synthesis(train, {"count": 2}, Path("made"))
    assert planned["synthesis"] == {"count": 2}
    kept = {"mpp": 0.5, "seed": 3, "split": {}, "start_from": "m"}
    assert planned["train"] == {"data": [{"kind": "tnbc", "path": "x"}], **kept}


def test_every_planned_training_is_an_experiment() -> None:
    config = settings(final_steps=7)
    config["crossval"]["folds"] = 3
    runs = plan_crossval(config["train"], config["crossval"])
    assert list(runs) == ["fold-0", "fold-1", "fold-2", "final"]
    folds = [Experiment.from_json(run.settings) for run in runs.values()]
    assert [one.split.fold for one in folds[:3]] == [0, 1, 2]
    assert {one.final_steps for one in folds} == {0}
    assert (folds[3].split.method, folds[3].schedule.keep) == ("all-train", "last")
    config["crossval"]["final"] = False
    assert "final" not in plan_crossval(config["train"], config["crossval"])


def test_transfer() -> None:
    config = settings(schedule={"steps": 100, "learning_rate": 0.01})
    config["transfer"] |= {"folds": 2, "schedule": {"steps": 5}}
    runs = plan_transfer(config["train"], config["transfer"])
    assert list(runs) == ["pretrain", "zero-shot", "scratch-0", "finetune-0", "scratch-1", "finetune-1"]
    one = {name: Experiment.from_json(run.settings | {"start_from": run.start}) for name, run in runs.items()}
    assert one["pretrain"].split.exclude == ("breast",)
    assert [s["kind"] for s in one["pretrain"].data] == ["monuseg"]
    assert one["zero-shot"].split.method == "all-test"
    for arm in ("scratch-1", "finetune-1"):
        assert (one[arm].holdout, one[arm].split.fold, one[arm].schedule.steps) == ("tnbc", 1, 5)
        assert one[arm].split.exclude == ()
        assert [s["kind"] for s in one[arm].data] == ["tnbc"]
    assert one["finetune-1"].schedule.learning_rate == pytest.approx(0.002)
    assert {name for name, run in runs.items() if run.start} == {"zero-shot", "finetune-0", "finetune-1"}
    # Without pre-training means without: not even from the package that the pre-training starts from.
    runs = plan_transfer(config["train"] | {"start_from": "m", "start_share": 0.5}, config["transfer"])
    assert {name for name, run in runs.items() if run.settings["start_from"] is None} == {"scratch-0", "scratch-1"}
    assert runs["scratch-0"].settings["start_share"] == 0
    with pytest.raises(PipelineError, match="'elsewhere' and another are needed"):
        plan_transfer(config["train"], config["transfer"] | {"source": "elsewhere"})


def test_compare(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {name: a, schedule: {steps: 9, batch: 2}}")
    compare = {
        "experiments": ["a", {"experiment": "a", "name": "b", "train": {"schedule": {"batch": 5}}}],
        "common": {"schedule": {"steps": 3}},
    }
    runs = plan_compare(compare, [tmp_path], TRAIN)
    assert {name: (r.settings["schedule"]["steps"], r.settings["schedule"]["batch"]) for name, r in runs.items()} == {
        "a": (3, 2),
        "b": (3, 5),
    }
    (tmp_path / "damaged.yaml").write_text("train: [")
    (tmp_path / "bare.yaml").write_text("slides: x")
    for experiments, common, message in [
        (["zz"], {}, "no experiment 'zz'"),
        (["a", "a"], {}, "two experiments are called 'a'"),
        (["damaged"], {}, "cannot be read"),
        (["bare"], {}, "has no train section"),
        (["a"], {"schedule": {"step": 1}}, "experiment 'a': unknown setting 'schedule.step'"),
    ]:
        with pytest.raises(PipelineError, match=message) as caught:
            plan_compare({"experiments": experiments, "common": common}, [tmp_path], TRAIN)
        assert "\n" not in str(caught.value)


def test_the_comparison_that_ships_is_one_of_equals() -> None:
    config = check_settings(yaml.safe_load((ROOT / "config/compare.yaml").read_text(encoding="utf-8")), SCHEMA)
    runs = plan_compare(config["compare"], [ROOT / "config/experiments"], TRAIN)
    assert len(runs) == len(config["compare"]["experiments"]) > 5
    experiments = [Experiment.from_json(run.settings) for run in runs.values()]
    assert len({(e.schedule.steps, e.schedule.batch, e.schedule.size, e.mpp, e.seed) for e in experiments}) == 1
    assert len({str((e.data, e.split, e.validation, e.holdout)) for e in experiments}) == 1
    assert (
        len({(e.stain_strength, e.half_weights, e.evaluation.tune, e.evaluation.tune_on_training) for e in experiments})
        == 1
    )


def scores(value: float, organ: str = "liver") -> dict[str, Any]:
    names = ("aji", "aji_plus", "pq", "sq", "dq", "dice", "iou", "f1", "pixel_accuracy", "pixel_dice", "pixel_iou")
    return {**dict.fromkeys(names, value), "loss": 1 - value, "organ": organ}


def write_run(folder: Path, images: dict[str, float], **split: list[str]) -> Path:
    """Write what a training leaves."""
    from pipeline.evaluation.means import summarise

    folder.mkdir(parents=True)
    rows = {name: scores(value) for name, value in images.items()}
    evaluation = {
        **summarise(rows),
        "images": rows,
        "rules": {"nucleus": round(100 + 100 * min(images.values())), "markers": "distance", "smooth": 0.5},
        "batchwise": {"loss": 1.0, "dice": 0.5, "accuracy": 0.9, "iou": 0.4, "batches": 2},
        "protocol": "patients held out (seed 42, 1 fields); the last checkpoint; thresholds not tuned",
        "steps": 10,
        "time": {"seconds": 90, "steps": 10, "device": "cpu"},
        "parameters_m": 1.5,
    }
    experiment = Experiment.from_json(settings()["train"])
    section = {"name": "x", "network": experiment.network, "heads": experiment.heads, "mpp": 0.5, "seed": 42}
    section["schedule"] = {"steps": 10, "batch": 2, "size": 100, "devices": 1}
    sides = {"train": ["t"], "test": sorted(images), **split}
    files = {"evaluation": evaluation, "experiment": section, "split": sides | {"patients": {"test": sorted(images)}}}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def read_tsv(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_crossval_table(tmp_path: Path) -> None:
    folders = {
        f"fold-{i}": write_run(tmp_path / str(i), {f"f{i}{j}": 0.5 + 0.1 * i + 0.02 * j for j in range(3)})
        for i in range(3)
    }
    summary = write_summary("crossval", folders, tmp_path)
    rows = read_tsv(tmp_path / "crossval.tsv")
    assert [row["fold"] for row in rows] == ["fold-0", "fold-1", "fold-2", "all"]
    assert float(rows[-1]["aji"]) == pytest.approx(0.62)
    assert 0.55 < float(rows[-1]["aji_low"]) < 0.62 < float(rows[-1]["aji_high"]) < 0.69
    assert rows[-1]["fields"] == "9"
    assert "in the first fold the last checkpoint; thresholds not tuned; the scores are" in summary["protocol"]
    assert summary["spread"]["aji"] == pytest.approx(0.1, abs=1e-4)
    assert summary["rules"] == {"nucleus": 160, "markers": "distance", "smooth": 0.5}  # the middle fold's
    assert len(json.loads((tmp_path / "crossval.json").read_text())["images"]) == 9
    again = {name: {"evaluation": run["evaluation"], **run} for name, run in read_runs(folders).items()}
    again["more"] = again["fold-0"]
    with pytest.raises(PipelineError, match="f00 is tested in two folds"):
        crossval_summary(again)


def test_classes_counted_by_an_older_version_are_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0", {"f": 0.5})
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["images"]["f"]["type_counts"] = {"right": 1, "matched": 1, "classes": {"a": [1, 1, 2]}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(PipelineError, match=r"0/evaluation\.json: an older version.*delete evaluation\*\.json in that"):
        write_summary("crossval", {"fold-0": folder}, tmp_path)


def test_compare_table(tmp_path: Path) -> None:
    folders = {name: write_run(tmp_path / name, {"f": value}) for name, value in (("low", 0.4), ("high", 0.6))}
    summary = write_summary("compare", folders, tmp_path)
    rows = read_tsv(tmp_path / "compare.tsv")
    assert [row["experiment"] for row in rows] == ["high", "low"]
    assert summary["notes"] == []
    assert (rows[0]["megapixels_seen"], rows[0]["minutes"], rows[0]["parameters_m"]) == ("0.2", "1.5", "1.5")
    folders["other"] = write_run(tmp_path / "other", {"g": 0.9})
    notes = write_summary("compare", folders, tmp_path)["notes"]
    assert notes == ["other and low were not tested on the same fields"]


def test_transfer_table(tmp_path: Path) -> None:
    values = {
        "pretrain": {"m": 0.7},
        "zero-shot": {"a": 0.3, "b": 0.5, "c": 0.1},
        "scratch-0": {"a": 0.4},
        "finetune-0": {"a": 0.5},
        "scratch-1": {"b": 0.6},
        "finetune-1": {"b": 0.9},
    }
    folders = {name: write_run(tmp_path / name, images) for name, images in values.items()}
    summary = transfer_summary(read_runs(folders))
    means = {row["arm"]: row["aji"] for row in summary["rows"]}
    assert means == pytest.approx({"zero-shot": 0.4, "scratch": 0.5, "finetune": 0.7, "pretrain": 0.7})
    assert summary["gain"]["aji"][0] == pytest.approx(0.2)
    assert summary["fields"] == ["a", "b"]  # those that every arm was tested on


def test_unfinished_training_is_one_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"f": 0.5})
    (folder / "evaluation.json").unlink()
    with pytest.raises(PipelineError, match=r"evaluation\.json cannot be read") as caught:
        read_runs({"a": folder})
    assert "\n" not in str(caught.value)
