"""The one place that imports tiffslide, without zarr where that can wait.

tiffslide imports zarr, which takes as long as all else at the start of a stage that reads a slide, and uses it to read
pixels alone. Where `pipeline.slides.open` decodes the tiles itself, zarr is never needed.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
from typing import Any

_READING = ("get_zarr_depth_and_dtype", "get_zarr_selection", "get_zarr_store")
"""What tiffslide has in its module of zarr's."""


class _LateZarr(types.ModuleType):
    """Stands for zarr until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or sys.modules.get("zarr") is self:
            raise AttributeError(name)
        return getattr(importlib.import_module("zarr"), name)


def _read(name: str, *arguments: Any, **options: Any) -> Any:
    return getattr(importlib.import_module("tiffslide._zarr"), name)(*arguments, **options)


@functools.cache
def load() -> Any:
    """The module tiffslide."""
    if not {"zarr", "tiffslide"} & {*sys.modules}:
        reading = types.ModuleType("tiffslide._zarr")
        vars(reading).update({name: functools.partial(_read, name) for name in _READING})
        sys.modules.update({"zarr": _LateZarr("zarr"), reading.__name__: reading})
        try:
            return importlib.import_module("tiffslide")
        except (ImportError, AttributeError):  # a version that needs more of zarr at once
            for name in [name for name in sys.modules if name.partition(".")[0] == "tiffslide"]:
                del sys.modules[name]
        finally:
            del sys.modules["zarr"]
            sys.modules.pop(reading.__name__, None)
    return importlib.import_module("tiffslide")
