"""Training on Lightning: optimiser, averaging, checkpoints, resuming."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import cv2
import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import score
from pipeline.kernels.instances import InstanceRules, segment
from pipeline.models.weights import load_weights
from pipeline.networks.registry import build_network, head_channels
from pipeline.training.data import Field
from pipeline.training.losses import nucleus_distance_loss
from pipeline.training.samples import Augmentation, PreparedField
from pipeline.training.schedule import Schedule
from pipeline.training.stream import SampleStream

log = logging.getLogger(__name__)


def predict_field(network: nn.Module, image: np.ndarray, flips: bool = False) -> np.ndarray:
    """Maps of a whole field in one pass, its borders mirrored.

    Parameters
    ----------
    network : torch.nn.Module
        Gives logits.
    image : numpy.ndarray
        uint8 ``(H, W, 3)`` at the model's pixel size.
    flips : bool
        Average over the four flips.

    Returns
    -------
    numpy.ndarray
        uint8 ``(C, H, W)``: each head's sigmoid, 255 is 1.
    """
    height, width = image.shape[:2]
    margin = 32
    bottom, right = -height % 32 + margin, -width % 32 + margin
    padded = cv2.copyMakeBorder(image, margin, bottom, margin, right, cv2.BORDER_REFLECT)
    device = next(network.parameters()).device
    x = torch.from_numpy(padded).to(device).permute(2, 0, 1)[None].float() / 255
    turns: list[tuple[int, ...]] = [(), (2,), (3,), (2, 3)] if flips else [()]
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        total = torch.stack([torch.sigmoid(network(x.flip(turn)).float()).flip(turn) for turn in turns])
    network.train(was_training)
    maps = total.mean(dim=0)[0, :, margin : margin + height, margin : margin + width]
    return np.asarray((maps * 255).round().to(torch.uint8).cpu())


def resize_to_model(image: np.ndarray, mpp: float, model_mpp: float) -> np.ndarray:
    """Bring a field's image to the model's pixel size."""
    factor = mpp / model_mpp
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def score_maps(maps: np.ndarray, field: Field, rules: InstanceRules) -> dict[str, float]:
    """Score a field's maps against its labels, at the field's own resolution."""
    labels = segment(maps[0], maps[1], rules)
    height, width = field.labels.shape
    rows = np.minimum((np.arange(height) + 0.5) * labels.shape[0] / height, labels.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * labels.shape[1] / width, labels.shape[1] - 1).astype(int)
    return score(field.labels, labels[rows[:, None], columns])


class NucleusModule(lightning.LightningModule):
    """A network under training.

    Parameters
    ----------
    network : str
        Name of the network.
    network_args : dict
        Its arguments.
    heads : list of str
        Its heads.
    mpp : float
        The model's pixel size in µm.
    schedule : Schedule
        How to train.
    validation : list of Field
        Fields that the checkpoints are chosen on.
    """

    def __init__(
        self,
        network: str,
        network_args: dict[str, Any],
        heads: list[str],
        mpp: float,
        schedule: Schedule,
        validation: list[Field],
    ) -> None:
        super().__init__()
        self.network = build_network(network, head_channels(heads), network_args).to(memory_format=torch.channels_last)
        self.mpp = mpp
        self.schedule = schedule
        self.validation = [(resize_to_model(f.image, f.mpp, mpp), f) for f in validation]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch in [0, 1]."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Loss of one batch of uint8 images and targets ``(N, H, W, 3)``."""
        image, targets = (part.permute(0, 3, 1, 2).float().div(255) for part in batch)
        parts = nucleus_distance_loss(self(image.contiguous(memory_format=torch.channels_last)), targets)
        if not torch.isfinite(parts["loss"]):
            raise PipelineError(
                f"the loss is {float(parts['loss'])} at step {self.global_step}",
                "lower the learning rate; the last checkpoint is kept",
            )
        self.log_dict({f"train/{name}": part for name, part in parts.items()}, on_step=True, on_epoch=False)
        return parts["loss"]

    def validation_step(self, batch: Tensor, index: int) -> None:
        """Instance scores of one validation field."""
        image, field = self.validation[int(batch)]
        result = score_maps(predict_field(self.network, image), field, InstanceRules())
        self.log_dict({f"val/{name}": float(result[name]) for name in ("aji", "pq", "dice", "iou")}, batch_size=1)

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine decay by step."""
        schedule = self.schedule
        optimizer = torch.optim.AdamW(self.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
        # A function of the step alone, so that a resumed run may be longer than the one before.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class KeepLast(Callback):
    """Keep the newest state, to go on from after a kill, whatever the scores are.

    Parameters
    ----------
    path : pathlib.Path
        The checkpoint; replaced as a whole.
    every : int
        Steps between two checkpoints; the last step has one too.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Called by the trainer, after the weights have been averaged."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            staged = self.path.with_name(f".part-{self.path.name}")
            trainer.save_checkpoint(staged)
            staged.replace(self.path)


class Report(Callback):
    """Log the validation scores in one line each."""

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Called by the trainer."""
        values = {k.split("/")[1]: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        loss = trainer.callback_metrics.get("train/loss")
        log.info(
            "step %d: loss %s, %s",
            trainer.global_step,
            "-" if loss is None else f"{float(loss):.4f}",
            ", ".join(f"{name} {value:.4f}" for name, value in values.items()),
        )


def fit(
    fields: list[PreparedField],
    weights: np.ndarray,
    validation: list[Field],
    *,
    network: str,
    network_args: dict[str, Any],
    heads: list[str],
    mpp: float,
    schedule: Schedule,
    augmentation: Augmentation,
    folder: Path,
    start_from: dict[str, Tensor] | None = None,
    accelerator: str = "auto",
) -> nn.Module:
    """Train a network; goes on where a run in the same folder stopped.

    Parameters
    ----------
    fields : list of PreparedField
        Training fields.
    weights : numpy.ndarray
        How often each is drawn.
    validation : list of Field
        The checkpoint with the best AJI on them is kept; without any, the last one.
    network, network_args, heads, mpp
        The network and its pixel size.
    schedule, augmentation
        How to train.
    folder : pathlib.Path
        Checkpoints and logs go here.
    start_from : dict, optional
        Weights to start from.
    accelerator : str
        Lightning's name of the device.

    Returns
    -------
    torch.nn.Module
        The network with the averaged weights of the chosen checkpoint, on the CPU.

    Raises
    ------
    PipelineError
        When the loss is not finite or a checkpoint belongs to another network.
    """
    lightning.seed_everything(schedule.seed, verbose=False)
    module = NucleusModule(network, network_args, heads, mpp, schedule, validation)
    if start_from is not None:
        load_weights(module.network, start_from)
    last = folder / "last.ckpt"
    resume = last if last.is_file() else None
    done = 0
    if resume is not None:
        checkpoint = _read_checkpoint(resume)
        load_weights(module.network, _network_state(checkpoint))
        done = int(checkpoint["global_step"])
        log.info("going on at step %d of %d", done, schedule.steps)
    stream = SampleStream(fields, weights, schedule.size, augmentation, schedule.seed + done)
    loader: DataLoader[Any] = DataLoader(
        stream, schedule.batch, num_workers=schedule.workers, persistent_workers=schedule.workers > 0
    )
    best = ModelCheckpoint(
        folder,
        filename="best",
        monitor="val/aji",
        mode="max",
        enable_version_counter=False,
    )
    trainer = lightning.Trainer(
        accelerator=accelerator,
        max_steps=schedule.steps,
        val_check_interval=schedule.validate_every if validation else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validation else 0,
        num_sanity_val_steps=0,
        callbacks=[
            EMAWeightAveraging(decay=schedule.ema, update_starting_at_step=schedule.steps // 5),
            KeepLast(last, schedule.validate_every),
            *([best] if validation else []),
            Report(),
        ],
        enable_checkpointing=bool(validation),
        logger=CSVLogger(folder, name="", version="log"),
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        loader,
        DataLoader(range(len(validation))) if validation else None,  # type: ignore[arg-type]
        ckpt_path=resume,
        weights_only=True,
    )
    chosen = folder / "best.ckpt"
    load_weights(module.network, _network_state(_read_checkpoint(chosen if chosen.is_file() else last)))
    return module.network.cpu().eval()


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split())[:120]
        raise PipelineError(f"checkpoint {path} cannot be read: {first}", "delete it to begin anew") from None
    return checkpoint


def _network_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
