"""Fixtures for runs of the workflow."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from runs import ROOT, write_toy_model


@pytest.fixture(scope="session")
def model() -> Path:
    """A model package: NUCLEI_TEST_MODEL, or one that ships, first the classical one, which is quicker."""
    if "NUCLEI_TEST_MODEL" in os.environ:
        return Path(os.environ["NUCLEI_TEST_MODEL"]).absolute()
    for name in ("hematoxylin", "default"):
        folder = ROOT / "models" / name
        if (folder / "model.json").is_file():
            return folder
    pytest.skip("no model package in models/")


@pytest.fixture
def toy_model(tmp_path: Path) -> Path:
    """A package that passes the check before a run; no stage can use it."""
    return write_toy_model(tmp_path / "toy")


@pytest.fixture(scope="session")
def without_root_rights() -> list[str]:
    """Command in front of another that takes away root's right to read any file, so that permissions count."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root reads every file, and there is no setpriv to take that right away")
    rights = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
