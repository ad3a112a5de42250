"""A file server that fails is told as that, not as damage."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zarr

from pipeline.errors import PipelineError
from pipeline.models.package import ModelPackage
from pipeline.stores.maps import MapStore
from pipeline.stores.nuclei import open_nuclei


@pytest.mark.parametrize(
    ("reader", "module", "name"),
    [
        (MapStore.open, zarr, "open_group"),
        (open_nuclei, pq, "ParquetFile"),
        (ModelPackage.load, Path, "read_text"),
    ],
)
def test_a_file_server_that_fails_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], Any], module: Any, name: str
) -> None:
    def fail(number: int) -> Callable[..., None]:
        def failing(*args: Any, **options: Any) -> None:
            raise OSError(number, os.strerror(number))

        return failing

    for number, expected in ((errno.ESTALE, OSError), (errno.EIO, OSError), (errno.ENOENT, PipelineError)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail(number))
            with pytest.raises(expected):
                reader(tmp_path / "x")
