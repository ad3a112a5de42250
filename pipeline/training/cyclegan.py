"""CycleGAN between pictures of random nuclei and tiles of H&E, which are not paired."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from pipeline.kernels.random_nuclei import mask_picture
from pipeline.networks.gan import PatchDiscriminator, ResNetGenerator
from pipeline.training.adversary import Adversary
from pipeline.training.schedule import Deadline, Schedule
from pipeline.training.stream import SampleOrder
from pipeline.training.synthesis import SynthesisSettings, nuclei_of
from pipeline.training.trainer import Checkpoints, Learner, read_checkpoint, run_trainer, steps_done

log = logging.getLogger(__name__)


MARGIN = 28
"""Pixels, a multiple of 4, that are painted beyond a field's edges and then cut off, as convolutions draw stripes
along edges."""


class Tiles(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Numbered pairs of a picture of random nuclei and a random tile of H&E.

    A pair depends only on its number and the seed.

    Parameters
    ----------
    images : sequence of numpy.ndarray
        uint8 ``(H, W, 3)`` images of fields at the pixel size of the tiles.
    shapes : sequence of numpy.ndarray
        Shapes of the nuclei in these fields.
    settings : SynthesisSettings
        Size of the tiles, number and shapes of nuclei, and seed.
    mpp : float
        Pixel size in µm.
    """

    def __init__(
        self, images: Sequence[np.ndarray], shapes: Sequence[np.ndarray], settings: SynthesisSettings, mpp: float
    ) -> None:
        self.images = images
        self.shapes = shapes
        self.settings = settings
        self.mpp = mpp
        area = np.array([image.shape[0] * image.shape[1] for image in images], float)
        self.weights = area / area.sum()

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a picture of nuclei, uint8 ``(size, size)``, and a tile of H&E, uint8 ``(size, size, 3)``."""
        rng = np.random.default_rng([self.settings.seed, number])
        size = self.settings.size
        image = self.images[rng.choice(len(self.images), p=self.weights)]
        top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
        tile = np.rot90(image[top : top + size, left : left + size], int(rng.integers(4)))
        if rng.random() < 0.5:
            tile = tile[:, ::-1]
        nuclei = nuclei_of(self.settings, self.mpp, self.shapes, rng)
        return mask_picture(nuclei), np.ascontiguousarray(tile)


def as_input(pictures: Tensor) -> Tensor:
    """Convert uint8 pictures ``(N, H, W, 3)`` or masks ``(N, H, W)`` to generator input ``(N, 3, H, W)`` in [-1, 1]."""
    if pictures.ndim == 3:
        pictures = pictures[..., None].expand(-1, -1, -1, 3)
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


class Generators(nn.Module):
    """The two generators: ``paint`` makes H&E from a picture of nuclei, ``outline`` a picture of nuclei from H&E.

    Parameters
    ----------
    width, blocks : int
        See `ResNetGenerator`.
    """

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.paint = ResNetGenerator(width, blocks)
        self.outline = ResNetGenerator(width, blocks)


class CycleGAN(Learner):
    """Two generators that learn to invert each other, and a discriminator for the output of each.

    Parameters
    ----------
    settings : SynthesisSettings
        Sizes of the networks and weights of the losses.
    schedule : Schedule
        Number of steps and learning rate.

    References
    ----------
    Zhu et al., "Unpaired image-to-image translation using cycle-consistent adversarial networks", ICCV 2017.
    """

    network: Generators

    def __init__(self, settings: SynthesisSettings, schedule: Schedule) -> None:
        super().__init__()
        self.settings = settings
        self.schedule = schedule
        lightning.seed_everything(settings.seed, verbose=False)
        self.network = Generators(settings.width, settings.blocks).to(memory_format=torch.channels_last)
        self.adversaries = tuple(
            Adversary(
                PatchDiscriminator(3, settings.discriminator_width, spectral=False), schedule, "lsgan", settings.pool
            )
            for _ in range(2)
        )
        self._made: tuple[Tensor, ...] = ()

    def configure_model(self) -> None:
        """Move the discriminators to the trainer's device, before a checkpoint is loaded."""
        for adversary in self.adversaries:
            adversary.to(self.trainer.strategy.root_device)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Return the sum of the losses of both generators."""
        masks, tiles = map(as_input, batch)
        paint, outline = self.network.paint, self.network.outline
        painted, outlined = paint(masks), outline(tiles)
        of_tiles, of_masks = self.adversaries
        parts = {
            "paint": of_tiles.judge(painted),
            "outline": of_masks.judge(outlined),
            "cycle_masks": functional.l1_loss(outline(painted).float(), masks),
            "cycle_tiles": functional.l1_loss(paint(outlined).float(), tiles),
        }
        loss = parts["paint"] + parts["outline"]
        loss = loss + self.settings.cycle * (parts["cycle_masks"] + parts["cycle_tiles"])
        if self.settings.identity > 0:
            same = functional.l1_loss(paint(tiles).float(), tiles) + functional.l1_loss(outline(masks).float(), masks)
            parts["identity"] = same
            loss = loss + self.settings.cycle * self.settings.identity * same
        self._made = tiles, painted.detach().float(), masks, outlined.detach().float()
        self.note_loss(loss)
        self.log_dict({"train/loss": loss, **{f"train/{name}": part for name, part in parts.items()}})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Train the discriminators on the batch, after the generators."""
        tiles, painted, masks, outlined = self._made
        step = self.global_step - 1
        for adversary, real, made in zip(self.adversaries, (tiles, masks), (painted, outlined), strict=True):
            adversary.learn(real, made, step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the discriminators to a checkpoint, and log the losses."""
        checkpoint["adversaries"] = [one.state_dict() for one in self.adversaries]
        values = {name.partition("/")[2]: float(value) for name, value in self.trainer.callback_metrics.items()}
        if values:  # empty at the start of a run
            losses = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            log.info("step %d of %d: %s", self.global_step, self.schedule.steps, losses)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the discriminators from a checkpoint."""
        for one, state in zip(self.adversaries, checkpoint["adversaries"], strict=True):
            one.load_state_dict(state)

    def configure_optimizers(self) -> Any:
        """Return Adam for both generators, and the schedule of its learning rate."""
        schedule = self.schedule
        optimizer = torch.optim.Adam(self.parameters(), lr=schedule.learning_rate, betas=schedule.betas)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit_cyclegan(
    tiles: Tiles, settings: SynthesisSettings, folder: Path, accelerator: str = "auto", deadline: Deadline | None = None
) -> nn.Module:
    """Train the generators, resuming an earlier run in the same folder.

    Parameters
    ----------
    tiles : Tiles
        Training pairs.
    settings : SynthesisSettings
        Settings of networks, losses and schedule.
    folder : pathlib.Path
        Folder for the checkpoint and logs.
    accelerator : str
        Lightning's name of the device.
    deadline : Deadline, optional
        When to stop, to be resumed later.

    Returns
    -------
    torch.nn.Module
        The generator that paints H&E, on the CPU.

    Raises
    ------
    PipelineError
        When the loss is not finite, or the checkpoint is damaged, has more steps than the schedule or cannot be
        written.
    pipeline.training.schedule.Unfinished
        When the deadline passes before the training is done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schedule = settings.schedule
    last = folder / "last.ckpt"
    resume = last if last.is_file() else None
    done = 0 if resume is None else steps_done(read_checkpoint(last), schedule, folder)
    module = CycleGAN(settings, schedule)
    if done < schedule.steps:
        loader: DataLoader[Any] = DataLoader(
            tiles,
            settings.batch,
            sampler=SampleOrder(done, settings.batch, 1),
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
        )
        checkpoints = Checkpoints(folder, schedule, False, deadline or Deadline())
        run_trainer(module, loader, None, schedule, folder, accelerator, [checkpoints], resume, done)
    module.load_state_dict(read_checkpoint(last)["state_dict"])
    return module.network.paint.cpu().eval()


def paint(painter: nn.Module, nuclei: np.ndarray) -> np.ndarray:
    """Paint an H&E image for a label map.

    Parameters
    ----------
    painter : torch.nn.Module
        Generator that `fit_cyclegan` returned, on any device.
    nuclei : numpy.ndarray
        int32 label map ``(H, W)``.

    Returns
    -------
    numpy.ndarray
        uint8 image ``(H, W, 3)``.
    """
    device = next(painter.parameters()).device
    picture = np.pad(mask_picture(nuclei), MARGIN, mode="reflect")
    with torch.inference_mode():
        made = painter(as_input(torch.from_numpy(picture)[None].to(device)))[0, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
    return np.asarray(made.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu())
