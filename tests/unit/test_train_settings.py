"""The schema of the train section agrees with the classes that it becomes."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.batch.settings import check_settings, load_schema
from pipeline.errors import PipelineError
from pipeline.models.package import ModelPackage
from pipeline.training.data import IMPORTERS
from pipeline.training.experiment import Experiment, check_parts
from pipeline.training.inherit import inherited
from pipeline.training.synthesis import SynthesisSettings

ROOT = Path(__file__).parents[2]
SCHEMA = load_schema(ROOT / "workflow/schemas/train.schema.yaml")
EXPERIMENTS = sorted((ROOT / "config/experiments").glob("*.yaml"))
SOURCE = {"kind": "monuseg", "path": "data"}


def plain(value: Any) -> Any:
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def default_of(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def compare(kind: Any, schema: dict[str, Any], where: str) -> None:
    properties = schema["properties"]
    assert set(properties) == {f.name for f in fields(kind)}, where
    assert schema["additionalProperties"] is False, where
    for one in fields(kind):
        value, path = default_of(one), f"{where}.{one.name}"
        if is_dataclass(value):
            assert properties[one.name]["default"] == {}, path
            compare(type(value), properties[one.name], path)
        elif value is not MISSING:
            assert properties[one.name]["default"] == plain(value), path


def test_schema_agrees_with_the_classes() -> None:
    compare(Experiment, SCHEMA, "train")


def test_schema_knows_the_kinds_of_data() -> None:
    assert SCHEMA["properties"]["data"]["items"]["properties"]["kind"]["enum"] == list(IMPORTERS)


def test_schema_of_synthetic_fields_agrees_with_its_class() -> None:
    compare(SynthesisSettings, load_schema(ROOT / "workflow/schemas/synthesis.schema.yaml"), "synthesis")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiments_are_valid(path: Path) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    whole = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
    config["train"] = inherited(config["train"], lambda start: str(ROOT / start))
    experiment = Experiment.from_json(check_settings(config, whole)["train"])
    ships = (ROOT / "models" / path.stem).exists()  # a training would not write over it
    assert experiment.name == (f"{path.stem}-retrained" if ships else path.stem)
    assert experiment == Experiment.from_json(config["train"])  # the schema's defaults change nothing
    assert experiment.description


def test_what_trains_on_from_a_model_that_ships_is_like_it() -> None:
    """So that its weights, its stain and its thresholds fit."""
    seen = set()
    for path in EXPERIMENTS:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
        one = Experiment.from_json(inherited(section, lambda start: str(ROOT / start)))
        if one.start_from and (ROOT / one.start_from).is_dir():
            start = ModelPackage.load(ROOT / one.start_from)
            strength = {"more-organs": 0.25}.get(path.stem, start.stain["strength"])  # what suits its new fields
            same = (start.mpp, start.network, start.network_args, start.stain["method"], strength)
            assert (one.mpp, one.network, one.network_args, one.stain, one.stain_strength) == same, path
            assert not one.evaluation.rules, path
            seen.add(path.stem)
    assert seen == {"breast", "corrected", "more-organs"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedule": {}}, "unknown setting 'sedule' .did you mean schedule"),
        ({"schedule": {"step": 3}}, "unknown setting 'schedule.step' .did you mean schedule.steps"),
        ({"schedule": {"steps": 0}}, "'schedule.steps'"),
        ({"split": {"method": "magic"}}, "'split.method'.*magic"),
        ({"data": [SOURCE | {"wieght": 1}]}, "unknown setting 'data.0.wieght' .did you mean data.0.weight"),
        ({"data": [{"kind": "monuseg"}]}, "data.0.*path"),
        ({"augmentation": {"scale": [1]}}, "'augmentation.scale'"),
    ],
)
def test_wrong_sections_are_refused_before_anything_runs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        check_settings({"data": [SOURCE], **change}, SCHEMA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "train: no data"),
        ({"network": "resnet"}, r"unknown network 'resnet' \(choose from"),
        ({"patch": 301}, r"patch 301 does not suit resunet \(use a multiple of"),
        ({"patch": 64, "overlap": 40}, r"overlap 40 with patch 64 \(use at least 1 and at most half of patch\)"),
        ({"network_args": {"fold": 0}}, "fold 0"),
        ({"network": "hovernet-se", "network_args": {"layers": [3, 4]}}, "hovernet-se"),
        ({"network_args": {"width": [4, 6]}}, "train: network_args: network 'resunet': "),
        ({"start_from": "nowhere"}, "train: start_from: model 'nowhere': model.json is missing"),
        ({"teacher": "nowhere"}, "train: teacher: model 'nowhere': model.json is missing"),
    ],
)
def test_what_no_schema_can_tell_is_refused_before_anything_runs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        check_parts(Experiment.from_json(check_settings({"data": [SOURCE], **change}, SCHEMA)))
    assert "\n" not in str(caught.value)


def test_numbers_of_the_command_line_come_as_text() -> None:
    section = {
        "data": [SOURCE | {"weight": "0.5", "mpp_of": {"TCGA-HE": "0.5"}}],
        "network_args": {"widths": ["8", "16"], "name": "b3"},
        "augmentation": {"scale": ["1", "1.5"]},
    }
    checked = check_settings(section, SCHEMA)
    assert checked["data"][0]["weight"] == checked["data"][0]["mpp_of"]["TCGA-HE"] == 0.5
    assert checked["network_args"] == {"widths": [8, 16], "name": "b3"}
    assert checked["augmentation"]["scale"] == [1, 1.5]


@pytest.mark.parametrize(
    "path", [p for p in (*EXPERIMENTS, *ROOT.glob("config/*.yaml")) if "faithful" not in p.stem], ids=lambda p: p.stem
)
def test_fields_of_monuseg_at_half_the_magnification_are_read_so(path: Path) -> None:
    """All but the files that do as published code did, which say so at their head."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = config["train"]["data"] if "train" in config else config["compare"]["common"]["data"]
    for source in data:
        if source["kind"] == "monuseg":
            assert source["mpp_of"] == {f"TCGA-HE-{number}": 0.5 for number in (7128, 7129, 7130)}


@pytest.mark.parametrize("path", [p for p in EXPERIMENTS if "faithful" in p.stem], ids=lambda p: p.stem)
def test_faithful_files_say_what_is_not_the_same(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = text.partition("train:")[0]
    assert "Not the same" in head
    assert ("TCGA-HE-7128" in head) == ("kind: monuseg" in text)
