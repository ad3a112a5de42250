"""Reports of trainings: curves that are read whole, pages that need nothing else, pictures of fields."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.errors import ERRORS, kinds_of_error
from pipeline.evaluation.metrics import Overlaps
from pipeline.report.curves import (
    compared_charts,
    draw_charts,
    line_chart,
    read_curves,
    smoothed,
    thin,
    training_charts,
)
from pipeline.report.training import interval_chart, table, write_protocol_report, write_training_report
from pipeline.slides.synthetic import make_field
from pipeline.training.field import Field
from pipeline.training.panel import MADE_UP, MISSED, chosen_fields, crowded_window, mistakes, write_panel

NASTY = "<script>alert(1)</script> & {{ 7*7 }} $x$"


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as image:
        return image.size


def write_log(folder: Path, start: int, rows: list[tuple[int, str, str]]) -> None:
    path = folder / f"log-{start:07d}"
    path.mkdir(parents=True)
    text = "epoch,step,train/loss,val/aji\n" + "".join(f"0,{s - 1},{loss},{aji}\n" for s, loss, aji in rows)
    (path / "metrics.csv").write_text(text)


def test_curves_of_several_starts_are_one(tmp_path: Path) -> None:
    write_log(tmp_path, 0, [(10, "3", ""), (20, "2", ""), (20, "", "0.1"), (30, "9", "")])
    write_log(tmp_path, 20, [(30, "1", ""), (40, "0.5", ""), (40, "", "0.4")])
    curves = read_curves(tmp_path)
    assert curves["train/loss"][0].tolist() == [10, 20, 30, 40]  # the first run's after 20 counts no more
    assert curves["train/loss"][1].tolist() == [3, 2, 1, 0.5]
    assert curves["val/aji"][1].tolist() == [0.1, 0.4]
    assert read_curves(tmp_path / "none") == {}


def test_smoothing_keeps_a_constant_and_calms_noise() -> None:
    np.testing.assert_allclose(smoothed(np.full(50, 2.0)), 2.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert smoothed(noise, 0.1)[100:].std() < 0.3 * noise[100:].std()
    assert smoothed(np.array([4.0])).tolist() == [4.0]


def test_long_curves_are_thinned() -> None:
    steps, values = thin((np.arange(10_000), np.arange(10_000) * 2.0))
    assert len(steps) == 400
    assert (steps[-1], values[-1]) == (9999, 19998)


def test_lines_stay_within_the_chart() -> None:
    steps = np.arange(1, 101)
    values = np.r_[1e6, np.linspace(3, 1, 99)]  # one wild value does not flatten the rest
    chart = line_chart("loss", "Loss", [("training", (steps, values))], smooth=True)
    assert chart is not None
    assert float(chart["y"][-1]["label"]) < 10
    points = np.array([p.split(",") for p in chart["lines"][0]["behind"].split()], float)
    assert points[:, 0].min() >= chart["left"]
    assert points[:, 0].max() <= chart["right"]
    assert points[:, 1].min() >= chart["top"]
    assert points[:, 1].max() <= chart["bottom"]
    assert line_chart("x", "x", []) is None
    one = line_chart("x", "x", [("a", (np.array([5]), np.array([0.5])))])
    assert one is not None
    assert one["lines"][0]["dot"]


def curves() -> dict[str, Any]:
    steps = np.arange(10, 110, 10)
    names = ("train/loss", "val/loss", "val/accuracy", "val/dice", "val/pixel_dice", "val/iou", "val/pixel_iou",
             "val/aji", "val/pq")  # fmt: skip
    return {name: (steps, np.linspace(0.2, 0.8, 10)) for name in names}


def test_every_wanted_chart_is_there(tmp_path: Path) -> None:
    charts = training_charts(curves(), per_epoch=25)
    assert [c["name"] for c in charts] == ["loss", "accuracy", "dice", "iou", "aji"]
    assert {c["below"] for c in charts} == {"step (25 an epoch)"}
    draw_charts(charts, tmp_path / "a.png")
    assert size_of(tmp_path / "a.png")[0] > 1000
    both = compared_charts({"a": curves(), "b": curves()})
    assert all(len(chart["lines"]) == 2 for chart in both)
    assert {c["title"] for c in both} >= {"Accuracy of pixels", "Dice of pixels", "IoU of pixels", "Validation loss"}


def test_best_median_worst() -> None:
    images = {str(i): {"aji": i / 10} for i in range(5)}
    assert chosen_fields(images) == {"4": "best", "2": "median", "0": "worst"}
    assert chosen_fields({"a": {"aji": 1}}) == {"a": "best"}
    assert list(chosen_fields({"a": {"aji": 0.1}, "b": {"aji": 0.9}}).values()) == ["best", "median"]


def test_the_window_is_where_the_nuclei_are() -> None:
    labels = np.zeros((600, 500), np.int32)
    labels[500:590, 20:60] = 1
    rows, columns = crowded_window(labels, 200)
    assert rows.start <= 500
    assert rows.stop >= 590
    assert columns.start <= 20
    assert (rows.stop - rows.start, columns.stop - columns.start) == (200, 200)
    small = crowded_window(np.ones((30, 40), np.int32), 200)
    assert [(s.start, s.stop) for s in small] == [(0, 30), (0, 40)]


def test_mistakes_are_coloured() -> None:
    truth, found = np.zeros((60, 60), np.int32), np.zeros((60, 60), np.int32)
    truth[5:20, 5:20] = found[5:20, 6:20] = 7  # matched
    truth[30:45, 5:20] = 3  # missed
    found[30:45, 35:50] = 9  # made up
    picture = mistakes(np.full((60, 60, 3), 200, np.uint8), truth, found).astype(int)
    assert np.ptp(picture[12, 12]) == 0
    for place, color in (((37, 12), MISSED), ((37, 42), MADE_UP)):
        mixed = picture[place]
        assert np.argmax(mixed) == np.argmax(color)
        assert np.argmin(mixed) == np.argmin(color)


def test_kinds_of_error() -> None:
    truth, found = np.zeros((90, 90), np.int32), np.zeros((90, 90), np.int32)
    truth[0:10, 0:10] = found[0:10, 0:9] = 1  # right
    truth[20:30, 0:10], truth[20:30, 10:20] = 2, 3
    found[20:30, 0:20] = 2  # merged
    truth[40:50, 0:20] = 4
    found[40:50, 0:9], found[40:50, 11:20] = 3, 4  # split
    truth[60:70, 0:10] = 5  # missed
    truth[80:90, 0:10] = 6
    found[80:90, 0:4] = 6  # outline
    found[0:10, 50:60] = 7  # made up
    counts = kinds_of_error(Overlaps.of(truth, found))
    assert counts == {"merged": 2, "split": 1, "missed": 1, "outline": 1, "false": 1}
    nothing = np.zeros_like(truth)
    assert kinds_of_error(Overlaps.of(nothing, nothing)) == dict.fromkeys(ERRORS, 0)
    assert kinds_of_error(Overlaps.of(truth, nothing))["missed"] == 6
    assert kinds_of_error(Overlaps.of(nothing, found))["false"] == 6


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """What a training leaves."""
    from pipeline.evaluation.means import PIXEL_SCORES, summarise
    from pipeline.evaluation.metrics import METRICS
    from pipeline.training.experiment import Experiment

    folder = tmp_path / "work"
    for start in (0, 20):
        write_log(folder / "heldout", start, [(start + 10, "1.5", ""), (start + 20, "1.2", "0.3")])
    fields, found, images = [], {}, {}
    for seed in range(3):
        image, labels = make_field(120, 100, 0.5, seed=seed)
        name = f"f{seed}"
        fields.append(Field(name, "s", f"p{seed}", "liver", 0.5, image, labels))
        found[name] = np.roll(labels, 2, axis=0)
        scores = dict.fromkeys((*METRICS, *PIXEL_SCORES), 0.4 + 0.1 * seed)
        images[name] = scores | dict.fromkeys(ERRORS, 1) | {"loss": 1.0, "organ": ("liver", NASTY)[seed % 2]}
    write_panel(folder / "panel.png", fields, found, images)
    source = {"kind": "labels", "path": "x"}
    experiment = Experiment.from_json({"name": "tiny", "data": [source], "description": NASTY})
    from dataclasses import asdict

    values = {
        "evaluation": {
            **summarise(images), "images": images, "protocol": "p", "rules": {"nucleus": 128}, "parameters_m": 1.25,
            "batchwise": {"loss": 1.0, "accuracy": 0.9, "dice": 0.8, "iou": 0.7, "batches": 3}, "steps": 40,
            "time": {"seconds": 80.0, "steps": 40, "device": "cpu"},
        },
        "experiment": asdict(experiment),
        "split": {"train": ["t"], "validation": [], "test": sorted(images), "patients": {"test": ["p"]}},
    }  # fmt: skip
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def assert_self_contained(html: str) -> None:
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "<script>alert" not in html
    assert "49" not in re.findall(r"<td[^>]*>([^<]*)</td>", html)  # what is written is not computed


def test_report_of_a_training(work: Path) -> None:
    write_training_report(work, area=1e6)
    html = (work / "report.html").read_text()
    assert_self_contained(html)
    for part in ("Loss", "0.500", "2000 ms a step", "1.25 M parameters", "data:image/jpeg;base64", "95 %: "):
        assert part in html
    assert size_of(work / "curves.png")[0] > 500
    assert size_of(work / "panel.png")[1] > 500


def test_classes_in_a_report(work: Path) -> None:
    from pipeline.evaluation.means import summarise

    rows = {"a": (6, 8, 7, 4.5), NASTY: (0, 2, 0, 0.0)}
    images = {"f": {"type_counts": {"right": 6, "matched": 7, "classes": rows}}, "g": {}}
    path = work / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "types": summarise(images)["types"]}))
    write_training_report(work)
    html = (work / "report.html").read_text()
    assert_self_contained(html)
    assert "85.7% of 7 matched nuclei are right. Means over classes: mPQ+ 0.300." in html  # R² wants two fields
    assert "0.600" in re.findall(r"<td[^>]*>([^<]*)</td>", html)


def test_report_of_training_on(work: Path) -> None:
    path = work / "evaluation.json"
    evaluation = json.loads(path.read_text())
    before = {"model": NASTY, "mean": dict.fromkeys(evaluation["mean"], 0.321)}
    path.write_text(json.dumps(evaluation | {"before": before}))
    write_training_report(work)
    html = (work / "report.html").read_text()
    assert_self_contained(html)
    assert "Before and after" in html
    assert "0.321" in re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert "nobody was held out" not in html
    path.write_text(json.dumps(evaluation | {"scores_of": "the one before"}))
    write_training_report(work)
    assert "nobody was held out: all scores here are those of the one before" in (work / "report.html").read_text()


def test_report_without_curves_or_picture(work: Path) -> None:
    import shutil

    shutil.rmtree(work / "heldout")
    (work / "panel.png").unlink()
    write_training_report(work)
    assert "<polyline" not in (work / "report.html").read_text()


@pytest.mark.parametrize("kind", ["crossval", "compare", "transfer"])
def test_reports_of_protocols(work: Path, tmp_path: Path, kind: str) -> None:
    from pipeline.training import protocols

    evaluation = json.loads((work / "evaluation.json").read_text())
    names = {
        "crossval": ["fold-0"],
        "compare": ["a", NASTY],
        "transfer": ["pretrain", "zero-shot", "scratch-0", "finetune-0"],
    }[kind]
    run = {name: json.loads((work / f"{name}.json").read_text()) for name in ("evaluation", "experiment", "split")}
    runs = {name: {**run, "folder": str(work)} for name in names}
    summary = getattr(protocols, f"{kind}_summary")(runs)
    write_protocol_report(kind, summary, runs, tmp_path)
    html = (tmp_path / f"{kind}.html").read_text()
    assert_self_contained(html)
    assert f"{evaluation['mean']['aji']:.3f}" in html
    assert size_of(tmp_path / f"{kind}.png")[0] > 500
    assert ("Means with 95 % intervals" in html) == (kind != "crossval")


def test_interval_chart_and_table() -> None:
    rows = [{"fold": "a", "aji": 0.5, "aji_low": 0.4, "aji_high": 0.6, "pq": 0.5, "dice": 0.8, "n": None},
            {"fold": "b", "aji": 0.7, "pq": 0.6, "dice": 0.9, "n": 3}]  # fmt: skip
    chart = interval_chart(rows, "fold")
    assert chart is not None
    marks = chart["groups"][0]["marks"]
    assert marks[0]["low"] < marks[0]["at"] < marks[0]["high"] < marks[1]["at"] <= 1080
    assert marks[1]["low"] is None
    assert interval_chart(rows[:1], "fold") is None
    made = table("t", rows)
    assert [c["title"] for c in made["columns"]] == ["Fold", "AJI", "PQ", "Dice", "n"]
    assert made["rows"][0][1]["small"] == "0.400–0.600"
    assert made["rows"][0][4]["text"] == "–"
