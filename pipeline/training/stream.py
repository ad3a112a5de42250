"""An endless stream of training samples for the trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.training.samples import Augmentation, PreparedField, draw_sample


class SampleStream(IterableDataset):
    """An endless, seeded stream of training samples.

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
        Seed; each worker of each device draws a stream of its own.
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
        self.rank = 0
        """Number of the device, set by the trainer."""
        self.styles = [one for field in fields for one in field.tones if one is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> SampleStream:
        """Itself, or the averaged weights, a copy of all that is trained, would hold its pixels a second time."""
        return self

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        worker = get_worker_info()
        own = [self.seed, worker.id if worker else 0]
        rng = np.random.default_rng([*own, self.rank] if self.rank else own)
        while True:
            field = self.fields[rng.choice(len(self.fields), p=self.weights)]
            yield draw_sample(field, self.size, self.augmentation, rng, self.stride, self.styles)
