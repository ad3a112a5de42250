"""Parts of a huge slide: a stage's work is split over several jobs, with the same result as from one job.

A part processes some of a stage's blocks and writes a store ``NAME`` with the manifest ``NAME.json`` beside it. The
stage itself, given all parts, joins them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.stage import read_manifest
from pipeline.errors import PipelineError
from pipeline.stores.seal import check_seal, walk


@dataclass(frozen=True)
class Part:
    """One of the parts into which a stage's work is split.

    Parameters
    ----------
    number, total : int
        Number of the part, from 1, and number of all parts.
    """

    number: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise PipelineError(f"part {self.number}/{self.total}", "give 1/N to N/N")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parse text such as ``2/4``.

        Raises
        ------
        PipelineError
            When the text does not name a part.
        """
        number, _, total = text.partition("/")
        try:
            return cls(int(number), int(total))
        except ValueError:
            raise PipelineError(f"part {text!r}", "give the number and the count of parts, such as 2/4") from None

    def of(self, weights: Sequence[int] | np.ndarray) -> range:
        """Return the indices of the items that belong to this part.

        Parameters
        ----------
        weights : sequence of int
            Work of each item. Each item belongs to one part, in order, and all parts have about the same work.
        """
        ends = np.cumsum(np.asarray(weights, np.int64))
        total = int(ends[-1]) if len(ends) else 0

        def bound(number: int) -> int:
            if number in (0, self.total):
                return len(ends) if number else 0
            return int(np.searchsorted(ends, total * number / self.total, side="right"))

        return range(bound(self.number - 1), bound(self.number))

    def to_json(self) -> list[int]:
        """Return number and total as plain JSON values."""
        return [self.number, self.total]


def manifest_of(part: Path) -> Path:
    """Return the path of the manifest beside a part's store."""
    return part.with_name(f"{part.name}.json")


def read_parts(parts: Sequence[Path], **expected: Any) -> list[dict[str, Any]]:
    """Read the manifests of all parts of a slide, after checking the parts.

    Parameters
    ----------
    parts : sequence of pathlib.Path
        The stores of the parts, in order.
    **expected
        Entries that each manifest must have, e.g. the settings that the parts were made with.

    Raises
    ------
    PipelineError
        When a part is missing, out of order, or was made with other settings.
    DamagedStore
        When the store of a part is damaged.
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
    """Add the chunks of a part's zarr array to another store, as hard links where possible, else as copies."""
    for folder, names in walk(part / array / "c"):
        target = store / Path(folder).relative_to(part)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                os.link(Path(folder) / name, target / name)
            except OSError:
                shutil.copyfile(Path(folder) / name, target / name)
