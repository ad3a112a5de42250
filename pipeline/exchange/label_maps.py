"""Read instance label maps from image files and ``.npy`` arrays, without executing any code stored in the files."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError, of_the_machine

log = logging.getLogger(__name__)

SUFFIXES = (".png", ".tiff", ".tif", ".npy")
"""Suffixes of files that can hold a label map."""

_HINT = "is it a label map?"


class _Dtype:
    """Stands in for ``numpy.dtype`` while a pickle is read."""

    def __init__(self, code: object = "", *flags: object) -> None:
        self.code = code
        self.order: object = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def build(self) -> np.dtype[Any]:
        if not isinstance(self.code, str) or self.code[:1] not in tuple("biuf") or self.order not in ("<", ">", "|"):
            raise pickle.UnpicklingError(f"an array of type {self.code!r}")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """Stands in for ``numpy.ndarray`` while a pickle is read."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def build(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self.state
        if not (isinstance(data, bytes) and isinstance(dtype, _Dtype)):
            raise pickle.UnpicklingError("an array of Python objects")
        return np.frombuffer(data, dtype.build()).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


class _ArraysOnly(pickle.Unpickler):
    """Unpickler for arrays, numbers, text and containers of these. It never imports or calls a name from the file."""

    _NAMES = {  # noqa: RUF012
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def load_npy(path: Path) -> Any:
    """Read an ``.npy`` file.

    Parameters
    ----------
    path : pathlib.Path
        An array, which is memory-mapped, or a dict of arrays as ``numpy.save`` pickles it.

    Returns
    -------
    numpy.ndarray or dict
        The array, or the dict of arrays.

    Raises
    ------
    PipelineError
        When the file is damaged or holds anything but an array or a dict of arrays. No code in the file is executed:
        pickles are read by an unpickler that accepts only arrays.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype.hasobject:
                if shape != ():
                    raise PipelineError(f"{path} holds an array of Python objects", "save the array of numbers alone")
                return _arrays(_ArraysOnly(io.BytesIO(file.read())).load(), path)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except PipelineError:
        raise
    except Exception as error:  # a damaged pickle or header can raise almost any exception
        if of_the_machine(error):
            raise
        raise PipelineError(f"{path} cannot be read: {error}", "is it a whole .npy file of arrays?") from None


def _arrays(value: Any, path: Path) -> dict[str, np.ndarray]:
    # An object array is pickled as its state: (version, shape, dtype, order, [object]).
    found = value.state[4] if isinstance(value, _Array) and len(value.state) == 5 else None
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        content = found[0]
        if all(isinstance(k, str) and isinstance(v, _Array) for k, v in content.items()):
            return {name: array.build() for name, array in content.items()}
    raise PipelineError(
        f"{path} holds Python objects that are not a dict of arrays", "save the array of instances alone"
    )


def read_label_map(path: Path) -> np.ndarray:
    """Read a label map.

    Parameters
    ----------
    path : pathlib.Path
        ``.png`` or ``.tif`` with one channel (or several equal ones, as image editors write grey), or ``.npy`` with
        an array ``(H, W)`` of whole numbers or a dict of arrays with the key ``inst_map``.

    Returns
    -------
    numpy.ndarray
        Non-negative integers or bool ``(H, W)``.

    Raises
    ------
    PipelineError
        When the file is missing, damaged or not a label map.
    """
    if not path.is_file():
        raise PipelineError(f"{path} is missing", "give a label map: PNG, TIFF or npy")
    try:
        labels = _read(path)
    except PipelineError:
        raise
    except Exception as error:  # image readers raise many kinds of exceptions for damaged files
        if of_the_machine(error):
            raise
        raise PipelineError(f"{path} cannot be read: {error}", _HINT) from None
    return _checked(labels, path)


def _checked(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.ndim == 3 and labels.shape[0] == 1:
        labels = labels[0]
    if labels.ndim == 3:
        colours = labels[..., :3] if labels.shape[2] == 4 else labels[..., :1] if labels.shape[2] == 2 else labels
        if colours.shape[2] in (1, 3):
            if any(not np.array_equal(colours[..., 0], colours[..., i]) for i in range(1, colours.shape[2])):
                raise PipelineError(f"{path} is a coloured picture", "a label map has one number a pixel")
            labels = colours[..., 0]
    if labels.ndim != 2:
        raise PipelineError(f"{path} has shape {labels.shape}, a label map has rows and columns alone")
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        if np.array_equal(labels, whole) and np.abs(whole).max(initial=0) < 2**53:
            labels = whole.astype(np.int64)
    if labels.dtype.kind not in "biu":
        raise PipelineError(f"{path} holds {labels.dtype}, a label map holds integers", _HINT)
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise PipelineError(f"{path} holds negative numbers, a label map holds 0 and up")
    return labels


def _array(content: np.ndarray | dict[str, np.ndarray], path: Path) -> np.ndarray:
    if isinstance(content, dict):
        if "inst_map" not in content:
            raise PipelineError(f"{path} has {', '.join(content) or 'nothing'} but no inst_map", _HINT)
        content = content["inst_map"]
    return np.asarray(content)


def _read(path: Path) -> np.ndarray:
    kind = path.suffix.lower()
    if kind == ".npy":
        return _array(load_npy(path), path)
    if kind in (".tif", ".tiff"):
        import tifffile

        return np.asarray(tifffile.imread(path))
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA"):
                return np.asarray(image)
    import cv2  # keeps 16 bits per colour channel, which Pillow reduces to 8

    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("OpenCV cannot decode it")
    return np.asarray(pixels)


def read_instances(path: Path) -> np.ndarray:
    """Read a label map; a binary mask is split into its 4-connected components.

    An array is a mask if it is bool, an 8-bit array of only 0 and 255, or an array of 0 and 1 with several components.
    A warning is logged for a mask.

    Returns
    -------
    numpy.ndarray
        Integers ``(H, W)``, 0 is background.
    """
    return _separate(read_label_map(path), path)


def instances_of(content: np.ndarray | dict[str, np.ndarray], path: Path) -> np.ndarray:
    """Like `read_instances`, for content that `load_npy` has already read; `path` is for messages."""
    return _separate(_checked(_array(content, path), path), path)


def _separate(labels: np.ndarray, path: Path) -> np.ndarray:
    if labels.dtype != np.bool_:
        highest = int(labels.max(initial=0))
        if highest not in (1, 255) or np.any((labels != 0) & (labels != highest)):
            return labels
        if highest == 255 and labels.dtype.itemsize > 1:
            return labels
    from scipy import ndimage

    parts, count = ndimage.label(labels != 0)
    if labels.dtype != np.bool_ and highest == 1 and count < 2:
        return labels
    log.warning("%s is a mask: its connected parts are taken for instances", path)
    return np.asarray(parts)
