"""Training end to end on small synthetic fields."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.batch.settings import check_model
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.evaluation.means import bootstrap_interval
from pipeline.kernels.instances import InstanceRules
from pipeline.models.package import ModelPackage
from pipeline.slides.synthetic import make_field
from pipeline.stain import resolve_method
from pipeline.testing import stained, write_package
from pipeline.training.field import Field

torch = pytest.importorskip("torch")

from pipeline.models.weights import load_network  # noqa: E402
from pipeline.networks.outputs import Outputs, map_names  # noqa: E402
from pipeline.networks.registry import build_network, head_channels  # noqa: E402
from pipeline.prediction.predictors import channel_names  # noqa: E402
from pipeline.training.balance import classes_present, repeats  # noqa: E402
from pipeline.training.begin import check_classes, check_licences, digest_of, load_data  # noqa: E402
from pipeline.training.data import load_fields  # noqa: E402
from pipeline.training.experiment import Experiment, protocol  # noqa: E402
from pipeline.training.files import read_json  # noqa: E402
from pipeline.training.losses import nucleus_distance_loss  # noqa: E402
from pipeline.training.owner import check_place  # noqa: E402
from pipeline.training.pack import learned_from, pack, recorded_args  # noqa: E402
from pipeline.training.predict import predict_field  # noqa: E402
from pipeline.training.run import Run, run_experiment  # noqa: E402
from pipeline.training.samples import (  # noqa: E402
    BLURS,
    Augmentation,
    draw_sample,
    jitter_colour,
    jitter_stain,
    motion_blur,
    prepare_field,
)
from pipeline.training.splits import Split  # noqa: E402
from pipeline.training.trainer import read_checkpoint  # noqa: E402


def test_unknown_names() -> None:
    with pytest.raises(PipelineError, match="unknown network 'unet9'"):
        build_network("unet9", 2)
    with pytest.raises(PipelineError, match="depth"):
        build_network("resunet", 2, {"depth": 9})
    with pytest.raises(PipelineError, match="unknown head 'edge'"):
        head_channels(["nucleus", "edge"])
    assert head_channels(["nucleus", "distance", "type"], n_types=5) == 8


def test_loss_is_least_at_the_truth() -> None:
    square = torch.zeros(1, 16, 16)
    square[:, 4:12, 4:12] = 1
    targets = {"nucleus": square, "distance": square, "seam": torch.zeros_like(square)}
    right = (torch.stack([square, square], 1) - 0.5) * 20
    assert nucleus_distance_loss(right, targets)["loss"] < 0.1 < nucleus_distance_loss(-right, targets)["loss"]


def test_stain_jitter_keeps_white_nearly_white() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    assert min(jitter_stain(white, rng, 0.25).min() for _ in range(50)) > 225


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in ("images", "labels"):
        (root / name).mkdir()
    patients = ("A7-A13E", "A7-A13F", "AR-A1AK", "B0-5698", "B0-5710", "B0-5711")
    for seed, patient in enumerate(patients):
        image, labels = make_field(240, 240, 0.25, seed=seed)
        cv2.imwrite(str(root / "images" / f"TCGA-{patient}-x.png"), image[..., ::-1])
        cv2.imwrite(str(root / "labels" / f"TCGA-{patient}-x.png"), labels.astype(np.uint16))
    return root


def section(data: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": [{"kind": "monuseg", "path": str(data), "licence": "CC0 1.0"}],
        "network_args": {"widths": [4, 6, 8]},
        "schedule": {"steps": 4, "batch": 2, "size": 64, "validate_every": 2, "workers": 0},
        "final_steps": 2,
        "validation": 2,
        "licence": "CC0 1.0",
        **changes,
    }


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and folders
def test_experiment_packs_a_model_and_resumes(data: Path, tmp_path: Path) -> None:
    experiment = Experiment.from_json(section(data))
    evaluation = run_experiment(experiment, tmp_path / "work", tmp_path / "model", "cpu")
    assert set(evaluation["images"]) == set(json.loads((tmp_path / "work" / "split.json").read_text())["test"])
    package = ModelPackage.load(tmp_path / "model", verify=True)
    assert package.licence == "CC0 1.0"
    reasons = json.loads((tmp_path / "work" / "reference.json").read_text())
    assert reasons["chosen"] == [package.stain["reference"]["name"]]
    assert (tmp_path / "work" / "reference.png").is_file()
    assert package.metrics["mean"] == evaluation["mean"]
    image, _ = make_field(100, 90, 0.5, seed=9)
    maps = predict_field(load_network(package), image, Outputs(map_names(package.heads)))
    assert maps.shape == (2, *image.shape[:2])
    # A second run finds everything done and packs the same weights.
    before = (tmp_path / "model" / "weights.safetensors").read_bytes()
    assert run_experiment(experiment, tmp_path / "work", tmp_path / "model", "cpu") == evaluation
    assert (tmp_path / "model" / "weights.safetensors").read_bytes() == before
    # More steps go on from the last checkpoint.
    longer = replace(experiment, schedule=replace(experiment.schedule, steps=6), final_steps=0)
    run_experiment(longer, tmp_path / "work", tmp_path / "longer", "cpu")
    last = torch.load(tmp_path / "work" / "heldout" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    tuned = replace(longer, evaluation=replace(longer.evaluation, tune_on_training=True))
    assert (
        "thresholds on these and 2 training"
        in run_experiment(tuned, tmp_path / "work", tmp_path / "t", "cpu")["protocol"]
    )
    # The card says whom the weights know, and nobody is tested on them.
    held_out = {image["patient"] for image in evaluation["images"].values()}
    longer_package = ModelPackage.load(tmp_path / "longer")
    assert held_out < set(package.data[0]["patients"])
    chosen_on = json.loads((tmp_path / "work" / "split.json").read_text())["patients"]
    assert set(longer_package.data[0]["patients"]) == {*chosen_on["train"], *chosen_on["validation"]}
    assert held_out.isdisjoint(longer_package.data[0]["patients"])
    # The packed weights are told apart from those that were scored.
    assert package.metrics["protocol"].endswith("; the packed weights were then trained 2 steps on all fields")
    assert "packed weights" not in longer_package.metrics["protocol"]
    leaking = Experiment.from_json(section(data, start_from=str(tmp_path / "model")))
    with pytest.raises(PipelineError, match=r"start_from .*model has learned from \d of the patients held out, first"):
        Run(leaking, tmp_path / "leaking", "cpu")
    with pytest.raises(
        PipelineError, match=r"longer is another network than resunet .*set train.network to resunet and tr"
    ):
        Run(
            Experiment.from_json(section(data, start_from=str(tmp_path / "longer"), network_args={"widths": [4, 6]})),
            tmp_path / "narrow", "cpu",
        ).build()  # fmt: skip
    next_one = section(data, start_from=str(tmp_path / "longer"), heads=["nucleus", "contour", "distance"])
    Run(Experiment.from_json(next_one), tmp_path / "next", "cpu").build()


@pytest.mark.filterwarnings("ignore")
def test_fields_without_a_stain_can_be_trained_on(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As they are; the package carries no reference, and cannot be run with a method that needs one."""
    grey = tmp_path / "grey"
    shutil.copytree(data, grey)
    for path in (grey / "images").iterdir():
        pixels = cv2.imread(str(path))
        assert pixels is not None
        cv2.imwrite(str(path), cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY))
    with pytest.raises(PipelineError, match=r"no training field's stain can be fitted \(use stain: none\)"):
        Run(Experiment.from_json(section(grey)), tmp_path / "macenko", "cpu")
    plain = Experiment.from_json(section(grey, stain="none", final_steps=0))
    run_experiment(plain, tmp_path / "work", tmp_path / "model", "cpu")
    assert "tiny will carry no stain reference" in caplog.text
    assert re.search(r"thresholds are tuned on only \d+ nuclei", caplog.text)
    package = ModelPackage.load(tmp_path / "model", verify=True)
    assert package.stain == {"method": "none", "strength": 1.0, "reference": {}}
    assert resolve_method("model", package, None)[0] == "none"
    with pytest.raises(PipelineError, match="carries no stain reference for macenko"):
        resolve_method("macenko", package, None)


def test_a_package_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()

    def packed(seed: int) -> dict[str, bytes]:
        torch.manual_seed(seed)
        one = Experiment.from_json(section(tmp_path))
        network = build_network(one.network, 2, one.network_args)
        pack(network, one, {"mean": {}}, InstanceRules(), {"name": "x"}, [], work, out)
        return files()

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir()}

    first = packed(0)
    check_model(out)

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.models.package.write_json", no_room)
        with pytest.raises(OSError, match="No space"):
            packed(1)
    assert files() == first

    rename = Path.rename

    def killed(path: Path, target: Path) -> Any:
        if target.name == "model.json":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            packed(1)
    assert sorted(files()) == ["model.json", "weights.safetensors"]
    with pytest.raises(PipelineError, match=r"weights\.safetensors has sha256"):
        check_model(out)
    second = packed(1)
    check_model(out)
    assert second["weights.safetensors"] != first["weights.safetensors"]
    # That of another training stays.
    for there in ("model.json", "weights.safetensors"):
        with pytest.raises(PipelineError, match=r"model holds a model that the training in .*other has not made"):
            check_place(out, tmp_path / "other")
        assert files() == second
        (out / there).rename(tmp_path / there)
        second.pop(there)
    check_place(out, tmp_path / "other")  # an empty folder is nobody's


def test_another_model_is_not_trained_over(data: Path, tmp_path: Path) -> None:
    write_package(tmp_path / "model", "resunet", {"widths": [4, 6, 8]})
    with pytest.raises(PipelineError, match="holds a model that the training in"):
        run_experiment(Experiment.from_json(section(data)), tmp_path / "work", tmp_path / "model", "cpu")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "section.json holds no settings, but '[]' (give the train section as JSON)"),
        ('{"schedule": 3}', "section.json: setting 'schedule' holds others"),
        ('{"schedule": {"device": [], "devices": "two"}}', "section.json: setting 'schedule.device': [] is not one of"),
        ('{"data": {"kind": "monuseg"}}', "section.json: setting 'data' must be array"),
        ('{"schedul": {}}', "section.json: unknown setting 'schedul' (did you mean schedule?)"),
        ("{", "section.json cannot be read"),
    ],
)
def test_wrong_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "section.json"
    path.write_text(content)
    code = main(["train", f"--config-json={path}", f"--work={tmp_path / 'work'}", f"--out={tmp_path / 'model'}"])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}")
    assert message in line


@pytest.mark.filterwarnings("ignore")
def test_a_teacher_is_part_of_what_is_learned(data: Path, tmp_path: Path) -> None:
    run_experiment(
        Experiment.from_json(section(data, name="large", final_steps=0)), tmp_path / "large", tmp_path / "model", "cpu"
    )
    taught = section(data, teacher=str(tmp_path / "model"), teacher_share=0.25, mpp=1.0, final_steps=0)
    run = Run(Experiment.from_json(taught), tmp_path / "work", "cpu")
    fields = run.data.part("train")[:1]
    alone = Run(Experiment.from_json({**taught, "teacher": None}), tmp_path / "alone", "cpu").prepare(fields)[0]
    mixed = run.prepare(fields)[0]
    nothing = np.zeros_like(fields[0].labels)
    corner = nothing.copy()
    corner[0, 0] = 1
    sure = run.prepare([replace(fields[0], labels=corner)])[0]  # a quarter of the teacher's maps, but there
    channel = list(alone.spec.warped).index
    for name in ("nucleus", "distance"):
        hard, soft, part = (one.targets[..., channel(name)].astype(float) for one in (alone, mixed, sure))
        np.testing.assert_allclose(soft[2:, 2:], (0.75 * hard + part)[2:, 2:], atol=1.4)  # three roundings
        assert part.any()
    assert not run.prepare([replace(fields[0], labels=nothing)])[0].targets.any()  # it does not teach what is nothing
    np.testing.assert_array_equal(mixed.targets[..., channel("seam")], alone.targets[..., channel("seam")])
    run_experiment(Experiment.from_json(taught), tmp_path / "work", tmp_path / "small", "cpu")

    run_experiment(Experiment.from_json(section(data, name="all")), tmp_path / "all", tmp_path / "knows", "cpu")
    with pytest.raises(PipelineError, match=r"teacher .*knows has learned from \d of the patients held out"):
        Run(Experiment.from_json({**taught, "teacher": str(tmp_path / "knows")}), tmp_path / "leaking", "cpu")


@pytest.mark.filterwarnings("ignore")
def test_half_weights_are_those_that_were_scored(data: Path, tmp_path: Path) -> None:
    one = section(data, final_steps=0, half_weights=True, network_args={"widths": [8, 16, 32]})
    evaluation = run_experiment(Experiment.from_json(one), tmp_path / "work", tmp_path / "half", "cpu")
    run_experiment(Experiment.from_json({**one, "half_weights": False}), tmp_path / "work", tmp_path / "whole", "cpu")
    half, whole = (tmp_path / name / "weights.safetensors" for name in ("half", "whole"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    package = ModelPackage.load(tmp_path / "half", verify=True)
    weights = load_network(package).state_dict()
    assert {value.dtype for value in weights.values()} <= {torch.float32, torch.int64}
    again = Run(Experiment.from_json(one), tmp_path / "work", "cpu")
    found, _ = again.evaluator.score(load_network(package), again.data.part("test"), package.thresholds)
    assert found["mean"] == evaluation["mean"]
    # What is trained on is the same, whether the scores have just been made or were there from a run that was killed.
    on = Experiment.from_json({**one, "final_steps": 2})
    run_experiment(on, tmp_path / "work", tmp_path / "half", "cpu")
    run_experiment(on, tmp_path / "unbroken", tmp_path / "at-once", "cpu")
    assert (tmp_path / "at-once" / "weights.safetensors").read_bytes() == half.read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_what_the_scores_depend_on_is_scored_anew(data: Path, tmp_path: Path) -> None:
    one = Experiment.from_json(section(data, final_steps=0))
    run_experiment(one, tmp_path / "work", tmp_path / "model", "cpu")
    made = (tmp_path / "work" / "evaluation-4.json").stat().st_mtime_ns
    weaker = replace(one, stain_strength=0.25)
    second = run_experiment(weaker, tmp_path / "work", tmp_path / "model", "cpu")
    assert (tmp_path / "work" / "evaluation-4.json").stat().st_mtime_ns != made
    run = Run(weaker, tmp_path / "work", "cpu")
    scored, _ = run.evaluator.score(run.train(), run.data.part("test"), InstanceRules(**second["rules"]))
    assert scored["mean"] == second["mean"]
    written = (tmp_path / "work" / "evaluation-4.json").stat().st_mtime_ns
    assert run_experiment(weaker, tmp_path / "work", tmp_path / "model", "cpu") == second
    assert (tmp_path / "work" / "evaluation-4.json").stat().st_mtime_ns == written
    run_experiment(replace(weaker, half_weights=True), tmp_path / "work", tmp_path / "model", "cpu")
    assert (tmp_path / "work" / "evaluation-4.json").stat().st_mtime_ns != written


@pytest.mark.filterwarnings("ignore")
def test_changed_data_are_refused(data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    experiment = Experiment.from_json(section(mine, final_steps=0))
    run_experiment(experiment, tmp_path / "work", tmp_path / "model", "cpu")
    before = (tmp_path / "work" / "split.json").read_bytes()
    for folder in ("images", "labels"):
        one = next((mine / folder).glob("*A7-A13E*"))
        shutil.copy(one, one.with_name("TCGA-ZZ-ZZZZ-x.png"))
    for steps in (4, 6):
        longer = replace(experiment, schedule=replace(experiment.schedule, steps=steps))
        with pytest.raises(PipelineError, match=r"the data of 'tiny' changed after its training in .*work began"):
            Run(longer, tmp_path / "work", "cpu")
    assert (tmp_path / "work" / "split.json").read_bytes() == before


def test_names_of_classes_are_part_of_the_data() -> None:
    types = np.ones((4, 4), np.uint8)
    one = Field(
        "f", "s", "p", "", 0.5, np.zeros((4, 4, 3), np.uint8), types.astype(np.int32), types, ("Tumour", "Stroma")
    )
    assert digest_of([one]) != digest_of([replace(one, classes=("Stroma", "Tumour"))])


@pytest.mark.filterwarnings("ignore")
def test_models_that_are_replaced(data: Path, tmp_path: Path) -> None:
    def new_model(seed: int) -> None:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        write_package(tmp_path / "model", "resunet", {"widths": [4, 6, 8]}, seed=seed)

    def work(role: str, **changes: Any) -> Experiment:
        schedule = {"steps": 1, "batch": 1, "size": 64, "workers": 0, "keep": "last"}
        common = {"stain": "none", "schedule": schedule, "final_steps": 0, "evaluation": {"tune": False}}
        return Experiment.from_json(section(data, **common, **{role: str(tmp_path / "model")}, **changes))

    new_model(0)
    unseen = work("start_from", split={"method": "all-test"})
    before = run_experiment(unseen, tmp_path / "unseen", tmp_path / "unseen" / "model", "cpu")
    for role in ("start_from", "teacher"):
        Run(work(role), tmp_path / role, "cpu").train()
    new_model(1)
    for role in ("start_from", "teacher"):
        with pytest.raises(PipelineError, match=rf"the {role} of 'tiny' changed after its training in .*{role} began"):
            Run(work(role), tmp_path / role, "cpu")
    after = run_experiment(unseen, tmp_path / "unseen", tmp_path / "unseen" / "model", "cpu")
    assert after["mean"]["loss"] != before["mean"]["loss"]


def test_a_start_that_knows_a_patient_by_another_source(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = replace(
        write_package(tmp_path / "model", "resunet", {"widths": [4, 6, 8]}),
        data=({"name": "theirs", "fields": 9, "patients": [f.patient for f in load_fields(section(data)["data"])]},),
        stain={"method": "none", "reference": {"name": "x"}},
    )
    (tmp_path / "model" / "model.json").write_text(json.dumps(start.to_json()))
    leaking = Experiment.from_json(section(data, start_from=str(tmp_path / "model"), stain="none"))
    with pytest.raises(PipelineError, match="has learned from"):
        Run(leaking, tmp_path / "work", "cpu")
    # Of patients for validation it may know some, and that is said.
    known = load_data(replace(leaking, start_from=None)).part("validation")[0]
    (tmp_path / "model" / "model.json").write_text(
        json.dumps(replace(start, data=({"name": "theirs", "patients": [known.patient]},)).to_json())
    )
    run = Run(leaking, tmp_path / "work", "cpu")
    assert (
        f"start_from {start.folder} knows the patients of 1 of the 2 validation fields, first {known.name}"
        in caplog.text
    )
    assert "chosen on 2 fields of other patients (1 of them known before), thresholds" in run.protocol()


def test_a_start_has_the_encoders_weights(data: Path, tmp_path: Path) -> None:
    args = {"widths": [4, 6, 8, 8, 8]}
    package = write_package(tmp_path / "model", "squeeze-unet", args)
    gone = {"network": "squeeze-unet", "network_args": {**args, "encoder_weights": "gone.npz"}, "stain": "none"}
    with pytest.raises(PipelineError, match=r"gone\.npz: no such file"):
        Run(Experiment.from_json(section(data, **gone)), tmp_path / "new", "cpu").build()
    on = section(data, **gone, start_from=str(package.folder))
    found = Run(Experiment.from_json(on), tmp_path / "on", "cpu").build().state_dict()
    torch.testing.assert_close(found, load_network(package).state_dict())


def test_a_start_without_the_stain_reference(data: Path, tmp_path: Path) -> None:
    write_package(tmp_path / "model", "resunet", {"widths": [4, 6, 8]})
    for stain in ("macenko", "vahadane"):
        one = Experiment.from_json(section(data, start_from=str(tmp_path / "model"), stain=stain))
        with pytest.raises(PipelineError, match=rf"start_from .*model has no stain reference of '{stain}' \(.*to none"):
            Run(one, tmp_path / stain, "cpu")


@pytest.mark.parametrize(
    ("changes", "tuned", "expected"),
    [
        ({}, 0, "checkpoint chosen on 2 fields of other patients, thresholds on these"),
        ({}, 3, "checkpoint chosen on 2 fields of other patients, thresholds on these and 3 training fields"),
        ({"schedule": {"keep": "last"}}, 3, "the last checkpoint; thresholds chosen on 2 fields of other patients and "
         "3 training fields"),
        ({"evaluation": {"tune": False}}, 0, "checkpoint chosen on 2 fields of other patients; thresholds not tuned"),
        ({"validation": 0}, 0, "the last checkpoint; thresholds not tuned"),
        ({"validation": 0}, 3, "the last checkpoint; thresholds chosen on 3 training fields"),
        ({"split": {"method": "all-test"}}, 0, "theirs as it is; thresholds not tuned"),
        ({"start_from": "m", "start_share": 0.3}, 3, "checkpoint chosen on 2 fields of other patients, its weights "
         "averaged with those of theirs (0.3), thresholds on these and 3 training fields"),
        ({"final_steps": 7}, 0, "checkpoint chosen on 2 fields of other patients, thresholds on these; the packed "
         "weights were then trained 7 steps on all fields"),
    ],
)  # fmt: skip
def test_the_protocol_in_words(data: Path, changes: dict[str, Any], tuned: int, expected: str) -> None:
    one = Experiment.from_json(section(data, **{"final_steps": 0, **changes}))
    train = () if one.split.method == "all-test" else ("a", "b", "c")
    split = Split(train, ("d", "e") if train and one.validation else (), ("f",), 42)
    text = protocol(one, split, tuned, "theirs")
    assert text == f"{one.split.describe('monuseg')} (seed 42, 1 fields); {expected}"


def test_classes_that_nobody_has(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, labels = make_field(64, 64, 0.5, seed=1)
    typed = Field("a", "s", "p", "", 0.5, image, labels, (labels > 0).astype(np.uint8), ("tumour",))
    heads = {"heads": ["nucleus", "type"]}
    with pytest.raises(PipelineError, match=r"no field has a class of Tumor, Stroma \(the data have tumour\)"):
        check_classes(Experiment.from_json(section(data, classes=["Tumor", "Stroma"], **heads)), [typed])
    check_classes(
        Experiment.from_json(section(data, classes=["T", "S"], class_names={"tumour": "T", "x": "S"}, **heads)), [typed]
    )
    assert "train.classes: no field has S" in caplog.text
    assert "train.class_names: no field has x" in caplog.text


def test_stricter_licences_are_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_licences(Experiment.from_json(section(data)))
    assert not caplog.text
    source = {"kind": "monuseg", "path": str(data), "licence": "CC BY-NC-SA 4.0"}
    check_licences(Experiment.from_json(section(data) | {"data": [source]}))
    assert "the licence of monuseg, CC BY-NC-SA 4.0, is stricter (NC, SA) than that of the model" in caplog.text


def test_blurs_of_three_kinds() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 48, 3)).astype(np.uint8)
    for name, blur in BLURS.items():
        soft = [blur(image, rng, 1.0).astype(float) for _ in range(20)]
        assert {one.shape for one in soft} == {image.shape}
        assert min(one.std() for one in soft) < 0.7 * image.std(), name
        assert len({one.tobytes() for one in soft}) > 1 or name == "median"
        np.testing.assert_array_equal(blur(np.full_like(image, 77), rng, 2.0), 77)  # what is even stays
    dot = np.zeros((9, 9), np.uint8)
    dot[4, 4] = 240
    lines = [motion_blur(dot, np.random.default_rng(seed), 2.0) for seed in range(20)]
    assert all(line.max() < 100 and 3 <= (line > 0).sum() <= 5 for line in lines)

    prepared = prepare_field(Field("f", "s", "p", "", 0.5, image, np.ones((48, 48), np.int32)), 0.5)
    plain = {"scale": (1, 1), "rotation": 0, "flips": (), "stain": 0, "brightness": 0, "noise": 0}
    for share in (0.0, 0.5, 1.0):
        how = Augmentation(**plain, blur_share=share, blurs=("median", "motion"))
        drawn = [draw_sample(prepared, 48, how, np.random.default_rng(seed))[0] for seed in range(60)]
        blurred = sum(one.std() < 0.85 * image.std() for one in drawn)
        assert abs(blurred - 60 * share) <= 12 * (share == 0.5)
    for wrong in ({"blurs": ("box",)}, {"blurs": ()}, {"blur_share": 2}):
        with pytest.raises(ValueError, match="blur"):
            Augmentation(**wrong)


def test_rare_classes_are_drawn_more_often() -> None:
    present = np.array([[1, 0], [1, 0], [1, 1], [0, 0]] * 4, bool)  # three quarters and one quarter
    np.testing.assert_allclose(repeats(present, 0.25), 1)
    np.testing.assert_allclose(repeats(present, 0.5)[:4], [1, 1, math.sqrt(2), 1])
    np.testing.assert_allclose(repeats(present, 1.0)[:4], [math.sqrt(4 / 3)] * 2 + [2, 1])
    labels = np.arange(4, dtype=np.int32).reshape(2, 2)
    image = np.zeros((2, 2, 3), np.uint8)
    known = Field("a", "s", "p", "", 0.5, image, labels, np.array([[1, 2], [0, 3]], np.uint8), ("x", "y", "z"))
    bare = Field("b", "s", "p", "", 0.5, image, labels)
    found = classes_present([known, bare], ("z", "x", "q"), {"y": "q"})  # x is of the background's pixel alone
    assert found.tolist() == [[True, False, True], [False, False, False]]
    with pytest.raises(PipelineError, match="rare_classes without a type head"):
        Experiment.from_json({"name": "n", "data": [{"kind": "x", "path": "y"}], "rare_classes": 0.5})


def test_a_sources_share_stays_with_rare_classes(tmp_path: Path) -> None:
    kinds = np.zeros((4, 64, 64, 2), np.uint16)
    kinds[:, 8:24, 8:24] = (1, 2)
    kinds[0, 40:56, 40:56] = (2, 1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "images.npy", np.stack([stained(64, 64, seed) for seed in range(4)]))
        np.save(tmp_path / name / "labels.npy", kinds)
        rows = "".join(f"{name}_{i}-0001\n" for i in range(4))
        (tmp_path / name / "patch_info.csv").write_text("patch_info\n" + rows)
    sources = [
        {"kind": "conic", "name": n, "path": str(tmp_path / n), "weight": w, "licence": "CC0 1.0"}
        for n, w in (("one", 1), ("two", 3))
    ]
    settings = section(tmp_path, heads=["nucleus", "type"], holdout="one", stain="none", rare_classes=1.0)
    settings |= {"data": sources, "split": {"method": "all-train"}, "validation": 0, "reference": "one-one_0-0001"}
    run = Run(Experiment.from_json(settings), tmp_path / "work", "cpu")
    fields = run.data.fields
    weights = run.weights(fields)
    assert sum(w for w, f in zip(weights, fields, strict=True) if f.source == "one") == pytest.approx(1)
    assert sum(weights) == pytest.approx(4)
    rare = {f.name: w for w, f in zip(weights, fields, strict=True) if f.source == "one"}
    assert rare["one-one_0-0001"] == pytest.approx(2 * rare["one-one_1-0001"])
    # Fields whose classes nobody knows, as synthetic ones, do not make a class rarer.
    run.experiment = replace(run.experiment, rare_classes=0.5)
    bare = [replace(f, types=None) if f.source == "two" else f for f in fields]
    rare = {f.name: w for w, f in zip(run.weights(bare), bare, strict=True)}
    assert rare["one-one_0-0001"] == pytest.approx(math.sqrt(2) * rare["one-one_1-0001"])
    assert rare["two-two_0-0001"] == pytest.approx(rare["two-two_1-0001"])


def test_little_blur_and_no_weights(data: Path, tmp_path: Path) -> None:
    image, labels = make_field(96, 96, 0.5, seed=1)
    prepared = prepare_field(Field("a", "s", "p", "", 0.5, image, labels), 0.5)
    for seed in range(8):
        draw_sample(prepared, 32, Augmentation(blur=0.1), np.random.default_rng(seed))
    weightless = section(data) | {"data": [{"kind": "monuseg", "path": str(data), "weight": 0}]}
    run = Run(Experiment.from_json(weightless), tmp_path / "work", "cpu")
    with pytest.raises(PipelineError, match="the weight of every source with training fields is 0"):
        run.weights(run.data.part("train"))


def test_what_was_learned_before_counts(tmp_path: Path) -> None:
    earlier = {"name": "a", "licence": "CC0", "fields": 9, "patients": ["p1"]}
    start = replace(
        write_package(tmp_path / "model", "resunet", {"widths": [4, 6]}), data=(earlier, {"name": "b", "fields": 2})
    )
    fields = [Field(f"f{i}", "a", f"p{i}", "", 0.5, *make_field(32, 32, 0.5, seed=i)) for i in range(2)]
    assert learned_from(
        fields, [{"kind": "labels", "name": "a", "path": "x", "licence": "CC BY 4.0"}], [start, start]
    ) == (
        {"name": "a", "licence": "CC BY 4.0", "fields": 9, "patients": ["p0", "p1"]},
        {"name": "b", "fields": 2, "patients": []},
    )
    # A source that does not state its licence keeps the one that is known.
    assert learned_from(fields, [{"kind": "labels", "name": "a", "path": "x"}], [start])[0]["licence"] == "CC0"
    assert learned_from([], [], (), ("net.npz", "BSD")) == (
        {"name": "encoder weights net.npz", "licence": "BSD", "fields": 0, "patients": []},
    )


@pytest.mark.filterwarnings("ignore")
def test_every_head_trains_and_goes_into_the_package(data: Path, tmp_path: Path) -> None:
    conic = tmp_path / "conic"
    conic.mkdir()
    image, labels = make_field(128, 128, 0.5, seed=8)
    types = np.where(labels > 0, labels % 2 + 1, 0)
    np.save(conic / "images.npy", np.stack([image] * 2))
    np.save(conic / "labels.npy", np.stack([np.dstack([labels, types])] * 2).astype(np.int32))
    (conic / "patch_info.csv").write_text("patch_info\np_1-0\np_2-0\n")
    heads = ["nucleus", "distance", "contour", "hv", "type"]
    value = section(data) | {
        "data": [{"kind": "monuseg", "path": str(data)}, {"kind": "conic", "path": str(conic)}],
        "heads": heads,
        "classes": ["a", "b"],
        "class_names": {"Neutrophil": "a", "Epithelial": "b"},
        "holdout": "conic",
        "validation": 0,
        "split": {"method": "patients", "test": 0.5},
        "evaluation": {"tta": "flips", "windows": True},
        "patch": 64,
        "overlap": 8,
        "final_steps": 0,
    }
    evaluation = run_experiment(Experiment.from_json(value), tmp_path / "work", tmp_path / "model", "cpu")
    (scores,) = evaluation["images"].values()
    assert set(scores["type_f1"]) == {"a", "b"}
    types = evaluation["types"]
    assert 0 <= types["mpq_plus"] == round(sum(types["classes"][k]["pq"] for k in "ab") / 2, 4)
    assert types["r2"] is None  # of a single field
    assert evaluation["batchwise"]["batches"] == 2
    package = ModelPackage.load(tmp_path / "model", verify=True)
    assert (package.heads, package.tta, package.thresholds.markers) == (tuple(heads), "flips", "distance")
    assert [c.name for c in package.classes] == ["a", "b"]
    names = channel_names(package)
    maps = predict_field(load_network(package), image, Outputs(names, package.tta), (64, 8))
    assert maps.shape == (8, *image.shape[:2])


@pytest.mark.filterwarnings("ignore")
def test_training_on_learns_on(data: Path, tmp_path: Path) -> None:
    schedule = {"steps": 2, "batch": 2, "size": 64, "workers": 0, "keep": "last"}
    run_experiment(Experiment.from_json(section(data, schedule=schedule)), tmp_path / "w", tmp_path / "m", "cpu")
    first, last = (
        torch.load(tmp_path / "w" / folder / "last.ckpt", weights_only=True)["current_model_state"]
        for folder in ("heldout", "final-2")
    )
    # Weights, and what batch normalisation has seen: a network is left in evaluation mode between two trainings.
    for name in ("network.stem.0.weight", "network.stem.1.running_mean"):
        assert not torch.equal(first[name], last[name])


@pytest.mark.filterwarnings("ignore")
def test_what_was_trained_again_is_scored_and_trained_on_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a hint advises where a checkpoint is damaged: its folder is deleted, and the training begins again.
    experiment = Experiment.from_json(section(data, schedule={"steps": 1, "batch": 1, "size": 64, "workers": 0}))
    run_experiment(experiment, tmp_path / "w", tmp_path / "m", "cpu")
    before = (tmp_path / "m" / "weights.safetensors").read_bytes()
    again = (tmp_path / "w" / "evaluation-1.json").read_bytes()
    run_experiment(experiment, tmp_path / "w", tmp_path / "m", "cpu")
    assert (tmp_path / "m" / "weights.safetensors").read_bytes() == before
    assert (tmp_path / "w" / "evaluation-1.json").read_bytes() == again
    shutil.rmtree(tmp_path / "w" / "heldout")
    monkeypatch.setattr("lightning.pytorch.seed_everything", lambda seed, verbose: torch.manual_seed(seed + 1))
    run_experiment(experiment, tmp_path / "w", tmp_path / "m", "cpu")
    assert (tmp_path / "m" / "weights.safetensors").read_bytes() != before
    assert (tmp_path / "w" / "evaluation-1.json").read_bytes() != again


@pytest.mark.filterwarnings("ignore")
def test_training_on_is_averaged_with_what_it_began_with(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def packed(name: str, **changes: Any) -> tuple[ModelPackage, dict[str, Any]]:
        run_experiment(Experiment.from_json({**on, **changes}), tmp_path / "on", tmp_path / name, "cpu")
        package = ModelPackage.load(tmp_path / name, verify=True)
        return package, load_network(package).state_dict()

    first = section(data, final_steps=0)
    run_experiment(Experiment.from_json(first), tmp_path / "work", tmp_path / "first", "cpu")
    start = ModelPackage.load(tmp_path / "first")
    # Nobody is left to score: the card has the scores and thresholds of the model before, and says so.
    on = section(data, start_from=str(tmp_path / "first"), split={"method": "all-train"}, validation=0, final_steps=0)
    alone, after = packed("alone")
    mixed, found = packed("mixed", start_share=0.25)
    for package, more in ((alone, ""), (mixed, ", and their weights averaged with its (0.25)")):
        assert package.thresholds == start.thresholds
        assert package.metrics["mean"] == start.metrics["mean"]
        assert package.metrics["protocol"] == (
            f"{start.metrics['protocol']}; these are the scores of tiny, from which the packed weights were trained on "
            f"for 4 steps with all fields{more}"
        )
        assert len(package.data[0]["patients"]) == 6
    (tmp_path / "on.json").write_text(json.dumps(on))
    command = [
        "train",
        f"--config-json={tmp_path / 'on.json'}",
        f"--work={tmp_path / 'on'}",
        f"--out={tmp_path / 'alone'}",
    ]
    assert main([*command, "--device=cpu"]) == 0
    assert any(told.startswith(f"tiny: AJI {start.metrics['mean']['aji']:.3f}") for told in caplog.messages)
    told = Run(Experiment.from_json({**on, "validation": 1, "final_steps": 3}), tmp_path / "told", "cpu")
    assert told.scores_before()["protocol"].endswith("for 4 steps with 5 fields, then 3 with all")
    for name, value in load_network(start).state_dict().items():
        if value.is_floating_point():  # batch normalisation's averages, too
            assert not torch.equal(value, after[name])
            torch.testing.assert_close(found[name], 0.25 * value + 0.75 * after[name])
    other = {**on, "name": "coarse", "mpp": 1.0}
    with pytest.raises(PipelineError, match=r"all-train, but the thresholds of .*first are for 0\.5 µm/px and heads"):
        run_experiment(Experiment.from_json(other), tmp_path / "coarse", tmp_path / "other", "cpu")
    with pytest.raises(PipelineError, match=r"start_share 0\.5 without start_from"):
        Experiment.from_json(section(data, start_share=0.5))
    typed = section(data, start_from=str(tmp_path / "first"), start_share=0.5, heads=["nucleus", "distance", "contour"])
    with pytest.raises(PipelineError, match=r"start_share 0\.5, but .*first lacks weights of the network"):
        Run(Experiment.from_json(typed), tmp_path / "typed", "cpu")
    # Where patients are held out, what is scored is what is packed.
    same = {"start_from": str(tmp_path / "first"), "evaluation": {"tune": False}, "final_steps": 0}
    held = section(data, **same, start_share=1.0)
    scores = run_experiment(Experiment.from_json(held), tmp_path / "held", tmp_path / "same", "cpu")
    packed_again = load_network(ModelPackage.load(tmp_path / "same")).state_dict()
    torch.testing.assert_close(packed_again, load_network(start).state_dict())
    as_it_is = Run(Experiment.from_json({**held, "start_share": 0.0}), tmp_path / "as-it-is", "cpu")
    own, _ = as_it_is.evaluator.score(load_network(start), as_it_is.data.part("test"), start.thresholds)
    assert scores["mean"] == own["mean"]
    assert scores["before"] == {"model": "tiny", "mean": own["mean"], "interval_95": own["interval_95"]}


def test_thresholds_begin_with_those_of_the_start(data: Path, tmp_path: Path) -> None:
    start = replace(
        write_package(tmp_path / "model", "resunet", {"widths": [4, 6, 8]}),
        thresholds=InstanceRules(nucleus=99, refine=2),
        stain={"method": "none", "reference": {"name": "x"}},
    )
    (tmp_path / "model" / "model.json").write_text(json.dumps(start.to_json()))
    changes: tuple[tuple[dict[str, Any], InstanceRules], ...] = (
        ({}, start.thresholds),
        ({"evaluation": {"rules": {"marker": 77}}}, replace(start.thresholds, marker=77)),
        ({"heads": ["nucleus", "contour", "distance"]}, start.thresholds),
        ({"split": {"method": "all-test"}, "evaluation": {"rules": {"marker": 77}}}, start.thresholds),
        # Not where they do not fit.
        ({"evaluation": {"rules": {"markers": "nucleus"}}}, InstanceRules.default_for("nucleus")),
        ({"mpp": 1.0}, InstanceRules.default_for("distance", 1.0)),
        ({"heads": ["nucleus"]}, InstanceRules.default_for("nucleus")),
    )
    for number, (change, expected) in enumerate(changes):
        one = section(data, start_from=str(tmp_path / "model"), stain="none", **change)
        assert Run(Experiment.from_json(one), tmp_path / f"{number}", "cpu").rules == expected, change


@pytest.mark.filterwarnings("ignore")
def test_a_network_that_finds_instances_trains_and_packs(data: Path, tmp_path: Path) -> None:
    args = {"backbone": "resnet18", "channels": 8, "hidden": 8, "convolutions": 1, "proposals": 20, "score": 0.1}
    value = section(data, network="maskrcnn", network_args=args, final_steps=0, validation=1)
    value |= {"patch": 64, "overlap": 32, "evaluation": {"tune": False}}
    experiment = Experiment.from_json(value)
    assert experiment.heads == ("nucleus", "distance")
    evaluation = run_experiment(experiment, tmp_path / "work", tmp_path / "model", "cpu")
    package = ModelPackage.load(tmp_path / "model", verify=True)
    assert package.metrics["mean"] == evaluation["mean"]
    image, _ = make_field(100, 90, 0.5, seed=9)
    maps = predict_field(load_network(package), image, Outputs(map_names(package.heads)), (64, 32))
    assert maps.shape == (2, *image.shape[:2])
    for change in ({"heads": ["nucleus"]}, {"evaluation": {"tta": "flips"}}):
        with pytest.raises(PipelineError, match="maskrcnn with heads"):
            Experiment.from_json(value | change)


@pytest.mark.filterwarnings("ignore")
def test_another_experiment_of_the_same_name_is_one_line(data: Path, tmp_path: Path) -> None:
    run_experiment(Experiment.from_json(section(data, final_steps=0)), tmp_path / "work", tmp_path / "model", "cpu")
    other = Experiment.from_json(section(data, final_steps=0, network_args={"widths": [6, 8, 12]}))
    with pytest.raises(PipelineError, match="another experiment called 'tiny'"):
        run_experiment(other, tmp_path / "work", tmp_path / "other", "cpu")
    # Nor does a checkpoint that was put there by hand pass for this network's.
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "work" / "heldout", tmp_path / "moved" / "heldout")
    with pytest.raises(PipelineError, match="another network"):
        run_experiment(other, tmp_path / "moved", tmp_path / "other", "cpu")
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "work" / "heldout" / "last.ckpt").is_file()


@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoint_is_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / "work" / "heldout").mkdir(parents=True)
    (tmp_path / "work" / "heldout" / "last.ckpt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(PipelineError, match=r"last\.ckpt cannot be read"):
        run_experiment(Experiment.from_json(section(data)), tmp_path / "work", tmp_path / "model", "cpu")


def test_a_failing_file_server_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_package(tmp_path / "model", "resunet", {"widths": [4, 6]})
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "split.json").touch()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        for name in ("open", "read_bytes", "read_text"):
            patch.setattr(Path, name, fail)
        patch.setattr("builtins.open", fail)
        for read in (
            lambda: load_network(package),
            lambda: read_checkpoint(tmp_path / "last.ckpt"),
            lambda: read_json(tmp_path / "split.json"),
        ):
            with pytest.raises(OSError, match="Stale"):
                read()
    package.weights.write_bytes(package.weights.read_bytes()[:100])
    with pytest.raises(PipelineError, match=r"model: the weights cannot be read: .*\(fetch it again\)"):
        load_network(package)


@pytest.mark.filterwarnings("ignore")
def test_diverging_loss_is_one_line(data: Path, tmp_path: Path) -> None:
    schedule = {"steps": 20, "batch": 2, "size": 64, "validate_every": 2, "workers": 0, "learning_rate": 1e30}
    with pytest.raises(PipelineError, match="the loss is"):
        run_experiment(Experiment.from_json(section(data, schedule=schedule)), tmp_path / "w", tmp_path / "m", "cpu")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "speed"),
        ({"schedule": {"epoch": 3}}, "epoch"),
        ({"augmentation": {"scale": [2, 1]}}, "scale"),
        ({"network": "unet9"}, "unet9"),
        ({"patch": 98}, "multiple of 4"),
        ({"patch": 208, "network_args": {"widths": [4] * 6}}, "multiple of 32"),
        ({"stain": "pink"}, "pink"),
        ({"schedule": {"encoder_rate": 0.1}}, "encoder_rate 0.1, but resunet has no pretrained encoder"),
    ],
)
def test_wrong_section_is_one_line(data: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Experiment.from_json(section(data, **change))


def test_samples_are_seeded_and_aligned() -> None:
    image, labels = make_field(200, 200, 0.5, seed=3)
    prepared = prepare_field(Field("f", "s", "p", "", 0.5, image, labels), 0.5)
    plain = Augmentation(stain=0, brightness=0, blur=0, noise=0)
    first = draw_sample(prepared, 96, plain, np.random.default_rng(5))
    again = draw_sample(prepared, 96, plain, np.random.default_rng(5))
    np.testing.assert_array_equal(first[0], again[0])
    # Nuclei are darker than what lies around them in red, so image and target must be turned alike.
    inside = first[1][..., 0] > 200
    assert inside.any()
    assert first[0][inside, 0].mean() < first[0][~inside, 0].mean()


def test_bootstrap_interval_holds_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.6, 0.05, 14)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert math.isclose(high - low, 4 * 0.05 / math.sqrt(14), rel_tol=0.5)


def test_bootstrap_interval_draws_patients() -> None:
    rng = np.random.default_rng(2)
    patients = [patient for patient in "abcdef" for _ in range(8)]
    values = np.repeat(rng.normal(0.6, 0.05, 6), 8) + rng.normal(0, 0.001, 48)
    by_field, by_patient = (high - low for low, high in (bootstrap_interval(values, g) for g in (None, patients)))
    assert 2 < by_patient / by_field < 4  # the square root of 8
    assert bootstrap_interval(values, list(range(48))) == bootstrap_interval(values)
    assert bootstrap_interval(values, ["one"] * 48) == bootstrap_interval(values)


def test_contrast_keeps_the_mean_and_noughts_change_nothing() -> None:
    image = np.random.default_rng(0).integers(60, 190, (40, 40, 3), np.uint8)
    for seed in range(5):
        changed = jitter_colour(image, np.random.default_rng(seed), contrast=0.3)
        assert abs(float(changed.mean()) - float(image.mean())) < 0.5
    np.testing.assert_array_equal(jitter_stain(image, np.random.default_rng(0), 0), image)


def test_the_card_does_not_tell_of_the_trainers_folders() -> None:
    args = {"encoder_weights": "/home/somebody/weights/resnet34.pth", "normalise": True}
    assert recorded_args(args) == {"encoder_weights": "resnet34.pth", "normalise": True}
    assert recorded_args({"encoder_weights": None}) == {"encoder_weights": None}
    assert recorded_args({"encoder_weights": "imagenet"}) == {"encoder_weights": "imagenet"}
