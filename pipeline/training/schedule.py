"""Settings of a training's length and learning rate, and its deadline."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from dataclasses import dataclass, replace

from pipeline.errors import PipelineError

OPTIMIZERS = ("adamw", "adam", "sgd")
DECAYS = ("cosine", "linear", "steps", "plateau", "constant")
KEEP = ("aji", "pq", "dice", "iou", "accuracy", "loss", "last")
DEVICES = {"auto": "auto", "cpu": "cpu", "cuda": "gpu"}
"""Lightning's accelerator names, by the values of the setting `device`."""


def accelerator_of(device: str) -> str:
    """Return Lightning's name for a `device`; ``auto`` leaves out a GPU that the installed PyTorch has no code for.

    Raises
    ------
    PipelineError
        When ``cuda`` is asked for and such a GPU is there, or none.
    """
    import torch

    from pipeline.prediction.predictors import choose_device

    if device == "cuda" or torch.cuda.is_available():
        device = choose_device(device)
    return DEVICES[device]


PRECISIONS = ("auto", "32", "bf16", "16")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Parameters
    ----------
    steps : int
        Optimiser steps.
    epochs : float, optional
        Alternative to `steps`: number of passes over the area of the training fields, see `resolved`.
    batch, size : int
        Crops per step and device, and their side in pixels.
    stride : int
        Spacing in pixels of the grid on which crops lie; 0: anywhere.
    optimizer : str
        ``adamw``, ``adam`` or ``sgd`` (momentum 0.9).
    learning_rate, weight_decay : float
        Settings of the optimiser.
    betas : (float, float)
        Decay rates of the running means of the gradient and its square in AdamW and Adam.
    encoder_rate : float
        Factor on the learning rate of a network's encoder.
    decay : str
        How the rate falls after the warm-up. ``cosine``: along half a cosine to `floor`. ``linear``: linearly to
        `floor`, from the share `hold` of the steps on. ``steps``: by the factor `gamma` at each of the `milestones`.
        ``plateau``: by the factor `gamma` whenever the mean training loss has not reached a new low in more than
        `patience` checks in a row. ``constant``: not at all.
    floor : float
        Final share of the rate for ``cosine`` and ``linear``.
    hold : float
        Share of the steps before ``linear`` starts to fall.
    milestones : tuple of float
        Shares of the steps at which ``steps`` lowers the rate.
    gamma : float
        Factor on the rate for ``steps`` and ``plateau``.
    patience : int
        Checks without a new low that ``plateau`` tolerates; the loss is checked every `validate_every` steps.
    warmup : float
        Share of the steps over which the rate rises.
    clip : float
        Maximum norm of the gradient; 0 for no limit.
    ema : float
        Decay of the moving average of the weights, which is then validated and kept; 0 for no averaging.
    keep : str
        Score on the validation fields by which the kept checkpoint is chosen, or ``last`` for the last checkpoint.
    validate_every : int
        Steps between validations.
    precision : str
        ``32``, ``bf16``, ``16`` or ``auto``: on a GPU mixed precision, with bf16 if supported, else 16; on a CPU bf16
        if it multiplies bf16 in hardware.
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    devices : int
        Number of GPUs (or CPU processes) to train on; each has its own batch.
    sync_norm : bool
        On several GPUs, whether batch normalisation uses the batches of all of them.
    workers : int
        Processes that draw samples; 0 draws them in the trainer's own process.
    seed : int
        Seed of weights and samples.
    max_minutes : float, optional
        Time after which training stops, to be resumed when it is started again.
    """

    steps: int = 2000
    epochs: float | None = None
    batch: int = 8
    size: int = 192
    stride: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    encoder_rate: float = 1.0
    decay: str = "cosine"
    floor: float = 0.01
    hold: float = 0.5
    milestones: tuple[float, ...] = (0.6, 0.85)
    gamma: float = 0.1
    patience: int = 10
    warmup: float = 0.05
    clip: float = 1.0
    ema: float = 0.995
    keep: str = "aji"
    validate_every: int = 250
    precision: str = "auto"
    device: str = "auto"
    devices: int = 1
    sync_norm: bool = False
    workers: int = 1
    seed: int = 42
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.size < 32:
            raise PipelineError(
                f"schedule: steps {self.steps}, batch {self.batch}, size {self.size}", "use at least 1, 1 and 32"
            )
        choices = {"optimizer": OPTIMIZERS, "decay": DECAYS, "keep": KEEP, "precision": PRECISIONS, "device": DEVICES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise PipelineError(f"schedule: {name} {getattr(self, name)!r}", f"choose from {', '.join(known)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise PipelineError(
                f"schedule: betas {', '.join(map(str, self.betas))}", "give two numbers from 0 to below 1"
            )
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise PipelineError(
                f"schedule: milestones {', '.join(map(str, self.milestones))}", "give growing shares between 0 and 1"
            )

    def resolved(self, pixels: float) -> Schedule:
        """Return the schedule with `steps` computed from `epochs`, if these are given.

        Parameters
        ----------
        pixels : float
            Area of the training fields in pixels of the model's pixel size.
        """
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * pixels / (self.size**2 * self.batch * self.devices))
        return replace(self, steps=max(1, steps), epochs=None)

    def rate_at(self, step: int) -> float:
        """Factor on the learning rate at a step, without the factor of ``plateau``."""
        rise = max(1.0, self.warmup * self.steps)
        if step < rise and self.warmup > 0:
            return (step + 1) / (rise + 1)
        if self.decay == "cosine":
            share = min(1.0, (step - rise) / max(1.0, self.steps - rise))
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))
        if self.decay == "linear":
            share = max(0.0, step / self.steps - self.hold) / max(1 - self.hold, 1 / self.steps)
            return 1 - (1 - self.floor) * min(1.0, share)
        if self.decay == "steps":
            return float(self.gamma ** bisect_right(self.milestones, step / self.steps))
        return 1.0


class Deadline:
    """Time at which a training stops, to be resumed later.

    Parameters
    ----------
    minutes : float, optional
        Minutes from now; None for no deadline.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._end


class Unfinished(PipelineError):
    """The deadline passed before the training was finished; the last checkpoint is kept."""
