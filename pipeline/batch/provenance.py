"""Provenance of a result: versions of packages and the state of the code that made it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline

PACKAGES = (
    "numpy",
    "scipy",
    "scikit-image",
    "opencv-python-headless",
    "torch",
    "zarr",
    "shapely",
    "pyarrow",
    "openslide-python",
    "openslide-bin",
    "tiffslide",
    "tifffile",
    "imagecodecs",
    "staintools",
    "snakemake",
)
"""Distributions whose versions can change a result."""


@cache
def git_state() -> dict[str, Any] | None:
    """Return the commit of the checkout that holds this package, or None without a checkout or git.

    Returns
    -------
    dict or None
        ``commit`` (str) and ``modified`` (bool: whether tracked files differ from that commit).
    """
    root = Path(pipeline.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        # Without locks: jobs that run at the same time would lock the index against each other and against the user.
        command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("pipeline", pipeline.__version__), ("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)


def versions() -> dict[str, str]:
    """Return the versions of the pipeline, of Python and of installed `PACKAGES`, without importing them."""
    return dict(_versions())


def code_of(record: Mapping[str, Any]) -> str:
    """Describe the code that made a result, by the entries ``versions`` and ``git`` of its record.

    >>> code_of({"versions": {"pipeline": "0.1.0"}, "git": {"commit": "0123456789abcdef", "modified": True}})
    '0.1.0, commit 0123456789ab with local changes'
    >>> code_of({"versions": {"pipeline": "0.1.0"}})
    '0.1.0'
    """
    git = record.get("git")
    commit = f", commit {git['commit'][:12]}" if git else ""
    return record["versions"]["pipeline"] + commit + (" with local changes" if git and git["modified"] else "")


def now() -> str:
    """Return the current time in UTC to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
