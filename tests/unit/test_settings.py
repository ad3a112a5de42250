"""Checks of the configuration and of the model package's files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.batch.settings import (
    check_folder,
    check_licence,
    check_model,
    check_passed,
    check_same_results,
    check_settings,
    check_stain,
    file_sha256,
    load_schema,
)
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[2]
SCHEMA = load_schema(ROOT / "workflow/schemas/config.schema.yaml")
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def test_schema_is_a_schema() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(SCHEMA)


def test_config_yaml_holds_every_setting_with_its_default() -> None:
    defaults = check_settings({}, SCHEMA)
    assert {**defaults, "train": None} == {**CONFIG, "train": None}


def test_every_line_of_config_yaml_that_sets_something_is_explained() -> None:
    lines = (ROOT / "config.yaml").read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line.strip() and not line.lstrip().startswith("#"):
            assert "#" in line or before.startswith("#"), line


def test_configuration_md_has_every_setting_with_its_default() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8").split("## Settings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_0-9.]+)` \| `?(.*?)`? \|", text, re.MULTILINE)
    defaults: dict[str, Any] = {}
    for name, value in check_settings({}, SCHEMA).items():
        if name not in ("train", "synthesis", "crossval", "compare", "transfer"):  # they have pages of their own
            section = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {}
            defaults |= section or {name: value}
    assert {name: yaml.safe_load(value) for name, value in rows} == defaults


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sldes": "x"}, "unknown setting 'sldes' .did you mean slides"),
        ({"stain": {"metod": "none"}}, "unknown setting 'stain.metod' .did you mean stain.method"),
        ({"zzz": 1}, "unknown setting 'zzz' .known: "),
        ({"min_area_um2": 1}, "unknown setting 'min_area_um2' .did you mean tissue.min_area_um2"),
        ({"keep": True}, "unknown setting 'keep' .did you mean infer.keep or instances.keep or tiles.keep"),
        ({"sldes": "x", "stian": 1, "mpp": -1}, "unknown setting 'sldes'.*and 2 more"),
        ({"stain": {"method": "vahadan"}}, "'stain.method'.*vahadan"),
        ({"mpp": "fast"}, "'mpp' must be number or null, got 'fast'"),
        ({"mpp": 0}, "'mpp'"),
        ({"tiles": {"tile": 100}}, "'tiles.tile'.*multiple of 64"),
        ({"tiles": None}, "'tiles' holds others, as 'tiles={tile: …}', got None"),
        ({"stain": "none"}, "'stain' holds others, as 'stain={method: …}', got 'none'"),
        ({"slides": None}, "'slides' must be string"),
        ({"slides": {"a": "b"}}, "'slides' must be string"),
        ({"results": "a{b}"}, "'results': no path may hold braces, angle brackets .*'a{b}'"),
        ({"results": "r<x>"}, "'results': no path may hold .*'r<x>'"),
        ({"model": "m<x>"}, "'model': no path may hold"),
        ({"scratch": "s>"}, "'scratch': no path may hold"),
        ({"infer": {"batch": 0}}, "'infer.batch'"),
        ({"tiles": {"keep": "perhaps"}}, "'tiles.keep' must be boolean"),
    ],
)
def test_wrong_settings_are_one_line_that_names_the_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        check_settings(config, SCHEMA)
    assert "\n" not in str(caught.value)


def test_nested_settings_of_the_command_line_come_as_text() -> None:
    checked = check_settings(
        {
            "tiles": {"keep": "true", "tile": "512"},
            "infer": {"batch": "Null"},
            "tissue": {"mpp": "4.5"},
            "licences": '["CC BY 4.0", "MIT"]',
            "slides": 2024,
        },
        SCHEMA,
    )
    assert checked["tiles"] == {"keep": True, "tile": 512, "max_unreadable": 0.02}
    assert checked["infer"]["batch"] is None
    assert checked["licences"] == ["CC BY 4.0", "MIT"]
    assert checked["tissue"]["mpp"] == 4.5
    assert checked["slides"] == "2024"
    for wrong in ("NaN", "Infinity", "-Infinity"):
        with pytest.raises(PipelineError, match=r"tissue\.mpp"):
            check_settings({"tissue": {"mpp": wrong}}, SCHEMA)


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    found = check_settings({"results": "~/out", "train": {"data": [{"kind": "labels", "path": "~/fields"}]}}, SCHEMA)
    assert (found["results"], found["train"]["data"][0]["path"]) == ("/home/me/out", "/home/me/fields")
    assert check_settings({"results": "~out"}, SCHEMA)["results"] == "~out"


def with_setting(name: str, value: Any) -> dict[str, Any]:
    settings = check_settings({}, SCHEMA)
    section, _, key = name.rpartition(".")
    (settings[section] if section else settings)[key] = value
    return settings


@pytest.mark.parametrize(
    ("name", "then", "now"),
    [
        ("mpp", None, 0.25),
        ("model", "models/default", "models/accurate"),
        ("stain.method", "model", "none"),
        ("classifier", "a/one.npz", "a/two.npz"),
    ],
)
def test_results_of_other_settings_are_refused(tmp_path: Path, name: str, then: Any, now: Any) -> None:
    made = tmp_path / "settings.json"
    made.write_text(json.dumps(with_setting(name, then)))
    with pytest.raises(PipelineError, match=rf"made with {name} .*--forceall") as error:
        check_same_results(made, with_setting(name, now))
    assert "\n" not in str(error.value)
    check_same_results(made, with_setting(name, then))


@pytest.mark.parametrize(
    ("name", "then", "now"),
    [
        ("model", "models/default", "/home/me/models/default"),
        ("classifier", None, "one.npz"),  # nothing is there of it
        ("instances.block", 2048, 1024),  # changes no nucleus
        ("results", "out", "/elsewhere/out"),
    ],
)
def test_results_of_settings_that_come_to_the_same(tmp_path: Path, name: str, then: Any, now: Any) -> None:
    made = tmp_path / "settings.json"
    made.write_text(json.dumps(with_setting(name, then)))
    check_same_results(made, with_setting(name, now))


def test_results_from_before_there_was_a_setting(tmp_path: Path) -> None:
    made = tmp_path / "settings.json"
    made.write_text(json.dumps({"model": "models/default", "stain": {"method": "model"}}))
    check_same_results(made, check_settings({"stain": {"strength": 0.5}}, SCHEMA))
    made.write_text("{")
    with pytest.raises(PipelineError, match="cannot be read"):
        check_same_results(made, check_settings({}, SCHEMA))


def test_a_file_is_no_folder_for_results(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for good in (tmp_path, tmp_path / "new", tmp_path / "new" / "deeper", Path("r")):
        check_folder("results", good)
    for bad in (tmp_path / "file", tmp_path / "file" / "r", tmp_path / "file" / "r" / "s"):
        with pytest.raises(PipelineError, match=r"^setting 'results': '.*/file' is a file, not a folder \(choose"):
            check_folder("results", bad)


def test_results_that_snakemake_would_take_for_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for good in (Path("other"), Path("x/default"), tmp_path / "x" / "default"):
        check_folder("results", good)
    for bad in (Path("default"), Path("default/r"), Path("x/../default"), tmp_path / "default"):
        with pytest.raises(PipelineError, match="for a profile"):
            check_folder("results", bad)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    card = json.loads((ROOT / "models/hematoxylin/model.json").read_text(encoding="utf-8"))
    card |= {"name": "x", "sha256": file_sha256(tmp_path / "weights.safetensors")}
    (tmp_path / "model.json").write_text(json.dumps(card), encoding="utf-8")
    return tmp_path


def test_model_is_checked(package: Path) -> None:
    assert check_model(package)["name"] == "x"


def test_changed_weights_are_refused(package: Path) -> None:
    (package / "weights.safetensors").write_bytes(b"other weights")
    with pytest.raises(PipelineError, match=r"weights\.safetensors has sha256 \w{12}…, its card says \w{12}…"):
        check_model(package)


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_incomplete_package_is_refused(package: Path, name: str) -> None:
    (package / name).unlink()
    with pytest.raises(PipelineError, match=rf"{name} is missing .*models/accurate, models/default") as caught:
        check_model(package)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{", "\xff"])
def test_damaged_card_is_refused(package: Path, text: str) -> None:
    (package / "model.json").write_text(text, encoding="latin-1")
    with pytest.raises(PipelineError, match="is damaged") as caught:
        check_model(package)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"nuclues": 140}, "unexpected .*'nuclues'"),
        ({"nucleus": "140"}, "nucleus must be a number, got '140'"),
        ({"nucleus": 300}, "nucleus must be within 1 and 255, got 300"),
        ({"min_area": -1}, "min_area must not be negative, got -1"),
    ],
)
def test_wrong_thresholds_are_found_before_a_run(package: Path, thresholds: dict[str, Any], message: str) -> None:
    card = check_model(package)
    card["thresholds"] |= thresholds
    (package / "model.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(PipelineError, match=rf"the card is damaged: .*{message} \(correct it, or fetch") as caught:
        check_model(package)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("accepted", [[], ["CC BY 4.0", "cc0 1.0"], ["CC0*"], ["*"]])
def test_licences_that_are_accepted(accepted: list[str]) -> None:
    check_licence({"licence": "CC0 1.0"}, Path("m"), accepted)


@pytest.mark.parametrize("licence", ["CC BY-NC-SA 4.0", "CC0 1.0 and more", "", None])
def test_licences_that_are_not(licence: str | None) -> None:
    with pytest.raises(
        PipelineError, match=r"model 'm': its licence is .*, the setting licences accepts CC0 1.0, CC BY"
    ):
        check_licence({"licence": licence}, Path("m"), ["CC0 1.0", "CC BY 4.0"])


@pytest.mark.parametrize(
    ("method", "strength", "accepted"),
    [("model", None, True), ("none", None, True), ("macenko", 0.5, True), ("vahadane", None, True),
     ("reinhard", 0.0, True), ("reinhard", None, False), ("histogram", 0.5, False)],
)  # fmt: skip
def test_stain_methods_without_a_reference(method: str, strength: float | None, accepted: bool) -> None:
    card = {"stain": {"method": "macenko", "reference": {"name": "x", "macenko": {}}}}
    if accepted:
        check_stain(card, Path("m"), method, strength)
    else:
        with pytest.raises(PipelineError, match=rf"'stain.method': model 'm' carries no stain reference for {method}"):
            check_stain(card, Path("m"), method, strength)


@pytest.mark.parametrize(
    "config", [{"mpp": math.nan}, {"stain": {"strength": math.nan}}, {"tissue": {"mpp": math.inf}}]
)
def test_settings_that_are_no_numbers(config: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=r"^setting '[a-z.]+' must be a number, got (nan|inf)"):
        check_settings(config, SCHEMA)


@pytest.mark.parametrize("value", ["$HOME/slides", "a`b`", 'it\'s "a"', "a\\b", "a\u00a0b", "tab\tb"])
def test_a_setting_that_cluster_jobs_would_get_changed(value: str) -> None:
    check_passed([])
    check_passed(["slides=/data/my slides", "results=/data/O'Brien", 'export={"labels": true}'])
    with pytest.raises(PipelineError, match="cannot pass this on to the jobs") as caught:
        check_passed(["results=r", f"slides={value}"])
    assert caught.value.hint == "write the setting into a file: --configfile FILE"
