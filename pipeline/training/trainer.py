"""Lightning trainer shared by all trainings: checkpoints, resuming, plateau learning rate, time limit."""

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

from pipeline.batch.stage import whole_files
from pipeline.errors import PipelineError
from pipeline.networks.precision import choose_precision
from pipeline.training.files import save_json
from pipeline.training.schedule import Deadline, Schedule, Unfinished

log = logging.getLogger(__name__)


class Learner(lightning.LightningModule):
    """Base class of the modules that `run_trainer` trains; training ends when the loss is not finite."""

    network: nn.Module
    _last: tuple[int, Tensor] | None = None

    def note_loss(self, loss: Tensor) -> None:
        """Keep the loss of this step and check that of the previous one.

        The check comes one step late because reading a loss at once would make the GPU wait.
        """
        self.check_loss()
        self._last = self.global_step, loss.detach()

    def check_loss(self) -> None:
        """Check that the last noted loss is finite; call this before saving the weights that it has changed.

        Raises
        ------
        PipelineError
            When the loss is not finite.
        """
        if self._last is not None and not torch.isfinite(self._last[1]):
            step, loss = self._last
            raise PipelineError(
                f"the loss is {float(loss)} at step {step}", "lower the learning rate; the last checkpoint is kept"
            )


class Plateau(Callback):
    """Lower the learning rate when the mean training loss stops falling (``decay: plateau``)."""

    KEPT = ("factor", "best", "bad", "total", "count")
    """Attributes that are saved in checkpoints, as a resumed run needs them."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.factor, self.best, self.bad = 1.0, math.inf, 0
        self.total, self.count = 0.0, 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Apply the factor that an earlier run has reached."""
        pl_module.plateau = self.factor  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Accumulate the loss and examine its mean every `validate_every` steps."""
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
        """Return the state that a resumed run needs."""
        return {name: getattr(self, name) for name in self.KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of an earlier run."""
        for name in self.KEPT:
            setattr(self, name, state_dict[name])


class WholeCheckpoints(TorchCheckpointIO):
    """Write each checkpoint to a temporary file, then rename it, so that a full disk leaves the previous one intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint; called by the trainer.

        Raises
        ------
        PipelineError
            When the checkpoint cannot be written.
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
    """Save the newest state, from which training can be resumed, and the best one; stop at the deadline.

    Parameters
    ----------
    folder : pathlib.Path
        Folder for ``last.ckpt``, ``best.ckpt`` and ``time.json``.
    schedule : Schedule
        Says how often to save (`validate_every`) and by which score to choose the best state (`keep`).
    validation : bool
        Whether there are validations. If so, the state is saved after each of them, else every `validate_every` steps.
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
        """Seconds of training up to the last checkpoint, including earlier runs."""
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
        """Start the clock; called by the trainer."""
        self._since = time.monotonic()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count a batch that has been fetched but not trained on as not begun, so that validations keep their steps."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part]["ready"] = progress[part]["started"] = progress[part]["completed"]

    # Saving here rather than in on_train_batch_end: only now do all of the trainer's counters include the last step.
    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save the state when it is due and stop at the deadline; called by the trainer."""
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
        """Stop at the last step in a way that makes the trainer validate it, even between two regular validations."""
        if trainer.global_step == self.schedule.steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the state, also as the best one if its score is; called by the trainer."""
        self._check(trainer)
        if self.schedule.keep != "last":
            value = float(trainer.callback_metrics[f"val/{self.schedule.keep}"])
            value = -value if self.schedule.keep == "loss" else value
            if self.best is None or value > self.best:
                self.best = value
                trainer.save_checkpoint(self.folder / "best.ckpt")
        self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save the last state unless it has been saved; called by the trainer."""
        if trainer.global_step != self.saved:
            self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"best": self.best, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of an earlier run."""
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]


class Report(Callback):
    """Log the scores of each validation in one line."""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the scores; called by the trainer."""
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
        The module to train.
    loader, checks : torch.utils.data.DataLoader
        Batches for training and for validation; `checks` is None without validation.
    schedule : Schedule
        How long and how fast to train.
    folder : pathlib.Path
        Folder for the logs.
    accelerator : str
        Lightning's name of the device.
    callbacks : list of Callback
        Callbacks of the trainer.
    resume : pathlib.Path, optional
        Checkpoint to resume from.
    done : int
        Steps done in `resume`; 0 without it.

    Raises
    ------
    PipelineError
        When `sync_norm` is set for several processes on CPUs.
    """
    with warnings.catch_warnings():
        # This advice does not apply: one worker is enough, and folders are meant to hold earlier runs.
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
            # Each process scores all fields: if they were divided among processes, some would be repeated as padding
            # and count twice.
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=callbacks,
            # Also in a SLURM job, where Lightning would otherwise expect one process per task, and there is one task.
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
    """Return the number of steps done in a checkpoint from which a training is resumed.

    Raises
    ------
    PipelineError
        When the checkpoint has more steps than the schedule.
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
    """Read a checkpoint without executing any code in it.

    Raises
    ------
    PipelineError
        When the checkpoint is damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split())[:120]
        raise PipelineError(f"checkpoint {path} cannot be read: {first}", "delete it to begin again") from None
    return checkpoint
