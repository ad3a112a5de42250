"""Training as users start it: plans of the protocols, a cross-validation that is stopped and goes on, two processes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from runs import ROOT, read_json, run, write_toy_model

from pipeline.batch.settings import check_model
from pipeline.slides.synthetic import make_field

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fields as label maps, each a patient of its own."""
    root = tmp_path_factory.mktemp("data")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for index in range(4):
        image, labels = make_field(80, 80, 0.5, seed=index)
        cv2.imwrite(str(root / "images" / f"{index}.png"), image[..., ::-1])
        cv2.imwrite(str(root / "labels" / f"{index}.png"), labels.astype(np.uint16))
    return root


def section(data: Path, **changes: Any) -> dict[str, Any]:
    schedule = {"steps": 2, "batch": 1, "size": 64, "validate_every": 1, "workers": 0, **changes.pop("schedule", {})}
    return {
        "name": "tiny",
        "data": [{"kind": "labels", "path": str(data), "mpp": 0.5}],
        "holdout": "labels",
        "split": {"method": "patients", "test": 0.25},
        "validation": 1,
        "network_args": {"widths": [4, 6]},
        "schedule": schedule,
        "final_steps": 1,
        **changes,
    }


def test_plans(tmp_path: Path, data: Path) -> None:
    more = {"kind": "labels", "path": str(data), "mpp": 0.5, "name": "other"}
    train = section(data) | {"data": [*section(data)["data"], more]}
    compare = {"name": "both", "experiments": [{"experiment": "default", "name": name} for name in ("a", "b")]}
    config = {"train": train, "crossval": {"folds": 4}, "transfer": {"source": "other", "folds": 2}, "compare": compare}
    parts = {
        "train": {"train_model": 1, "train_settings": 1},
        "crossval": {"train_part": 4, "train_settings": 5, "crossval_table": 1, "crossval_final": 1},
        "transfer": {"train_part": 6, "train_settings": 6, "transfer_table": 1},
        "compare": {"train_part": 2, "train_settings": 2, "compare_table": 1},
    }
    for target, jobs in parts.items():
        done = run(tmp_path, config, "-n", target)
        assert done.code == 0, done.output
        assert done.counts == jobs | {target: 1, "total": sum(jobs.values()) + 1}


def test_synthetic_fields_are_made_for_who_learns_from_them(tmp_path: Path, data: Path) -> None:
    made = tmp_path / "results/synthesis/made/fields"
    own = {"kind": "labels", "path": "results/synthesis/made/fields", "name": "made"}
    train = section(data) | {"data": [*section(data)["data"], own], "stain": "none"}
    tiny = {"count": 1, "size": 32, "steps": 1, "width": 2, "blocks": 1, "discriminator_width": 2, "workers": 0}
    config = {"train": train, "synthesis": {"name": "made", **tiny}}
    done = run(tmp_path, config, "synthesize")
    assert done.code == 0, done.output
    assert {"images", "labels", "sheet.png", "synthesis.json"} <= {path.name for path in made.iterdir()}
    assert (tmp_path / "results/benchmarks/synthesis/made.tsv").is_file()
    # How often they are drawn, and for how long one waits, is no matter to them.
    train["data"] = [train["data"][0] | {"weight": 2}, own]
    late = {**config, "synthesis": {**config["synthesis"], "max_minutes": 1}}
    assert run(tmp_path, late, "-n", "train").counts == {"train_settings": 1, "train_model": 1, "train": 1, "total": 3}


def test_synthetic_fields_of_a_comparison_are_those_of_its_experiments(tmp_path: Path, data: Path) -> None:
    own = {"kind": "labels", "path": "results/synthesis/made/fields", "name": "made"}
    real = section(data)["data"]
    for name, sources in (("plain", real), ("learner", [*real, own])):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"train": section(data) | {"name": name, "data": sources}}))
    config = {"synthesis": {"name": "made"}, "compare": {"experiments": ["plain.yaml", "learner.yaml"]}}
    done = run(tmp_path, config, "-n", "compare")
    assert done.counts["synthetic_fields"] == 1
    done = run(tmp_path, config, "results/synthesis/made/settings.json")
    assert done.code == 0, done.output
    settings = json.loads((tmp_path / "results/synthesis/made/settings.json").read_text())
    assert [one["path"] for one in settings["train"]["data"]] == [str(data)]


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("compare", {}, "compare: no experiments"),
        ("transfer", {}, "transfer: data source 'tnbc' and another are needed"),
        ("compare", {"compare": {"experiments": ["unheard-of"]}}, "no experiment 'unheard-of'"),
        ("crossval", {"train": {"patch": 301}}, "patch 301 does not suit resunet (use a multiple of"),
        ("train", {"train": {"network_args": {"width": [4, 6]}}}, "train: network_args: network 'resunet': "),
        ("compare", {"compare": {"experiments": ["default"], "common": {"patch": 300}}}, "patch 300 does not suit"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    tmp_path: Path, data: Path, target: str, change: dict[str, Any], message: str
) -> None:
    config = {**change, "train": section(data) | change.get("train", {})}
    done = run(tmp_path, config, "-n", target)
    assert done.code != 0
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.output


def test_crossval_is_stopped_and_goes_on(tmp_path: Path, data: Path) -> None:
    config = {"train": section(data), "crossval": {"folds": 2}}
    late = {**config, "train": section(data, schedule={"max_minutes": 1e-6})}
    stopped = run(tmp_path, late, "crossval")
    assert stopped.code != 0
    assert (
        "the training stopped after 1e-06 minutes, at step 0 of 2 (run the same command again to go on)"
        in stopped.output
    )
    assert not (tmp_path / "results/training/tiny/crossval.tsv").exists()
    done = run(tmp_path, config, "crossval")
    assert done.code == 0, done.output
    with (tmp_path / "results/training/tiny/crossval.tsv").open() as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["fold"] for row in rows] == ["fold-0", "fold-1", "all"]
    assert rows[-1]["fields"] == "4"
    for name in ("crossval.html", "fold-0/report.html", "fold-1/curves.png", "fold-1/panel.png"):
        assert (tmp_path / "results/training/tiny" / name).stat().st_size > 5000
    card = read_json(tmp_path / "models/tiny-cv/model.json")
    assert "2 folds by patient" in card["metrics"]["protocol"]
    assert len(card["metrics"]["images"]) == 4
    for fold in range(2):
        assert (tmp_path / f"results/training/tiny/fold-{fold}/model/weights.safetensors").is_file()
    # The limit changes no result, so it reruns nothing; what does not concern the folds leaves them alone.
    assert run(tmp_path, late, "-n", "crossval").nothing
    without = {**config, "crossval": {"folds": 2, "final": False}}
    assert run(tmp_path, without, "-n", "crossval").nothing
    longer = run(tmp_path, {**config, "train": section(data, schedule={"steps": 3})}, "-n", "crossval")
    assert longer.counts["train_part"] == 2


def test_a_package_stays_until_the_next_is_there(tmp_path: Path, data: Path) -> None:
    package, config = tmp_path / "models/tiny", {"train": section(data)}

    def files() -> dict[str, bytes]:
        return {name: (package / name).read_bytes() for name in ("model.json", "weights.safetensors")}

    done = run(tmp_path, config, "train")
    assert done.code == 0, done.output
    assert "model: models/tiny, in runs --config model=models/tiny" in done.output
    assert f"look at: {tmp_path / 'results/training/tiny/report.html'}" in done.output
    first = files()
    assert run(tmp_path, config, "-n", "train").nothing
    # A run with this model on slides, whose settings say nothing of the training, leaves the training alone.
    (tmp_path / "a.svs").write_text("no slide")
    planned = run(tmp_path, {"slides": "a.svs", "model": "models/tiny", "train": {"name": "tiny"}}, "-n")
    assert planned.counts["inspect"] == 1, planned.output
    assert not [rule for rule in planned.counts if rule.startswith("train")]
    nowhere = [{"kind": "labels", "path": "nowhere", "mpp": 0.5}]
    failed = run(tmp_path, {"train": section(data) | {"data": nowhere}}, "train")
    assert failed.code != 0
    assert files() == first
    changed = {"train": section(data, final_steps=2)}
    longer = run(tmp_path, changed, "train")
    assert longer.code == 0, longer.output
    assert check_model(package)["sha256"] != json.loads(first["model.json"])["sha256"]
    package.rename(tmp_path / "elsewhere")
    assert run(tmp_path, changed, "-n", "train").counts["train_model"] == 1


@pytest.mark.parametrize(("target", "name"), [("train", "tiny"), ("crossval", "tiny-cv")])
def test_another_model_is_not_written_over(tmp_path: Path, data: Path, target: str, name: str) -> None:
    (tmp_path / "models").mkdir()
    write_toy_model(tmp_path / "models" / name)
    done = run(tmp_path, {"train": section(data)}, target)
    assert done.code != 0
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert f"models/{name} holds a model that the training in results/training/tiny" in line
    assert "another name" in line
    assert check_model(tmp_path / "models" / name)["name"] == "toy"


@pytest.mark.parametrize("scheduler", ["none", "slurm"])
def test_two_processes_train_together(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    if scheduler == "slurm":  # the environment of a job of one task
        for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE"):
            monkeypatch.setenv(f"SLURM_{name}", "1")
        for name in ("PROCID", "LOCALID", "NODEID"):
            monkeypatch.setenv(f"SLURM_{name}", "0")
    settings = section(data, schedule={"devices": 2, "device": "cpu"})
    (tmp_path / "section.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "train", "--config-json", str(tmp_path / "section.json"),
         "--work", str(tmp_path / "work"), "--out", str(tmp_path / "model"), "--threads", "1"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    spent = json.loads((tmp_path / "work/heldout/time.json").read_text())
    assert (spent["devices"], spent["steps"]) == (2, 2)
    assert (tmp_path / "model/weights.safetensors").is_file()
