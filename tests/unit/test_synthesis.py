"""Synthetic fields: from annotated fields to a model that has learned from both, through the command line."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.kernels.random_nuclei import mask_picture
from pipeline.models.package import ModelPackage
from pipeline.slides.synthetic import make_field
from pipeline.testing import digest
from pipeline.training.data import load_fields
from pipeline.training.origin import read_origin
from pipeline.training.reference import normalise
from pipeline.training.splits import Split

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from pipeline.training.cyclegan import CycleGAN, as_input, paint  # noqa: E402
from pipeline.training.synthesis import (  # noqa: E402
    SynthesisSettings,
    nuclei_of,
    own_synthesis,
    read_originals,
    write_fields,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("images", "labels"):
        (root / name).mkdir()
    for seed, patient in enumerate(("A7-A13E", "A7-A13F", "AR-A1AK", "AR-A1AS")):
        image, labels = make_field(96, 96, 0.5, seed=seed)
        cv2.imwrite(str(root / "images" / f"TCGA-{patient}-x.png"), image[..., ::-1])
        cv2.imwrite(str(root / "labels" / f"TCGA-{patient}-x.png"), labels.astype(np.uint16))
    return root


def training(data: Path, *more: dict[str, Any], **changes: Any) -> dict[str, Any]:
    source = {"kind": "labels", "path": str(data), "mpp": 0.5, "name": "real", "licence": "CC BY-NC 4.0"}
    return {
        "data": [source, *more],
        "holdout": "real",
        "split": {"method": "patients", "test": 0.25},
        "validation": 1,
        "stain": "none",
        **changes,
    }


def synthesize(folder: Path, train: dict[str, Any], *options: str, **changes: Any) -> int:
    tiny = {"count": 3, "size": 64, "steps": 4, "width": 4, "blocks": 1, "discriminator_width": 4, "pool": 2}
    settings = {**tiny, "save_every": 2, "workers": 0, "device": "cpu", "precision": "32", **changes}
    folder.mkdir(exist_ok=True)
    (folder / "sections.json").write_text(json.dumps({"synthesis": settings, "train": train}))
    arguments = {"config-json": folder / "sections.json", "work": folder, "out": folder / "fields", "threads": 1}
    return main(["synthesize", *(f"--{name}={value}" for name, value in arguments.items()), *options])


def record(folder: Path) -> dict[str, Any]:
    return read_origin(folder / "fields")


def test_fields_are_made_and_trained_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fields = tmp_path / "s" / "fields"
    own = {"kind": "labels", "path": str(fields), "name": "synthetic", "weight": 0.5}
    assert synthesize(tmp_path / "s", training(data, own)) == 0  # not there yet, and no source of itself
    made = record(tmp_path / "s")
    assert (made["fields"], made["mpp"], made["licence"]) == (3, 0.5, "CC BY-NC 4.0")
    assert cv2.imread(str(fields / "sheet.png")).shape[1] > 8 * 64
    loaded = load_fields([own])
    assert [one.image.shape for one in loaded] == [(64, 64, 3)] * 3
    assert {one.mpp for one in loaded} == {0.5}  # the folder tells it; guessed, each would have its own
    assert sum(int(one.labels.max()) for one in loaded) == made["nuclei"] > 3
    # Made again in place of the old ones.
    assert synthesize(tmp_path / "s", training(data, own), count=2) == 0
    assert len(load_fields([own])) == 2

    section = training(
        data, own, name="tiny", network="pix2pix", network_args={"widths": [4, 6, 8]}, patch=64, overlap=16, mpp=0.5,
        adversarial={"weight": 1, "width": 4, "layers": 1}, final_steps=0, licence="CC0 1.0",
        schedule={"steps": 2, "batch": 2, "size": 64, "validate_every": 2, "workers": 0, "device": "cpu"},
    )  # fmt: skip

    def train(name: str, section: dict[str, Any]) -> int:
        (tmp_path / f"{name}.json").write_text(json.dumps(section))
        options = {"config-json": tmp_path / f"{name}.json", "work": tmp_path / name, "out": tmp_path / name / "model"}
        return main(["train", "--threads=1", *(f"--{key}={value}" for key, value in options.items())])

    with caplog.at_level(logging.WARNING):
        assert train("same", section) == 0
    split = json.loads((tmp_path / "same" / "split.json").read_text())
    (origin,) = made["learned_from"]
    assert origin["patients"] == split["patients"]["train"][: len(origin["patients"])]
    assert set(origin["patients"]).isdisjoint(split["patients"]["test"] + split["patients"]["validation"])
    assert sum("labels" in line or "real" in line for line in caplog.text.splitlines() if "stricter" in line) == 2
    card = json.loads((tmp_path / "same" / "model" / "model.json").read_text())
    assert {one["name"]: one["fields"] for one in card["data"]} == {"real": 3, "synthetic": 2}
    # Whoever holds out somebody whom the painter has seen is refused.
    other = next(seed for seed in range(9) if test_patients(data, seed) & set(origin["patients"]))
    capsys.readouterr()
    assert train("other", {**section, "seed": other}) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "were painted after" in told
    assert "patients held out, first" in told


def test_patients_of_other_sources_count(data: Path, tmp_path: Path) -> None:
    """The same TCGA patient under another source's name."""
    from pipeline.training.origin import check_origins

    folder = tmp_path / "fields"
    folder.mkdir()
    origin = {"name": "elsewhere", "licence": "CC0", "patients": ["A7-A13E"]}
    (folder / "synthesis.json").write_text(json.dumps({"mpp": 0.5, "learned_from": [origin]}))
    fields = load_fields(training(data)["data"])
    seen, unseen = fields[:1], fields[1:]
    check_origins([{"path": str(folder)}, {"path": str(data)}], unseen)
    with pytest.raises(PipelineError, match="after 1 of the patients held out, first A7-A13E of real"):
        check_origins([{"path": str(folder)}], seen)


def test_patients(data: Path, seed: int) -> set[str]:
    """Patients for validation and testing with a seed."""
    from pipeline.training.splits import SplitSettings, make_split

    fields = load_fields(training(data)["data"])
    split: Split = make_split(fields, SplitSettings(method="patients", test=0.25), "real", seed, 1)
    patient = {one.name: one.patient for one in fields}
    return {patient[name] for name in (*split.validation, *split.test)}


test_patients.__test__ = False  # type: ignore[attr-defined]


def test_no_pixel_of_those_held_out_is_learned_from(data: Path, tmp_path: Path) -> None:
    for seed in range(3):
        originals, _ = read_originals(training(data, seed=seed), tmp_path / "fields", 64)
        held_out = test_patients(data, seed)
        assert held_out.isdisjoint(one.patient for one in originals.fields)
        assert len(originals.images) == len(originals.fields) == 4 - len(held_out)


def test_fields_are_painted_in_the_stain_of_the_model_that_is_trained_on(data: Path, tmp_path: Path) -> None:
    start = Path(__file__).parents[2] / "models" / "default"
    reference = ModelPackage.load(start).stain["reference"]
    train = training(data, stain="macenko", start_from=str(start))
    originals, whose = read_originals(train, tmp_path / "fields", 64)
    for field, image in zip(originals.fields, originals.images, strict=True):
        expected = normalise(field.image, "macenko", reference)
        assert expected is not None
        np.testing.assert_array_equal(image, expected)
    other, others = read_originals({**train, "start_from": None}, tmp_path / "fields", 64)
    assert not np.array_equal(originals.images[0], other.images[0])
    own_synthesis(tmp_path / "work", SynthesisSettings(), train, whose)
    (tmp_path / "work" / "cyclegan").mkdir()
    (tmp_path / "work" / "cyclegan" / "last.ckpt").touch()
    with pytest.raises(PipelineError, match="the start_from of the synthesis 'synthetic' changed"):
        own_synthesis(tmp_path / "work", SynthesisSettings(), train, others)


def test_a_killed_synthesis_ends_as_an_unbroken_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def die(self: CycleGAN, batch: Any, index: int) -> Any:
        if self.global_step == 3:  # after the checkpoint of step 2
            raise Killed
        return step(self, batch, index)

    step = CycleGAN.training_step
    assert synthesize(tmp_path / "whole", training(data)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(CycleGAN, "training_step", die)
        with pytest.raises(Killed):
            synthesize(tmp_path / "broken", training(data))
    assert not (tmp_path / "broken" / "fields").exists()
    assert torch.load(tmp_path / "broken/cyclegan/last.ckpt", weights_only=True)["global_step"] == 2
    assert synthesize(tmp_path / "broken", training(data)) == 0
    assert record(tmp_path / "whole")["weights_sha256"] == record(tmp_path / "broken")["weights_sha256"]
    for name in ("images", "labels"):
        assert digest(tmp_path / "whole" / "fields" / name) == digest(tmp_path / "broken" / "fields" / name)
    states = [torch.load(tmp_path / name / "cyclegan/last.ckpt", weights_only=True) for name in ("whole", "broken")]
    torch.testing.assert_close(*(state["adversaries"] for state in states), rtol=0, atol=0)
    assert len(states[0]["adversaries"][0]["pool"]) == 2


def test_stopped_by_the_clock(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize(tmp_path / "s", training(data), "--max-minutes=1e-9") == 2
    assert (
        "stopped after 1e-09 minutes, at step 0 of 4 (run the same command again to go on)" in capsys.readouterr().err
    )


def test_another_synthesis_of_the_same_name_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert synthesize(tmp_path / "s", training(data), steps=2) == 0
    before = digest(tmp_path / "s" / "fields")
    assert synthesize(tmp_path / "s", training(data, seed=5)) == 2
    assert "the split of the synthesis 'synthetic' changed after its CycleGAN in" in capsys.readouterr().err
    assert synthesize(tmp_path / "s", training(data), cycle=5) == 2
    assert "the settings of the synthesis" in capsys.readouterr().err
    assert synthesize(tmp_path / "s", training(data), steps=1) == 2
    assert "has been trained for 2 steps already, more than 1" in capsys.readouterr().err
    assert digest(tmp_path / "s" / "fields") == before


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.png").write_text("x")
    with pytest.raises(PipelineError, match="mine is there and holds no synthetic fields"):
        write_fields(tmp_path / "mine", [], [], None, {})  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_field_too_small_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synthesize(tmp_path / "s", training(data), size=128) == 2
    assert "no training field has 128 pixels of 0.5 µm to a side" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepps": 3}, "unknown setting 'stepps' .did you mean steps"),
        ({"size": 66}, "'size'"),
        ({"nuclei": [9, 3]}, "synthesis: nuclei 9, 3"),
        ({"precision": "8"}, "'precision'"),
    ],
)
def test_wrong_settings_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    assert synthesize(tmp_path / "s", training(data), **change) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert re.search(message, told)


def test_nuclei_are_as_many_to_the_area_at_any_pixel_size() -> None:
    settings = SynthesisSettings(size=256, nuclei=(40, 40), radius=(2.0, 3.0))
    fine, coarse = (nuclei_of(settings, mpp, (), np.random.default_rng(0)) for mpp in (0.25, 0.5))
    assert fine.max() == 40
    assert 150 <= coarse.max() <= 160
    areas = [np.median(np.bincount(one.ravel())[1:]) * mpp**2 for one, mpp in ((fine, 0.25), (coarse, 0.5))]
    assert areas[0] == pytest.approx(areas[1], rel=0.2)


def test_edges_are_painted_beyond_and_cut_off() -> None:
    class Striped(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[..., :8, :] = x[..., :8] = 0.5
            return x

    labels = np.zeros((40, 48), np.int32)
    labels[:9, :9] = 1
    painted = paint(Striped(3, 3, 1), labels)
    np.testing.assert_array_equal(painted, np.repeat(mask_picture(labels)[..., None], 3, axis=2))


def test_what_generators_take() -> None:
    masks = as_input(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert masks.shape == (1, 3, 1, 2)
    assert masks[0, :, 0].tolist() == [[-1, 1]] * 3
    tiles = as_input(torch.full((1, 4, 5, 3), 255, dtype=torch.uint8))
    assert tiles.shape == (1, 3, 4, 5)
