"""Training of a network that makes maps: its steps, its validation, the weights that are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.errors import PipelineError
from pipeline.kernels.instances import Channels, InstanceRules
from pipeline.models.weights import load_weights
from pipeline.networks.gan import PatchDiscriminator
from pipeline.networks.outputs import FindsInstances, Outputs
from pipeline.training.adversary import Adversary, true_maps
from pipeline.training.data import Field
from pipeline.training.experiment import AdversarialSettings
from pipeline.training.losses import CombinedLoss
from pipeline.training.predict import predict_field
from pipeline.training.samples import Augmentation, PreparedField
from pipeline.training.schedule import Deadline, Schedule
from pipeline.training.scoring import field_loss, score_maps
from pipeline.training.stream import SampleOrder, SampleStream
from pipeline.training.targets import Targets
from pipeline.training.trainer import Checkpoints, Learner, Plateau, Report, read_checkpoint, run_trainer, steps_done

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


def _network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
