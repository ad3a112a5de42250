"""Several trained models as one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.batch.settings import check_model
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.models.licences import strictest
from pipeline.models.package import CARD, ModelPackage, NucleusClass
from pipeline.slides.synthetic import make_field
from pipeline.stores.maps import MapStore
from pipeline.testing import stained, write_inputs, write_package

torch = pytest.importorskip("torch")

from pipeline.models.weights import load_network  # noqa: E402
from pipeline.networks.outputs import Folding, Outputs  # noqa: E402
from pipeline.prediction.batches import BatchPredictor  # noqa: E402
from pipeline.prediction.predictors import channel_names  # noqa: E402
from pipeline.training.ensemble import join  # noqa: E402
from pipeline.training.predict import predict_field  # noqa: E402
from pipeline.training.teacher import Teacher  # noqa: E402

ALL = ("nucleus", "hv", "type")
DEEP = {"widths": [4, 6, 8]}


def member(folder: Path, network: str = "resunet", args: dict[str, Any] | None = None, **changes: Any) -> ModelPackage:
    """A package of an untrained network, with changes to its card."""
    made = {key: changes.pop(key) for key in ("heads", "mpp", "seed", "patch", "overlap") if key in changes}
    package = replace(write_package(folder, network, args or DEEP, **made), name=folder.name, **changes)
    (folder / CARD).write_text(json.dumps(package.to_json()))
    return package


def packed(out: Path, *members: ModelPackage, more: tuple[str, ...] = ()) -> ModelPackage:
    """The package that the command makes of some."""
    assert main(["ensemble", f"--out={out}", *(str(one.folder) for one in members), *more]) == 0
    return ModelPackage.load(out, verify=True)


def maps_of(package: ModelPackage, image: Any) -> Any:
    """Float maps of an image, as the card says."""
    with torch.inference_mode():
        return Outputs(channel_names(package), package.tta).predict(load_network(package), image)


@pytest.fixture
def image() -> Any:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def pair(tmp_path: Path) -> list[ModelPackage]:
    """Two architectures with all kinds of maps, one of which is averaged over mirrored inputs."""
    return [
        member(tmp_path / "a", heads=ALL, seed=1, tta="flips"),
        member(tmp_path / "b", "squeeze-unet", {"widths": [4, 6, 8, 8, 12]}, heads=ALL, seed=2),
    ]


def test_maps_are_the_mean_of_the_members(tmp_path: Path, image: Any, pair: list[ModelPackage]) -> None:
    own = [maps_of(one, image) for one in pair]
    assert float((own[0] - own[1]).abs().mean(dim=(0, 2, 3)).min()) > 0.01  # of every map
    both = maps_of(packed(tmp_path / "both", *pair), image)
    torch.testing.assert_close(both, (own[0] + own[1]) / 2, atol=2e-6, rtol=0)


def test_probabilities_of_0_and_1_have_a_mean(tmp_path: Path, image: Any) -> None:
    members = [member(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    network = load_network(packed(tmp_path / "both", *members))
    for one in network.members:
        torch.nn.init.constant_(one.head[-1].bias, 1e4)
    maps = Outputs(("nucleus", "distance")).predict(network, image)
    assert torch.isfinite(maps).all()
    assert (maps.mul(255).round() == 255).all()


def test_a_coarser_member_sees_means_and_is_interpolated(tmp_path: Path) -> None:
    fine = member(tmp_path / "fine", mpp=0.25, patch=96, overlap=16)
    coarse = member(tmp_path / "coarse", args={"widths": [4, 8]}, mpp=0.5, patch=64, overlap=8, seed=2)
    both = packed(tmp_path / "both", coarse, fine)
    assert (both.mpp, both.patch, both.overlap) == (0.25, 128, 16)
    assert both.thresholds == fine.thresholds
    assert load_network(both).stride == 4
    pixels = np.repeat(np.repeat(stained(32, 48, 0), 2, axis=0), 2, axis=1)
    small = torch.from_numpy(pixels[::2, ::2].copy()).permute(2, 0, 1)[None].float() / 255
    large = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    wide = np.stack(
        [cv2.resize(one, (96, 64), interpolation=cv2.INTER_LINEAR) for one in maps_of(coarse, small)[0].numpy()]
    )
    expected = (maps_of(fine, large)[0].numpy() + wide) / 2
    np.testing.assert_allclose(maps_of(both, large)[0].numpy(), expected, atol=1e-5)


def test_windows_fit_every_member(tmp_path: Path) -> None:
    a = member(tmp_path / "a", mpp=0.25, patch=72, overlap=9)
    b = member(tmp_path / "b", args={"widths": [4, 4, 4, 4]}, mpp=0.5, patch=32, overlap=4)
    both = packed(tmp_path / "both", a, b)
    assert (both.patch, both.overlap) == (80, 10)


def test_taken_apart_members_are_what_they_were(
    tmp_path: Path, pair: list[ModelPackage], capsys: pytest.CaptureFixture[str]
) -> None:
    both = packed(tmp_path / "both", *pair)
    assert main(["ensemble", "--apart", f"--out={tmp_path / 'parts'}", str(both.folder)]) == 0
    for one in pair:
        assert ModelPackage.load(tmp_path / "parts" / one.name, verify=True) == one
    for models, words in (([pair[0]], "is not an ensemble"), ([both], "holds a model"), (pair, "with 2 models")):
        assert main(["ensemble", "--apart", f"--out={tmp_path / 'parts'}", *(str(m.folder) for m in models)]) == 2
        assert words in capsys.readouterr().err


def test_the_card_is_that_of_all_members(tmp_path: Path) -> None:
    data = [
        ({"name": "x", "licence": "CC0 1.0", "fields": 2, "patients": ["p", "q"]},),
        ({"name": "x", "licence": "CC0 1.0", "fields": 3, "patients": ["q", "r"]}, {"name": "y", "licence": "MIT"}),
    ]
    a = member(tmp_path / "a", data=data[0], licence="CC BY-NC 4.0", seed=1)
    b = member(tmp_path / "b", data=data[1], licence="CC BY 4.0", seed=2)
    both = packed(tmp_path / "both", a, b)
    assert (both.name, both.licence, both.tta) == ("both", "CC BY-NC 4.0", "none")
    assert [(one["name"], one.get("patients")) for one in both.data] == [("x", ["p", "q", "r"]), ("y", [])]
    assert "not scored" in both.metrics["protocol"]
    check_model(tmp_path / "both")
    assert main(["doctor", f"--model={both.folder}"]) in (0, 1)
    nested = packed(tmp_path / "three", both, a)
    assert nested.network_args["members"][0]["network"] == "ensemble"
    network = load_network(nested)
    assert isinstance(network, Folding)
    before = network(torch.ones(1, 3, 32, 32))
    network.fold_norms()
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())
    torch.testing.assert_close(network(torch.ones(1, 3, 32, 32)), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("licences", "found"),
    [
        (["CC BY 4.0", "CC BY 4.0"], "CC BY 4.0"),
        (["CC0 1.0", "CC BY 4.0"], "CC BY 4.0"),
        (["CC BY-NC-SA 4.0", "MIT"], "CC BY-NC-SA 4.0"),
        (["CC BY-SA 4.0", "CC BY-NC 4.0"], "CC BY-NC 4.0 and CC BY-SA 4.0"),  # neither asks for all
        (["CC BY-NC-SA 4.0", "for the hospital alone"], "CC BY-NC-SA 4.0 and for the hospital alone"),
        (["CC0 1.0", "unknown"], "unknown"),
    ],
)
def test_strictest_licence(licences: list[str], found: str) -> None:
    assert strictest(licences) == strictest(licences[::-1]) == found


def infer(folder: Path, model: Path) -> Any:
    inputs = write_inputs(folder / "in", stained(192, 192, 0))
    options = {**inputs, "model": model, "slide": "s", "device": "cpu", "threads": 1}
    options |= {"out": folder / "maps.json", "zarr-out": folder / "maps.zarr"}
    assert main(["infer", *(f"--{key}={value}" for key, value in options.items())]) == 0
    return MapStore.open(folder / "maps.zarr").read(0, 0, 192, 192).astype(int)


def test_infer_averages(tmp_path: Path) -> None:
    members = [member(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    folders = {one: tmp_path / f"run-{one}" for one in ("a", "b", "both")}
    packed(tmp_path / "both", *members)
    maps = {one: infer(folder, tmp_path / one) for one, folder in folders.items()}
    assert np.abs(maps["a"] - maps["b"]).max() > 5  # so either alone would not do
    # Each has been rounded twice, in its windows and where these are blended.
    assert np.abs(maps["both"] - (maps["a"] + maps["b"]) / 2).max() <= 2


def test_batches_and_teachers_average(tmp_path: Path) -> None:
    members = [member(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    both = packed(tmp_path / "both", *members)
    windows = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    found = []
    for one in (*members, both):
        outputs = Outputs(channel_names(one))
        found.append(BatchPredictor(load_network(one), "cpu", 2, outputs, torch.float32)(windows).astype(int))
    assert np.abs(found[2] - (found[0] + found[1]) / 2).max() <= 1
    teacher = Teacher.of(both, "cpu")
    field = np.asarray(windows[0])
    taught = predict_field(teacher.network, field, Outputs(channel_names(both))).astype(int)
    own = [predict_field(load_network(one), field, Outputs(channel_names(one))).astype(int) for one in members]
    assert np.abs(taught - (own[0] + own[1]) / 2).max() <= 1


def test_what_has_no_mean_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = member(tmp_path / "a")
    reference = {"reinhard": {"mean": [1, 2, 3], "std": [1, 1, 1]}}
    others = {
        "heads": (member(tmp_path / "heads", heads=("nucleus", "contour")), "differ in heads"),
        "stain": (
            member(tmp_path / "stain", stain={"method": "reinhard", "reference": reference}),
            "differ in stain normalisation",
        ),
        "classes": (member(tmp_path / "classes", classes=(NucleusClass("Cell", (1, 2, 3)),)), "differ in classes"),
        "mpp": (member(tmp_path / "mpp", mpp=0.3), "works at 0.5 µm/px, which is not a whole multiple of 0.3"),
        "rules": (replace(a, network="hematoxylin", network_args={}), "hematoxylin is not a network"),
        "boxes": (replace(a, network="maskrcnn-small", network_args={}), "maskrcnn-small finds instances itself"),
    }
    for one, message in others.values():
        with pytest.raises(PipelineError, match=message) as caught:
            join([a, one], "both")
        assert "\n" not in str(caught.value)
    with pytest.raises(PipelineError, match="an ensemble of 1 model"):
        join([a], "both")
    both = packed(tmp_path / "both", a, a)
    capsys.readouterr()
    assert main(["ensemble", f"--out={both.folder}", str(a.folder), str(a.folder)]) == 2
    assert "holds a model" in capsys.readouterr().err
    assert ModelPackage.load(both.folder, verify=True) == both


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """Six fields of six patients, of two organs."""
    for name in ("images", "labels"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
    for seed, patient in enumerate(("A7-A13E", "A7-A13F", "AR-A1AK", "B0-5698", "B0-5710", "B0-5711")):
        image, labels = make_field(160, 160, 0.25, seed=seed)
        cv2.imwrite(str(folder / "data" / "images" / f"TCGA-{patient}-x.png"), image[..., ::-1])
        cv2.imwrite(str(folder / "data" / "labels" / f"TCGA-{patient}-x.png"), labels.astype(np.uint16))
    data = [{"kind": "monuseg", "path": str(folder / "data"), "licence": "CC0 1.0"}]
    return {"name": "tiny", "data": data, "validation": 2, **changes}


def test_thresholds_and_scores_of_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps({"train": experiment(tmp_path, evaluation={"windows": True})}))
    members = [member(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    both = packed(tmp_path / "both", *members, more=(f"--experiment={file}", "--device=cpu"))
    assert set(both.metrics["mean"]) >= {"aji", "pq", "f1"}
    assert len(both.metrics["images"]) == 2
    assert both.metrics["protocol"].endswith("both as it is; thresholds chosen on 2 fields of other patients")
    # It knows what thresholds were chosen on, and nothing of what it was scored on.
    (entry,) = both.data
    assert len(entry["patients"]) == 2
    assert not {one["patient"] for one in both.metrics["images"].values()} & {*entry["patients"]}

    chosen_on = member(tmp_path / "chosen", data=(entry,))
    told = packed(tmp_path / "told", members[0], chosen_on, more=(f"--experiment={file}", "--device=cpu"))
    assert told.metrics["protocol"].endswith("chosen on 2 fields of other patients (2 of them known before)")

    tested = next(iter(both.metrics["images"].values()))["patient"]
    knows = member(tmp_path / "knows", data=({"name": "monuseg", "licence": "CC0 1.0", "patients": [tested]},))
    arguments = ["ensemble", f"--out={tmp_path / 'leak'}", str(members[0].folder), str(knows.folder)]
    capsys.readouterr()
    assert main([*arguments, f"--experiment={file}", "--device=cpu"]) == 2
    assert f"ensemble: member {knows.folder} has learned from 1 of the patients" in capsys.readouterr().err
    assert not (tmp_path / "leak").exists()

    file.write_text(json.dumps({"train": experiment(tmp_path, holdings=1)}))
    assert main([*arguments, f"--experiment={file}"]) == 2
    assert "holdings" in capsys.readouterr().err


def test_nothing_is_trained_on_from_an_ensemble(tmp_path: Path) -> None:
    from pipeline.training.experiment import Experiment
    from pipeline.training.run import Run

    both = packed(tmp_path / "both", *(member(tmp_path / name, seed=seed) for seed, name in enumerate("ab")))
    settings = experiment(tmp_path, start_from=str(both.folder), network_args=DEEP, stain="none")
    run = Run(Experiment.from_json(settings), tmp_path / "work", "cpu")
    with pytest.raises(PipelineError, match="both is an ensemble: there is no one network in it"):
        run.build()
