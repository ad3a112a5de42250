"""Label maps from files, and pickles that are read without being run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.exchange.label_maps import load_npy, read_instances, read_label_map

LABELS = np.zeros((20, 30), np.uint16)
LABELS[2:8, 3:9] = 7
LABELS[10:18, 3:9] = 300
LABELS[10:18, 20:29] = 40_000


@pytest.mark.parametrize("dtype", ["u2", ">u2", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_dict_of_arrays_is_read(tmp_path: Path, dtype: str, order: Any) -> None:
    content = {"inst_map": np.asarray(LABELS.astype(dtype), order=order), "type_map": LABELS > 0}
    np.save(tmp_path / "a.npy", content, allow_pickle=True)  # type: ignore[arg-type]
    found = load_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(found["inst_map"], LABELS)
    np.testing.assert_array_equal(found["type_map"], LABELS > 0)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.npy"), LABELS)


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def object_npy(path: Path, value: Any) -> Path:
    array = np.empty((), object)
    array[()] = value
    np.save(path, array, allow_pickle=True)
    return path


def test_nothing_in_a_pickle_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (Evil(), {"inst_map": Evil()}, [Evil()]):
        with pytest.raises(PipelineError, match=r"evil\.npy cannot be read: it asks for posix\.mkdir"):
            load_npy(object_npy(tmp_path / "evil.npy", value))
    assert not (tmp_path / "pwned").exists()
    np.load(tmp_path / "evil.npy", allow_pickle=True)  # that the file would have done it
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "value", [1, "text", None, {"a": 1}, {"a": [LABELS]}, {1: LABELS}, {"a": np.array([None])}, LABELS, {"a": "x"}]
)
def test_other_objects_are_one_line(tmp_path: Path, value: Any) -> None:
    with pytest.raises(PipelineError, match=r"a\.npy") as caught:
        load_npy(object_npy(tmp_path / "a.npy", value))
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    path = object_npy(tmp_path / "whole.npy", {"inst_map": LABELS})
    whole = path.read_bytes()
    np.save(path, LABELS)
    plain = path.read_bytes()
    np.save(path, np.array([LABELS, None], object), allow_pickle=True)
    cut = [data[:size] for data in (whole, plain) for size in (0, 5, 60, 140, len(data) - 10)]
    swapped = whole.replace(b"i4", b"O8").replace(b"u2", b"U9")
    for data in (*cut, swapped, path.read_bytes(), b"text"):
        path.write_bytes(data)
        with pytest.raises(PipelineError, match=r"whole\.npy") as caught:
            load_npy(path)
        assert "\n" not in str(caught.value)


def test_grey_saved_as_colour(tmp_path: Path) -> None:
    grey = (LABELS > 0).astype(np.uint8) * np.arange(30, dtype=np.uint8)
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([*[grey] * 3, np.full_like(grey, 255)])).save(tmp_path / "rgba.png")
    tifffile.imwrite(tmp_path / "page.tif", LABELS[None])
    tifffile.imwrite(tmp_path / "float.tif", LABELS.astype(np.float32))
    for name in ("rgb.png", "rgba.png"):
        np.testing.assert_array_equal(read_label_map(tmp_path / name), grey)
    for name in ("page.tif", "float.tif"):
        np.testing.assert_array_equal(read_label_map(tmp_path / name), LABELS)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (LABELS > 0, True),
        ((LABELS > 0).astype(np.uint8) * 255, True),
        ((LABELS > 0).astype(np.uint8), True),
        ((LABELS > 0).astype(np.float64), True),
        ((LABELS > 0).astype(">i4"), True),
        ((LABELS == 7).astype(np.uint8), False),  # one nucleus
        ((LABELS > 0).astype(np.uint16) * 255, False),  # nucleus 255, in pieces
        (LABELS, False),
    ],
)
def test_masks_are_taken_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, values: np.ndarray, parts: bool
) -> None:
    np.save(tmp_path / "a.npy", values)
    with caplog.at_level(logging.WARNING):
        found = read_instances(tmp_path / "a.npy")
    if parts:
        assert len(np.unique(found)) == 4
        np.testing.assert_array_equal(found > 0, values > 0)
        assert "is a mask" in caplog.text
    else:
        np.testing.assert_array_equal(found, values)
        assert not caplog.text
