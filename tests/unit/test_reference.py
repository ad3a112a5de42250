"""The choice of a stain reference, and bringing fields to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pipeline import staintools_backend
from pipeline.cli import main as cli
from pipeline.errors import PipelineError
from pipeline.kernels.stain import cumulative, fit_lab, tissue_mask, tissue_pixels
from pipeline.slides.synthetic import STAINS, StainLook, make_field
from pipeline.training.field import Field
from pipeline.training.reference import (
    choose_reference,
    colour_space,
    contact_sheet,
    look_at,
    medoids,
    normalise,
    select_references,
    stain_reference,
)


def field(name: str, look: StainLook | str = "classic", seed: int = 1, **changes: float) -> Field:
    image, labels = make_field(260, 240, 0.5, seed=seed, stain=look, background=False)
    return Field(name, "s", name, "", 0.5, image, labels)


@pytest.fixture(scope="module")
def fields() -> list[Field]:
    """Fields whose strength of stain grows from a to g, d being in the middle."""
    base = STAINS["classic"]
    strengths = np.linspace(0.7, 1.3, 7)
    return [
        field(name, replace(base, strength=(s, 2 - s)), seed)
        for seed, (name, s) in enumerate(zip("abcdefg", strengths, strict=True))
    ]


def test_the_middle_is_chosen(fields: list[Field]) -> None:
    looks = [look_at(one) for one in fields]
    middle = np.linalg.norm(colour_space(looks), axis=1)
    allowed = [one.name for one in select_references(fields).candidates if not one.refused]
    best = min(zip(middle, "abcdefg", strict=True), key=lambda pair: pair if pair[1] in allowed else (np.inf, ""))[1]
    selection = select_references(fields)
    assert selection.chosen == (best,)
    assert best in "bcdef"
    assert {one.nearest for one in selection.candidates} == {best}
    # Neither the order of the fields nor the limits of others play a part.
    assert select_references(fields[::-1]).chosen == (best,)


def test_blurred_empty_and_bare_fields_are_refused(fields: list[Field]) -> None:
    blurred = replace(fields[3], name="blurred", image=cv2.GaussianBlur(fields[3].image, (0, 0), 4))
    white = fields[3].image.copy()
    white[:, :120] = 244
    half = replace(fields[3], name="half", image=white)
    bare = replace(fields[3], name="bare", labels=np.zeros_like(fields[3].labels))
    grey = replace(fields[3], name="grey", image=np.repeat(fields[3].image[..., :1], 3, axis=2))
    selection = select_references([*fields, blurred, half, bare, grey])
    notes = {one.name: " ".join(one.refused) for one in selection.candidates}
    assert "focus" in notes["blurred"]
    assert "tissue" in notes["half"]
    assert "nuclear share" in notes["bare"]
    assert notes["grey"]
    assert selection.chosen[0] in "abcdefg"
    by_name = {one.name: one for one in selection.candidates}
    assert by_name["grey"].look is None
    assert by_name["grey"].distance is None
    assert not by_name[selection.chosen[0]].refused


def test_several_references_are_of_different_looks() -> None:
    mixed = [field(f"{look}-{seed}", look, seed) for look in STAINS for seed in range(4)]
    selection = select_references(mixed, 3)
    assert {name.split("-")[0] for name in selection.chosen} == set(STAINS)
    assert all(one.name.split("-")[0] == (one.nearest or "").split("-")[0] for one in selection.candidates)


def test_one_field_is_its_own_reference() -> None:
    one = field("only")
    assert select_references([one]).chosen == ("only",)
    assert select_references([one], 3).chosen == ("only",)


def test_no_reference_is_one_line() -> None:
    grey = Field("g", "s", "g", "", 0.5, np.full((50, 50, 3), 128, np.uint8), np.ones((50, 50), np.int32))
    with pytest.raises(PipelineError, match="no training field's stain can be fitted"):
        select_references([grey])
    with pytest.raises(PipelineError, match="g is not a stain reference"):
        stain_reference(grey)
    with pytest.raises(PipelineError, match="'x' is not a training field"):
        choose_reference([field("a")], "x")


DISTANCES = arrays(np.float64, (7, 2), elements=st.floats(0, 10))


@settings(deadline=None, max_examples=60)
@given(DISTANCES, arrays(np.bool_, 7), st.integers(1, 7))
def test_medoids_cannot_be_improved_by_one_swap(points: np.ndarray, allowed: np.ndarray, k: int) -> None:
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    chosen = medoids(distances, allowed, k)
    assert len(set(chosen)) == len(chosen) == min(k, allowed.sum())
    assert allowed[chosen].all()
    for place in range(len(chosen)):
        for other in np.flatnonzero(allowed):
            tried = [*chosen[:place], int(other), *chosen[place + 1 :]]
            assert distances[tried].min(axis=0).sum() >= distances[chosen].min(axis=0).sum() - 1e-9


def test_reasons_and_contact_sheet_are_written(fields: list[Field], tmp_path: Path) -> None:
    chosen, reference = choose_reference(fields, folder=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "reference.json").read_text())
    assert written["chosen"] == [chosen.name]
    assert [one["name"] for one in written["fields"]] == list("abcdefg")
    assert {"tissue", "focus", "nuclear_share"} == set(written["limits"])
    assert set(reference) == {"macenko", "reinhard", "histogram"}
    with Image.open(tmp_path / "out" / "reference.png") as sheet:
        assert sheet.size[0] >= 560
        # The first picture is the chosen one, framed green.
        green = np.asarray(sheet.convert("RGB"))[48 - 3, 18]
    assert green.tolist() == [30, 140, 60]
    assert contact_sheet(fields[:1], select_references(fields[:1])).size[0] == 560
    named, _ = choose_reference(fields, "a", folder=tmp_path / "named")
    assert named.name == "a"
    assert not (tmp_path / "named").exists()


@pytest.mark.parametrize("method", ["macenko", "reinhard", "histogram", "vahadane"])
def test_fields_are_brought_to_the_reference(method: str) -> None:
    if method == "vahadane" and not staintools_backend.available():
        pytest.skip("staintools is not installed")
    source, target = field("a", "violet", 1), field("b", "classic", 2)
    reference = stain_reference(target, method)
    moved = normalise(source.image, method, reference)
    assert moved is not None

    def off(image: np.ndarray) -> float:
        mean = np.array(fit_lab(tissue_pixels(image))["mean"])
        return float(np.abs(mean - fit_lab(tissue_pixels(target.image))["mean"]).sum())

    assert off(moved) < 0.5 * off(source.image)
    grey = np.full((60, 60, 3), 250, np.uint8)
    assert normalise(grey, method, reference) is None
    assert normalise(source.image, "none", reference) is None


def test_histogram_specification_is_what_it_says() -> None:
    """Distributions of tissue become the reference's; background stays; alpha blends linearly."""
    source, target = field("a", "violet", 1), field("b", "rose", 2)
    image = source.image.copy()
    image[:, :60] = 250
    reference = stain_reference(target)
    full = normalise(image, "histogram", reference)
    half = normalise(image, "histogram", reference, 0.5)
    none = normalise(image, "histogram", reference, 0.0)
    assert full is not None
    assert half is not None
    np.testing.assert_array_equal(none, image)
    assert np.abs(full[:, :55].astype(int) - 250).max() <= 2
    dark = tissue_mask(image)
    got, wanted = cumulative(full[dark]), np.array(reference["histogram"]["cdf"])
    before = cumulative(image[dark])
    assert np.abs(got - wanted).max() < 0.06 < 0.2 < np.abs(before - wanted).max()
    middle = (image.astype(float) + full) / 2
    assert np.abs(half - middle)[dark].max() <= 2


def write(folder: Path, fields: list[Field]) -> None:
    for one in fields:
        for name, pixels in (("images", one.image[..., ::-1]), ("labels", one.labels.astype(np.uint16))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name / f"{one.name}.png"), pixels)


def test_command(fields: list[Field], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "mine", fields)
    assert cli(["reference", f"labels={tmp_path / 'mine'}", "--out", str(tmp_path / "out"), "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    chosen = json.loads((tmp_path / "out" / "reference.json").read_text())["chosen"]
    assert [line.split(":")[0] for line in lines[:2]] == chosen
    assert all(name.startswith("mine-") for name in chosen)
    section = {"data": [{"kind": "labels", "path": str(tmp_path / "mine"), "mpp": 0.5}], "holdout": "labels"}
    (tmp_path / "section.json").write_text(json.dumps(section))
    (tmp_path / "split.json").write_text(json.dumps({"train": ["labels-a", "labels-b"]}))
    options = ["--config-json", str(tmp_path / "section.json"), "--split", str(tmp_path / "split.json")]
    assert cli(["reference", *options, "--out", str(tmp_path / "more")]) == 0
    assert [one["name"] for one in json.loads((tmp_path / "more" / "reference.json").read_text())["fields"]] == [
        "labels-a",
        "labels-b",
    ]
    (tmp_path / "split.json").write_text("[]")
    capsys.readouterr()
    for arguments, reason in [
        ([], "no data source is given"),
        (["labels"], "'labels' is not a data source"),
        (["labels=/absent"], "is not a folder"),
        (["magic=/"], "unknown kind of training data 'magic'"),
        ([f"labels={tmp_path / 'mine'}", "--count", "0"], "--count 0"),
        (options, "has none of these fields"),
        (["--config-json", str(tmp_path / "none.json")], "cannot be read"),
    ]:
        assert cli(["reference", *arguments, "--out", str(tmp_path / "bad")]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.strip().count("\n") == 0
    assert not (tmp_path / "bad").exists()


def test_default_experiment_keeps_its_reference(shared_data: Path) -> None:
    """The reference that the shipped package carries is the one that the rule chooses."""
    from pipeline.training.data import load_fields
    from pipeline.training.splits import SplitSettings, make_split

    source = {"kind": "monuseg", "path": str(shared_data / "monuseg"), "mpp_of": {"TCGA-HE": 0.5}}
    fields = load_fields([source])
    split = make_split(fields, SplitSettings(), "monuseg", 42, 4)
    chosen, reference = choose_reference([one for one in fields if one.name in split.train])
    card = json.loads((Path(__file__).parents[2] / "models" / "default" / "model.json").read_text())
    assert chosen.name == card["stain"]["reference"]["name"]
    assert reference["macenko"] == card["stain"]["reference"]["macenko"]
