"""What a training begins with: its data, its stain reference, its folder; and what is refused or warned of."""

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
    """An experiment's fields.

    Parameters
    ----------
    fields : list of Field
        All that take part.
    split : Split
        Who is for what.
    """

    fields: list[Field]
    split: Split

    def part(self, name: str) -> list[Field]:
        """Fields of ``train``, ``validation`` or ``test``."""
        by_name = {f.name: f for f in self.fields}
        return [by_name[n] for n in getattr(self.split, name)]


def load_data(experiment: Experiment) -> Data:
    """Read an experiment's fields and split them.

    Raises
    ------
    PipelineError
        When data are missing or do not fit.
    """
    fields = load_fields(list(experiment.data))
    split = make_split(fields, experiment.split, experiment.holdout, experiment.seed, experiment.validation)
    used = {*split.train, *split.validation, *split.test}
    data = Data([f for f in fields if f.name in used], split)
    check_origins(experiment.data, data.part("test") + data.part("validation"))
    return data


def digest_of(fields: Sequence[Field]) -> str:
    """SHA-256 of all fields: who they are, images, labels."""
    found = hashlib.sha256()
    for field in fields:
        found.update(repr((field.name, field.source, field.patient, field.mpp, field.image.shape)).encode())
        for array in (field.image, field.labels, field.types):
            found.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def stain_reference(
    experiment: Experiment, train: Sequence[Field], start: ModelPackage | None, work: Path | None = None
) -> dict[str, Any]:
    """The reference that fields are brought to: that of the package that is trained on, or of a training field.

    Empty where no stain can be fitted and none is asked for.

    Parameters
    ----------
    experiment : Experiment
        Says how it is chosen.
    train : sequence of Field
        Its training fields.
    start : ModelPackage, optional
        The package of ``start_from``.
    work : pathlib.Path, optional
        The choice is explained in this folder.

    Raises
    ------
    PipelineError
        When the package has none of this kind, or no field can be one; one line.
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
    """Note whose training a folder holds.

    Raises
    ------
    PipelineError
        When it is that of another experiment.
    """
    work.mkdir(parents=True, exist_ok=True)
    owner = work / "experiment.json"
    if owner.is_file():
        recorded = read_json(owner)
        recorded.pop("fingerprint", None)  # of an older version
        if Experiment.from_json(recorded).learned != experiment.learned:  # 1 is 1.0
            raise PipelineError(
                f"{work} holds the training of another experiment called {experiment.name!r}",
                "give this one another train.name, or delete that folder",
            )
    save_json(owner, asdict(experiment))


def check_unchanged(split: Split, origin: Mapping[str, str | None], work: Path, name: str) -> None:
    """Refuse to go on with a training that began with other data or models.

    Its checkpoints may know patients that a new split holds out, and not what a new model has learned.

    Parameters
    ----------
    split : Split
        Who is for what.
    origin : mapping of str to str or None
        Digests of ``data``, ``start_from`` and ``teacher``.
    work : pathlib.Path
        Folder of the training.
    name : str
        Its name.

    Raises
    ------
    PipelineError
        When there are checkpoints of others.
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
    """Refuse a package that knows patients for testing, and warn of one that knows patients for validation.

    Parameters
    ----------
    package : ModelPackage
        The package.
    data : Data
        Who is for what.
    role : str
        What names the package, as messages are to say it.

    Returns
    -------
    set of str
        Names of the validation fields of patients that it knows.

    Raises
    ------
    PipelineError
        When it has learned from one that is for testing; one line.
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
    """Refuse classes that no field has, and warn of those that some settings name in vain.

    Raises
    ------
    PipelineError
        When not one of the classes is there.
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
    """Warn of data whose licence asks for more than the model's states."""
    for source in [one for own in experiment.data for one in (own, *origins_of(own))]:
        licence = str(source.get("licence") or "")
        more = restrictions(licence) - restrictions(experiment.licence)
        if more:
            log.warning(
                "the licence of %s, %s, is stricter (%s) than that of the model, %s: set train.licence",
                source.get("name", source.get("kind")), licence, ", ".join(sorted(more)), experiment.licence,
            )  # fmt: skip
