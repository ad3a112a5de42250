"""Division of fields into training, validation and test, always by whole patients."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.training.data import Field

log = logging.getLogger(__name__)

METHODS = ("one-per-organ", "patients", "stratified", "organs", "folds", "kumar", "lists", "all-train", "all-test")
"""Ways to hold patients out."""

STRATA = ("organ", "cohort")
"""Attributes of a field by which patients can be stratified."""

PARTS = ("train", "validation", "test")

KUMAR_TRAIN = (
    "18-5592", "21-5784", "38-6178", "50-5931", "A7-A13E", "AR-A1AK", "AR-A1AS", "B0-5711", "E2-A14V", "G9-6348",
    "G9-6356", "G9-6362", "G9-6363", "HE-7128", "HE-7129", "HE-7130",
)  # fmt: skip
"""The 16 training patients of Kumar et al., IEEE TMI 2017, as listed by HoVer-Net (Graham et al. 2019;
``data/README.md`` of vqdang/hover_net). Kumar et al. gave only their number; other authors use other patients."""

KUMAR_TEST = (
    "21-5786", "49-4488", "A7-A13F", "CH-5767", "E2-A1B5", "G9-6336", "B0-5698", "B0-5710", "AY-A8YK", "DK-A2I6",
    "KB-A93J", "NH-A8F7", "RD-A8N9", "G2-A2EK",
)  # fmt: skip
"""The 14 test patients of Kumar et al. from the same list; patients of organs without training patients come last."""


@dataclass(frozen=True)
class SplitSettings:
    """How patients of the data source ``holdout`` are held out; all other sources are for training.

    If a held-out patient also has fields in other sources, these are left out, unless ``lists`` names them.

    Parameters
    ----------
    method : str
        How test patients are chosen. ``one-per-organ``: one patient of each organ. ``patients``: a share of all
        patients. ``stratified``: a share of each organ's patients. ``organs``: all patients of some organs, given by
        name or as a share of the organs. ``folds``: fold `fold` of `folds`, by patient, each organ spread over the
        folds. ``kumar``: the 16 training and 14 test patients of Kumar et al. as listed by HoVer-Net. ``lists``: as
        listed. ``all-train``: no test patients. ``all-test``: all patients, to score an already trained network.
    test : float
        Test share for ``patients``, ``stratified`` and ``organs``.
    folds, fold : int
        Number of folds, and the index of the test fold, from 0.
    organs : tuple of str
        Test organs for ``organs``; when empty, a share of the organs is drawn.
    train_list, validation_list, test_list : tuple of str
        Entries for ``lists``: patients, field names, or beginnings of field names. Without a `train_list`, fields in no
        other list are for training.
    exclude : tuple of str
        Organs that are left out of all parts.
    strata : str
        Groups from which the same number or share of patients is taken: ``organ``, or ``cohort``, the collections that
        a data set such as CoNIC is made of.
    """

    method: str = "one-per-organ"
    test: float = 0.2
    folds: int = 5
    fold: int = 0
    organs: tuple[str, ...] = ()
    train_list: tuple[str, ...] = ()
    validation_list: tuple[str, ...] = ()
    test_list: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strata: str = "organ"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PipelineError(f"split: unknown method {self.method!r}", f"choose from {', '.join(METHODS)}")
        if self.strata not in STRATA:
            raise PipelineError(f"split: strata {self.strata!r}", f"choose from {', '.join(STRATA)}")
        if not 0 < self.test < 1:
            raise PipelineError(f"split: test {self.test} is not a share", "use a number between 0 and 1")
        if self.folds < 2 or not 0 <= self.fold < self.folds:
            raise PipelineError(
                f"split: fold {self.fold} of {self.folds}", "use at least 2 folds, numbered from 0 to one less"
            )
        if self.method == "lists" and not self.test_list:
            raise PipelineError("split: method lists without a test_list", "list patients or fields for testing")

    def describe(self, source: str) -> str:
        """Describe the method in words."""
        share = f"{100 * self.test:.0f} %"
        words = {
            "one-per-organ": f"one {source} patient {'a cohort' if self.strata == 'cohort' else 'an organ'} held out",
            "patients": f"{share} of the {source} patients held out",
            "stratified": f"{share} of the {source} patients of each {self.strata} held out",
            "organs": f"{source} organs held out: {', '.join(self.organs) or share}",
            "folds": f"fold {self.fold + 1} of {self.folds} of the {source} patients held out",
            "kumar": "the 14 test patients of Kumar et al. (HoVer-Net's list) held out",
            "lists": "listed fields held out",
            "all-train": "no field held out",
            "all-test": f"all {source} fields, none of them for training",
        }
        left_out = f", without {', '.join(self.exclude)}" if self.exclude else ""
        return words[self.method] + left_out


@dataclass(frozen=True)
class Split:
    """Names of the fields of each part of a split.

    Parameters
    ----------
    train, validation, test : tuple of str
        Field names. Test fields are only used for the final scores.
    seed : int
        Seed of the draw.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    seed: int

    def to_json(self, fields: Sequence[Field]) -> dict[str, Any]:
        """Return the split as plain JSON values, with the patients of each part."""
        patient = {f.name: f.patient for f in fields}
        patients = {part: sorted({patient[name] for name in getattr(self, part)}) for part in PARTS}
        return {**asdict(self), "patients": patients}


def make_split(fields: list[Field], settings: SplitSettings, source: str, seed: int, n_validation: int) -> Split:
    """Divide fields into training, validation and test, whole patients at a time.

    Parameters
    ----------
    fields : list of Field
        All fields.
    settings : SplitSettings
        How patients are held out.
    source : str
        The data source from which patients are held out.
    seed : int
        Seed of the draw. The draw does not depend on the order of the fields.
    n_validation : int
        Number of validation patients, drawn from those that are not for testing.

    Raises
    ------
    PipelineError
        When there is nothing to hold out, a part stays empty or holds no nucleus, or a patient is in two parts.
    """
    fields = [f for f in fields if f.organ not in settings.exclude]
    if settings.method == "lists":
        split = _listed(fields, settings, source, seed, n_validation)
    else:
        organs = patients_by_organ(fields, source, settings.strata)
        if not organs:
            there = ", ".join(dict.fromkeys(f.source for f in fields))
            raise PipelineError(f"no patients of {source!r} to hold out", f"set train.holdout, there are {there}")
        if settings.strata == "cohort" and not any(organs):
            raise PipelineError(f"split: strata cohort, but {source!r} names no cohorts", "leave strata out")
        rng = np.random.default_rng(seed)
        if settings.method == "one-per-organ":
            if set(organs) == {""}:
                log.warning(
                    "no organ of %s is known: a single patient is for testing (name organs in a table, or set "
                    "split.method to patients)", source,
                )  # fmt: skip
            test, validation = _one_per_organ(organs, rng, n_validation)
            lone = [organ for organ, patients in organs.items() if len(patients) == 1]
            if 2 * len(lone) > len(organs):
                log.warning(
                    "%s: %d of %d organs have a single patient, which is for testing; %d patients are left to learn "
                    "from (split.method: patients holds out a share of all)", source, len(lone), len(organs),
                    sum(map(len, organs.values())) - len(test) - len(validation),
                )  # fmt: skip
        else:
            test = _test_patients([f for f in fields if f.source == source], organs, settings, rng)
            if settings.method == "kumar":
                fields = [f for f in fields if f.source != source or f.patient in {*KUMAR_TRAIN, *KUMAR_TEST}]
                organs = patients_by_organ(fields, source, settings.strata)
            rest = {organ: [p for p in patients if p not in test] for organ, patients in organs.items()}
            validation = draw_validation(rest, rng, n_validation)
        split = assign(fields, test, validation, source, seed)
    left_out = len(fields) - sum(len(getattr(split, part)) for part in PARTS)
    if left_out and settings.method != "lists":
        log.info("%d fields of other sources are left out, as their patients are held out", left_out)
    check_split(split, fields, {"all-train": "test", "all-test": "train"}.get(settings.method))
    return split


def patients_by_organ(fields: Iterable[Field], source: str, by: str = "organ") -> dict[str, list[str]]:
    """Patients of a data source by organ or cohort, both in a fixed order.

    Each patient appears once, under the organ or cohort of most of its fields.
    """
    seen: dict[str, Counter[str]] = {}
    for one in sorted(fields, key=lambda f: f.name):
        if one.source == source:
            seen.setdefault(one.patient, Counter())[getattr(one, by)] += 1
    organs: dict[str, list[str]] = {}
    for patient, count in seen.items():
        organs.setdefault(count.most_common(1)[0][0], []).append(patient)
    return {organ: organs[organ] for organ in sorted(organs)}


def assign(fields: Iterable[Field], test: set[str], validation: set[str], source: str, seed: int) -> Split:
    """Return the split with these patients of a data source held out; their fields in other sources are in no part."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for one in fields:
        part = "test" if one.patient in test else "validation" if one.patient in validation else "train"
        if part == "train" or one.source == source:
            parts[part].append(one.name)
    return Split(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), seed)


def _one_per_organ(
    organs: dict[str, list[str]], rng: np.random.Generator, n_validation: int
) -> tuple[set[str], set[str]]:
    test, validation = set(), []
    for organ in organs:
        patients = list(rng.permutation(organs[organ]))
        test.add(str(patients.pop()))
        if len(patients) > 1:
            validation.append(str(patients.pop()))
    return test, set(validation[:n_validation])


def draw_validation(organs: dict[str, list[str]], rng: np.random.Generator, count: int) -> set[str]:
    """Draw up to `count` validation patients, taking organs in turn; at least one patient stays for training."""
    left = {organ: [str(p) for p in rng.permutation(patients)] for organ, patients in organs.items() if patients}
    chosen: set[str] = set()
    taken = dict.fromkeys(left, 0)
    while len(chosen) < count and sum(map(len, left.values())) > 1:
        # Among the organs drawn from least often so far, the one with most patients left comes next.
        organ = min((o for o in left if left[o]), key=lambda o: (taken[o], -len(left[o]), o))
        chosen.add(left[organ].pop())
        taken[organ] += 1
    return chosen


def _test_patients(
    fields: Sequence[Field], organs: dict[str, list[str]], settings: SplitSettings, rng: np.random.Generator
) -> set[str]:
    everyone = [p for patients in organs.values() for p in patients]
    if settings.method == "patients":
        return _share(everyone, settings.test, rng)
    if settings.method == "stratified":
        # The rounding error is carried from organ to organ, so that the total share is right.
        test: set[str] = set()
        due = 0.0
        for patients in organs.values():
            due += settings.test * len(patients)
            count = min(round(due), len(patients) - 1)
            due -= count
            test |= {str(p) for p in rng.permutation(patients)[:count]}
        return test
    if settings.method == "organs":
        names = sorted({f.organ for f in fields})
        unknown = sorted(set(settings.organs) - set(names))
        if unknown:
            raise PipelineError(f"split: no patient of organ {unknown[0]!r}", f"there are {', '.join(names)}")
        chosen = set(settings.organs) or _share(names, settings.test, rng)
        return {f.patient for f in fields if f.organ in chosen}
    if settings.method in ("all-train", "all-test"):
        return set(everyone) if settings.method == "all-test" else set()
    if settings.method == "folds":
        return fold_patients(organs, settings.folds, rng)[settings.fold]
    missing = sorted({*KUMAR_TRAIN, *KUMAR_TEST} - set(everyone))
    if missing:
        raise PipelineError(f"split: kumar needs patient {missing[0]}", "complete the MoNuSeg folder")
    return set(KUMAR_TEST)


def _share(names: list[str], share: float, rng: np.random.Generator) -> set[str]:
    count = min(max(1, round(share * len(names))), len(names) - 1)
    return {str(name) for name in rng.permutation(names)[:count]}


def fold_patients(organs: dict[str, list[str]], folds: int, rng: np.random.Generator) -> list[set[str]]:
    """Divide patients into folds of nearly equal size, spreading each organ over as many folds as possible.

    Raises
    ------
    PipelineError
        When there are more folds than patients.
    """
    order = [str(p) for patients in organs.values() for p in rng.permutation(patients)]
    if len(order) < folds:
        raise PipelineError(f"split: {folds} folds of {len(order)} patients", "use fewer folds")
    return [set(order[fold::folds]) for fold in range(folds)]


def _listed(fields: list[Field], settings: SplitSettings, source: str, seed: int, n_validation: int) -> Split:
    lists = {part: getattr(settings, f"{part}_list") for part in PARTS}
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    used: set[str] = set()
    others: set[str] = set()  # fields of other sources than `source` that are in no list
    whole = {name for one in fields for name in (one.name, one.patient)}  # slide-1 is not the beginning of slide-10
    for one in fields:
        found = []
        for part, entries in lists.items():
            own = (one.name, one.patient)
            if named := [e for e in entries if e in own or (e not in whole and one.name.startswith(e))]:
                used.update(named)
                found.append(part)
        if len(found) > 1:
            raise PipelineError(f"split: field {one.name} is listed for {' and '.join(found)}", "list it once")
        if found:
            parts[found[0]].append(one.name)
        elif one.source != source:
            others.add(one.name)
            parts["train"].append(one.name)
        elif not lists["train"]:
            parts["train"].append(one.name)
    unknown = [e for entries in lists.values() for e in entries if e not in used]
    if unknown:
        raise PipelineError(f"split: {unknown[0]!r} is not a patient and begins no field's name", "correct the list")
    patient = {f.name: f.patient for f in fields}
    if n_validation and not lists["validation"]:
        rest = patients_by_organ([f for f in fields if f.name in set(parts["train"])], source, settings.strata)
        chosen = draw_validation(rest, np.random.default_rng(seed), n_validation)
        parts["validation"] = [name for name in parts["train"] if patient[name] in chosen and name not in others]
        parts["train"] = [name for name in parts["train"] if patient[name] not in chosen]
    held_out = {patient[name] for part in ("validation", "test") for name in parts[part]}
    parts["train"] = [name for name in parts["train"] if name not in others or patient[name] not in held_out]
    return Split(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), seed)


def check_split(split: Split, fields: Sequence[Field], spare: str | None = None) -> None:
    """Check that no patient is in two parts and that the parts have fields with nuclei.

    Validation and the part `spare` may be empty.

    Raises
    ------
    PipelineError
        When a patient is in two parts, or a part is empty or holds no nucleus.
    """
    by_name = {f.name: f for f in fields}
    side: dict[str, tuple[str, str]] = {}
    for part in PARTS:
        names = getattr(split, part)
        for name in names:
            patient = by_name[name].patient
            other, first = side.setdefault(patient, (part, name))
            if other != part:
                raise PipelineError(
                    f"split: a leak: patient {patient} is in {other} ({first}) and in {part} ({name})",
                    "keep all fields of a patient on one side",
                )
        if not names and part not in ("validation", spare):
            patients = sorted({f.patient for f in fields})
            raise PipelineError(
                f"split: no field is left for {part}, of {len(patients)} patients: {', '.join(patients[:3])}",
                "add others, hold out fewer (test, validation), or train on from a model with split.method all-train",
            )
        if names and not any(by_name[name].labels.any() for name in names):
            raise PipelineError(
                f"split: the {part} fields hold no nucleus ({', '.join(names[:3])})",
                "check their annotations, or use another seed or fold",
            )
