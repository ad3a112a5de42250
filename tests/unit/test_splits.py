"""Splits: whole patients, every part filled, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import PipelineError
from pipeline.training.data import Field
from pipeline.training.datasets.folders import MONUSEG_ORGANS
from pipeline.training.splits import KUMAR_TEST, KUMAR_TRAIN, METHODS, Split, SplitSettings, check_split, make_split

IMAGE = np.zeros((4, 4, 3), np.uint8)


def field(patient: str, organ: str = "", source: str = "monuseg", number: int = 0, nuclei: bool = True) -> Field:
    labels = np.full((4, 4), int(nuclei), np.int32)
    return Field(f"{source}-{patient}-{number}", source, patient, organ, 0.25, IMAGE, labels)


MONUSEG = [field(p, organ) for organ, patients in MONUSEG_ORGANS.items() for p in patients]
MANY = [field(f"{organ}{i}", organ, number=n) for organ in "abc" for i in range(5) for n in range(2)]
OTHER = [field("t", "breast", "tnbc")]


def split(fields: list[Field], seed: int = 1, n_validation: int = 2, **how: Any) -> Split:
    return make_split(fields, SplitSettings(**how), "monuseg", seed, n_validation)


def patients(fields: list[Field], names: tuple[str, ...]) -> set[str]:
    return {f.patient for f in fields if f.name in names}


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from([m for m in METHODS if m not in ("kumar", "lists", "all-train", "all-test")]),
    seed=st.integers(0, 1000),
    test=st.floats(0.1, 0.6),
    fold=st.integers(0, 3),
    n_validation=st.integers(0, 4),
)
def test_no_patient_on_two_sides(method: str, seed: int, test: float, fold: int, n_validation: int) -> None:
    how = {"method": method, "test": test, "folds": 4, "fold": fold}
    found = split(MANY + OTHER, seed, n_validation, **how)
    parts = [set(found.train), set(found.validation), set(found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(MANY) + 1
    sides = [patients(MANY + OTHER, p) for p in (found.train, found.validation, found.test)]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert OTHER[0].name in found.train
    assert found.test
    again = split((MANY + OTHER)[::-1], seed, n_validation, **how)  # the order of the fields plays no part
    assert [set(again.train), set(again.validation), set(again.test)] == parts


def test_one_patient_an_organ() -> None:
    found = split(MONUSEG, seed=42, n_validation=4)
    assert sorted(f.organ for f in MONUSEG if f.name in found.test) == sorted(MONUSEG_ORGANS)
    assert len(found.validation) == 4
    # The draw of the shipped model: it must not change.
    assert patients(MONUSEG, found.test) == {
        "18-5592", "DK-A2I6", "E2-A1B5", "G9-6336", "HE-7128", "NH-A8F7", "RD-A8N9"
    }  # fmt: skip


def test_one_patient_of_organs_that_nobody_named(caplog: pytest.LogCaptureFixture) -> None:
    split(MANY)
    assert not caplog.text
    assert len(split([field(p) for p in "abcdef"]).test) == 1
    assert "no organ of monuseg is known: a single patient is for testing" in caplog.text
    caplog.clear()
    split([field(p, organ=p) for p in "abcde"] + [field(p, organ="f") for p in "fgh"])
    assert "5 of 6 organs have a single patient, which is for testing" in caplog.text


@pytest.mark.parametrize(("test", "count"), [(0.3, 9), (0.2, 6)])
@pytest.mark.parametrize("method", ["patients", "stratified"])
def test_shares(method: str, test: float, count: int) -> None:
    assert len(split(MONUSEG, method=method, test=test).test) == count


def test_stratified_takes_from_every_large_organ() -> None:
    found = split(MONUSEG, method="stratified", test=0.3)
    organs = Counter(f.organ for f in MONUSEG if f.name in found.test)
    assert all(1 <= organs[o] <= 2 for o, p in MONUSEG_ORGANS.items() if len(p) == 6)


def test_stratified_takes_from_every_cohort() -> None:
    sizes = {"consep": 6, "crag": 20, "glas": 10}
    fields = [replace(field(f"{c}{i}", "colon"), cohort=c) for c, count in sizes.items() for i in range(count)]
    drawn = []
    for seed in range(10):
        found = split(fields, seed, method="stratified", test=0.2, strata="cohort")
        tested = patients(fields, found.test)
        assert [sum(p.startswith(c) for p in tested) for c in sizes] == [1, 4, 2]
        assert {p.rstrip("0123456789") for p in patients(fields, found.validation)} == {"crag", "glas"}
        drawn.append(found.test)
    assert len(set(drawn)) > 5  # each seed draws again
    # Validation patients for listed test patients: of each cohort in turn.
    fields = [replace(field(f"{c}{i}", "colon"), cohort=c) for c in "xy" for i in range(20)]
    for seed in range(10):
        found = split(fields, seed, method="lists", test_list=("x0",), strata="cohort")
        assert {name.split("-")[1][0] for name in found.validation} == {"x", "y"}
    with pytest.raises(PipelineError, match="strata cohort, but 'monuseg' names no cohorts"):
        split(MANY, method="stratified", strata="cohort")


def test_folds_cover_everyone_once_and_spread_the_organs() -> None:
    found = [split(MONUSEG, method="folds", folds=5, fold=fold) for fold in range(5)]
    assert Counter(name for one in found for name in one.test) == Counter(f.name for f in MONUSEG)
    assert {len(one.test) for one in found} == {6}
    for one in found:
        organs = Counter(f.organ for f in MONUSEG if f.name in one.test)
        assert max(organs.values()) <= 2
    with pytest.raises(PipelineError, match="40 folds of 30 patients"):
        split(MONUSEG, method="folds", folds=40)


def test_patients_in_several_organs_are_drawn_once() -> None:
    """As in PanNuke, whose folds count as patients."""
    fields = [
        field(f"fold{fold}", organ, number=n)
        for fold in (1, 2, 3)
        for n, organ in enumerate(["breast", "colon", "colon", "lung", "skin"])
    ]
    found = [split(fields, method="folds", folds=3, fold=fold, n_validation=1) for fold in range(3)]
    assert {p for one in found for p in patients(fields, one.test)} == {"fold1", "fold2", "fold3"}
    for one in [*found, *(split(fields, method=m, test=0.3, n_validation=1) for m in ("patients", "stratified"))]:
        assert [len(patients(fields, part)) for part in (one.train, one.validation, one.test)] == [1, 1, 1]
    assert len(patients(fields, split(fields, n_validation=0).test)) == 1  # one-per-organ: most are of the colon
    # No field of an organ that is held out is for training.
    fields += [field("alone", "liver"), field("both", "liver", number=1), field("both", "skin", number=2)]
    found = [split(fields, method="organs", organs=("liver",), n_validation=0)]
    assert patients(fields, found[0].test) == {"alone", "both"}


def test_kumar() -> None:
    found = split(MONUSEG, method="kumar", n_validation=0)
    assert patients(MONUSEG, found.train) == set(KUMAR_TRAIN)
    assert patients(MONUSEG, found.test) == set(KUMAR_TEST)
    assert "HoVer-Net's list" in SplitSettings(method="kumar").describe("monuseg")  # others list other patients
    with pytest.raises(PipelineError, match="kumar needs patient"):
        split(MONUSEG[1:], method="kumar")
    more = [field(f"new{number}", "liver") for number in range(30)]  # patients of a larger collection
    found = split([*MONUSEG, *more], method="kumar", n_validation=5)
    assert len(found.validation) == 5
    assert patients(MONUSEG, found.train + found.validation) == set(KUMAR_TRAIN)


def test_kumar_is_that_of_the_data(shared_data: Any) -> None:
    lists = json.loads((shared_data / "monuseg" / "splits.json").read_text())
    assert {name.removeprefix("TCGA-") for name in lists["kumar_train_16"]} == set(KUMAR_TRAIN)
    test = lists["kumar_test_8_same_organ"] + lists["kumar_test_6_other_organ"]
    assert [name.removeprefix("TCGA-") for name in test] == list(KUMAR_TEST)


def test_organs() -> None:
    found = split(MONUSEG, method="organs", organs=("breast",))
    assert patients(MONUSEG, found.test) == set(MONUSEG_ORGANS["breast"])
    with pytest.raises(PipelineError, match="no patient of organ 'brain'"):
        split(MONUSEG, method="organs", organs=("brain",))
    without = split(MONUSEG, method="one-per-organ", exclude=("breast",))
    assert not patients(MONUSEG, without.train + without.validation + without.test) & set(MONUSEG_ORGANS["breast"])


def test_nobody_and_everybody() -> None:
    nobody = split(MANY + OTHER, method="all-train", n_validation=0)
    assert (len(nobody.train), nobody.validation, nobody.test) == (len(MANY) + 1, (), ())
    everybody = split(MANY, method="all-test", n_validation=0)
    assert (everybody.train, len(everybody.test)) == ((), len(MANY))


def test_lists() -> None:
    how = {"method": "lists", "test_list": ("a0", "monuseg-b1-1"), "validation_list": ("c0",)}
    with pytest.raises(PipelineError, match=r"a leak: patient b1 is in train \(monuseg-b1-0\) and in test"):
        split(MANY, **how)
    found = split(MANY, **{**how, "test_list": ("a0", "b1")})
    assert patients(MANY, found.test) == {"a0", "b1"}
    assert patients(MANY, found.validation) == {"c0"}
    listed = split(MANY + OTHER, method="lists", test_list=("a0",), train_list=("a1", "a2"), n_validation=1)
    assert patients(MANY, listed.train) | patients(MANY, listed.validation) == {"a1", "a2"}
    assert OTHER[0].name in listed.train
    # One name may be the beginning of another.
    tenth = [*MANY, field("a10")]
    assert split(tenth, method="lists", test_list=("monuseg-a1", "monuseg-a10")).test[-1] == tenth[-1].name
    exact = [replace(field("a0"), name=name, patient=name) for name in ("s_1", "s_10", "s_2")]
    found = split(exact, method="lists", test_list=("s_1",), train_list=("s_10", "s_2"), n_validation=0)
    assert (found.test, found.train) == (("s_1",), ("s_10", "s_2"))
    for test_list, train_list, message in [
        (("zz",), (), "'zz' is not a patient"),
        (("a0",), ("a0",), "listed for train and test"),
    ]:
        with pytest.raises(PipelineError, match=message):
            split(MANY, method="lists", test_list=test_list, train_list=train_list)


def test_leak_by_another_source_is_refused() -> None:
    shared = field("a0", "", "more")
    with pytest.raises(PipelineError, match="a leak: patient a0"):
        check_split(Split((shared.name,), (), (MANY[0].name,), 0), [*MANY, shared])


@pytest.mark.parametrize(
    ("held_out", "how"),
    [
        ("a0", {"method": "organs", "organs": ("a",)}),
        ("a0", {"method": "lists", "test_list": ("monuseg-a0-",)}),
        ("c0", {"method": "lists", "test_list": ("monuseg-a0-",), "validation_list": ("monuseg-c0-",)}),
    ],
)
def test_other_sources_are_neither_tested_nor_trained_on_where_their_patient_is_held_out(
    held_out: str, how: dict[str, Any]
) -> None:
    twin, free = field(held_out, "", "more"), field("b0", "", "more")
    found = split([*MANY, twin, free], **how)
    assert twin.name not in found.train + found.validation + found.test
    assert free.name in found.train or "b0" in patients(MANY, found.validation)
    assert len(found.test) == sum(f.patient in patients(MANY, found.test) for f in MANY)


def test_other_sources_are_not_in_a_drawn_validation() -> None:
    twins = [field(f"{organ}{i}", organ, "more") for organ in "abc" for i in range(5)]
    for how in ({"method": "folds"}, {"method": "lists", "test_list": ("monuseg-a0-",)}):
        found = split(MANY + twins, n_validation=3, **how)
        assert len(patients(MANY, found.validation)) == 3
        assert all(name.startswith("monuseg") for name in found.validation + found.test)
        assert any(name.startswith("more") for name in found.train)


def test_lists_may_test_another_source() -> None:
    twin = field("a0", "", "more")
    assert twin.name in split([*MANY, twin], method="lists", test_list=("a0",)).test


def test_fold_without_nuclei() -> None:
    fields = [field(p, nuclei=p != "c") for p in "abc"]
    with pytest.raises(PipelineError, match=r"the test fields hold no nucleus \(monuseg-c-0\)"):
        split(fields, method="lists", test_list=("c",), n_validation=0)


@pytest.mark.parametrize(
    ("fields", "how", "message"),
    [
        (OTHER, {}, "no patients of 'monuseg'"),
        ([field("a")], {}, "no field is left for train"),
        (MANY, {"method": "guess"}, "unknown method 'guess'"),
        (MANY, {"method": "folds", "folds": 3, "fold": 3}, "fold 3 of 3"),
        (MANY, {"test": 1.0}, "not a share"),
        (MANY, {"method": "lists"}, "without a test_list"),
    ],
)
def test_wrong_splits_are_one_line(fields: list[Field], how: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        split(fields, **how)
    assert "\n" not in str(caught.value)


def test_split_file_names_the_patients() -> None:
    value = split(MANY, method="folds").to_json(MANY)
    assert value["patients"]["test"] == sorted(patients(MANY, tuple(value["test"])))
    assert json.dumps(value)
