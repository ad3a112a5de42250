"""Importers of data sets whose patches are stacked in ``.npy`` files: CoNIC and PanNuke."""

from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.exchange.label_maps import load_npy
from pipeline.training.datasets.source import Lazy, Source
from pipeline.training.field import Field

CONIC_CLASSES = ("Neutrophil", "Epithelial", "Lymphocyte", "Plasma", "Eosinophil", "Connective")
"""Classes 1 to 6 of CoNIC (Graham et al., CoNIC challenge, Medical Image Analysis 92, 2024)."""

PANNUKE_CLASSES = ("Neoplastic", "Inflammatory", "Connective", "Dead", "Epithelial")
"""Channels 0 to 4 of PanNuke's masks (Gamper et al., arXiv 2003.10778); the last channel is background."""


def _stack(path: Path, channels: tuple[int, ...], count: int | None = None) -> np.ndarray:
    if not path.is_file():
        raise PipelineError(f"{path} is missing", "complete the data folder")
    array = load_npy(path)
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[3] not in channels:
        shape = getattr(array, "shape", "no array")
        raise PipelineError(f"{path} holds {shape}, not (N, H, W, {' or '.join(map(str, channels))})")
    if array.dtype.kind not in "uif":
        raise PipelineError(f"{path} holds {array.dtype}, not numbers")
    if count is not None and len(array) != count:
        raise PipelineError(f"{path} holds {len(array)} patches, its images are {count}", "complete the data folder")
    return array


def _rgb(patch: np.ndarray) -> np.ndarray:
    if patch.dtype == np.uint8:
        return np.array(patch)
    if not np.isfinite(patch).all() or (patch.dtype.kind == "f" and 0 < patch.max(initial=0) <= 1):
        raise PipelineError("images are not in 0 to 255", "save them as uint8, or as floats of that range")
    return np.clip(np.rint(patch), 0, 255).astype(np.uint8)


def conic(source: Source) -> list[Lazy]:
    """List the fields of CoNIC.

    The folder has ``images.npy``, ``labels.npy`` (channels: instances, classes) and ``patch_info.csv``, whose patch
    names tell the image that each patch is from.
    """
    images = _stack(source.path / "images.npy", (3,))
    labels = _stack(source.path / "labels.npy", (2,), len(images))
    names = _patch_names(source.path / "patch_info.csv", len(images))
    return [partial(_conic_field, source, images, labels, index, name) for index, name in enumerate(names)]


def _patch_names(path: Path, count: int) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise PipelineError(
            f"{path} is missing", "it says which patches are of one image, without which a split would leak"
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{path} cannot be read: {error}", "copy it again") from None
    names = [(row.get("patch_info") or "").strip() for row in rows]
    if len(names) != count or not all(names):
        raise PipelineError(f"{path} names {sum(map(bool, names))} of {count} patches in a column patch_info")
    return names


def _conic_field(source: Source, images: np.ndarray, labels: np.ndarray, index: int, name: str) -> Field:
    types = np.asarray(labels[index, ..., 1])
    if types.min(initial=0) < 0 or types.max(initial=0) > len(CONIC_CLASSES):
        raise PipelineError(f"patch {name} has class {types.max()}", f"CoNIC has 1 to {len(CONIC_CLASSES)}")
    return source.field(
        name,
        _rgb(images[index]),
        np.asarray(labels[index, ..., 0]),
        patient=f"{source.name}-{name.rpartition('-')[0] or name}",
        organ="colon",
        mpp=0.5,
        types=types.astype(np.uint8),
        classes=CONIC_CLASSES,
        cohort=name.partition("_")[0],
    )


def pannuke(source: Source) -> list[Lazy]:
    """List the fields of PanNuke.

    The folder has the folds as unpacked: ``images.npy`` and ``types.npy`` in one folder, ``masks.npy`` beside them or
    under ``masks/``. PanNuke does not say which image a patch is from, so each fold counts as one patient.
    """
    found = sorted(source.path.rglob("images.npy"))
    if not found:
        raise PipelineError(f"no images.npy under {source.path}", "check the path of the data source")
    fields: list[Lazy] = []
    for path in found:
        images = _stack(path, (3,))
        masks = _stack(_masks_of(path, source.path), (len(PANNUKE_CLASSES), len(PANNUKE_CLASSES) + 1), len(images))
        organs = _organs(path.with_name("types.npy"), len(images))
        fold = _fold_of(path, source.path)
        fields += [partial(_pannuke_field, source, images, masks, i, fold, organs[i]) for i in range(len(images))]
    return fields


def _masks_of(images: Path, root: Path) -> Path:
    inside = images.relative_to(root)
    parts = ["masks" if part == "images" else part for part in inside.parts[:-1]]
    places = [images.with_name("masks.npy"), root.joinpath(*parts, "masks.npy")]
    return next((place for place in places if place.is_file()), places[0])


def _fold_of(images: Path, root: Path) -> str:
    for part in reversed(images.relative_to(root).parts[:-1]):
        if match := re.fullmatch(r"fold[ _-]*(\d+)", part, re.IGNORECASE):
            return f"fold{match[1]}"
    return "-".join(part for part in images.relative_to(root).parts[:-1] if part != "images") or "all"


def _organs(path: Path, count: int) -> list[str]:
    if not path.is_file():
        return [""] * count
    types = load_npy(path)
    if not isinstance(types, np.ndarray) or types.shape != (count,) or types.dtype.kind not in "US":
        raise PipelineError(f"{path} does not name the organs of {count} patches", "copy it again")
    return [str(name).lower() for name in types.astype(str)]


def _pannuke_field(source: Source, images: np.ndarray, masks: np.ndarray, index: int, fold: str, organ: str) -> Field:
    stack = np.asarray(masks[index])
    if not np.isfinite(stack).all():
        raise PipelineError(f"mask {index} of {fold} holds values that are not numbers", "copy it again")
    labels = np.zeros(stack.shape[:2], np.int32)
    types = np.zeros(stack.shape[:2], np.uint8)
    for channel in range(len(PANNUKE_CLASSES)):
        layer = np.rint(stack[..., channel]).astype(np.int64)
        new = (layer > 0) & (labels == 0)
        # Instance numbers may start again at 1 in every channel.
        labels[new] = int(labels.max()) + np.unique(layer[new], return_inverse=True)[1] + 1
        types[new] = channel + 1
    return source.field(
        f"{fold}-{index:05d}",
        _rgb(images[index]),
        labels,
        patient=f"{source.name}-{fold}",
        organ=organ,
        mpp=0.25,
        types=types,
        classes=PANNUKE_CLASSES,
    )
