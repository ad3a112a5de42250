"""Whose a model package is: a training writes over no package but its own.

Imported while Snakemake parses the workflow, so nothing heavy is imported here.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.settings import file_sha256
from pipeline.stage import whole_files

PACKED = "packed.txt"
"""File in a training's folder: SHA-256 of the weights of each package that it has made, one a line."""


def _packed(work: Path) -> list[str]:
    try:
        return (work / PACKED).read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return []


def note_package(work: Path, sha256: str) -> None:
    """Note that a package is a training's own; before the package is put into its place.

    Parameters
    ----------
    work : pathlib.Path
        Folder of the training.
    sha256 : str
        Hash of the package's weights.
    """
    known = _packed(work)
    if sha256 not in known:
        with whole_files(work / PACKED) as (staged,):
            staged.write_text("".join(f"{one}\n" for one in (*known, sha256)), encoding="utf-8")


def check_place(folder: Path, work: Path) -> None:
    """Refuse to write over a model package that a training has not made.

    Parameters
    ----------
    folder : pathlib.Path
        Where its package goes.
    work : pathlib.Path
        Folder of the training. What lies in it is its own.

    Raises
    ------
    PipelineError
        When there is another one's; one line.
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
