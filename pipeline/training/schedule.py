"""How long and how fast to train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Parameters
    ----------
    steps : int
        Optimiser steps.
    batch, size : int
        Crops a step and their side in pixels.
    learning_rate, weight_decay : float
        AdamW's; the rate warms up and falls along a cosine.
    warmup : float
        Share of the steps that warm up.
    ema : float
        Decay of the averaged weights, which are the ones that are kept.
    validate_every : int
        Steps between two validations.
    workers : int
        Processes that draw samples; 0 draws them in the trainer's own.
    seed : int
        Seed of weights and samples.
    """

    steps: int = 2000
    batch: int = 8
    size: int = 192
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    warmup: float = 0.05
    ema: float = 0.995
    validate_every: int = 250
    workers: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.size < 32:
            raise PipelineError(
                f"schedule: steps {self.steps}, batch {self.batch}, size {self.size}", "use at least 1, 1 and 32"
            )

    def rate_at(self, step: int) -> float:
        """Factor on the learning rate at a step: a linear rise, then half a cosine down to a hundredth."""
        rise = max(1.0, self.warmup * self.steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        share = min(1.0, (step - rise) / max(1.0, self.steps - rise))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))
