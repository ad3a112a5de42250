"""Whom synthetic fields come from: they show nobody, but what painted them has seen patients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.training.datasets.source import TCGA_PATIENT
from pipeline.training.field import Field
from pipeline.training.files import read_json

RECORD = "synthesis.json"
"""File in a folder of synthetic fields: how they were made, and of whom."""


def read_origin(folder: Path) -> dict[str, Any]:
    """The record of a folder of synthetic fields; empty for any other folder.

    Raises
    ------
    PipelineError
        When it is damaged.
    """
    path = folder / RECORD
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    return record


def origins_of(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the fields of an entry of ``train.data`` were painted after: ``name``, ``licence``, ``patients`` each."""
    origins: list[dict[str, Any]] = read_origin(Path(source["path"]).expanduser()).get("learned_from", [])
    return origins


def known_patients(entries: Iterable[Mapping[str, Any]], fields: Iterable[Field]) -> list[tuple[str, str]]:
    """Patients of these fields, with their source, who are among those that something has learned from.

    Parameters
    ----------
    entries : iterable of mapping
        Data sources with ``name`` and ``patients``, as in a model's card.
    fields : iterable of Field
        The fields.
    """
    known = {(entry["name"], patient) for entry in entries for patient in entry.get("patients", ())}
    tcga = {patient for _, patient in known if TCGA_PATIENT.fullmatch(patient)}  # the same in every source
    asked = {(f.source, f.patient) for f in fields}
    return sorted(one for one in asked if one in known or one[1] in tcga)


def check_origins(sources: Sequence[Mapping[str, Any]], held_out: Sequence[Field]) -> None:
    """Refuse synthetic fields that were painted after patients who are held out.

    Parameters
    ----------
    sources : sequence of mapping
        An experiment's ``data``.
    held_out : sequence of Field
        Its fields for validation and testing.

    Raises
    ------
    PipelineError
        When there are such.
    """
    for source in sources:
        leaked = known_patients(origins_of(source), held_out)
        if leaked:
            raise PipelineError(
                f"train: the synthetic fields in {source['path']} were painted after {len(leaked)} of the patients "
                f"held out, first {leaked[0][1]} of {leaked[0][0]}",
                "make them again with the same train.split, train.seed and train.validation: snakemake synthesize",
            )
