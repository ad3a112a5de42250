"""An endless stream of training samples for the trainer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch.distributed
from torch.utils.data import Dataset, Sampler

from pipeline.training.samples import Augmentation, PreparedField, draw_sample


class SampleStream(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Training samples by number; each sample depends only on the seed and its number.

    Parameters
    ----------
    fields : sequence of PreparedField
        Fields to draw from.
    weights : numpy.ndarray
        Relative frequency with which each field is drawn.
    size : int
        Side of the crops in pixels.
    augmentation : Augmentation
        Ranges of the random changes.
    seed : int
        Seed of the samples.
    stride : int
        Spacing of the grid on which crops lie, see `draw_sample`.
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
        """Return image and targets of a sample, see `draw_sample`."""
        rng = np.random.default_rng([self.seed, number])
        field = self.fields[rng.choice(len(self.fields), p=self.weights)]
        return draw_sample(field, self.size, self.augmentation, rng, self.stride, self.styles)


class SampleOrder(Sampler[int]):
    """Endless numbers of this device's samples; within a step, the batches of the devices follow one another.

    Parameters
    ----------
    step : int
        Step to begin with.
    batch, devices : int
        Samples per step and device, and number of devices.
    """

    def __init__(self, step: int, batch: int, devices: int) -> None:
        self.step, self.batch, self.devices = step, batch, devices

    def __iter__(self) -> Iterator[int]:
        # The rank is not yet known when the loader is made, as the processes are connected later.
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for turn in itertools.count(self.step * self.devices + rank, self.devices):
            yield from range(turn * self.batch, (turn + 1) * self.batch)
