"""Classifiers, which assign classes to nuclei by their measurements, and the files that store them.

The classes of a network are fixed when it is trained. A classifier is trained afterwards, on nuclei that the network
has found and a user has labelled on a few slides (`pipeline.training.classifier`). The stage ``classify`` applies it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.settings import file_sha256
from pipeline.batch.stage import whole_files, write_json
from pipeline.errors import PipelineError
from pipeline.kernels import classify as kernel
from pipeline.models.package import NucleusClass

if TYPE_CHECKING:
    import pyarrow as pa


KIND = "nucleus classifier"
"""Value of ``kind`` that identifies a classifier's file."""

ANEW = "make it again: python -m pipeline classifier"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classifier of nuclei.

    Parameters
    ----------
    name : str
        Name of the classifier.
    classes : tuple of NucleusClass
        Names and colours of the classes.
    model : dict
        ``name`` and ``sha256`` of the model on whose nuclei the classifier was trained.
    mean, spread : numpy.ndarray
        Mean and spread of the features, float64 ``(f,)``.
    weights : numpy.ndarray
        float64 ``(t, classes)``; see `pipeline.kernels.classify.design`.
    data : tuple of dict
        Training data: for each slide ``slide`` and ``nuclei``, the number of nuclei of each class.
    scores : dict
        Scores on nuclei that were held out of the training, and how they were chosen.
    sha256 : str
        Hash of the classifier's file; empty for one that was not loaded from a file.
    """

    name: str
    classes: tuple[NucleusClass, ...]
    model: dict[str, str]
    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    data: tuple[dict[str, Any], ...] = ()
    scores: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        features = len(kernel.FEATURES)
        if not 2 <= len(self.classes) <= 255:
            raise ValueError(f"a classifier has 2 to 255 classes, got {len(self.classes)}")
        if len({one.name for one in self.classes}) < len(self.classes):
            raise ValueError("two classes have the same name")
        for one in self.classes:
            if len(one.color) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in one.color):
                raise ValueError(f"the colour of {one.name!r} must be three numbers of 0 to 255, got {one.color}")
        terms = 1 + features + features * (features + 1) // 2
        for name, shape in (("mean", (features,)), ("spread", (features,)), ("weights", (terms, len(self.classes)))):
            values = getattr(self, name)
            if values.shape != shape or not np.isfinite(values).all():
                raise ValueError(f"{name} must be {shape} numbers, got {values.shape}")
        if not (self.spread > 0).all():
            raise ValueError("spread must be above 0")

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read a classifier from a file.

        Raises
        ------
        PipelineError
            When the file is missing or damaged, or its features differ from those of this version of the pipeline.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PipelineError(
                f"classifier {str(path)!r} is missing", "make one: python -m pipeline classifier"
            ) from None
        except OSError as error:
            raise PipelineError(f"classifier {str(path)!r}: cannot read it: {error.strerror}") from None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise PipelineError(f"{str(path)!r} is not a classifier", "make one: python -m pipeline classifier")
        try:
            if tuple(found["features"]) != kernel.FEATURES:
                raise PipelineError(
                    f"classifier {str(path)!r} is of another version of the pipeline, whose features were others", ANEW
                )
            return cls(
                name=str(found["name"]),
                classes=tuple(NucleusClass(str(one["name"]), tuple(one["color"])) for one in found["classes"]),
                model=dict(found["model"]),
                mean=np.array(found["mean"], np.float64),
                spread=np.array(found["spread"], np.float64),
                weights=np.array(found["weights"], np.float64),
                data=tuple(found["data"]),
                scores=dict(found["scores"]),
                sha256=file_sha256(path),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PipelineError(f"classifier {str(path)!r} is damaged: {error}", ANEW) from None

    def save(self, path: Path) -> None:
        """Write the classifier to a file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_files(path) as (staged,):
            write_json(staged, {
                "kind": KIND,
                "name": self.name,
                "classes": [{"name": one.name, "color": list(one.color)} for one in self.classes],
                "model": self.model,
                "scores": self.scores,
                "data": list(self.data),
                "features": list(kernel.FEATURES),
                "mean": self.mean.tolist(),
                "spread": self.spread.tolist(),
                "weights": self.weights.tolist(),
            })  # fmt: skip

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Probability of each class, float64 ``(n, classes)``, for features by `pipeline.kernels.classify.features`."""
        return kernel.probabilities(kernel.design(features, self.mean, self.spread), self.weights)


def check_classifier(path: Path, card: Mapping[str, Any]) -> None:
    """Check, before a run starts, that a classifier can be read and was made for the run's model.

    Parameters
    ----------
    path : pathlib.Path
        The classifier.
    card : mapping
        The model's card.

    Raises
    ------
    PipelineError
        When it cannot be read or was made for another model.
    """
    model = Classifier.load(path).model
    if model.get("sha256") != card["sha256"]:
        raise PipelineError(
            f"classifier {str(path)!r} was made with nuclei of another model ({model.get('name')!r}) than "
            f"{card.get('name')!r} is",
            f"run the slides that were annotated with this model, and {ANEW}",
        )


class Measured:
    """Measurements and positions of a slide's nuclei, from which features are computed.

    Parameters
    ----------
    table : pyarrow.Table
        ``centroid_x``, ``centroid_y`` and `pipeline.kernels.classify.COLUMNS` of ``nuclei.parquet``.
    """

    COLUMNS = ("centroid_x", "centroid_y", *kernel.COLUMNS)

    def __init__(self, table: pa.Table) -> None:
        from scipy.spatial import cKDTree

        from pipeline.stores.nuclei import grid_of

        grid = grid_of(table)
        um = np.array([grid.mpp / grid.scale_x, grid.mpp / grid.scale_y])
        self.columns = {name: table[name].to_numpy() for name in kernel.COLUMNS}
        self.points = np.column_stack([table[f"centroid_{axis}"].to_numpy() for axis in "xy"]) * um
        self.tree = cKDTree(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def features(self, rows: np.ndarray) -> np.ndarray:
        """Features of the nuclei in the given rows, float64 ``(m, f)``."""
        return kernel.features(self.columns, rows, *kernel.nearest(self.points, rows, self.tree))
