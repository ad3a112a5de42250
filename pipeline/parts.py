"""Parts of a huge slide: the work of a stage spread over several jobs, with the result of a single one.

A part does some of a stage's blocks and leaves its store beside its manifest (``NAME.json`` and ``NAME``); the stage
itself, given the parts, puts them together.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.seal import check_seal
from pipeline.stage import read_manifest


@dataclass(frozen=True)
class Part:
    """One of several parts.

    Parameters
    ----------
    number, total : int
        Which it is, from 1 on, and of how many.
    """

    number: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise PipelineError(f"part {self.number}/{self.total}", "give 1/N to N/N")

    @classmethod
    def parse(cls, text: str) -> Part:
        """From ``2/4``.

        Raises
        ------
        PipelineError
            When it is not a part.
        """
        number, _, total = text.partition("/")
        try:
            return cls(int(number), int(total))
        except ValueError:
            raise PipelineError(f"part {text!r}", "give the number and the count of parts, such as 2/4") from None

    def of(self, weights: Sequence[int] | np.ndarray) -> range:
        """Items that are this part's.

        Parameters
        ----------
        weights : sequence of int
            Work of each item. All parts together have each item once, in order, and about the same work.
        """
        ends = np.cumsum(np.asarray(weights, np.int64))
        total = int(ends[-1]) if len(ends) else 0

        def bound(number: int) -> int:
            if number in (0, self.total):
                return len(ends) if number else 0
            return int(np.searchsorted(ends, total * number / self.total, side="right"))

        return range(bound(self.number - 1), bound(self.number))

    def to_json(self) -> list[int]:
        """As plain JSON values."""
        return [self.number, self.total]


def manifest_of(part: Path) -> Path:
    """Manifest beside a part's store."""
    return part.with_name(f"{part.name}.json")


def read_parts(parts: Sequence[Path], **expected: Any) -> list[dict[str, Any]]:
    """Manifests of all parts of a slide.

    Parameters
    ----------
    parts : sequence of pathlib.Path
        Their stores, in order.
    **expected
        What all of them must have been made with.

    Raises
    ------
    PipelineError
        When one is missing or was made with other settings.
    DamagedStore
        When one is not as it was made.
    """
    found = [read_manifest(manifest_of(part)) for part in parts]
    for part in parts:
        check_seal(part)
    for number, (path, manifest) in enumerate(zip(parts, found, strict=True), start=1):
        if manifest.get("part") != [number, len(parts)]:
            raise PipelineError(f"{path} is not part {number} of {len(parts)}", "give all parts of a slide in order")
        for name, value in expected.items():
            if manifest.get(name) != value:
                raise PipelineError(
                    f"{path} was made with {name} {manifest.get(name)}, not {value}", "delete it and run again"
                )
    return found


def link_chunks(part: Path, store: Path, array: str) -> None:
    """Put the chunks of a part's zarr array into another store, without copying where the file system can do that."""
    for folder, _, names in os.walk(part / array / "c"):
        target = store / Path(folder).relative_to(part)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                os.link(Path(folder) / name, target / name)
            except OSError:
                shutil.copyfile(Path(folder) / name, target / name)
