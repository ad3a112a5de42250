"""The one place that imports staintools and, through it, SPAMS (GPL-3): an extra of the installation.

Only its stain matrix extractors are used, once a slide. What has to be known of staintools 2.1.2:

- ``import staintools`` needs SPAMS for Macenko too, and imports pyplot: most of a stage's start. Its modules
  are imported without it;
- extractors want an image, ``(H, W, 3)``, and turn its zeros into ones in place: they get a copy;
- an image without dark pixels raises its own ``TissueMaskException``, others ``AssertionError``;
- Vahadane's dictionary learning runs for one second of wall-clock time, so its answer depends on the machine's load: it
  is given a fixed number of iterations and one thread here, on pixels in a fixed order.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.stain import OWN_EXTRACTORS, Extractor, StainFitError

log = logging.getLogger(__name__)

INSTALL = "pip install --no-deps staintools spams-bin"
"""Without staintools' dependencies: its OpenCV would take the place of the one without displays."""

VAHADANE_ITERATIONS = 1000
"""Mini-batches of 512 pixels of the dictionary learning; from then on the vectors move by less than 0.01."""


@functools.cache
def _module(name: str) -> types.ModuleType | None:
    try:
        if "staintools" not in sys.modules and (spec := importlib.util.find_spec("staintools")):
            sys.modules["staintools"] = importlib.util.module_from_spec(spec)  # known, but not executed
        return importlib.import_module(f"staintools.stain_extraction.{name}")
    except Exception as error:  # a broken binary of SPAMS raises all sorts
        log.debug("staintools cannot be imported: %r", error)
        return None


def available() -> bool:
    """Whether staintools and SPAMS are installed; SPAMS is imported only when it is used."""
    return _module("macenko_stain_extractor") is not None and importlib.util.find_spec("spams") is not None


def version() -> str | None:
    """Version of staintools, None where it cannot be imported."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("staintools") if available() else None
    except PackageNotFoundError:
        return None


def _extract(extractor: Any, rgb: np.ndarray) -> np.ndarray:
    try:
        matrix = extractor.get_stain_matrix(np.array(rgb, np.uint8)[None])
    except Exception as error:
        # Its own exceptions, LinAlgError and assertions alike: these pixels do not do.
        raise StainFitError(f"staintools: {str(error) or type(error).__name__}") from None
    return np.asarray(matrix, np.float64)


@contextmanager
def _steady_learning(module: types.ModuleType) -> Iterator[None]:
    spams = module.spams
    learn = functools.partial(spams.trainDL, iter=VAHADANE_ITERATIONS, numThreads=1, batchsize=512)
    module.spams = types.SimpleNamespace(trainDL=learn)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.spams = spams  # type: ignore[attr-defined]


def macenko(rgb: np.ndarray) -> np.ndarray:
    """Stain matrix ``(2, 3)`` of tissue pixels, uint8 ``(n, 3)``, by staintools' Macenko.

    Raises
    ------
    StainFitError
        When staintools finds no stains.
    """
    module = _require("macenko_stain_extractor")
    return _extract(module.MacenkoStainExtractor, rgb)


def vahadane(rgb: np.ndarray) -> np.ndarray:
    """Stain matrix ``(2, 3)`` of tissue pixels, uint8 ``(n, 3)``, by staintools' Vahadane.

    Raises
    ------
    StainFitError
        When staintools finds no stains.
    PipelineError
        When staintools or SPAMS is not installed.
    """
    module = _require("vahadane_stain_extractor")
    # SPAMS starts from the first pixels that it is given and steps through the rest: let them be a fair mixture.
    rgb = np.asarray(rgb)[np.random.default_rng(0).permutation(len(rgb))]
    with _steady_learning(module):
        return _extract(module.VahadaneStainExtractor, rgb)


def _require(name: str) -> Any:
    module = _module(name)
    if module is None:
        raise _missing()
    return module


def _missing() -> PipelineError:
    return PipelineError("stain method vahadane needs staintools and SPAMS, which cannot be imported", INSTALL)


def check_method(method: str) -> None:
    """Refuse a stain method whose extractor is not installed.

    Raises
    ------
    PipelineError
        For Vahadane's, where staintools or SPAMS is missing.
    """
    if method == "vahadane" and not available():
        raise _missing()


def extractors() -> dict[str, Extractor]:
    """Stain matrix extraction by method: staintools' two where it is installed, else our own Macenko alone."""
    if not available():
        return dict(OWN_EXTRACTORS)
    return {"macenko": macenko, "vahadane": vahadane}
