"""An endless stream of training samples for the trainer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch.distributed
from torch.utils.data import Dataset, Sampler

from pipeline.training.samples import Augmentation, PreparedField, draw_sample


class SampleStream(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Training samples by their number; each depends on the seed and its number alone.

    Parameters
    ----------
    fields : sequence of PreparedField
        Where to draw from.
    weights : numpy.ndarray
        How often each field is drawn.
    size : int
        Side of the crops.
    augmentation : Augmentation
        Ranges of the changes.
    seed : int
        Seed.
    stride : int
        Grid of the crops, see `draw_sample`.
    """

    def __init__(
        self,
        fields: list[PreparedField],
        weights: np.ndarray,
        size: int,
        augmentation: Augmentation,
        seed: int,
        stride: int = 0,
    ) -> None:
        self.fields = fields
        self.weights = weights / weights.sum()
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.stride = stride
        self.styles = [one for field in fields for one in field.tones if one is not None]

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and targets of a sample, see `draw_sample`."""
        rng = np.random.default_rng([self.seed, number])
        field = self.fields[rng.choice(len(self.fields), p=self.weights)]
        return draw_sample(field, self.size, self.augmentation, rng, self.stride, self.styles)


class SampleOrder(Sampler[int]):
    """Numbers of this device's samples, without end; the devices' batches of a step follow upon one another.

    Parameters
    ----------
    step : int
        The step to begin with.
    batch, devices : int
        Samples a step and device, and devices.
    """

    def __init__(self, step: int, batch: int, devices: int) -> None:
        self.step, self.batch, self.devices = step, batch, devices

    def __iter__(self) -> Iterator[int]:
        # Asked here, as the devices' processes find each other after the loader is made.
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for turn in itertools.count(self.step * self.devices + rank, self.devices):
            yield from range(turn * self.batch, (turn + 1) * self.batch)
