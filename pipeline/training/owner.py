"""Ownership of model packages: a training overwrites only packages that it has made itself.

This module is imported while Snakemake parses the workflow, so it imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.batch.settings import file_sha256
from pipeline.batch.stage import whole_files
from pipeline.errors import PipelineError

PACKED = "packed.txt"
"""File in a training's folder: SHA-256 of the weights of each package that the training has made, one per line."""


def _packed(work: Path) -> list[str]:
    try:
        return (work / PACKED).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def note_package(work: Path, sha256: str) -> None:
    """Record that a package belongs to a training; to be called before the package is written.

    Parameters
    ----------
    work : pathlib.Path
        Folder of the training.
    sha256 : str
        SHA-256 of the package's weights.
    """
    known = _packed(work)
    if sha256 not in known:
        with whole_files(work / PACKED) as (staged,):
            staged.write_text("".join(f"{one}\n" for one in (*known, sha256)), encoding="utf-8")


def check_place(folder: Path, work: Path) -> None:
    """Refuse to overwrite a model package that a training has not made.

    Parameters
    ----------
    folder : pathlib.Path
        Folder that the training's package is to be written to.
    work : pathlib.Path
        Folder of the training. A package below it is always the training's own.

    Raises
    ------
    PipelineError
        When `folder` holds another package; the message is one line.
    """
    if work.absolute() in folder.absolute().parents:
        return
    card, weights = folder / "model.json", folder / "weights.safetensors"
    found: list[str | None] = []
    if card.is_file():
        try:
            found.append(str(json.loads(card.read_text(encoding="utf-8"))["sha256"]))
        except (ValueError, KeyError, TypeError):
            found.append(None)
    if weights.is_file():
        found.append(file_sha256(weights))
    if not set(found) <= set(_packed(work)):
        raise PipelineError(
            f"{folder} holds a model that the training in {work} has not made",
            "give train.name another name, or move that model away",
        )
