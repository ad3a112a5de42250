"""Lightning's trainer as every training here uses it: checkpoints, resuming, learning rate, time limit."""

from __future__ import annotations

import logging
import math
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.errors import PipelineError
from pipeline.networks.precision import choose_precision
from pipeline.stage import whole_files
from pipeline.training.files import save_json
from pipeline.training.schedule import Deadline, Schedule, Unfinished

log = logging.getLogger(__name__)


class Learner(lightning.LightningModule):
    """What a trainer trains, ended by a loss that is not a number."""

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
        raise PipelineError(f"checkpoint {path} cannot be read: {first}", "delete it to begin again") from None
    return checkpoint
