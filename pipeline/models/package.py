"""Model packages: a folder with a card (``model.json``) and weights (``weights.safetensors``).

The card holds what inference must repeat from training (pixel size, stain reference, thresholds, classes) and what
users must know (licence, training data, scores). This module does not import torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.batch.settings import file_sha256
from pipeline.batch.stage import whole_files, write_json
from pipeline.errors import PipelineError, of_the_machine
from pipeline.kernels.instances import InstanceRules

CARD = "model.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class NucleusClass:
    """A class of nuclei.

    Parameters
    ----------
    name : str
        Name, as it is written to results.
    color : (int, int, int)
        RGB colour in overlays and in QuPath.
    """

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class ModelPackage:
    """The card of a model.

    Parameters
    ----------
    name : str
        Name of the model.
    mpp : float
        Pixel size in µm that the network works at.
    patch, overlap : int
        Side of the network's window, and the overlap of neighbouring windows, in pixels.
    network, network_args
        Name of the network in the registry, and its arguments.
    heads : tuple of str
        Heads in the order of the output channels.
    classes : tuple of NucleusClass
        Classes of nuclei; a model without a type head has one.
    stain : dict
        ``method``, ``reference`` and ``strength`` (1 where it is missing).
    thresholds : InstanceRules
        Rules that turn maps into instances.
    licence, description : str
        Licence of the weights, and one line about the model.
    data : tuple of dict
        Training data: name, licence, fields, patients.
    metrics : dict
        Scores on unseen patients, and how these were held out.
    sha256 : str
        Hash of the weights file.
    tta : str
        Test-time augmentation that inference repeats, see `pipeline.networks.outputs.TTA`.
    members : tuple of dict
        For an ensemble, the entries of its members' cards that the members do not have in common.
    folder : pathlib.Path
        Folder of the package.
    """

    name: str
    mpp: float
    patch: int
    overlap: int
    network: str
    network_args: dict[str, Any]
    heads: tuple[str, ...]
    classes: tuple[NucleusClass, ...]
    stain: dict[str, Any]
    thresholds: InstanceRules
    licence: str
    description: str
    data: tuple[dict[str, Any], ...]
    metrics: dict[str, Any]
    sha256: str
    tta: str = "none"
    members: tuple[dict[str, Any], ...] = ()
    folder: Path = field(default=Path(), compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and 0.05 <= self.mpp <= 5):
            raise ValueError(f"mpp must be within 0.05 and 5 µm, got {self.mpp}")
        if not 0 < 2 * self.overlap <= self.patch:
            raise ValueError(f"overlap must be within 1 and half the patch ({self.patch}), got {self.overlap}")
        if not 0 <= float(self.stain.get("strength", 1)) <= 1:
            raise ValueError(f"stain.strength must be within 0 and 1, got {self.stain['strength']}")
        if not self.classes:
            raise ValueError("a model needs at least one class")

    @property
    def weights(self) -> Path:
        """The weights file."""
        return self.folder / WEIGHTS

    @property
    def colors(self) -> list[dict[str, Any]]:
        """Classes as plain JSON values."""
        return [{"name": c.name, "color": list(c.color)} for c in self.classes]

    @classmethod
    def from_json(cls, value: dict[str, Any], folder: Path) -> ModelPackage:
        """Build the package in `folder` from its card's JSON.

        Raises
        ------
        KeyError, TypeError, ValueError
            When an entry is missing or not valid.
        """
        return cls(
            name=value["name"],
            mpp=float(value["mpp"]),
            patch=int(value["patch"]),
            overlap=int(value["overlap"]),
            network=value["network"]["name"],
            network_args=value["network"]["args"],
            heads=tuple(value["heads"]),
            classes=tuple(NucleusClass(c["name"], (*map(int, c["color"]),)) for c in value["classes"]),  # type: ignore[arg-type]
            stain=value["stain"],
            thresholds=InstanceRules(**value["thresholds"]),
            licence=value["licence"],
            description=value["description"],
            data=tuple(value["data"]),
            metrics=value["metrics"],
            sha256=value["sha256"],
            tta=value.get("tta", "none"),
            members=tuple(value.get("members", ())),
            folder=folder,
        )

    @classmethod
    def load(cls, folder: Path, verify: bool = False) -> ModelPackage:
        """Read a package's card.

        Parameters
        ----------
        folder : pathlib.Path
            The package.
        verify : bool
            Also check the hash of the weights.

        Raises
        ------
        PipelineError
            When the package is missing, incomplete or, with `verify`, its weights are not those of the card.
        """
        card = Path(folder) / CARD
        try:
            package = cls.from_json(json.loads(card.read_text(encoding="utf-8")), Path(folder))
        except FileNotFoundError:
            raise PipelineError(f"model {folder}: {CARD} is missing", "set model= to a folder under models/") from None
        except (KeyError, TypeError, ValueError, OSError) as error:
            if of_the_machine(error):
                raise
            raise PipelineError(
                f"model {folder}: the card is damaged: {error}", "correct it, or fetch the model again"
            ) from None
        if not package.weights.is_file():
            raise PipelineError(f"model {folder}: {WEIGHTS} is missing", "fetch the model again")
        if verify and (found := file_sha256(package.weights)) != package.sha256:
            raise PipelineError(
                f"model {folder}: the weights' sha256 is {found[:12]}…, the card says {package.sha256[:12]}…",
                "fetch the model again or pack it again",
            )
        return package

    def write(self, folder: Path, weights: bytes) -> None:
        """Write weights and card to temporary files, then rename both into place, the card last.

        An existing package is kept until the new one is complete. Between the two renames the hash in the card is not
        that of the weights; the check before a run detects this.

        Parameters
        ----------
        folder : pathlib.Path
            The package's folder.
        weights : bytes
            Its weights in the safetensors format.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with whole_files(folder / WEIGHTS, folder / CARD) as (staged, card):
            staged.write_bytes(weights)
            write_json(card, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        card = {
            "name": self.name,
            "description": self.description,
            "licence": self.licence,
            "mpp": self.mpp,
            "patch": self.patch,
            "overlap": self.overlap,
            "network": {"name": self.network, "args": self.network_args},
            "heads": list(self.heads),
            "classes": self.colors,
            "tta": self.tta,
            "thresholds": asdict(self.thresholds),
            "metrics": self.metrics,
            "data": list(self.data),
            "sha256": self.sha256,
            "stain": self.stain,
        }
        return card | ({"members": list(self.members)} if self.members else {})
