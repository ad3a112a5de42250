"""What a training takes over from the package that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.inherit import inherited

CARD = {
    "mpp": 0.25,
    "patch": 640,
    "overlap": 64,
    "network": {"name": "resunet", "args": {"widths": [4, 8], "fold": 2}},
    "heads": ["nucleus", "contour"],
    "stain": {"method": "reinhard", "reference": {}, "strength": 0.5},
    "licence": "CC BY 4.0",
    "tta": "flips",
}
ALL = {
    "mpp": 0.25,
    "patch": 640,
    "overlap": 64,
    "network": "resunet",
    "network_args": {"widths": [4, 8], "fold": 2},
    "heads": ["nucleus", "contour"],
    "stain": "reinhard",
    "stain_strength": 0.5,
    "licence": "CC BY 4.0",
    "evaluation": {"tta": "flips"},
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "model.json").write_text(json.dumps(CARD))
    return tmp_path


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in ALL.items() if name not in names}


@pytest.mark.parametrize(
    ("stated", "taken"),
    [
        ({}, ALL),
        ({"mpp": "0.25", "evaluation": {"tune": False}}, without("mpp", "evaluation")),
        ({"mpp": 0.5}, without("mpp", "patch", "overlap")),
        ({"overlap": 32}, without("overlap", "patch")),
        ({"network_args": {"widths": [8, 16]}, "heads": ["nucleus"]}, without("network_args", "heads")),
        ({"network": "unet"}, without("network", "network_args", "heads", "patch", "overlap", "evaluation")),
        ({"stain": "macenko"}, without("stain", "stain_strength")),
        ({"evaluation": {"tta": "none"}, "licence": "MIT"}, without("evaluation", "licence")),
    ],
)
def test_settings_left_out_are_those_of_the_package(
    package: Path, stated: dict[str, Any], taken: dict[str, Any]
) -> None:
    section = {"name": "on", "start_from": str(package)} | stated
    wanted = taken | section
    if wanted.get("evaluation") == {"tune": False}:
        wanted["evaluation"] = {"tune": False, "tta": "flips"}
    assert inherited(section) == wanted


def test_the_folder_may_lie_elsewhere(package: Path) -> None:
    assert inherited({"start_from": "m"}, lambda start: str(package) if start == "m" else start)["mpp"] == 0.25


@pytest.mark.parametrize(
    "card",
    [
        None,
        "[]",
        "{",
        json.dumps({"mpp": 0.5}),
        json.dumps(CARD | {"network": {"name": "ensemble", "args": {}}}),
        json.dumps(CARD | {"stain": None}),
    ],
)
def test_a_package_that_cannot_be_trained_on_gives_nothing(tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "model.json").write_text(card)
    section = {"name": "on", "start_from": str(tmp_path)}
    assert inherited(section) == section


@pytest.mark.parametrize("start", [None, 5, ["m"]])
def test_without_a_package_nothing_changes(start: Any) -> None:
    assert inherited({"start_from": start, "mpp": 0.5}) == {"start_from": start, "mpp": 0.5}
