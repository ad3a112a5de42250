"""Training of a network that predicts maps: training steps, validation, and the choice of weights."""

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
"""Scores logged at each validation: name in the log, and name in the scores of a field."""

ENCODERS = ("encoder.", "network.backbone.body.")
"""Prefixes of the names of the encoder's weights in networks that may have a pretrained encoder."""


@dataclass(frozen=True, eq=False)
class Examined:
    """A validation field, on which checkpoints are scored.

    Parameters
    ----------
    field : Field
        The field.
    prepared : PreparedField
        Image and targets of the field at the model's pixel size.
    """

    field: Field
    prepared: PreparedField

    def __deepcopy__(self, memo: dict[int, Any]) -> Examined:
        """Return the object itself: weight averaging copies the whole module, which need not hold the pixels twice."""
        return self


@dataclass(frozen=True, eq=False)
class Job:
    """What is trained and how it learns, without the data and the schedule.

    Parameters
    ----------
    network : torch.nn.Module
        The network.
    loss : CombinedLoss
        Loss of the network.
    targets : Targets
        Targets that the samples hold.
    outputs : Outputs
        How logits become maps.
    rules : InstanceRules
        Thresholds for validation.
    window : (int, int), optional
        Side and overlap of the windows for validation, see `pipeline.training.predict.predict_field`.
    augmentation : Augmentation
        Augmentation of the samples.
    adversarial : AdversarialSettings
        Settings of the discriminator; a weight of 0 means none.
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
    """Update exponential moving averages in place.

    They decay faster during the first steps, so that the initial values soon have no weight. All tensors are updated in
    one call, as hundreds of small calls would keep a GPU waiting. Values that are not floating-point are copied.

    Parameters
    ----------
    decay : float
        Weight of the old averages in each update, once many values have been averaged.
    averaged, current : list of torch.Tensor
        The averages, which are updated in place, and the new values; all of one dtype.
    count : torch.Tensor
        Number of values averaged so far; it stays a tensor, as reading it would make the CPU wait for the GPU.
    """
    if not current[0].is_floating_point():
        torch._foreach_copy_(averaged, current)
        return
    weight = ((1 + count) / (10 + count)).clamp(max=decay).to(current[0].dtype)
    torch._foreach_mul_(averaged, weight)
    torch._foreach_add_(averaged, torch._foreach_mul(current, 1 - weight))


class TrainingModule(Learner):
    """The Lightning module of a training: the network and, if there is one, the discriminator.

    Parameters
    ----------
    job : Job
        What is trained.
    schedule : Schedule
        Schedule of the training.
    validation : list of Examined
        Fields on which checkpoints are chosen.
    """

    def __init__(self, job: Job, schedule: Schedule, validation: list[Examined]) -> None:
        super().__init__()
        self.network = job.network.to(memory_format=torch.channels_last).train()
        self.job = job
        self.schedule = schedule
        self.validation = validation
        self.plateau = 1.0
        """Current factor on the learning rate with ``decay: plateau``; 1 otherwise."""
        self.adversary = _adversary(job, schedule)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the random draws of a step (dropout, proposals) by its number, so that a resumed run draws the same."""
        place = np.random.SeedSequence([self.schedule.seed, self.global_step, self.global_rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images in [0, 1]."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the loss of one batch of images and targets, both uint8 ``(N, H, W, C)``."""
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
        """Train the discriminator on the maps together with their images, then add the adversarial term to the loss.

        Returns
        -------
        dict of str to torch.Tensor
            ``loss``, the total; ``adversarial``, the adversarial term in it without its weight; and ``discriminator``,
            the discriminator's own loss.
        """
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
        """Move the discriminator to the trainer's device, before a checkpoint is loaded."""
        if self.adversary is not None:
            self.adversary.to(self.trainer.strategy.root_device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the discriminator to a checkpoint, with the image pools of all devices."""
        if self.adversary is not None:
            state = checkpoint["adversary"] = self.adversary.state_dict()
            if self.trainer.world_size > 1 and state["pool"] is not None:
                pools = self.all_gather(state["pool"])
                assert isinstance(pools, Tensor)
                state["pool"] = pools.flatten(0, 1)  # in order of the devices

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the discriminator from a checkpoint, with this device's part of the image pool."""
        if self.adversary is not None:
            self.adversary.load_state_dict(checkpoint["adversary"], self.global_rank, self.trainer.world_size)

    def validation_step(self, batch: Tensor, index: int) -> None:
        """Score one validation field and log the scores."""
        one = self.validation[int(batch)]
        maps = predict_field(self.network, one.prepared.images[0], self.job.outputs, self.job.window)
        scores = score_maps(maps, one.field, self.job.rules, Channels.of(self.job.outputs.names)).scores
        values = {name: float(scores[key]) for name, key in VALIDATION.items()}
        values["loss"] = field_loss(maps, one.prepared, self.job.loss)
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Return the optimiser that the schedule names, and the schedule of its learning rate."""
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
        # The rate is computed from the step anew, so that a resumed run may have more steps than the one before.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.plateau * schedule.rate_at(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _adversary(job: Job, schedule: Schedule) -> Adversary | None:
    """Return the discriminator of a training, the same on all devices, or None if its weight is 0."""
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
    """Train a network, resuming an earlier run in the same folder.

    Parameters
    ----------
    job : Job
        What is trained; its network has the weights to start from.
    fields : list of PreparedField
        Training fields.
    weights : numpy.ndarray
        Relative frequency with which samples are drawn from each training field.
    validation : list of Examined
        Validation fields. The checkpoint with the best score on them is chosen; without any, or with
        ``schedule.keep`` of ``last``, the last checkpoint.
    schedule : Schedule
        Schedule of the training.
    folder : pathlib.Path
        Folder for checkpoints and logs.
    accelerator : str
        Lightning's name of the device.
    deadline : Deadline, optional
        When to stop, to be resumed later.

    Returns
    -------
    torch.nn.Module
        The network with the weights of the chosen checkpoint (averaged, if ``schedule.ema`` is not 0), on the CPU.

    Raises
    ------
    PipelineError
        When the loss is not finite, or a checkpoint belongs to another network or version, has more steps than the
        schedule or cannot be written.
    Unfinished
        When the deadline passes before the training is done.
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
