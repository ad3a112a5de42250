"""Annotated fields from all data sources of an experiment."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.training.datasets import arrays, folders, monusac, nucls, qupath
from pipeline.training.datasets.source import Lazy, Source
from pipeline.training.field import Field

__all__ = ["IMPORTERS", "Field", "Importer", "load_fields", "source_name"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Importer:
    """A reader of one kind of data.

    Parameters
    ----------
    read : callable
        Function that lists the fields of a source without reading them; calling one of them reads it.
    options : tuple of str
        Keys of a source that only this kind of data has.
    """

    read: Callable[[Source], list[Lazy]]
    options: tuple[str, ...] = ()


IMPORTERS = {
    "monuseg": Importer(folders.monuseg),
    "tnbc": Importer(folders.tnbc),
    "dsb2018": Importer(folders.label_maps),
    "labels": Importer(folders.label_maps),
    "nuinsseg": Importer(folders.nuinsseg),
    "conic": Importer(arrays.conic),
    "pannuke": Importer(arrays.pannuke),
    "nucls": Importer(nucls.nucls),
    "monusac": Importer(monusac.monusac),
    "qupath": Importer(qupath.qupath, qupath.OPTIONS),
}
"""Importers by the ``kind`` of a source."""


def source_name(source: Mapping[str, Any]) -> str:
    """Return the name of a data source, which by default is its kind."""
    return str(source.get("name", source["kind"]))


def load_fields(sources: list[dict[str, Any]]) -> list[Field]:
    """Read the annotated fields of all data sources.

    Parameters
    ----------
    sources : list of dict
        Entries of the setting ``train.data``, see `pipeline.training.datasets.source.Source`.

    Raises
    ------
    PipelineError
        When a source is of unknown kind, missing, empty or incomplete, or two sources or fields have the same name.
    """
    names = [source_name(source) for source in sources]
    if len(set(names)) != len(names):
        raise PipelineError(f"two data sources are called {max(names, key=names.count)!r}", "give each a name")
    fields: list[Field] = []
    for value in sources:
        importer = IMPORTERS.get(value["kind"])
        if importer is None:
            raise PipelineError(
                f"unknown kind of training data {value['kind']!r}", f"choose from {', '.join(IMPORTERS)}"
            )
        source = Source.from_json(value, importer.options)
        found = importer.read(source)
        if source.limit is not None and source.limit < len(found):
            found = [found[i] for i in np.linspace(0, len(found) - 1, source.limit).round().astype(int)]
        own = [read() for read in found]
        if not own:
            raise PipelineError(f"data source {source.name!r} has no field", "check its regions and its path")
        if not source.empty and not any(one.labels.any() for one in own):
            raise PipelineError(
                f"the fields of {source.name} hold no nucleus",
                "check the annotations; if none is right, say empty: true",
            )
        wrong = next((one for one in own if one.labels.any()), None) if source.empty else None
        if wrong is not None:
            raise PipelineError(
                f"field {wrong.name} of {source.name} holds nuclei, but empty: true says there are none",
                "leave empty out, or mend the annotations",
            )
        sizes = " to ".join(dict.fromkeys(f"{pick(one.mpp for one in own):.3g}" for pick in (min, max)))
        total = sum(count_nuclei(one.labels) for one in own)
        log.info("%s: %d fields of %s µm/px, %d nuclei", source.name, len(own), sizes, total)
        fields += own
    seen: set[str] = set()
    for one in fields:
        if one.name in seen:
            raise PipelineError(f"two training fields are called {one.name!r}", "rename one, or name the sources")
        seen.add(one.name)
    return fields


def count_nuclei(labels: np.ndarray) -> int:
    """Return the number of instances in a label map."""
    return len(np.unique(labels[labels > 0]))
