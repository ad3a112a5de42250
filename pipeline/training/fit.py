"""Training on Lightning: optimiser, averaging, checkpoints, resuming."""

from __future__ import annotations

import logging
import math
import pickle
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.errors import PipelineError
from pipeline.kernels.instances import Channels, InstanceRules
from pipeline.models.weights import load_weights
from pipeline.networks.gan import PatchDiscriminator
from pipeline.networks.outputs import FindsInstances, Outputs
from pipeline.networks.precision import choose_precision
from pipeline.stage import whole_files
from pipeline.training.adversary import Adversary, true_maps
from pipeline.training.data import Field
from pipeline.training.experiment import AdversarialSettings
from pipeline.training.files import save_json
from pipeline.training.losses import CombinedLoss
from pipeline.training.predict import predict_field
from pipeline.training.samples import Augmentation, PreparedField
from pipeline.training.schedule import Deadline, Schedule, Unfinished
from pipeline.training.scoring import field_loss, score_maps
from pipeline.training.stream import SampleOrder, SampleStream
from pipeline.training.targets import Targets

log = logging.getLogger(__name__)

VALIDATION = {
    "aji": "aji", "pq": "pq", "dice": "dice", "iou": "iou",
    "accuracy": "pixel_accuracy", "pixel_dice": "pixel_dice", "pixel_iou": "pixel_iou",
}  # fmt: skip
"""Scores that are logged at each validation, and what they are called in the scores of a field."""


ENCODERS = ("encoder.", "network.backbone.body.")
"""How the names of an encoder's weights begin, in the networks that may have pretrained ones."""


@dataclass(frozen=True, eq=False)
class Examined:
    """A field that checkpoints are chosen on.

    Parameters
    ----------
    field : Field
        The field.
    prepared : PreparedField
        Its image and targets at the model's pixel size.
    """

    field: Field
    prepared: PreparedField

    def __deepcopy__(self, memo: dict[int, Any]) -> Examined:
        """Itself, or the averaged weights, a copy of all that is trained, would hold its pixels a second time."""
        return self


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained, whatever the data and the time.

    Parameters
    ----------
    network : torch.nn.Module
        The network.
    loss : CombinedLoss
        Its loss.
    targets : Targets
        What the samples hold.
    outputs : Outputs
        What its logits mean.
    rules : InstanceRules
        Thresholds for validation.
    window : (int, int), optional
        Windows for validation, see `pipeline.training.predict.predict_field`.
    augmentation : Augmentation
        Changes to the samples.
    adversarial : AdversarialSettings
        The discriminator, where there is one.
    """

    network: nn.Module
    loss: CombinedLoss
    targets: Targets
    outputs: Outputs
    rules: InstanceRules
    window: tuple[int, int] | None
    augmentation: Augmentation
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)


@torch.no_grad()
def move_averages(decay: float, averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Exponential moving averages that forget faster while young, so that what they began with has no weight.

    All at once, as a GPU would wait for hundreds of small calls.

    Parameters
    ----------
    decay : float
        Weight of the averages in the long run.
    averaged, current : list of torch.Tensor
        The averages so far, changed in place, and the new values; all of one type.
    count : torch.Tensor
        Values averaged so far; a tensor, as reading it would hold up a GPU.
    """
    if not current[0].is_floating_point():
        torch._foreach_copy_(averaged, current)
        return
    weight = ((1 + count) / (10 + count)).clamp(max=decay).to(current[0].dtype)
    torch._foreach_mul_(averaged, weight)
    torch._foreach_add_(averaged, torch._foreach_mul(current, 1 - weight))


class Learner(lightning.LightningModule):
    """What a trainer trains, ended by a loss that is no number."""

    network: nn.Module
    _last: tuple[int, Tensor] | None = None

    def note_loss(self, loss: Tensor) -> None:
        """Keep the loss of a step, having checked the one before: asking at once would hold up a GPU."""
        self.check_loss()
        self._last = self.global_step, loss.detach()

    def check_loss(self) -> None:
        """See that the loss of the step before was a number; to be called before what it changed is kept.

        Raises
        ------
        PipelineError
            When it was not.
        """
        if self._last is not None and not torch.isfinite(self._last[1]):
            step, loss = self._last
            raise PipelineError(
                f"the loss is {float(loss)} at step {step}", "lower the learning rate; the last checkpoint is kept"
            )


class TrainingModule(Learner):
    """A network under training.

    Parameters
    ----------
    job : Job
        What is trained.
    schedule : Schedule
        How.
    validation : list of Examined
        Fields that the checkpoints are chosen on.
    """

    def __init__(self, job: Job, schedule: Schedule, validation: list[Examined]) -> None:
        super().__init__()
        self.network = job.network.to(memory_format=torch.channels_last).train()
        self.job = job
        self.schedule = schedule
        self.validation = validation
        self.plateau = 1.0
        """Factor on the learning rate that `decay: plateau` has come to."""
        self.adversary = _adversary(job, schedule)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let what a step draws (dropout, proposals) depend on its number alone: a resumed run draws the same."""
        place = np.random.SeedSequence([self.schedule.seed, self.global_step, self.global_rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch in [0, 1]."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of one batch of uint8 images and targets ``(N, H, W, C)``."""
        image, sample = batch
        image = image.permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)
        targets = self.job.targets.unpack(sample)
        if isinstance(self.network, FindsInstances):
            parts = self.network.loss(image, targets["label"])
        else:
            logits = self(image)
            parts = self.job.loss(logits, targets)
            if self.adversary is not None:
                parts |= self._against(self.adversary, image, logits, targets, parts["loss"])
        self.note_loss(parts["loss"])
        self.log_dict({f"train/{name}": part for name, part in parts.items()}, on_step=True, on_epoch=False)
        return parts["loss"]

    def _against(
        self, adversary: Adversary, image: Tensor, logits: Tensor, targets: dict[str, Tensor], loss: Tensor
    ) -> dict[str, Tensor]:
        """The loss with what the discriminator makes of the maps beside their image, after it has learned from them."""
        outputs = self.job.outputs
        real, fake = (
            2 * torch.cat([image, maps], dim=1) - 1
            for maps in (true_maps(targets, outputs.names), outputs.activate(logits))
        )
        alone = self.trainer.world_size == 1
        mean = None if alone else partial(self.trainer.strategy.reduce, reduce_op="mean")
        learned = adversary.learn(real, fake, self.global_step, self.global_rank, mean)
        deceived = adversary.judge(fake)
        loss = loss + self.job.adversarial.weight * deceived
        return {"loss": loss, "adversarial": deceived, "discriminator": learned}

    def configure_model(self) -> None:
        """Called by the trainer before a checkpoint is taken up."""
        if self.adversary is not None:
            self.adversary.to(self.trainer.strategy.root_device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called by the trainer."""
        if self.adversary is not None:
            state = checkpoint["adversary"] = self.adversary.state_dict()
            if self.trainer.world_size > 1 and state["pool"] is not None:
                pools = self.all_gather(state["pool"])
                assert isinstance(pools, Tensor)
                state["pool"] = pools.flatten(0, 1)  # device by device

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Called by the trainer."""
        if self.adversary is not None:
            self.adversary.load_state_dict(checkpoint["adversary"], self.global_rank, self.trainer.world_size)

    def validation_step(self, batch: Tensor, index: int) -> None:
        """Scores of one validation field."""
        one = self.validation[int(batch)]
        maps = predict_field(self.network, one.prepared.images[0], self.job.outputs, self.job.window)
        scores = score_maps(maps, one.field, self.job.rules, Channels.of(self.job.outputs.names)).scores
        values = {name: float(scores[key]) for name, key in VALIDATION.items()}
        values["loss"] = field_loss(maps, one.prepared, self.job.loss)
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The schedule's optimiser and, by step, its rate."""
        schedule = self.schedule
        rate: dict[str, Any] = {"lr": schedule.learning_rate, "weight_decay": schedule.weight_decay}
        kinds: dict[str, Any] = {
            "adamw": partial(torch.optim.AdamW, betas=schedule.betas),
            "adam": partial(torch.optim.Adam, betas=schedule.betas),
            "sgd": partial(torch.optim.SGD, momentum=0.9),
        }
        weights: Any = self.parameters()
        if schedule.encoder_rate != 1:
            named = list(self.network.named_parameters())
            slow = [p for name, p in named if name.startswith(ENCODERS)]
            rest = [p for name, p in named if not name.startswith(ENCODERS)]
            weights = [{"params": rest}, {"params": slow, "lr": schedule.learning_rate * schedule.encoder_rate}]
        optimizer = kinds[schedule.optimizer](weights, **rate)
        # A function of the step alone, so that a resumed run may be longer than the one before.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.plateau * schedule.rate_at(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _adversary(job: Job, schedule: Schedule) -> Adversary | None:
    """The discriminator of a training, the same on all devices."""
    settings = job.adversarial
    if settings.weight == 0:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        network = PatchDiscriminator(3 + len(job.outputs.names), settings.width, settings.layers)
    return Adversary(network, schedule, settings.loss, settings.pool, settings.gradient_penalty)


class Plateau(Callback):
    """Lower the learning rate when the mean training loss does not fall any more (``decay: plateau``)."""

    KEPT = ("factor", "best", "bad", "total", "count")
    """What a resumed run needs."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.factor, self.best, self.bad = 1.0, math.inf, 0
        self.total, self.count = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take up the factor of an earlier run."""
        pl_module.plateau = self.factor  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gather the loss; look at its mean every `validate_every` steps."""
        self.total += float(outputs["loss"])
        self.count += 1
        if trainer.global_step % self.schedule.validate_every:
            return
        here = torch.tensor(self.total / self.count, device=trainer.strategy.root_device)
        mean = trainer.strategy.reduce(here, reduce_op="mean")
        self.total, self.count = 0.0, 0
        if float(mean) < self.best:
            self.best, self.bad = float(mean), 0
            return
        self.bad += 1
        if self.bad > self.schedule.patience:
            self.factor, self.bad = self.factor * self.schedule.gamma, 0
            pl_module.plateau = self.factor  # type: ignore[assignment]
            log.info("step %d: the loss has stopped falling, the rate is now %.3g of the first", trainer.global_step,
                     self.factor)  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's state."""
        for name in self.KEPT:
            setattr(self, name, state_dict[name])


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints beside their place, then rename: a full disk leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Called by the trainer.

        Raises
        ------
        PipelineError
            When it cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_files(path) as (staged,):
                torch.save(checkpoint, staged)
        except (OSError, RuntimeError) as error:
            first = " ".join(str(error).split())[:120]
            raise PipelineError(
                f"checkpoint {path} cannot be written: {first}",
                "make room and run again: the training goes on from the checkpoint before",
            ) from None


class Checkpoints(Callback):
    """Keep the newest state, to go on from, and the best; stop when the time is over.

    Parameters
    ----------
    folder : pathlib.Path
        Gets ``last.ckpt`` and ``best.ckpt``.
    schedule : Schedule
        How often, and by which score.
    validation : bool
        Whether there is a validation, after which the state is kept; else it is every `validate_every` steps.
    deadline : Deadline
        When to stop.
    """

    def __init__(self, folder: Path, schedule: Schedule, validation: bool, deadline: Deadline) -> None:
        self.folder = folder
        self.schedule = schedule
        self.validation = validation
        self.deadline = deadline
        self.best: float | None = None
        self.saved = -1
        self.seconds = 0.0
        """Seconds of training up to the last checkpoint, earlier runs included."""
        self._since = time.monotonic()

    def _save(self, trainer: lightning.Trainer) -> None:
        self._check(trainer)
        self.saved = trainer.global_step
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        trainer.save_checkpoint(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            device = torch.cuda.get_device_name() if trainer.strategy.root_device.type == "cuda" else "cpu"
            spent = {"seconds": round(self.seconds, 1), "steps": self.saved, "device": device}
            save_json(self.folder / "time.json", spent | {"devices": trainer.world_size})

    def _check(self, trainer: lightning.Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, Learner)
        module.check_loss()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Called by the trainer."""
        self._since = time.monotonic()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count a batch that has only been fetched as not yet begun, so that validations stay at their steps."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part]["ready"] = progress[part]["started"] = progress[part]["completed"]

    # Here the step before is complete in all the trainer's counts, which it is not at its end.
    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called by the trainer."""
        step, schedule = trainer.global_step, self.schedule
        late = self.deadline.passed
        if trainer.world_size > 1:
            late = trainer.strategy.reduce_boolean_decision(late, all=False)
        due = not self.validation and step > 0 and step % schedule.validate_every == 0
        if (due or late) and step != self.saved:
            self._save(trainer)
        if late:
            raise Unfinished(
                f"the training stopped after {self.deadline.minutes:g} minutes, at step {step} of {schedule.steps}",
                "run the same command again to go on",
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have the last step validated, too, wherever it lies between two validations."""
        if trainer.global_step == self.schedule.steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Called by the trainer."""
        self._check(trainer)
        if self.schedule.keep != "last":
            value = float(trainer.callback_metrics[f"val/{self.schedule.keep}"])
            value = -value if self.schedule.keep == "loss" else value
            if self.best is None or value > self.best:
                self.best = value
                trainer.save_checkpoint(self.folder / "best.ckpt")
        self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Called by the trainer."""
        if trainer.global_step != self.saved:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up an earlier run's state."""
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]


class Report(Callback):
    """Log the validation scores in one line each."""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Called by the trainer."""
        values = {k.split("/")[1]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        loss = trainer.callback_metrics.get("train/loss")
        log.info(
            "step %d: training loss %s, %s",
            trainer.global_step,
            "-" if loss is None else f"{float(loss):.4f}",
            ", ".join(f"{name} {value:.4f}" for name, value in values.items()),
        )


def _precision(name: str, accelerator: str, network: nn.Module) -> Any:
    if name == "auto":
        device = "cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
        name = {torch.float32: "32", torch.bfloat16: "bf16", torch.float16: "16"}[
            choose_precision("auto", device, network)
        ]
    return {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[name]


def fit(
    job: Job,
    fields: list[PreparedField],
    weights: np.ndarray,
    validation: list[Examined],
    *,
    schedule: Schedule,
    folder: Path,
    accelerator: str = "auto",
    deadline: Deadline | None = None,
) -> nn.Module:
    """Train a network; goes on where a run in the same folder stopped.

    Parameters
    ----------
    job : Job
        What is trained, its network with the weights to start from.
    fields : list of PreparedField
        Training fields.
    weights : numpy.ndarray
        How often each is drawn.
    validation : list of Examined
        The checkpoint with the best score on them is kept; without any, the last one.
    schedule : Schedule
        How.
    folder : pathlib.Path
        Checkpoints and logs go here.
    accelerator : str
        Lightning's name of the device.
    deadline : Deadline, optional
        When to stop for the time being.

    Returns
    -------
    torch.nn.Module
        The network with the averaged weights of the chosen checkpoint, on the CPU.

    Raises
    ------
    PipelineError
        When the loss is not finite, a checkpoint belongs to another network, has more steps or cannot be written.
    Unfinished
        When the time is over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    resume = last if last.is_file() else None
    done = 0
    if resume is not None:
        checkpoint = read_checkpoint(resume)
        load_weights(job.network, _network_state(checkpoint))
        if any("lr_lambdas" not in state for state in checkpoint["lr_schedulers"]):
            raise PipelineError(f"checkpoint {resume} is of another version of the pipeline", "delete its folder")
        done = steps_done(checkpoint, schedule, folder)
    if done < schedule.steps:
        _train(job, fields, weights, validation, schedule, folder, accelerator, deadline or Deadline(), resume, done)
    chosen = best if validation and schedule.keep != "last" and best.is_file() else last
    load_weights(job.network, _network_state(read_checkpoint(chosen)))
    return job.network.cpu().eval()


def _train(
    job: Job,
    fields: list[PreparedField],
    weights: np.ndarray,
    validation: list[Examined],
    schedule: Schedule,
    folder: Path,
    accelerator: str,
    deadline: Deadline,
    resume: Path | None,
    done: int,
) -> None:
    module = TrainingModule(job, schedule, validation)
    loader: DataLoader[Any] = DataLoader(
        SampleStream(fields, weights, schedule.size, job.augmentation, schedule.seed, schedule.stride),
        schedule.batch,
        sampler=SampleOrder(done, schedule.batch, schedule.devices),
        num_workers=schedule.workers,
        persistent_workers=schedule.workers > 0,
        pin_memory=torch.cuda.is_available() and accelerator != "cpu",
    )
    callbacks: list[Callback] = [Checkpoints(folder, schedule, bool(validation), deadline), Report()]
    if schedule.ema > 0:
        callbacks.append(WeightAveraging(multi_avg_fn=partial(move_averages, schedule.ema)))
    if schedule.decay == "plateau":
        callbacks.append(Plateau(schedule))
    checks: Any = DataLoader(range(len(validation))) if validation else None  # type: ignore[arg-type]
    run_trainer(module, loader, checks, schedule, folder, accelerator, callbacks, resume, done)


def run_trainer(
    module: Learner,
    loader: DataLoader[Any],
    checks: DataLoader[Any] | None,
    schedule: Schedule,
    folder: Path,
    accelerator: str,
    callbacks: list[Callback],
    resume: Path | None,
    done: int,
) -> None:
    """Train until the schedule's last step.

    Parameters
    ----------
    module : Learner
        What is trained.
    loader, checks : torch.utils.data.DataLoader
        Its batches, and those of a validation, where there is one.
    schedule : Schedule
        How.
    folder : pathlib.Path
        Logs go here.
    accelerator : str
        Lightning's name of the device.
    callbacks : list of Callback
        What else is done.
    resume : pathlib.Path, optional
        Checkpoint to go on from.
    done : int
        Its steps.
    """
    with warnings.catch_warnings():
        # Advice that does not apply: one worker is enough, folders are meant to hold earlier runs.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=schedule.devices,
            strategy="ddp" if schedule.devices > 1 else "auto",
            sync_batchnorm=schedule.sync_norm,
            precision=_precision(schedule.precision, accelerator, module.network),
            max_steps=schedule.steps,
            val_check_interval=min(schedule.validate_every, schedule.steps) if checks else None,
            check_val_every_n_epoch=None,
            limit_val_batches=None if checks else 0,
            # Each process scores all fields: shares would be padded with fields that count twice.
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            # In a SLURM job, too, where Lightning would else take the job's tasks, which are one, for its processes.
            plugins=[WholeCheckpoints(), LightningEnvironment()],
            enable_checkpointing=False,
            logger=CSVLogger(folder, name="", version=f"log-{done:07d}"),
            log_every_n_steps=max(1, min(10, schedule.steps // 20)),
            gradient_clip_val=schedule.clip or None,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if trainer.world_size != schedule.devices:
            raise RuntimeError(f"{trainer.world_size} processes would train, not {schedule.devices}")
        if schedule.sync_norm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            raise PipelineError(
                f"schedule.sync_norm with {trainer.world_size} processes on CPUs",
                "leave it out: it is for GPUs",
            )
        trainer.fit(module, loader, checks, ckpt_path=resume, weights_only=True)


def steps_done(checkpoint: dict[str, Any], schedule: Schedule, folder: Path) -> int:
    """Steps of the checkpoint that a training goes on from.

    Raises
    ------
    PipelineError
        When they are more than the schedule has.
    """
    done = int(checkpoint["global_step"])
    if done > schedule.steps:
        raise PipelineError(
            f"{folder} has been trained for {done} steps already, more than {schedule.steps}",
            f"set {done} steps or more, or delete that folder",
        )
    log.info("going on at step %d of %d", done, schedule.steps)
    return done


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, running nothing in it.

    Raises
    ------
    PipelineError
        When it is damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split())[:120]
        raise PipelineError(f"checkpoint {path} cannot be read: {first}", "delete it to begin anew") from None
    return checkpoint


def _network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
