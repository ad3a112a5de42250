"""The training loop: resuming, time limits, rates, and what must not lose a training."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.slides.synthetic import make_field
from pipeline.training.field import Field
from pipeline.training.samples import Augmentation, prepare_field
from pipeline.training.schedule import Deadline, Schedule, Unfinished
from pipeline.training.targets import Targets

torch = pytest.importorskip("torch")

import lightning.pytorch as lightning  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from pipeline.networks.outputs import Outputs, map_names  # noqa: E402
from pipeline.networks.registry import build_network  # noqa: E402
from pipeline.training.fit import (  # noqa: E402
    Examined,
    Job,
    TrainingModule,
    fit,
    move_averages,
)
from pipeline.training.losses import CombinedLoss  # noqa: E402
from pipeline.training.stream import SampleOrder, SampleStream  # noqa: E402
from pipeline.training.trainer import Plateau, WholeCheckpoints  # noqa: E402

HEADS = ("nucleus", "distance")
FIELDS = [Field(f"f{i}", "s", f"p{i}", "", 0.5, *make_field(96, 96, 0.5, seed=i)) for i in range(2)]
PREPARED = [prepare_field(f, 0.5) for f in FIELDS]
SHORT = Schedule(steps=4, batch=1, size=64, validate_every=2, workers=0)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)


def job(network: str = "resunet", **args: Any) -> Job:
    torch.manual_seed(0)
    built = build_network(network, 2, args or {"widths": [4, 6]}, pretrained=False)
    outputs = Outputs(map_names(HEADS))
    return Job(built, CombinedLoss((), HEADS), Targets(), outputs, InstanceRules(), None, Augmentation())


def train(folder: Path, schedule: Schedule = SHORT, what: Job | None = None, validate: bool = True, **more: Any) -> Any:
    validation = [Examined(FIELDS[1], PREPARED[1])] if validate else []
    weights = np.ones(len(PREPARED))
    return fit(
        what or job(), PREPARED, weights, validation, schedule=schedule, folder=folder, accelerator="cpu", **more
    )


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.ckpt", weights_only=True)
    return found


@contextmanager
def no_room(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with no_room(len(before) // 2), pytest.raises(PipelineError, match=r"last\.ckpt|best\.ckpt") as caught:
        train(tmp_path, replace(SHORT, steps=6))
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".part*"))
    train(tmp_path, replace(SHORT, steps=6))  # with room again it goes on
    assert checkpoint(tmp_path)["global_step"] == 6


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("last.ckpt", "best.ckpt")}
    with monkeypatch.context() as patch:
        patch.setattr(CombinedLoss, "__call__", lambda *_: {"loss": torch.tensor(float("nan"), requires_grad=True)})
        with pytest.raises(
            PipelineError, match=r"the loss is nan at step 4 \(.*the last checkpoint is kept\)"
        ) as caught:
            train(tmp_path, replace(SHORT, steps=6))
    assert "\n" not in str(caught.value)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    train(tmp_path, replace(SHORT, steps=6))
    assert checkpoint(tmp_path)["global_step"] == 6


def test_checkpoints_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    with no_room(1000), pytest.raises(PipelineError, match="cannot be written"):
        WholeCheckpoints().save_checkpoint({"x": torch.zeros(10_000)}, path)
    assert list(tmp_path.iterdir()) == []
    WholeCheckpoints().save_checkpoint({"x": torch.zeros(10)}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class AfterThree(Deadline):
    """Over after three steps."""

    asked = 0

    @property
    def passed(self) -> bool:
        self.asked += 1
        return self.asked > 3


def test_stopped_by_the_clock_and_gone_on(tmp_path: Path) -> None:
    with pytest.raises(Unfinished, match=r"stopped after 7 minutes, at step 3 of 4 .*run the same command") as caught:
        train(tmp_path, deadline=AfterThree(7))
    assert "\n" not in str(caught.value)
    assert checkpoint(tmp_path)["global_step"] == 3
    seconds = json.loads((tmp_path / "time.json").read_text())["seconds"]
    network = train(tmp_path)
    done = checkpoint(tmp_path)
    assert done["global_step"] == 4
    spent = json.loads((tmp_path / "time.json").read_text())
    assert spent["seconds"] >= seconds > 0
    assert spent["steps"] == 4
    assert not network.training
    # The validation of the last step has been held: it is what the best checkpoint is chosen by.
    logs = [path.read_text() for path in sorted(tmp_path.glob("log-*/metrics.csv"))]
    assert len(logs) == 2
    assert "val/aji" in logs[1].splitlines()[0]


@pytest.mark.parametrize(
    ("changes", "validate"),
    [
        ({"keep": "aji"}, True),
        ({"workers": 2, "ema": 0.0}, True),
        ({"optimizer": "sgd", "decay": "plateau", "patience": 0, "validate_every": 2}, False),
    ],
)
def test_a_broken_training_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], validate: bool
) -> None:
    class Killed(Exception):
        pass

    def die(self: TrainingModule, batch: Any, index: int) -> Any:
        if self.global_step == 5:
            raise Killed
        return step(self, batch, index)

    def shaky() -> Job:  # its dropout draws random numbers at each step
        return job("unet-vit", widths=[4, 6, 8, 8], depth=1, heads=2, hidden=16, image=64)

    step = TrainingModule.training_step
    schedule = replace(SHORT, **{"steps": 6, "batch": 2, "validate_every": 3, "ema": 0.9, **changes})
    whole = train(tmp_path / "whole", replace(schedule, workers=0), shaky(), validate)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", die)
        with pytest.raises(Killed if validate else Unfinished):
            train(tmp_path / "broken", schedule, shaky(), validate, deadline=None if validate else AfterThree(7))
    assert checkpoint(tmp_path / "broken")["global_step"] == 3
    resumed = train(tmp_path / "broken", schedule, shaky(), validate)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    one, other = (checkpoint(tmp_path / name) for name in ("whole", "broken"))
    for state in (one, other):  # but for the time that it took
        for callback in state["callbacks"].values():
            callback.pop("seconds", None)
        state["optimizer"] = state["optimizer_states"][0]["state"]
    for name in ("state_dict", "current_model_state", "optimizer"):
        torch.testing.assert_close(other.get(name), one.get(name), rtol=0, atol=0)
    for name in ("callbacks", "lr_schedulers"):
        assert other[name] == one[name]


def test_samples_are_the_same_for_any_workers_devices_and_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(step: int, workers: int = 0) -> list[bytes]:
        loader = DataLoader(stream, 2, sampler=SampleOrder(step, 2, 1), num_workers=workers)
        return [image.numpy().tobytes() for images, _ in itertools.islice(loader, 4 - step) for image in images]

    stream = SampleStream(PREPARED, np.ones(2), 64, Augmentation(), 5)
    whole = drawn(0)
    assert len(set(whole)) == 8
    assert drawn(0, workers=3) == whole
    assert drawn(2) == whole[4:]
    # Two devices see together what one sees with twice the batch.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, numbers in enumerate(([8, 9, 12, 13], [10, 11, 14, 15])):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        assert list(itertools.islice(SampleOrder(2, 2, 2), 4)) == numbers


def test_the_last_step_is_validated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps, expected in ((3, [2, 3]), (7, [4, 6, 7]), (8, [8])):
        with caplog.at_level("INFO", "pipeline"):
            train(tmp_path, replace(SHORT, steps=steps))
        assert [int(step) for step in re.findall(r"step (\d+): training loss", caplog.text)] == expected
        caplog.clear()
        assert checkpoint(tmp_path)["global_step"] == steps


def test_fewer_steps_than_there_were(tmp_path: Path) -> None:
    train(tmp_path, replace(SHORT, steps=3))
    with pytest.raises(PipelineError, match=r"trained for 3 steps already, more than 2 \(set 3 steps or more, or"):
        train(tmp_path, replace(SHORT, steps=2))


def test_averaging_holds_the_pixels_once() -> None:
    module = TrainingModule(job(), SHORT, [Examined(FIELDS[1], PREPARED[1])])
    averaged = copy.deepcopy(module)
    assert averaged.network is not module.network
    assert averaged.validation[0].prepared is PREPARED[1]


SHARED = """
import sys
from pathlib import Path
from dataclasses import replace
import numpy as np
import test_fit as shared
from pipeline.training.fit import Examined, TrainingModule, fit

folder, step = Path(sys.argv[1]), TrainingModule.validation_step

def note(self, batch, index):
    with (folder / f"rank-{self.global_rank}.txt").open("a") as file:
        file.write(f"{int(batch)} ")
    return step(self, batch, index)

TrainingModule.validation_step = note
validation = [Examined(shared.FIELDS[i], shared.PREPARED[i]) for i in (0, 1, 1)]
schedule = replace(shared.SHORT, steps=1, validate_every=1, devices=2)
fit(shared.job(), shared.PREPARED, np.ones(2), validation, schedule=schedule, folder=folder, accelerator="cpu")
"""


def test_several_processes_score_each_field_once(tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"rank-{rank}.txt").read_text().split() for rank in (0, 1)] == [["0", "1", "2"]] * 2


@pytest.mark.parametrize("on", [False, True])
def test_normalisation_over_all_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    asked: dict[str, Any] = {}
    trainer = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", lambda **how: asked.update(how) or trainer(**how))
    train(tmp_path, replace(SHORT, steps=1, sync_norm=on))
    assert asked["sync_batchnorm"] is on
    if on:
        with pytest.raises(PipelineError, match="sync_norm with 2 processes on CPUs"):
            train(tmp_path / "two", replace(SHORT, steps=1, sync_norm=True, devices=2))


def test_no_time_at_all(tmp_path: Path) -> None:
    assert Deadline(0).passed
    assert not Deadline().passed
    with pytest.raises(Unfinished, match="at step 0 of 4"):
        train(tmp_path, deadline=Deadline(0))
    assert (tmp_path / "last.ckpt").is_file()


def test_the_best_checkpoint_survives_a_resumed_run(tmp_path: Path) -> None:
    train(tmp_path, replace(SHORT, keep="loss"))
    state = checkpoint(tmp_path)["callbacks"]
    best = next(value["best"] for key, value in state.items() if key.startswith("Checkpoints"))
    assert best < 0  # of a loss, the smallest
    path = tmp_path / "best.ckpt"
    marked = checkpoint(tmp_path, "best")
    last = checkpoint(tmp_path)
    for key in last["callbacks"]:
        if key.startswith("Checkpoints"):
            last["callbacks"][key]["best"] = 1e9  # nothing that comes can be better
    torch.save(last, tmp_path / "last.ckpt")
    before = path.read_bytes()
    network = train(tmp_path, replace(SHORT, keep="loss", steps=6))
    assert path.read_bytes() == before
    name = next(iter(network.state_dict()))
    torch.testing.assert_close(network.state_dict()[name], marked["state_dict"][f"network.{name}"])


def test_the_average_forgets_what_it_began_with() -> None:
    def averaged(value: float, current: float, count: int) -> float:
        values = [torch.tensor([value]), torch.tensor([-value])]
        move_averages(0.9, values, [torch.tensor([current]), torch.tensor([-current])], torch.tensor(count))
        assert values[0] == -values[1]
        return float(values[0])

    value = 100.0
    for count in range(1, 200):
        value = averaged(value, 1.0, count)
    assert value == pytest.approx(1.0, rel=1e-6)
    # Young: 2 of 11 parts of what was, 9 of the new; old: `decay` parts.
    assert averaged(11.0, 0.0, 1) == pytest.approx(2.0)
    assert averaged(1.0, 0.0, 10**6) == pytest.approx(0.9)
    batches = [torch.tensor(3)]
    move_averages(0.9, batches, [torch.tensor(7)], torch.tensor(5))
    assert batches[0] == 7


def test_validation_sees_the_training_from_its_first_steps(tmp_path: Path) -> None:
    train(tmp_path, replace(SHORT, steps=20, ema=0.995))
    with next(tmp_path.glob("log-*/metrics.csv")).open(encoding="utf-8") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 10
    assert losses[0] != losses[1]


def test_without_validation_the_last_state_is_kept(tmp_path: Path) -> None:
    network = train(tmp_path, validate=False)
    assert not (tmp_path / "best.ckpt").exists()
    name = next(iter(network.state_dict()))
    torch.testing.assert_close(network.state_dict()[name], checkpoint(tmp_path)["state_dict"][f"network.{name}"])


def test_checkpoint_of_another_version_is_one_line(tmp_path: Path) -> None:
    train(tmp_path)
    old = checkpoint(tmp_path)
    del old["lr_schedulers"][0]["lr_lambdas"]
    torch.save(old, tmp_path / "last.ckpt")
    with pytest.raises(PipelineError, match="of another version"):
        train(tmp_path, replace(SHORT, steps=6))


def test_checkpoint_of_another_network_is_one_line(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(PipelineError, match="another network"):
        train(tmp_path, what=job(widths=[6, 8]))
    assert (tmp_path / "last.ckpt").read_bytes() == before


def rates(schedule: Schedule) -> list[float]:
    return [schedule.rate_at(step) for step in range(schedule.steps)]


def test_rates() -> None:
    base = Schedule(steps=100, warmup=0.1)
    cosine = rates(base)
    assert cosine[0] < cosine[5] < cosine[9] < 1
    assert cosine[10] == pytest.approx(1, abs=1e-3)
    assert cosine[-1] == pytest.approx(0.01, abs=2e-3)
    assert rates(replace(base, floor=0.5))[-1] == pytest.approx(0.5, abs=2e-3)
    line = rates(replace(base, decay="linear", hold=0.5, floor=0.0, warmup=0))
    assert set(line[:51]) == {1.0}
    assert [line[60], line[75], line[99]] == pytest.approx([0.8, 0.5, 0.02])
    assert Schedule(steps=4, decay="linear", hold=1.0, warmup=0).rate_at(4) == 1
    steps = rates(replace(base, decay="steps", milestones=(0.5, 0.8), gamma=0.1, warmup=0))
    assert [steps[i] for i in (0, 49, 50, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert set(rates(replace(base, decay="constant", warmup=0))) == {1.0}
    assert set(rates(replace(base, decay="plateau", warmup=0))) == {1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "sudden"}, "decay 'sudden'.*cosine"),
        ({"betas": (0.9, 1.0)}, "betas 0.9, 1.0"),
        ({"optimizer": "lion"}, "optimizer 'lion'"),
        ({"keep": "mood"}, "keep 'mood'"),
        ({"milestones": (0.8, 0.5)}, "milestones 0.8, 0.5"),
        ({"milestones": (1.5,)}, "shares between 0 and 1"),
        ({"size": 16}, "size 16"),
    ],
)
def test_wrong_schedules_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        Schedule(**change)


def test_epochs_are_passes_over_the_area() -> None:
    schedule = Schedule(epochs=3, batch=4, size=100)
    assert schedule.resolved(400_000).steps == 30
    assert schedule.resolved(400_000).epochs is None
    assert replace(schedule, devices=2).resolved(400_000).steps == 15
    assert Schedule(steps=7).resolved(1e9).steps == 7


def test_plateau_lowers_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []

    class Stuck(CombinedLoss):
        def __call__(self, logits: Any, targets: Any) -> dict[str, Any]:
            return {"loss": 1 + 0 * logits.sum()}

    def note(self: Any, optimizer: Any) -> None:
        used.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", note)
    stuck = replace(job(), loss=Stuck((), HEADS))
    schedule = replace(
        SHORT, steps=8, validate_every=1, decay="plateau", patience=1, gamma=0.5, learning_rate=1.0, warmup=0.0
    )
    train(tmp_path, schedule, stuck, validate=False)
    # The first check sets the low; after each second one without a new low the next steps go at half the rate.
    assert used[0] == 1
    assert used[-1] in (0.125, 0.25)
    assert used == sorted(used, reverse=True)
    used.clear()
    train(tmp_path, replace(schedule, steps=10), replace(stuck, network=job().network), validate=False)
    assert used[-1] <= 0.25  # what the plateau came to is taken up


def test_plateau_averages_where_the_processes_are() -> None:
    seen = []

    def reduce(value: Any, reduce_op: str) -> Any:
        seen.append(value.device)
        return torch.tensor(1.0)

    strategy = SimpleNamespace(root_device=torch.device("meta"), reduce=reduce)
    trainer: Any = SimpleNamespace(global_step=1, strategy=strategy)
    Plateau(replace(SHORT, validate_every=1)).on_train_batch_end(trainer, TrainingModule, {"loss": 1.0}, None, 0)  # type: ignore[arg-type]
    assert seen == [strategy.root_device]


@pytest.mark.parametrize(
    ("network", "args"),
    [
        ("squeeze-unet", {"widths": [8, 8, 8, 8, 8]}),
        ("maskrcnn-small", {"channels": 16, "hidden": 32, "convolutions": 1}),
    ],
)
def test_an_encoder_may_learn_more_slowly(network: str, args: dict[str, Any]) -> None:
    what = job(network, **args)
    module = TrainingModule(what, replace(SHORT, encoder_rate=0.1, learning_rate=1.0, warmup=0.0), [])
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([1.0, 0.1])
    assert sum(len(group["params"]) for group in groups) == len(list(what.network.parameters()))
    assert all(group["params"] for group in groups)


def test_optimisers() -> None:
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        module = TrainingModule(job(), replace(SHORT, optimizer=name, betas=(0.5, 0.9)), [])
        optimizer = module.configure_optimizers()["optimizer"]
        assert type(optimizer) is kind
        if name != "sgd":
            assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)


def test_instances_straight_from_the_network(tmp_path: Path) -> None:
    args = {"channels": 16, "hidden": 32, "convolutions": 1, "proposals": 50, "detections": 20}
    what = job("maskrcnn-small", **args)
    spec = Targets(instances=True)
    what = replace(what, targets=spec, window=(64, 16))
    prepared = [prepare_field(f, 0.5, spec=spec) for f in FIELDS]
    schedule = replace(SHORT, steps=2, learning_rate=1e-4)
    network = fit(
        what, prepared, np.ones(2), [Examined(FIELDS[1], prepared[1])], schedule=schedule, folder=tmp_path,
        accelerator="cpu",
    )  # fmt: skip
    assert network.margin == 8
    logged = (tmp_path / "log-0000000" / "metrics.csv").read_text().splitlines()[0]
    assert "val/aji" in logged
