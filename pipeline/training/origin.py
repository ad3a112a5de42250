"""Origin of synthetic fields: the patients whose fields the generator that painted them has learned from.

Synthetic fields show no patient, but they must not leak held-out patients into a training through their generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.training.datasets.source import TCGA_PATIENT
from pipeline.training.field import Field
from pipeline.training.files import read_json

RECORD = "synthesis.json"
"""File in a folder of synthetic fields that records how they were made and which patients were learned from."""


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of synthetic fields; empty for any other folder.

    Raises
    ------
    PipelineError
        When the record is damaged.
    """
    path = folder / RECORD
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    return record


def origins_of(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Data sources that the synthetic fields of an entry of ``train.data`` were learned from; empty for real fields.

    Each has ``name``, ``licence``, ``fields`` and ``patients``.
    """
    origins: list[dict[str, Any]] = read_origin(Path(source["path"]).expanduser()).get("learned_from", [])
    return origins


def known_patients(entries: Iterable[Mapping[str, Any]], fields: Iterable[Field]) -> list[tuple[str, str]]:
    """Return the patients of some fields that a model or generator has learned from, as sorted (source, patient) pairs.

    Parameters
    ----------
    entries : iterable of mapping
        Data sources that were learned from, with ``name`` and ``patients`` as in a model's card.
    fields : iterable of Field
        Fields whose patients are looked up.
    """
    known = {(entry["name"], patient) for entry in entries for patient in entry.get("patients", ())}
    tcga = {patient for _, patient in known if TCGA_PATIENT.fullmatch(patient)}  # unique across sources
    asked = {(f.source, f.patient) for f in fields}
    return sorted(one for one in asked if one in known or one[1] in tcga)


def check_origins(sources: Sequence[Mapping[str, Any]], held_out: Sequence[Field]) -> None:
    """Refuse synthetic fields whose generator has learned from held-out patients.

    Parameters
    ----------
    sources : sequence of mapping
        An experiment's ``data``.
    held_out : sequence of Field
        The experiment's fields for validation and testing.

    Raises
    ------
    PipelineError
        When a source has such fields.
    """
    for source in sources:
        leaked = known_patients(origins_of(source), held_out)
        if leaked:
            raise PipelineError(
                f"train: the synthetic fields in {source['path']} were painted after {len(leaked)} of the patients "
                f"held out, first {leaked[0][1]} of {leaked[0][0]}",
                "make them again with the same train.split, train.seed and train.validation: snakemake synthesize",
            )
