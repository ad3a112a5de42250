"""The settings of a training experiment."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import PipelineError
from pipeline.kernels.stain import METHODS
from pipeline.networks.registry import NETWORKS
from pipeline.training.samples import Augmentation
from pipeline.training.schedule import Schedule
from pipeline.training.splits import SplitSettings

HEADS = ("nucleus", "distance")
"""Heads that are trained."""


@dataclass(frozen=True)
class Experiment:
    """The ``train:`` section of the configuration.

    Parameters
    ----------
    name : str
        Name of the model that comes out.
    data : tuple of dict
        Data sources: ``kind``, ``path``, optional ``mpp``, ``mpp_of``, ``weight`` (share of the samples) and
        ``licence``.
    mpp : float
        The model's pixel size in µm.
    network, network_args
        The network.
    patch, overlap : int
        The window that inference uses.
    stain : str
        Normalisation of the slides: ``none``, ``macenko``, ``reinhard`` or ``histogram``. In training the network sees
        fields as they are and normalised.
    holdout : str
        Data source from which patients are held out.
    split : SplitSettings
        How they are.
    validation : int
        Patients for validation.
    seed : int
        Seed of the split.
    schedule : Schedule
        Training with patients held out.
    final_steps : int
        Steps of training on with all fields; 0 packs the first network.
    augmentation : Augmentation
        Changes to the samples.
    licence, description : str
        For the card.
    """

    name: str
    data: tuple[dict[str, Any], ...]
    mpp: float = 0.5
    network: str = "resunet"
    network_args: dict[str, Any] = field(default_factory=dict)
    patch: int = 320
    overlap: int = 32
    stain: str = "macenko"
    holdout: str = "monuseg"
    validation: int = 4
    seed: int = 42
    split: SplitSettings = field(default_factory=SplitSettings)
    schedule: Schedule = field(default_factory=Schedule)
    final_steps: int = 1000
    augmentation: Augmentation = field(default_factory=Augmentation)
    licence: str = "unknown"
    description: str = ""

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise PipelineError(
                f"train: unknown network {self.network!r}", f"choose from {', '.join(sorted(NETWORKS))}"
            )
        stride = NETWORKS[self.network].stride
        for name, side in (("patch", self.patch), ("schedule.size", self.schedule.size)):
            if side % stride:
                raise PipelineError(f"train: {name} {side} does not suit {self.network}", f"use a multiple of {stride}")
        if self.stain not in METHODS or self.stain == "vahadane":
            raise PipelineError(f"train: stain {self.stain!r}", "use none, macenko, reinhard or histogram")

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the checkpoints depend on, the number of steps apart."""
        kept = asdict(self)
        for name in ("final_steps", "patch", "overlap", "licence", "description"):
            del kept[name]
        for name in ("steps", "workers", "validate_every"):
            del kept["schedule"][name]
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Experiment:
        """Build an experiment from the configuration.

        Raises
        ------
        PipelineError
            When a key is unknown or a value does not fit.
        """
        if not value.get("data"):
            raise PipelineError("train: no data", "list data sources under train.data, see config/experiments")
        parts = {"schedule": Schedule, "augmentation": Augmentation, "split": SplitSettings}
        try:
            built: dict[str, Any] = {
                key: parts[key](**_tuples(part)) if key in parts else part for key, part in _tuples(value).items()
            }
            return cls(**built)
        except (TypeError, ValueError) as error:
            raise PipelineError(f"train: {error}", "compare the section with config.yaml") from None


def _tuples(value: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
