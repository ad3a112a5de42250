"""Preparation of a training: its data, stain reference and folder, and the checks before it starts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.stain import METHODS
from pipeline.models.licences import restrictions
from pipeline.models.package import ModelPackage
from pipeline.training.data import Field, load_fields
from pipeline.training.experiment import Experiment
from pipeline.training.files import read_json, save_json
from pipeline.training.origin import check_origins, known_patients, origins_of
from pipeline.training.reference import NoReferenceError, choose_reference
from pipeline.training.splits import PARTS, Split, make_split
from pipeline.training.targets import classes_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Data:
    """The fields of an experiment.

    Parameters
    ----------
    fields : list of Field
        All fields of the split.
    split : Split
        Names of the fields for training, validation and testing.
    """

    fields: list[Field]
    split: Split

    def part(self, name: str) -> list[Field]:
        """Return the fields of ``train``, ``validation`` or ``test``."""
        by_name = {f.name: f for f in self.fields}
        return [by_name[n] for n in getattr(self.split, name)]


def load_data(experiment: Experiment) -> Data:
    """Read an experiment's fields and split them.

    Raises
    ------
    PipelineError
        When data are missing or do not fit the split, or synthetic fields were made from patients who are held out.
    """
    fields = load_fields(list(experiment.data))
    split = make_split(fields, experiment.split, experiment.holdout, experiment.seed, experiment.validation)
    used = {*split.train, *split.validation, *split.test}
    data = Data([f for f in fields if f.name in used], split)
    check_origins(experiment.data, data.part("test") + data.part("validation"))
    return data


def digest_of(fields: Sequence[Field]) -> str:
    """Return the SHA-256 of all fields: their names, sources, patients, pixel sizes, images, labels, classes
    and the classes' names.
    """
    found = hashlib.sha256()
    for field in fields:
        found.update(repr((field.name, field.source, field.patient, field.mpp, field.image.shape)).encode())
        if field.types is not None:
            found.update(repr(field.classes).encode())
        for array in (field.image, field.labels, field.types):
            found.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def stain_reference(
    experiment: Experiment, train: Sequence[Field], start: ModelPackage | None, work: Path | None = None
) -> dict[str, Any]:
    """Return the stain reference to which fields are normalised.

    It is the reference of the package that the training starts from, else that of a training field. It is empty if the
    experiment does not normalise (``stain: none``) and no stain can be fitted.

    Parameters
    ----------
    experiment : Experiment
        Names the stain method, and the reference field or ``auto``.
    train : sequence of Field
        Training fields of the experiment.
    start : ModelPackage, optional
        The package of ``start_from``.
    work : pathlib.Path, optional
        Folder to which the reasons of the choice are written.

    Raises
    ------
    PipelineError
        When the package has no reference of this stain method, or no field can serve as the reference.
    """
    if start is None:
        main = [f for f in train if f.source == experiment.holdout] or list(train)
        try:
            chosen, reference = choose_reference(main, experiment.reference, experiment.stain, work)
        except NoReferenceError as error:
            if experiment.stain != "none":
                raise
            log.warning("%s will carry no stain reference: %s", experiment.name, error.reason)
            return {}
        return {"name": chosen.name, **reference}
    found: dict[str, Any] = start.stain["reference"]
    there = [method for method in METHODS if method == "none" or method in found]
    if experiment.stain not in there:
        raise PipelineError(
            f"train: start_from {start.folder} has no stain reference of {experiment.stain!r}",
            f"set train.stain to {' or '.join(there)}",
        )
    return found


def own_folder(experiment: Experiment, work: Path) -> None:
    """Record in a training folder which experiment it belongs to.

    Raises
    ------
    PipelineError
        When the folder belongs to another experiment.
    """
    work.mkdir(parents=True, exist_ok=True)
    owner = work / "experiment.json"
    if owner.is_file():
        recorded = read_json(owner)
        recorded.pop("fingerprint", None)  # written by older versions
        if Experiment.from_json(recorded).learned != experiment.learned:  # compares values: 1 equals 1.0
            raise PipelineError(
                f"{work} holds the training of another experiment called {experiment.name!r}",
                "give this one another train.name, or delete that folder",
            )
    save_json(owner, asdict(experiment))


def check_unchanged(split: Split, origin: Mapping[str, str | None], work: Path, name: str) -> None:
    """Refuse to continue a training that began with other data or models.

    Its checkpoints may have learned from patients that the new split holds out, and do not build on a new start model
    or teacher.

    Parameters
    ----------
    split : Split
        Names of the fields for training, validation and testing.
    origin : mapping of str to str or None
        SHA-256 of ``data``, ``start_from`` and ``teacher``.
    work : pathlib.Path
        Folder of the training.
    name : str
        Name of the experiment.

    Raises
    ------
    PipelineError
        When the folder has checkpoints of a training with other data or models.
    """
    recorded = work / "split.json"
    if not recorded.is_file() or not any(work.glob("*/last.ckpt")):
        return
    before = read_json(recorded)
    changed = [what for what, digest in origin.items() if before.get(what, digest) != digest]
    if any(before[part] != list(getattr(split, part)) for part in PARTS):
        changed.insert(0, "data")
    if changed:
        raise PipelineError(
            f"the {changed[0]} of {name!r} changed after its training in {work} began",
            "give the new training another train.name, or delete that folder",
        )


def check_unseen(package: ModelPackage, data: Data, role: str) -> set[str]:
    """Refuse a package that has learned from test patients, and warn if it has learned from validation patients.

    Parameters
    ----------
    package : ModelPackage
        The package.
    data : Data
        Fields and split of the experiment.
    role : str
        Words that stand before the package's folder in messages, such as ``train: teacher``.

    Returns
    -------
    set of str
        Names of the validation fields whose patients the package has learned from.

    Raises
    ------
    PipelineError
        When the package has learned from a patient who is for testing.
    """
    leaked = known_patients(package.data, data.part("test"))
    if leaked:
        raise PipelineError(
            f"{role} {package.folder} has learned from {len(leaked)} of the patients held out, first "
            f"{leaked[0][1]} of {leaked[0][0]}",
            "hold out patients that it has not seen (train.holdout, split.method lists), or take a model without these",
        )
    validation = data.part("validation")
    patients = known_patients(package.data, validation)
    known = {field.name for field in validation if (field.source, field.patient) in patients}
    if known:
        log.warning(
            "%s %s knows the patients of %d of the %d validation fields, first %s: checkpoint and thresholds chosen on "
            "them may suit others less", role, package.folder, len(known), len(validation), min(known),
        )  # fmt: skip
    return known


def check_classes(experiment: Experiment, fields: Sequence[Field]) -> None:
    """Check that the classes which the settings name occur in the fields, and warn of each that does not.

    Raises
    ------
    PipelineError
        When no field has any of the experiment's classes.
    """
    own = classes_of(fields)
    there = classes_of(fields, experiment.class_names)
    missing = [name for name in experiment.classes if name not in there]
    if missing and len(missing) == len(experiment.classes):
        raise PipelineError(
            f"train: no field has a class of {', '.join(missing)}", f"the data have {', '.join(own) or 'none'}"
        )
    for what, names in (
        ("classes", missing),
        ("class_names", [name for name in experiment.class_names or {} if name not in own]),
    ):
        if names:
            log.warning("train.%s: no field has %s; the data have %s", what, ", ".join(names), ", ".join(own))


def check_licences(experiment: Experiment) -> None:
    """Warn of data whose licence has restrictions that the model's licence lacks."""
    for source in [one for own in experiment.data for one in (own, *origins_of(own))]:
        licence = str(source.get("licence") or "")
        more = restrictions(licence) - restrictions(experiment.licence)
        if more:
            log.warning(
                "the licence of %s, %s, is stricter (%s) than that of the model, %s: set train.licence",
                source.get("name", source.get("kind")), licence, ", ".join(sorted(more)), experiment.licence,
            )  # fmt: skip
