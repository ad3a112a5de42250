"""Seals of stores: a list of the files that a stage wrote, by which missing or changed files are found later.

The chunks of a store carry checksums, which reveal damage when they are read. The seal covers the rest: a missing chunk
would read as empty, and the metadata of arrays has no checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedStore, PipelineError

SEAL = "seal.json"
"""Name of the seal in a store's folder."""

_SUMMED = ("zarr.json", "active", "sums", "doubtful")
"""Names of files and folders without checksums of their own. Files at the top level of a store have none either."""


def walk(top: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `top`, and `top` itself, with the names of its files; nothing if there is no `top`.

    Raises
    ------
    OSError
        When a folder cannot be listed. `os.walk` would go on as if it were empty.
    """

    def fail(error: OSError) -> None:
        if not (isinstance(error, FileNotFoundError) and error.filename == str(top)):
            raise error

    for folder, _, names in os.walk(str(top), onerror=fail):
        yield folder, names


def _files(store: Path) -> list[str]:
    found = []
    for folder, names in walk(store):
        inside = os.path.relpath(folder, store)
        found += [name if inside == "." else f"{inside}/{name}" for name in names]
    return sorted(name for name in found if name != SEAL)


def _sum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            total = zlib.crc32(data, total)
    return total


def _sums(store: Path, files: list[str]) -> dict[str, int]:
    return {name: _sum(store / name) for name in files if "/" not in name or {*name.split("/")} & {*_SUMMED}}


def write_seal(store: Path) -> int:
    """Write the seal of a finished store: its files, and checksums of those that have none of their own.

    Returns
    -------
    int
        CRC-32 of the seal. It goes into the stage's manifest, so that a missing seal is noticed.
    """
    files = _files(store)
    value: dict[str, Any] = {"files": files, "sums": _sums(store, files)}
    value["sum"] = zlib.crc32(json.dumps(value).encode())
    text = json.dumps(value).encode()
    (store / SEAL).write_bytes(text)
    return zlib.crc32(text)


def check_sealed(store: Path, seal: int) -> None:
    """Check that a store has the seal that it was given. A store that does not exist passes.

    Parameters
    ----------
    store : pathlib.Path
        The store.
    seal : int
        What `write_seal` returned.

    Raises
    ------
    DamagedStore
        When its seal is missing or differs.
    """
    try:
        found = zlib.crc32((store / SEAL).read_bytes())
    except FileNotFoundError:
        if not store.is_dir():
            return  # the reader of the store reports that
        raise DamagedStore(store, f"{SEAL} is missing") from None
    if found != seal:
        raise DamagedStore(store, f"{SEAL} is not what was written")


def is_whole(store: Path, seal: int) -> bool:
    """Whether a store has the seal that it was given, and all files that the seal lists."""
    try:
        check_sealed(store, seal)
        _check_files(store, _read_seal(store)[0])
    except (DamagedStore, FileNotFoundError):
        return False
    return True


def is_sealed(store: Path) -> bool:
    """Whether a store has a seal, i.e. whether a stage finished it."""
    return (store / SEAL).is_file()


def which_store(store: Path) -> tuple[int, int] | None:
    """Return a value that differs for another sealed store at the same path; None if there is no seal."""
    try:
        with (store / SEAL).open("rb") as file:  # opened, as clients of file servers may cache what a path stands for
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def check_kept(store: Path, which: tuple[int, int] | None) -> None:
    """Check after a store was read that it is still complete: chunks that disappear meanwhile read as empty.

    Parameters
    ----------
    store : pathlib.Path
        The store.
    which : tuple of int or None
        What `which_store` returned before the store was read. If None, nothing is checked.

    Raises
    ------
    PipelineError
        When the store is missing, or another one is in its place.
    DamagedStore
        When some of its files are missing.
    """
    if which is None:
        return
    if which_store(store) != which:
        raise PipelineError(
            f"{store} was taken away while it was read",
            "check that no job of an earlier run is left, and run the same command again",
        )
    _check_files(store, _read_seal(store)[0])


def check_seal(store: Path) -> None:
    """Check that a store has the files that it was sealed with. A store without a seal passes.

    Raises
    ------
    DamagedStore
        When a file is missing or has changed.
    """
    if not is_sealed(store):
        return
    files, sums = _read_seal(store)
    _check_files(store, files)
    for name, total in sums.items():
        if _sum(store / name) != total:
            raise DamagedStore(store, f"{name} is not what was written")


def _read_seal(store: Path) -> tuple[list[str], dict[str, int]]:
    try:
        value = json.loads((store / SEAL).read_bytes())
        own = value.pop("sum")
        files, sums = value["files"], value["sums"]
        if zlib.crc32(json.dumps(value).encode()) != own:
            raise ValueError("it has changed")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStore(store, f"its seal cannot be read: {error}") from None
    return files, sums


def _check_files(store: Path, files: list[str]) -> None:
    missing = sorted({*files} - {*_files(store)})  # further files are fine: Snakemake adds one of its own
    if missing:
        raise DamagedStore(store, f"{len(missing)} of its {len(files)} files are missing, the first: {missing[0]}")
