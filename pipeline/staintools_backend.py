"""Stain matrices by staintools and SPAMS (GPL-3), which are optional and imported nowhere else.

Only the stain matrix extractors of staintools are used, once per slide. This module works around some properties of
staintools 2.1.2:

- ``import staintools`` needs SPAMS even for Macenko, and imports pyplot, which takes most of the stage's start-up time.
  Its submodules are therefore imported without running the package itself.
- Extractors need an image, ``(H, W, 3)``, and change its zeros to ones in place. They are given a copy.
- For an image without dark pixels they raise ``TissueMaskException``, for other unfit images ``AssertionError``.
- Vahadane's dictionary learning runs for one second of wall-clock time, so that its result depends on the load of the
  machine. Here it runs for a fixed number of iterations on one thread, over pixels in a fixed order.
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
"""Installs both without their dependencies, as staintools' OpenCV would replace the headless one."""

VAHADANE_ITERATIONS = 1000
"""Mini-batches of 512 pixels in the dictionary learning; after these, the vectors move by less than 0.01."""


@functools.cache
def _module(name: str) -> types.ModuleType | None:
    try:
        if "staintools" not in sys.modules and (spec := importlib.util.find_spec("staintools")):
            sys.modules["staintools"] = importlib.util.module_from_spec(spec)  # known, but not executed
        return importlib.import_module(f"staintools.stain_extraction.{name}")
    except Exception as error:  # a broken binary of SPAMS raises many kinds
        log.debug("staintools cannot be imported: %r", error)
        return None


def available() -> bool:
    """Whether staintools and SPAMS are installed; SPAMS is imported only when it is used."""
    return _module("macenko_stain_extractor") is not None and importlib.util.find_spec("spams") is not None


def version() -> str | None:
    """Version of staintools; None when it cannot be imported."""
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
        # Its own exceptions, LinAlgError and AssertionError all mean that these pixels do not show the stains.
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
    PipelineError
        When staintools is not installed.
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
    # SPAMS starts from the first pixels and steps through the rest in order: shuffled, all of them are a fair sample.
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
    """Raise an error for a stain method whose extractor is not installed.

    Raises
    ------
    PipelineError
        For ``vahadane``, when staintools or SPAMS is missing.
    """
    if method == "vahadane" and not available():
        raise _missing()


def extractors() -> dict[str, Extractor]:
    """Stain matrix extractors by method: both of staintools where it is installed, else only our own Macenko."""
    if not available():
        return dict(OWN_EXTRACTORS)
    return {"macenko": macenko, "vahadane": vahadane}
